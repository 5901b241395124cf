"""LoLDU on a GPU: factors, training, merging, FULL's steps, and the small experiment."""

import pytest
import torch
from transformers import (
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from adaptlab import adapters, modules
from adaptlab.bench.runs import launch
from adaptlab.experiments.loldu import FULL, SMALL
from adaptlab.lowrank.loldu import LoLDUConfig, get_loldu_model, ldu
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, full, llama, row, token_ids

TOY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
       "num_hidden_layers": 2} if DRY else {}


def test_factors_of_a_large_weight():
    n = 256 if DRY else 4096
    W = torch.randn(n, n, device=DEVICE)
    row(f"LDU of {n} x {n}", *clock(lambda: ldu(W), rounds=3, warm=1))
    for some in (W, W.bfloat16()):
        perm, L, d, U = ldu(some)
        assert ((L * d) @ U - some[perm].float()).norm() <= 1e-3 * W.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_merges(dtype):
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 64)
    with torch.no_grad():
        base = model(input_ids=ids).logits.float()
    get_loldu_model(model, LoLDUConfig(rank=32))
    with torch.no_grad():
        start = model(input_ids=ids).logits.float()
    assert (start - base).norm() <= 1e-5 * base.norm()  # the change is exactly zero
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)
    for _ in range(3):
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        after = adapters.merge(model)(input_ids=ids).logits.float()
    assert (before - base).norm() > 1e-3 * base.norm()
    assert (after - before).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * before.norm()


def adapted(model, rank, init):
    get_loldu_model(model, LoLDUConfig(rank=rank if not DRY else 8, init=init),
                    also_train=("classifier",))
    return model.train()


def prepared(model, batch, autocast=False):
    "A step as FULL makes it."
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=0.0)

    def step():
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = modules.cross_entropy(model, batch)
        loss.backward()
        adam.step()

    return step


def test_step_of_full_on_photographs():
    n, rank = FULL.photo_training.batch_size if not DRY else 2, max(FULL.ranks)
    assert FULL.photo_training.precision == "bf16"
    side = 224 if not DRY else 32
    with torch.device(DEVICE):
        model = ViTForImageClassification(ViTConfig(num_labels=100, image_size=side, **TOY))
        batch = torch.randn(n, 3, side, side), torch.randint(100, (n,))
    adapted(model, rank, "uniform")
    full(f"ViT-B, r = {rank}, {n} images, autocast", model, batch, prepared(model, batch, True),
         autocast=torch.bfloat16)


def test_step_of_full_on_texts():
    n, rank = FULL.glue_training.batch_size if not DRY else 2, max(FULL.ranks)
    with torch.device(DEVICE):
        model = RobertaForSequenceClassification(RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **TOY))
    ids = token_ids(n, FULL.max_length)
    batch = {"input_ids": ids, "labels": torch.zeros(n, dtype=torch.long, device=DEVICE)}
    adapted(model, rank, "ldu")
    full(f"RoBERTa-base, r = {rank}, {n} x {FULL.max_length} tokens", model, batch,
         prepared(model, batch), rounds=3)


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, images=(64, 32), lrs=(1e-2,),
                        training=Training(steps=2, batch_size=16))
    assert launch("loldu", cfg, root=tmp_path).claims
