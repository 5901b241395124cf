"""The experiment contract: settings, runs, stages, resume, locks, scoreboard."""

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import types
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch

from adaptlab.bench import runs as bench
from adaptlab.bench.report import Report, load_report, save_report
from adaptlab.bench.runs import (
    BaseConfig,
    Run,
    bounded,
    launch,
    runs,
    scoreboard,
    start_run,
    tracks,
)


@dataclass(frozen=True)
class Optim:
    "Settings that belong together."

    lr: float = bounded(0.1, above=0)  # a rate
    betas: tuple[float, ...] = (0.9, 0.9)  # the same twice is fine here
    name: str | None = None  # a name


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    "Settings."

    n: int = bounded(3, low=1)  # a count
    rate: float = bounded(0.1, above=0, below=1)  # a rate
    grid: tuple[float, ...] = bounded((0.1, 0.2), above=0)  # some rates
    kind: Literal["a", "b"] = "a"  # a choice
    kinds: tuple[Literal["a", "b"], ...] = ("a",)  # some choices
    name: str | None = None  # a name
    layers: tuple[str, ...] = ()  # none by default
    sizes: tuple[int, ...] | None = None  # or none at all
    extra: tuple[int, ...] = bounded((1,), nonempty=False, unique=False)  # anything goes
    span: tuple[int, int] = (1, 1)  # from, to
    limit: float = math.inf  # none by default
    optim: Optim = Optim()  # nested

    def check(self):
        "A relation between two settings."
        if self.n > 50 and self.rate > 0.5:
            raise ValueError(f"n = {self.n} with rate = {self.rate}: lower one of them")


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"n": 0}, ValueError, "n = 0"),
        ({"n": 1.5}, TypeError, "n = 1.5"),
        ({"n": True}, TypeError, "must be int"),
        ({"rate": 0}, ValueError, "> 0"),
        ({"rate": math.nan}, ValueError, "finite"),
        ({"grid": (math.inf,)}, ValueError, "finite"),
        ({"optim": {"lr": math.inf}}, ValueError, r"optim\.lr = inf"),
        ({"limit": -math.nan}, ValueError, "finite"),
        ({"rate": "0.5"}, TypeError, "must be float"),
        ({"grid": (0.1, -1.0)}, ValueError, "grid"),
        ({"grid": (0.1, math.nan)}, ValueError, "grid"),
        ({"grid": [0.1]}, TypeError, "grid"),
        ({"grid": ()}, ValueError, "at least one"),
        ({"grid": (0.1, 0.2, 0.1)}, ValueError, "0.1 is named twice"),
        ({"kind": "c"}, ValueError, "'a', 'b'"),
        ({"kinds": ("c",)}, ValueError, "kinds"),
        ({"kinds": ()}, ValueError, "at least one kind"),
        ({"kinds": ("a", "a")}, ValueError, "'a' is named twice"),
        ({"layers": ("q", "q")}, ValueError, "named twice"),
        ({"sizes": ()}, ValueError, "at least one size"),
        ({"sizes": (1, 1)}, ValueError, "named twice"),
        ({"name": 3}, TypeError, "name"),
        ({"seeds": ()}, ValueError, "at least one seed"),
        ({"seeds": (10, 10)}, ValueError, "10 is named twice"),
        ({"seeds": (-1,)}, ValueError, "seeds"),
        ({"seeds": (2**32,)}, ValueError, "seeds"),
        ({"device": "gpu"}, ValueError, "device = 'gpu'"),
        ({"nn": 3}, ValueError, "unknown setting"),
        ({"optim": {"lr": 0.0}}, ValueError, r"optim\.lr"),
        ({"optim": {"lr": "x"}}, TypeError, r"optim\.lr"),
        ({"optim": {"l": 1}}, ValueError, r"optim\.l"),
        ({"optim": 3}, TypeError, "optim"),
        ({"n": 60, "rate": 0.9}, ValueError, "lower one of them"),
    ],
)
def test_wrong_settings_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        Config().replace(**change)


@pytest.mark.parametrize("change", [
    {"layers": ("q", "k")}, {"limit": 3.0}, {"limit": -math.inf},
    {"sizes": (2, 1)}, {"extra": ()}, {"extra": (2, 2)}, {"span": (4, 4)},
    {"optim": {"betas": (0.5, 0.5)}}, {"rate": 0.5, "n": 60}, {"device": "cuda:1"},
])
def test_sensible_settings_are_accepted(change):
    cfg = Config().replace(**change)
    assert cfg != Config() and cfg.digest() != Config().digest()


