"""The command line, as a subprocess and from inside."""

import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass

import pytest

from adaptlab import catalog, cli, experiment
from adaptlab.experiment import BaseConfig, bounded


def shell(*args: str, **env: str) -> subprocess.CompletedProcess:
    "Run `python -m adaptlab ...`."
    command = [sys.executable, "-m", "adaptlab", *args]
    environment = {**os.environ, **env}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_list_names_all_papers():
    out = shell("list")
    assert out.returncode == 0
    assert all(p.slug in out.stdout for p in catalog.papers())
    planned = sum(not p.has_lesson for p in catalog.papers())
    assert out.stdout.count("(lesson planned)") == planned


def test_list_survives_a_closed_pipe():
    line = f"set -o pipefail; {sys.executable} -m adaptlab list | head -n 1"
    out = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert out.returncode == 0 and "Errno" not in out.stderr


def test_show_tells_paper_and_settings():
    out = shell("show", "lame")
    assert out.returncode == 0
    assert "2201.05718" in out.stdout and "setting" in out.stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (["show", "lema"], "did you mean"),
        (["run", "model_soop"], "model_soups"),
        (["run", "lame", "--scale", "huge"], "invalid choice"),
        (["run", "lame", "--no-such-field", "3"], "no-such-field"),
        (["run", "lame", "--seeds", "x"], "seeds"),
        (["run"], ""),
        (["frobnicate"], "invalid choice"),
        (["list", "--what"], "unrecognized"),
        (["lab", "no_such_paper"], "no paper is called"),
    ],
)
def test_wrong_use_exits_with_two(args, words, tmp_path):
    out = shell(*args, ADAPTLAB_RUNS=str(tmp_path))
    assert out.returncode == cli.WRONG_USE, out.stderr
    assert words in out.stdout + out.stderr
    assert "Traceback" not in out.stderr
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    "Settings of a fake lesson."

    n: int = bounded(3, low=1)  # how many
    fail: bool = False  # whether to fail


@pytest.fixture
def lesson(monkeypatch, tmp_path):
    "A fake lesson behind the slug `lame`."

    def run_it(cfg, run):
        return _experiment(cfg, run)

    run_it.__code__ = run_it.__code__.replace(co_name="experiment")

    def _experiment(cfg, run):
        if cfg.fail:
            raise ValueError("inside")
        report = run.report(cfg)
        report.claim("n is three", paper="3", measured=float(cfg.n), holds=cfg.n == 3, reason="no")
        return report

    fake = types.SimpleNamespace(experiment=run_it, SMALL=Config(), FULL=Config(n=100))
    monkeypatch.setattr(experiment, "lesson_module", lambda paper: fake)
    monkeypatch.setenv("ADAPTLAB_RUNS", str(tmp_path))
    return tmp_path


def test_run_takes_every_setting(lesson, capsys):
    assert cli.main(["run", "lame", "--n", "7", "--seeds", "4", "5"]) == cli.OK
    assert "does not hold" in capsys.readouterr().out
    (run,) = experiment.runs("lame", lesson)
    config = json.loads((run.folder / "config.json").read_text())["config"]
    assert config["n"] == 7 and config["seeds"] == [4, 5]


def test_strict_exits_with_one(lesson):
    assert cli.main(["run", "lame", "--strict"]) == cli.OK
    assert cli.main(["run", "lame", "--n", "7", "--strict"]) == cli.CLAIM_FAILED


def test_full_scale_is_the_full_preset(lesson):
    cli.main(["run", "lame", "--scale", "full"])
    (run,) = experiment.runs("lame", lesson)
    assert run.scale == "full"
    assert json.loads((run.folder / "config.json").read_text())["config"]["n"] == 100


def test_out_of_range_is_wrong_use(lesson, capsys):
    with pytest.raises(SystemExit) as stop:
        sys.exit(cli.main(["run", "lame", "--n", "0"]))
    assert stop.value.code == cli.WRONG_USE
    assert "n = 0" in "".join(capsys.readouterr())
    assert not experiment.runs("lame", lesson)


def test_a_failing_experiment_exits_with_three(lesson, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adaptlab", "run", "lame", "--fail"])
    with pytest.raises(SystemExit) as stop:
        cli.entry()
    assert stop.value.code == cli.RUN_FAILED
    assert "inside" in capsys.readouterr().err


def test_unwritable_root_is_said(lesson, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["run", "lame", "--root", str(tmp_path / "file")]) == cli.WRONG_USE
    assert "can't write the run" in capsys.readouterr().err


def test_scoreboard_prints_verdicts(lesson, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_project", lambda: None)
    assert cli.main(["scoreboard"]) == cli.OK
    assert "no finished run" in capsys.readouterr().out
    cli.main(["run", "lame"])
    assert cli.main(["scoreboard"]) == cli.OK
    assert "1 holds" in capsys.readouterr().out


def test_help_lists_the_settings(lesson, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "lame", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--n" in out and "--seeds" in out and "how many" in out


def test_fetch_fills_the_cache_that_load_reads(tmp_path):
    "What was fetched is found again, where no package can be had."
    place = {"ADAPTLAB_CACHE": str(tmp_path / "cache")}
    out = shell("fetch", "digits", "sunspots", **place)
    assert out.returncode == 0, out.stderr
    assert "digits: 1,797 rows, in the cache" in out.stdout
    code = "from adaptlab import data; print(len(data.load('digits')), len(data.load('sunspots')))"
    offline = {**os.environ, **place, "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    later = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert later.stdout.split() == ["1797", "309"], later.stderr


def test_show_keeps_a_setting_on_one_line():
    "A prompt with line breaks does not break the table of settings."
    lines = shell("show", "corda").stdout.splitlines()
    template = [line for line in lines if line.startswith("template ")]
    assert len(template) == 1
    assert all(len(line) <= 120 for line in lines)


def test_a_setting_is_never_taken_for_an_option(lesson, monkeypatch):
    "`--r` is the lesson's, not short for --root or --resume."
    @dataclass(frozen=True, kw_only=True)
    class Short(BaseConfig):
        "Settings."

        r: int = 1  # a rank
        st: int = 1  # a step

    def run_it(cfg, run):
        assert (cfg.r, cfg.st) == (7, 3)
        return run.report(cfg)

    fake = types.SimpleNamespace(experiment=run_it, SMALL=Short(), FULL=Short())
    monkeypatch.setattr(experiment, "lesson_module", lambda paper: fake)
    assert cli.main(["run", "lame", "--r", "7", "--st", "3"]) == cli.OK


def test_a_resumed_run_names_its_own_report(lesson, capsys):
    old = experiment.start_run("lame", Config(), root=lesson)
    assert cli.main(["run", "lame", "--n", "4"]) == cli.OK  # a newer one
    capsys.readouterr()
    assert cli.main(["run", "lame", "--resume"]) == cli.OK
    assert str(old.folder / "report") in capsys.readouterr().out


def test_lab_is_that_of_this_environment(monkeypatch):
    "Called by its path from an environment that is not activated, so not on PATH."
    called = []
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cli.subprocess, "call", lambda command: called.append(command) or 0)
    assert cli.main(["lab", "lame", "--no-browser"]) == cli.OK
    assert called[0][:3] == [sys.executable, "-m", "jupyterlab"]
    assert called[0][-1] == "--no-browser" and any("_lame.ipynb" in part for part in called[0])
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["lab"]) == cli.WRONG_USE and len(called) == 1
