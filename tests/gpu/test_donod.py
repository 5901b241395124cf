"""DONOD on a GPU: the same numbers, the closed form against the forward pass, the experiment."""

import pytest
import torch

from adaptlab import recipes
from adaptlab.bench.runs import launch
from adaptlab.domain.donod import DonodPruner, don_nod_from_hidden, don_nod_scores, topsis
from adaptlab.experiments import donod as told
from adaptlab.experiments.donod import FULL, SMALL
from adaptlab.train import Training
from gpu.card import DEVICE, clock, in_turn, llama, row, token_ids


def batch_of(n, length, prompt):
    ids = token_ids(n, length)
    labels = ids.clone()
    labels[:, : min(prompt, ids.shape[1] // 2)] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [2**27, 5000])
def test_closed_form_agrees_with_float64(dtype, most):
    rng = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*shape, generator=rng).to(dtype)
               for shape in ((4, 20, 64), (500, 64), (500,)))
    y = torch.randint(0, 500, (4, 20), generator=rng)
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
    model = llama("smollm2", layers=1, dtype=dtype)
    batch = {k: v.cpu() for k, v in batch_of(3, 16, 6).items()}  # moved where the model is
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = don_nod_scores(model, [batch], **options)
    assert found.don.shape == (3,) and found.don.device.type == "cpu"
    assert (found.don.abs() <= found.nod * 1.01).all()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    kept = DonodPruner(0.5).rank(found).select()
    assert len(kept) == 2 and topsis(torch.stack(found[:2], 1)).argmax() == kept[0]


def test_scoring_against_the_forward_pass():
    "The shape of Llama-3.2-1B in bf16, answers of 122 tokens: at least half as fast as forward."
    model, batch = llama("llama3.2-1b"), batch_of(8, 123, 1)
    batches = [batch] * 8

    @torch.no_grad()
    def forward():
        for one in batches:
            model(input_ids=one["input_ids"], use_cache=False)

    ours, plain = in_turn(lambda: don_nod_scores(model, batches), forward, rounds=5, warm=1)
    _, gib = clock(lambda: don_nod_scores(model, batches[:2]), rounds=1, warm=0)
    row(f"DONOD, {64 / ours:.0f} samples/s of 1B, forward {64 / plain:.0f}", ours, gib,
        reference=plain, bound=2.0)


def stand_in(*_, **__):
    torch.manual_seed(0)
    tokenizer = recipes.byte_tokenizer()
    model = recipes.tiny_llama(vocab_size=len(tokenizer), hidden_size=16, layers=2, heads=2,
                               kv_heads=1)
    return model.to(DEVICE), tokenizer


def test_small_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(told.models, "load", stand_in)
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, budgets=(0.7,), shorter=(0.5,),
                        lora_layers=r".*\.self_attn\.(q|v)_proj")
    report = launch("donod", cfg, root=tmp_path)
    assert {"digits", "turned", "language", "scores"} <= set(report.tables)


def test_full_shape_for_two_steps(tmp_path, monkeypatch):
    "FULL's layers of the 8B model, cut to two of them; bundled pairs in place of GSM8K."
    tokenizer = recipes.byte_tokenizer()
    monkeypatch.setattr(told.models, "load", lambda *a, **k: (llama("llama3-8b", 2), tokenizer))
    cfg = FULL.replace(
        seeds=(0,), device=DEVICE, source="cldr_territories", test="", prompt="", answer="",
        other="capitals", other_prompt="", other_answer="", other_accepted="", n_train=16,
        n_test=4, max_new_tokens=2, subsets=("all", "DONOD"),
        language=Training(steps=2, batch_size=8, lr=2e-4, precision="bf16"))
    seconds, gib = clock(lambda: launch("donod", cfg, root=tmp_path), rounds=1, warm=0)
    row("DONOD, FULL cut to 2 layers and 2 steps", seconds, gib)
