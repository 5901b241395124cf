"""NeuroAda on a GPU: the same numbers, steps against LoRA, FULL's step, the small experiment."""

from functools import cache, partial

import pytest
import torch

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.neuroada import FULL, SMALL, wrap_masked
from adaptlab.sparse.neuroada import (
    LINEARS,
    NeuroAda,
    NeuroAdaConfig,
    Selection,
    neuroada_linear,
    select_topk,
)
from adaptlab.train import Training
from gpu.card import DEVICE, full, in_turn, llama, peak, row, token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["gather", "materialize"])
@pytest.mark.parametrize("k", [1, 3])
def test_layer_agrees_with_float64(dtype, impl, k):
    torch.manual_seed(0)
    w, x = torch.randn(96, 64).to(dtype), torch.randn(40, 64).to(dtype)
    g, theta = torch.randn(40, 96).to(dtype), torch.randn(96, k)
    idx, found = select_topk(w, k), []
    for device, kind in (("cpu", torch.float64), (DEVICE, dtype)):
        inputs = x.to(device, kind, copy=True).requires_grad_()
        bypass = theta.to(device, torch.promote_types(kind, torch.float32), copy=True)
        bypass.requires_grad_()
        y = neuroada_linear(inputs, w.to(device, kind), None, idx.to(device), bypass, impl)
        grads = torch.autograd.grad(y, (inputs, bypass), g.to(device, kind))
        found.append([t.detach().cpu().double() for t in (y, *grads)])
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    for exact, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rule_wraps_trains_and_merges(dtype):
    ids = token_ids(2, 16)
    batch = {"input_ids": ids, "labels": ids}
    for rule in Selection.__args__:
        model = llama("smollm2", layers=1, dtype=dtype)
        NeuroAda.wrap(model, NeuroAdaConfig(k=2, selection=rule), [batch])
        step = prepared(model, ids, lr=1e-2)
        step()
        step()
        with torch.no_grad():
            before = model(input_ids=ids).logits.float()
            after = adapters.merge(model)(input_ids=ids).logits.float()
        near = 1e-3 if dtype == torch.float32 else 0.05
        assert (after - before).norm() <= near * before.norm()


def prepared(model, ids, lr=0.0):
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=lr)

    def step():
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()

    return step


@cache
def against_lora(k):
    "Four layers of the shape of Llama-3-8B in bf16: GiB and seconds of a step, ours and LoRA's."
    ids, steps, held = token_ids(4, 512), [], []
    for name in ("NeuroAda", "LoRA"):
        model = llama("llama3-8b", layers=4)
        if name == "LoRA":
            adapters.attach(model, partial(adapters.LoraAdapter, rank=16, alpha=16), LINEARS)
        else:
            NeuroAda.wrap(model, NeuroAdaConfig(k=k))
        steps.append(prepared(model, ids))
        steps[-1]()  # the optimiser's state is there from now on
        held.append(peak(steps[-1]))
    return held, in_turn(*steps, rounds=5, warm=1)


# on a GPU the gradient of many bypasses is a third product as large as the layer's own two
THIRD = pytest.mark.xfail(reason="1.23 times LoRA's step on an H100", raises=AssertionError)


@pytest.mark.parametrize("k", [1, pytest.param(20, marks=THIRD)])
def test_step_against_lora(k):
    ours, lora = against_lora(k)[1]
    row(f"4 layers of Llama-3-8B, k = {k}: step", ours, reference=lora, against="LoRA, r = 16",
        bound=1.1)


@pytest.mark.parametrize("k", [1, 20])
def test_memory_against_lora(k):
    ours, lora = against_lora(k)[0]
    row(f"4 layers of Llama-3-8B, k = {k}: memory", gib=ours, reference=lora or None,
        against="LoRA, r = 16", bound=1.0)


def test_step_of_full():
    model, ids = llama("llama2-7b", layers=8), token_ids(FULL.language.batch_size, FULL.max_length)
    NeuroAda.wrap(model, NeuroAdaConfig(k=FULL.k))
    full(f"8 of 32 layers, k = {FULL.k}, {len(ids)} x {FULL.max_length} tokens", model,
         {"input_ids": ids}, prepared(model, ids), rounds=3)


def test_masks_move_with_the_model():
    model = llama("smollm2", layers=1, dtype=torch.float32).cpu()
    wrap_masked(model, NeuroAdaConfig())  # before it is moved
    model, ids = model.to(DEVICE), token_ids(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, tracks=("vision",), images=(64, 32),
                        vision=Training(steps=2, batch_size=16), lrs=(1e-2,), full_lrs=(1e-3,))
    report = launch("neuroada", cfg, root=tmp_path)
    assert len(report.claims) == 9
