"""An invented experiment behind the slug `lame`, in this process and in others."""

import os
import sys
import textwrap
from pathlib import Path

import pytest

INVENTED = """
    from dataclasses import dataclass
    from typing import Literal

    from adaptlab.bench.runs import BaseConfig, bounded, tracks

    @dataclass(frozen=True)
    class Training:
        "How it is trained."
        lr: float = bounded(0.1, above=0)  # step size
        steps: int = 5  # how many

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        "Settings of an invented experiment."
        n: int = bounded(3, low=1)  # how many
        fail: str = ""  # the track that fails
        batch_sizes: tuple[int, ...] = bounded((8, 32), low=1)  # sizes to try
        tracks: tuple[Literal["one", "two"], ...] = ("one", "two")  # parts to run
        training: Training = Training()  # how it is trained

    CALLS = []

    def _track(name):
        def work(cfg, run, report):
            def stage():
                CALLS.append(name)
                if cfg.fail == name:
                    raise ValueError("inside")
                return {"n": cfg.n, "setting": (1, {"lr": cfg.training.lr})}
            found = run.stage(name, stage)
            report.claim(f"{name}: n is large", measured=found["n"], above=2.5, why="n is small")
        return work

    experiment = tracks(one=_track("one"), two=_track("two"))
    SMALL, FULL = Config(device="cpu"), Config(n=100, device="cpu")
"""

FINDER = """
    import importlib.machinery, importlib.util, pathlib, sys

    class Finder:
        "Puts an invented module in the place of one experiment of the course."
        @staticmethod
        def find_spec(name, path=None, target=None):
            here = pathlib.Path(__file__).parent
            if name == "adaptlab.experiments.lame":
                return importlib.util.spec_from_file_location(name, here / "invented.py")
            if name == "adaptlab.experiments":
                return importlib.machinery.ModuleSpec(name, None, is_package=True)

    sys.meta_path.insert(0, Finder)
"""


@pytest.fixture
def invented(tmp_path, monkeypatch):
    "The invented experiment's module; subprocesses find it as well."
    folder = tmp_path / "invented-module"
    folder.mkdir()
    (folder / "invented.py").write_text(textwrap.dedent(INVENTED))
    (folder / "sitecustomize.py").write_text(textwrap.dedent(FINDER))
    paths = [str(folder), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("ADAPTLAB_RUNS", str(tmp_path / "runs"))
    import importlib.util

    name = "adaptlab.experiments.lame"
    spec = importlib.util.spec_from_file_location(name, folder / "invented.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