def test_settings_round_trip_and_digest():
    cfg = Config(n=5, optim=Optim(lr=0.5))
    assert cfg.to_dict() == json.loads(json.dumps(cfg.to_dict()))
    assert cfg.to_dict()["optim"] == {"lr": 0.5, "betas": [0.9, 0.9], "name": None}
    assert cfg.digest() == Config(n=5, optim=Optim(lr=0.5)).digest() != Config().digest()
    changed = cfg.replace(optim={"name": "sgd"})
    assert changed.optim == Optim(lr=0.5, name="sgd") and cfg.optim.name is None


def test_changes_of_a_preset_as_a_table():
    table = Config(n=5, optim=Optim(lr=0.5)).changes(Config())
    assert table.to_dict("index") == {"n": {"SMALL": "3", "FULL": "5"},
                                      "optim.lr": {"SMALL": "0.1", "FULL": "0.5"}}
    assert Config().changes(Config()).empty


def test_a_setting_can_not_have_the_name_of_an_option():
    with pytest.raises(TypeError, match=r"\['resume'\] are options"):
        @dataclass(frozen=True, kw_only=True)
        class Wrong(BaseConfig):
            resume: bool = False


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize(
    "result",
    [
        pd.DataFrame({"a": [1]}),
        pd.DataFrame({"c": [{"a": 1}, {"b": 2}], "t": [(1, 2), (3,)], "l": [[], [1]]}),
        pd.DataFrame({"x": [1.0, math.nan], "s": ["a", None], "b": [True, False]}, index=[3, 7]),
        pd.DataFrame({"x": [1]}, index=pd.MultiIndex.from_tuples([("a", 1)], names=["m", "s"])),
        pd.DataFrame({"x": pd.Categorical(["a", "b"]), "t": pd.to_datetime(["2020", "2021"])}),
    ],
    ids=["plain", "nested", "missing", "index", "types"],
)
def test_a_table_is_the_same_the_first_time_and_later(tmp_path, result):
    run = start_run("lame", Config(), root=tmp_path)
    first = run.stage("s", lambda: result)
    again = run.stage("s", lambda: pytest.fail("computed twice"))
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(first, result)
    assert repr(first.to_dict("list")) == repr(result.to_dict("list"))


def test_a_setting_kept_in_a_table_can_be_used_again(tmp_path):
    run = start_run("lame", Config(), root=tmp_path)
    frame = pd.DataFrame({"m": ["A", "B"], "setting": [{"lr": 0.1}, {"k": 3, "on": True}]})
    for _ in range(2):
        a, b = run.stage("s", lambda: frame)["setting"]
        assert dict(**a) == {"lr": 0.1} and dict(**b) == {"k": 3, "on": True}
        assert type(b["k"]) is int and b["on"] is True


@pytest.mark.parametrize("result", [
    (1, 2.5), {1: "a", (0, 1): [(2,)], None: {True: 0}}, {"a": [{"b": (1, ())}]},
    {"__tuple__": [1]}, [], None, {}, float("inf"), [1.5, "x"], {"a": [1, 2]},
], ids=repr)
def test_a_resumed_stage_gives_what_the_first_one_gave(tmp_path, result):
    "Types, too: a tuple is no list, and 1 is no '1'."
    run = start_run("lame", Config(), root=tmp_path)
    assert repr(run.stage("s", lambda: result)) == repr(result)
    again = run.stage("s", lambda: pytest.fail("computed twice"))
    assert repr(again) == repr(result)


def test_numbers_of_numpy_come_back_plain_both_times(tmp_path):
    run = start_run("lame", Config(), root=tmp_path)
    for _ in range(2):
        found = run.stage("s", lambda: {"a": np.float32(0.5), "b": [np.int64(3)]})
        assert found == {"a": 0.5, "b": [3]} and type(found["b"][0]) is int


def test_a_stage_keeps_tied_weights(tmp_path):
    w = torch.arange(6.0, requires_grad=True)
    run = start_run("lame", Config(), root=tmp_path)
    for _ in range(2):
        kept = run.stage("s", lambda: {"a": w, "b": w, "c": w[:3], "d": w.view(2, 3).T})
        assert torch.equal(kept["a"], w) and torch.equal(kept["b"], w)
        assert torch.equal(kept["c"], w[:3]) and torch.equal(kept["d"], w.view(2, 3).T)
        assert not any(t.requires_grad for t in kept.values())
        assert list(kept) == ["a", "b", "c", "d"]
    names = {"z": torch.ones(1), "a": torch.ones(1).bfloat16(), "m": torch.ones(2).bool()}
    assert list(run.stage("order", lambda: names)) == ["z", "a", "m"]


