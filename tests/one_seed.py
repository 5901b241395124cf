"""Of every experiment: one seed decides nothing, and a run that stopped goes on."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from adaptlab.bench.report import Report
from adaptlab.bench.runs import BaseConfig, launch
from adaptlab.train import Training


def goes_on(
    told: ModuleType,  # the experiment, which draws its figure in `_plot`, after all training
    cfg: BaseConfig,  # one seed, few steps
    root: Path,  # of the runs
    monkeypatch: pytest.MonkeyPatch,
    **launched,  # further arguments of `launch`
) -> Report:  # of the run that went on
    "Stopped at its figure and resumed, it trains nothing again; every verdict is undecided."
    paper = told.__name__.rpartition(".")[2]
    with monkeypatch.context() as broken:
        broken.setattr(told, "_plot", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            launch(paper, cfg, root=root, **launched)
    with monkeypatch.context() as idle:
        idle.setattr(Training, "fit", lambda *a, **k: 1 / 0)
        report = launch(paper, cfg, root=root, resume=True, **launched)
    assert {c.verdict for c in report.claims} == {"not decided at this scale"}
    assert json.loads((report.folder / "report.json").read_text())["paper"] == paper
    return report
