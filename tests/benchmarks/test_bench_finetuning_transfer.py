"""A transfer from disk to disk, against all three models in memory: time, and most memory held.

ADAPTLAB_BENCH_CHECKPOINT_MB sets the size of each of the four checkpoints (three are read).
"""

import os

import pytest
import torch
from clock import in_turn, row
from safetensors.torch import load_file, save_file

from adaptlab.arithmetic.finetuning_transfer import transfer_finetuning
from adaptlab.evaluate import peak_memory

MB = int(os.environ.get("ADAPTLAB_BENCH_CHECKPOINT_MB", "250"))
TENSORS = 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Old base, old fine-tune, new base in bfloat16."
    folder, g = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    entries = MB * 10**6 // 2 // TENSORS
    base = {f"w{i}": torch.randn(entries, generator=g).bfloat16() for i in range(TENSORS)}
    for name, size in (("old", 0.0), ("tuned", 0.01), ("new", 0.1)):
        save_file({n: t + size * torch.randn(entries, generator=g).bfloat16()
                   for n, t in base.items()}, folder / f"{name}.safetensors")
    return folder


def places(files):
    return [files / f"{n}.safetensors" for n in ("old", "tuned", "new")]


def streamed(files):
    transfer_finetuning(*places(files), files / "out.safetensors", overwrite=True)


def whole(files, dtype=torch.float64):
    "As the official script does it: three state dicts, differences in float64."
    base, tuned, new = map(load_file, places(files))
    made = {n: (t.to(dtype) + (tuned[n].to(dtype) - base[n].to(dtype))).bfloat16()
            for n, t in new.items()}
    (files / "whole.safetensors").unlink(missing_ok=True)
    save_file(made, files / "whole.safetensors")


def test_streamed_against_everything_in_memory(files):
    ours, theirs = in_turn(lambda: streamed(files), lambda: whole(files), rounds=3)
    row(f"transfer of {MB} MB against all in memory, float64", ours, theirs, bound=1.0)
    a, b = load_file(files / "out.safetensors"), load_file(files / "whole.safetensors")
    assert all(torch.equal(a[n], t) for n, t in b.items())


def test_memory(files):
    ours, theirs = (peak_memory(lambda work=work: work(files), "cpu") / 2**20
                    for work in (streamed, whole))
    row(f"transfer of {MB} MB, memory, against all in memory", ours, theirs, bound=0.1, unit="MiB")
    row("transfer, memory, whatever the size", ours, bound=64, unit="MiB")
