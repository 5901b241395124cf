"""NeuroAda on a GPU: the same numbers, a step against LoRA, and the small experiment."""

from functools import partial

import pytest
import torch

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.neuroada import SMALL, wrap_masked
from adaptlab.sparse.neuroada import (
    LINEARS,
    NeuroAda,
    NeuroAdaConfig,
    Selection,
    neuroada_linear,
    select_topk,
)
from gpu.card import DEVICE, DRY, clock, in_turn, llama, row, token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["gather", "materialize"])
def test_layer_agrees_with_float64(dtype, impl):
    torch.manual_seed(0)
    w, x = torch.randn(96, 64).to(dtype), torch.randn(40, 64).to(dtype)
    idx, theta = select_topk(w, 3), torch.randn(96, 3)
    found = []
    for device, kind in (("cpu", torch.float64), (DEVICE, dtype)):
        inputs = x.to(device, kind, copy=True).requires_grad_()
        bypass = theta.to(device, torch.promote_types(kind, torch.float32), copy=True)
        bypass.requires_grad_()
        y = neuroada_linear(inputs, w.to(device, kind), None, idx.to(device), bypass, impl)
        grads = torch.autograd.grad(y.sum(), (inputs, bypass))
        found.append([t.detach().cpu().double() for t in (y, *grads)])
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for exact, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("rule", Selection.__args__)
def test_every_rule_wraps_trains_and_merges(rule):
    model, ids = llama("smollm2", layers=1, dtype=torch.float32), token_ids(2, 16)
    NeuroAda.wrap(model, NeuroAdaConfig(k=2, selection=rule), [
        {"input_ids": ids, "labels": ids}])
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)
    for _ in range(2):
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = adapters.merge(model)(input_ids=ids).logits
    assert (after - before).norm() <= 1e-3 * before.norm()


def prepared(model, ids):
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=0.0)

    def step():
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()

    return step


@pytest.mark.parametrize("k", [1, 20])
def test_step_against_lora(k):
    "Four layers of the shape of Llama-3-8B in bf16: at most 1.1 times LoRA's step."
    ids, steps = token_ids(4, 512), {}
    for name in ("NeuroAda", "LoRA"):
        model = llama("llama3-8b", layers=4)
        if name == "LoRA":
            adapters.attach(model, partial(adapters.LoraAdapter, rank=16, alpha=16), LINEARS)
        else:
            NeuroAda.wrap(model, NeuroAdaConfig(k=k))
        steps[name] = prepared(model, ids)
    ours, lora = in_turn(*steps.values())
    _, gib = clock(steps["NeuroAda"])
    _, rival = clock(steps["LoRA"])
    row(f"NeuroAda k = {k}, step of 4 layers of 8B", ours, gib, reference=lora, bound=1.1)
    if not DRY:
        row(f"NeuroAda k = {k}, memory of that step", None, gib, reference=rival, bound=1.0)


def test_masks_move_with_the_model():
    model = llama("smollm2", layers=1, dtype=torch.float32).cpu()
    wrap_masked(model, NeuroAdaConfig())  # before it is moved
    model, ids = model.to(DEVICE), token_ids(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, tracks=("vision",))
    report = launch("neuroada", cfg, root=tmp_path)
    assert len(report.claims) == 9
