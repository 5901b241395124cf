"""Every lesson has the same anatomy, so that a reader who knows one finds everything in the next.

The notebooks are read as they are committed: nothing is run here (`--nbval-lax` does that). Which
module may import which is tested in `test_house.py`.
"""

import ast
import html
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest

from adaptlab import catalog, site
from adaptlab.bench import report as reports

ROOT = Path(__file__).parents[1]
LESSONS = site.lessons_written(ROOT)
EXPERIMENTS = site.experiments_written(ROOT)
HEADINGS = [
    "The picture",
    "The problem",
    "The idea",
    "In a few lines",
    "Build it",
    "Does it hold?",
    "Full scale",
    "In your project",
    "What to watch out for",
    "Exercises",
]
lesson = pytest.mark.parametrize("paper", LESSONS, ids=lambda p: p.slug)
experiment = pytest.mark.parametrize("paper", EXPERIMENTS, ids=lambda p: p.slug)


# ------------------------------------------------------------------ reading a notebook


class Cell:
    "One cell, with the section that it stands in."

    def __init__(self, raw: dict, section: str):
        self.kind, self.section = raw["cell_type"], section
        self.text = "".join(raw["source"])
        self.outputs = raw.get("outputs", [])
        self.directives, self.options, self.code = site.cell_options(self.text)
        self.exported = self.kind == "code" and "export" in self.directives

    @property
    def tree(self) -> ast.Module:
        "The code; lines for IPython (`%`, `!`) left out."
        lines = ["" if re.match(r"\s*[%!]", x) else x for x in self.code.split("\n")]
        return ast.parse("\n".join(lines))

    def names(self) -> set[str]:
        "Every name and attribute that the code mentions."
        nodes = list(ast.walk(self.tree))
        found = {n.id for n in nodes if isinstance(n, ast.Name)}
        return found | {n.attr for n in nodes if isinstance(n, ast.Attribute)}

    def checks(self) -> bool:
        "Whether the cell asserts something, or shows that something is refused."
        return any(
            isinstance(n, (ast.Assert, ast.Try))
            or isinstance(n, ast.Attribute | ast.Name)
            and re.match(r"assert_|raises$", getattr(n, "attr", getattr(n, "id", "")))
            for n in ast.walk(self.tree)
        )


@lru_cache
def cells(paper: catalog.Paper) -> list[Cell]:
    "The cells of a lesson; a cell of text that runs over several sections is taken apart."
    found, section = [], ""
    for raw in site.read_notebook(ROOT / "nbs" / paper.notebook)["cells"]:
        parts = ["".join(raw["source"])]
        if raw["cell_type"] == "markdown":
            parts = [p for p in re.split(r"^(?=## )", parts[0], flags=re.M) if p.strip()]
        for part in parts:
            if raw["cell_type"] == "markdown":
                title = re.match(r"## (.+)", part)
                section = title[1].strip() if title else section
            found.append(Cell({**raw, "source": part}, section))
    return found


def _prose(text: str) -> str:
    "Markdown without its blocks of code."
    return re.sub(r"^(```+|~~~+).*?^\1", "", text, flags=re.M | re.S)


def _headings(paper: catalog.Paper, level: int) -> list[str]:
    pattern = rf"^{'#' * level} (.+?)\s*$"
    texts = [_prose(c.text) for c in cells(paper) if c.kind == "markdown"]
    return [h for text in texts for h in re.findall(pattern, text, re.M)]


def _shown(output: dict) -> str:
    "The text of an output, as a reader sees it."
    if output["output_type"] == "stream":
        return "".join(output["text"])
    if output["output_type"] == "error":
        return "\n".join(output["traceback"])
    data = {k: v if isinstance(v, dict) else "".join(v) for k, v in output["data"].items()}
    parts = [str(data.get("text/plain", "")), str(data.get("text/markdown", ""))]
    parts.append(html.unescape(re.sub(r"<[^>]+>", " ", str(data.get("text/html", "")))))
    if reports.REPORT_MIME in data:
        parts.append(json.dumps(data[reports.REPORT_MIME]))
    return "\n".join(parts)


