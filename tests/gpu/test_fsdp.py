"""FSDP 2 by configuration alone, with one process on the card; see `tests/core/fsdp_job.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu import card

SCRIPT = Path(__file__).parents[1] / "core" / "fsdp_job.py"


def job(folder, how):
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "1", str(SCRIPT), str(folder), card.DEVICE, how, "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_trains_as_without(tmp_path):
    whole, sharded = job(tmp_path / "whole", "whole"), job(tmp_path / "sharded", "sharded")
    assert whole["kinds"] == ["Parameter"] and sharded["kinds"] == ["DTensor"]
    for name in ("losses", "trained on", "norms"):
        assert sharded[name] == pytest.approx(whole[name], rel=2e-2)
    assert sharded["trained on"][-1] < sharded["losses"][0]
    assert any(x * 32 % 1 for x in sharded["losses"])  # not in the steps of bfloat16
    for found in (whole, sharded):
        assert max(found["merged"], found["loaded"]) < 3e-2
        assert found["resumed"] == pytest.approx(found["losses"], rel=1e-2)
