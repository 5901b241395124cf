"""ReLoop2's pieces against plain ways of writing them, in one run: same numbers, less time."""

import numpy as np
import torch
from clock import in_turn, row
from sklearn import metrics

from adaptlab.testtime.reloop2 import KNNMemory, SketchMemory, group_auc


def samples(n, dim=64):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(n, dim, generator=g), torch.randint(2, (n,), generator=g).double(),
            torch.rand(n, generator=g).double())


def test_writing_a_slot():
    "200 samples, K = 50, L = 12, against a loop over the tables with bincount."
    h, y, p = samples(200)
    memory, tables = SketchMemory(64, 12, 50), torch.zeros(50, 3, 2**12).double()

    def by_tables():
        bucket = memory.hash.buckets(h)
        for k in range(50):
            for i, v in enumerate((torch.ones_like(y), y, p)):
                tables[k, i] += torch.bincount(bucket[:, k], v, 2**12)

    memory.write(h, y, p)
    by_tables()
    torch.testing.assert_close(tables.transpose(1, 2).reshape(-1, 3), memory.sums)
    ours, theirs = in_turn(lambda: memory.write(h, y, p), by_tables)
    row("sketch, a slot of 200 written", ours, theirs, bound=1.0)


def test_reading_does_not_depend_on_what_was_written():
    h, y, p = samples(50_000)
    few, many, exact = (SketchMemory(64, 12, 50), SketchMemory(64, 12, 50), KNNMemory(64, k=50))
    few.write(h[:1000], y[:1000], p[:1000])
    many.write(h, y, p)
    exact.write(h, y, p)
    ours, same, search = in_turn(lambda: many.read(h[:200]), lambda: few.read(h[:200]),
                                 lambda: exact.read(h[:200]))
    row("sketch, 200 read after 50,000 writes, against after 1,000", ours, same, bound=1.2)
    row("sketch, 200 read, against an exact search of 50,000", ours, search, bound=1.0)
    row("sketch, size against 50,000 samples kept", many.nbytes / 2**20, exact.nbytes / 2**20,
        bound=1.0, unit="MiB")


def test_group_auc_against_a_loop():
    rng = np.random.default_rng(0)
    y, p, u = rng.integers(0, 2, 20_000), rng.random(20_000), rng.integers(0, 500, 20_000)

    def loop():
        areas = [metrics.roc_auc_score(y[u == k], p[u == k]) for k in range(500)]
        return np.average(areas, weights=np.bincount(u, minlength=500))

    tensors = [torch.from_numpy(v) for v in (y, p, u)]
    assert abs(group_auc(*tensors) - loop()) < 1e-12
    ours, theirs = in_turn(lambda: group_auc(*tensors), loop, rounds=3)
    row("gAUC of 500 users against a loop over scikit-learn", ours, theirs, bound=1.0)
