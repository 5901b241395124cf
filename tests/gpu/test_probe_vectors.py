"""Where the time of composing, choosing and packing goes on a card: for one run, then removed."""

import math
import time
import warnings
from functools import partial

import pytest
import torch

from adaptlab.arithmetic.atlas import AnisotropicComposer
from adaptlab.arithmetic.compeft import ternarize
from adaptlab.sparse.lt_sft import select
from gpu.card import DEVICE, DRY, sync
from gpu.test_atlas import Classifier, vectors_of


def profiled(name, work):
    work()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [] if DRY else [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as found:
        start = time.perf_counter()
        work()
        sync()
        seconds = time.perf_counter() - start
    table = found.key_averages().table(
        sort_by="self_cpu_time_total" if DRY else "self_cuda_time_total", row_limit=14,
        max_name_column_width=60)
    warnings.warn(f"PROBE {name}: {seconds:.4f} s\n{table}", stacklevel=1)


@pytest.mark.filterwarnings("always")
def test_composing():
    with torch.device(DEVICE):
        model = Classifier().eval()
        x = torch.randn(2 if DRY else 128, 3, 224, 224)
    made = AnisotropicComposer(model, vectors_of(model, 7))

    def step():
        made.coef.grad = None
        with torch.autocast(DEVICE, torch.bfloat16):
            made(x).square().mean().backward()

    profiled("aTLAS step", step)
    profiled("composing alone", lambda: sum(t.sum() for t in made.composed().values()).backward())


@pytest.mark.filterwarnings("always")
def test_products():
    said = []
    for n, size in ((7, 768 * 3072), (7, 768 * 768), (7, 768)):
        rows, g = torch.randn(n, size, device=DEVICE), torch.randn(size, device=DEVICE)
        parts = math.gcd(size, 256)
        coef = torch.randn(n, device=DEVICE)
        works = {
            "mm": lambda rows=rows, g=g: rows @ g[:, None],
            "mv": lambda rows=rows, g=g: rows @ g,
            "bmm": lambda rows=rows, g=g, C=parts: (
                rows.unflatten(-1, (C, -1)).transpose(-3, -2) @ g.view(C, -1, 1)).sum(-3),
            "product": lambda rows=rows, g=g: (rows * g).sum(-1),
            "forward mm": lambda rows=rows, coef=coef: coef[None] @ rows,
            "forward addmv": lambda rows=rows, coef=coef, g=g: torch.addmv(g, rows.T, coef)}
        for name, work in works.items():
            work()
            sync()
            start = time.perf_counter()
            for _ in range(10):
                work()
            sync()
            said.append(f"{name} {size}: {1e5 * (time.perf_counter() - start):.1f} us")
    warnings.warn("PROBE " + "; ".join(said), stacklevel=1)


@pytest.mark.filterwarnings("always")
def test_choosing():
    tau = torch.randn(10**5 if DRY else 10**8, device=DEVICE)
    profiled("ternarize 1e8", partial(ternarize, tau, 0.2))
    moved = {str(i): t.abs() for i, t in enumerate(tau.chunk(100))}
    profiled("select among 1e8 in 100", partial(select, moved, len(tau) // 40))
