"""SketchTune on a GPU: a large layer, training in both precisions, and the small experiment."""

import copy

import pytest
import torch
from torch.nn import functional as F

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.sketchtune import SMALL
from adaptlab.sparse.sketchtune import (
    SketchConfig, SketchedLinear, decode, learn_sketch, merge_sketches, output_error, sketch_model,
    sketched)
from gpu.card import DEVICE, DRY, clock, in_turn, llama, peak, row, token_ids


def test_sketch_of_a_large_weight():
    o, i = (64, 96) if DRY else (4096, 4096)
    torch.manual_seed(0)
    W, x = torch.randn(o, i, device=DEVICE), torch.randn(2 * i, i, device=DEVICE)
    H = (x * torch.linspace(0.1, 2, i, device=DEVICE)).T @ (
        x * torch.linspace(0.1, 2, i, device=DEVICE))
    row(f"sketch of {o} x {i}", *clock(lambda: learn_sketch(W, H), rounds=2, warm=1))
    made = learn_sketch(W, H)
    assert output_error(W, decode(*made), H) < 0.03
    here = learn_sketch(W[:8].cpu(), H.cpu(), bits=3)
    there = learn_sketch(W[:8], H, bits=3)
    assert (here.codes == there.codes.cpu()).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_against_a_gather(dtype):
    o, i, tokens = (64, 96, 8) if DRY else (4096, 4096, 2048)
    torch.manual_seed(0)
    layer = SketchedLinear(learn_sketch(torch.randn(o, i, device=DEVICE)))
    x = torch.randn(tokens, i, device=DEVICE, dtype=dtype, requires_grad=True)

    def ours():
        layer(x).float().square().mean().backward()

    def plain():
        F.linear(x, layer.weight.to(dtype)).float().square().mean().backward()

    grads = []
    for step in (ours, plain):
        layer.lut.grad = x.grad = None
        step()
        grads.append((layer.lut.grad, x.grad.float()))
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * b.norm()
    mine, theirs = in_turn(ours, plain)
    row(f"sketched layer against a gather, step, {dtype}", mine, reference=theirs)
    row("the same, memory", None, peak(ours), reference=peak(plain), bound=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_merges(dtype):
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(4, 256)
    with torch.no_grad():
        base = model(input_ids=ids).logits.float()
    sketch_model(model, [{"input_ids": ids}], SketchConfig(groups_per_row=2))
    codes = {n: layer.packed.clone() for n, layer in sketched(model).items()}
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-3, weight_decay=0.0)

    def step():
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()

    start = model(input_ids=ids, labels=ids).loss.item()
    row(f"SketchTune, step, {dtype}", *clock(step))
    assert model(input_ids=ids, labels=ids).loss.item() < start
    assert all(torch.equal(layer.packed, codes[n]) for n, layer in sketched(model).items())
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        after = merge_sketches(model, dtype)(input_ids=ids).logits.float()
    assert (before - base).norm() > 1e-3 * base.norm()
    assert (after - before).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * before.norm()


def test_full_models_shape():
    "One block of LLaMA-7B: sketched on 2,048 tokens, then a step in bf16."
    model, ids = llama("llama2-7b", layers=1), token_ids(2, 1024)
    row("sketch a block of LLaMA-7B, g = 8", *clock(lambda: sketch_model(
        copy.deepcopy(model), [{"input_ids": ids}], SketchConfig(groups_per_row=8)),
        rounds=1, warm=0))
    sketch_model(model, None, SketchConfig(groups_per_row=8))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()

    row("FULL, a block and the head, forward and backward", *clock(step))
    assert all(torch.isfinite(p.grad).all() for p in adapters.trainable_parameters(model))


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE)
    assert launch("sketchtune", cfg, root=tmp_path).claims
