"""The command line, as a subprocess and from inside."""

import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from adaptlab import catalog, cli
from adaptlab.bench import runs as bench
from adaptlab.bench.runs import BaseConfig


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


def test_show_tells_paper_and_settings(invented):
    out = shell("show", "lame")
    assert out.returncode == 0
    assert "2201.05718" in out.stdout and "setting" in out.stdout
    line = next(x for x in out.stdout.splitlines() if x.startswith("training.lr "))
    assert line.split() == ["training.lr", "0.1", "0.1"]


def test_show_without_an_experiment_tells_the_paper(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "adaptlab.experiments.lame", None)
    assert cli.main(["show", "lame"]) == cli.OK
    out = capsys.readouterr().out
    assert "2201.05718" in out and "this experiment is not written yet" in out


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_file_that_can_not_hold_a_letter_gets_another(encoding):
    "A file on Windows, an ASCII terminal."
    out = subprocess.run([sys.executable, "-m", "adaptlab", "list"], capture_output=True,
                         env={**os.environ, "PYTHONIOENCODING": encoding})
    assert out.returncode == 0, out.stderr
    text = out.stdout.decode(encoding)
    assert all(p.slug in text for p in catalog.papers())
    assert ("\u03b1" in text) == (encoding == "utf-8")


def test_the_plain_locale_is_no_obstacle(invented):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    for command in (["list"], ["show", "lame"], ["run", "lame"], ["run", "lame", "--help"],
                    ["scoreboard"]):
        out = shell(*command, **plain)
        assert out.returncode == 0, out.stderr


