"""A step of the super-net, and of the selected half, against LoRA, in one run."""

from functools import partial

import torch
from clock import in_turn, row
from steps import four_blocks, training_step

from adaptlab import adapters
from adaptlab.evaluate import peak_memory
from adaptlab.lowrank.diffora import (
    DiffoRAConfig, attach_supernet, build_adapted_model, module_grid)


def test_train_step_against_lora():
    "Gates cost next to nothing; half of the modules cost less than all, with equal counts or not."
    model, ids = four_blocks()
    names = tuple(n for names in module_grid(model).values() for n in names)
    step = partial(training_step, model, ids)

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
