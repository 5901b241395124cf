"""DiffFit on a GPU: folding, steps at DiT-XL/2's shape, and the small experiment."""

import pytest
import torch

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.difffit import SMALL, XL_2, DiT, ddpm_loss
from adaptlab.sparse.difffit import DiffFit, DiffFitConfig
from gpu.card import DEVICE, DRY, clock, row


def dit(depth):
    shape = (8, 4, 64, 2, 4, 101, 2, 1000, 1) if DRY else (*XL_2[:3], depth, 16, 101, *XL_2[6:])
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = DiT(*shape)
    with torch.no_grad():  # gates of a trained model
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def images(model, n):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, model.size, model.size, generator=g)
    return x.to(DEVICE), torch.arange(n, device=DEVICE) % 101


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folds(dtype):
    model = dit(2).to(dtype)
    x, y = images(model, 4)
    inputs = x.to(dtype), y * 9, y
    with torch.no_grad():
        base = model(*inputs)
        DiffFit.wrap(model, DiffFitConfig(train_bias=False, gamma_locations=(
            "attn", "mlp", "q", "k", "v")))
        assert torch.equal(model(*inputs), base)
        for own in adapters.adapters(model).values():
            own.gamma.mul_(torch.rand_like(own.gamma) + 0.5)
        before = model(*inputs).float()
        after = adapters.merge(model)(*inputs).float()
    assert (after - before).norm() <= (1e-4 if dtype == torch.float32 else 0.1) * before.norm()


@pytest.mark.parametrize("how", ["DiffFit", "full"])
def test_steps_at_full_shape(how):
    "FULL's model with random weights, batch 32, under autocast to bfloat16."
    model = dit(28)
    if how == "DiffFit":
        DiffFit.wrap(model)
    batch = images(model, 4 if DRY else 32)
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-4)

    def step():
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = ddpm_loss(model, batch)
        loss.backward()
        adam.step()

    row(f"DiT-XL/2, batch 32, {how}, step", *clock(step, rounds=5))
    grads = [p.grad for p in adapters.trainable_parameters(model)]
    assert all(g is not None and g.isfinite().all() for g in grads)


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE)
    assert launch("difffit", cfg, root=tmp_path).claims