def _section(paper: catalog.Paper, name: str) -> list[Cell]:
    return [c for c in cells(paper) if c.section == name]


# ------------------------------------------------------------------ sections


@lesson
def test_ten_headings_in_order(paper) -> None:
    "A title, then ten sections, each once."
    assert len(_headings(paper, 1)) == 1 and cells(paper)[0].text.startswith("# ")
    assert _headings(paper, 2) == HEADINGS


@lesson
def test_claim_block(paper) -> None:
    "Before the first section: what paper, by whom, where, what it claims, how long it takes."
    top = [c for c in cells(paper) if c.section == ""]
    text = "\n".join(c.text + "".join(map(_shown, c.outputs)) for c in top)
    missing = [
        what
        for what, pattern in {
            "link to the paper": re.escape(paper.link or ""),
            "link to the official code": re.escape(paper.official_code or "") + "|none",
            "first author": re.escape(paper.first_author),
            "year": str(paper.year),
            "time on a laptop": r"\b(minutes?|seconds|\d+ s)\b",
            "what it builds on": r"(?i)builds on",
        }.items()
        if not re.search(pattern, text)
    ]
    assert not missing


@lesson
def test_the_picture_is_there_at_once(paper) -> None:
    "The committed figure, shown by Markdown before any code."
    section = _section(paper, "The picture")
    kinds = [c.kind for c in section]
    texts = [c.text for c in section[: kinds.index("code") if "code" in kinds else None]]
    assert re.search(rf"!\[[^\]]+\]\(\.\./assets/{paper.slug}\.png\)", "\n".join(texts))
    assert (ROOT / "nbs" / "assets" / f"{paper.slug}.png").is_file()


@lesson
def test_symbols_are_named_before_they_are_used(paper) -> None:
    "The idea has its table (symbol, meaning, name in the code, shape) before the first formula."
    text = "\n".join(c.text for c in _section(paper, "The idea") if c.kind == "markdown")
    table = re.search(
        r"(?i)\|\s*symbol\s*\|\s*meaning\s*\|\s*name in the code\s*\|\s*shape\s*\|", text)
    assert table, "no table of symbols"
    early = re.search(r"\$\$(.*?)\$\$", text[: table.start()], re.S)
    assert not early, f"a formula stands before the table of its symbols: {early[1]:.80}"


def _lines(cell: Cell) -> int:
    "Lines of code, without empty ones and comments."
    return sum(bool(x.strip()) and x.strip()[0] != "#" for x in cell.code.split("\n"))


@lesson
def test_in_a_few_lines(paper) -> None:
    "The whole method, plain: a function of at most 45 lines or so, and nothing that is exported."
    code = [c for c in _section(paper, "In a few lines") if c.kind == "code"]
    assert not any(c.exported for c in code)
    kinds = (ast.FunctionDef, ast.ClassDef)
    plain = [c for c in code if any(isinstance(n, kinds) for n in c.tree.body)]
    assert plain, "no cell defines the method"
    assert max(map(_lines, plain)) <= 45


@lesson
def test_the_experiment_starts_where_it_is_told(paper) -> None:
    "`launch` is called once, in *Does it hold?*, and nothing runs the experiment a second time."
    calls = [
        (c.section, getattr(n.func, "attr", getattr(n.func, "id", "")))
        for c in cells(paper)
        if c.kind == "code"
        for n in ast.walk(c.tree)
        if isinstance(n, ast.Call)
    ]
    assert [section for section, name in calls if name == "launch"] == ["Does it hold?"]
    assert "experiment" not in [name for _, name in calls]


@lesson
def test_full_scale_is_shown_by_code(paper) -> None:
    "The preset is printed by code, and the command is there."
    section = _section(paper, "Full scale")
    text = "\n".join(c.text for c in section)
    assert any(c.kind == "code" and "FULL" in c.names() and not c.exported for c in section)
    assert re.search(rf"adaptlab run {paper.slug}\b.*--scale full", text)


