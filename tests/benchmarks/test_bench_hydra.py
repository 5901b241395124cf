"""A training step of Hydra against LoRA with as many numbers, in one run."""

import copy
from functools import partial

import torch
from clock import in_turn, row

from adaptlab import adapters, models
from adaptlab.evaluate import peak_memory
from adaptlab.lowrank.hydra import HydraConfig, inject_hydra


def test_train_step_against_lora():
    model, _ = models.load("smollm2", device="cpu", dtype="float32")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    ids = torch.randint(1000, (2, 128), generator=torch.Generator().manual_seed(0))

    def step(wrap):
        net = copy.deepcopy(model)
        wrap(net)
        adam = torch.optim.AdamW(adapters.trainable_parameters(net), lr=0.0)

        def work():
            adam.zero_grad()
            net(input_ids=ids, labels=ids).loss.backward()
            adam.step()

        return work

    hydra = partial(inject_hydra, config=HydraConfig(
        r_parallel=8, r_sequential=14, target_modules=("down_proj",)))
    make = partial(adapters.LoraAdapter, rank=16, alpha=16)
    lora = partial(adapters.attach, make=make, targets=["down_proj"])
    ours, theirs = step(hydra), step(lora)
    row("Hydra (8, 14) against LoRA r = 16, step", *in_turn(ours, theirs, rounds=7), bound=1.0)
    row("Hydra (8, 14) against LoRA r = 16, memory", peak_memory(ours, "cpu") / 2**20,
        peak_memory(theirs, "cpu") / 2**20, bound=1.02, unit="MiB")  # y0 is kept for A_s
