"""A step of the super-net, and of the selected half, against LoRA, in one run."""

import copy
from functools import partial

import torch
from clock import in_turn, row

from adaptlab import adapters, models, modules
from adaptlab.evaluate import peak_memory
from adaptlab.lowrank.diffora import (
    DiffoRAConfig, attach_supernet, build_adapted_model, module_grid)


def test_train_step_against_lora():
    "Gates cost next to nothing; half of the modules cost less than all, with equal counts or not."
    model, _ = models.load("smollm2", device="cpu", dtype="float32")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    ids = torch.randint(1000, (2, 128), generator=torch.Generator().manual_seed(0))
    names = tuple(n for names in module_grid(model).values() for n in names)

    def step(wrap):
        net = copy.deepcopy(model)
        wrap(net)
        theta = adapters.trainable_parameters(net)
        adam = torch.optim.AdamW(theta, lr=0.0)

        def work():
            adam.zero_grad()
            modules.call(net, {"input_ids": ids, "labels": ids}, labels=True).loss.backward()
            adam.step()

        return work

    def lora(rank):
        make = partial(adapters.LoraAdapter, rank=rank, alpha=rank)
        return step(partial(adapters.attach, make=make, targets=names))

    config = DiffoRAConfig(r=8, alpha=8, sharing="none")
    mask = torch.arange(7)[:, None].expand(7, 4) % 2 == 0
    for what, ours, theirs, bound in (
            ("super-net against LoRA r = 8", step(partial(attach_supernet, config=config)),
             lora(8), 1.05),
            ("selected half r = 8 against LoRA r = 4",
             step(partial(build_adapted_model, mask=mask, config=config)), lora(4), 1.0)):
        row(f"DiffoRA, {what}, step", *in_turn(ours, theirs, rounds=7), bound=bound)
        row(f"DiffoRA, {what}, memory", peak_memory(ours, "cpu") / 2**20,
            peak_memory(theirs, "cpu") / 2**20, bound=1.05, unit="MiB")
