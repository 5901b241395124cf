"""Bypasses against the official way, masks, LoRA, and PEFT's sparse adapter, each in one run."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from clock import in_turn, row

from adaptlab import adapters, models
from adaptlab.evaluate import peak_memory
from adaptlab.experiments.neuroada import wrap_masked
from adaptlab.sparse.neuroada import (
    LINEARS,
    NeuroAda,
    NeuroAdaConfig,
    NeuroAdaLinear,
    neuroada_linear,
    select_topk,
)


def official(x, W, idx, theta):
    "A dense change written out in every call; autograd forms the dense gradient."
    flat = (torch.arange(len(W))[:, None] * W.shape[1] + idx).flatten()
    dense = torch.zeros(W.numel()).scatter_add(0, flat, theta.flatten()).view_as(W)
    return F.linear(x, W + dense)


def step(layer, x, theta):
    "One forward and backward pass of a layer."
    return torch.autograd.grad(layer().square().sum(), (x, theta))


@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize("tokens", [16, 256])
def test_layer_against_the_official_way(k, tokens):
    torch.manual_seed(0)
    W, x = torch.randn(1536, 576), torch.randn(tokens, 576, requires_grad=True)
    idx, theta = select_topk(W, k), torch.randn(1536, k, requires_grad=True)
    ours = partial(step, partial(neuroada_linear, x, W, None, idx, theta), x, theta)
    theirs = partial(step, partial(official, x, W, idx, theta), x, theta)
    for a, b in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
    what = f"NeuroAda k = {k}, {tokens} tokens, layer 1536 x 576"
    times = in_turn(ours, theirs, rounds=15)
    row(f"{what}, against the official way", *times, bound=1.0)
    row(f"{what}, memory", peak_memory(ours, "cpu") / 2**20, peak_memory(theirs, "cpu") / 2**20,
        bound=1.0, unit="MiB")


@pytest.fixture(scope="module")
def base():
    "The first four blocks of SmolLM2-135M in single precision."
    model, _ = models.load("smollm2", device="cpu", dtype="float32")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    return model


def prepared(model):
    "A step to be called: forward, backward and AdamW, which moves nothing (lr = 0)."
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(1000, (2, 128), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    def step():
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return step


def compare(what, ours, theirs, time=None, memory=1.0):
    "Rows for time and peak memory of a step, moments and masks included."
    row(f"{what}, step", *in_turn(prepared(ours()), prepared(theirs()), rounds=5), bound=time)
    held = [peak_memory(lambda m=make: prepared(m())(), "cpu") / 2**20 for make in (ours, theirs)]
    row(f"{what}, memory with weights", *held, bound=memory, unit="MiB")


@pytest.mark.parametrize("k", [1, 20])
def test_train_step_against_lora(base, k):
    def ours():
        return NeuroAda.wrap(copy.deepcopy(base), NeuroAdaConfig(k=k))

    def lora():
        make = partial(adapters.LoraAdapter, rank=16, alpha=16)
        return adapters.attach(copy.deepcopy(base), make, LINEARS)

    compare(f"NeuroAda k = {k} against LoRA r = 16", ours, lora, time=1.1)


def test_train_step_against_masks(base):
    def ours():
        return NeuroAda.wrap(copy.deepcopy(base), NeuroAdaConfig(k=1))

    def masked():
        model = copy.deepcopy(base)
        model.masks = wrap_masked(model, NeuroAdaConfig(k=1))
        return model

    compare("NeuroAda k = 1 against masks", ours, masked, time=1.0)


def test_train_step_against_peft(base):
    "SHiRA has the same algebra at random positions: we take its positions."
    peft = pytest.importorskip("peft")
    warnings.filterwarnings("ignore", message="Sparse invariant checks")

    def theirs():
        torch.manual_seed(0)
        config = peft.ShiraConfig(r=1, target_modules=list(LINEARS))
        return peft.get_peft_model(copy.deepcopy(base), config)

    makers = {}
    for name, layer in theirs().base_model.model.named_modules():
        if hasattr(layer, "shira_indices"):
            rows, columns = layer.shira_indices["default"].long()
            makers[name] = partial(NeuroAdaLinear, indices=columns[:, None], rows=rows)

    def ours():
        return adapters.attach(copy.deepcopy(base), makers)

    compare("NeuroAda at the positions of PEFT's SHiRA", ours, theirs, time=1.0)
