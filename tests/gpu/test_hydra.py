"""Hydra on a GPU: training, merging, SMALL, and steps of FULL's RoBERTa-base."""

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from adaptlab import adapters
from adaptlab.bench import cost, suites
from adaptlab.bench.runs import launch
from adaptlab.experiments.hydra import FULL, SMALL
from adaptlab.lowrank.hydra import HydraConfig, branch_report, inject_hydra, parameter_count
from gpu.card import DEVICE, DRY, clock, in_turn, llama, machine, row, token_ids


def step_of(model, batch, rate=1e-4):
    "Forward, backward, AdamW, as the experiment trains."
    adam = torch.optim.AdamW(adapters.trainable_parameters(model.train()), lr=rate, fused=True)

    def step():
        adam.zero_grad()
        suites.model_loss(model, batch).backward()
        adam.step()

    return step


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_and_merges(dtype, bias):
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 64)
    config = HydraConfig(target_modules=("down_proj",), branch_bias=bias)
    inject_hydra(model, config)
    sides = adapters.layer_features(model.model.layers[0].mlp.down_proj)
    assert adapters.count_parameters(model)[0] == 2 * parameter_count(*sides, config)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    step = step_of(model, batch, rate=1e-2)
    for _ in range(3):
        step()
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits.float()
        assert all(r["norm"] > 0 for r in branch_report(model))
        after = adapters.merge(model)(input_ids=ids).logits.float()
    assert (after - before).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * before.norm()


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(
        seeds=(0,), device=DEVICE, tasks=("turned",), width=16, mixes=((4, 2),), images=(64, 64),
        lrs=(3e-2,), vision={"steps": 4, "batch_size": 32})
    assert launch("hydra", cfg, root=tmp_path, progress=False).claims


def roberta(config):
    "RoBERTa-base with random weights, adapted as in the experiment."
    size = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128,
            "num_hidden_layers": 2} if DRY else {}
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = RobertaForSequenceClassification(RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **size))
    return inject_hydra(model, config, also_train=("classifier",))


def test_full_shape():
    "In float32, as FULL trains: the longest texts, and short ones beside LoRA's step."
    targets = ("output.dense",)
    hydra, lora = (roberta(HydraConfig(r_parallel=p, r_sequential=s, target_modules=targets))
                   for p, s in ((4, 8), (7, 0)))
    rows = 2 if DRY else FULL.glue_training.batch_size
    labels = torch.arange(rows, device=DEVICE) % 2
    short, long = ({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
                   for ids in (token_ids(rows, 128), token_ids(rows, FULL.max_length)))
    ours, theirs = in_turn(step_of(hydra, short), step_of(lora, short), rounds=5)
    row(f"FULL: a step, {rows} x 128 tokens", ours, reference=theirs,
        against="LoRA with as many numbers")
    found = clock(step_of(hydra, long), rounds=3, warm=1)
    few = {k: v[:2] for k, v in long.items()}  # counted on two rows: activations grow with them
    counted = cost.needs(
        hydra, flops=cost.forward_flops(hydra, few, 2), trained=rows,
        trainable=sum(p.numel() for p in adapters.trainable_parameters(hydra)),
        activations=cost.activation_bytes(hydra, few) * rows / 2,
        machine=machine(half=False)).set_index("what")
    amount, unit = counted.loc["memory, together", ["amount", "unit"]]
    row(f"FULL: a step, {rows} x {FULL.max_length} tokens", *found,
        counted=(3600 * counted.loc["time", "amount"],
                 amount / 1024 if unit == "MiB" else amount))
