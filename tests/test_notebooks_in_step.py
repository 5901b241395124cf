"""Notebooks, package, README and home page say the same: regenerating changes nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adaptlab import catalog, site

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The notebooks and the package, where they may be changed."
    folder = tmp_path_factory.mktemp("copy") / ROOT.name
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "adaptlab"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_exporting_the_notebooks_gives_the_package(copy: Path) -> None:
    "Every module comes from a notebook, and is what its notebook exports now."
    for path in (copy / "adaptlab").rglob("*.py"):
        path.unlink()
    _run(str(BIN / "nbdev_export"), cwd=copy)

    def modules(root: Path) -> dict[str, str]:
        files = (root / "adaptlab").rglob("*.py")
        return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in files}

    ours, fresh = modules(ROOT), modules(copy)
    assert sorted(ours) == sorted(fresh), "a module has no notebook, or a notebook no module"
    differ = [name for name in ours if ours[name] != fresh[name]]
    assert not differ, f"run nbdev_export: {differ} are not what the notebooks say"


def test_cleaning_the_notebooks_changes_nothing(copy: Path) -> None:
    "Notebooks are stored without counters, timestamps and the like."
    _run(str(BIN / "nbdev_clean"), "--fname", str(copy / "nbs"), cwd=copy)
    dirty = [
        path.relative_to(copy).as_posix()
        for path in sorted((copy / "nbs").rglob("*.ipynb"))
        if path.read_bytes() != (ROOT / path.relative_to(copy)).read_bytes()
    ]
    assert not dirty, f"run nbdev_clean: {dirty} are not clean"


def test_readme_and_home_page_are_in_step() -> None:
    "The README, the table of lessons and their pictures are what `make readme` would write."
    late = [p.relative_to(ROOT).as_posix() for p in site.behind(ROOT)]
    assert not late, f"run `make readme`: {late} are behind"


def test_every_picture_belongs_to_a_lesson() -> None:
    "A PNG among the assets is the main figure of a lesson that shows it in Markdown."
    slugs = {p.slug for p in site.lessons_written(ROOT)}
    strays = {p.stem for p in (ROOT / "nbs" / "assets").glob("*.png")} - slugs
    assert not strays, f"{strays}: no lesson has this name"
    for paper in site.lessons_written(ROOT):
        figure = site.main_figure(site.read_notebook(ROOT / "nbs" / paper.notebook))
        text = (ROOT / "nbs" / paper.notebook).read_text(encoding="utf-8")
        assert figure is None or f"../assets/{paper.slug}.png" in text, (
            f"{paper.notebook}: *The picture* must show ../assets/{paper.slug}.png"
        )


@pytest.mark.parametrize("paper", site.lessons_written(ROOT), ids=lambda p: p.slug)
def test_the_first_cell_is_for_colab(paper) -> None:
    "Every lesson begins with the same hidden cell, which follows settings.ini."
    cells = site.read_notebook(ROOT / "nbs" / paper.notebook)["cells"]
    first = next("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert first == site.colab_cell(ROOT), (
        f"{paper.notebook}: its first code cell must be what `adaptlab.site.colab_cell()` gives"
    )


def test_every_lesson_has_its_module_and_every_module_its_lesson() -> None:
    "The catalogue's status, which looks for modules, agrees with the notebooks that are there."
    with_notebook = {p.slug for p in site.lessons_written(ROOT)}
    assert with_notebook == {p.slug for p in catalog.papers() if p.has_lesson}