@lesson
def test_in_your_project_is_short(paper) -> None:
    "At most ten lines of code, in a cell or in a block of text."
    section = _section(paper, "In your project")
    blocks = [c.code for c in section if c.kind == "code" and "hide" not in c.directives]
    for cell in section:
        if cell.kind == "markdown":
            blocks += re.findall(r"^```python\n(.*?)^```", cell.text, re.M | re.S)
    sizes = [len([x for x in b.split("\n") if x.strip() and x.strip()[0] != "#"]) for b in blocks]
    assert sizes and min(sizes) <= 10


@lesson
def test_three_exercises_with_folded_solutions(paper) -> None:
    "Solutions are there, and closed."
    section = _section(paper, "Exercises")
    folded = sum(len(re.findall(r"<details\b", c.text)) for c in section if c.kind == "markdown")
    assert folded + sum("code-fold" in c.options for c in section) >= 3


# ------------------------------------------------------------------ code


@lesson
def test_cells_fit_on_a_screen(paper) -> None:
    "At most 40 lines in a cell, 80 where it holds a class."
    long = []
    for cell in (c for c in cells(paper) if c.kind == "code"):
        lines = cell.code.count("\n") + 1
        if lines > (80 if any(isinstance(n, ast.ClassDef) for n in cell.tree.body) else 40):
            long.append((cell.code.split("\n")[0], lines))
    assert not long


def _undocumented(d: site.Definition, where: str = "") -> list[str]:
    "What a definition leaves unsaid."
    name, wrong = where + d.name, []
    if not d.doc:
        wrong.append(f"{name}: no docstring")
    if d.kind in ("function", "class"):
        wrong += [f"{name}({p.name}): no docment" for p in d.parameters if not p.comment]
        wrong += [f"{name}({p.name}): no type" for p in d.parameters if not p.type]
    if d.kind == "function":
        if d.returns is None:
            wrong.append(f"{name}: no return type")
        elif d.returns.type != "None" and not d.returns.comment:
            wrong.append(f"{name}: no docment of what it returns")
    return wrong + [w for m in d.members for w in _undocumented(m, f"{name}.")]


def _documented(module: str) -> None:
    file = ROOT / Path(*module.split(".")).with_suffix(".py")
    _, definitions = site.read_api(file.read_text(encoding="utf-8"))
    wrong = [w for d in definitions for w in _undocumented(d)]
    assert not wrong, "\n".join(wrong)


@lesson
def test_exports_are_documented(paper) -> None:
    "Each parameter, field and return value of every public export has its comment."
    _documented(paper.module)


def _defined(cell: Cell) -> list[ast.AST]:
    "The public functions and classes that a cell exports."
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = cell.tree.body if cell.exported else []
    return [n for n in body if isinstance(n, kinds) and not n.name.startswith("_")]


def _is_record(node: ast.AST) -> bool:
    "Whether it is a class of plain fields, such as a NamedTuple: nothing to check by itself."
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    return isinstance(node, ast.ClassDef) and not methods


@lesson
def test_exports_are_used_at_once(paper) -> None:
    """Of the next two cells that export nothing, one uses a public definition and checks something.

    A record (fields, no methods) need only be used.
    """
    code = [c for c in cells(paper) if c.kind == "code"]
    wrong = []
    for i, cell in enumerate(code):
        for node in _defined(cell):
            later = [c for c in code[i + 1 :] if not c.exported][:2]
            if _is_record(node):
                used = any(node.name in c.names() for c in [*code[i + 1 : i + 4], *later, cell])
            else:
                used = any(node.name in c.names() and c.checks() for c in later)
            if not used:
                wrong.append(f"{node.name} ({cell.section})")
    assert not wrong, f"not used in a cell near by that checks something: {wrong}"


# ------------------------------------------------------------------ experiments


@lesson
def test_every_lesson_has_its_experiment(paper) -> None:
    assert paper in EXPERIMENTS


