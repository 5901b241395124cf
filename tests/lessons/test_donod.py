"""DONOD: closed form, literal step, TOPSIS, streaming, bad input, and the full-scale path."""

import copy
import json
import math
import os
import subprocess
import sys
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptlab import data, models
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
from adaptlab.evaluate import continuation_log_probs, peak_memory
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


@pytest.mark.parametrize("closed_form", ["auto", False])
def test_data_is_streamed(closed_form):
    "Of a generator's batches only the one in use, and the next one, are ever alive."
    alive, most = weakref.WeakSet(), 0

    def stream():
        nonlocal most
        for batch in batches(n=30, size=3):
            batch = {k: v.clone() for k, v in batch.items()}
            alive.add(batch["input_ids"])
            most = max(most, len(alive))
            yield batch

    found = don_nod_scores(language_model(), stream(), closed_form=closed_form)
    assert len(found) == 30 and most <= 2


class OnDisk:
    "A map-style data set that counts how many of its rows are asked for at a time."

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.rows[i]


def test_trajectory_reads_a_data_set_row_by_row():
    rows = [{"prompt": f"{i} plus {i} is", "response": f" {2 * i}"} for i in range(7)]
    torch.manual_seed(0)
    model = models.tiny_llama(vocab_size=260, hidden_size=16, layers=1, heads=2, kv_heads=1)
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(len(on_disk.asked)))
    on_disk = OnDisk(rows)
    found = don_nod_scores(model, on_disk, models.byte_tokenizer(), mode="trajectory", lr=0.1)
    assert seen == list(range(1, 8)) and sorted(on_disk.asked) == list(range(7))
    assert on_disk.asked != sorted(on_disk.asked)  # in random order
    held = don_nod_scores(model, iter(rows), models.byte_tokenizer(), mode="trajectory", lr=0.1)
    pd.testing.assert_frame_equal(found, held)


def test_rows_of_a_dataset_are_scored_and_selected(tmp_path):
    rows = [{"prompt": f"{i} plus {i} is", "response": f" {2 * i}"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    on_disk = data.load(tmp_path / "rows.jsonl", split="train")
    torch.manual_seed(0)
    model = models.tiny_llama(vocab_size=260, hidden_size=16, layers=1, heads=2, kv_heads=1)
    pruner = DonodPruner(keep=0.3).fit(model, on_disk, tokenizer=models.byte_tokenizer())
    kept = on_disk.select(pruner.select())
    assert len(kept) == math.ceil(0.3 * 9)
    best = pruner.scores["closeness"].idxmax()
    assert kept[0]["prompt"] == rows[best]["prompt"]
    assert len(DonodPruner(keep=1.0).rank(pruner.scores).select()) == 9


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 60), st.integers(0, 999))
def test_a_batch_in_parts_is_the_same_batch(b, t, max_elements, seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(b, t, 4, generator=generator, dtype=torch.float64)
    w = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 6, (b, t), generator=generator)
    whole = don_nod_from_hidden(h, y, w, 0.1)
    parts = don_nod_from_hidden(h, y, w, 0.1, max_elements=max_elements)
    torch.testing.assert_close(whole, parts)


def test_the_closed_form_never_holds_more_logits_than_it_may():
    h, w = torch.randn(8, 16, 32), torch.randn(2000, 32)
    y = torch.randint(0, 2000, (8, 16))
    one = 16 * 2000 * 4  # bytes of one sample's logits
    whole, parts = (peak_memory(lambda n=n: don_nod_from_hidden(h, y, w, 0.1, max_elements=n))
                    for n in (8 * 16 * 2000, 16 * 2000))
    assert whole > 8 * one > 6 * one > parts


def test_half_precision_is_scored_in_single():
    model = language_model()
    single = don_nod_scores(model, batches())
    for dtype in (torch.bfloat16, torch.float16):
        half = don_nod_scores(copy.deepcopy(model).to(dtype), batches())
        np.testing.assert_allclose(half["nod"], single["nod"], rtol=0.02)
        np.testing.assert_allclose(half["don"], single["don"], rtol=0.2, atol=2e-5)


def test_the_first_order_of_don_turns_with_the_step():
    inner, norm = torch.tensor([0.3, -0.7]).double(), torch.tensor(5.0).double()
    forth, back = (donod._from_products(inner, torch.ones(2).double(), norm, lr)[0]
                   for lr in (1e-6, -1e-6))
    torch.testing.assert_close(forth, -back, rtol=1e-4, atol=0)
    torch.testing.assert_close(forth, -1e-6 * inner / norm, rtol=1e-4, atol=0)


def test_a_wrapped_output_layer_is_scored_by_its_base_weight():
    peft = pytest.importorskip("peft")
    plain = don_nod_scores(language_model(), batches())
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(language_model(), config)
    name, layer = output_layer(wrapped)
    assert name.endswith("lm_head.base_layer") and isinstance(layer, nn.Linear)
    with pytest.raises(ValueError, match="closed_form=True"):  # the LoRA changes the logits
        don_nod_scores(wrapped, batches(), closed_form=True)
    found = don_nod_scores(wrapped, batches())
    assert not np.allclose(found["loss"], plain["loss"])
    with wrapped.disable_adapter():
        off = don_nod_scores(wrapped, batches(), closed_form=True)
    pd.testing.assert_frame_equal(off, plain, rtol=1e-5, atol=1e-9)


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


def test_answers_are_read_as_greedy_decoding_would_say_them():
    torch.manual_seed(0)
    model = models.tiny_llama(vocab_size=260, hidden_size=16, layers=1, heads=2, kv_heads=1)
    tokenizer = models.byte_tokenizer()
    pairs = [(f"{i} and {i} are", f" {2 * i}{'x' * i}") for i in range(5)]
    prompt = tokenizer("so", add_special_tokens=False)["input_ids"]
    first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    pairs.append(("so", tokenizer.decode([first])))  # what greedy decoding says
    loglik, right = donod._read_answers(model.train(), tokenizer, pairs, batch_size=4)
    sums, counts = continuation_log_probs(model, tokenizer, *map(list, zip(*pairs, strict=True)))
    np.testing.assert_allclose(loglik, sums / counts, rtol=1e-4)
    said = [len(tokenizer.decode([first])) == 1 and tokenizer(a)["input_ids"] == [first]
            for _, a in pairs]
    assert right == [100.0 * s for s in said] and right[-1] == 100 and model.training


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
