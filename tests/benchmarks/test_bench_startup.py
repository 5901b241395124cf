"""Start-up times, each against a bare interpreter and against `import torch`, in one run."""

import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from clock import seconds

PYTHON, PROGRAM = sys.executable, str(Path(sys.executable).with_name("adaptlab"))
BARE, TORCH = [PYTHON, "-c", "pass"], [PYTHON, "-c", "import torch"]


def start(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "command, bound",
    [([PYTHON, "-c", "import adaptlab"], 0.3), ([PROGRAM, "list"], 1.0)],
    ids=["import adaptlab", "adaptlab list"],
)
def test_start_up(benchmark, command, bound, capsys):
    benchmark.pedantic(start, (command,), rounds=5, warmup_rounds=1)
    ours, bare, torch = (
        seconds(partial(start, c), 7, statistics.median) for c in (command, BARE, TORCH)
    )
    benchmark.extra_info |= {"ratio": ours / torch, "more than a bare interpreter": ours - bare}
    with capsys.disabled():
        print(f"\n{ours:.3f} s; a bare interpreter {bare:.3f} s, import torch {torch:.2f} s: "
              f"ratio {ours / torch:.2f}")
    assert ours < bound