def test_list_and_import_load_nothing_heavy():
    code = ("import sys, adaptlab; early = set(sys.modules); from adaptlab import cli; "
            "cli.main(['list']); heavy = {'torch', 'pandas', 'numpy', 'matplotlib', 'tyro'}; "
            "print(sorted(heavy & set(sys.modules)), len(heavy & early))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "[] 0", out.stderr


@pytest.mark.parametrize(
    "args, words",
    [
        (["show", "lema"], "did you mean"),
        (["run", "model_soop"], "model_soups"),
        (["run", "lame", "--scale", "huge"], "invalid choice"),
        (["run", "lame", "--no-such-field", "3"], "no-such-field"),
        (["run", "lame", "--seeds", "x"], "seeds"),
        (["run", "lame", "--seeds", "10", "10"], "10 is named twice"),
        (["run", "lame", "--seeds"], "at least one seed"),
        (["run", "lame", "--batch-sizes"], "at least one batch_size"),
        (["run", "lame", "--batch-sizes", "8", "8"], "8 is named twice"),
        (["run", "lame", "--tracks", "three"], "three"),
        (["run", "lame", "--tracks"], "at least one track"),
        (["run", "lame", "--training.lr", "0"], "training.lr = 0"),
        (["run", "lame", "--training.lr", "nan"], "finite"),
        (["run", "lame", "--training.lr", "inf"], "finite"),
        (["run", "lame", "--device", "gpu"], "device = 'gpu'"),
        (["run", "lame", "--device", "cuda:99"], "cuda:99"),
        (["run", "lame", "--resume"], "no unfinished run"),
        (["run", "--batch-sizes", "32", "lame"],
         "the paper comes first: adaptlab run lame --batch-sizes 32"),
        (["run", "--scale", "full", "--n", "3", "lame"],
         "the paper comes first: adaptlab run lame --scale full --n 3"),
        (["run", "--n", "3"], "the paper comes first: adaptlab run <paper> --n 3"),
        (["run", "--scale", "full", "model_soop"], "did you mean"),
        (["run", "model_soop", "--n", "3"], "did you mean"),
        (["lab", "--port", "8888", "lame"],
         "the paper comes first: adaptlab lab lame --port 8888"),
        (["run"], ""),
        (["frobnicate"], "invalid choice"),
        (["list", "--what"], "unrecognized"),
        (["lab", "no_such_paper"], "no paper is called"),
    ],
)
def test_wrong_use_exits_with_two(args, words, invented, tmp_path):
    out = shell(*args)
    assert out.returncode == cli.WRONG_USE, out.stderr
    assert words in out.stdout + out.stderr
    assert "Traceback" not in out.stderr
    assert not (tmp_path / "runs").exists()


def test_run_takes_every_setting(invented, capsys):
    line = ["run", "lame", "--n", "2", "--seeds", "4", "5", "--training.lr", "1e-3"]
    assert cli.main([*line, "--tracks", "two"]) == cli.OK
    out = capsys.readouterr().out
    assert "does not hold: n is small" in out and "one: n" not in out
    (run,) = bench.runs("lame")
    config = json.loads((run.folder / "config.json").read_text())["config"]
    assert config["n"] == 2 and config["seeds"] == [4, 5] and config["tracks"] == ["two"]
    assert config["training"] == {"lr": 0.001, "steps": 5}


def test_strict_exits_with_one(invented):
    assert cli.main(["run", "lame", "--strict"]) == cli.OK
    assert cli.main(["run", "lame", "--n", "2", "--strict"]) == cli.CLAIM_FAILED
    assert cli.main(["run", "lame", "--n", "2"]) == cli.OK


def test_full_scale_is_the_full_preset(invented):
    cli.main(["run", "--scale", "full", "lame"])
    (run,) = bench.runs("lame")
    assert run.scale == "full"
    assert json.loads((run.folder / "config.json").read_text())["config"]["n"] == 100


def test_a_failing_experiment_exits_with_three_and_is_resumed(invented, tmp_path):
    out = shell("run", "lame", "--fail", "two")
    assert out.returncode == cli.RUN_FAILED
    assert "Traceback" in out.stderr and "ValueError: inside" in out.stderr
    (run,) = bench.runs("lame")
    last = out.stderr.splitlines()[-1]
    assert "the experiment failed" in last and "`--resume`" in last and str(run.folder) in last


def test_another_error_is_not_called_a_failed_experiment(monkeypatch, capsys):
    def broken(args):
        raise RuntimeError("something else")

    monkeypatch.setattr(cli, "list_papers", broken)
    monkeypatch.setattr(sys, "argv", ["adaptlab", "list"])
    with pytest.raises(SystemExit) as stop:
        cli.entry()
    assert stop.value.code == cli.RUN_FAILED
    err = capsys.readouterr().err
    assert "something else" in err and "the experiment failed" not in err


def test_unwritable_root_is_said(invented, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["run", "lame", "--root", str(tmp_path / "file")]) == cli.WRONG_USE
    assert "can't write the run" in capsys.readouterr().err


def test_a_root_that_leads_nowhere_is_said(invented, tmp_path):
    (tmp_path / "link").symlink_to("/mnt/not-mounted/runs")
    out = shell("run", "lame", ADAPTLAB_RUNS=str(tmp_path / "link"))
    assert out.returncode == cli.WRONG_USE and "is a link to /mnt/not-mounted" in out.stderr


@pytest.mark.parametrize("how", ["option", "variable"])
def test_tilde_is_expanded(invented, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    option = ["--root=~/mine"] if how == "option" else []
    place = {"HOME": str(tmp_path / "home"), "ADAPTLAB_RUNS": "~/mine"}
    out = shell("run", "lame", *option, **place)
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "home" / "mine" / "lame").is_dir() and not (tmp_path / "~").exists()
    board = shell("scoreboard", *option, **place)
    assert "one: n is large" in board.stdout


def test_scoreboard_prints_verdicts(invented, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_project", lambda: None)
    assert cli.main(["scoreboard"]) == cli.OK
    assert "no finished run" in capsys.readouterr().out
    cli.main(["run", "lame"])
    assert cli.main(["scoreboard"]) == cli.OK
    assert "2 holds" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["", "{}", "null", "{"])
def test_a_damaged_report_is_named_and_the_others_shown(invented, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "lame"]) == cli.OK
    assert cli.main(["run", "lame", "--n", "7"]) == cli.OK
    older, _ = bench.runs("lame")
    (older.folder / "report" / "report.json").write_text(damage)
    out = shell("scoreboard")
    assert out.returncode == 0 and "Traceback" not in out.stderr
    assert f"{older.folder}/report/report.json is damaged" in out.stderr
    assert "one: n is large" in out.stdout and "two: n is large" in out.stdout


