"""ComPEFT on a GPU: the same signs as on the CPU, experts of FULL's sizes, the experiment."""

import math
from functools import partial

import pytest
import torch

from adaptlab import adapters, recipes
from adaptlab.arithmetic.compeft import (
    ComPEFTCompressor, TernaryBitmask, golomb_bits, golomb_decode, golomb_encode, load_compressed,
    magnitude_prune, save_compressed, stc_ternarize, ternarize)
from adaptlab.bench.runs import launch
from adaptlab.bench.testbeds import digits
from adaptlab.experiments import compeft as experiment
from adaptlab.experiments.compeft import FULL, SMALL
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, full, in_turn, llama, once, row, token_ids

GIB = 2**30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_entries_as_on_the_cpu(dtype):
    tau = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = ternarize(tau, 0.2, 2.0), ternarize(tau.to(DEVICE), 0.2, 2.0)
    assert torch.equal(here.indices, there.indices.cpu())
    assert torch.equal(here.negative, there.negative.cpu())
    assert abs(here.scale - there.scale) <= 1e-3 * here.scale
    again = golomb_decode(golomb_encode(there))
    assert torch.equal(again.indices, here.indices) and again.scale == there.scale
    dense = there.to_dense()
    assert dense.device.type == DEVICE and int((dense != 0).sum()) == len(here.indices)
    mask = TernaryBitmask.of(there)
    assert mask.hamming(TernaryBitmask.of(here)) == 0
    assert torch.equal(stc_ternarize(tau.to(DEVICE)).indices.cpu(), here.indices)
    pruned = magnitude_prune(tau.to(DEVICE)).to_dense(dtype)
    assert torch.equal(pruned[pruned != 0].cpu(), tau[here.indices])


def test_many_entries():
    size = 10**5 if DRY else 10**8
    tau = torch.randn(size, device=DEVICE)
    seconds, gib = clock(partial(ternarize, tau, 0.2), rounds=3, warm=1)
    kept = (4 * size + 0.2 * size * (8 + 1 + 4)) / GIB  # the vector; places, signs and values
    row("1e8 entries made ternary", seconds, gib, counted=(None, kept))
    ours, sort = in_turn(partial(ternarize, tau, 0.2), lambda: tau.abs().sort(), rounds=3, warm=1)
    row("the same, beside a sort", ours, reference=sort, against="sorting |tau|")


def test_an_adapter_of_7b(tmp_path):
    "What is published for FULL: LoRA of rank 64 on every matrix of Llama 2 7B, in bfloat16."
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    layers, r = (1, 4) if DRY else (32, 64)
    sent = {f"layers.{i}.{j}.lora_{f}.weight": torch.randn(
        (r, n_in) if f == "A" else (n_out, r), device=DEVICE, dtype=torch.bfloat16)
        for i in range(layers) for j, (n_out, n_in) in enumerate(shapes) for f in "AB"}
    size, packer, k = sum(t.numel() for t in sent.values()), ComPEFTCompressor(0.05), 0.05
    held = (6 * size + k * size * 13) / GIB  # bfloat16 and float32; places, signs and values
    row(f"LoRA of 7B, {size / 1e6:.0f} M: compressed", *clock(
        partial(packer.compress, sent), rounds=2, warm=1), counted=(None, held))
    tensors = packer.decompress()
    assert tensors.keys() == sent.keys() and all(t.device.type == DEVICE for t in tensors.values())
    file = tmp_path / "expert"
    row("the same, written", once(lambda: save_compressed(file, packer.vectors)))
    bits = golomb_bits(size, k)
    assert DRY or abs(8 * file.stat().st_size / bits - 1) < 0.02
    again = []
    row("the same, read", once(lambda: again.extend(load_compressed(file))))
    assert torch.equal(again[0].indices, packer.vectors[0].indices.cpu())
    row("the same, decompressed", *clock(packer.decompress, rounds=2, warm=1),
        counted=(None, (6 * size + k * size * 9) / GIB))


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_full_fine_tune_in_bfloat16(per_tensor):
    base, tuned = (llama("smollm2", layers=1, seed=s) for s in (0, 1))
    start = {n: p.detach().clone() for n, p in base.named_parameters()}
    packer = ComPEFTCompressor(0.1, 2.0, reference=start, per_tensor=per_tensor)
    vectors = packer.compress({n: p.detach() for n, p in tuned.named_parameters()})
    assert sum(v.size for v in vectors) == sum(p.numel() for n, p in start.items()
                                               if not per_tensor or n in packer.decompress())
    packer.apply_(tuned)
    for name, p in tuned.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.isfinite(p).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_in_the_model(dtype):
    torch.manual_seed(0)
    model = recipes.tiny_llama(hidden_size=32, layers=1).to(DEVICE, dtype)
    adapters.attach(model, partial(adapters.LoraAdapter, rank=4), ["q_proj", "down_proj"])
    with torch.no_grad():
        for p in adapters.trainable_parameters(model):
            p.normal_(std=0.1)
    ids, before = token_ids(2, 8) % 260, [p.clone() for p in adapters.trainable_parameters(model)]

    def score(net):
        with torch.no_grad():
            return -float(net(input_ids=ids, labels=ids).loss)

    packer = ComPEFTCompressor(0.5)
    tried = packer.fit_alpha(model, score, (0.5, 1, 2), (0.2, 0.5))
    assert len(tried) == 6 and all(math.isfinite(t["score"]) for t in tried)
    assert all(map(torch.equal, adapters.trainable_parameters(model), before))
    packer.apply_(model)
    assert score(model) == max(t["score"] for t in tried)


def test_full_shape():
    "RoBERTa-base trained whole on FULL's batch of GLUE."
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 48, "num_hidden_layers": 1} if DRY else {}
    with torch.device(DEVICE):
        torch.manual_seed(0)
        model = RobertaForSequenceClassification(RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **sizes))
    n = 2 if DRY else FULL.glue_training.batch_size
    ids = token_ids(n, FULL.max_length)
    batch = {"input_ids": ids, "labels": torch.zeros(n, dtype=torch.int64, device=DEVICE)}
    adam = torch.optim.AdamW(model.parameters(), lr=FULL.glue_training.lr)

    def step():
        adam.zero_grad()
        model(**batch).loss.backward()
        adam.step()

    full(f"RoBERTa-base, {n} x {ids.shape[1]} tokens", model, batch, step, rounds=3)


def test_small_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "digits", partial(digits, epochs=1, n_train=4800))
    monkeypatch.setattr(experiment, "SCALES", (1, 2))
    monkeypatch.setattr(experiment, "ALPHAS", (1, 2))
    few = Training(steps=3, batch_size=16, lr=1e-2)
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, images=(64, 64), curve=(0.5,), training=few,
                        lora_training=few)
    assert launch("compeft", cfg, root=tmp_path, progress=False).claims
