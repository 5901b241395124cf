"""Orthogonal adaptation on a GPU: training, merging, crosstalk."""

import pytest
import torch

from adaptlab import adapters
from adaptlab.arithmetic.orthogonal_adaptation import (
    OrthogonalAdapterConfig, SharedBasis, add_orthogonal_adapter, concept_of, functional_crosstalk,
    merge_concepts, unmerge_concepts)
from gpu.card import clock, in_turn, llama, row, token_ids

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_alone_and_merges(dtype):
    "Two concepts, each trained alone; the sum is that of the factors, and comes out again."
    model, ids, made = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 64), []
    with torch.no_grad():
        base = model(input_ids=ids).logits
    for name in ("dog", "cat"):
        add_orthogonal_adapter(model, OrthogonalAdapterConfig(
            concept=name, r=8, basis=SharedBasis(0, ("dog", "cat")), method="disjoint"))
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, base)
        adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)

        def step(adam=adam):
            adam.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            adam.step()

        row(f"orthogonal adapter, step, {dtype}", *clock(step))
        made.append(concept_of(model))
        adapters.detach(model)
    with torch.no_grad():
        merged = merge_concepts(model, made)(input_ids=ids).logits
        assert torch.isfinite(merged).all() and not torch.allclose(merged, base, atol=1e-2)
        unmerge_concepts(model)
        assert torch.equal(model(input_ids=ids).logits, base)
    found = functional_crosstalk(model, made, {c.name: {"input_ids": ids} for c in made})
    for M in found.values():
        torch.testing.assert_close(M.diagonal(), torch.ones(2))


def test_step_against_lora():
    steps = []
    for adapt in (
            lambda m: add_orthogonal_adapter(m, OrthogonalAdapterConfig(
                concept="dog", r=20, target_modules=TARGETS)),
            lambda m: adapters.attach(m, lambda layer: adapters.LoraAdapter(layer, 20, 20),
                                      TARGETS)):
        model, ids = llama("llama3.2-1b", layers=4), token_ids(2, 256)
        adapt(model)
        adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=0.0)

        def step(model=model, adam=adam, ids=ids):
            adam.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            adam.step()

        steps.append(step)
    ours, lora = in_turn(*steps)
    row("orthogonal adapter against LoRA, r = 20", ours, reference=lora, bound=1.0)
