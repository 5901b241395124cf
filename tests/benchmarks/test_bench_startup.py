"""Start-up times, each beside a bare interpreter or `import torch`, in one run."""

import subprocess
import sys
from functools import partial
from pathlib import Path

from clock import in_turn, row

from adaptlab import site

PYTHON, PROGRAM = sys.executable, str(Path(sys.executable).with_name("adaptlab"))
METHODS = [p.module for p in site.lessons_written(Path(__file__).parents[2])]


def start(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_start_up() -> None:
    "`import adaptlab` <= 0.3 s and `adaptlab list` <= 1 s, the bare interpreter's start included."
    ours, listed, bare = in_turn(
        partial(start, PYTHON, "-c", "import adaptlab"), partial(start, PROGRAM, "list"),
        partial(start, PYTHON, "-c", "pass"))
    row("a bare interpreter", bare)
    row("import adaptlab", ours, bound=0.3)
    row("adaptlab list", listed, bound=1.0)


BEYOND = """
import importlib, os, sys, time
import torch
for module in 2 * sys.argv[1:]:  # the first time the files may have to be compiled
    if os.fork() == 0:  # each starts with torch alone
        start = time.perf_counter()
        importlib.import_module(module)
        print(module, time.perf_counter() - start, flush=True)
        os._exit(0)
    os.wait()
"""


def test_a_method_costs_what_it_needs() -> None:
    "Importing any method: torch's own time and 0.3 s."
    said = subprocess.run([PYTHON, "-c", BEYOND, *METHODS], check=True, capture_output=True,
                          text=True).stdout
    took: dict[str, float] = {}
    for module, number in map(str.split, said.splitlines()):
        took[module] = min(float(number), took.get(module, float("inf")))
    assert list(took) == METHODS
    slowest = max(METHODS, key=took.get)
    row(f"import {slowest}, slowest of {len(took)}, beyond torch", took[slowest], bound=0.3)
