"""What every test session needs: a quiet, offline, private place to run, and the notebooks' times.

`pytest --nbval-lax nbs` runs the notebooks cell by cell. At the end of a session that did, the
seconds of every notebook and the slowest cells are printed, and the bound is enforced: a lesson may
take 60 s on two cores, from a fresh kernel. Notebooks usually run two at a time with one thread
each, beside other tests; one that took longer than the bound like this is run once more, alone and
with all cores, and fails the session only if that takes too long as well.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

BOUND = 60.0  # seconds for one notebook, on two cores
ROOT = Path(__file__).parent
_times: dict[str, dict[str, float]] = {}
_late: list[tuple[str, float, float]] = []


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


def _alone(notebook: str) -> tuple[float, bool]:
    "Seconds of a notebook that has the machine's cores to itself, and whether it passed."
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--nbval-lax", notebook]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**env, "ADAPTLAB_ALONE": "1"}, capture_output=True, check=False
    )
    return time.perf_counter() - start, done.returncode == 0


def pytest_sessionfinish(session: pytest.Session) -> None:
    "Give late notebooks a second run under the conditions of the bound."
    if _is_worker(session.config) or os.environ.get("ADAPTLAB_ALONE"):
        return
    for notebook, cells in _times.items():
        took = sum(cells.values())
        if took > BOUND:
            seconds, passed = _alone(notebook)
            _late.append((notebook, took, seconds))
            if seconds > BOUND or not passed:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
    "Seconds per notebook, the slowest cells, and the late ones."
    if not _times or os.environ.get("ADAPTLAB_ALONE"):
        return
    write = terminalreporter.write_line
    terminalreporter.section("seconds per notebook")
    for path, cells in sorted(_times.items(), key=lambda kv: -sum(kv[1].values())):
        write(f"{sum(cells.values()):7.1f}  {path}")
    write("")
    write("slowest cells:")
    cells = [(s, path, cell) for path, found in _times.items() for cell, s in found.items()]
    for seconds, path, cell in sorted(cells, reverse=True)[:8]:
        write(f"{seconds:7.1f}  {path} {cell}")
    for path, took, alone in _late:
        verdict = "TOO SLOW" if alone > BOUND else "fine"
        write(
            f"{path}: {took:.0f} s beside other tests, {alone:.0f} s alone "
            f"(bound: {BOUND:.0f} s): {verdict}",
            red=alone > BOUND,
        )