@pytest.mark.parametrize("result", [
    object(), {"a": object()}, {1, 2}, np.ones(2), [torch.ones(2)],
    {"a": torch.ones(1), "b": 3}, pd.DataFrame({"x": [1, "a"]}), pd.DataFrame({"x": [{1}]}),
    Path("x"),
], ids=range(9))
def test_a_stage_that_cannot_be_kept_says_what_can(tmp_path, result):
    run = start_run("lame", Config(), root=tmp_path)
    with pytest.raises(TypeError, match=r"stage 's'.*DataFrame"):
        run.stage("s", lambda: result)
    assert not list((run.folder / "stages").glob("*"))


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/../b", "a\0b", "x" * 300, 3])
def test_the_name_of_a_stage_is_checked_before_the_work(tmp_path, name):
    run = start_run("lame", Config(), root=tmp_path)
    with pytest.raises(ValueError, match="plain one"):
        run.stage(name, lambda: pytest.fail("worked"))


def test_stages_may_lie_in_folders(tmp_path):
    run = start_run("lame", Config(), root=tmp_path)
    assert run.stage("digits", lambda: 1) == 1
    assert run.stage("digits/LoRA, lr=0.1, 3", lambda: 2) == 2
    assert run.stage("digits/LoRA, lr=0.1, 3", lambda: pytest.fail("again")) == 2


@pytest.mark.parametrize("name, result", [
    ("json", {"a": 1}), ("parquet", pd.DataFrame({"a": [1]})),
    ("safetensors", {"w": torch.ones(2)}),
])
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe"], ids=["empty", "cut", "bytes"])
def test_a_damaged_stage_is_named_and_done_again(tmp_path, name, result, damage):
    run = start_run("lame", Config(), root=tmp_path)
    run.stage("s", lambda: result)
    file = run.path("stages", f"s.{name}")
    file.write_bytes(damage)
    with pytest.warns(UserWarning, match=rf"stages/s\.{name} is damaged"):
        again = run.stage("s", lambda: result)
    assert str(again) == str(result)
    assert file.with_name(file.name + ".damaged").read_bytes() == damage
    run.stage("s", lambda: pytest.fail("computed a third time"))


@pytest.mark.parametrize("when", ["before the work", "after it"])
def test_a_full_disk_is_named(tmp_path, monkeypatch, when):
    run, worked = start_run("lame", Config(), root=tmp_path), []

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    def work():
        worked.append(1)
        monkeypatch.setattr(bench, "atomic_write_text", full)

    if when == "before the work":
        work()
        worked.clear()
    with pytest.raises(OSError, match=r"stage 's' can't be kept in .*stages.*No space left"):
        run.stage("s", work)
    assert bool(worked) == (when == "after it")


# ---------------------------------------------------------------- runs


def test_resume_needs_the_same_settings(tmp_path):
    run = start_run("lame", Config(), root=tmp_path)
    assert start_run("lame", Config(), root=tmp_path, resume=True).folder == run.folder
    for other in (Config(n=4), Config(optim=Optim(lr=0.3))):
        with pytest.raises(ValueError, match="no unfinished run"):
            start_run("lame", other, root=tmp_path, resume=True)
    save_report(Report("lame"), run.folder / "report")
    with pytest.raises(ValueError, match="no unfinished run"):
        start_run("lame", Config(), root=tmp_path, resume=True)


def test_runs_of_one_second_get_folders_of_their_own_in_order(tmp_path):
    folders = [start_run("lame", Config(), root=tmp_path).folder for _ in range(12)]
    assert len(set(folders)) == 12
    assert [r.folder for r in runs("lame", tmp_path)] == folders


def test_unwritable_root_is_a_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OSError, match="can't write the run"):
        start_run("lame", Config(), root=blocked)
    assert blocked.read_text() == "in the way"


