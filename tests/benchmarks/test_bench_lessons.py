"""Every lesson from a fresh kernel, offline, on one thread: at most 45 s of CPU time and 4 GiB.

The lessons run two at a time. What counts is the time of the processor, which does not depend on
what else the machine does, as far as that can be said of any time.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clock import row

from adaptlab import site

ROOT = Path(__file__).parents[2]
LESSONS = {p.slug: p.notebook for p in site.lessons_written(ROOT)}
RUN = """
import json, resource, sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient
path = Path(sys.argv[1])
where = {"metadata": {"path": str(path.parent)}}
notebook = nbformat.read(path, 4)
NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"s": used.ru_utime + used.ru_stime, "GiB": used.ru_maxrss / 2**20}))
"""


def run(slug: str, runs: Path) -> dict[str, float] | str:
    "Seconds of the processor and most memory of the kernel; or what went wrong."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
           "HF_HUB_OFFLINE": "1", "ADAPTLAB_RUNS": str(runs / slug)}
    command = [sys.executable, "-c", RUN, str(ROOT / "nbs" / LESSONS[slug])]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr[-3000:]


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory) -> dict[str, dict[str, float] | str]:
    "What was found for the lessons that this session asks about."
    asked = [i.callspec.params["slug"] for i in request.session.items
             if i.path == request.path and hasattr(i, "callspec")]
    runs = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        return dict(zip(asked, pool.map(lambda slug: run(slug, runs), asked), strict=True))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("slug", LESSONS)
def test_lesson(measured, slug: str) -> None:
    found = measured[slug]
    assert isinstance(found, dict), found
    row(f"lesson {slug}, memory", found["GiB"], bound=4.0, unit="GiB")
    row(f"lesson {slug}, CPU time", found["s"], bound=45.0)
