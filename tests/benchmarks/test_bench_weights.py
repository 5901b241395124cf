"""Averaging checkpoints on disk: streamed, against loading whole models, in one run."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from clock import seconds
from safetensors.torch import load_file, save_file

from adaptlab.weights import average_checkpoints, open_state, save_state

K, TENSORS, ENTRIES = 5, 6, 4_000_000  # 96 MB per float32 checkpoint


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    dtype = getattr(torch, request.param)
    g = torch.Generator().manual_seed(0)
    for i in range(K):
        state = {f"w{j}": torch.randn(ENTRIES, generator=g).to(dtype) for j in range(TENSORS)}
        save_state(state, folder / f"{i}.safetensors")
    return folder


def paths(folder):
    return [folder / f"{i}.safetensors" for i in range(K)]


def streamed(folder):
    average_checkpoints(paths(folder), folder / "streamed.safetensors", overwrite=True)


def whole(folder):
    "All models in memory, then the running float32 sum of each tensor: the fast plain way."
    states = [load_file(p) for p in paths(folder)]
    mean = {}
    for name, first in states[0].items():
        total = first.float().mul(1 / K)
        for state in states[1:]:
            total.add_(state[name], alpha=1 / K)
        mean[name] = total.to(first.dtype)
    save_file(mean, folder / "whole.safetensors")


def stacked(folder):
    "All models in memory, one `stack(...).mean(0)` per tensor: the usual way."
    states = [load_file(p) for p in paths(folder)]
    mean = {}
    for name, first in states[0].items():
        mean[name] = torch.stack([s[name].float() for s in states]).mean(0).to(first.dtype)
    save_file(mean, folder / "whole.safetensors")


def test_throughput(benchmark, folder, capsys):
    plain = {f.__name__: seconds(partial(f, folder), 4) for f in (whole, stacked)}
    benchmark.pedantic(streamed, (folder,), rounds=4, warmup_rounds=1)
    ours = seconds(partial(streamed, folder), 4)
    a, b = open_state(folder / "streamed.safetensors"), load_file(folder / "whole.safetensors")
    assert all(torch.allclose(a[n].float(), b[n].float(), atol=1e-2) for n in b)
    read = sum(p.stat().st_size for p in paths(folder)) / 1e9
    benchmark.extra_info["ratio"] = ours / plain["stacked"]
    with capsys.disabled():
        ratios = ", ".join(f"{ours / s:.2f}x the time of {n}" for n, s in plain.items())
        print(f"\n{folder.name[:-1]}: streamed {read / ours:.1f} GB/s read; {ratios}")
    assert ours <= plain["stacked"]


MEMORY = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
import test_bench_weights as bench

def status(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024

before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
getattr(bench, sys.argv[2])(Path(sys.argv[3]))
print(json.dumps(status("VmHWM") - before))
"""


def peak(way, folder):
    "Most resident memory (VmHWM: anonymous and file pages) above the imported libraries, bytes."
    here = str(Path(__file__).parent)
    run = subprocess.run([sys.executable, "-c", MEMORY, here, way, str(folder)],
                         capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory(benchmark, folder, capsys):
    ours = benchmark.pedantic(peak, ("streamed", folder), rounds=1)
    largest = max(s.nbytes for s in open_state(paths(folder)[0]).specs.values())
    peaks = {way: peak(way, folder) for way in ("whole", "stacked")}
    assert ours <= (K + 2) * largest
    benchmark.extra_info["largest tensors"] = ours / largest
    with capsys.disabled():
        others = ", ".join(f"{way} {p / largest:.1f}" for way, p in peaks.items())
        print(
            f"\n{folder.name[:-1]}, {K} checkpoints of {TENSORS} tensors: peak memory in largest "
            f"tensors: streamed {ours / largest:.2f} (bound {K + 2}), {others}; "
            f"{min(peaks.values()) / ours:.0f} times less"
        )
