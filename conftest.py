"""What every test session needs: a quiet, offline, private place to run, and the lessons' lengths.

`pytest --nbval-lax nbs` runs the notebooks cell by cell. A session that did ends with a list: for
every lesson its words, cells, exported lines, estimated minutes, and the seconds that it took here,
beside other tests. No test fails because a machine was busy: the bound on a lesson, 45 s of CPU
time, is checked by `make bench-lessons`.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
_times: dict[str, dict[str, float]] = {}


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    "Settings that tests, kernels and subprocesses inherit."
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = programs + os.pathsep + os.environ.get("PATH", "")
    if not _is_worker(config) and "ADAPTLAB_RUNS" not in os.environ:
        # notebooks must compute their results, not find those of an earlier run
        config.adaptlab_runs = tempfile.mkdtemp(prefix="adaptlab-runs-")
        os.environ["ADAPTLAB_RUNS"] = config.adaptlab_runs


def pytest_unconfigure(config: pytest.Config) -> None:
    "Remove the private runs."
    if hasattr(config, "adaptlab_runs"):
        shutil.rmtree(config.adaptlab_runs, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Notebooks are stored without execution counts; nbval takes a cell without one for not run."
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is not None and cell.get("execution_count", 0) is None:
            cell.execution_count = 1


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    "Add up the time of every cell (set-up of the first one includes the start of the kernel)."
    path, _, cell = report.nodeid.partition("::")
    if path.endswith(".ipynb"):
        cells = _times.setdefault(path, {})
        cells[cell] = cells.get(cell, 0.0) + report.duration


def pytest_terminal_summary(terminalreporter) -> None:
    "The lessons' lengths and seconds, and the slowest cells."
    if not _times:
        return
    import reading  # of tests/

    write = terminalreporter.write_line
    terminalreporter.section("lessons")
    for line in reading.as_lines({path: sum(cells.values()) for path, cells in _times.items()}):
        write(line)
    write("")
    write("slowest cells:")
    cells = [(s, path, cell) for path, found in _times.items() for cell, s in found.items()]
    for seconds, path, cell in sorted(cells, reverse=True)[:8]:
        write(f"{seconds:7.1f} s  {path} {cell}")
