"""What building the site touches, and what it refuses: without a browser, and without Quarto."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from adaptlab import site
from adaptlab.bench import report as bench

ROOT = Path(__file__).parents[2]


class Measured(NamedTuple):
    "Looks like an estimate."

    value: float
    low: float
    high: float


def _notebook(*cells: tuple[str, str, list]) -> str:
    kinds = {"md": "markdown", "code": "code"}
    made = []
    for kind, source, outputs in cells:
        more = {"outputs": outputs, "execution_count": None} if kind == "code" else {}
        made.append({"cell_type": kinds[kind], "metadata": {}, "source": [source], **more})
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    "A course of one lesson, with its experiment."
    root = tmp_path / "course"
    report = bench.Report("lame")
    for low, high in ((1, 3), (-3, -1), (-1, 3)):
        measured = Measured((low + high) / 2, low, high)
        report.claim(f"from {low} to {high}", measured=measured, above=0, why="<few> runs")
    data = report.claims_table()._repr_mimebundle_()
    data = data[0] if isinstance(data, tuple) else data
    claims = {"output_type": "execute_result", "data": data, "metadata": {}}
    figure = {"output_type": "display_data", "data": {"image/png": "aGk="}, "metadata": {}}
    files = {
        "settings.ini": (ROOT / "settings.ini").read_text(),
        "_quarto.yml": (ROOT / "_quarto.yml").read_text(),
        "nbs/index.ipynb": (ROOT / "nbs" / "index.ipynb").read_text(),
        "nbs/testtime/01_lame.ipynb": _notebook(
            ("md", "# LAME\n\n> About\n\n![c](../assets/lame.png)", []),
            ("code", site.colab_cell(ROOT), []),
            ("code", "#| default_exp testtime.lame", []),
            ("code", 'report.show("main")', [figure]),
            ("code", "report.claims_table()", [claims]),
        ),
        "nbs/core/00_catalog.ipynb": _notebook(("md", "# catalog\n", [])),
        "nbs/experiments/lame.ipynb": _notebook(
            ("md", "# LAME, measured", []), ("code", "#| default_exp experiments.lame", [])
        ),
        "adaptlab/testtime/lame.py": '"The method."\ndef lame(x: int): ...\n',
        "adaptlab/experiments/lame.py": (
            '"The experiment."\nclass Config(BaseConfig):\n    seeds: int = 3  # runs\n'
            "SMALL = Config()\nFULL = Config(seeds=5)\n"
        ),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "nbs" / "assets", root / "nbs" / "assets")
    return root


def _fake_quarto(folder: Path, script: str, monkeypatch) -> None:
    "A program called quarto that does what `script` says in the folder it is given."
    folder.mkdir()
    program = folder / "quarto"
    start = f"#!{sys.executable}\nimport pathlib, sys\np = pathlib.Path(sys.argv[2])\n"
    program.write_text(start + script)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


MAKES = """
(p / "_docs").mkdir(exist_ok=True)
(p / "_docs" / "index.html").write_text("<p>new</p>")
"""


def test_a_warning_of_quarto_fails_the_build_and_keeps_the_old_site(
    tree: Path, tmp_path: Path, monkeypatch
) -> None:
    "A broken link is said, and the site that is there stays as it is."
    out = tmp_path / "_docs"
    _fake_quarto(tmp_path / "fine", MAKES, monkeypatch)
    site.build(out, "quarto", tree)
    (out / "index.html").write_text("old")
    says = 'print("\\x1b[33mWARN: Unable to resolve link target: x.qmd\\x1b[39m", file=sys.stderr)'
    _fake_quarto(tmp_path / "warns", MAKES + says, monkeypatch)
    with pytest.raises(ValueError, match="faults:\n  WARN: Unable to resolve link target: x.qmd"):
        site.build(out, "quarto", tree)
    assert (out / "index.html").read_text() == "old"


def test_an_error_of_quarto_is_shown(tree: Path, tmp_path: Path, monkeypatch) -> None:
    _fake_quarto(tmp_path / "fails", 'sys.exit("ERROR: no such theme")', monkeypatch)
    with pytest.raises(ValueError, match="(?s)quarto render failed.*no such theme"):
        site.build(tmp_path / "_docs", "quarto", tree)


@pytest.mark.parametrize("name", ["_docs", "_proc"])
def test_folders_of_somebody_else_are_left_alone(tree: Path, name: str) -> None:
    "Neither the site nor the staged pages replace what was not made by a build."
    theirs = tree / name
    theirs.mkdir()
    (theirs / "notes.txt").write_text("my notes")
    (theirs / "search.json").write_text("[]")
    with pytest.raises(ValueError, match=f"{name} is not empty"):
        site.build(root=tree, engine="smalldocs")
    assert sorted(p.name for p in theirs.iterdir()) == ["notes.txt", "search.json"]


def test_another_nbdev_project_is_not_the_course(tree: Path, tmp_path: Path, monkeypatch) -> None:
    "Its settings.ini names another library: the course is looked for elsewhere."
    other = tmp_path / "mylib"
    (other / "nbs").mkdir(parents=True)
    (other / "settings.ini").write_text("[DEFAULT]\nlib_name = mylib\n")
    with pytest.raises(ValueError, match="no source tree of the course"):
        site.project_root(other)
    monkeypatch.chdir(other)
    assert site.project_root() != other
    assert site.project_root(tree / "nbs") == tree


def test_a_build_can_be_repeated(tree: Path) -> None:
    "The second build replaces what the first has made."
    pytest.importorskip("smalldocs", reason="smalldocs (Python 3.11 or newer) is not installed")
    out = site.build(root=tree, engine="smalldocs")
    (tree / "_proc" / "old.qmd").write_text("# old")
    assert site.build(root=tree, engine="smalldocs") == out
    assert not (tree / "_proc" / "old.qmd").exists() and not (out / "old.html").exists()


def test_verdicts_have_their_colours_everywhere(tree: Path, tmp_path: Path) -> None:
    "On the scoreboard, in the lesson's table and in the bar: holds, does not hold, not decided."
    staged = site.stage(tmp_path / "staged", tree)
    board = (staged / "scoreboard.qmd").read_text(encoding="utf-8")
    assert "Of 3 claims so far, 1 hold, 1 do not hold, and 1 are not decided." in board
    lesson = (staged / "testtime" / "lame.qmd").read_text(encoding="utf-8")
    for text in (board, lesson):
        for mark, verdict in zip(("holds", "fails", "open"), bench.VERDICTS, strict=True):
            assert text.count(f'<span class="verdict {mark}">{verdict}</span>') == 1, verdict
        assert text.count('<div class="reason">&lt;few&gt; runs</div>') == 2, "reasons of two"
    for k in (1, 2, 3):
        assert f'href="testtime/lame.html#claim-{k}"' in board and f'id="claim-{k}"' in lesson


def test_an_experiment_has_a_page_with_its_settings(tree: Path, tmp_path: Path) -> None:
    "Linked from its lesson and back; each setting with its meaning, small and full."
    staged = site.stage(tmp_path / "staged", tree)
    page = (staged / "experiments" / "lame.qmd").read_text(encoding="utf-8")
    assert "](../testtime/lame.qmd)" in page
    assert "<td><code>3</code></td><td><code>5</code></td><td>runs</td>" in page
    lesson = (staged / "testtime" / "lame.qmd").read_text(encoding="utf-8")
    assert "](../experiments/lame.qmd)" in lesson
    assert "google.colab" not in lesson, "the first cell is for Colab, not for readers"


def test_pictures_are_the_main_figures(tree: Path) -> None:
    "`make readme` writes what the lesson's own cell has drawn, and says when it is behind."
    picture = tree / "nbs" / "assets" / "lame.png"
    assert picture in site.behind(tree)
    assert picture in site.bring_in_step(tree)
    assert picture.read_bytes() == b"hi" and site.behind(tree) == []
    whole = json.loads((site.stage(tree / "s", tree) / "notebooks" / "lame.json").read_text())
    assert whole["cells"][0]["attachments"]["lame.png"] == {"image/png": "aGk="}


def test_a_damaged_notebook_is_named(tree: Path) -> None:
    (tree / "nbs" / "testtime" / "01_lame.ipynb").write_text("{")
    with pytest.raises(ValueError, match="01_lame.ipynb is not a notebook"):
        site.stage(tree / "s", tree)


def test_from_a_shell_faults_end_with_exit_code_2(tree: Path) -> None:
    (tree / "_docs").mkdir()
    (tree / "_docs" / "mine.txt").write_text("x")
    command = [sys.executable, "-W", "ignore", "-m", "adaptlab.site", "build"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tree / "nbs", env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "_docs is not empty" in done.stderr, done.stderr
