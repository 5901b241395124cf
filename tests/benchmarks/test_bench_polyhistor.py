"""Scaling kernels without the Kronecker product, against making it; all tasks in one pass."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from clock import in_turn, row
from torch.nn import functional as F

from adaptlab.evaluate import peak_memory
from adaptlab.modular.polyhistor import (
    Branch,
    LayerwiseScalingKernel,
    PolyhistorConfig,
    TaskAdapters,
)


def _step(branch: Callable, h: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.autograd.grad(branch(h).square().mean(), [h, *leaves])


@pytest.mark.parametrize("reduction", [8, 32])
def test_branch_against_the_kronecker_product(reduction):
    "The last stage of a Swin-T, four tasks, 16 images: forward and backward."
    torch.manual_seed(0)
    n = 96 // reduction
    kernels = LayerwiseScalingKernel(8), LayerwiseScalingKernel(8)
    h = torch.randn(4, 16 * 49, 768, requires_grad=True)
    D = torch.randn(4, 1, 96, n, requires_grad=True)
    U = torch.randn(4, 1, n, 96, requires_grad=True)
    leaves = [D, U, kernels[0].S, kernels[1].S]
    branch = Branch(D, U, kernels)

    def materialised(h):
        down, up = branch.dense()
        return torch.baddbmm(h, F.gelu(h @ down), up)

    torch.testing.assert_close(branch(h), materialised(h), rtol=1e-3, atol=1e-3)
    ours, theirs = (partial(_step, f, h, leaves) for f in (branch, materialised))
    what = f"Polyhistor-Lite, width 768, reduction {reduction}, against the Kronecker product"
    bound = 1.0 if n > 4 else None  # products with three columns are slow on a CPU
    row(f"{what}, step", *in_turn(ours, theirs, rounds=9), bound=bound)
    row(f"{what}, memory", peak_memory(ours, "cpu") / 2**20, peak_memory(theirs, "cpu") / 2**20,
        unit="MiB")
    row(f"{what}, multiplications of a place", 2 * (8 * 96 * n + 64 * n), 2 * 768 * 8 * n,
        bound=0.14, unit="products")


def test_generating_adapters():
    "Lite against HyperFormer, four tasks on a Swin-T."
    widths = [d for d, depth in ((96, 2), (192, 2), (384, 6), (768, 2)) for _ in range(depth)]
    made = {mode: TaskAdapters(widths, PolyhistorConfig(
        tasks=tuple("abcd"), mode=mode, reduction=8, rank=4)) for mode in ("lite", "hyperformer")}
    tasks = torch.arange(4)
    ours, theirs = (partial(made[mode], tasks) for mode in made)
    row("Lite's adapters against HyperFormer's, made", *in_turn(ours, theirs, rounds=9), bound=1.0)
