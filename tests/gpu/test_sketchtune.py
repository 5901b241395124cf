"""SketchTune on a GPU: a large layer, training in both precisions, FULL's step, the experiment."""

import pytest
import torch
from torch.nn import functional as F

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.sketchtune import FULL, SMALL
from adaptlab.sparse.sketchtune import (
    LLAMA, Sketch, SketchConfig, SketchedLinear, collect_hessians, decode, hessian_factor,
    learn_sketch, load_sketch_state_dict, merge_sketches, output_error, sketch_model,
    sketch_state_dict, sketched)
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, full, in_turn, llama, peak, row, token_ids


def test_sketch_of_a_layer_of_full():
    "The second moments of bf16 activations on a GPU are symmetric up to rounding only."
    model, ids = llama("llama2-7b", layers=1), token_ids(2, 1024)
    names, made = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"), []
    with pytest.warns(UserWarning, match="rank-deficient"):
        H, wide = collect_hessians(model, [{"input_ids": ids}], names).values()
    assert torch.isfinite(hessian_factor(wide)).all()
    W = model.get_submodule(names[0]).weight
    row("sketch of a q_proj of LLaMA-7B, g = 8", *clock(
        lambda: made.append(learn_sketch(W, H, groups_per_row=8)), rounds=1, warm=0))
    assert output_error(W, decode(*made[0]), H) < 0.03
    here = learn_sketch(W[:8].cpu(), H.cpu(), bits=3)
    there = learn_sketch(W[:8], H, bits=3)
    assert (here.codes == there.codes.cpu()).float().mean() > 0.9
    assert abs(output_error(W[:8], decode(*there), H) / output_error(
        W[:8].cpu(), decode(*here), H.cpu()) - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_against_a_gather(dtype):
    o, i, tokens = (64, 96, 8) if DRY else (4096, 4096, 2048)
    layer = random_sketch(o, i, 1)
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
    kind = str(dtype).removeprefix("torch.")
    mine, theirs = in_turn(ours, plain, rounds=5, warm=1)
    row(f"layer of 4096 x 4096, {kind}: step", mine, reference=theirs, against="a gather")
    row(f"layer of 4096 x 4096, {kind}: memory", gib=peak(ours), reference=peak(plain) or None,
        against="a gather", bound=1.0)


def random_sketch(o, i, groups):
    "Tables and codes as large as real ones: learning them would take minutes."
    torch.manual_seed(0)
    lut = 0.02 * torch.randn(o, groups, 16, device=DEVICE)
    return SketchedLinear(Sketch(lut, torch.randint(16, (o, i), device=DEVICE, dtype=torch.uint8)))


def prepared(model, ids, lr=0.0):
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=lr, weight_decay=0.0)

    def step():
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_swaps_and_merges(dtype):
    model, ids = llama("smollm2", layers=1, dtype=dtype), token_ids(4, 64)
    with torch.no_grad():
        base = model(input_ids=ids).logits.float()
    names = ("q_proj", "k_proj", "v_proj")  # the narrow ones: learning is not what is tried here
    sketch_model(model, [{"input_ids": ids}],
                 SketchConfig(bits=3, groups_per_row=2, target_modules=names))
    codes = {n: layer.packed.clone() for n, layer in sketched(model).items()}
    task, step = sketch_state_dict(model), prepared(model, ids, lr=1e-3)
    start = model(input_ids=ids, labels=ids).loss.item()
    for _ in range(3):
        step()
    assert model(input_ids=ids, labels=ids).loss.item() < start
    assert all(torch.equal(layer.packed, codes[n]) for n, layer in sketched(model).items())
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        load_sketch_state_dict(model, task)
        first = model(input_ids=ids, labels=ids)
        after = merge_sketches(model, dtype)(input_ids=ids).logits.float()
    near = 1e-3 if dtype == torch.float32 else 0.1
    assert abs(first.loss.item() - start) <= 1e-3 * start
    assert (before - base).norm() > 1e-3 * base.norm()
    assert (after - first.logits.float()).norm() <= near * after.norm()


def test_step_of_full():
    "A micro-batch of FULL: its step is accumulated, each part decodes every weight anew."
    groups, rows = max(FULL.groups), FULL.language.batch_size // FULL.language.accumulate
    model, ids = llama("llama2-7b", layers=8), token_ids(rows, FULL.max_length)
    for name, layer in adapters.match_layers(model, LLAMA).items():
        model.set_submodule(name, random_sketch(layer.out_features, layer.in_features, groups))
    model.requires_grad_(False)
    for layer in sketched(model).values():
        layer.lut.requires_grad_(True)
    full(f"8 of 32 layers, g = {groups}, {rows} x {FULL.max_length} tokens", model,
         {"input_ids": ids}, prepared(model, ids), rounds=3)


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, tracks=("digits",), images=(64, 32), lrs=(1e-2,),
                        calibration_images=32, training=Training(steps=2, batch_size=16))
    assert launch("sketchtune", cfg, root=tmp_path).claims
