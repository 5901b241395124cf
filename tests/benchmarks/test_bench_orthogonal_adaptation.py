"""A training step with frozen columns against LoRA of the same rank; a basis; a merge."""

from functools import partial

import torch
from clock import in_turn, row
from steps import four_blocks, training_step

from adaptlab import adapters
from adaptlab.arithmetic.orthogonal_adaptation import (
    OrthogonalAdapterConfig, SharedBasis, add_orthogonal_adapter, concept_of, crosstalk,
    merge_concepts, unmerge_concepts)
from adaptlab.evaluate import peak_memory

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def test_train_step_against_lora():
    "The same rank on the same layers; half of LoRA's numbers are trained."
    model, ids = four_blocks()
    step = partial(training_step, model, ids)
    make = partial(adapters.LoraAdapter, rank=20, alpha=20)
    lora = step(partial(adapters.attach, make=make, targets=TARGETS))
    ours = step(partial(add_orthogonal_adapter, config=OrthogonalAdapterConfig(
        concept="dog", target_modules=TARGETS)))
    row("orthogonal adapter against LoRA, r = 20, step", *in_turn(ours, lora, rounds=9), bound=1.0)
    row("orthogonal adapter against LoRA, r = 20, memory", peak_memory(ours, "cpu") / 2**20,
        peak_memory(lora, "cpu") / 2**20, bound=1.0, unit="MiB")


def test_basis_against_qr_alone():
    "What drawing the noise and fixing the signs add to the factorisation; informs."
    seeds = iter(range(1000))
    noise = torch.randn(640, 640, dtype=torch.float64)
    row("basis of width 640 against QR in float64", *in_turn(
        lambda: SharedBasis(next(seeds)).matrix(640), lambda: torch.linalg.qr(noise), rounds=5))


def test_merge_and_crosstalk_of_real_layers():
    model, _ = four_blocks()
    made = []
    for name in ("dog", "cat", "fox"):
        add_orthogonal_adapter(model, OrthogonalAdapterConfig(concept=name))
        with torch.no_grad():
            for p in adapters.trainable_parameters(model):
                p.normal_(std=0.01)
        made.append(concept_of(model))
        adapters.detach(model)

    def dense():
        for layer in made[0].up:
            sum(c.up[layer] @ c.columns(layer).T for c in made)

    def merge():
        unmerge_concepts(merge_concepts(model, made))

    row("merging three concepts, and back, against their products alone",
        *in_turn(merge, dense, rounds=5))

    def large():
        for layer in made[0].up:
            a, b = (c.up[layer] @ c.columns(layer).T for c in made[:2])
            (a @ b.T).norm() / (a.norm() * b.norm())

    row("crosstalk by small matrices against dense ones",
        *in_turn(lambda: crosstalk(*made[:2]), large, rounds=5), bound=1.0)
