"""LT-SFT on a GPU: both phases, deltas in bfloat16, and the small experiment."""

import pytest
import torch

from adaptlab.bench.runs import launch
from adaptlab.experiments.lt_sft import SMALL
from adaptlab.sparse.lt_sft import SparseFineTuner
from gpu.card import DEVICE, clock, llama, peak, row, token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_phases_and_a_delta(dtype):
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 32)
    before = [p.detach().clone() for p in model.parameters()]

    def train_fn(model, steps, grad_hook):
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3,
                                 weight_decay=0.0)
        for _ in range(steps):
            adam.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            grad_hook()
            adam.step()

    sft, found = SparseFineTuner(model, density=0.01), []
    held = peak(lambda: found.append(sft.fit(train_fn, dense_steps=3, sparse_steps=3)))
    row(f"LT-SFT, both phases, {dtype}", gib=held)
    assert sum(map(len, sft.chosen.values())) == sft.k
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with torch.no_grad(), found[0].applied(model):
        changed = model(input_ids=ids, labels=ids).loss
    assert changed < model(input_ids=ids, labels=ids).loss
    row(f"LT-SFT, apply and revert, {dtype}", *clock(
        lambda: (found[0].apply(model), found[0].revert(model)), rounds=3))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_small_experiment(tmp_path):
    assert launch("lt_sft", SMALL.replace(seeds=(0,), device=DEVICE), root=tmp_path).claims
