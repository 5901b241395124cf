"""LoLDU on a GPU: factors, training, merging, and the small experiment."""

import pytest
import torch

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.loldu import SMALL
from adaptlab.lowrank.loldu import LoLDUConfig, get_loldu_model, ldu
from gpu.card import DEVICE, DRY, clock, llama, row, token_ids


def test_factors_of_a_large_weight():
    n = 256 if DRY else 4096
    W = torch.randn(n, n, device=DEVICE)
    row(f"LDU of {n} x {n}", *clock(lambda: ldu(W)))
    perm, L, d, U = ldu(W)
    assert ((L * d) @ U - W[perm]).norm() <= 1e-3 * W.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_merges(dtype):
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 64)
    with torch.no_grad():
        base = model(input_ids=ids).logits.float()
    get_loldu_model(model, LoLDUConfig(rank=32))
    with torch.no_grad():
        start = model(input_ids=ids).logits.float()
    assert (start - base).norm() <= 1e-5 * base.norm()  # the change is exactly zero
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)

    def step():
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()

    row(f"LoLDU, step, {dtype}", *clock(step))
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        after = adapters.merge(model)(input_ids=ids).logits.float()
    assert (before - base).norm() > 1e-3 * base.norm()
    assert (after - before).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * before.norm()


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE)
    assert launch("loldu", cfg, root=tmp_path).claims
