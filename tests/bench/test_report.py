"""Claims and their one verdict rule, tables that survive, reports on disk."""

import io
import json
import math
import types

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptlab.bench.report import (
    FAILS,
    HOLDS,
    OPEN,
    REPORT_MIME,
    Claim,
    Report,
    load_report,
    read_frame,
    save_report,
    verdict,
    write_frame,
)
from adaptlab.stats import Estimate

NAN, INF = math.nan, math.inf


def estimate(low, high, value=None):
    return types.SimpleNamespace(value=(low + high) / 2 if value is None else value, low=low,
                                 high=high)


@pytest.mark.parametrize("low, high, above", [
    (1, 3, HOLDS), (-3, -1, FAILS), (-1, 3, OPEN), (0, 3, OPEN), (-3, 0, OPEN), (0, 0, OPEN),
    (2, 2, HOLDS), (-2, -2, FAILS), (NAN, NAN, OPEN), (1, NAN, OPEN), (NAN, -1, OPEN),
    (1, INF, HOLDS), (-INF, -1, FAILS), (-INF, INF, OPEN), (1e-300, 1, HOLDS),
])
def test_the_one_rule(low, high, above):
    opposite = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}
    assert verdict(low, high, above=0) == above
    assert verdict(low, high, below=0) == opposite[above]
    assert verdict(low + 5, high + 5, above=5.0) == verdict(low, high, above=0) or low == 1e-300


@pytest.mark.parametrize("marks", [
    {}, {"above": 0, "below": 0}, {"above": NAN}, {"below": INF}, {"above": True},
])
def test_exactly_one_mark_that_is_a_number(marks):
    with pytest.raises(ValueError, match="exactly one|finite number"):
        verdict(1, 2, **marks)
    with pytest.raises(ValueError, match="exactly one|finite number"):
        Report("lame").claim("c", measured=1, **marks)


def test_exchanged_ends_are_refused():
    with pytest.raises(ValueError, match="exchanged"):
        verdict(2, 1, above=0)


@given(st.floats(allow_nan=True), st.floats(allow_nan=True), st.floats(-1e6, 1e6), st.booleans())
def test_a_claim_survives_json_and_its_verdict_can_be_told_again(a, b, mark, above):
    low, high = (a, b) if math.isnan(a) or math.isnan(b) else sorted((a, b))
    report = Report("lame")
    claim = report.claim("c", measured=estimate(low, high, value=low),
                         **{"above" if above else "below": mark})
    data = json.loads(json.dumps(claim.to_dict(), allow_nan=False))
    again = Claim.from_dict(data)
    assert again.verdict == again.again() == claim.verdict and again.to_dict() == claim.to_dict()


def test_a_verdict_that_the_rule_denies_is_not_read():
    claim = Report("lame").claim("c", measured=1.0, above=2)
    with pytest.raises(ValueError, match="the rule 'does not hold'"):
        Claim.from_dict({**claim.to_dict(), "verdict": HOLDS})


@pytest.mark.parametrize("number", [
    3, 3.0, np.float32(3), np.int64(3), np.array(3.0), torch.tensor(3.0),
], ids=repr)
def test_an_exact_number_is_its_own_interval(number):
    claim = Report("lame").claim("c", measured=number, above=2, unit="points")
    assert (claim.value, claim.low, claim.high) == (3.0, 3.0, 3.0)
    assert claim.verdict == HOLDS and claim.measured == "3 points"


@pytest.mark.parametrize("wrong", [None, True, "much", "3", [1, 2], np.ones(2), {}], ids=repr)
def test_what_is_no_measurement_is_refused(wrong):
    with pytest.raises(TypeError, match="measured"):
        Report("lame").claim("c", measured=wrong, above=0)


@pytest.mark.parametrize("measured, text", [
    (estimate(0.4, 0.6, 0.5), "0.5 points [0.4, 0.6]"),
    (estimate(NAN, NAN, 0.5), "0.5 points (no interval)"),
    (NAN, "nan points"), (123456.7, "123,457 points"), (999.7, "1,000 points"),
])
def test_how_a_measurement_reads(measured, text):
    assert Report("lame").claim("c", measured=measured, above=0, unit="points").measured == text


def filled(paper="lame") -> Report:
    import matplotlib.pyplot as plt

    report = Report(paper, {"n": 3}, environment={"python": "3"})
    report.table("t", pd.DataFrame({"x": [1.0, 2.0]}, index=["p", "q"]))
    report.table("settings", pd.DataFrame({"m": ["a", "b"], "setting": [{"lr": 0.1}, {"k": (1,)}]}))
    fig, ax = plt.subplots()
    ax.plot([0, 1])
    report.figure("main", fig, "a line")
    report.claim("one", paper="0.6", source="Table 1", measured=estimate(0.4, 0.6), above=0.1,
                 unit="points", why="not to be seen")
    report.claim("two", paper="2", measured=1.0, above=2, why="too small")
    report.claim("three", measured=estimate(NAN, NAN, 1.0), below=0, why="one seed")
    report.seconds = 1.0
    return report


def test_report_round_trip(tmp_path):
    report = filled()
    again = load_report(save_report(report, tmp_path / "r"))
    assert again.summary() == report.summary()
    assert again.claims_table().frame.equals(report.claims_table().frame)
    assert again.figures["main"].png == report.figures["main"].png
    assert again.figures["main"].png.startswith(b"\x89PNG")
    pd.testing.assert_frame_equal(again.tables["t"], report.tables["t"])
    assert list(again.tables["settings"]["setting"]) == [{"lr": 0.1}, {"k": (1,)}]


