"""Adapt-Pruner on SmolLM2-135M: the cut model, and a pruning step, against the plain ways."""

import copy

import pytest
import torch
from clock import in_turn, row

from adaptlab import models, modules
from adaptlab.compression.adapt_pruner import (
    AdaptPruner,
    kv_group_taylor_scores,
    layer_importance,
    mlp_taylor_scores,
)
from adaptlab.decoders import decoder_layers
from adaptlab.evaluate import peak_memory


@pytest.fixture(scope="module")
def base():
    return models.load("smollm2", device="cpu", dtype="float32").model


def token_ids(n, length):
    return torch.randint(0, 40_000, (n, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_cut_model_against_masked_model(base):
    "The same function as a mask: full matrices, zero columns."
    ids, pruned, silent = token_ids(1, 128), copy.deepcopy(base), copy.deepcopy(base)
    found = AdaptPruner(pruned, target_ratio=0.85, steps=1, criterion="magnitude",
                        amplitude=0).run(lambda step: ids)
    for layer, (_, neurons) in zip(decoder_layers(silent), found.kept, strict=True):
        gone = torch.ones(layer.mlp.down_proj.in_features, dtype=torch.bool)
        gone[neurons] = False
        layer.mlp.down_proj.weight[:, gone] = 0
    torch.testing.assert_close(pruned(ids).logits, silent(ids).logits, atol=1e-2, rtol=1e-3)
    times = in_turn(lambda: pruned(ids, use_cache=False), lambda: silent(ids, use_cache=False))
    row("cut to 85 %, forward, against a mask", *times, bound=1.0)


def test_a_step_against_the_official_two_passes(base):
    "Importance and scores from one pass; the official code runs the data through twice."
    ids = token_ids(2, 48)
    model = copy.deepcopy(base)

    def official():
        layer_importance(model, [ids])
        with modules.untouched(model):
            model(input_ids=ids, labels=ids).loss.backward()
            for layer in decoder_layers(model):
                mlp_taylor_scores(layer.mlp)
                kv_group_taylor_scores(layer.self_attn)

    def ours():  # a step that is shortened to almost nothing
        size = sum(p.numel() for p in model.parameters())
        AdaptPruner(model, size - 1).run(lambda step: ids)

    times = in_turn(ours, official, rounds=5)
    row("Adapt-Pruner, one step, against two passes", *times, bound=1.0)
    row("Adapt-Pruner, one step, memory", peak_memory(ours, "cpu") / 2**20,
        peak_memory(official, "cpu") / 2**20, bound=1.0, unit="MiB")
