"""A training step of LoLDU against LoRA, in one run; LU of a large weight."""

from functools import partial

import torch
from clock import in_turn, row
from steps import four_blocks, training_step

from adaptlab import adapters
from adaptlab.evaluate import peak_memory
from adaptlab.lowrank.loldu import LoLDUConfig, get_loldu_model, ldu


def test_train_step_against_lora():
    "LoRA's smallest rank is the nearest count: 1,152 and 768 numbers for a layer."
    model, ids = four_blocks()
    step = partial(training_step, model, ids)

    make = partial(adapters.LoraAdapter, rank=1, alpha=1)
    lora = step(partial(adapters.attach, make=make, targets=["q_proj", "v_proj"]))
    for rank in (16, 192):
        ours = step(partial(get_loldu_model, config=LoLDUConfig(rank=rank)))
        what = f"LoLDU r = {rank} against LoRA r = 1"
        row(f"{what}, step", *in_turn(ours, lora, rounds=7), bound=1.05)
        row(f"{what}, memory", peak_memory(ours, "cpu") / 2**20,
            peak_memory(lora, "cpu") / 2**20, bound=1.05, unit="MiB")


def test_factors_of_a_large_weight():
    W = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    row("LDU of 2048 x 2048 against torch's own LU", *in_turn(
        lambda: ldu(W), lambda: torch.linalg.lu(W), rounds=5), bound=1.2)  # checks, and divides
