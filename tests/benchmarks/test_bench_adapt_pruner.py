"""Adapt-Pruner on SmolLM2-135M: the pruned model, and a pruning step, against the plain ways."""

import copy

import torch
from clock import seconds

from adaptlab import models
from adaptlab.compression import adapt_pruner as lesson
from adaptlab.compression.adapt_pruner import AdaptPruner, decoder_layers, layer_importance


@torch.no_grad()
def masked(model, kept):
    "The same function as a mask: full matrices, zero columns."
    model = copy.deepcopy(model)
    for layer, (_, neurons) in zip(decoder_layers(model), kept, strict=True):
        gone = torch.ones(layer.mlp.down_proj.in_features, dtype=torch.bool)
        gone[neurons] = False
        layer.mlp.down_proj.weight[:, gone] = 0
    return model


def test_cut_model_against_masked_model(benchmark):
    model, _ = models.load("smollm2", device="cpu")
    ids = torch.randint(0, 40_000, (1, 128), generator=torch.Generator().manual_seed(0))
    pruned = copy.deepcopy(model)
    found = AdaptPruner(pruned, target_ratio=0.85, criterion="magnitude", amplitude=0).run()
    silent = masked(model, found.kept)

    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, silent(ids).logits, atol=1e-2, rtol=1e-3)
        benchmark.pedantic(lambda: pruned(ids, use_cache=False), rounds=5, iterations=1)
        plain = seconds(lambda: silent(ids, use_cache=False), 5)
    ratio = plain / benchmark.stats.stats.min
    benchmark.extra_info["masked / cut"] = round(ratio, 2)
    print(f"\nforward pass of 128 tokens at 85 % of the size: {ratio:.2f} times as fast as a mask")
    assert ratio > 1


def test_one_pass_against_two(benchmark):
    "Importance and scores from one forward pass; the official code runs the data through twice."
    model, _ = models.load("smollm2", device="cpu")
    ids = torch.randint(0, 40_000, (2, 48), generator=torch.Generator().manual_seed(0))

    def literal():
        layer_importance(model, [ids])
        for p in model.parameters():
            p.requires_grad_(True)
        model(input_ids=ids, labels=ids).loss.backward()
        for layer in decoder_layers(model):
            lesson.mlp_taylor_scores(layer.mlp)
            lesson.kv_group_taylor_scores(layer.self_attn)
        model.zero_grad()

    def ours():
        return lesson._calibrate(model, [ids], "cosine", lesson._taylor)

    literal()  # warm up
    benchmark.pedantic(ours, rounds=3, iterations=1)
    ratio = seconds(literal) / benchmark.stats.stats.min
    benchmark.extra_info["two passes / one pass"] = round(ratio, 2)
    print(f"\ncalibration of one step, 96 tokens: {ratio:.2f} times as fast as two passes")
    assert ratio > 1
