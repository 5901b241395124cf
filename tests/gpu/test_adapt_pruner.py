"""Adapt-Pruner on a GPU: the same cuts, files, training in between, SMALL, and FULL's shape."""

import copy

import pytest
import torch

from adaptlab import recipes
from adaptlab.bench.runs import launch
from adaptlab.bench.testbeds import Bed
from adaptlab.compression.adapt_pruner import (
    AdaptPruner,
    adapt_accel,
    layer_importance,
    layer_shapes,
    load_pruned,
    save_pruned,
)
from adaptlab.experiments import adapt_pruner as told
from adaptlab.experiments.adapt_pruner import FULL, SMALL, Texts
from adaptlab.train import fit
from gpu.card import DEVICE, DRY, clock, llama, peak, row, token_ids


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def draw(step):
    return token_ids(4, 32, seed=step)


def test_float32_cuts_as_on_the_cpu():
    model = llama("smollm2", layers=4, dtype=torch.float32)
    there = copy.deepcopy(model).cpu()
    torch.testing.assert_close(layer_importance(model, [draw(1)]),
                               layer_importance(there, [draw(1).cpu()]), atol=1e-5, rtol=1e-4)
    found = AdaptPruner(model, target_ratio=0.9, steps=10, amplitude=0.1).run(draw)
    again = AdaptPruner(there, target_ratio=0.9, steps=10, amplitude=0.1).run(
        lambda step: draw(step).cpu())
    kept = [(set(a[1].tolist()), set(b[1].tolist()))
            for a, b in zip(found.kept, again.kept, strict=True)]
    assert min(len(a & b) / len(a | b) for a, b in kept) > 0.98  # ties by rounding
    assert next(model.parameters()).device.type == DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prune_save_load_and_train(dtype, tmp_path):
    model = llama("smollm2", layers=4, dtype=dtype)
    target = int(0.85 * size_of(model))
    found = AdaptPruner(model, target, steps=10, amplitude=0.1).run(draw)
    assert found.params_after <= target and model.dtype is dtype
    again = load_pruned(save_pruned(model, tmp_path / "m"), DEVICE, dtype)
    with torch.no_grad():
        x = draw(0)
        assert torch.equal(again(x).logits, model(x).logits)

    def train(m, stage):
        fit(m.float(), {"input_ids": x.cpu(), "labels": x.cpu()}, steps=2, batch_size=2,
            device=DEVICE, precision="bf16", progress=False)

    done = adapt_accel(again.requires_grad_(True), int(0.9 * target), 2, train, draw, steps=20)
    assert size_of(again) == done.pruned[-1].params_after
    assert layer_shapes(again) == done.pruned[-1].shapes


def test_small_experiment_with_stand_ins(tmp_path, monkeypatch):
    "SMALL through the same code; a random model in the place of the one that is loaded."
    def bed(cfg, seed):
        x = token_ids(40, 32).cpu()
        return Bed(llama("smollm2", layers=4, dtype=torch.float32), Texts(x[:20]), x[20:30],
                   x[30:], tokenizer=recipes.byte_tokenizer())

    monkeypatch.setattr(told, "prune_bed", bed)
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, n_train=32, stages=(1, 2), remove=0.1,
                        samples=2)
    report = launch("adapt_pruner", cfg, root=tmp_path)
    assert len(report.claims) == 5 and set(report.figures) == {"main"}


def test_full_step_of_the_papers_shape():
    "One step of FULL on Llama-3.1-8B's shape: 512 windows of 64 tokens."
    model = llama("llama3-8b")
    weights = sum(p.nbytes for p in model.parameters()) / 2**30
    windows = 512 if not DRY else 4

    def step():
        size = size_of(model)
        AdaptPruner(model, size - 1, batch_size=16).run(
            lambda k: token_ids(windows, FULL.length, seed=k))

    seconds, _ = clock(step, rounds=1, warm=0)
    row("FULL: one step of pruning at 8B", seconds, peak(step),
        counted=(None, 3 * weights))  # above the model: gradients in float32, the old weights
