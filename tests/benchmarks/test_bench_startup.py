"""Start-up times, each beside a bare interpreter or `import torch`, in one run."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
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
import importlib, sys, time
import torch
start = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - start)
"""


@pytest.mark.parametrize("module", METHODS)
def test_a_method_costs_what_it_needs(module: str) -> None:
    "Importing one method: torch's own time and 0.3 s."
    run = partial(subprocess.run, [PYTHON, "-c", BEYOND, module], check=True, capture_output=True)
    took = min(float(run().stdout) for _ in range(2))  # the first may have to compile the files
    row(f"import {module}, beyond torch", took, bound=0.3)
