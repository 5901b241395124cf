"""The experiment contract: settings, claims, reports, runs, resume, scoreboard."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import pytest
import torch

from adaptlab import experiment
from adaptlab.experiment import (
    REPORT_MIME,
    BaseConfig,
    Report,
    bounded,
    launch,
    load_report,
    runs,
    save_report,
    scoreboard,
    start_run,
)


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    "Settings."

    n: int = bounded(3, low=1)  # a count
    rate: float = bounded(0.1, above=0, below=1)  # a rate
    grid: tuple[float, ...] = bounded((0.1, 0.2), above=0)  # some rates
    kind: Literal["a", "b"] = "a"  # a choice
    name: str | None = None  # a name


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"n": 0}, ValueError, "n = 0"),
        ({"n": 1.5}, TypeError, "n = 1.5"),
        ({"n": True}, TypeError, "must be int"),
        ({"rate": 0}, ValueError, "> 0"),
        ({"rate": "0.5"}, TypeError, "must be float"),
        ({"grid": (0.1, -1.0)}, ValueError, "grid"),
        ({"grid": [0.1]}, TypeError, "grid"),
        ({"kind": "c"}, ValueError, "'a', 'b'"),
        ({"name": 3}, TypeError, "name"),
        ({"seeds": ()}, ValueError, "at least one seed"),
        ({"nn": 3}, ValueError, "unknown setting"),
    ],
)
def test_wrong_settings_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        Config().replace(**change)


def test_settings_round_trip_and_digest():
    cfg = Config(n=5)
    assert cfg.to_dict() == json.loads(json.dumps(cfg.to_dict()))
    assert cfg.digest() == Config(n=5).digest() != Config().digest()


def filled(paper="lame") -> Report:
    import matplotlib.pyplot as plt

    report = Report(paper, Config())
    report.table("t", pd.DataFrame({"x": [1.0, 2.0]}, index=["p", "q"]))
    fig, ax = plt.subplots()
    ax.plot([0, 1])
    report.figure("f", fig, "a line")
    estimate = types.SimpleNamespace(value=0.5, low=0.4, high=0.6)
    report.claim("one", paper="0.6", source="Table 1", measured=estimate, holds=True, unit="points")
    report.claim("two", paper="2", measured=1.0, holds=False, reason="too small")
    report.seconds = 1.0
    return report


def test_report_round_trip(tmp_path):
    report = filled()
    again = load_report(save_report(report, tmp_path / "r"))
    assert again.summary() == report.summary()
    assert again.figures["f"].png == report.figures["f"].png
    assert again.figures["f"].png.startswith(b"\x89PNG")
    pd.testing.assert_frame_equal(again.tables["t"], report.tables["t"])


def test_claim_needs_reason_and_is_said_once():
    report = filled()
    with pytest.raises(ValueError, match="reason"):
        report.claim("three", paper="", measured=1, holds=None)
    with pytest.raises(ValueError, match="already"):
        report.claim("one", paper="", measured=1, holds=True)
    with pytest.raises(TypeError, match="measured"):
        report.claim("four", paper="", measured=None, holds=True)


def test_claims_table_carries_the_report():
    data, _ = filled().claims_table()._repr_mimebundle_()
    assert data[REPORT_MIME]["claims"][0]["measured"] == "0.5 points [0.4, 0.6]"
    assert "does not hold: too small" in data["text/html"]
    json.dumps(data[REPORT_MIME])


def test_a_report_is_never_overwritten(tmp_path):
    save_report(filled(), tmp_path / "r")
    with pytest.raises(FileExistsError, match="never overwritten"):
        save_report(filled(), tmp_path / "r")


def test_nothing_is_half_written(tmp_path):
    report = filled()
    report.tables["bad"] = pd.DataFrame({"x": [object()]})
    with pytest.raises(Exception):  # noqa: B017  whatever Parquet says
        save_report(report, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "result",
    [{"a": [1, 2]}, [1.5, "x"], pd.DataFrame({"a": [1]}), {"w": torch.arange(3.0)}],
    ids=["dict", "list", "frame", "tensors"],
)
def test_stages_are_kept_in_a_plain_format(tmp_path, result):
    run = start_run("lame", Config(), root=tmp_path)
    run.stage("s", lambda: result)
    again = run.stage("s", lambda: pytest.fail("computed twice"))
    if isinstance(result, pd.DataFrame):
        pd.testing.assert_frame_equal(again, result)
    elif isinstance(result, dict) and torch.is_tensor(result.get("w")):
        assert torch.equal(again["w"], result["w"])
    else:
        assert again == result
    assert {p.suffix for p in run.path("stages", "x").parent.iterdir()} <= set(experiment._SUFFIXES)


def test_a_stage_that_cannot_be_kept_says_what_can(tmp_path):
    run = start_run("lame", Config(), root=tmp_path)
    with pytest.raises(TypeError, match="DataFrame"):
        run.stage("s", object)


def test_resume_needs_the_same_settings(tmp_path):
    run = start_run("lame", Config(), root=tmp_path)
    assert start_run("lame", Config(), root=tmp_path, resume=True).folder == run.folder
    with pytest.raises(ValueError, match="no unfinished run"):
        start_run("lame", Config(n=4), root=tmp_path, resume=True)
    save_report(filled(), run.folder / "report")
    with pytest.raises(ValueError, match="no unfinished run"):
        start_run("lame", Config(), root=tmp_path, resume=True)


def test_two_runs_in_one_second_get_two_folders(tmp_path):
    folders = {start_run("lame", Config(), root=tmp_path).folder for _ in range(3)}
    assert len(folders) == 3 and len(runs("lame", tmp_path)) == 3


def test_unwritable_root_is_a_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OSError, match="can't write the run"):
        start_run("lame", Config(), root=blocked)
    assert blocked.read_text() == "in the way"


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {here!r})
    from test_experiment import Config
    from adaptlab.experiment import start_run
    run = start_run("lame", Config(), root={root!r}, resume={resume})
    run.stage("one", lambda: [1])
    run.stage("two", lambda: os.kill(os.getpid(), signal.SIGKILL) if not {resume} else [2])
"""


