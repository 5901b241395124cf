"""Hydra on a GPU: training, merging, and the small experiment."""

import pytest
import torch

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.hydra import SMALL
from adaptlab.lowrank.hydra import HydraConfig, branch_report, inject_hydra
from gpu.card import DEVICE, clock, llama, row, token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_merges(dtype):
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 64)
    inject_hydra(model, HydraConfig(target_modules=("down_proj",), branch_bias=True))
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)

    def step():
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()

    row(f"Hydra, step, {dtype}", *clock(step))
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        assert all(r["norm"] > 0 for r in branch_report(model))
        after = adapters.merge(model)(input_ids=ids).logits.float()
    assert (after - before).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * before.norm()


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, tasks=("turned",))
    assert launch("hydra", cfg, root=tmp_path).claims
