"""The house: which module may import which, and that nobody uses another's private names."""

import ast
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from adaptlab import catalog

ROOT = Path(__file__).parents[1]
CHAPTERS = {p.chapter for p in catalog.papers()}
CORE = set("catalog cache processes modules models recipes data sources shifts train text adapters "
           "adapter_files weights checkpoints evaluate stats moments decoders series".split())
DOORS = {"cli", "site", "__main__"}
# A room and the rooms that it may know.
FLOORS = {
    "core": {"core"},
    "methods": {"core", "methods"},
    "bench": {"core", "bench"},
    "experiments": {"core", "methods", "bench", "experiments"},
    "doors": {"core", "methods", "bench", "experiments", "doors"},
}
# What importing a method must not load: the bench, what draws its figures, data libraries.
HEAVY = ("adaptlab.bench", "pandas", "matplotlib", "datasets", "sklearn")
SKIP = {"_modidx", "__init__"}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {_name(p): p for p in sorted((ROOT / "adaptlab").rglob("*.py")) if p.stem not in SKIP}
METHODS = [m for m in MODULES if m.split(".")[1] in CHAPTERS and m.count(".") == 2]
module = pytest.mark.parametrize("name", MODULES)


def room(name: str) -> str:
    "The room that a module is in."
    first = name.split(".")[1]
    if first in CHAPTERS:
        return "methods"
    if first in ("bench", "experiments"):
        return first
    return "doors" if first in DOORS else "core"


@lru_cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def _absolute(name: str, node: ast.ImportFrom) -> str:
    "The module that `from ... import` names, with the dots of a relative import resolved."
    if not node.level:
        return node.module or ""
    base = name.split(".")[: -node.level]
    return ".".join([*base, *([node.module] if node.module else [])])


@lru_cache
def imports(name: str) -> dict[str, tuple[str, str]]:
    "Local name -> (module, imported name or '') for every import, those inside functions too."
    found = {}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            for a in node.names:
                found[a.asname or a.name] = (a.name, "")
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(name, node)
            for a in node.names:
                whole = f"{source}.{a.name}"
                found[a.asname or a.name] = (whole, "") if whole in MODULES else (source, a.name)
    return found


def arrows(name: str) -> set[str]:
    "The modules of the house that a module imports."
    return {source for source, _ in imports(name).values() if source in MODULES} - {name}


def test_every_room_is_known() -> None:
    "A new module of the core belongs into the list above, and into the catalogue of the design."
    assert {m.split(".")[1] for m in MODULES if room(m) == "core"} == CORE


@module
def test_no_arrow_upwards(name: str) -> None:
    "A room knows only rooms below it."
    wrong = [other for other in arrows(name) if room(other) not in FLOORS[room(name)]]
    assert not wrong, f"{name} ({room(name)}) imports {wrong}"


def test_no_circles() -> None:
    "Within a room, too, one comes after the other."
    left, done = set(MODULES), set()
    while left:
        free = {m for m in left if arrows(m) <= done}
        assert free, f"these import each other: {sorted(left)}"
        left, done = left - free, done | free


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@module
def test_no_private_name_of_another_module(name: str) -> None:
    "Neither `from module import _x` nor `module._x`."
    known = imports(name)
    wrong = [f"{source}.{what}" for source, what in known.values()
             if source.startswith("adaptlab") and _private(what)]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            source, what = known.get(node.value.id, ("", ""))
            if source in MODULES and not what and _private(node.attr):
                wrong.append(f"{source}.{node.attr}")
    assert not wrong, f"{name} uses {sorted(set(wrong))}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_imports_no_bench(name: str) -> None:
    "Not even inside a function: a method never knows its experiment."
    found = {source for source, _ in imports(name).values()}
    wrong = [s for s in found if s.split(".")[0] in ("pandas", "matplotlib")
             or s.startswith(("adaptlab.bench", "adaptlab.experiments"))]
    assert not wrong


LOADED = """
import importlib, json, sys
found = {}
for name in sys.argv[2:]:
    importlib.import_module(name)
    found[name] = [h for h in sys.argv[1].split(",") if h in sys.modules]
print(json.dumps(found))
"""


def test_importing_a_method_loads_what_it_needs() -> None:
    "In a fresh interpreter, one method after the other: nothing of the bench gets loaded."
    names = ["adaptlab", *(m for m in MODULES if room(m) == "core"), *METHODS]
    done = subprocess.run([sys.executable, "-c", LOADED, ",".join(HEAVY), *names],
                          capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    loaded = {name: heavy for name, heavy in found.items() if heavy}
    assert not loaded, f"the first of these loads it, the others find it there: {loaded}"
