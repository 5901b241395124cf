"""ReLoop2: what must hold, what must be refused, and the experiment on a small stand-in."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import nn

from adaptlab.bench.runs import start_run
from adaptlab.experiments import reloop2 as lab
from adaptlab.experiments.reloop2 import FULL, SMALL
from adaptlab.testtime.reloop2 import (
    KNNMemory,
    ReLoop2,
    SketchMemory,
    SRPHash,
    compensate,
    estimate_error,
    group_auc,
    log_loss,
    merge,
)


def samples(n=120, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, dim, generator=g), torch.randint(2, (n,), generator=g).float(),
            torch.rand(n, generator=g))


MEMORIES = {
    "sketch": lambda dim=6: SketchMemory(dim, n_bits=3, n_tables=4),
    "prior": lambda dim=6: SketchMemory(dim, n_bits=3, n_tables=4, prior=2.0),
    "fading": lambda dim=6: SketchMemory(dim, n_bits=3, n_tables=4, half_life=20),
    "exact": lambda dim=6: KNNMemory(dim, k=5),
    "short": lambda dim=6: KNNMemory(dim, k=5, capacity=30),
}
memories = pytest.mark.parametrize("name", MEMORIES)


# --- scores -------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), values=st.integers(1, 50))
def test_group_auc_is_a_loop_over_scikit_learn(seed, values):
    rng = np.random.default_rng(seed)
    n = rng.integers(2, 200)
    y, p, u = rng.integers(0, 2, n), rng.integers(0, values, n) / values, rng.integers(-3, 9, n)
    areas, sizes = [], []
    for user in np.unique(u):
        at = u == user
        if 0 < y[at].sum() < at.sum():
            areas.append(metrics.roc_auc_score(y[at], p[at]))
            sizes.append(at.sum())
    found = group_auc(*(torch.from_numpy(v) for v in (y, p, u)))
    if areas:
        assert found == pytest.approx(np.average(areas, weights=sizes), abs=1e-12)
    else:
        assert math.isnan(found)


def test_users_with_one_kind_of_label_are_left_out():
    y, p = torch.tensor([1.0, 0, 1, 1, 0]), torch.tensor([0.9, 0.1, 0.2, 0.3, 0.8])
    u = torch.tensor([7, 7, 8, 8, 9])
    assert group_auc(y, p, u) == 1.0 and math.isnan(group_auc(y[2:4], p[2:4], u[2:4]))


def test_scores_refuse():
    y, p = torch.tensor([1.0, 0.0]), torch.tensor([0.3, 0.4])
    for bad, message in (
        (lambda: group_auc(torch.tensor([0.5, 1]), p), "0 or 1"),
        (lambda: group_auc(y, p[:1]), "one number per sample"),
        (lambda: group_auc(y, p, torch.zeros(3)), "one number per sample"),
        (lambda: group_auc(y, torch.tensor([0.1, math.nan])), "NaN"),
        (lambda: log_loss(y, torch.tensor([0.1, 1.4])), "sigmoid"),
        (lambda: log_loss(y, p[None]), "one number per sample"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    assert math.isfinite(log_loss(y, 1 - y))


# --- error and compensation ---------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), lam=st.floats(0, 1), gamma=st.floats(0, 1),
       tau=st.floats(0.01, 100))
def test_predictions_stay_in_the_unit_interval(seed, lam, gamma, tau):
    g = torch.Generator().manual_seed(seed)
    s, y, b = torch.rand(3, 20, 4, generator=g, dtype=torch.float64)
    y[torch.rand(20, 4, generator=g) < 0.3] = math.nan
    query = torch.rand(20, generator=g, dtype=torch.float64)
    error = estimate_error(s, y, b, query, gamma, tau)
    found = compensate(query, error, lam)
    assert ((found >= 0) & (found <= 1)).all()
    if gamma == 1:  # an average of two probabilities: nothing is clipped
        torch.testing.assert_close(found, query + lam * error)
    assert (error[y.isnan().all(1)] == 0).all()


def test_lambda_zero_and_what_stays_exact():
    h, y, p = samples()
    for dtype in (torch.float32, torch.float64):
        p = p.to(dtype)
        found = compensate(p, torch.randn(120), 0.0)
        assert torch.equal(found, p) and found.dtype == dtype
    assert torch.equal(compensate(p, torch.full((120,), 5.0), 1.0), torch.ones_like(p))


def test_weights_by_count_make_kernel_regression():
    "log s at τ = 1: the mean label weighed by counts."
    h, y, p = samples()
    memory = SketchMemory(6, n_bits=4, n_tables=9)
    memory.write(h[1:], y[1:], p[1:])
    s, label, base = memory.read(h[:1])
    error = estimate_error(s.log(), label, base, p[:1], tau=1.0) + p[:1].double()
    expected = (s * label.nan_to_num()).sum() / s.sum()
    assert float(error) == pytest.approx(float(expected))


def test_settings_that_are_refused():
    s = y = b = torch.rand(3, 2)
    query = torch.rand(3)
    for bad, message in (
        (lambda: estimate_error(s, y, b, query, gamma=1.1), "gamma"),
        (lambda: estimate_error(s, y, b, query, gamma=math.nan), "gamma"),
        (lambda: estimate_error(s, y, b, query, tau=0), "tau"),
        (lambda: estimate_error(s, y, b, query[:2]), "one row per query"),
        (lambda: estimate_error(s, y[:, :1], b, query), "one row per query"),
        (lambda: estimate_error(s * math.nan, y, b, query), "NaN"),
        (lambda: estimate_error(s, y, b, 3 * query + 1), "sigmoid"),
        (lambda: compensate(query, query, -0.1), "lam"),
        (lambda: compensate(query, query[:, None], 0.1), "one number per prediction"),
        (lambda: compensate(query, query * math.nan, 0.1), "NaN"),
        (lambda: compensate(5 * query + 1, query, 0.1), "sigmoid"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


# --- hashing and memories -----------------------------------------------------------------------


def test_hash_is_the_same_everywhere_and_centred():
    x = torch.randn(50, 6)
    first = SRPHash(6, 8, 5, seed=3)
    assert torch.equal(first.buckets(x), SRPHash(6, 8, 5, seed=3).buckets(x))
    assert not torch.equal(first.buckets(x), SRPHash(6, 8, 5, seed=4).buckets(x))
    moved = SRPHash(6, 8, 5, seed=3, center=torch.full((6,), 2.0))
    assert torch.equal(first.buckets(x), moved.buckets(x + 2))
    assert first.buckets(x).min() >= 0 and first.buckets(x).max() < 2**8
    assert (first.buckets(torch.zeros(1, 6)) == 2**8 - 1).all()  # a zero key: every bit is >= 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first.buckets(x), SRPHash(6, 8, 5, seed=3).buckets(x))


def test_centring_spreads_what_lies_in_one_orthant():
    "The card's pitfall: numbers behind a ReLU."
    torch.manual_seed(0)
    x = (torch.randn(2000, 16) + 2).relu()
    used = [SRPHash(16, 8, 20, center=c).buckets(x).unique().numel()
            for c in (None, x.mean(0))]
    crowd = [SRPHash(16, 8, 1, center=c).buckets(x)[:, 0].bincount().max() for c in
             (None, x.mean(0))]
    assert used[1] > used[0] and crowd[1] < crowd[0] / 2


@settings(max_examples=10, deadline=None)
@given(bits=st.integers(0, 6), seed=st.integers(0, 1000))
def test_collisions_and_density(bits, seed):
    "Count over N, over many tables, estimates the mean of (1 - θ/π)^L."
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(40, 5, generator=g)
    memory = SketchMemory(5, bits, 4000, seed=seed)
    memory.write(h[1:], torch.ones(39), torch.ones(39))
    s = memory.read(h[:1])[0]
    theta = torch.arccos(torch.cosine_similarity(h[:1], h[1:]).double().clamp(-1, 1))
    expected = ((1 - theta / torch.pi) ** bits).mean()
    assert abs(s.mean() - expected) <= 4 * s.std() / 4000**0.5 + 1e-9


@memories
def test_writing_in_batches_is_writing_one_by_one(name):
    h, y, p = samples()
    whole, parts = MEMORIES[name](), MEMORIES[name]()
    whole.write(h, y, p)
    for i in range(len(h)):
        parts.write(h[i : i + 1], y[i : i + 1], p[i : i + 1])
    for a, b in zip(whole.read(h[:9], p[:9]), parts.read(h[:9], p[:9]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0, equal_nan=True)
    whole.reset()
    error = estimate_error(*whole.read(h[:9], p[:9]), p[:9])
    torch.testing.assert_close(error, torch.zeros_like(error))  # empty: the base


def test_size_does_not_depend_on_what_was_written():
    h, y, p = samples(1000)
    sketch, exact = MEMORIES["sketch"](), MEMORIES["exact"]()
    sizes = [(m.nbytes, m.write(h, y, p), m.nbytes)[::2] for m in (sketch, exact)]
    assert sizes[0][0] == sizes[0][1] == 24 * 4 * 2**3 and sizes[1][1] > sizes[1][0]


def test_a_prior_is_samples_on_which_the_base_was_right():
    h, y, p = samples()
    with_prior, plain = MEMORIES["prior"](), MEMORIES["sketch"]()
    for memory in (with_prior, plain):
        memory.write(h[:60], y[:60], p[:60])
    s, label, base = plain.read(h[60:])
    _, shrunk, _ = with_prior.read(h[60:], p[60:])
    count = (s * 60).round()
    own = p[60:, None].double()
    torch.testing.assert_close(shrunk, (count * label.nan_to_num() + 2 * own) / (count + 2))
    with pytest.raises(ValueError, match="prior"):
        with_prior.read(h[60:])


def test_exact_memory_is_a_plain_search():
    h, y, p = samples()
    memory = KNNMemory(6, k=7)
    memory.write(h[:100], y[:100], p[:100])
    s, label, base = memory.read(h[100:])
    cosine = torch.cosine_similarity(h[100:, None], h[None, :100], dim=2)
    best = cosine.topk(7, dim=1)
    torch.testing.assert_close(s, best.values.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(label, y[best.indices].double())
    torch.testing.assert_close(base, p[best.indices].double())
    surprising = KNNMemory(6, error_threshold=0.5)
    surprising.write(h, y, p)
    assert len(surprising.keys) == int(((y - p).abs() >= 0.5).sum()) < 120
    part = KNNMemory(6, keep=0.5, seed=1)
    part.write(h, y, p)
    assert 30 < len(part.keys) < 90


def test_a_saved_sketch_goes_on(tmp_path):
    h, y, p = samples()
    first, second = MEMORIES["sketch"](), SketchMemory(6, n_bits=3, n_tables=4, seed=9)
    first.write(h, y, p)
    torch.save(first.state_dict(), tmp_path / "memory.pt")
    second.load_state_dict(torch.load(tmp_path / "memory.pt"))
    for a, b in zip(first.read(h), second.read(h), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@memories
@pytest.mark.parametrize("h, y, p, message", [
    (torch.randn(3, 5), torch.ones(3), torch.ones(3), r"\[n, 6\]"),
    (torch.randn(6), torch.ones(3), torch.ones(3), r"\[n, 6\]"),
    (torch.full((3, 6), math.nan), torch.ones(3), torch.ones(3), "NaN"),
    (torch.randn(3, 6), torch.ones(2), torch.ones(3), "labels"),
    (torch.randn(3, 6), torch.ones(3, 1), torch.ones(3), "labels"),
    (torch.randn(3, 6), 2 * torch.ones(3), torch.ones(3), "labels"),
    (torch.randn(3, 6), torch.full((3,), math.nan), torch.ones(3), "labels"),
    (torch.randn(3, 6), torch.ones(3), -4 * torch.ones(3), "sigmoid"),
])
def test_memories_refuse(name, h, y, p, message):
    memory = MEMORIES[name]()
    with pytest.raises(ValueError, match=message):
        memory.write(h, y, p)
    assert torch.isfinite(next(iter(memory.buffers()))).all()
    assert (memory.writes == 0) if hasattr(memory, "writes") else len(memory.keys) == 0


def test_impossible_memories():
    for bad, message in (
        (lambda: SketchMemory(6, n_bits=-1), "n_bits"),
        (lambda: SketchMemory(6, n_bits=60), "n_bits"),
        (lambda: SketchMemory(6, n_bits=30, n_tables=70), "limit"),
        (lambda: SketchMemory(6, n_tables=0), "n_tables"),
        (lambda: SketchMemory(6, half_life=0), "half_life"),
        (lambda: SketchMemory(6, 3, 4, prior=-1), "prior"),
        (lambda: SketchMemory(6, 3, 4, center=torch.ones(5)), "center"),
        (lambda: merge(SketchMemory(6, 3, 4), SketchMemory(6, 3, 4, seed=1)), "other lines"),
        (lambda: merge(SketchMemory(6, 3, 4), SketchMemory(6, 4, 4)), "other lines"),
        (lambda: KNNMemory(6, k=0), "k = 0"),
        (lambda: KNNMemory(6, capacity=0), "capacity"),
        (lambda: KNNMemory(6, error_threshold=2), "error_threshold"),
        (lambda: KNNMemory(6).write(torch.zeros(1, 6), torch.ones(1), torch.ones(1)), "zero"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


# --- the loop -----------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 1))


def loop(memory, **more):
    return ReLoop2(net(), memory, "0", **{"lam": 0.5, "link": torch.sigmoid} | more)


@memories
def test_nothing_looks_ahead(name):
    h, y, _ = samples()
    y2 = torch.where(torch.arange(120) >= 60, 1 - y, y)
    first, second = (loop(MEMORIES[name](4)).run_stream(zip(h.split(20), v.split(20), strict=True))
                     for v in (y, y2))
    assert torch.equal(first.prediction[:80], second.prediction[:80])
    assert not torch.equal(first.prediction[80:], second.prediction[80:])
    assert torch.equal(first.base, second.base)
    assert torch.equal(first.prediction[:20], first.base[:20])  # an empty memory


def test_the_model_is_left_alone():
    h, y, _ = samples()
    made = loop(MEMORIES["sketch"](4))
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    made.model.train()
    found = made.run_stream([(h[:60], y[:60]), (h[60:], y[60:])])
    assert made.model.training and not found.prediction.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in made.model.state_dict().items())
    assert all(p.grad is None for p in made.model.parameters())
    assert not made.model[0]._forward_hooks


def test_late_labels_are_written_with_what_was_served():
    h, y, _ = samples()
    one, two = loop(MEMORIES["sketch"](4)), loop(MEMORIES["sketch"](4))
    served = one.serve(h)
    with torch.no_grad():  # the model is updated before the labels arrive
        for p in one.model.parameters():
            p.add_(1.0)
    one.observe(served, y)
    two.observe(h, y)
    torch.testing.assert_close(one.memory.sums, two.memory.sums)


def test_updates_and_resets():
    h, y, _ = samples()
    seen = []
    made = loop(MEMORIES["sketch"](4))
    stream = list(zip(h.split(20), y.split(20), strict=True))
    made.run_stream(stream, lambda model, recent: seen.append(len(recent)), every=4)
    assert seen == [4] and made.memory.writes == 40
    made.run_stream(stream[:4], lambda model, recent: None, every=4, reset=False)
    assert made.memory.writes == 120
    with pytest.raises(ValueError, match="empty"):
        made.run_stream([])
    with pytest.raises(ValueError, match="every = 0"):
        made.run_stream(stream, lambda model, recent: None, every=0)


def test_keys_from_a_function_and_half_precision():
    h, y, _ = samples()
    made = ReLoop2(net().bfloat16(), KNNMemory(6), lambda x: x, link=torch.sigmoid)
    made.observe(h.bfloat16(), y)
    found = made.predict(h.bfloat16())
    assert found.dtype == torch.float32 and torch.equal(found, made(h.bfloat16()))


def test_the_loop_refuses():
    h, y, _ = samples()
    memory = MEMORIES["sketch"](4)
    for bad, message in (
        (lambda: ReLoop2(net(), memory, "first"), "no module 'first'"),
        (lambda: loop(memory, lam=-1), "lam"),
        (lambda: loop(memory, gamma=2), "gamma"),
        (lambda: loop(memory, tau=0), "tau"),
        (lambda: ReLoop2(net(), memory, "0").predict(100 * h), "sigmoid"),
        (lambda: loop(MEMORIES["sketch"](6)).predict(h), r"\[n, 6\]"),
        (lambda: loop(memory).observe(h, y[:5]), "labels"),
        (lambda: loop(memory).observe(h, 3 * y), "labels"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    assert memory.writes == 0


def test_what_was_silently_wrong_is_refused():
    p, readout = torch.full((3,), 0.3), torch.full((3, 2), 0.5)
    sketch, net = SketchMemory(4, 2, 3), torch.nn.Linear(4, 1)
    uncalled = torch.nn.ModuleDict({"out": net, "spare": torch.nn.Linear(4, 4)})
    uncalled.forward = lambda x: net(x)
    x = torch.ones(3, 4)
    for bad, message in (
        (lambda: compensate(p, 0 * p, math.inf), "finite"),
        (lambda: compensate(p, p / 0, 0.0), "finite"),
        (lambda: SketchMemory(4, 2, 3, prior=math.inf), "finite"),
        (lambda: estimate_error(readout, 9 * readout, readout, p), "outside"),
        (lambda: group_auc(torch.ones(3), p, p * torch.nan), "NaN"),
        (lambda: merge(sketch, sketch), "itself"),
        (lambda: ReLoop2(net, sketch, lambda x: [1], link=torch.sigmoid).predict(x), "list"),
        (lambda: ReLoop2(uncalled, sketch, "spare", link=torch.sigmoid).predict(x), "call"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


# --- the experiment -----------------------------------------------------------------------------


@pytest.fixture
def clicks(tmp_path, monkeypatch):
    "A file like MicroVideo's, small: its columns, and new items in the second part."
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name, n, low in (("train", 600, 0), ("test", 400, 40)):
        user, item = rng.integers(0, 20, n), rng.integers(low, low + 40, n)
        pd.DataFrame({
            "user_id": user, "item_id": item, "cate_id": item % 5,
            "clicked_items": ["^".join(map(str, rng.integers(0, 40, k)))
                              for k in rng.integers(0, 5, n)],
            "clicked_categories": ["" if u % 3 else "1^2" for u in user],
            "is_click": (rng.random(n) < 0.2 + 0.6 * (user % 2)).astype(int),
        }).to_csv(tmp_path / f"{name}.csv", index=False)
    return tmp_path


def test_full_on_a_small_stand_in(clicks, tmp_path, monkeypatch):
    "FULL's columns, base and methods, through the same code; resuming repeats nothing."
    cfg = FULL.replace(
        data=str(clicks / "train.csv"), test_data=str(clicks / "test.csv"), warm=100, scored=300,
        slot=50, every=2, dim=4, hidden=(8, 4), most=3, bits=(2, 3), tables=4, capacity=100,
        neighbors=(5, 10), lams=(0.2, 0.9), lrs=(1e-3, 1e-2), both_lrs=(1e-3,), priors=(2.0,),
        device="cpu", update_batch=50)
    run = start_run("reloop2", cfg, "full", root=tmp_path / "runs")
    report = lab.experiment(cfg, run)
    table = report.tables["by AUC"]
    assert {"base", "sketch", "exact", "both", "users"} <= set(table["method"])
    assert table["AUC"].between(0, 100).all()
    assert report.tables["ablation"]["method"].nunique() == 6
    assert {c.verdict for c in report.claims} == {"not decided at this scale"}  # one seed
    monkeypatch.setattr(lab, "stream", None)
    again = lab.experiment(cfg, run)
    pd.testing.assert_frame_equal(again.tables["by AUC"], table)


def test_folds_and_fields_that_are_refused():
    with pytest.raises(ValueError, match="nothing is left to score"):
        lab.fold(SMALL.replace(step=30_000), 4)
    with pytest.raises(ValueError, match="no column 'director'"):
        lab.clicks(SMALL.replace(fields=("user", "director")))


def test_the_world_flips_in_one_region_only():
    seen = lab.world(0, 1)
    late = torch.arange(len(seen.y)) >= lab.FLIP * lab.SLOT
    assert (seen.truth[seen.region & ~late] - 0.85).abs().max() < 1e-6
    assert (seen.truth[seen.region & late] - 0.15).abs().max() < 1e-6
    other = lab.world(0, 1, flip=lab.SLOTS)
    assert torch.equal(other.truth[~seen.region], seen.truth[~seen.region])


def test_incremental_training_is_what_moves_the_weights():
    cfg = SMALL.replace(warm=400, scored=400)
    frozen, trained = (lab.stream(cfg, 0, "test", "none", lr=lr) for lr in (0.0, 1e-2))
    assert torch.equal(frozen.base[:200], trained.base[:200])  # before the first update
    assert not torch.equal(frozen.base[200:], trained.base[200:])
    again = lab.stream.__wrapped__(cfg, 0, "test", "none", lr=1e-2)
    assert torch.equal(again.prediction, trained.prediction)
