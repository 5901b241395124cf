"""Of every experiment: a run that stopped goes on, and repeats nothing."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adaptlab.bench.report import Report
from adaptlab.bench.runs import BaseConfig, launch
from adaptlab.train import Training

UNDECIDED = {"not decided at this scale"}  # the verdicts of a run with one seed


def goes_on(
    told: ModuleType,  # the experiment
    cfg: BaseConfig,  # one seed, few steps
    root: Path,  # of the runs
    monkeypatch: pytest.MonkeyPatch,
    stop: str = "_plot",  # its function that fails the first time, after all work
    idle: tuple[Any, str] = (Training, "fit"),  # what must not be called the second time
) -> Report:  # of the run that went on
    "Stopped and resumed: nothing is done again, and the report is whole."
    paper = told.__name__.rpartition(".")[2]
    with monkeypatch.context() as first:
        first.setattr(told, stop, lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            launch(paper, cfg, root=root, progress=False)
    with monkeypatch.context() as second:
        second.setattr(*idle, lambda *a, **k: 1 / 0)
        report = launch(paper, cfg, root=root, resume=True, progress=False)
    assert json.loads((report.folder / "report.json").read_text())["paper"] == paper
    return report