@experiment
def test_experiment_exports_its_four_names(paper) -> None:
    "`Config`, `SMALL`, `FULL` and `experiment(cfg, run)`, without a fork on the scale."
    file = ROOT / "adaptlab" / "experiments" / f"{paper.slug}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {n.name: n for n in tree.body if hasattr(n, "name")}
    assigned = [n for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))]
    for node in assigned:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                names[target.id] = node
    assert {"Config", "SMALL", "FULL", "experiment"} <= set(names)
    made = names["experiment"]
    if isinstance(made, ast.FunctionDef):
        assert [a.arg for a in made.args.args] == ["cfg", "run"]
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
        assert not {"SMALL", "FULL"} & used, f"{function.name} looks at the scale"


@experiment
def test_experiments_are_documented(paper) -> None:
    "Each setting has its comment, and so have the functions."
    _documented(f"adaptlab.experiments.{paper.slug}")


# ------------------------------------------------------------------ results


@lesson
def test_it_was_executed_and_nothing_failed(paper) -> None:
    "Outputs are there, none of them is an error, and none names a place on somebody's machine."
    outputs = [o for c in cells(paper) for o in c.outputs]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    silent = [c for c in cells(paper) if c.kind == "code" and not c.outputs]
    asks = [c.code for c in silent if re.search(r"^(print|display|report\.\w+)\(", c.code, re.M)]
    assert not asks, "not executed: no output is saved"
    places = r"/(?:home|root|Users|work|tmp)/[\w.-]+|site-packages/"
    found = [m[0] for o in outputs for m in re.finditer(places, _shown(o))]
    assert not found


@lesson
def test_claims_table_is_made_by_code(paper) -> None:
    "A report in *Does it hold?*: this paper's, with verdicts that the rule gives, and reasons."
    outputs = [o for c in _section(paper, "Does it hold?") for o in c.outputs]
    found = [o["data"][reports.REPORT_MIME] for o in outputs
             if reports.REPORT_MIME in o.get("data", {})]
    assert found, "no claims table: report.claims_table() shows it"
    for report in map(reports.check_summary, found):
        assert report["paper"] == paper.slug and report["claims"]
        wordless = [c["text"] for c in report["claims"]
                    if c["verdict"] != reports.HOLDS and not c["why"]]
        assert not wordless, f"what does not hold needs its likeliest reason: {wordless}"


# ------------------------------------------------------------------ numbers in the text

# Where the text speaks of what was measured here. Elsewhere it speaks of the paper.
OWN = ("The picture", "The problem", "In a few lines", "Build it", "Does it hold?")
# A number with decimals, or with a unit that only results have.
RESULT = re.compile(
    r"(?<![\w.,/^_-])(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)"
    r"(?P<unit>\s?(?:%|percent\b|(?:percentage )?points?\b))?(?![\w,]*\d|[\w^/-])"
)
REFERENCE = (
    r"(?:Sec(?:tion|\.)|Eqs?\.|Equation|Tab(?:le|\.)|Fig(?:ure|\.)|App(?:endix|\.)|version|Algorithm)"
)
ELSEWHERE = re.compile(r"(?i)\b(?:paper|authors?|published|official|originally|literature)")


