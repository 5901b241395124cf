"""LQ-LoRA on a GPU: codes, the split, training on packed weights, and the small experiment."""

import pytest
import torch

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.lq_lora import SMALL
from adaptlab.lowrank.lq_lora import (
    LQConfig, QuantConfig, dequantize, get_lq_lora_model, lq_decompose, quantize, storage)
from gpu.card import DEVICE, DRY, clock, llama, peak, row, token_ids


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_large_weight(bits):
    n, config = 256 if DRY else 4096, QuantConfig(bits)
    W = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    row(f"quantise {n} x {n}, {bits} bits", *clock(lambda: quantize(W, config)))
    Q = quantize(W, config)
    row(f"unpack {n} x {n}, {bits} bits", *clock(lambda: Q.dequantize(torch.bfloat16)))
    # another machine may round a quotient across a middle: few codes differ
    same = torch.isclose(Q.dequantize().cpu(), quantize(W.cpu(), config).dequantize(), rtol=1e-4)
    assert same.float().mean() > 0.999
    rounds = [clock(lambda: lq_decompose(W, 64, config, num_iter=2), rounds=3, warm=1)]
    row(f"two rounds of {n} x {n}, rank 64, {bits} bits", *rounds[0])
    lq = lq_decompose(W, 64, config, num_iter=3)
    assert min(lq.errors) < (W - Q.dequantize()).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_on_packed_weights(dtype):
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 64)
    config = LQConfig(rank=8, budget=3.5, num_iter=3,
                      configs=tuple(QuantConfig(b, 8, "bf16", 32, 16) for b in (2, 3, 4)))
    get_lq_lora_model(model, config)
    assert storage(model).bits() <= 3.55
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-3)

    def step():
        adam.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        adam.step()
        return loss.item()

    first = step()
    row(f"LQ-LoRA, step, {dtype}", *clock(step))
    row(f"LQ-LoRA, memory of a step, {dtype}", gib=peak(step))
    assert step() < first
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        after = dequantize(model, dtype)(input_ids=ids).logits.float()
    assert (after - before).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * before.norm()


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE)
    assert launch("lq_lora", cfg, root=tmp_path).claims
