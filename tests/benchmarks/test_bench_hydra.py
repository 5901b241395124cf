"""A training step of Hydra against LoRA with as many numbers, in one run."""

from functools import partial

from clock import in_turn, row
from steps import four_blocks, training_step

from adaptlab import adapters
from adaptlab.evaluate import peak_memory
from adaptlab.lowrank.hydra import HydraConfig, inject_hydra


def test_train_step_against_lora():
    model, ids = four_blocks()
    step = partial(training_step, model, ids)

    hydra = partial(inject_hydra, config=HydraConfig(
        r_parallel=8, r_sequential=14, target_modules=("down_proj",)))
    make = partial(adapters.LoraAdapter, rank=16, alpha=16)
    lora = partial(adapters.attach, make=make, targets=["down_proj"])
    ours, theirs = step(hydra), step(lora)
    row("Hydra (8, 14) against LoRA r = 16, step", *in_turn(ours, theirs, rounds=7), bound=1.0)
    row("Hydra (8, 14) against LoRA r = 16, memory", peak_memory(ours, "cpu") / 2**20,
        peak_memory(theirs, "cpu") / 2**20, bound=1.02, unit="MiB")  # y0 is kept for A_s
