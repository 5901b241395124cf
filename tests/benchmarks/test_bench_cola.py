"""CoLa on SmolLM2-135M: paths side by side and with shared prefixes, against one by one, in a run.

The same for a GPU stands in `tests/gpu/test_cola.py`; there the cache alone does not pay.
"""

import pytest
import torch
from clock import in_turn, row

from adaptlab import models
from adaptlab.experiments.cola import SMALL, questions
from adaptlab.testtime.cola import PathBatch, layer_path, random_edit_paths


@pytest.fixture(scope="module")
def work():
    "Six questions, 12 paths for each."
    model, tokenizer = models.load("smollm2", device="cpu")
    sample = questions(SMALL.replace(n_samples=6), tokenizer, 0)
    inputs = [q.prompt_ids + q.answer_ids[:-1] for q in sample]
    keep = [len(q.answer_ids) for q in sample]
    jobs = [(i, path) for i in range(6) for path in random_edit_paths(30, 12, max_edits=1, seed=i)]

    def alone():
        found = []
        for i, path in jobs:
            with torch.no_grad(), layer_path(model, path):
                found += model(torch.tensor([inputs[i]]), use_cache=False,
                               logits_to_keep=keep[i]).logits
        return found

    return model, inputs, keep, jobs, alone


def test_shared_prefixes(work):
    model, inputs, keep, jobs, alone = work

    def shared():
        runs = [PathBatch(model, [x], [k]) for x, k in zip(inputs, keep, strict=True)]
        return [runs[i](path)[0] for i, path in jobs]

    assert all(torch.equal(a, b) for a, b in zip(shared(), alone(), strict=True))
    row("CoLa, 72 paths, shared prefixes", *in_turn(shared, alone, rounds=2), bound=1.0)


def test_side_by_side(work):
    model, inputs, keep, jobs, alone = work

    def together():
        return list(PathBatch(model, inputs, keep).each(jobs))

    for a, b in zip(together(), alone(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    row("CoLa, 72 paths, side by side", *in_turn(together, alone, rounds=2), bound=1.0)
