"""A sketched layer against autograd through a gather, a step against LoRA, learning a sketch."""

from functools import partial

import torch
from clock import in_turn, row
from steps import four_blocks, training_step
from torch.nn import functional as F

from adaptlab import adapters
from adaptlab.evaluate import peak_memory
from adaptlab.sparse.sketchtune import (
    SketchConfig, SketchedLinear, hessian_factor, learn_sketch, sketch_model)


def test_layer_against_a_gather():
    "The same numbers by plain autograd, which keeps the codes' indices and the dense weight."
    torch.manual_seed(0)
    layer = SketchedLinear(learn_sketch(torch.randn(2048, 2048), bits=4))
    x = torch.randn(256, 2048, requires_grad=True)

    def ours():
        layer(x).square().sum().backward()

    def plain():
        F.linear(x, layer.weight).square().sum().backward()

    row("sketched layer 2048 x 2048 against a gather, step", *in_turn(ours, plain, rounds=7),
        bound=1.0)
    row("the same, memory", peak_memory(ours, "cpu") / 2**20, peak_memory(plain, "cpu") / 2**20,
        bound=1.0, unit="MiB")


def test_train_step_against_lora():
    "Tables need the products of a full gradient: half more than LoRA's operations."
    model, ids = four_blocks()
    step = partial(training_step, model, ids)

    names = SketchConfig().target_modules
    ours = step(partial(sketch_model, batches=None, config=SketchConfig(bits=4)))
    lora = step(partial(adapters.attach, targets=names, make=partial(
        adapters.LoraAdapter, rank=8, alpha=8)))
    full = step(lambda net: adapters.attach(net, {}, also_train=names))
    seconds = in_turn(ours, full, lora, rounds=5)
    row("tables of 4 bits against full fine-tuning of the same layers, step", *seconds[:2],
        bound=1.2)
    row("tables of 4 bits against LoRA r = 8, step", seconds[0], seconds[2])


def test_learning_a_sketch():
    "Against the two factorisations that any method with this Hessian pays."
    torch.manual_seed(0)
    W, x = torch.randn(576, 1536), torch.randn(3000, 1536)
    H = x.T @ x
    row("sketch of 576 x 1536 against the factor of its Hessian", *in_turn(
        lambda: learn_sketch(W, H), lambda: hessian_factor(H), rounds=3))
