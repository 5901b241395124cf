"""Averages on disk and in memory against plain torch: time and memory as ratios in one run."""

import json
import subprocess
import sys
import timeit
from functools import partial
from pathlib import Path

import pytest
import torch
from clock import seconds
from safetensors.torch import load_file, save_file

from adaptlab.checkpoints import average_checkpoints, open_state, save_state
from adaptlab.weights import average, norm

K, TENSORS, ENTRIES = 3, 20, 6_250_000  # 500 MB per float32 checkpoint


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    dtype = getattr(torch, request.param)
    g = torch.Generator().manual_seed(0)
    n = TENSORS * 4 // dtype.itemsize
    for i in range(K):
        state = {f"w{j}": torch.randn(ENTRIES, generator=g).to(dtype) for j in range(n)}
        save_state(state, folder / f"{i}.safetensors")
    return folder


def paths(folder):
    return [folder / f"{i}.safetensors" for i in range(K)]


def streamed(folder):
    (folder / "streamed.safetensors").unlink(missing_ok=True)
    average_checkpoints(paths(folder), folder / "streamed.safetensors")


def plain_mean(states):
    "The running float32 sum of each tensor: the fast plain way."
    mean = {}
    for name, first in states[0].items():
        total = first * (1 / K) if first.dtype == torch.float32 else first.float().mul_(1 / K)
        for state in states[1:]:
            total.add_(state[name], alpha=1 / K)
        mean[name] = total.to(first.dtype)
    return mean


def whole(folder):
    "All models in memory, then the plain mean."
    (folder / "whole.safetensors").unlink(missing_ok=True)
    save_file(plain_mean([load_file(p) for p in paths(folder)]), folder / "whole.safetensors")


def stacked(folder):
    "All models in memory, one `stack(...).mean(0)` per tensor: the usual way."
    states = [load_file(p) for p in paths(folder)]
    mean = {}
    for name, first in states[0].items():
        mean[name] = torch.stack([s[name].float() for s in states]).mean(0).to(first.dtype)
    (folder / "whole.safetensors").unlink(missing_ok=True)
    save_file(mean, folder / "whole.safetensors")


def interleaved(ours, plain, repeats=5):
    "Seconds of two pieces of work, each the fastest of some calls that take turns."
    found: tuple[list, list] = ([], [])
    ours(), plain()  # not counted: caches, files
    for _ in range(repeats):
        for times, work in zip(found, (ours, plain), strict=True):
            times.append(timeit.timeit(work, number=1))
    return min(found[0]), min(found[1])


def test_streamed_against_everything_in_memory(benchmark, folder, capsys):
    "Bound: no more time than loading everything (at a small part of its memory, see below)."
    ours, plain = interleaved(partial(streamed, folder), partial(whole, folder))
    usual = seconds(partial(stacked, folder), 2)
    benchmark.pedantic(streamed, (folder,), rounds=3)
    a, b = open_state(folder / "streamed.safetensors"), load_file(folder / "whole.safetensors")
    assert all(torch.allclose(a[n].float(), b[n].float(), atol=2e-2) for n in b)
    read = sum(p.stat().st_size for p in paths(folder)) / 1e9
    benchmark.extra_info |= {"ratio": ours / plain, "ratio to stack": ours / usual}
    with capsys.disabled():
        print(f"\n{folder.name[:-1]}: streamed {read / ours:.1f} GB/s read; {ours / plain:.2f}x "
              f"the time of loading everything, {ours / usual:.2f}x that of stacking (bound 1.0)")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_memory_against_plain_torch(benchmark, device, dtype, capsys):
    "Bound: 2x plain torch, for `average` and for `norm`, on a GPU, too."
    g = torch.Generator().manual_seed(0)
    entries = ENTRIES if device == "cuda" else ENTRIES // 10
    states = [{f"w{j}": torch.randn(entries, generator=g).to(device, dtype) for j in range(TENSORS)}
              for _ in range(K)]
    wait = torch.cuda.synchronize if device == "cuda" else int

    def plain_norm():
        norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in states[0].values()]
        return float(torch.stack(norms).norm())

    pairs = {
        "average": (lambda: (average(states), wait()), lambda: (plain_mean(states), wait())),
        "norm": (lambda: norm(states[0]), plain_norm),
    }
    assert norm(states[0]) == pytest.approx(plain_norm(), rel=1e-4)
    for name, (ours, plain) in pairs.items():
        a, b = interleaved(ours, plain)
        benchmark.extra_info[name] = a / b
        with capsys.disabled():
            print(f"\n{device} {dtype}: {name} {a / b:.2f}x the time of plain torch (bound 2)")
    benchmark.pedantic(pairs["average"][0], rounds=3)


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
            f"\n{folder.name[:-1]}, {K} checkpoints: peak memory in largest tensors: streamed "
            f"{ours / largest:.2f} (bound {K + 2}), {others}; "
            f"{min(peaks.values()) / ours:.0f} times less"
        )
