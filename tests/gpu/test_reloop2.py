"""ReLoop2 on a GPU: the CPU's numbers, memories at full size, SMALL, and FULL's shape."""

import numpy as np
import pandas as pd
import pytest
import torch

from adaptlab.bench.runs import launch
from adaptlab.experiments import reloop2 as lab
from adaptlab.experiments.reloop2 import FULL, SMALL
from adaptlab.testtime.reloop2 import KNNMemory, ReLoop2, SketchMemory, estimate_error, group_auc
from gpu.card import DEVICE, DRY, clock, full, in_turn, row


def samples(n=500, dim=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, dim, generator=g), torch.randint(2, (n,), generator=g).float(),
            torch.rand(n, generator=g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: SketchMemory(32, 6, 20, half_life=300),
                                  lambda: KNNMemory(32, k=10, capacity=300)])
def test_the_cpus_numbers(make, dtype):
    h, y, p = samples()
    h = h.to(dtype)
    here, there = make(), make().to(DEVICE)
    here.write(h, y, p)
    with torch.autocast(DEVICE, torch.bfloat16):  # must not round what is inside
        there.write(h.to(DEVICE), y.to(DEVICE), p.to(DEVICE))
        found = there.read(h[:50].to(DEVICE), p[:50].to(DEVICE))
    expected = here.read(h[:50], p[:50])
    off = [a.nan_to_num() - b.cpu().nan_to_num() for a, b in zip(expected, found, strict=True)]
    wrong = torch.stack(off).abs().amax(0) > 1e-4  # a key on a line, or two neighbours alike
    assert wrong.float().mean() < 0.005 and all(v.device.type == DEVICE for v in found)
    error = estimate_error(*found, p[:50].to(DEVICE))
    assert torch.isfinite(error).all() and error.device.type == DEVICE
    assert abs(group_auc(y.to(DEVICE), p.to(DEVICE), (10 * p).long().to(DEVICE))
               - group_auc(y, p, (10 * p).long())) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loop(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 1)).to(DEVICE, dtype)
    h, y, _ = samples()
    loop = ReLoop2(model, SketchMemory(16, 6, 20), "0", link=torch.sigmoid).to(DEVICE)
    slots = list(zip(h.to(DEVICE, dtype).split(100), y.split(100), strict=True))
    found = loop.run_stream(slots)
    assert ((found.prediction >= 0) & (found.prediction <= 1)).all() and found.base.ndim == 1
    assert torch.equal(found.prediction[:100], found.base[:100]) and int(found.slot[-1]) == 4


def test_memories_at_full_size():
    "A slot of FULL read and written: K = 70, L = 16, and a million samples kept."
    n, kept = (100, 1000) if DRY else (FULL.slot, FULL.capacity)
    bits, dim = (6 if DRY else FULL.bits[-1]), 5 * FULL.dim
    h, y, p = (v.to(DEVICE) for v in samples(n, dim))
    sketch = SketchMemory(dim, bits, FULL.tables).to(DEVICE)
    exact = KNNMemory(dim, FULL.neighbors[1], kept).to(DEVICE)
    many = torch.randn(kept, dim, device=DEVICE)
    exact.write(many, (many[:, 0] > 0).float(), many[:, 1].sigmoid())
    sketch.write(h, y, p)
    ours, search = in_turn(lambda: sketch.read(h), lambda: exact.read(h), rounds=5, warm=1)
    row(f"FULL: a slot of {n:,} read from the sketch", ours, reference=search,
        against=f"a search of {kept:,}", bound=1.0)
    row(f"FULL: a slot of {n:,} written into the sketch", *clock(lambda: sketch.write(h, y, p)))


def test_small(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, warm=400, scored=400, start=2000, bits=(4,),
                        lams=(0.2,), neighbors=(30,), priors=(2.0,), lrs=(1e-3,), both_lrs=(1e-3,),
                        training=SMALL.training.__class__(steps=20))
    report = launch("reloop2", cfg, root=tmp_path, progress=False)
    assert report.tables["by AUC"]["AUC"].between(0, 100).all() and set(report.figures) == {"main"}


def test_full_shape(tmp_path):
    "DCNv2 with FULL's widths, fields and batch: a training step, and a stream of four slots."
    rng, n = np.random.default_rng(0), 300 if DRY else 20_000
    for name in ("train", "test"):
        item = rng.integers(0, n, n)
        pd.DataFrame({
            "user_id": rng.integers(0, 500, n), "item_id": item, "cate_id": item % 500,
            "clicked_items": ["^".join(map(str, rng.integers(0, n, 100))) for _ in range(n)],
            "clicked_categories": ["^".join(map(str, rng.integers(0, 500, 100)))
                                   for _ in range(n)],
            "is_click": rng.integers(0, 2, n)}).to_csv(tmp_path / f"{name}.csv", index=False)
    slot = 50 if DRY else FULL.slot
    cfg = FULL.replace(
        data=str(tmp_path / "train.csv"), test_data=str(tmp_path / "test.csv"), device=DEVICE,
        warm=slot, scored=3 * slot, slot=slot, every=2, tables=4 if DRY else FULL.tables)
    found = lab.stream(cfg, 0, "test", lam=0.4, n_bits=6 if DRY else 16, lr=1e-3)
    assert len(found.labels) == 4 * slot and torch.isfinite(found.prediction).all()
    table, _ = lab.clicks(cfg)
    batch = 64 if DRY else FULL.training.batch_size
    model = lab.ClickModel(table.owner, table.size if DRY else 1_720_000, FULL.dim, FULL.hidden,
                           FULL.base).to(DEVICE)
    rows = table.x[:batch].to(DEVICE), table.y[:batch].to(DEVICE)
    adam = torch.optim.AdamW(model.parameters(), 5e-4)

    def step():
        loss = lab.click_loss(model, rows)
        adam.zero_grad()
        loss.backward()
        adam.step()

    full(f"a step of DCNv2, {batch:,} samples", model, rows, step)
