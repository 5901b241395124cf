"""DiffFit on a GPU: folding, DiT-XL/2 with each method of FULL, and the small experiment."""

import copy

import pytest
import torch

from adaptlab import adapters
from adaptlab.bench import rivals
from adaptlab.bench.diffusion import XL_2, ddpm_loss
from adaptlab.bench.runs import launch
from adaptlab.experiments import difffit as told
from adaptlab.experiments.difffit import FULL, SMALL, make_dit
from adaptlab.sparse.difffit import (
    DiffFit,
    DiffFitConfig,
    interpolate_sincos_pos_embed,
    param_groups,
    trainable_summary,
)
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, full, in_turn, row

CLASSES, BATCH = 102, 4 if DRY else FULL.photo_training.batch_size  # of the flowers
LORA = rivals.lora(16, ("attn.qkv", "attn.proj"), also=("y_embedder",))
HOW = {  # as FULL prepares them
    "DiffFit": DiffFit.wrap,
    "BitFit": lambda model: DiffFit.wrap(model, DiffFitConfig(gamma_locations=())),
    "LoRA, rank 16": lambda model: LORA(model, None, 0),
    "full": lambda model: model.requires_grad_(True),
}


def dit(depth=28):
    "DiT-XL/2, or some blocks of it, with gates that are not zero."
    size, channels, width, _, heads, _, *more = XL_2
    if DRY:
        size, width, depth, heads = 8, 64, 2, 4
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = make_dit(size, channels, width, depth, heads, CLASSES, *more)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def latents(model, n):
    "Latents, levels and classes by the names of DiT's inputs."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, model.channels, model.size, model.size, generator=g)
    y = torch.arange(n) % CLASSES
    return {"x": x.to(DEVICE), "t": (9 * y).to(DEVICE), "y": y.to(DEVICE)}


def training_step(model, batch):
    "What `Training.fit` does in a step of FULL."
    groups = param_groups(model, FULL.photo_lrs[0])
    adam = torch.optim.AdamW(groups, fused=True)

    def step():
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = ddpm_loss(model, (batch["x"], batch["y"]))
        loss.backward()
        adam.step()

    return step


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_folds(dtype, near):
    model = dit(2).to(dtype)
    inputs = latents(model, 4)
    inputs["x"] = inputs["x"].to(dtype)
    config = DiffFitConfig(train_bias=False, extra_trainable=(),
                           gamma_locations=("attn", "mlp", "q", "k", "v"))
    with torch.no_grad():
        base = model(**inputs)
        DiffFit.wrap(model, config)
        assert torch.equal(model(**inputs), base)
        for own in adapters.adapters(model).values():
            own.gamma.mul_(torch.rand_like(own.gamma) + 0.5)
        before = model(**inputs).float()
        assert trainable_summary(model)["all"] == trainable_summary(model)["gamma"] > 0
        after = adapters.merge(model)(**inputs).float()
    gap = (after - before).norm()
    assert gap <= near * before.norm() and gap < (base - before).norm()
    adapters.unmerge(model)
    adapters.detach(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs), base)
        model.size *= 2
        table = interpolate_sincos_pos_embed(model.dim, model.size // model.patch)
        model.pos_embed = table.to(inputs["x"])
        finer = inputs | {"x": inputs["x"].repeat(1, 1, 2, 2)}
        assert model(**finer).shape == finer["x"].shape


def test_full_shape():
    "FULL's model, batch and precision, prepared in turn as FULL does."
    model = dit()
    batch = latents(model, BATCH)
    for name, prepare in HOW.items():
        prepare(model)
        step = training_step(model, batch)
        full(f"DiT-XL/2, batch {BATCH}, {name}", model, batch, step, autocast=torch.bfloat16,
             rounds=3)
        grads = [p.grad for p in adapters.trainable_parameters(model)]
        assert all(g is not None and g.isfinite().all() for g in grads)
        model.zero_grad()
        del step, grads
        if adapters.adapters(model) or adapters.also_trained(model):
            adapters.detach(model)


def test_step_against_full_fine_tuning():
    "No gradient of a matrix: a step must cost less."
    model = dit(4)
    batch, steps = latents(model, BATCH), []
    for name in ("DiffFit", "full"):
        one = copy.deepcopy(model)
        HOW[name](one)
        steps.append(training_step(one, batch))
    ours, everything = in_turn(*steps, rounds=5, warm=2)
    row("a step, 4 of 28 blocks", ours, reference=everything, against="full fine-tuning", bound=1.0)


def test_small_experiment(tmp_path, monkeypatch):
    "All of it, with an untrained net in the place of the one that is trained for half a minute."
    monkeypatch.setattr(told, "small_dit", lambda: make_dit(dim=16, depth=1, heads=2))
    cfg = SMALL.replace(seeds=(0,), images=(16, 16), lrs=(1e-2,), device=DEVICE,
                        training=Training(steps=1, batch_size=8))
    assert launch("difffit", cfg, root=tmp_path, progress=False).claims
