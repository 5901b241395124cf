"""The two commands: what make does on a fresh machine, on a second run, with a piece missing."""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture()
def tree(tmp_path: Path) -> Path:
    "A source tree with nothing set up."
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _make(tree: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *args], cwd=tree, capture_output=True, text=True, check=False)


def test_help_names_every_command(tree: Path) -> None:
    "`make` alone explains itself."
    for shown in (_make(tree).stdout, _make(tree, "help").stdout):
        for command in ("lab", "test", "site", "bench", "help"):
            assert re.search(rf"^\s+{command}\s", shown, re.M)


@pytest.mark.parametrize("command", ["lab", "test", "bench", "site"])
def test_first_run_sets_up_and_second_does_not(tree: Path, command: str) -> None:
    "Environment, installation and models, in this order, and only once."
    first = _make(tree, "-n", command).stdout
    steps = ["-m venv", "-e '.[dev,lab]'"] + ([] if command == "site" else ["adaptlab fetch"])
    places = [first.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)
    stamps = tree / ".venv" / "stamps"
    stamps.mkdir(parents=True)
    for name in ("venv", "install", "models"):
        (stamps / name).touch()
    second = _make(tree, "-n", command).stdout
    assert not [step for step in steps if step in second]


def test_new_requirements_are_installed(tree: Path) -> None:
    "A change of the pins repeats the installation, not the environment."
    stamps = tree / ".venv" / "stamps"
    stamps.mkdir(parents=True)
    for name in ("venv", "install", "models"):
        (stamps / name).touch()
    later = (stamps / "models").stat().st_mtime + 10
    os.utime(tree / "constraints.txt", (later, later))
    planned = _make(tree, "-n", "test").stdout
    assert "-e '.[dev,lab]'" in planned and "-m venv" not in planned


def test_arguments_are_passed_on(tree: Path) -> None:
    "`make lab ARGS=--no-browser` reaches JupyterLab, at the course's index."
    planned = _make(tree, "-n", "lab", "ARGS=--no-browser").stdout
    assert re.search(r"nbs/index\.ipynb.*--no-browser", planned)


def test_missing_python_is_said_in_one_line(tree: Path) -> None:
    "Which piece is missing, and what to do."
    done = _make(tree, "test", "PYTHON=no-such-python")
    assert done.returncode != 0
    said = [line for line in done.stdout.splitlines() if line.startswith("adaptlab:")]
    assert len(said) == 1 and "no-such-python" in said[0] and "install" in said[0]


def test_old_python_is_refused(tree: Path) -> None:
    "An interpreter that says it is too old."
    fake = tree / "python3.8"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    done = _make(tree, "test", f"PYTHON={fake}")
    assert done.returncode != 0 and "older than Python 3.10" in done.stdout


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    needs = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier) for r in needs}


def test_constraints_are_exact_and_complete() -> None:
    "Every direct requirement of set-up is pinned to one public version; no address anywhere."
    pins = _pins()
    assert all(re.fullmatch(r"==[\w.]+", v) for v in pins.values())
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text and " @ " not in text
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    facts = parser["DEFAULT"]
    for key in ("requirements", "dev_requirements", "lab_requirements"):
        for need in map(Requirement, facts[key].split()):
            pin = pins[canonicalize_name(need.name)]
            assert need.specifier.contains(pin.removeprefix("==")), f"{need} but {pin}"


def test_ci_runs_the_same_commands() -> None:
    "The workflow calls `make lab` and `.ci/run`, which calls `make test`; the site uses Quarto."
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [s.get("run", "") for s in workflow["jobs"]["test"]["steps"]]
    assert any(s.startswith("make lab") for s in steps) and ".ci/run" in steps
    docs = workflow["jobs"]["docs"]["steps"]
    assert any("quarto" in s.get("uses", "") for s in docs)
    assert any("--engine quarto" in s.get("run", "") for s in docs)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.startswith("#!") and "set -euo pipefail" in script and "\nmake test" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=False).returncode == 0


def test_files_that_a_repository_needs() -> None:
    "Licence, changelog, guide for contributors in ten steps."
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "Version 2.0" in licence
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [int(n) for n in re.findall(r"^(\d+)\. \*\*", guide, re.M)] == list(range(1, 11))
    assert (ROOT / "CHANGELOG.md").is_file()
