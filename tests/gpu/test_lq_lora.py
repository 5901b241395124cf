"""LQ-LoRA on a GPU: codes, the split, training on packed weights, the experiment, FULL's step."""

from functools import partial

import pytest
import tiny_models
import torch

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.lq_lora import FULL, LAYOUTS, SMALL
from adaptlab.lowrank.lq_lora import (
    LQConfig, LQLoRALinear, QuantConfig, block_linears, dequantize, empirical_fisher,
    get_lq_lora_model, lq_decompose, quantize, quantize_layers, round_factors, storage,
    weighted_svd)
from gpu.card import DEVICE, DRY, clock, full, language_step, llama, row, token_ids


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_cpu(bits):
    W = torch.randn(512, 768, generator=torch.Generator().manual_seed(0))
    ours, cpu = (quantize(w, QuantConfig(bits)).dequantize().cpu() for w in (W.to(DEVICE), W))
    # another machine may round a quotient across a middle: few codes differ
    assert torch.isclose(ours, cpu, rtol=1e-4).float().mean() > 0.999


def test_a_large_weight():
    n, config = 256 if DRY else 4096, LAYOUTS["3.13"]
    W = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    Q = quantize(W, config)
    row(f"quantise {n} x {n}, 3 bits", *clock(lambda: quantize(W, config), rounds=5, warm=1))
    row(f"unpack {n} x {n}, 3 bits", *clock(lambda: Q.dequantize(torch.bfloat16), warm=1))
    two, _ = clock(lambda: lq_decompose(W, 64, config, num_iter=2), rounds=3, warm=1)
    row(f"a round of {n} x {n}, rank 64", two / 2)
    lq = lq_decompose(W, 64, config, num_iter=3)
    assert min(lq.errors) < (W - Q.dequantize()).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_on_packed_weights(dtype):
    model, ids = llama("smollm2", layers=1, dtype=dtype), token_ids(2, 64)
    names = ["q_proj", "down_proj"]
    fisher = empirical_fisher(model, [{"input_ids": r[None], "labels": r[None]} for r in ids],
                              names)
    assert all(f.device.type == DEVICE and f.isfinite().all() for f in fisher.values())
    config = LQConfig(rank=8, budget=3.5, num_iter=2, target_modules=names,
                      configs=tuple(QuantConfig(b, 8, "bf16", 32, 16) for b in (2, 4)))
    get_lq_lora_model(model, config, fisher)
    assert storage(model).bits() <= 3.55
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-3)

    def step():
        adam.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        adam.step()
        return loss.item()

    first = step()
    step()
    assert step() < first and round_factors(model) > 0
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        after = dequantize(model, dtype)(input_ids=ids).logits.float()
    assert (after - before).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * before.norm()


def test_weighted_split_is_that_of_the_cpu():
    g = torch.Generator().manual_seed(0)
    W, fisher = torch.randn(96, 128, generator=g), torch.rand(96, 128, generator=g)
    ours, cpu = ((lambda a, b: (a @ b).cpu())(*weighted_svd(W.to(d), fisher.to(d), 8))
                 for d in (DEVICE, "cpu"))
    torch.testing.assert_close(ours, cpu, rtol=1e-3, atol=1e-4)


def test_full_scale_step():
    "Blocks of Llama-2-7b in 3 bits with factors of rank 64 on all linear layers, as FULL trains."
    layers, batch = 8, FULL.training.batch_size // FULL.training.accumulate
    model = llama("llama2-7b", layers=layers)
    names = list(adapters.match_layers(model, block_linears))
    quantize_layers(model.train(), dict.fromkeys(names, LAYOUTS["3.13"]))
    rank = FULL.tuned_rank if not DRY else 4
    adapters.attach(model, partial(LQLoRALinear, rank=rank), names)
    ids = token_ids(batch, FULL.tuned_window)

    assert FULL.training.precision == "bf16"
    full(f"a step, {layers} of 32 layers, {batch} x {FULL.tuned_window}", model,
         {"input_ids": ids, "labels": ids}, language_step(model, ids, FULL.lrs[0]),
         autocast=torch.bfloat16, rounds=3)


def test_small_experiment(tmp_path):
    "Both tracks; a random Llama of bytes stands in for their models."
    llama = tiny_models.llama(tmp_path / "llama", layers=1)
    cfg = SMALL.replace(
        seeds=(0,), device=DEVICE, model=llama, tuned=llama, targets=r"model.+\.mlp\..+_proj",
        windows=2, fisher=2, rounds=2, tuned_fisher=4, held=8, lrs=(1e-2,),
        training={"steps": 4, "batch_size": 8})
    report = launch("lq_lora", cfg, root=tmp_path, progress=False)
    assert len(report.claims) == 12 and set(report.tables) == {
        "start", "layouts", "predicted", "tune"}
