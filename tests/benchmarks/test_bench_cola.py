"""Searches of many questions side by side, on SmolLM2-135M, against each path alone, in one run."""

import time

import pytest
import torch

from adaptlab import models
from adaptlab.testtime.cola import (
    SMALL,
    PathBatch,
    PathExecutor,
    questions,
    random_edit_paths,
    run_path,
)


@pytest.fixture(scope="module")
def work():
    "Eight questions, 24 paths for each, their logits and seconds one by one."
    model, tokenizer = models.load("smollm2", device="cpu")
    sample = questions(SMALL.replace(n_samples=8), tokenizer, 0)
    inputs = [q.prompt_ids + q.answer_ids[:-1] for q in sample]
    jobs = [
        (row, path)
        for row in range(len(sample)) for path in random_edit_paths(30, 24, max_edits=1, seed=row)
    ]  # fmt: skip
    run_path(model, torch.tensor([inputs[0]]), jobs[0][1])  # warm up
    start = time.perf_counter()
    with torch.no_grad():
        alone = [
            run_path(model, torch.tensor([inputs[row]]), path, keep=len(sample[row].answer_ids))[0]
            for row, path in jobs
        ]
    return model, sample, inputs, jobs, alone, time.perf_counter() - start


def test_shared_prefixes_against_each_path_alone(benchmark, work):
    model, sample, inputs, jobs, alone, seconds = work

    def shared():
        runs = [
            PathExecutor(model, torch.tensor([x]), keep=len(q.answer_ids))
            for x, q in zip(inputs, sample, strict=True)
        ]
        return [runs[row](path)[0] for row, path in jobs]

    found = benchmark.pedantic(shared, rounds=2, iterations=1)
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    report(benchmark, seconds, len(jobs), "shared prefixes")


def test_many_searches_together_against_each_path_alone(benchmark, work):
    model, sample, inputs, jobs, alone, seconds = work

    def together():
        batch = PathBatch(model, inputs, [len(q.answer_ids) for q in sample])
        return list(batch(jobs)), batch.cache.layer_calls

    found, calls = benchmark.pedantic(together, rounds=2, iterations=1)
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    saved = sum(len(path) for _, path in jobs) / calls
    benchmark.extra_info["calls saved"] = round(saved, 2)
    report(benchmark, seconds, len(jobs), f"side by side ({saved:.1f} times fewer layer calls)")


def report(benchmark, seconds, paths, what):
    "Print and keep the ratio."
    ratio = seconds / benchmark.stats.stats.median
    benchmark.extra_info["alone / ours"] = round(ratio, 2)
    print(f"\nCoLa, {paths} paths, {what}: {ratio:.1f} times as fast as one by one")
    assert ratio > 1
