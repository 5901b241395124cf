"""CoLa on SmolLM2-135M: paths side by side and with shared prefixes, against one by one, in a run.

The same for a GPU stands in `tests/gpu/test_cola.py`; there the cache alone does not pay.
"""

import torch
from clock import in_turn, row

from adaptlab import models
from adaptlab.experiments.cola import SMALL, questions
from adaptlab.testtime.cola import PathBatch, layer_path, random_edit_paths


def test_against_one_by_one():
    "Four questions, 12 paths for each."
    model, tokenizer = models.load("smollm2", device="cpu")
    sample = questions(SMALL.replace(n_samples=4), tokenizer, 0)
    inputs = [q.prompt_ids + q.answer_ids[:-1] for q in sample]
    keep = [len(q.answer_ids) for q in sample]
    jobs = [(i, path) for i in range(4) for path in random_edit_paths(30, 12, max_edits=1, seed=i)]

    def alone():
        found = []
        for i, path in jobs:
            with torch.no_grad(), layer_path(model, path):
                found += model(torch.tensor([inputs[i]]), use_cache=False,
                               logits_to_keep=keep[i]).logits
        return found

    def shared():
        runs = [PathBatch(model, [x], [k]) for x, k in zip(inputs, keep, strict=True)]
        return [runs[i](path)[0] for i, path in jobs]

    def together():
        return list(PathBatch(model, inputs, keep).each(jobs))

    for one, own, side in zip(alone(), shared(), together(), strict=True):
        assert torch.equal(own, one)
        torch.testing.assert_close(side, one, atol=1e-3, rtol=1e-3)
    one, own, side = in_turn(alone, shared, together, rounds=2)
    row(f"CoLa, {len(jobs)} paths, shared prefixes", own, one, bound=1.0)
    row(f"CoLa, {len(jobs)} paths, side by side", side, one, bound=1.0)