def test_killed_run_is_recognised_and_resumed(tmp_path):
    here = os.path.dirname(__file__)

    def child(resume):
        code = textwrap.dedent(KILLED.format(here=here, root=str(tmp_path), resume=resume))
        return subprocess.run([sys.executable, "-c", code]).returncode

    assert child(False) == -signal.SIGKILL
    (run,) = runs("lame", tmp_path)
    assert not run.finished
    assert [p.name for p in run.path("stages", "x").parent.iterdir()] == ["one.json"]
    assert child(True) == 0
    assert sorted(p.name for p in run.path("stages", "x").parent.iterdir()) == [
        "one.json",
        "two.json",
    ]


def fake_lesson(monkeypatch):
    def run_it(cfg, run):
        report = run.report(cfg)
        report.claim("c", paper="1", measured=float(cfg.n), holds=cfg.n == 3, reason="n is not 3")
        return report

    lesson = types.SimpleNamespace(experiment=run_it, SMALL=Config(), FULL=Config(n=100))
    monkeypatch.setattr(experiment, "lesson_module", lambda paper: lesson)


def test_launch_writes_a_report_and_the_scoreboard_shows_the_newest(tmp_path, monkeypatch):
    fake_lesson(monkeypatch)
    assert launch("lame", root=tmp_path).claims[0].holds
    newer = launch("lame", scale="full", root=tmp_path)
    assert newer.scale == "full" and not newer.claims[0].holds
    path = runs("lame", tmp_path)[-1].folder / "report" / "report.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "created": "2999-01-01T00:00:00+00:00"}))
    board = scoreboard(root=tmp_path)
    assert list(board["verdict"]) == ["does not hold"] and list(board["scale"]) == ["full"]
    assert scoreboard().empty


def test_wrong_scale_and_config(tmp_path, monkeypatch):
    fake_lesson(monkeypatch)
    with pytest.raises(ValueError, match="'small' or 'full'"):
        launch("lame", scale="huge", root=tmp_path)
    with pytest.raises(TypeError, match="Config"):
        launch("lame", {"n": 3}, root=tmp_path)


def test_planned_lesson_cannot_be_launched():
    planned = next((p for p in experiment.catalog.papers() if not p.has_lesson), None)
    if planned is None:
        pytest.skip("every lesson is written")
    with pytest.raises(ValueError, match="not written yet"):
        launch(planned.slug)


