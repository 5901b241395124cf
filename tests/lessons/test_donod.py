"""DONOD: closed form, literal step, TOPSIS, streaming, bad input, and the full-scale path."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptlab import models
from adaptlab.domain import donod
from adaptlab.domain.donod import (
    FULL,
    SMALL,
    DonodPruner,
    don_nod_from_hidden,
    don_nod_scores,
    don_nod_step,
    experiment,
    output_layer,
    text_task,
    topsis,
)
from adaptlab.experiment import start_run


def language_model(tie=False):
    torch.manual_seed(0)
    return models.tiny_llama(vocab_size=50, hidden_size=16, layers=2, heads=2, kv_heads=1, tie=tie)


def batches(n=6, length=10, prompt=4, size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (n, length), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[1, 7:] = -100
    mask = torch.ones_like(ids)
    parts = [t.split(size) for t in (ids, labels, mask)]
    return [
        {"input_ids": i, "labels": y, "attention_mask": m} for i, y, m in zip(*parts, strict=True)
    ]


def causal_loss(model, batch, row):
    labels = batch["labels"][row, 1:]
    logits = model(input_ids=batch["input_ids"][row : row + 1]).logits[0, :-1]
    return nn.functional.cross_entropy(logits, labels)


def test_closed_form_equals_the_literal_step_on_the_output_layer():
    model = language_model().double()
    found = don_nod_scores(model, batches(), lr=0.1)
    rows = [(b, r) for b in batches() for r in range(3)]
    for i, (batch, r) in enumerate(rows):
        don, nod, loss = don_nod_step(
            model, lambda m, b=batch, r=r: causal_loss(m, b, r), [model.lm_head.weight], lr=0.1
        )
        assert math.isclose(found["nod"][i], nod, rel_tol=1e-10)
        assert math.isclose(found["don"][i], don, rel_tol=1e-9, abs_tol=1e-15)
        assert math.isclose(found["loss"][i], loss, rel_tol=1e-10)


def test_single_precision_is_close_to_double():
    model = language_model()
    single = don_nod_scores(model, batches(), lr=1e-3)
    double = don_nod_scores(model.double(), batches(), lr=1e-3)
    np.testing.assert_allclose(single["nod"], double["nod"], rtol=1e-4)
    np.testing.assert_allclose(single["don"], double["don"], rtol=1e-2, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(2, 7), st.integers(1, 9), st.integers(0, 999)
)
def test_triangle_inequality_and_linearity(b, t, v, d, seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(b, t, d, generator=generator, dtype=torch.float64)
    w = torch.randn(v, d, generator=generator, dtype=torch.float64)
    bias = torch.randn(v, generator=generator, dtype=torch.float64)
    y = torch.randint(0, v, (b, t), generator=generator)
    one = don_nod_from_hidden(h, y, w, 0.1, bias)
    two = don_nod_from_hidden(h, y, w, 0.2, bias)
    assert (one.nod >= 0).all() and (one.don.abs() <= one.nod * (1 + 1e-9) + 1e-12).all()
    torch.testing.assert_close(two.nod, 2 * one.nod)


def test_bias_is_part_of_the_probabilities_but_not_of_the_weight():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    x, y = torch.randn(4, 6).double(), torch.tensor([0, 1, 2, 3])
    found = don_nod_from_hidden(x, y, layer.weight, 0.3, layer.bias)
    for i in range(4):
        don, nod, _ = don_nod_step(
            layer,
            lambda m, i=i: nn.functional.cross_entropy(m(x[i : i + 1]), y[i : i + 1]),
            [layer.weight],
            lr=0.3,
        )
        assert math.isclose(found.don[i], don, rel_tol=1e-9)
        assert math.isclose(found.nod[i], nod, rel_tol=1e-10)


@pytest.mark.parametrize("mode", ["independent", "trajectory"])
@pytest.mark.parametrize("closed_form", ["auto", False])
def test_scoring_leaves_the_model_as_it_was(mode, closed_form):
    model = language_model(tie=True)
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    data = batches(size=1) if mode == "trajectory" else batches()
    don_nod_scores(model, data, mode=mode, closed_form=closed_form)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_batched_equals_one_by_one_and_order_does_not_matter():
    model = language_model()
    together = don_nod_scores(model, batches(size=6))
    alone = don_nod_scores(model, batches(size=1))
    pd.testing.assert_frame_equal(together, alone, rtol=1e-4, atol=1e-8)
    backwards = don_nod_scores(model, batches(size=1)[::-1])
    pd.testing.assert_frame_equal(
        backwards[::-1].reset_index(drop=True), alone, rtol=1e-4, atol=1e-8
    )


def test_several_layers_are_summed():
    model = language_model()
    names = ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]
    both = don_nod_scores(model, batches(), layer=names)
    parts = [don_nod_scores(model, batches(), layer=n) for n in names]
    np.testing.assert_allclose(both["don"], parts[0]["don"] + parts[1]["don"], rtol=1e-9)
    np.testing.assert_allclose(both["nod"], np.hypot(parts[0]["nod"], parts[1]["nod"]), rtol=1e-9)


def test_soft_capped_logits_fall_back_to_the_general_path():
    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return torch.tanh(self.head(x))

    torch.manual_seed(0)
    model, x, y = Capped(), torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    found = don_nod_scores(model, (x, y))
    literal = don_nod_step(
        model,
        lambda m: nn.functional.cross_entropy(m(x[:1]), y[:1]),
        [model.head.weight],
        lr=1e-3,
    )
    assert math.isclose(found["nod"][0], literal[1], rel_tol=1e-4)
    with pytest.raises(ValueError, match="closed_form=True"):
        don_nod_scores(model, (x, y), closed_form=True)


def test_data_is_streamed():
    alive = []

    def stream():
        for batch in batches(n=9, size=3):
            alive.append(batch)
            yield alive.pop()

    assert len(don_nod_scores(language_model(), stream())) == 9
    assert not alive


def test_trajectory_with_a_tiny_step_ranks_like_independent():
    model = language_model()
    still = don_nod_scores(model, batches(size=1), lr=1e-7)
    moving = don_nod_scores(model, batches(size=1), lr=1e-7, mode="trajectory")
    np.testing.assert_allclose(moving["nod"], still["nod"], rtol=1e-3)
    assert (moving["don"].rank() == still["don"].rank()).all()


def topsis_by_hand(m, w):
    r = m / np.sqrt((m**2).sum(0))
    v = r * w
    best = np.array([v[:, 0].max(), v[:, 1].min()])
    worst = np.array([v[:, 0].min(), v[:, 1].max()])
    near, away = (np.sqrt(((v - p) ** 2).sum(1)) for p in (best, worst))
    return away / (away + near)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 30), st.integers(0, 9999))
def test_topsis_agrees_with_its_definition(n, seed):
    m = np.random.default_rng(seed).normal(size=(n, 2))
    np.testing.assert_allclose(topsis(m, (0.5, 0.5)), topsis_by_hand(m, np.array([0.5, 0.5])))
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_allclose(topsis(m[order]), topsis(m)[order])


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2)])
def test_topsis_agrees_with_pymcdm(weights):
    from pymcdm.methods import TOPSIS
    from pymcdm.normalizations import vector_normalization

    rng = np.random.default_rng(0)
    for m in (rng.uniform(0.1, 2, (40, 2)), rng.normal(size=(30, 2))):
        theirs = TOPSIS(normalization_function=vector_normalization)
        expected = theirs(m, np.array(weights), np.array([1, -1]))
        np.testing.assert_allclose(topsis(m, weights), expected, rtol=1e-9)


@pytest.mark.parametrize("normalization", ["vector", "minmax", "zscore"])
def test_every_normalisation_knows_the_best_and_the_worst(normalization):
    m = np.random.default_rng(0).normal(size=(20, 2))
    m[3], m[7] = (9, -9), (-9, 9)
    closeness = topsis(m, normalization=normalization)
    assert closeness.argmax() == 3 and closeness.argmin() == 7


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: topsis([[1.0, math.nan]]), "NaN"),
        (lambda: topsis([[1.0, 2.0, 3.0]]), "shape"),
        (lambda: topsis(np.empty((0, 2))), "shape"),
        (lambda: topsis([[1.0, 2.0]], weights=(0, 0)), "weights"),
        (lambda: topsis([[1.0, 2.0]], weights=(-1, 2)), "weights"),
        (lambda: topsis([[1.0, 2.0]], normalization="l7"), "normalization"),
        (lambda: DonodPruner(keep=0), "keep"),
        (lambda: DonodPruner(keep=1.5), "keep"),
        (lambda: DonodPruner().select(), "fit"),
        (lambda: don_nod_scores(language_model(), []), "empty"),
        (lambda: don_nod_scores(language_model(), batches(), lr=0), "positive"),
        (lambda: don_nod_scores(language_model(), batches(), mode="sideways"), "mode"),
        (lambda: don_nod_scores(language_model(), batches(), layer="no_such"), "no_such"),
        (lambda: output_layer(nn.Sequential(nn.ReLU())), "layer="),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("closed_form", ["auto", False])
def test_a_sample_without_answer_is_refused(closed_form):
    bad = batches()
    bad[0]["labels"][2] = -100
    with pytest.raises(ValueError, match="answer token"):
        don_nod_scores(language_model(), bad, closed_form=closed_form)


def test_values_that_are_not_finite_are_refused():
    model = language_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite|infinite"):
        don_nod_scores(model, batches(), closed_form="auto")


def test_a_constant_column_warns():
    with pytest.warns(UserWarning, match="cannot tell"):
        topsis([[1.0, 2.0], [1.0, 3.0]], normalization="minmax")


def test_the_swapped_answers_are_the_ones_that_are_marked():
    clean = text_task(SMALL.replace(noise=0.0), seed=0)
    noisy = text_task(SMALL, seed=0)
    assert not clean.corrupted.any()
    differs = np.array([a != b for a, b in zip(clean.train, noisy.train, strict=True)])
    assert (differs == noisy.corrupted).all()
    assert abs(noisy.corrupted.mean() - SMALL.noise) < 0.03
    assert not {p for p, _ in noisy.train} & {p for p, _ in noisy.target}


def tiny_world(folder):
    "FULL in miniature: a random Llama, a byte tokenizer, and question-answer files."
    model = models.tiny_llama(vocab_size=260, hidden_size=16, layers=2, heads=2, kv_heads=1)
    model.save_pretrained(folder / "model")
    models.byte_tokenizer().save_pretrained(folder / "model")
    sets = folder / "sets"
    sets.mkdir()
    for split, n in (("train", 12), ("test", 5)):
        rows = [{"question": f"{i} + {i}?", "answer": f"so #### {2 * i}"} for i in range(n)]
        (sets / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return FULL.replace(
        model=str(folder / "model"),
        dataset=str(sets),
        dataset_config=None,
        other=str(sets),
        other_split="test",
        sft_steps=2,
        sft_batch=4,
        precision="no",
        max_new_tokens=4,
        device="cpu",
        seeds=(0,),
    )


def test_full_scale_path_with_a_tiny_model(tmp_path):
    cfg = tiny_world(tmp_path)
    report = experiment(cfg, start_run("donod", cfg, "full", root=tmp_path / "runs"))
    table = report.tables["llm"].set_index("subset")
    assert list(table.index) == ["before fine-tuning", *cfg.subsets]
    assert table["target match"].between(0, 100).all()
    assert len(report.tables["scores"]) == 12 and "scores" in report.figures


def test_full_scale_path_with_two_processes(tmp_path):
    cfg = tiny_world(tmp_path)
    args = []
    for name in ("model", "dataset", "dataset_config", "other", "other_split", "precision"):
        args += [f"--{name.replace('_', '-')}", str(getattr(cfg, name))]
    args += ["--sft-steps", "2", "--sft-batch", "4", "--max-new-tokens", "4", "--device", "cpu"]
    args += ["--seeds", "0", "--subsets", "DONOD", "--root", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "-m", "adaptlab", "run", "donod", "--scale", "full", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("report in") == 1


def test_module_is_the_one_of_the_catalogue():
    from adaptlab import catalog

    assert catalog.find("donod").module == donod.__name__
