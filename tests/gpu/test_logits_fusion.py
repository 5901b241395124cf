"""Dynamic logits fusion on a GPU: the search, writing in bf16, SMALL, a token of FULL."""

from functools import partial

import pytest
import torch

from adaptlab.arithmetic.logits_fusion import (
    DynamicLogitFusion,
    dynamic_alpha,
    fuse_logits,
    static_fusion,
)
from adaptlab.bench.runs import launch
from adaptlab.experiments import logits_fusion as told
from adaptlab.experiments.logits_fusion import SMALL
from gpu.card import DEVICE, DRY, SHAPES, clock, in_turn, llama, row, token_ids

SHAPES["llama2-13b"] = (32000, 5120, 13824, 40, 40, 40, False)
BANDWIDTH = 3.35e12  # bytes per second that an H100's memory gives: a token reads all weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_search_is_that_of_the_cpu(dtype):
    g = torch.Generator().manual_seed(0)
    there = (2 * torch.randn(4, 8, 500 if DRY else 16_000, generator=g)).to(dtype)
    here = there.to(DEVICE)
    for how in ({"method": "grid", "bounds": True}, {"method": "bisect"},
                {"multi": "joint", "alphas": (0.0, 0.5, 1.0)}, {"multi": "sequential"}):
        experts = slice(2, None) if "multi" in how else slice(2, 3)
        a, b = (dynamic_alpha(x[0], x[1], list(x[experts]), **how) for x in (here, there))
        grid = how.get("method") != "bisect"
        assert (a.alpha.cpu() - b.alpha).abs().max() <= (0.101 if grid else 1e-3)
        torch.testing.assert_close(a.objective.cpu(), b.objective, rtol=1e-2, atol=1e-4)
        again = fuse_logits(here[0], here[1], list(here[experts]), a.alpha)
        torch.testing.assert_close(again, a.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_as_without_caches(dtype):
    large, small, expert = (llama("smollm2", layers=n, dtype=dtype, seed=i)
                            for i, n in enumerate((2, 1, 1)))
    ids = token_ids(2, 32)
    fusion = DynamicLogitFusion(large, small, [expert])
    start = ids.shape[1]
    said = fusion.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    again = fusion(said[:, :-1], logits_to_keep=6)
    again[..., 2] = -float("inf")  # the end, which was put off
    gap = again.max(-1).values - again.gather(2, said[:, start:, None])[..., 0]
    spread = again[torch.isfinite(again)].std()
    allowed = 1e-3 if dtype == torch.float32 else 0.2  # bf16 rounds in another order
    assert (gap <= allowed * spread).all()
    assert len(fusion.trace) == again.shape[1]


def test_full_tokens():
    "Four tokens of Llama-2 13B with a 7B base and expert, a quarter of the layers of each."
    large = llama("llama2-13b", layers=10)
    small, expert = (llama("llama2-7b", layers=8, seed=seed) for seed in (1, 2))
    ids, size = token_ids(1, 64), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    weights = sum(p.nbytes for m in (large, small, expert) for p in m.parameters())

    def write(choose):
        DynamicLogitFusion(large, small, [expert], choose).generate(ids, **size)

    ways = [static_fusion(1.0), dynamic_alpha, partial(dynamic_alpha, method="bisect")]
    static, grid, bisect, alone = in_turn(
        *(partial(write, way) for way in ways), lambda: large.generate(ids, **size), rounds=3,
        warm=1)
    held = clock(partial(write, dynamic_alpha), rounds=1, warm=0)[1]
    row("FULL: 4 tokens, 1/4 of 13B and twice 7B", grid, held, reference=alone,
        against="13B alone", counted=(4 * weights / BANDWIDTH, weights / 2**30))
    for name, seconds in (("grid", grid), ("bisection", bisect)):
        row(f"4 tokens, strength by {name}", seconds, reference=static, against="proxy tuning",
            bound=1.3)


def test_search_for_many_texts():
    L, S, E = torch.randn(3, 4 if DRY else 256, 32_000, device=DEVICE)
    grid, bisect = (clock(lambda how=how: dynamic_alpha(L, S, E, method=how), rounds=5)
                    for how in ("grid", "bisect"))
    row("search by grid, 256 x 32,000 logits", *grid)
    row("search by bisection, 256 x 32,000 logits", *bisect, reference=grid[0], against="by grid")


def test_small_experiment(tmp_path, monkeypatch):
    "SMALL in four steps; untrained models, and words without a meaning."
    g = torch.Generator().manual_seed(0)

    def words(n):
        rows = torch.randint(97, 123, (n, 7), generator=g).tolist()
        return tuple("".join(map(chr, row)) for row in rows)

    made = {language: (words(200), words(4)) for language in (*told.NEW, told.UNSEEN)}
    letters = "".join(map(chr, range(97, 123)))
    monkeypatch.setattr(told, "names", lambda: made)
    monkeypatch.setattr(told, "letters", lambda: letters)
    monkeypatch.setattr(told, "char_lm", lambda dim: told.CharLM(len(letters) + 1, dim).eval())
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, names=(16, 8),
                        training={"steps": 4, "batch_size": 8})
    assert launch("logits_fusion", cfg, root=tmp_path).claims