TWO = """
    import sys
    sys.path.insert(0, {here!r})
    from test_experiment import Config
    from adaptlab.experiment import start_run, rank
    run = start_run("lame", Config(device="cpu"), root={root!r})
    value = run.stage("one", lambda: [7])
    assert value == [7]
    print("folder", run.folder.name, flush=True)
"""


def test_two_processes_share_one_folder(tmp_path):
    script = tmp_path / "two.py"
    root = tmp_path / "runs"
    script.write_text(textwrap.dedent(TWO.format(here=os.path.dirname(__file__), root=str(root))))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--standalone", str(script)]
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert out.returncode == 0, out.stderr[-2000:]
    assert len(runs("lame", root)) == 1


@pytest.mark.parametrize("result", [
    (1, 2.5), {1: "a", (0, 1): [(2,)], None: {True: 0}}, {"a": [{"b": (1, ())}]},
    {"__tuple__": [1]}, [], None, {}, float("inf"),
], ids=repr)
def test_a_resumed_stage_gives_what_the_first_one_gave(tmp_path, result):
    "Types, too: a tuple is no list, and 1 is no '1'."
    run = start_run("lame", Config(), root=tmp_path)
    assert run.stage("s", lambda: result) == result
    again = run.stage("s", lambda: pytest.fail("computed twice"))
    assert repr(again) == repr(result)


def test_old_stages_can_be_read(tmp_path):
    run = start_run("lame", Config(), root=tmp_path)
    run.path("stages", "s.json").write_text('{"a": [1, {"b": NaN}]}')
    assert run.stage("s", lambda: pytest.fail("computed"))["a"][0] == 1


def test_a_stage_keeps_tied_weights(tmp_path):
    w = torch.arange(6.0)
    run = start_run("lame", Config(), root=tmp_path)
    run.stage("s", lambda: {"a": w, "b": w, "c": w[:3], "d": w.view(2, 3).T})
    again = run.stage("s", lambda: pytest.fail("computed twice"))
    assert torch.equal(again["a"], w) and torch.equal(again["b"], w)
    assert torch.equal(again["c"], w[:3]) and torch.equal(again["d"], w.view(2, 3).T)


def test_what_can_not_be_kept_is_said_at_once(tmp_path):
    "Not after the hours of the experiment, when the report is written."
    report = Report("lame", Config())
    for frame in (pd.DataFrame({"x": [1, "a"]}), pd.DataFrame({"x": [object()]}),
                  pd.DataFrame([[1, 2]], columns=["x", "x"])):
        with pytest.raises(ValueError, match="table 't'.*columns"):
            report.table("t", frame)
    for call in (report.table, lambda name, _: report.figure(name, None)):
        for name in ("a/b", "", ".."):
            with pytest.raises(ValueError, match="file name"):
                call(name, pd.DataFrame({"x": [1]}))
    run = start_run("lame", Config(), root=tmp_path)
    with pytest.raises(TypeError, match="stage 's'.*DataFrame"):
        run.stage("s", lambda: pd.DataFrame({"x": [1, "a"]}))
    assert not report.tables


def test_a_measurement_that_is_nan_gives_valid_json():
    report = Report("lame", Config())
    claim = report.claim("c", paper="1", measured=float("nan"), holds=None, reason="diverged")
    assert claim.measured == "nan" and claim.value is None
    wide = types.SimpleNamespace(value=1.0, low=float("-inf"), high=2.0)
    claim = report.claim("d", paper="1", measured=wide, holds=True)
    assert (claim.value, claim.low, claim.high) == (1.0, None, 2.0)
    json.dumps(report.summary(), allow_nan=False)


def test_foreign_and_broken_folders_do_not_stop_the_scoreboard(tmp_path, monkeypatch):
    fake_lesson(monkeypatch)
    launch("lame", root=tmp_path)
    for name, text in (("models/mine", "{}"), ("lame/20200101-000000", ""), ("x/y", "[]")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(text)
    assert len(runs(root=tmp_path)) == 1 and len(scoreboard(root=tmp_path)) == 1


def test_launch_says_where_the_report_is(tmp_path, monkeypatch):
    fake_lesson(monkeypatch)
    old = start_run("lame", Config(), root=tmp_path)  # never finished
    launch("lame", Config(n=4), root=tmp_path)
    report = launch("lame", Config(), root=tmp_path, resume=True)
    assert report.folder == old.folder / "report"
    assert load_report(report.folder).folder == report.folder