def test_help_lists_the_settings(invented, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "lame", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--n" in out and "--seeds" in out and "how many" in out
    assert "--training.lr" in out and "step size" in out and "--scale" in out


SLOW = """
def experiment(cfg, run):
    run.stage("one", lambda: 1)
    print("ready", flush=True)
    import time
    time.sleep(120)
"""


def test_resume_while_the_run_goes_on_is_refused_at_once(invented, tmp_path):
    with open(tmp_path / "invented-module" / "invented.py", "a") as file:
        file.write(SLOW)
    command = [sys.executable, "-m", "adaptlab", "run", "lame"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        out = shell("run", "lame", "--resume")
        child.send_signal(signal.SIGINT)
    assert out.returncode == cli.WRONG_USE
    assert f"this run is being worked on by process {child.pid} on" in out.stderr
    assert child.returncode == cli.RUN_FAILED, "interrupted"
    (run,) = bench.runs("lame")
    assert json.loads((run.folder / "seconds.json").read_text())["stages"].keys() == {"one"}


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


def test_show_keeps_a_setting_on_one_line(invented, capsys):
    "A prompt with line breaks does not break the table of settings."
    invented.SMALL = invented.SMALL.replace(fail="two lines:\n" * 20)
    assert cli.main(["show", "lame"]) == cli.OK
    lines = capsys.readouterr().out.splitlines()
    template = [line for line in lines if line.startswith("fail ")]
    assert len(template) == 1
    assert all(len(line) <= 120 for line in lines)


def test_a_setting_is_never_taken_for_an_option(invented, monkeypatch):
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
    monkeypatch.setitem(sys.modules, "adaptlab.experiments.lame", fake)
    assert cli.main(["run", "lame", "--r", "7", "--st", "3"]) == cli.OK


def test_a_resumed_run_names_its_own_report(invented, capsys):
    old = bench.start_run("lame", invented.SMALL)
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


def test_options_of_jupyter_need_no_lesson(monkeypatch):
    called = []
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cli.subprocess, "call", lambda command: called.append(command) or 0)
    assert cli.main(["lab", "--port", "8888"]) == cli.OK
    assert called[0][-2:] == ["--port", "8888"]
    assert any(part.endswith("index.ipynb") for part in called[0])


def foreign_project(folder: Path) -> None:
    "Another project that is made with nbdev."
    (folder / "nbs").mkdir()
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name=mylib\n")
    (folder / "_proc").mkdir()
    (folder / "_proc" / "notes.txt").write_text("my notes")


def test_another_project_is_not_taken_for_the_course(tmp_path, monkeypatch, capsys):
    foreign_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    tree = Path(catalog.__file__).resolve().parents[1]
    assert cli._project() == tree  # where this package lies
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "adaptlab" / "catalog.py"))
    assert cli._project() is None
    for command in (["site"], ["lab", "lame"]):
        assert cli.main(command) == cli.WRONG_USE
        assert "lone the repository" in capsys.readouterr().err
    assert (tmp_path / "_proc" / "notes.txt").read_text() == "my notes"


def test_transfer_is_the_methods_own_program(monkeypatch, capsys):
    from adaptlab.arithmetic import finetuning_transfer

    asked = []
    monkeypatch.setattr(finetuning_transfer, "main", lambda argv: asked.append(argv) or 0)
    assert cli.main(["transfer", "old", "tuned", "new", "out", "--scale", "0.5"]) == cli.OK
    assert asked == [["old", "tuned", "new", "out", "--scale", "0.5"]]
    monkeypatch.undo()
    assert cli.main(["transfer", "nowhere", "tuned", "new", "out"]) == cli.WRONG_USE
    assert "nowhere" in capsys.readouterr().err