@pytest.mark.parametrize("place", ["root", "parent", "paper"])
@pytest.mark.timeout(60)
def test_a_link_to_nowhere_is_a_clear_error(tmp_path, place):
    "The disk that it leads to is not mounted; mkdir says that it exists."
    link = tmp_path / ("runs/lame" if place == "paper" else "runs")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to("/mnt/not-mounted/runs")
    root = tmp_path / "runs" / "deep" if place == "parent" else tmp_path / "runs"
    with pytest.raises(OSError, match=r"can't write the run.*(link to /mnt/not-mounted)"):
        start_run("lame", Config(), root=root)
    with pytest.raises(ValueError, match="no unfinished run"):
        start_run("lame", Config(), root=root, resume=True)


@pytest.mark.timeout(60)
def test_a_link_in_a_circle_is_a_clear_error(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "runs")
    with pytest.raises(OSError, match="can't write the run"):
        start_run("lame", Config(), root=tmp_path / "runs")


def test_tilde_is_the_home_everywhere(tmp_path, monkeypatch):
    "From a .env file or `--root=~/x`: no shell has expanded it."
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ADAPTLAB_RUNS", "~/from-env")
    monkeypatch.chdir(tmp_path)
    assert bench.runs_root() == tmp_path / "home" / "from-env"
    run = start_run("lame", Config())
    run.stage("s", lambda: pd.DataFrame({"a": [1]}))
    assert run.folder.is_relative_to(tmp_path / "home" / "from-env")
    other = start_run("lame", Config(), root="~/given")
    assert other.folder.is_relative_to(tmp_path / "home" / "given")
    save_report(Report("lame"), "~/report")
    assert load_report("~/report").paper == "lame" and len(runs(root="~/given")) == 1
    assert not (tmp_path / "~").exists()


