"""DiffoRA on a GPU: search, rounding, merging, FULL's steps, and the small experiment."""

from functools import partial

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from adaptlab import adapters, modules
from adaptlab.bench.runs import launch
from adaptlab.experiments.diffora import FULL, HEAD, SMALL
from adaptlab.lowrank.diffora import (
    DiffoRAConfig, attach_supernet, build_adapted_model, discretize, module_grams, module_grid,
    search, super_weights)
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, full, in_turn, llama, row, token_ids


def batch(seed):
    ids = token_ids(2, 64, seed)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_search_select_and_merge(dtype):
    model, inputs = llama("smollm2", layers=2, dtype=dtype), batch(9)["input_ids"]
    with torch.no_grad():
        base = model(input_ids=inputs).logits.float()
    config = DiffoRAConfig(r=4)
    dam = attach_supernet(model, config)
    history = search(model, dam, [batch(0)], [batch(1)], modules.cross_entropy, steps=4, warmup=1,
                     second_order=dtype == torch.float32)
    assert dam.logits.device.type == torch.device(DEVICE).type
    assert (history.gates[-1] != history.gates[0]).all()
    mask = discretize(model, dam, config.rho)
    pairs = super_weights(model, dam)
    build_adapted_model(adapters.detach(model), mask, config, inherit=pairs)
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)

    for _ in range(3):
        adam.zero_grad()
        modules.cross_entropy(model, batch(0)).backward()
        adam.step()
    with torch.no_grad():
        before = model(input_ids=inputs).logits.float()
        after = adapters.merge(model)(input_ids=inputs).logits.float()
    assert (before - base).norm() > 1e-3 * base.norm()
    assert (after - before).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * before.norm()


def deberta():
    "DeBERTa-v3-base with random weights and a new head."
    toy = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
           "num_hidden_layers": 2, "pooler_hidden_size": 32, "vocab_size": 512} if DRY else {
           "pooler_hidden_size": 768, "vocab_size": 128100}
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return DebertaV2ForSequenceClassification(DebertaV2Config(
            relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
            share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
            type_vocab_size=0, layer_norm_eps=1e-7, pooler_dropout=0.0, **{
                "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
                "num_hidden_layers": 12} | toy)).train()


def test_steps_of_full():
    "A step of the weights against LoRA's, and a step of the search: gates, then weights."
    def batch_of(n):
        ids = token_ids(n if not DRY else 2, FULL.max_length)
        return {"input_ids": ids, "labels": torch.arange(len(ids), device=DEVICE) % 2}

    def prepared(model, texts):
        theta = adapters.trainable_parameters(model)
        adam = torch.optim.AdamW(theta, lr=0.0)

        def step():
            adam.zero_grad()
            modules.cross_entropy(model, texts).backward(inputs=theta)
            adam.step()

        return step

    ours = deberta()
    dam = attach_supernet(ours, DiffoRAConfig(r=FULL.r, alpha=FULL.r), also_train=HEAD)

    def search_step():
        dam.searched = False
        search(ours, dam, [few], [few], steps=1, warmup=0, lr=1e-9, gate_lr=1e-9)

    texts, few = batch_of(FULL.batch_size), batch_of(FULL.batch_size // 4)
    full(f"DeBERTa-v3-base, {len(texts['labels'])} x {FULL.max_length}, weights", ours, texts,
         prepared(ours, texts), rounds=2)
    lora = deberta()
    names = [n for names in module_grid(lora).values() for n in names]
    adapters.attach(lora, partial(adapters.LoraAdapter, rank=FULL.r, alpha=FULL.r), names,
                    also_train=HEAD)
    weights, rival, whole = in_turn(prepared(ours, few), prepared(lora, few), search_step, rounds=3,
                                    warm=1)
    what = f"{len(few['labels'])} x {FULL.max_length} tokens"
    row(f"{what}, a step of the weights", weights, reference=rival, against=f"LoRA, r = {FULL.r}")
    row(f"{what}, a step of the search", whole, reference=weights, against="a step of the weights")


def test_kernel_on_the_card():
    from adaptlab.recipes import TinyViT

    torch.manual_seed(0)
    model = TinyViT().to(DEVICE)
    build_adapted_model(model, torch.ones(6, 3, dtype=torch.bool), DiffoRAConfig(r=2))
    grams = module_grams(model, (torch.randn(8, 1, 28, 28), torch.arange(8)))
    assert len(grams) == 18 and all(torch.linalg.eigvalsh(K)[0] > -1e-6 for K in grams.values())


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), teachers=1, device=DEVICE, steps=4, warmup=1, planted=64,
                        images=(64, 32), training=Training(steps=2, batch_size=16))
    assert launch("diffora", cfg, root=tmp_path).claims
