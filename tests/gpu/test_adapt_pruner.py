"""Adapt-Pruner on a GPU: the same cuts, files, training in between, SMALL, and FULL's shapes."""

import copy

import pytest
import torch

from adaptlab import adapters, recipes
from adaptlab.bench import cost
from adaptlab.bench.runs import launch
from adaptlab.bench.testbeds import Bed
from adaptlab.compression.adapt_pruner import (
    AdaptPruner,
    adapt_accel,
    layer_importance,
    normalise_importance,
)
from adaptlab.decoders import decoder_layers, layer_shapes, load_pruned, save_pruned
from adaptlab.experiments import adapt_pruner as told
from adaptlab.experiments.adapt_pruner import FULL, SMALL, Texts
from adaptlab.train import fit
from gpu.card import DEVICE, DRY, clock, full, in_turn, llama, machine, row, token_ids


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def draw(step):
    return token_ids(4, 32, seed=step)


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    return recipes.tiny_llama(vocab_size=500, hidden_size=96, layers=3, heads=6,
                              kv_heads=3).to(DEVICE, dtype)


def test_float32_cuts_as_on_the_cpu():
    model = tiny()
    there = copy.deepcopy(model).cpu()
    torch.testing.assert_close(layer_importance(model, [draw(1)]),
                               layer_importance(there, [draw(1).cpu()]), atol=1e-5, rtol=1e-4)
    found = AdaptPruner(model, target_ratio=0.95, steps=4, amplitude=0.25).run(draw)
    again = AdaptPruner(there, target_ratio=0.95, steps=4, amplitude=0.25).run(
        lambda step: draw(step).cpu())
    kept = [(set(a[1].tolist()), set(b[1].tolist()))
            for a, b in zip(found.kept, again.kept, strict=True)]
    assert min(len(a & b) / len(a | b) for a, b in kept) > 0.98  # ties by rounding
    assert next(model.parameters()).device.type == DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prune_save_and_load(dtype, tmp_path):
    "The weights come back bit for bit, and the logits up to rounding."
    model = tiny(dtype)
    target = int(0.95 * size_of(model))
    found = AdaptPruner(model, target, steps=4, amplitude=0.25).run(draw)
    assert found.params_after <= target and model.dtype is dtype
    again = load_pruned(save_pruned(model, tmp_path / "m"), DEVICE, dtype)
    for (name, ours), (same, theirs) in zip(
            model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == same and torch.equal(ours, theirs) and ours.is_contiguous()
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    with torch.no_grad():
        torch.testing.assert_close(again(draw(0)).logits, model(draw(0)).logits, atol=tolerance,
                                   rtol=tolerance)


def test_prune_and_train_in_turn():
    model, x = tiny(), draw(0).cpu()

    def train(m, stage):
        fit(m, {"input_ids": x, "labels": x}, steps=2, batch_size=2, device=DEVICE,
            precision="bf16", progress=False)

    target = int(0.93 * size_of(model))
    done = adapt_accel(model.requires_grad_(True), target, 2, train, draw, steps=8, amplitude=0.1)
    assert size_of(model) == done.pruned[-1].params_after <= target
    assert layer_shapes(model) == done.pruned[-1].shapes


def test_small_experiment_with_stand_ins(tmp_path, monkeypatch):
    "SMALL through the same code, in few steps; random models in the place of those it loads."
    def pairs(some):
        return dict.fromkeys(("input_ids", "labels"), torch.stack(list(some)))

    def bed(cfg, seed):
        x = token_ids(40, 32).cpu() % 260
        model = recipes.tiny_llama(hidden_size=64, layers=3).to(DEVICE).requires_grad_(True)
        return Bed(model, Texts(x[:20], list(x[:16]), pairs), x[20:30], x[30:],
                   tokenizer=recipes.byte_tokenizer())

    monkeypatch.setattr(told, "prune_bed", bed)
    monkeypatch.setattr(told, "accel_bed", bed)
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, stages=(1, 2), steps=4, accel_steps=4,
                        remove=0.2, target=0.8, lrs=(1e-3,), samples=2)
    report = launch("adapt_pruner", cfg, root=tmp_path)
    assert len(report.claims) == len(told.PRUNE_CASES) + 1 and set(report.figures) == {"main"}


def test_full_step_of_pruning():
    "A step of FULL on Llama-3.1-8B's shape: an eighth of its 512 windows of 64 tokens."
    model, windows = llama("llama3-8b"), FULL.samples // 8 if not DRY else 4
    ids = token_ids(windows, FULL.length)
    weights = sum(p.nbytes for p in model.parameters())
    gradients = 4 * sum(p.numel() for x in decoder_layers(model) for p in x.parameters())
    batch = {"input_ids": ids[:16], "labels": ids[:16]}
    most = weights + gradients + cost.activation_bytes(model, batch)
    flops = 3 * cost.forward_flops(model, batch, ids[:16].numel()) * ids.numel()

    whole, runs = layer_shapes(model), []

    def step():
        runs.append(len(runs))
        if runs == [0] and not DRY:  # to warm up: a short one, which fails and leaves no trace
            with pytest.raises(ValueError, match="finite"):
                AdaptPruner(model, size_of(model) - 1, normalise=lambda raw: normalise_importance(
                    raw / 0)).run(lambda k: ids[:16])
            assert layer_shapes(model) == whole
        else:
            AdaptPruner(model, size_of(model) - 1, batch_size=16).run(lambda k: ids)

    row(f"FULL: 8B, a step, {windows} of 512 windows", *clock(step, rounds=1, warm=1),
        counted=(flops / machine().flops, most / 2**30))


@torch.no_grad()
def test_odd_widths():
    "A cut leaves any number of neurons; tensor cores like multiples of eight."
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    x, work = torch.randn(1024, 64 if DRY else 4096, device=DEVICE).bfloat16(), []
    for neurons in (100, 104) if DRY else (11501, 11504):
        config = LlamaConfig(hidden_size=x.shape[1], intermediate_size=neurons)
        mlp = LlamaMLP(config).to(DEVICE, torch.bfloat16)
        work.append(lambda mlp=mlp: mlp(x))
    odd, even = in_turn(*work)
    row("MLP of 8B, 11,501 neurons, 1024 tokens", odd, reference=even, against="11,504 neurons")


def test_full_step_of_training():
    "Qwen2.5-0.5B's shape, float32 weights, eight of the 128 samples of 1024 tokens."
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {} if DRY else {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    small = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(Qwen2Config(**(shape or small), tie_word_embeddings=True))
    ids = token_ids(FULL.training.batch_size // 16, FULL.max_length)
    batch = {"input_ids": ids, "labels": ids}
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=2e-5)

    def step():
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), FULL.training.clip)
        adam.step()

    full("0.5B trained on 8 x 1024 tokens", model, batch, step, autocast=torch.bfloat16, rounds=3)
