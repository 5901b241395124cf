"""Settings chosen where they may be, stages that are not repeated, paired differences."""

import contextlib
import math
from dataclasses import dataclass

import pandas as pd
import pytest

from adaptlab.bench.compare import Method, Versus, differences, grid, summary, sweep, versus
from adaptlab.bench.report import FAILS, HOLDS, OPEN, Report
from adaptlab.bench.runs import Run


@dataclass
class Toy:
    "A bed whose model is a dict."

    seed: int

    @contextlib.contextmanager
    def fresh(self):
        yield {}


def adapt(model, bed, seed, gain=0.0, trap=0.0):
    model |= {"choose": gain, "test": gain + trap + 0.1 * seed}


def run_sweep(run, methods, seeds=(0, 1), **options):
    options = {"choose": lambda m, bed: m["choose"]} | options
    return sweep(run, "toy", methods, Toy, seeds, lambda m, bed: {"score": m["test"]}, **options)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, "lame")


def test_the_setting_is_chosen_without_the_test(run):
    "The setting that looks best on test data is not taken; later seeds keep the choice."
    tried = []

    def spy(model, bed, seed, **setting):
        tried.append((seed, setting["gain"]))
        adapt(model, bed, seed, **setting)

    methods = {"a": Method(spy, [{"gain": 1.0, "trap": 9.0}, {"gain": 2.0}, {"gain": 2.0}])}
    methods["a"] = Method(spy, [{"gain": 1.0, "trap": 9.0}, {"gain": 2.0, "trap": 0.0}])
    table = run_sweep(run, methods)
    assert table["score"].tolist() == pytest.approx([2.0, 2.1])
    assert tried == [(0, 1.0), (0, 2.0), (1, 2.0)]
    assert table["setting"].tolist() == ["gain=2, trap=0"] * 2


def test_a_score_that_is_nan_is_never_chosen(run):
    methods = {"a": Method(adapt, [{"gain": math.nan}, {"gain": 1.0}, {"gain": math.nan}])}
    assert run_sweep(run, methods, seeds=(0,))["score"].tolist() == [1.0]


def test_a_run_that_was_cut_off_goes_on(run):
    done = []

    def count(model, bed, seed, **setting):
        done.append((seed, setting))
        if seed == 1 and len(done) < 5:
            raise KeyboardInterrupt
        adapt(model, bed, seed, **setting)

    methods = {"a": Method(count, grid(gain=(1.0, 3.0)))}
    with pytest.raises(KeyboardInterrupt):
        run_sweep(run, methods)
    first = len(done)
    done += [None] * 5
    table = run_sweep(run, methods)
    assert first == 3 and done[8:] == [(1, {"gain": 3.0})]  # the choice was kept on disk
    assert table["score"].tolist() == pytest.approx([3.0, 3.1])


def test_items_are_numbered_and_methods_may_return_a_model(run):
    methods = {"a": Method(lambda model, bed, seed: {"test": 5})}
    table = sweep(run, "items", methods, Toy, (0,), lambda m, bed: [{"hit": m["test"]}] * 2)
    assert table[["item", "hit"]].values.tolist() == [[0, 5], [1, 5]]


@pytest.mark.parametrize("methods, options, words", [
    ({"a": Method(adapt, grid(gain=(1, 2)))}, {"choose": None}, "give `choose`"),
    ({"a b": Method(adapt), "a_b": Method(adapt)}, {}, "names must differ"),
    ({"a": Method(adapt, ())}, {}, "needs a setting"),
])
def test_unfair_sweeps_are_refused(run, methods, options, words):
    with pytest.raises(ValueError, match=words):
        run_sweep(run, methods, **options)


TABLE = pd.DataFrame([
    {"method": m, "seed": s, "score": s + gain + 0.01 * s * (m == "b")}
    for m, gain in (("a", 0.0), ("b", 1.0), ("c", 0.0)) for s in range(4)])


def test_differences_are_paired():
    "The seeds differ by far more than the methods, and it does not matter."
    found = differences(TABLE, "b", "a", "score")
    assert found.value == pytest.approx(1.015) and found.low > 0.9 and found.high < 1.1
    one = differences(TABLE[TABLE.seed == 0], "b", "a", "score")
    assert one.value == 1.0 and math.isnan(one.low)
    items = TABLE.rename(columns={"seed": "item"})
    assert differences(items, "b", "a", "score", by="item").low > 0.9
    with pytest.raises(ValueError, match="no method 'x'"):
        differences(TABLE, "x", "a", "score")
    with pytest.raises(ValueError, match="no column"):
        differences(TABLE, "b", "a", "speed")
    with pytest.raises(ValueError, match="no seed in common"):
        differences(TABLE[(TABLE.method == "a") == (TABLE.seed > 1)], "b", "a", "score")


def test_items_of_several_parts_are_paired_within_their_part():
    rows = [{"method": m, "seed": 0, "part": p, "item": i, "x": float(m == "b") * (p == "p")}
            for m in "ab" for p in "pq" for i in range(3)]
    table = pd.DataFrame(rows)
    assert differences(table[table.part == "p"], "b", "a", "x", by="item").value == 1.0


def test_verdicts_come_from_the_differences():
    report = Report("lame")
    cases = [Versus("b beats a", "b", "a", "score", "2 vs 1", "Table 1", "luck"),
             Versus("a beats b", "a", "b", "score"), Versus("c beats a", "c", "a", "score")]
    versus(report, TABLE, cases, unit="points")
    assert [c.verdict for c in report.claims] == [HOLDS, FAILS, OPEN]
    lower = Report("lame")
    versus(lower, TABLE, cases[:1], unit="nats", lower=True)
    assert lower.claims[0].verdict == FAILS and lower.claims[0].reason == "luck"


def test_summary_has_means_and_half_widths():
    found = summary(TABLE, ["score"])
    assert found["method"].tolist() == ["a", "b", "c"]
    assert found["score"][0] == 1.5 and found["± score"][0] > 1
    assert "± score" not in summary(TABLE[TABLE.seed == 0], ["score"])
    by = summary(TABLE.assign(task="t"), ["score"], by=["task"])
    assert by["task"].tolist() == ["t"] * 3


def test_summary_of_what_was_not_measured_for_all():
    table = pd.DataFrame([{"method": "a", "seed": s, "x": 1.0 + s, "y": math.nan} for s in (0, 1)]
                         + [{"method": "b", "seed": s, "x": math.nan, "y": math.nan}
                            for s in (0, 1)])
    found = summary(table, ["x", "y"])
    assert found["x"].tolist()[0] == 1.5 and math.isnan(found["x"][1]) and "y" not in found
