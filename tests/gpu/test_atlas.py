"""aTLAS on a GPU: every way to learn coefficients, LoRA vectors, FULL's step, the experiment."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptlab import adapters, modules, recipes
from adaptlab.arithmetic.atlas import (
    AnisotropicComposer, TaskVector, attach_composition, disentanglement_error, entropy_loss,
    learn_addition, learn_composition, learn_negation, learn_test_time, select_task_vectors)
from adaptlab.bench import cost
from adaptlab.bench.runs import launch
from adaptlab.experiments import atlas as experiment
from adaptlab.experiments.atlas import FULL, SMALL
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, full, in_turn, llama, machine, row, token_ids


def vectors_of(model, n, size=0.02):
    g = torch.Generator(DEVICE).manual_seed(0)
    return [TaskVector.of({k: size * p.detach().abs().mean() * torch.randn(
        p.shape, generator=g, device=DEVICE).to(p.dtype) for k, p in model.named_parameters()})
        for _ in range(n)]


@pytest.mark.parametrize(("dtype", "granularity"), [
    (torch.float32, "block"), (torch.bfloat16, 4), (torch.bfloat16, "isotropic")])
def test_composes_and_bakes(dtype, granularity):
    model, ids = llama("smollm2", layers=1, dtype=dtype), token_ids(2, 32)
    made = AnisotropicComposer(model, vectors_of(model, 2), granularity, only_matrices=True)
    batch = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, model(input_ids=ids).logits)
    before = modules.cross_entropy(made, batch).item()
    learn_composition(made, [batch] * 8, lambda m, b: modules.cross_entropy(m, {
        k: v[0] for k, v in b.items()}), lr=0.3, epochs=1, batch_size=1)
    assert made.coef.device.type == DEVICE
    with torch.no_grad():
        after = modules.cross_entropy(made, batch).item()
        composed = made(input_ids=ids).logits
        model.load_state_dict(made.bake())
        assert torch.equal(model(input_ids=ids).logits, composed)
    assert after < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ways_to_learn(dtype):
    torch.manual_seed(0)
    model = recipes.MLP((20, 16, 4)).to(DEVICE, dtype)
    x, y = torch.randn(64, 20, device=DEVICE, dtype=dtype), torch.arange(64, device=DEVICE) % 4
    vectors, few = vectors_of(model, 3, 0.5), {"epochs": 1, "batch_size": 32}
    kept = select_task_vectors(model, vectors, (x, y), budget=2).vectors
    select_task_vectors(model, vectors, (x, y), budget=2, by="grad")
    for options in ({}, {"linearized": True}, {"dtype": torch.bfloat16}):
        made = AnisotropicComposer(model, kept, **options)
        learn_addition(made, [(x, y), (x.flip(0), y.flip(0))], **few)
        learn_test_time(made, x, lambda z: z + 0.1 * torch.randn_like(z), **few)
        learn_composition(made, x, lambda net, batch: entropy_loss(net(batch)), **few)
        learn_negation(AnisotropicComposer(model, kept[:1]), (x, y), (x, y), **few)
        assert made.coef.dtype == torch.float32 and made.coef.any() and made.coef.isfinite().all()
        assert 0 <= disentanglement_error(made, x, 0, 1) <= 1
    assert len(made.coefficients()) == made.coef.numel()
    assert 0 < abs(vectors[0].cosine(vectors[1])) < 1


class Classifier(nn.Module):
    "The shape of FULL: CLIP ViT-B/32 under a frozen head."

    def __init__(self):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        sizes = {"hidden_size": 48, "num_hidden_layers": 1} if DRY else {}
        self.vision_model = CLIPVisionModel(CLIPVisionConfig(patch_size=32, **sizes))
        width = self.vision_model.config.hidden_size
        self.register_buffer("text", torch.randn(47, width))

    def forward(self, x):
        return F.normalize(self.vision_model(x).pooler_output, dim=-1) @ self.text.T


def test_full_shape():
    with torch.device(DEVICE):
        torch.manual_seed(0)
        model = Classifier().eval()
        x = torch.randn(2 if DRY else FULL.training.batch_size, 3, 224, 224)
        y = torch.randint(47, (len(x),))
    n = len(FULL.tasks) - 1

    def step(net, optimizer):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()

    def steps(net):
        return partial(step, net, torch.optim.AdamW(adapters.trainable_parameters(net), lr=1e-4))

    vectors = vectors_of(model, n)

    def loss(net, batch):
        with torch.autocast(DEVICE, torch.bfloat16):
            return modules.cross_entropy(net, batch)

    flops = cost.forward_flops(model, x, len(x))
    found = cost.needs(model, flops=flops, trained=2 * len(x), machine=machine())
    row("scores of all blocks, two batches", *clock(partial(
        select_task_vectors, model, vectors, [(x, y)] * 2, loss, budget=2), rounds=1, warm=1),
        counted=(3600 * found.set_index("what").loc["time", "amount"], None))
    made = AnisotropicComposer(model, vectors)
    del vectors  # the composer has them
    full(f"{len(x)} pictures, {n} vectors", made, x, steps(made), autocast=torch.bfloat16, rounds=3)
    ours, whole = in_turn(steps(made), steps(model), rounds=4, warm=1)
    row("the same, beside full fine-tuning", ours, reference=whole, against="full fine-tuning")
    del made
    model.zero_grad()
    made = AnisotropicComposer(model, vectors_of(model, n), dtype=torch.bfloat16)
    row("the same, vectors in bfloat16", *clock(steps(made), rounds=3, warm=1))


def test_lora_vectors_train():
    model, ids, found = llama("smollm2", layers=2), token_ids(2, 64), []
    for rank in (4, 8):
        adapters.attach(model, partial(adapters.LoraAdapter, rank=rank), ["q_proj", "down_proj"])
        with torch.no_grad():
            for p in adapters.trainable_parameters(model):
                p.normal_(std=0.02)
        found.append(TaskVector.from_lora(model))
        adapters.detach(model)

    def step():
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()

    adapters.attach(model, partial(adapters.LoraAdapter, rank=12), ["q_proj", "down_proj"])
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)
    lora, _ = clock(step, rounds=5)
    adapters.detach(model)
    attach_composition(model, found)
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)
    row("two LoRAs composed, a step", clock(step, rounds=5)[0], reference=lora,
        against="LoRA, r = 12")
    assert all(a.coef.any() for a in adapters.adapters(model).values())


def test_small_experiment(tmp_path, monkeypatch):
    "Experts are noise around the base here: training them costs more than the experiment."
    torch.manual_seed(0)
    made = nn.ModuleList(recipes.MLP((196, 128, 128, 10)) for _ in range(9)).eval()
    with torch.no_grad():
        for expert in made[1:]:
            expert.load_state_dict(made[0].state_dict())
            for p in expert.parameters():
                p.add_(0.02 * torch.randn_like(p))
    monkeypatch.setattr(experiment, "family", lambda: made)
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, shots=(1, 2), targets=SMALL.targets[:1],
                        lrs=(0.1,), slow_lrs=(0.01,), full_lrs=(1e-3,), passes=1,
                        images=64, forget=SMALL.forget[:1],
                        training=Training(steps=2, batch_size=16))
    assert launch("atlas", cfg, root=tmp_path, progress=False).claims
