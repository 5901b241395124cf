"""Orthogonal adaptation on a GPU: training, merging, crosstalk, files, the U-Net of FULL.

SMALL's network of 8 x 8 pictures lives on the CPU whatever the device.
"""

import pytest
import torch
import torch.nn.functional as F

from adaptlab import adapter_files, adapters
from adaptlab.arithmetic.orthogonal_adaptation import (
    ConceptTokens, OrthogonalAdapterConfig, SharedBasis, add_orthogonal_adapter, concept_of,
    crosstalk, functional_crosstalk, load_concept, merge_concepts, save_concept, to_peft,
    unmerge_concepts)
from adaptlab.experiments.orthogonal_adaptation import FULL
from gpu.card import DEVICE, DRY, full, in_turn, llama, once, row, token_ids
from gpu.unet import UNet

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_alone_and_merges(dtype, tmp_path):
    "Two concepts, each trained alone; the sum is that of the factors, and comes out again."
    model, ids, made = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 64), []
    with torch.no_grad():
        base = model(input_ids=ids).logits
    for name in ("dog", "cat"):
        add_orthogonal_adapter(model, OrthogonalAdapterConfig(
            concept=name, r=8, basis=SharedBasis(0, ("dog", "cat")), method="disjoint",
            target_modules=TARGETS))
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, base)
        adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)
        for _ in range(5):
            adam.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            adam.step()
        made.append(concept_of(model))
        adapters.detach(model)
    with torch.no_grad():
        merged = merge_concepts(model, made)(input_ids=ids).logits
        assert torch.isfinite(merged).all() and not torch.allclose(merged, base, atol=1e-2)
        unmerge_concepts(model)
        assert torch.equal(model(input_ids=ids).logits, base)
    assert max(crosstalk(*made).values()) < 1e-4
    found = functional_crosstalk(model, made, {c.name: {"input_ids": ids} for c in made})
    for M in found.values():
        torch.testing.assert_close(M.diagonal(), torch.ones(2))
    same = load_concept(save_concept(made[0], tmp_path / "dog.safetensors"))
    adapter_files.from_peft(model, to_peft(model, made[0], tmp_path / "peft"))
    back = adapters.adapters(model)
    for name, A in made[0].up.items():
        assert torch.equal(same.up[name], A)
        torch.testing.assert_close(back[name].B.cpu().to(A), A)


def test_tokens():
    words = ConceptTokens(torch.zeros(2, 8, device=DEVICE), layers=3)
    places = torch.tensor([[-1, 0, 1, -1]], device=DEVICE)
    seen = words(torch.ones(1, 4, 8, device=DEVICE, dtype=torch.bfloat16), places)
    assert seen.shape == (3, 1, 4, 8) and seen.mean((0, 1, 3)).tolist() == [1, 0, 0, 1]


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
    row("a step, r = 20, 4 layers of 1B", ours, reference=lora, against="LoRA", bound=1.0)


class Axes(SharedBasis):
    "Unit vectors as the basis: what is timed does not depend on it, and a wide one takes seconds."

    def columns(self, m, r, concept, layer, method="random"):
        places = self.indices(m, r, concept, layer, method), torch.arange(r)
        return torch.zeros(m, r).index_put_(places, torch.ones(()))


def test_basis():
    m = 256 if DRY else 2560  # as 4 x 640: the layer behind the gates in the U-Net's second level
    row(f"the basis of {m:,} inputs, drawn on the host", once(lambda: SharedBasis(1).matrix(m)))


def test_unet_of_full():
    "One concept's step, as FULL trains it but for the text encoder; then three are merged."
    with torch.device(DEVICE):
        model = UNet(*([(32, 64, 128, 128), 64] if DRY else [])).bfloat16().eval()
    basis = Axes(0, FULL.subjects[:3])
    configs = [OrthogonalAdapterConfig(concept=c, r=FULL.rank if not DRY else 4, basis=basis)
               for c in basis.registry]
    add_orthogonal_adapter(model, configs[0])
    assert len(adapters.adapters(model)) == 184
    factors = adapters.trainable_parameters(model)
    for p in factors:
        p.data = p.data.float()
    batch, side = FULL.photo_training.batch_size, 8 if DRY else FULL.side // 8
    place = {"device": DEVICE, "dtype": torch.bfloat16}
    given = {"sample": torch.randn(batch, 4, side, side, **place),
             "timestep": torch.randint(1000, (batch,), device=DEVICE),
             "context": torch.randn(batch, 77, 64 if DRY else 768, **place)}
    noise = torch.randn_like(given["sample"])
    adam = torch.optim.AdamW(factors, lr=FULL.photo_training.lr, weight_decay=0.0)

    def step():
        adam.zero_grad()
        F.mse_loss(model(**given).float(), noise.float()).backward()
        adam.step()

    full(f"U-Net of Stable Diffusion 1.5, {batch} pictures", model, given, step,
         rounds=3)
    made = [concept_of(model)]
    for config in configs[1:]:
        adapters.detach(model)
        made.append(concept_of(add_orthogonal_adapter(model, config)))
    adapters.detach(model)

    pairs = [(adapters.base_modules(model)[n].weight, *(torch.cat(side, 1).to(DEVICE) for side in (
        [c.up[n] for c in made], [c.columns(n) for c in made]))) for n in made[0].up]
    ours, plain = in_turn(lambda: unmerge_concepts(merge_concepts(model, made)),
                          lambda: [W + A.to(B) @ B.T for W, A, B in pairs], rounds=2, warm=1)
    row("merging three concepts, and back", ours, reference=plain,
        against="the products on the card")
