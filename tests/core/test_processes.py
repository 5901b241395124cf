"""One process does the obvious; three say the same, share out, and fail together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_jobs as jobs
from adaptlab import processes

JOBS = Path(jobs.__file__)


def environment():
    paths = [str(Path(processes.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_one_process():
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    assert processes.together("a") == processes.together(lambda: "a") == "a"
    assert processes.share("abc") == list("abc") == processes.gather(list("abc"))
    assert processes.each(str.upper, "abc") == list("ABC")
    processes.join()
    processes.wait()
    with pytest.raises(KeyError, match="mine"):
        processes.together(lambda: {}["mine"])
    with pytest.raises(ZeroDivisionError):
        processes.each(lambda n: 1 / n, [1, 0])


def test_parts_are_the_whole(monkeypatch):
    for n in (0, 1, 5, 12):
        for world in (1, 2, 3, 7):
            parts = []
            for rank in range(world):
                monkeypatch.setenv("RANK", str(rank))
                monkeypatch.setenv("WORLD_SIZE", str(world))
                parts.append(processes.share(range(n)))
            assert [i for part in parts for i in part] == list(range(n))
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1


def test_torch_is_not_loaded():
    code = ("import sys; from adaptlab import processes as p; "
            "p.together(lambda: p.gather(p.share([p.rank(), p.is_main()]))); p.wait(); "
            "print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True,
                          text=True)
    assert done.stdout.strip() == "False", done.stderr


LEAVES = """
import atexit, sys
from adaptlab import processes as p
class Held:
    def __del__(self): print("taken apart")
held = Held()
atexit.register(print, "registered")
atexit.register(p._part)
real, p._group = p._group, lambda: print("group") or real()
print("done")
p.leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("world, code, lines", [
    (1, 0, ["done", "group", "group", "registered", "taken apart"]),
    (2, 0, ["done", "group", "group", "registered"]),  # asked twice: how many, and to leave
    (1, 3, ["done", "group", "group", "registered", "taken apart"]),
    (2, 3, ["done", "group", "registered"]),  # the others may be waiting: no leave is taken
])  # fmt: skip
def test_one_of_several_processes_ends_before_python_is_taken_apart(world, code, lines):
    env = environment() | {"WORLD_SIZE": str(world), "RANK": str(world - 1)}
    done = subprocess.run([sys.executable, "-c", LEAVES, str(code)], env=env,
                          capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == lines


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    out = tmp_path_factory.mktemp("talk") / "said.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "3", JOBS, "talk", out]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def test_three_processes_know_themselves(said):
    for rank, one in enumerate(said):
        assert one["before"] == one["after"] == (rank, 3)


def test_process_0_speaks_for_all(said):
    for one in said:
        assert one["value"] == "from 0" and one["made"] == "made by 0"


def test_an_error_is_raised_in_every_process(said):
    for rank, one in enumerate(said):
        missing, odd, bad = one["errors"]
        assert missing[0] == "FileNotFoundError" and "a.txt" in missing[1]
        assert "odd" in odd[1] and odd[0] == ("Local" if rank == 0 else "RuntimeError")
        assert bad == ("ValueError", "item 5 is bad")


def test_work_is_shared_and_gathered_in_order(said):
    assert [one["part"] for one in said] == [[0, 1], [2, 3], [4, 5, 6]]
    for one in said:
        assert one["all"] == [0, 2, 4, 6, 8, 10, 12]
        assert one["few"] == ["one"] and one["each"] == ["0", "1", "2", "3"]
