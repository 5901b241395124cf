"""DONOD on a GPU: the same numbers, scoring against the forward pass, SMALL, and FULL's shapes."""

import json
import re
from functools import partial

import pytest
import torch

from adaptlab import adapters, modules, recipes
from adaptlab.bench import cost
from adaptlab.bench.runs import launch
from adaptlab.domain.donod import DonodPruner, don_nod_from_hidden, don_nod_scores, topsis
from adaptlab.experiments import donod as told
from adaptlab.experiments.donod import FULL, SMALL
from adaptlab.train import Training
from gpu.card import DEVICE, clock, full, in_turn, llama, machine, row, token_ids


def batch_of(n, length, prompt):
    "As a collator makes it: on the CPU."
    ids = token_ids(n, length).cpu()
    labels = ids.clone()
    labels[:, : min(prompt, ids.shape[1] // 2)] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [2**27, 5000])
def test_closed_form_agrees_with_float64(dtype, most):
    rng = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*shape, generator=rng).to(dtype)
               for shape in ((4, 20, 64), (3000, 64), (3000,)))
    y = torch.randint(0, 3000, (4, 20), generator=rng)
    exact = don_nod_from_hidden(h.double(), y, w.double(), 1e-3, b.double())
    found = don_nod_from_hidden(h.to(DEVICE), y.to(DEVICE), w.to(DEVICE), 1e-3, b.to(DEVICE),
                                max_elements=most)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    for ours, right in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.cpu(), right, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"closed_form": False}, {"mode": "trajectory"},
                                     {"layer": "layers.0.mlp.down_proj"}])
def test_every_path(dtype, options):
    torch.manual_seed(0)
    model = recipes.tiny_llama(vocab_size=500, layers=1).to(DEVICE, dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = don_nod_scores(model, [batch_of(3, 16, 6)], **options)
    assert found.don.shape == (3,) and found.don.device.type == "cpu"
    assert (found.don.abs() <= found.nod * 1.01).all()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    kept = DonodPruner(0.5).rank(found).select()
    assert len(kept) == 2 and topsis(torch.stack(found[:2], 1)).argmax() == kept[0]


def test_scoring_against_the_forward_pass():
    "The shape of Llama-3.2-1B in bf16, answers of 122 tokens: at least half as fast as forward."
    model, batches = llama("llama3.2-1b"), [batch_of(8, 123, 1)] * 8

    @torch.no_grad()
    def forward():
        for one in batches:
            modules.call(model, one)

    ours, plain = in_turn(lambda: don_nod_scores(model, batches), forward, rounds=3, warm=1)
    _, gib = clock(lambda: don_nod_scores(model, batches[:2]), rounds=1, warm=0)
    row("64 samples of 122 tokens scored, 1B", ours, gib, reference=plain,
        against="the forward pass", bound=2.0)


def questions(tmp_path):
    "Pairs of no package that a machine may lack."
    rows = [{"q": f"{i} and {i} is", "a": f" {2 * i}"} for i in range(60)]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return {"source": str(file), "prompt": "{q}", "answer": "{a}"}


def stand_in(layers, *_, **__):
    torch.manual_seed(0)
    model = recipes.tiny_llama(vocab_size=300, layers=layers).to(DEVICE)
    return model, recipes.byte_tokenizer()


def test_small_experiment(tmp_path, monkeypatch):
    "In few steps, with a random model in the place of the one that it loads."
    monkeypatch.setattr(told.models, "load", partial(stand_in, 2))
    cfg = SMALL.replace(
        seeds=(0,), device=DEVICE, budgets=(0.7,), shorter=(0.5,), turns=(0.0, 30.0),
        images=(200, 100), digits=Training(steps=4, batch_size=32, lr=0.02),
        lora_layers=r".*\.self_attn\.(q|v)_proj", **questions(tmp_path),
        language=Training(steps=2, batch_size=2, lr=1e-3))
    report = launch("donod", cfg, root=tmp_path)
    assert {"digits", "turned", "language", "scores"} <= set(report.tables)


def test_full_through_its_code(tmp_path, monkeypatch):
    "FULL with two layers, two steps and little data: LoRA everywhere, answers are written."
    monkeypatch.setattr(told.models, "load", partial(stand_in, 2))
    pairs = questions(tmp_path)
    cfg = FULL.replace(
        seeds=(0,), device=DEVICE, test=pairs["source"], other="capitals", other_prompt="",
        other_answer="", other_accepted="", n_train=16, n_test=4, max_new_tokens=2,
        subsets=("all", "DONOD"), **pairs,
        language=Training(steps=2, batch_size=8, lr=2e-4, precision="bf16",
                          accumulate=FULL.language.accumulate))
    report = launch("donod", cfg, root=tmp_path)
    assert set(report.tables["language"]["method"]) == {"before", "all", "DONOD"}


def test_full_scoring_and_training():
    "Llama-3.1-8B's shape in bf16: FULL's scoring, then a pass of its LoRA step, of 32 samples."
    model, n = llama("llama3-8b"), FULL.language.batch_size // FULL.language.accumulate
    batch = modules.to_device(batch_of(n, 256, 80), DEVICE)
    weights = sum(p.nbytes for p in model.parameters())
    flops = cost.forward_flops(model, batch, 1)
    answers = 8 * min(2**27, n * 176 * model.config.vocab_size)  # errors and logits, in float32
    row(f"FULL: 8B, {2 * n} x 256 tokens scored",
        *clock(lambda: don_nod_scores(model, [batch] * 2), rounds=1, warm=1),
        counted=(2 * flops / machine().flops, (weights + answers) / 2**30))
    make = partial(adapters.LoraAdapter, rank=FULL.lora_rank, alpha=2 * FULL.lora_rank)
    adapters.attach(model, make, re.compile(FULL.lora_layers))
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=FULL.language.lr)

    def step():
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = modules.cross_entropy(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters.trainable_parameters(model), FULL.language.clip)
        adam.step()

    full(f"8B, LoRA trained on {n} x 256 tokens", model, batch, step, autocast=torch.bfloat16,
         rounds=3)
