"""The catalogue: complete, consistent, light."""

import subprocess
import sys

import pytest

from adaptlab import catalog


def test_forty_four_papers_in_twelve_chapters():
    assert len(catalog.papers()) == 44
    assert len(catalog.chapters()) == 12
    assert [p.order for p in catalog.papers()] == list(range(1, 45))


def test_chapters_are_contiguous_in_reading_order():
    seen = [p.chapter for p in catalog.papers()]
    runs = [c for i, c in enumerate(seen) if i == 0 or seen[i - 1] != c]
    assert runs == [c.slug for c in catalog.chapters()]


def test_every_entry_is_filled():
    for p in catalog.papers():
        assert p.module == f"adaptlab.{p.chapter}.{p.slug}"
        assert p.title and p.authors and p.short_title and p.first_author and p.venue
        assert 2015 < p.year < 2030
        assert 20 < len(p.summary) <= 160, p.slug
        assert p.official_code is None or p.official_code.startswith("https://")
        assert p.slug not in p.builds_on


def test_where_the_parts_of_a_paper_live():
    lame = catalog.find("lame")
    assert (lame.module, lame.notebook) == ("adaptlab.testtime.lame", "testtime/01_lame.ipynb")
    assert lame.experiment_module == "adaptlab.experiments.lame"
    assert lame.experiment_notebook == "experiments/lame.ipynb"
    everything = [p.experiment_notebook for p in catalog.papers()]
    assert len(set(everything)) == 44


def test_unknown_paper_names_the_nearest():
    with pytest.raises(ValueError, match="lame"):
        catalog.find("lama")
    with pytest.raises(ValueError, match="adaptlab list"):
        catalog.find("zzzzzzzz")


@pytest.mark.parametrize("statement", ["import adaptlab", "from adaptlab import catalog, cli"])
def test_light_imports_load_nothing_heavy(statement):
    heavy = ["torch", "transformers", "datasets", "pandas", "numpy", "matplotlib", "tyro"]
    code = f"import sys; {statement}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
