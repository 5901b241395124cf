"""Polyhistor on a GPU: a Swin-T of random weights, the branch, and the small experiment."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from adaptlab.bench.runs import launch
from adaptlab.experiments.polyhistor import NYU_WORK, SMALL
from adaptlab.modular.polyhistor import (
    Branch,
    LayerwiseScalingKernel,
    MLPDecoder,
    PolyhistorConfig,
    PolyhistorModel,
)
from gpu.card import DEVICE, DRY, clock, in_turn, row


def _swin():
    from transformers import SwinBackbone, SwinConfig

    torch.manual_seed(0)
    small = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]} if DRY else {}
    return SwinBackbone(SwinConfig(drop_path_rate=0.0, out_indices=(1, 2, 3, 4), **small))


@pytest.mark.parametrize("mode", ["lite", "hyperformer", "adapter"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_trains_three_tasks_on_a_swin(mode, precision):
    backbone, size = _swin(), (64, 96) if DRY else (288, 384)
    config = PolyhistorConfig(tasks=tuple(NYU_WORK.tasks), mode=mode, reduction=8, embed_dim=64,
                              rank=2)
    model = PolyhistorModel(backbone, config, {
        name: MLPDecoder(backbone.channels, t.out, unit=t.measure == "angle")
        for name, t in NYU_WORK.tasks.items()}).to(DEVICE)
    rng = torch.Generator().manual_seed(0)
    batch = {"image": torch.rand(2, 3, *size, generator=rng),
             "segmentation": torch.randint(-1, 13, (2, *size), generator=rng),
             "depth": torch.rand(2, 1, *size, generator=rng),
             "normal": F.normalize(torch.randn(2, 3, *size, generator=rng), dim=1)}
    batch = {name: t.to(DEVICE) for name, t in batch.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-3)
    losses = []

    def step():
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = NYU_WORK.loss(model, batch)
        loss.backward()
        adam.step()
        losses.append(loss.item())

    row(f"Polyhistor, {mode}, step, {precision}", *clock(step))
    for _ in range(5):
        step()
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in trained)
    model.eval()
    with torch.no_grad():
        found = model(batch["image"])
        with model.cached():
            torch.testing.assert_close(model(batch["image"]), found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branch_against_the_kronecker_product(dtype):
    torch.manual_seed(0)
    n, places = 12, 64 if DRY else 16 * 108
    kernels = [LayerwiseScalingKernel(8).to(DEVICE) for _ in range(2)]
    h = torch.randn(4, places, 768, device=DEVICE, dtype=dtype, requires_grad=True)
    D = (torch.randn(4, 1, 96, n, device=DEVICE) / 96**0.5).requires_grad_()
    U = (torch.randn(4, 1, n, 96, device=DEVICE) / n**0.5).requires_grad_()
    branch = Branch(D, U, tuple(kernels))

    def materialised(h):
        down, up = (m.to(h.dtype) for m in branch.dense())
        return torch.baddbmm(h, F.gelu(h @ down), up)

    a, b = branch(h).float(), materialised(h).float()
    assert (a - b).norm() <= (1e-4 if dtype == torch.float32 else 0.02) * b.norm()

    def step(f):
        torch.autograd.grad(f(h).float().square().mean(), [h, D, U])

    ours, theirs = in_turn(partial(step, branch), partial(step, materialised))
    row(f"Lite's branch against the Kronecker product, {dtype}", ours, reference=theirs)


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE)
    if DRY:
        cfg = cfg.replace(sizes=(16, 8, 8), training={"steps": 1})
    assert launch("polyhistor", cfg, root=tmp_path).claims
