"""LQ-LoRA: unpacking, a step on packed weights against one on dense weights, memory."""

import copy
from functools import partial

import torch
from clock import in_turn, row
from torch import nn

from adaptlab import adapters, models
from adaptlab.evaluate import peak_memory
from adaptlab.lowrank.lq_lora import (
    LQLoRALinear, QuantConfig, block_linears, lq_decompose, quantize, quantize_layers)


def test_train_step_against_dense_weights():
    "The same factors on packed and on dense weights: unpacking is what differs."
    model, _ = models.load("smollm2", device="cpu", dtype="float32")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    names = list(adapters.match_layers(model, block_linears))
    ids = torch.randint(1000, (2, 128), generator=torch.Generator().manual_seed(0))

    def step(net, make):
        adapters.attach(net, make, names)
        adam = torch.optim.AdamW(adapters.trainable_parameters(net), lr=0.0)

        def work():
            adam.zero_grad()
            net(input_ids=ids, labels=ids).loss.backward()
            adam.step()

        return work

    lora = step(copy.deepcopy(model), partial(adapters.LoraAdapter, rank=8))
    for bits in (2, 3, 4):
        packed = quantize_layers(copy.deepcopy(model), dict.fromkeys(names, QuantConfig(bits)))
        ours = step(packed, partial(LQLoRALinear, rank=8))
        row(f"LQ-LoRA, {bits} bits, against LoRA, step", *in_turn(ours, lora, rounds=3), bound=1.5)
        row(f"LQ-LoRA, {bits} bits, against LoRA, memory of a step",
            peak_memory(ours, "cpu") / 2**20, peak_memory(lora, "cpu") / 2**20, bound=1.1,
            unit="MiB")


def test_decompose_against_whole_svds():
    "A round with the sketch, against a round of torch's own SVD and the same codes."
    W = torch.randn(576, 1536, generator=torch.Generator().manual_seed(0))
    config = QuantConfig(2)
    ours, whole = in_turn(
        lambda: lq_decompose(W, 8, config, num_iter=1),
        lambda: (torch.linalg.svd(W, full_matrices=False), quantize(W, config)), rounds=3)
    row("LQ decomposition, a round of 576 x 1536", ours, whole, bound=1.0)


def test_packed_bytes():
    W = nn.Linear(4096, 4096, bias=False).weight.detach()
    row("2-bit weight of 4096 x 4096 against bfloat16", quantize(
        W, QuantConfig(2)).nbytes / 2**20, 2 * W.numel() / 2**20, bound=0.135, unit="MiB")
