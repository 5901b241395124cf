"""Bypasses by gathering against a materialised dense change: time and peak memory, in one run."""

import time
from functools import partial

import pytest
import torch

from adaptlab.evaluate import peak_memory
from adaptlab.sparse.neuroada import neuroada_linear, select_topk


def step(w, x, idx, theta, impl):
    "One forward and backward pass of a layer."
    y = neuroada_linear(x, w, None, idx, theta, impl=impl)
    return torch.autograd.grad(y.square().sum(), (x, theta))


@pytest.mark.parametrize("k", [1, 4])
def test_gather_against_materialised(benchmark, k):
    torch.manual_seed(0)
    w, x = torch.randn(1536, 576), torch.randn(256, 576, requires_grad=True)
    idx, theta = select_topk(w, k), torch.randn(1536, k, requires_grad=True)
    gather, dense = (partial(step, w, x, idx, theta, i) for i in ("gather", "materialize"))
    for ours, theirs in zip(gather(), dense(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    benchmark.pedantic(gather, rounds=15, warmup_rounds=2)
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        dense()
        seconds.append(time.perf_counter() - start)
    faster = sorted(seconds)[7] / benchmark.stats.stats.median
    leaner = peak_memory(dense, "cpu") / peak_memory(gather, "cpu")
    benchmark.extra_info["materialised / gather, time"] = round(faster, 2)
    benchmark.extra_info["materialised / gather, peak memory"] = round(leaner, 2)
    print(f"\nNeuroAda k={k}, 1536 x 576, 256 tokens: gathering takes 1/{faster:.2f} of the time "
          f"and 1/{leaner:.2f} of the peak memory of a dense change")  # fmt: skip
    assert leaner > 1
    if k == 1:
        assert faster > 1
