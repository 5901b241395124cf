"""DiffoRA on a GPU: search, rounding, sharing, merging, and the small experiment."""

from functools import partial

import pytest
import torch

from adaptlab import adapters, modules
from adaptlab.bench.runs import launch
from adaptlab.experiments.diffora import SMALL
from adaptlab.lowrank.diffora import (
    DiffoRAConfig, attach_supernet, build_adapted_model, discretize, module_grams, module_grid,
    search)
from gpu.card import DEVICE, clock, in_turn, llama, row, token_ids


def batch(seed):
    ids = token_ids(2, 64, seed)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_search_select_and_merge(dtype):
    model, inputs = llama("smollm2", layers=2, dtype=dtype), batch(9)["input_ids"]
    with torch.no_grad():
        base = model(input_ids=inputs).logits.float()
    config = DiffoRAConfig(r=4)
    dam = attach_supernet(model, config)
    history = search(model, dam, [batch(0)], [batch(1)], modules.cross_entropy, steps=4, warmup=1)
    assert dam.logits.device.type == torch.device(DEVICE).type
    assert (history.gates[-1] != history.gates[0]).all()
    mask = discretize(model, dam, config.rho)
    build_adapted_model(adapters.detach(model), mask, config)
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)

    def step():
        adam.zero_grad()
        modules.cross_entropy(model, batch(0)).backward()
        adam.step()

    row(f"DiffoRA, step after the search, {dtype}", *clock(step))
    with torch.no_grad():
        before = model(input_ids=inputs).logits.float()
        after = adapters.merge(model)(input_ids=inputs).logits.float()
    assert (before - base).norm() > 1e-3 * base.norm()
    assert (after - before).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * before.norm()


def test_step_of_the_supernet_against_lora():
    def step(wrap):
        model = llama("smollm2", layers=8)
        wrap(model)
        adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=0.0)

        def work():
            adam.zero_grad()
            modules.cross_entropy(model, batch(0)).backward()
            adam.step()

        return work

    names = [n for names in module_grid(llama("smollm2", layers=8)).values() for n in names]
    make = partial(adapters.LoraAdapter, rank=8, alpha=8)
    ours, lora = in_turn(step(lambda m: attach_supernet(m, DiffoRAConfig(r=8, alpha=8))),
                         step(lambda m: adapters.attach(m, make, names)))
    row("DiffoRA, super-net against LoRA r = 8, step", ours, reference=lora)


def test_kernel_on_the_card():
    from adaptlab.recipes import TinyViT

    torch.manual_seed(0)
    model = TinyViT().to(DEVICE)
    build_adapted_model(model, torch.ones(6, 3, dtype=torch.bool), DiffoRAConfig(r=2))
    grams = module_grams(model, (torch.randn(8, 1, 28, 28), torch.arange(8)))
    assert len(grams) == 18 and all(torch.linalg.eigvalsh(K)[0] > -1e-6 for K in grams.values())


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), teachers=2, device=DEVICE)
    assert launch("diffora", cfg, root=tmp_path).claims
