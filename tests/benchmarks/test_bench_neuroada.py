"""Bypasses against a materialised dense change, masks, and PEFT's sparse adapter, in one run."""

import copy
import time
import warnings
from functools import partial

import pytest
import torch

from adaptlab import adapters, models
from adaptlab.evaluate import peak_memory
from adaptlab.sparse.neuroada import (
    LINEARS,
    NeuroAda,
    NeuroAdaConfig,
    NeuroAdaLinear,
    neuroada_linear,
    select_topk,
    wrap_masked,
)


def step(w, x, idx, theta, impl):
    "One forward and backward pass of a layer."
    y = neuroada_linear(x, w, None, idx, theta, impl=impl)
    return torch.autograd.grad(y.square().sum(), (x, theta))


@pytest.mark.parametrize("k", [1, 4])
def test_gather_against_materialised(benchmark, k):
    torch.manual_seed(0)
    w, x = torch.randn(1536, 576), torch.randn(256, 576, requires_grad=True)
    idx, theta = select_topk(w, k), torch.randn(1536, k, requires_grad=True)
    gather, dense = (partial(step, w, x, idx, theta, i) for i in ("gather", "materialize"))
    for ours, theirs in zip(gather(), dense(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    benchmark.pedantic(gather, rounds=15, warmup_rounds=2)
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        dense()
        seconds.append(time.perf_counter() - start)
    faster = sorted(seconds)[7] / benchmark.stats.stats.median
    leaner = peak_memory(dense, "cpu") / peak_memory(gather, "cpu")
    benchmark.extra_info["materialised / gather, time"] = round(faster, 2)
    benchmark.extra_info["materialised / gather, peak memory"] = round(leaner, 2)
    print(f"\nNeuroAda k={k}, 1536 x 576, 256 tokens: gathering takes 1/{faster:.2f} of the time "
          f"and 1/{leaner:.2f} of the peak memory of a dense change")  # fmt: skip
    assert leaner > 1
    if k == 1:
        assert faster > 1


@pytest.fixture(scope="module")
def base():
    "The first four blocks of SmolLM2-135M in single precision."
    model, _ = models.load("smollm2", device="cpu", dtype="float32")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    return model


def train_step(model, ids, optimizer):
    "Forward, backward and a step of AdamW, which moves nothing (lr = 0)."
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def prepared(model):
    "A step to be called, and the model that it belongs to."
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(1000, (2, 128), generator=torch.Generator().manual_seed(0))
    return partial(train_step, model, ids, torch.optim.AdamW(trained, lr=0.0))


def compare(benchmark, name, ours, theirs, rival):
    "Times in turn, and peak memory, moments and masks included; prints both ratios."
    makers = {"ours": ours, "theirs": theirs}
    memory = {who: peak_memory(lambda m=make: prepared(m())(), "cpu")
              for who, make in makers.items()}  # fmt: skip
    steps = {who: prepared(make()) for who, make in makers.items()}
    seconds = {who: [] for who in steps}
    for _ in range(6):  # in turn, so that a slow moment of the machine hits both
        for who, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[who].append(time.perf_counter() - start)
    benchmark.pedantic(steps["ours"], rounds=3)
    ratio = min(seconds["ours"]) / min(seconds["theirs"])
    share = memory["ours"] / memory["theirs"]
    benchmark.extra_info |= {"time ratio": round(ratio, 2), "memory ratio": round(share, 2)}
    print(f"\nNeuroAda, {name}: {ratio:.2f} of the time and {share:.2f} of the memory (weights "
          f"included) of {rival}")  # fmt: skip
    return ratio, share


def test_train_step_against_masks(benchmark, base):
    def ours():
        return NeuroAda.wrap(copy.deepcopy(base), NeuroAdaConfig(k=1))

    def masked():
        model = copy.deepcopy(base)
        model.masks = wrap_masked(model, NeuroAdaConfig(k=1))
        return model

    ratio, share = compare(benchmark, "k=1 on four blocks", ours, masked, "masks")
    assert share < 1 and ratio < 1


def test_train_step_against_peft(benchmark, base):
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
            makers[name] = partial(
                NeuroAdaLinear, indices=columns[:, None], rows=rows, impl="gather"
            )

    def ours():
        return adapters.attach(copy.deepcopy(base), makers)

    ratio, share = compare(benchmark, "at SHiRA's positions", ours, theirs, "PEFT's SHiRA")
    assert share < 1
