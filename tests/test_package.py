"""`pip install` into a fresh environment that has the required dependencies and nothing else.

Downloading torch for every test run would take longer than all lessons. So the environment is made
for real, the wheel is built and installed for real, and the required dependencies, with all that
they require, are linked in from the environment of the tests. What only the extras bring is truly
absent. With ADAPTLAB_TEST_INSTALL=1, pip installs everything from its index instead.
"""

import importlib.metadata as metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(1800)


def _run(*command: str | Path, **kw) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=env, cwd="/", **kw
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel, built from what a source archive would hold."
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "adaptlab", source / "adaptlab", ignore=skip)
    for name in ("setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", out, source)
    return next(out.glob("*.whl"))


def _required(wheel: Path) -> dict[str, metadata.Distribution]:
    "The distributions that the wheel requires, directly or not, without any extra."
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    lines = [line.partition(": ") for line in text.split("\n")]
    ours = (Requirement(value) for key, _, value in lines if key == "Requires-Dist")
    todo, found, seen = [r for r in ours if _applies(r, {""})], {}, set()
    while todo:
        need = todo.pop()
        key = (canonicalize_name(need.name), frozenset(need.extras))
        if key not in seen:
            seen.add(key)
            found[key[0]] = dist = metadata.distribution(need.name)
            wanted = (Requirement(r) for r in dist.requires or [])
            todo += [r for r in wanted if _applies(r, {"", *need.extras})]
    return found


def _applies(need: Requirement, extras: set[str]) -> bool:
    return need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory) -> Path:
    "The interpreter of a fresh environment in which the wheel is installed."
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    _run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    if os.environ.get("ADAPTLAB_TEST_INSTALL"):
        constraints = ROOT / "constraints.txt"
        _run(*pip, "--python", python, "install", "-c", constraints, wheel)
        return python
    packages = Path(_run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    for dist in _required(wheel).values():
        for top in {f.parts[0] for f in dist.files or [] if f.parts[0] != ".."}:
            source = Path(dist.locate_file(top))
            if source.exists() and not (packages / top).exists() and top != "__pycache__":
                (packages / top).symlink_to(source)
    _run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


def test_requirements_fit_together(python: Path) -> None:
    "pip finds nothing missing and no versions that contradict each other."
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    assert "No broken requirements" in _run(*pip, "--python", python, "check")


def test_import_is_light_and_needs_no_extra(python: Path) -> None:
    "`import adaptlab` loads nothing heavy, and no tool of the developers is there."
    code = """
import importlib.util, sys
import adaptlab
assert "site-packages" in adaptlab.__file__, adaptlab.__file__
heavy = {"torch", "transformers", "numpy", "pandas", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
tools = "nbdev pytest ruff playwright smalldocs jupyterlab peft nbval".split()
here = [t for t in tools if importlib.util.find_spec(t)]
assert not here, here
"""
    _run(python, "-I", "-c", code)


def test_every_module_imports_without_the_extras(python: Path) -> None:
    "No module of the package needs what only the extras bring."
    code = """
import importlib, pkgutil
import adaptlab
for module in pkgutil.walk_packages(adaptlab.__path__, "adaptlab."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    _run(python, "-I", "-c", code)


def test_the_program_works_from_the_wheel(python: Path) -> None:
    "`adaptlab` is installed, finds its data, and lists all papers."
    listed = _run(python.parent / "adaptlab", "list")
    assert listed.count("\n  ") == 44
    assert "Parameter-free" in _run(python.parent / "adaptlab", "show", "lame")