def test_the_table_shows_a_reason_only_where_the_claim_does_not_hold():
    frame = filled().claims_table().frame
    assert list(frame.columns) == ["claim", "paper", "here", "verdict"]
    assert list(frame["verdict"]) == [
        "holds", "does not hold: too small", "not decided at this scale: one seed"]
    assert list(frame["paper"]) == ["0.6 (Table 1)", "2", ""]


def test_claims_table_carries_the_report():
    data, _ = filled().claims_table()._repr_mimebundle_()
    assert data[REPORT_MIME]["claims"][0]["measured"] == "0.5 points [0.4, 0.6]"
    assert "does not hold: too small" in data["text/html"]
    json.dumps(data[REPORT_MIME], allow_nan=False)


def test_a_long_claim_is_not_cut():
    report = Report("lame")
    report.claim("long " * 60, measured=1, above=0)
    data, _ = report.claims_table()._repr_mimebundle_()
    assert ("long " * 60).strip() in data["text/html"]
    assert data["text/plain"].split() == ["long"] * 60 + ["here", "1", "verdict", "holds"]
    assert max(map(len, data["text/plain"].splitlines())) <= 100


def test_a_claim_is_said_once():
    report = filled()
    with pytest.raises(ValueError, match="already"):
        report.claim("one", measured=1, above=0)


def test_a_report_is_never_overwritten(tmp_path):
    save_report(filled(), tmp_path / "r")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("r", "link"):
        with pytest.raises(FileExistsError, match="never overwritten"):
            save_report(filled(), tmp_path / name)


def test_nothing_is_half_written(tmp_path):
    report = filled()
    report.tables["bad"] = pd.DataFrame({"x": [object()]})
    with pytest.raises(ValueError, match="columns can't be saved"):
        save_report(report, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [
    "", "{", "{}", "[]", '{"paper": "lame"}', b"\xff\xfe",
    json.dumps({**filled().summary(), "created": 5}),
    json.dumps({**filled().summary(), "claims": [{}]}),
    json.dumps({**filled().summary(), "claims": [5]}),
    json.dumps({**filled().summary(), "claims": None}),
], ids=range(10))
def test_a_damaged_report_is_named(tmp_path, damage):
    where = save_report(filled(), tmp_path / "r") / "report.json"
    where.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.raises(ValueError, match=r"r/report\.json is damaged"):
        load_report(where.parent)


@pytest.mark.parametrize("part", ["tables/t.parquet", "figures/main.png"])
def test_a_damaged_part_is_named(tmp_path, part):
    where = save_report(filled(), tmp_path / "r")
    (where / part).unlink()
    if part.endswith("parquet"):
        (where / part).write_text("no table")
    with pytest.raises(ValueError, match=part):
        load_report(where)


def test_no_report_is_told_apart_from_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="unfinished"):
        load_report(tmp_path)


CELLS = [
    [{"a": 1}, {"b": 2}], [{"a": 1}, None], [(1, 2), (3,)], [[1], []], [{}, {}],
    [{"a": {"b": (1, [2])}}, {1: "x"}], [{"x": 1.5}, "text"],
]


@pytest.mark.parametrize("cells", CELLS, ids=repr)
def test_nested_cells_survive_a_file(cells):
    frame = pd.DataFrame({"seed": [1, 2], "c": cells}, index=["p", "q"])
    file = io.BytesIO()
    write_frame(frame, file)
    again = read_frame(file)
    assert repr(list(again["c"])) == repr(cells) and list(again.index) == ["p", "q"]
    assert again["seed"].dtype == frame["seed"].dtype
    assert repr(list(frame["c"])) == repr(cells), "the caller's table is left alone"


def test_numbers_of_numpy_in_a_setting_are_plain_numbers():
    file = io.BytesIO()
    write_frame(pd.DataFrame({"c": [{"lr": np.float32(0.5), "k": np.int64(2)}]}), file)
    (cell,) = read_frame(file)["c"]
    assert cell == {"lr": 0.5, "k": 2} and type(cell["k"]) is int


def test_what_can_not_be_kept_is_said_at_once():
    "Not after the hours of the experiment, when the report is written."
    report = Report("lame")
    for frame in (pd.DataFrame({"x": [1, "a"]}), pd.DataFrame({"x": [object()]}),
                  pd.DataFrame([[1, 2]], columns=["x", "x"]),
                  pd.DataFrame({"x": [{"a": object()}]}), pd.DataFrame({"x": [{1}]})):
        with pytest.raises(ValueError, match="table 't'.*columns"):
            report.table("t", frame)
    for call in (report.table, lambda name, _: report.figure(name, None)):
        for name in ("a/b", "", ".."):
            with pytest.raises(ValueError, match="file name"):
                call(name, pd.DataFrame({"x": [1]}))
    assert not report.tables


def test_a_config_with_an_infinite_number_gives_valid_json():
    report = Report("lame", {"limit": INF, "grid": (1.0, NAN)})
    assert json.loads(json.dumps(report.summary(), allow_nan=False))["config"] == {
        "limit": "inf", "grid": [1.0, None]}


def test_what_rounding_leaves_of_zero_is_zero():
    "Differences that cancel to 1e-15 decide nothing, and are shown as 0."
    report = Report("lame")
    for low, text in ((-3.9e-15, "9 points [0, 18]"), (3.9e-15, "9 points [0, 18]"),
                      (1e-3, "9 points [0.001, 18]")):
        report.claim(f"a {low}", measured=Estimate(9.0, low, 18.0, 20), above=0, unit="points")
        claim = report.claims[-1]
        assert claim.measured == text
        assert (claim.verdict == "holds") == (low == 1e-3)
