"""How long a lesson is, for the list at the end of `make test`. It fails nobody."""

import json
from pathlib import Path
from typing import NamedTuple

from adaptlab import site

NBS = Path(__file__).parents[1] / "nbs"


class Length(NamedTuple):
    "What a reader has before him."

    words: int  # of the text, without formulas and code
    cells: int
    exported: int  # lines that become the module, empty ones left out
    minutes: int  # estimated: `site.reading_minutes`


def length(path: Path) -> Length:
    "The length of a notebook."
    notebook = site.read_notebook(path)
    code = ("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    lines = (line.strip() for source in code if "export" in site.cell_options(source)[0]
             for line in source.split("\n"))
    exported = sum(bool(line) and not line.startswith("#|") for line in lines)
    return Length(site.words(notebook), len(notebook["cells"]), exported,
                  site.reading_minutes(notebook))


def lessons() -> dict[str, Length]:
    "Every lesson's length, by its path below nbs/."
    papers = site.lessons_written(NBS.parent)
    return {p.notebook: length(NBS / p.notebook) for p in papers}


def as_lines(seconds: dict[str, float]) -> list[str]:
    "The list, with the seconds that each took in this session: beside other tests, not alone."
    try:
        found = lessons()
    except (ValueError, OSError, json.JSONDecodeError) as error:  # a test says it better
        return [f"no list of lengths: {error}"]
    lines = [f"{'lesson':40s} {'words':>6s} {'cells':>6s} {'lines':>6s} {'minutes':>8s} seconds"]
    for path, n in found.items():
        took = seconds.get(f"nbs/{path}")
        lines.append(f"{path:40s} {n.words:6d} {n.cells:6d} {n.exported:6d} {n.minutes:8d} "
                     + ("" if took is None else f"{took:7.1f}"))
    return lines
