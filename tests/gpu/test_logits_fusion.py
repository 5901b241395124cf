"""Dynamic logits fusion on a GPU: the search, writing in bf16, speed, the small experiment."""

from functools import partial

import pytest
import torch

from adaptlab.arithmetic.logits_fusion import DynamicLogitFusion, dynamic_alpha, static_fusion
from adaptlab.bench.runs import launch
from adaptlab.experiments.logits_fusion import SMALL
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, in_turn, llama, row, token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_search_is_that_of_the_cpu(dtype):
    g = torch.Generator().manual_seed(0)
    L, S, E = (2 * torch.randn(3, 16, 500 if DRY else 32_000, generator=g)).to(dtype)
    for method in ("grid", "bisect"):
        here = dynamic_alpha(*(x.to(DEVICE) for x in (L, S, E)), method=method)
        there = dynamic_alpha(L, S, E, method=method)
        assert (here.alpha.cpu() - there.alpha).abs().max() <= (0.101 if method == "grid" else 1e-3)
        torch.testing.assert_close(here.objective.cpu(), there.objective, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_as_without_caches(dtype):
    large, small, expert = (llama("smollm2", layers=n, dtype=dtype, seed=i)
                            for i, n in enumerate((4, 2, 2)))
    ids = token_ids(2, 32)
    fusion = DynamicLogitFusion(large, small, [expert])
    start = ids.shape[1]
    said = fusion.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    again = fusion(said[:, :-1], logits_to_keep=8)
    again[..., 2] = -float("inf")  # the end, which was put off
    gap = again.max(-1).values - again.gather(2, said[:, start:, None])[..., 0]
    spread = again[torch.isfinite(again)].std()
    allowed = 1e-3 if dtype == torch.float32 else 0.2  # bf16 rounds in another order
    assert (gap <= allowed * spread).all()
    assert len(fusion.trace) == again.shape[1]


def test_a_token_against_static_fusion():
    large, small, expert = (llama("smollm2", layers=n, seed=i) for i, n in enumerate((30, 8, 8)))
    ids = token_ids(4, 64)

    def write(choose):
        DynamicLogitFusion(large, small, [expert], choose).generate(
            ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)

    ways = (static_fusion(1.0), dynamic_alpha, partial(dynamic_alpha, method="bisect"))
    static, grid, bisect = in_turn(*(partial(write, way) for way in ways), rounds=5, warm=1)
    row("16 tokens, dynamic by grid against static", grid, reference=static, bound=1.3)
    row("16 tokens, dynamic by bisection against static", bisect, reference=static, bound=1.3)


def test_shapes_of_the_full_scale():
    "One step of 13B-like logits: 256 texts, 32,000 tokens."
    L, S, E = torch.randn(3, 4 if DRY else 256, 32_000, device=DEVICE)
    row("search by grid, 256 x 32,000", *clock(lambda: dynamic_alpha(L, S, E)))
    row("search by bisection, 256 x 32,000", *clock(
        lambda: dynamic_alpha(L, S, E, method="bisect")))


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, training=Training(steps=20, batch_size=32))
    assert launch("logits_fusion", cfg, root=tmp_path).claims
