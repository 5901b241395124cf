"""Shared prefixes against running each path alone, on SmolLM2-135M, in one run."""

import time

import torch

from adaptlab import models
from adaptlab.testtime.cola import PathExecutor, PrefixCache, random_edit_search, run_path


def test_shared_prefixes_against_each_path_alone(benchmark):
    model, tokenizer = models.load("smollm2", device="cpu")
    ids = tokenizer("The capital of France is Paris", return_tensors="pt").input_ids

    class Nothing:
        depth = 30

        def __call__(self, path):
            return 0.0

    paths = list(random_edit_search(Nothing(), float, 24, max_edits=1).evaluated)

    def shared():
        run = PathExecutor(model, ids, PrefixCache(), keep=2)
        return [run(path) for path in paths], run.cache.layer_calls

    shared()  # warm up
    found, calls = benchmark.pedantic(shared, rounds=3, iterations=1)
    start = time.perf_counter()
    with torch.no_grad():
        alone = [run_path(model, ids, path, keep=2) for path in paths]
    seconds = time.perf_counter() - start
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    ratio = seconds / benchmark.stats.stats.median
    benchmark.extra_info["alone / shared"] = round(ratio, 2)
    saved = sum(map(len, paths)) / calls
    print(f"\nCoLa, {len(paths)} paths: {ratio:.1f} times as fast, {saved:.1f} times fewer calls")
    assert ratio > 1
