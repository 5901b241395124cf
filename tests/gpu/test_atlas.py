"""aTLAS on a GPU: composing, half precision, LoRA vectors, full scale's shape, the experiment."""

from functools import partial

import pytest
import torch

from adaptlab import adapters, modules
from adaptlab.arithmetic.atlas import (
    AnisotropicComposer, TaskVector, attach_composition, learn_composition)
from adaptlab.bench.runs import launch
from adaptlab.experiments.atlas import SMALL
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, in_turn, llama, row, token_ids


def vectors_of(model, n, size=0.02):
    g = torch.Generator(DEVICE).manual_seed(0)
    return [TaskVector.of({k: size * p.abs().mean() * torch.randn(
        p.shape, generator=g, device=DEVICE).to(p.dtype) for k, p in model.named_parameters()})
        for _ in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["block", "isotropic", 4])
def test_composes_and_bakes(dtype, granularity):
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 64)
    made = AnisotropicComposer(model, vectors_of(model, 3), granularity, only_matrices=True)
    batch = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, model(input_ids=ids).logits)
    before = modules.cross_entropy(made, batch).item()
    learn_composition(made, [batch] * 8, lambda m, b: modules.cross_entropy(m, {
        k: v[0] for k, v in b.items()}), lr=0.3, epochs=2, batch_size=1)
    assert made.coef.is_cuda or DRY
    with torch.no_grad():
        after = modules.cross_entropy(made, batch).item()
        composed = made(input_ids=ids).logits
        model.load_state_dict(made.bake())
        assert torch.equal(model(input_ids=ids).logits, composed)
    assert after < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_and_memory(dtype):
    "The shape of CLIP ViT-B/32 with seven vectors, as at full scale, cut to a batch."
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"num_hidden_layers": 2} if DRY else {}
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=32,
        **{"num_hidden_layers": 12} | sizes)).to(DEVICE)
    made = AnisotropicComposer(model, vectors_of(model, 7), dtype=dtype)
    head = torch.randn(768, 10, device=DEVICE)
    x = torch.randn(2 if DRY else 128, 3, 224, 224, device=DEVICE)
    y = torch.randint(10, (len(x),), device=DEVICE)

    def step(net, params):
        for p in params:
            p.grad = None
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net(x).pooler_output @ head, y)
        loss.backward()

    def whole():
        step(model, model.parameters())

    ours = partial(step, made, [made.coef])
    times = in_turn(ours, whole)
    row(f"aTLAS, 7 vectors in {dtype}, step", times[0], reference=times[1])
    row("the same, alone", *clock(ours))


def test_lora_vectors_train():
    model, ids, found = llama("smollm2", layers=2), token_ids(2, 64), []
    for rank in (4, 8):
        adapters.attach(model, partial(adapters.LoraAdapter, rank=rank), ["q_proj", "down_proj"])
        with torch.no_grad():
            for p in adapters.trainable_parameters(model):
                p.normal_(std=0.02)
        found.append(TaskVector.from_lora(model))
        adapters.detach(model)
    attach_composition(model, found)
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)

    def step():
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()

    row("composed LoRAs, step", *clock(step))
    assert all(a.coef.any() for a in adapters.adapters(model).values())


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, shots=(1, 4), passes=2,
                        training=Training(steps=20, batch_size=32))
    assert launch("atlas", cfg, root=tmp_path).claims