def test_a_tilde_without_a_home_is_a_clear_error(monkeypatch):
    def nobody(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(OSError, match="--root, or \\$ADAPTLAB_RUNS"):
        bench.runs_root("~/x")


def test_a_relative_root_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = start_run("lame", Config(), root="runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.stage("s", lambda: 1)
    assert (tmp_path / "runs" / "lame" / run.folder.name / "stages" / "s.json").is_file()


def test_the_source_tree_is_this_course_only(tmp_path, monkeypatch):
    monkeypatch.delenv("ADAPTLAB_RUNS", raising=False)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name=mylib\n")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert bench.source_tree() is None and bench.runs_root() == tmp_path / "deep" / "runs"
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nrepo = x\nlib_name = adaptlab\n")
    assert bench.source_tree() == tmp_path and bench.runs_root() == tmp_path / "runs"


KILLED = """
    import os, signal, sys
    sys.path[:0] = [{here!r}, {tests!r}]
    from test_runs import Config
    from adaptlab.bench.runs import start_run
    run = start_run("lame", Config(), root={root!r}, resume={resume})
    run.stage("one", lambda: [1])
    run.stage("two", lambda: os.kill(os.getpid(), signal.SIGKILL) if not {resume} else [2])
"""
HERE, TESTS = str(Path(__file__).parent), str(Path(__file__).parents[1])


def test_killed_run_is_recognised_and_resumed(tmp_path):
    def child(resume):
        code = textwrap.dedent(KILLED.format(here=HERE, tests=TESTS, root=str(tmp_path),
                                             resume=resume))
        return subprocess.run([sys.executable, "-c", code]).returncode

    assert child(False) == -signal.SIGKILL
    (run,) = runs("lame", tmp_path)
    assert not run.finished
    assert [p.name for p in (run.folder / "stages").iterdir()] == ["one.json"]
    assert child(True) == 0, "the lock of a killed process is free"
    assert sorted(p.name for p in (run.folder / "stages").iterdir()) == ["one.json", "two.json"]


HELD = """
    import sys
    sys.path[:0] = [{here!r}, {tests!r}]
    from test_runs import Config
    from adaptlab.bench.runs import start_run
    run = start_run("lame", Config(), root={root!r})
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_is_going_on_can_not_be_resumed(tmp_path):
    code = textwrap.dedent(HELD.format(here=HERE, tests=TESTS, root=str(tmp_path)))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        said = f"this run is being worked on by process {child.pid} on "
        for _ in range(2):  # asking does no harm to the note of who it is
            with pytest.raises(ValueError, match=said):
                start_run("lame", Config(), root=tmp_path, resume=True)
        fresh = start_run("lame", Config(), root=tmp_path)
        child.stdin.close()
    start_run("lame", Config(), root=tmp_path, resume=True)
    assert len(runs("lame", tmp_path)) == 2 and fresh.folder.is_dir()


# ---------------------------------------------------------------- launch


def test_launch_writes_a_report_and_the_scoreboard_shows_the_newest(tmp_path, invented):
    assert [c.verdict for c in launch("lame", root=tmp_path).claims] == ["holds"] * 2
    newer = launch("lame", invented.FULL.replace(n=2), scale="full", root=tmp_path)
    assert newer.scale == "full" and newer.claims[0].verdict == "does not hold"
    path = runs("lame", tmp_path)[-1].folder / "report" / "report.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "created": "2999-01-01T00:00:00+00:00"}))
    board = scoreboard(root=tmp_path)
    assert list(board["verdict"]) == ["does not hold"] * 2 and set(board["scale"]) == {"full"}
    assert list(board["reason"]) == ["n is small"] * 2
    assert scoreboard().empty
    assert newer.environment["torch"] == torch.__version__


def test_wrong_scale_config_and_device(tmp_path, invented):
    with pytest.raises(ValueError, match="'small' or 'full'"):
        launch("lame", scale="huge", root=tmp_path)
    for wrong in ({"n": 3}, Config()):
        with pytest.raises(TypeError, match="Config"):
            launch("lame", wrong, root=tmp_path)
    with pytest.raises(ValueError, match="cuda:99"):
        launch("lame", invented.SMALL.replace(device="cuda:99"), root=tmp_path)
    assert not list(tmp_path.glob("lame"))


def test_what_is_not_written_yet_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "adaptlab.experiments.lame", None)
    for ask in (launch, bench.preset, bench.experiment_module):
        with pytest.raises(ValueError, match="lame: this experiment is not written yet"):
            ask("lame")
    with pytest.raises(ValueError, match="did you mean"):
        bench.method_module("lema")
    planned = next((p for p in bench.catalog.papers() if not p.has_lesson), None)
    if planned is not None:
        with pytest.raises(ValueError, match="this lesson is not written yet"):
            bench.method_module(planned.slug)


def test_a_missing_library_is_not_taken_for_a_missing_lesson(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        bench._import("needs_more", "this lesson")


def test_tracks_run_what_the_settings_name(tmp_path, invented):
    report = launch("lame", invented.SMALL.replace(tracks=("two",)), root=tmp_path)
    assert [c.text for c in report.claims] == ["two: n is large"] and invented.CALLS == ["two"]


def test_tracks_refuse_unknown_names_before_anything_is_computed(tmp_path, invented):
    seen = []
    module = types.SimpleNamespace(experiment=tracks(one=lambda *a: seen.append(a)),
                                   SMALL=invented.SMALL, FULL=invented.FULL)
    sys.modules["adaptlab.experiments.lame"] = module
    with pytest.raises(ValueError, match=r"tracks = \('one', 'two'\).*\['one'\]"):
        launch("lame", root=tmp_path)
    assert not seen and not list(tmp_path.glob("lame"))
    with pytest.raises(ValueError, match="tracks"):
        module.experiment(invented.SMALL, Run(tmp_path, "lame"))
    with pytest.raises(ValueError, match="at least one part"):
        tracks()


def test_tracks_without_the_setting_runs_all(tmp_path):
    seen = []
    both = tracks(a=lambda c, r, rep: seen.append("a"), b=lambda c, r, rep: seen.append("b"))
    report = both(Config(), start_run("lame", Config(), root=tmp_path))
    assert seen == ["a", "b"] and isinstance(report, Report)


def test_an_experiment_must_return_its_report(tmp_path, invented):
    invented.experiment = lambda cfg, run: None
    with pytest.raises(TypeError, match="no Report"):
        launch("lame", root=tmp_path)


def test_launch_resumes_and_says_where_the_report_is(tmp_path, invented):
    with pytest.raises(ValueError, match="inside") as failed:
        launch("lame", invented.SMALL.replace(fail="two"), root=tmp_path)
    assert failed.value.run.folder.parent == tmp_path / "lame"
    assert invented.CALLS == ["one", "two"]
    launch("lame", invented.SMALL.replace(n=4), root=tmp_path)  # a newer one
    old, _ = runs("lame", tmp_path)
    head = json.loads((old.folder / "config.json").read_text())
    head["config"]["fail"] = ""  # the repair
    (old.folder / "config.json").write_text(json.dumps(head))
    invented.CALLS.clear()
    report = launch("lame", root=tmp_path, resume=True)
    assert invented.CALLS == ["two"] and report.folder == old.folder / "report"
    assert load_report(report.folder).folder == report.folder


def test_seconds_are_those_of_all_parts(tmp_path, invented, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    stop = [True]

    def pause(seconds):
        clock[0] += seconds

    def experiment(cfg, run):
        run.stage("a", lambda: pause(30))
        pause(2)
        if stop.pop():
            raise KeyboardInterrupt
        run.stage("b", lambda: pause(5))
        return run.report(cfg)

    invented.experiment = experiment
    with pytest.raises(KeyboardInterrupt):
        launch("lame", root=tmp_path)
    pause(1000)  # nobody works
    stop.append(False)
    report = launch("lame", root=tmp_path, resume=True)
    assert report.seconds == 32 + 2 + 5 and report.timings == {"a": 30, "b": 5}
    assert json.loads((report.folder / "report.json").read_text())["seconds"] == 39


@pytest.mark.parametrize("text", ["", "[]", '{"total": NaN, "stages": {}}', '{"total": "x"}'])
def test_unreadable_seconds_do_not_stop_a_run(tmp_path, invented, text):
    run = start_run("lame", invented.SMALL, root=tmp_path)
    (run.folder / "seconds.json").write_text(text)
    assert 0 <= launch("lame", root=tmp_path, resume=True).seconds < 1e5


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"paper": 3}', b"\xff"], ids=range(5))
def test_a_damaged_report_hides_no_other_run(tmp_path, invented, damage):
    damaged = launch("lame", root=tmp_path).folder
    (damaged / "report.json").write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    whole = launch("lame", invented.SMALL.replace(n=4), root=tmp_path)
    with pytest.warns(UserWarning, match=rf"{damaged.parent.name}/report/report\.json.*unfinished"):
        board = scoreboard(root=tmp_path)
    assert len(board) == 2
    assert [r.finished for r in runs("lame", tmp_path)] == [False, True]
    invented.CALLS.clear()
    with pytest.warns(UserWarning, match=r"kept in .*report\.damaged-1"):
        again = launch("lame", root=tmp_path, resume=True)
    assert again.folder == damaged != whole.folder and load_report(damaged).claims
    assert invented.CALLS == [], "its stages are whole"
    assert (damaged.parent / "report.damaged-1" / "report.json").is_file()


def test_foreign_and_broken_folders_do_not_stop_the_scoreboard(tmp_path, invented):
    launch("lame", root=tmp_path)
    heads = {"models/mine": "{}", "lame/20200101-000000": "", "x/y": "[]",
             "lame/20200101-000001": '{"paper": "lame", "scale": "small"}'}
    for name, text in heads.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(text)
    assert len(runs(root=tmp_path)) == 1 and len(scoreboard(root=tmp_path)) == 2
    with pytest.raises(ValueError, match="no unfinished run"):
        start_run("lame", Config(), root=tmp_path, resume=True)


def test_a_run_whose_settings_are_damaged_is_named(tmp_path, invented):
    damaged = launch("lame", root=tmp_path).folder.parent / "config.json"
    damaged.write_text("")
    launch("lame", root=tmp_path)
    with pytest.warns(UserWarning, match=f"{damaged} is damaged"):
        assert len(scoreboard(root=tmp_path)) == 2


def notebook(path: Path, *outputs) -> None:
    "Write a notebook with these outputs."
    path.parent.mkdir(parents=True, exist_ok=True)
    cell = {"cell_type": "code", "source": [], "outputs": list(outputs)}
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": []}, cell]}))


def test_reports_of_notebooks(tmp_path):
    report = Report("lame")
    report.claim("c", measured=1, above=0)
    data, _ = report.claims_table()._repr_mimebundle_()
    shown = {"output_type": "display_data", "data": data}
    home = tmp_path / "core" / "nbs"  # the tree itself may lie in a folder of that name
    notebook(home / "testtime" / "01_lame.ipynb", {"output_type": "stream", "text": "x"}, shown)
    for room in ("core", "bench", "doors", "experiments"):
        notebook(home / room / "00_toy.ipynb", shown)
    assert [r["paper"] for r in bench.notebook_reports(home)] == ["lame"]
    wrong = {"output_type": "display_data", "data": {bench.REPORT_MIME: {"paper": "mend"}}}
    notebook(home / "editing" / "01_mend.ipynb", wrong)
    (home / "editing" / "02_x.ipynb").write_text("")
    with pytest.warns(UserWarning) as caught:
        board = scoreboard(notebooks=home)
    assert list(board["paper"]) == ["lame"] and board["verdict"].item() == "holds"
    assert all(any(n in str(w.message) for w in caught) for n in ("01_mend.ipynb", "02_x.ipynb"))


# ---------------------------------------------------------------- the line


def test_a_notebook_shows_a_line_and_keeps_nothing_of_it(invented):
    import nbformat
    from nbclient import NotebookClient

    code = textwrap.dedent("""
        from adaptlab import train
        from adaptlab.bench.runs import launch
        told = []
        write = train.NotebookLine.write
        train.NotebookLine.write = lambda self, text: (told.append(text.strip()), write(self, text))
        report = launch("lame")
        print([t for t in told if t])
    """)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    texts = [o.get("text", "") for o in book.cells[0].outputs]
    assert "stage one (0 done" in "".join(texts) and "stage two (2 done" in "".join(texts)
    for output in book.cells[0].outputs:
        shown = output.get("data", {}).values()
        assert not any("stage" in str(text) for text in shown), output


def test_a_terminal_shows_a_line_and_keeps_nothing_of_it(invented):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        os.execvp(sys.executable, [sys.executable, "-m", "adaptlab", "run", "lame"])
    said = b""
    with suppress(OSError):  # its end
        while part := os.read(terminal, 4096):
            said += part
    assert os.waitpid(child, 0)[1] == 0
    lines = said.decode().replace("\r\n", "\n").split("\n")
    (line,) = (x for x in lines if "stage" in x)
    assert "stage one (0 done" in line and "stage two (2 done" in line
    assert "stage" not in line.split("\r")[-1] and set(line.split("\r")[-2]) == {" "}


def test_no_line_without_a_terminal(tmp_path, invented, capfd):
    launch("lame", root=tmp_path)
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- processes

TWO = """
    import os, sys
    sys.path[:0] = [{here!r}, {tests!r}]
    import pandas as pd, torch
    from test_runs import Config
    from adaptlab.bench.runs import start_run
    from adaptlab.processes import rank, gather
    cfg = Config(device="cpu")
    run = start_run("lame", cfg, root={root!r})
    frame = run.stage("f", lambda: pd.DataFrame({{"c": [{{"rank": rank()}}]}}))
    assert frame["c"][0] == {{"rank": 0}}, frame
    assert run.stage("t", lambda: {{"w": torch.full((2,), float(rank()))}})["w"].sum() == 0
    again = start_run("lame", cfg, root={root!r}, resume=True)
    assert again.folder == run.folder
    assert again.stage("t", lambda: sys.exit("again"))["w"].sum() == 0
    for bad in (object(), torch.ones(1)):
        try:
            run.stage("bad", lambda: bad)
        except TypeError as error:
            assert "stage 'bad'" in str(error)
        else:
            sys.exit("accepted")
    assert len(set(gather([str(run.folder)]))) == 1
"""


def torchrun(*args, **kw):
    "Two processes on this machine."
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, "--standalone", *args], capture_output=True, text=True,
                          env=env, timeout=240, **kw)


def test_two_processes_share_one_folder_and_one_truth(tmp_path):
    script, root = tmp_path / "two.py", tmp_path / "runs"
    script.write_text(textwrap.dedent(TWO.format(here=HERE, tests=TESTS, root=str(root))))
    out = torchrun(str(script))
    assert out.returncode == 0, out.stderr[-3000:]
    assert len(runs("lame", root)) == 1


def test_torchrun_runs_an_experiment_and_resumes_it(tmp_path, invented):
    out = torchrun("-m", "adaptlab", "run", "lame", "--training.lr", "0.5", "--tracks", "two")
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("two: n is large") == 1, "process 0 alone prints"
    (run,) = runs("lame", tmp_path / "runs")
    head = json.loads((run.folder / "config.json").read_text())
    assert head["config"]["training"]["lr"] == 0.5 and run.finished
    assert load_report(run.folder / "report").environment["processes"] == 2
    shutil.rmtree(run.folder / "report")
    before = (run.folder / "stages" / "two.json").stat().st_mtime_ns
    out = torchrun("-m", "adaptlab", "run", "lame", "--training.lr", "0.5", "--tracks", "two",
                   "--resume")
    assert out.returncode == 0, out.stderr[-3000:]
    assert (run.folder / "stages" / "two.json").stat().st_mtime_ns == before


