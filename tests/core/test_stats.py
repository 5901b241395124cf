"""Intervals against scipy and plain loops; what one sample does not say; bad input."""

import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptlab import stats
from adaptlab.stats import Estimate


def test_estimate_prints_and_scales():
    e = Estimate(0.9123, 0.88, 0.94, 10)
    assert f"{e}" == str(e) == repr(e) == "0.912 [0.880, 0.940]"
    assert f"{100 * e:.1f}" == "91.2 [88.0, 94.0]" and str(100 * e) == "91.2 [88.0, 94.0]"
    flipped = -1 * e
    assert flipped.low == -0.94 < flipped.value < flipped.high == -0.88 and float(e) == 0.9123


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=200)
    for statistic in (np.mean, np.median, np.std):
        ours = stats.bootstrap(values, statistic, n_resamples=4000)
        theirs = scipy.stats.bootstrap((values,), statistic, n_resamples=4000, method="percentile",
                                       rng=np.random.default_rng(1)).confidence_interval
        assert ours.value == pytest.approx(statistic(values)) and ours.n == 200
        assert ours.low == pytest.approx(theirs.low, abs=0.02)
        assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_bootstrap_of_rows_large_input_and_seed():
    ratio = lambda pairs, axis: pairs.sum(axis)[..., 0] / pairs.sum(axis)[..., 1]  # noqa: E731
    pairs = np.stack([np.full(50, 3.0), np.full(50, 2.0)], 1)
    assert stats.bootstrap(pairs, ratio) == Estimate(1.5, 1.5, 1.5, n=50)
    big = torch.arange(300_000) % 2  # chunks of a few resamples
    estimate = stats.bootstrap(big, n_resamples=50)
    assert estimate.low < 0.5 < estimate.high and estimate.high - estimate.low < 0.01
    a, b, c = (stats.bootstrap(np.arange(9), seed=s) for s in (0, 0, 1))
    assert a == b != c


def test_over_seeds_is_the_t_interval():
    values = [0.7, 0.8, 0.75, 0.71]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    estimate = stats.over_seeds(values)
    assert (estimate.low, estimate.high) == pytest.approx((low, high)) and estimate.n == 4


def test_paired_difference_is_tighter_than_two_intervals():
    rng = np.random.default_rng(0)
    common = rng.normal(size=300)
    a, b = common + 0.2 + 0.1 * rng.normal(size=300), common
    difference = stats.paired_difference(torch.tensor(a), b)
    assert difference.low > 0.15 and difference.high < 0.25
    assert stats.bootstrap(a).low < stats.bootstrap(b).high
    assert stats.paired_difference([True, False], [True, False]).value == 0.0


@pytest.mark.parametrize("call", [
    lambda: stats.bootstrap([]), lambda: stats.bootstrap(3.0),
    lambda: stats.bootstrap([1.0, np.inf]), lambda: stats.bootstrap([1.0], n_resamples=0),
    lambda: stats.paired_difference([1.0, 2.0], [1.0]),
    lambda: stats.paired_difference([[1.0]], [[1.0]]),
    lambda: stats.over_seeds([]), lambda: stats.over_seeds([1.0, np.nan]),
    lambda: stats.over_seeds([[1.0, 2.0]]), lambda: stats.wilson([]), lambda: stats.wilson([0.5]),
    lambda: stats.wilson([[True]]), lambda: stats.wilson([2, 1]), lambda: stats.wilson([np.nan]),
])
def test_bad_values(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("one", [
    stats.bootstrap([4.0]), stats.over_seeds([4.0]), stats.paired_difference([5.0], [1.0]),
    stats.bootstrap([4.0], np.median)])
def test_one_sample_has_no_interval(one):
    assert one.value == 4.0 and math.isnan(one.low) and math.isnan(one.high) and one.n == 1
    assert str(one) == "4.000 (no interval)" and f"{-1 * one:.1f}" == "-4.0 (no interval)"


def test_estimates_keep_what_they_were_made_from():
    a, b = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 1.0])
    assert stats.bootstrap(a).items.tolist() == [3, 1, 2]
    assert stats.over_seeds(a).items.tolist() == [3, 1, 2]
    assert stats.paired_difference(a, b).items.tolist() == [2, 0, 1]
    assert stats.wilson([True, False]).items.tolist() == [1, 0]
    assert (100 * stats.bootstrap(a)).items is None  # scaled: not what they were
    found = stats.bootstrap(a)
    again = pickle.loads(pickle.dumps(found))
    assert again == found and hash(again) == hash(found) and (again.items == found.items).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.data())
def test_wilson_agrees_with_scipy(n, data):
    hits = data.draw(st.integers(0, n))
    found = stats.wilson([True] * hits + [False] * (n - hits))
    wanted = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.value == hits / n


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_wilson_covers(share):
    "About 95 of 100 intervals contain the truth, at the edge too, where the bootstrap fails."
    draws = np.random.default_rng(0).random((400, 30)) < share
    covered = np.mean([e.low <= share <= e.high for e in map(stats.wilson, draws)])
    assert covered >= 0.92
    assert stats.wilson(torch.ones(30, dtype=torch.bool)).low == pytest.approx(0.8865, abs=1e-3)
