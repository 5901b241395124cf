"""A token of dynamic fusion against one of static fusion, models included; the search alone."""

import copy
from functools import partial

import torch
from clock import in_turn, row

from adaptlab import models
from adaptlab.arithmetic.logits_fusion import DynamicLogitFusion, dynamic_alpha, static_fusion
from adaptlab.evaluate import peak_memory


def family():
    "SmolLM2, and its first four blocks as the small base and, moved a little, as an expert."
    large, _ = models.load("smollm2", device="cpu", dtype="float32")
    layers = large.model.layers
    large.model.layers = layers[:4]
    small = copy.deepcopy(large)
    large.model.layers = layers
    small.config.num_hidden_layers = 4
    expert = copy.deepcopy(small)
    with torch.no_grad():
        for p in expert.model.norm.parameters():
            p.mul_(1.05)
    return large, small, expert


def test_a_token_against_static_fusion():
    large, small, expert = family()
    ids = torch.randint(1000, (1, 32), generator=torch.Generator().manual_seed(0))

    def write(choose):
        fusion = DynamicLogitFusion(large, small, [expert], choose)
        return fusion.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)

    static, grid, bisect = (partial(write, choose) for choose in (
        static_fusion(1.0), dynamic_alpha, partial(dynamic_alpha, method="bisect")))
    for name, ours in (("grid", grid), ("bisection", bisect)):
        row(f"8 tokens, dynamic by {name} against static", *in_turn(ours, static, rounds=5),
            bound=1.3)


def test_memory_of_the_search():
    "No tensor [candidates, batch, vocabulary]: the grid holds little more than static fusion."
    rows = torch.randn(3, 8, 49_152, generator=torch.Generator().manual_seed(0))
    held = {name: peak_memory(partial(choose, *rows), "cpu") / 2**20 for name, choose in (
        ("static", static_fusion(1.0)), ("grid", dynamic_alpha),
        ("many", partial(dynamic_alpha, alphas=torch.arange(201) / 100)))}
    row("search by grid against static fusion, memory", held["grid"], held["static"], unit="MiB")
    row("201 candidates against 21, memory", held["many"], held["grid"], bound=1.0, unit="MiB")