def _claimed_numbers(text: str) -> list[tuple[float, int, bool]]:
    "Numbers that a text gives as results: value, decimals, whether in percent."
    text = _prose(text)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$|`[^`]*`|\]\([^)]*\)|<[^>]+>", " ", text, flags=re.S)
    text = re.sub(rf"{REFERENCE}\s*[\dA-Z][\d.]*", " ", text)
    found = []
    for sentence in re.split(r"(?<=[.!?:;])\s+|\n\n|\n(?=[|*-])", text):
        if ELSEWHERE.search(sentence):
            continue
        for match in RESULT.finditer(sentence):
            number, unit = match["number"].replace(",", ""), match["unit"] or ""
            if "." in number or unit:
                percent = "%" in unit or "percent" in unit
                found.append((float(number), len(number.partition(".")[2]), percent))
    return found


@lru_cache
def _known_numbers(paper: catalog.Paper) -> list[float]:
    "Numbers in the code and in the saved outputs."
    texts = [c.text for c in cells(paper) if c.kind == "code"]
    texts += [_shown(o) for c in cells(paper) for o in c.outputs]
    pattern = r"\d[\d_,]*(?:\.\d+)?(?:[eE][+-]?\d+)?"
    found = set()
    for match in re.finditer(pattern, "\n".join(texts)):
        for text in {match[0].replace("_", "").replace(",", ""), match[0].partition(",")[0]}:
            try:
                found.add(float(text))
            except ValueError:
                continue
    return sorted(found)


def _is_known(value: float, decimals: int, percent: bool, known: list[float]) -> bool:
    "Whether a number of the code or the outputs rounds to this one (40 % may stand as 0.4)."
    wanted = [(value, decimals)] + ([(value / 100, decimals + 2)] if percent else [])
    for number in known:
        for target, places in wanted:
            if abs(number - target) <= 0.5000001 * 10.0**-places:
                return True
        if percent and abs((1 - number) * 100 - value) <= 0.5000001 * 10.0**-decimals:
            return True  # "60 % are kept" where 40 % are taken away
    return False


@lesson
def test_numbers_in_the_text_are_in_the_outputs(paper) -> None:
    """No number in the text contradicts what the notebook saved.

    A heuristic that aims at no false alarm: in the sections that speak of what was measured here,
    a number with decimals, or with "%" or "points", must be (rounded) a number of the code or of
    the saved outputs. Formulas, code, references ("Section 4.2") and sentences about the paper are
    left out; so are whole numbers without a unit, which are mostly sizes and counts. A number that
    is wrong but happens to stand somewhere in the outputs passes: the surest way is to let code
    write the sentence.
    """
    known, wrong = _known_numbers(paper), []
    for cell in cells(paper):
        if cell.kind == "markdown" and cell.section in OWN:
            for value, decimals, percent in _claimed_numbers(cell.text):
                if not _is_known(value, decimals, percent, known):
                    wrong.append(f"{cell.section}: {value:g}{' %' if percent else ''}")
    assert not wrong, f"neither in the code nor in the outputs: {wrong}"


def test_the_heuristic_sees_and_spares() -> None:
    "What counts as a result in a text, and what doesn't."
    seen = _claimed_numbers("The gain is 3.4 points, from 71.25 to 74.6 %, at `0.9` and $x=0.7$.")
    assert seen == [(3.4, 1, False), (71.25, 2, False), (74.6, 1, True)]
    spared = "The paper has 60.3 %. See Section 4.2, 3 seeds, GPT-3.5 and v2.1."
    assert _claimed_numbers(spared) == []
    assert _is_known(40, 0, True, [0.4]) and _is_known(60, 0, True, [0.4])
    assert _is_known(0.93, 2, False, [0.9284]) and not _is_known(0.93, 2, False, [0.9384])


# ------------------------------------------------------------------ the other notebooks

OTHERS = [path for room in site.ROOMS for path in site.room_notebooks(ROOT, room)]
OTHERS += [ROOT / "nbs" / "experiments" / f"{p.slug}.ipynb" for p in EXPERIMENTS]
OTHERS += [ROOT / "nbs" / "chapters" / f"{c.slug}.ipynb" for c in site.chapters_compared(ROOT)]


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_other_notebooks(path: Path) -> None:
    "A title and one line about it; every public name has a docstring; executed without an error."
    notebook = site.read_notebook(path)
    first = notebook["cells"][0]
    title, about, _ = site.split_title("".join(first["source"]))
    assert first["cell_type"] == "markdown" and title and about
    outputs = [o for c in notebook["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    places = r"/(?:home|root|Users|work)/\S+"
    found = [m[0] for o in outputs for m in re.finditer(places, _shown(o))]
    assert not found, "an output names a place on somebody's machine"
    if path.parent.name == "chapters":  # exports nothing
        return
    module = ROOT / "adaptlab" / f"{site.module_name(notebook).replace('.', '/')}.py"
    _, definitions = site.read_api(module.read_text(encoding="utf-8"))
    assert not [d.name for d in definitions if not d.doc]
