"""A script by two processes and by one: what it prints must agree."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def in_two(script: str, folder: Path) -> str:
    "What process 0 of two prints."
    file = Path(folder, "train.py")
    file.write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(file)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers(text: str) -> dict[str, torch.Tensor]:
    "Lines such as `logits 1.0 2.0`, by their first word."
    lines = (line.split() for line in text.splitlines())
    return {w[0]: torch.tensor([float(v) for v in w[1:]]) for w in lines if len(w) > 1}


def assert_alike(script: str, folder: Path, capsys) -> dict[str, torch.Tensor]:
    "Run it twice, compare every line of numbers, and return them."
    two = numbers(in_two(script, folder))
    exec(compile(script, "train.py", "exec"), {"__name__": "__main__"})
    one = numbers(capsys.readouterr().out)
    assert one and one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name:
                                   f"{n}: {m}")
    return one
