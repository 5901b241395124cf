"""Model soups on a GPU: the method in float32 and bf16, ViT-B/32 at FULL's size, and SMALL."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

from adaptlab import modules, recipes
from adaptlab.arithmetic.model_soups import (
    LearnedSoup,
    angle,
    greedy_soup,
    interpolate,
    interpolation_advantage,
    lent,
    logit_ensemble,
    merged_state_dict,
    recalibrate_batchnorm,
    soup_ensemble_gap,
    uniform_soup,
)
from adaptlab.bench.pictures import ClipClassifier
from adaptlab.bench.runs import launch
from adaptlab.experiments.model_soups import FULL, SMALL
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, full, in_turn, row

K = FULL.members + 1  # the start is a candidate, too


def family(dtype):
    "A small network and four fine-tunes of it."
    torch.manual_seed(0)
    net = recipes.SmallCNN(channels=(4, 8)).to(DEVICE, dtype).eval()
    nets = [copy.deepcopy(net) for _ in range(4)]
    with torch.no_grad():
        for other in nets:
            for p in other.parameters():
                p.add_(0.05 * torch.randn_like(p))
    x = torch.rand(32, 1, 8, 8, device=DEVICE, dtype=dtype)
    return net, nets, (x, torch.arange(32) % 10)  # labels from the CPU, as a loader gives them


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_recipes(dtype, near):
    net, nets, (x, y) = family(dtype)
    mean = {k: torch.stack([n.state_dict()[k].double() for n in nets]).mean(0)
            for k in net.state_dict()}
    greedy = greedy_soup(nets, lambda m: 0.0, net).state_dict
    half = interpolate(uniform_soup(nets[:2]), uniform_soup(nets[2:]), 0.5)
    for soup in (uniform_soup(nets), greedy, half):
        for key, value in soup.items():
            assert value.device.type == DEVICE
            torch.testing.assert_close(value.double(), mean[key], atol=near, rtol=near)
    with lent(net, greedy) as filled, torch.no_grad():
        assert filled(x).isfinite().all() and logit_ensemble(nets)(x).isfinite().all()
    fresh = recalibrate_batchnorm(net, greedy, [x])
    assert fresh.keys() == merged_state_dict(net).keys()
    pot = LearnedSoup(net, nets)
    assert pot.fit((x, y), epochs=2).steps == 2 and pot.raw.device.type == DEVICE
    far = LearnedSoup(net, nets, stack_device="cpu")
    F.cross_entropy(far(x).float(), y.to(DEVICE)).backward()
    assert far.raw.grad.isfinite().all() and far.to_state_dict().keys() == greedy.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diagnostics(dtype):
    "Ends from files lie on the CPU, the starting point on the card."
    net, nets, batch = family(dtype)
    ends = [{k: v.cpu() for k, v in n.state_dict().items()} for n in nets[:2]]
    assert 60 < angle(*ends, merged_state_dict(net)) < 120
    gap = soup_ensemble_gap(net, *ends, [batch])
    assert all(abs(v) < 1e3 for v in gap)
    assert interpolation_advantage(*ends, lambda m: 1.0, net) == 0


def vit(classes=1000):
    "CLIP's ViT-B/32 under a head for ImageNet."
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 projection_dim=16) if DRY else {"projection_dim": 512}
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return ClipClassifier(transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(patch_size=32, **sizes)), classes)


def pixels(model, n):
    batch = torch.randn(2 if DRY else n, 3, 224, 224, device=DEVICE)
    return batch, torch.arange(len(batch), device=DEVICE) % 1000


def training_step(model, batch, training):
    "What `Training.fit` does in a step of FULL."
    adam = torch.optim.AdamW(trained(model), lr=training.lr, fused=True)

    def step():
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=training.precision == "bf16"):
            loss = modules.cross_entropy(model, batch)
        loss.backward()
        if training.clip:
            torch.nn.utils.clip_grad_norm_(trained(model), training.clip)
        adam.step()

    return step


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def precision(training):
    return torch.bfloat16 if training.precision == "bf16" else None


def test_a_member_of_full():
    model, training = vit().train(), FULL.training
    batch = pixels(model, training.batch_size)
    full(f"ViT-B/32, all weights, batch {training.batch_size}", model, batch,
         training_step(model, batch, training), autocast=precision(training), rounds=3)
    assert all(p.grad.isfinite().all() for p in trained(model))


def test_learned_soup_of_full():
    model, training = vit(), FULL.learned
    pot = LearnedSoup(model, [model.state_dict()] * (4 if DRY else K))
    batch = pixels(model, training.batch_size)
    full(f"learned soup of {K}, batch {training.batch_size}", pot, batch,
         training_step(pot, batch, training), autocast=precision(training), rounds=3)
    assert pot.raw.grad.isfinite().all()


def test_soups_of_large_models():
    "The mean of eight models on the card, and a greedy soup of them, scores aside."
    states = [vit().state_dict() for _ in range(8)]

    def plain():
        return {k: sum(s[k] for s in states) / len(states) if v.is_floating_point() else v
                for k, v in states[0].items()}

    ours, theirs = in_turn(lambda: uniform_soup(states), plain, rounds=5)
    row("uniform soup of 8 ViT-B/32", ours, reference=theirs, against="a plain sum")
    ours, theirs = in_turn(lambda: greedy_soup(states, lambda state: 0.0, scores=range(8)),
                           lambda: [plain() for _ in range(7)], rounds=2, warm=1)
    row("greedy soup of 8, its 7 means", ours, reference=theirs, against="7 plain sums of 8")


def test_small(tmp_path):
    cfg = SMALL.replace(
        device=DEVICE, seeds=(0,), members=2, epochs=(1, 1), sizes=(32, 64), limit_seeds=1,
        pairs=1, learned=Training(steps=2, batch_size=32, lr=0.05),
        training=Training(epochs=1, batch_size=16, schedule="constant_with_warmup", warmup=1))
    assert launch("model_soups", cfg, root=tmp_path, progress=False).claims
