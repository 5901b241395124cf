"""DONOD: closed form, literal step, TOPSIS, labels and batches, bad input, and full scale."""

import copy
import json
import math
import weakref

import numpy as np
import pandas as pd
import pytest
import schemas
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaptlab import data, recipes
from adaptlab.bench.runs import launch, start_run
from adaptlab.bench.testbeds import Pairs
from adaptlab.domain.donod import (
    DonodPruner,
    don_nod_from_hidden,
    don_nod_scores,
    don_nod_step,
    output_layer,
    topsis,
)
from adaptlab.evaluate import peak_memory
from adaptlab.experiments import donod as told
from adaptlab.experiments.donod import FULL, SMALL, choose_subsets
from adaptlab.train import Training


def language_model(tie=False):
    torch.manual_seed(0)
    return recipes.tiny_llama(vocab_size=50, hidden_size=16, layers=2, heads=2, kv_heads=1, tie=tie)


def batches(n=6, length=10, prompt=4, size=3, seed=0):
    ids = torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[1, 7:] = -100
    parts = [t.split(size) for t in (ids, labels, torch.ones_like(ids))]
    return [{"input_ids": i, "labels": y, "attention_mask": m}
            for i, y, m in zip(*parts, strict=True)]


def close(a, b, rtol=1e-4, atol=1e-8):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_closed_form_equals_the_literal_step_on_the_output_layer():
    model = language_model().double()
    found, i = don_nod_scores(model, batches(), lr=0.1), 0
    for batch in batches():
        for r in range(3):
            def loss(m, batch=batch, r=r):
                logits = m(input_ids=batch["input_ids"][r : r + 1]).logits[0, :-1]
                return nn.functional.cross_entropy(logits, batch["labels"][r, 1:])

            expected = don_nod_step(model, loss, [model.lm_head.weight], lr=0.1)
            ours = [found.don[i], found.nod[i], found.loss[i]]
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-15)
            i += 1


def test_single_precision_is_close_to_double():
    single = don_nod_scores(language_model(), batches())
    double = don_nod_scores(language_model().double(), batches())
    close(single.nod, double.nod, rtol=1e-4, atol=0)
    close(single.don, double.don, rtol=1e-2)


def test_confident_samples_keep_their_digits_in_single_precision():
    "Where p is nearly 1 at the label, e is tiny: it must not drown in rounding."
    rng = torch.Generator().manual_seed(0)
    h, w = torch.randn(4, 3, 16, generator=rng), torch.randn(40, 16, generator=rng)
    y = (h @ w.T).argmax(-1)
    single, exact = (don_nod_from_hidden(3 * h.to(k), y, w.to(k), 1e-3)
                     for k in (torch.float32, torch.float64))
    close(single.nod, exact.nod, rtol=1e-3, atol=0)


@settings(max_examples=30, deadline=None)
@given(*(st.integers(1, n) for n in (5, 6, 7, 9)), st.integers(1, 60), st.integers(0, 999))
def test_properties(b, t, v, d, most, seed):
    "|DON| <= NOD; NOD linear in the step; entropy minus loss; in parts as a whole."
    rng = torch.Generator().manual_seed(seed)
    h = torch.randn(b, t, d, generator=rng, dtype=torch.float64)
    w = torch.randn(v, d, generator=rng, dtype=torch.float64)
    bias = torch.randn(v, generator=rng, dtype=torch.float64)
    y = torch.randint(0, v, (b, t), generator=rng)
    one, two = (don_nod_from_hidden(h, y, w, lr, bias) for lr in (0.1, 0.2))
    assert (one.nod >= 0).all() and (one.don.abs() <= one.nod * (1 + 1e-9) + 1e-12).all()
    close(two.nod, 2 * one.nod, 1e-9)
    close(don_nod_from_hidden(h, y, w, 0.1, bias, max_elements=most), one, 1e-7, 1e-12)
    small = don_nod_from_hidden(h, y, w, 1e-9)
    entropy = torch.distributions.Categorical(logits=h @ w.T).entropy().mean(1)
    close(small.don / 1e-9 * w.norm(), entropy - small.loss, 1e-5, 1e-5)


def test_bias_is_part_of_the_probabilities_but_not_of_the_weight():
    torch.manual_seed(0)
    layer, y = nn.Linear(6, 5).double(), torch.tensor([0, 1, 2, 3])
    x = torch.randn(4, 6).double()
    found = don_nod_scores(layer, (x, y), lr=0.3, closed_form=True)
    for i in range(4):
        don, nod, _ = don_nod_step(
            layer, lambda m, i=i: nn.functional.cross_entropy(m(x[i : i + 1]), y[i : i + 1]),
            [layer.weight], lr=0.3)
        assert math.isclose(found.don[i], don, rel_tol=1e-9)
        assert math.isclose(found.nod[i], nod, rel_tol=1e-10)


# ------------------------------------------------------------------ labels and batches


def bert(kind):
    from transformers import BertConfig

    torch.manual_seed(0)
    return kind(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
                           num_attention_heads=2, intermediate_size=16, num_labels=4)).eval()


def own_losses(model, batch):
    n = len(batch["labels"])
    return torch.stack([model(**{k: v[i : i + 1] for k, v in batch.items()}).loss
                        for i in range(n)]).double()


def test_long_sums_in_pieces():
    "A large vocabulary and few short answers: the products of errors are added up in pieces."
    rng = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((2, 3, 8), (1700, 8)))
    y = torch.randint(0, 1700, (2, 3), generator=rng)
    whole = don_nod_from_hidden(h, y, w, 0.1)  # three pieces of 512 columns, and the rest
    close(don_nod_from_hidden(h, y, w, 0.1, max_elements=6 * 500), whole, 1e-9, 1e-15)
    many = don_nod_from_hidden(h.repeat(40, 1, 1), y.repeat(40, 1), w, 0.1)  # at once
    close([x[:2] for x in many], whole, 1e-9, 1e-15)


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertForMaskedLM",
                                  "BertForSequenceClassification"])
def test_labels_of_other_models_are_not_shifted(name, closed_form):
    import transformers

    model, rng = bert(getattr(transformers, name)), torch.Generator().manual_seed(0)
    ids, mask = torch.randint(3, 50, (3, 9), generator=rng), torch.ones(3, 9, dtype=torch.long)
    labels = torch.randint(0, 4, (3, 9), generator=rng)
    mask[1, 5:] = 0
    labels[1, 5:] = -100
    if "Sequence" in name:
        labels = labels[:, 0]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = don_nod_scores(model, [batch], closed_form=closed_form)
    close(found.loss, own_losses(model, batch), 1e-5, 1e-6)


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("ready", [True, False])
def test_t5(closed_form, ready):
    import transformers

    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0, tie_word_embeddings=False)).eval()
    ids, labels = torch.randint(3, 50, (2, 9)), torch.randint(3, 50, (2, 6))
    batch = {"input_ids": ids, "labels": labels}
    if ready:
        batch["decoder_input_ids"] = model._shift_right(labels)
    found = don_nod_scores(model, [batch], closed_form=closed_form)
    close(found.loss, own_losses(model, {"input_ids": ids, "labels": labels}), 1e-4, 1e-5)


@pytest.mark.parametrize("label", [-1, 50])
@pytest.mark.parametrize("options", [{}, {"closed_form": False}, {"mode": "trajectory"}])
def test_a_label_that_is_no_class_is_refused(label, options):
    bad, model = batches(), language_model()
    before = copy.deepcopy(model.state_dict())
    bad[1]["labels"][0, 5] = label
    with pytest.raises(ValueError, match=f"label {label} is no class: .* 0 to 49"):
        don_nod_scores(model, bad, **options)
    close(model.state_dict(), before, 0, 0)


def test_labels_that_do_not_fit_the_logits_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        don_nod_scores(nn.Linear(6, 4), (torch.ones(2, 6), torch.zeros(2, 3).long()),
                       closed_form=False)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_trajectory_takes_batches_apart(drop_last):
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
    net = nn.Linear(6, 4)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, drop_last=drop_last)
    n = 6 if drop_last else 8
    found = don_nod_scores(net, loader, mode="trajectory", lr=0.1)
    close(found, don_nod_scores(net, (x[:n], y[:n]), mode="trajectory", lr=0.1))
    assert len(found.don) == n
    dicts = don_nod_scores(language_model(), batches(), mode="trajectory", lr=0.1)
    close(dicts, don_nod_scores(language_model(), batches(size=1), mode="trajectory", lr=0.1))


def test_padding_on_the_left_of_the_general_path():
    ids = torch.randint(1, 50, (1, 6), generator=torch.Generator().manual_seed(0))
    pad, none = torch.zeros(1, 3, dtype=torch.long), torch.full((1, 3), -100)
    one = torch.ones_like(ids)
    plain = {"input_ids": ids, "labels": ids, "attention_mask": one}
    padded = {"input_ids": torch.cat([pad, ids], 1), "labels": torch.cat([none, ids], 1),
              "attention_mask": torch.cat([pad, one], 1)}
    model = language_model().double()
    a, b = (don_nod_scores(model, [x], closed_form=False) for x in (plain, padded))
    close(a.nod, b.nod, 1e-3)


# ------------------------------------------------------------------ the model, and the data


@pytest.mark.parametrize("mode, closed_form", [
    ("independent", "auto"), ("independent", False), ("trajectory", "auto")])
def test_scoring_leaves_the_model_as_it_was(mode, closed_form):
    model = language_model(tie=True)
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(16)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    don_nod_scores(model, batches(), mode=mode, closed_form=closed_form)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]


def test_batched_equals_one_by_one_and_order_does_not_matter():
    model = language_model()
    alone = don_nod_scores(model, batches(size=1))
    close(don_nod_scores(model, batches(size=6)), alone)
    backwards = don_nod_scores(model, batches(size=1)[::-1])
    close(type(alone)(*(t.flip(0) for t in backwards)), alone)


def test_several_layers_are_summed():
    torch.manual_seed(0)
    mlp, x, y = recipes.MLP((6, 9, 4)).double(), torch.randn(5, 6).double(), torch.arange(5) % 4
    found = don_nod_scores(mlp, (x, y), layer=["layers.0", "head"], lr=0.1)
    for i in range(5):
        one = don_nod_step(mlp, lambda m, i=i: nn.functional.cross_entropy(m(x[i : i + 1]),
                                                                           y[i : i + 1]),
                           [mlp.layers[0].weight, mlp.head.weight], lr=0.1)
        np.testing.assert_allclose([v[i] for v in (found.don, found.nod, found.loss)], one, 1e-6)
    model, names = language_model(), ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]
    both = don_nod_scores(model, batches(), layer=names)
    first, second = (don_nod_scores(model, batches(), layer=n) for n in names)
    close(both.don, first.don + second.don)
    close(both.nod, torch.hypot(first.nod, second.nod))


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
    literal = don_nod_step(model, lambda m: nn.functional.cross_entropy(m(x[:1]), y[:1]),
                           [model.head.weight], lr=1e-3)
    assert math.isclose(found.nod[0], literal[1], rel_tol=1e-4)
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
    assert len(found.don) == 30 and most <= 2


def rows_and_model(n):
    torch.manual_seed(0)
    rows = [{"prompt": f"{i} plus {i} is", "response": f" {2 * i}"} for i in range(n)]
    tokenizer = recipes.byte_tokenizer()
    model = recipes.tiny_llama(vocab_size=260, hidden_size=16, layers=1, heads=2, kv_heads=1)
    return rows, model, tokenizer


def test_trajectory_reads_texts_row_by_row():
    rows, model, tokenizer = rows_and_model(7)
    asked = []

    class OnDisk:
        def __len__(self):
            return len(rows)

        def __getitem__(self, i):
            asked.append(i)
            return rows[i]

    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(len(asked)))
    found = don_nod_scores(model, OnDisk(), tokenizer, mode="trajectory", lr=0.1)
    assert seen == list(range(1, 8)) and asked != sorted(asked) and sorted(asked) == list(range(7))
    close(found, don_nod_scores(model, iter(rows), tokenizer, mode="trajectory", lr=0.1))


def test_rows_of_a_dataset_are_scored_and_selected(tmp_path):
    rows, model, tokenizer = rows_and_model(9)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    on_disk = data.load(tmp_path / "rows.jsonl", split="train")
    pruner = DonodPruner(keep=0.3).fit(model, on_disk, tokenizer=tokenizer)
    kept = on_disk.select(pruner.select())
    assert len(kept) == 3 and kept[0]["prompt"] == rows[pruner.closeness.argmax()]["prompt"]
    table = pd.DataFrame({k: v.numpy() for k, v in pruner.scores._asdict().items()})
    assert (DonodPruner(0.3).rank(table).select() == pruner.select()).all()


def test_the_closed_form_never_holds_more_logits_than_it_may():
    h, w = torch.randn(2, 64, 32), torch.randn(8000, 32)
    y = torch.randint(0, 8000, (2, 64))
    whole, parts = (peak_memory(lambda n=n: don_nod_from_hidden(h, y, w, 0.1, max_elements=n),
                                "cpu") for n in (2 * 64 * 8000, 64 * 500))
    assert parts < whole / 5  # a sample's 64 x 8000 would be half of it


def test_don_turns_where_the_second_term_grows():
    "A large step makes W longer for wrong labels; NOD keeps its order."
    rng = torch.Generator().manual_seed(0)
    h, w = torch.randn(50, 8, generator=rng), torch.randn(10, 8, generator=rng)
    z = h @ w.T
    small, large = (don_nod_from_hidden(h, z.argmin(1), w, lr) for lr in (1e-4, 10.0))
    assert (small.don < 0).all() and (large.don > 0).all()
    assert torch.equal(small.nod.argsort(), large.nod.argsort())


def test_half_precision_is_scored_in_single():
    model = language_model()
    single = don_nod_scores(model, batches())
    for dtype in (torch.bfloat16, torch.float16):
        half = don_nod_scores(copy.deepcopy(model).to(dtype), batches())
        close(half.nod, single.nod, rtol=0.02)
        close(half.don, single.don, rtol=0.2, atol=2e-5)


def test_a_wrapped_output_layer_is_scored_by_its_base_weight():
    peft = pytest.importorskip("peft")
    plain = don_nod_scores(language_model(), batches())
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(language_model(), config)
    assert output_layer(wrapped)[0].endswith("lm_head.base_layer")
    with pytest.raises(ValueError, match="closed_form=True"):  # the LoRA changes the logits
        don_nod_scores(wrapped, batches(), closed_form=True)
    assert not torch.allclose(don_nod_scores(wrapped, batches()).loss, plain.loss)
    with wrapped.disable_adapter():
        close(don_nod_scores(wrapped, batches(), closed_form=True), plain)


def test_trajectory_with_a_tiny_step_ranks_like_independent():
    still = don_nod_scores(language_model(), batches(), lr=1e-7)
    moving = don_nod_scores(language_model(), batches(), lr=1e-7, mode="trajectory")
    close(moving.nod, still.nod, rtol=1e-3)
    assert torch.equal(moving.don.argsort(), still.don.argsort())


# ------------------------------------------------------------------ the ranking


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2)])
def test_topsis_agrees_with_pymcdm(weights):
    from pymcdm.methods import TOPSIS
    from pymcdm.normalizations import vector_normalization

    rng = np.random.default_rng(0)
    for m in (rng.uniform(0.1, 2, (40, 2)), rng.normal(size=(30, 2))):
        theirs = TOPSIS(normalization_function=vector_normalization)
        expected = theirs(m, np.array(weights), np.array([1, -1]))
        np.testing.assert_allclose(topsis(m, weights), expected, rtol=1e-9)
        order = rng.permutation(len(m))
        np.testing.assert_allclose(topsis(m[order]), topsis(m)[order])


@pytest.mark.parametrize("normalization", ["vector", "minmax", "zscore"])
def test_every_normalisation_knows_the_best_and_the_worst(normalization):
    m = np.random.default_rng(0).normal(size=(20, 2))
    m[3], m[7] = (9, -9), (-9, 9)
    closeness = topsis(m, normalization=normalization)
    assert closeness.argmax() == 3 and closeness.argmin() == 7


def test_a_constant_column_counts_as_zero():
    with pytest.warns(UserWarning, match="cannot tell"):
        found = topsis([[1.0, 2], [3, 2]], normalization="minmax")
    assert found.tolist() == [0, 1]


@pytest.mark.parametrize("keep, n, kept", [(0.3, 10, 3), (0.3, 11, 4), (1.0, 7, 7), (0.01, 5, 1)])
def test_how_many_are_kept(keep, n, kept):
    table = pd.DataFrame({"don": np.arange(n) / 10, "nod": np.ones(n)})
    assert len(DonodPruner(keep).rank(table).select()) == kept


@pytest.mark.parametrize("call, words", [
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
    (lambda: don_nod_scores(language_model(), [], mode="trajectory"), "empty"),
    (lambda: don_nod_scores(language_model(), batches(), lr=0), "positive"),
    (lambda: don_nod_scores(language_model(), batches(), mode="sideways"), "mode"),
    (lambda: don_nod_scores(language_model(), batches(), layer="no_such"), "no_such"),
    (lambda: don_nod_from_hidden(torch.ones(2, 3), torch.zeros(2).long(), torch.ones(4, 5), 1.0),
     "do not fit"),
    (lambda: don_nod_from_hidden(torch.full((1, 3), math.nan), torch.zeros(1).long(),
                                 torch.ones(4, 3), 1.0), "NaN"),
    (lambda: output_layer(nn.Sequential(nn.ReLU())), "layer="),
    (lambda: don_nod_scores(nn.Linear(3, 4), (torch.ones(0, 3), torch.zeros(0).long())), "empty"),
    (lambda: don_nod_scores(nn.Linear(3, 4), (torch.ones(2, 3), torch.zeros(2))), "whole numbers"),
    (lambda: don_nod_from_hidden(torch.ones(1, 3), torch.zeros(1).long(), torch.ones(4, 3), 1.0,
                                 torch.ones(1)), "one number per row"),  # would be broadcast
    (lambda: don_nod_step(net := nn.Linear(3, 4), lambda m: m(torch.ones(3)), [net.weight], 1.0),
     "one number, is needed"),
])
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("data", [[torch.ones(2, 3), torch.zeros(2).long()], torch.ones(2, 3),
                                  ["a text without a tokenizer"]])
def test_data_that_are_no_batches_are_refused(data):
    with pytest.raises(TypeError, match="tuple"):
        don_nod_scores(nn.Linear(3, 4), data)


@pytest.mark.parametrize("options", [{}, {"closed_form": False}, {"mode": "trajectory"}])
def test_a_sample_without_answer_is_refused(options):
    bad = batches()
    bad[0]["labels"][2] = -100
    with pytest.raises(ValueError, match="answer token"):
        don_nod_scores(language_model(), bad, **options)


# ------------------------------------------------------------------ the experiment


def toy():
    torch.manual_seed(0)
    tokenizer = recipes.byte_tokenizer()
    return recipes.tiny_llama(vocab_size=len(tokenizer), hidden_size=16, layers=2, heads=2,
                              kv_heads=1), tokenizer


def test_one_seed_does_not_crash_and_resume_repeats_nothing(tmp_path, monkeypatch):
    cfg = SMALL.replace(tracks=("digits",), seeds=(0,), budgets=(0.7,), shorter=(0.5,),
                        turns=(0.0, 90.0), digits=Training(steps=3, lr=0.02))
    report = told.experiment(cfg, start_run("donod", cfg, root=tmp_path))
    assert {c.verdict for c in report.claims} == {"not decided at this scale"}
    monkeypatch.setattr(told.Training, "fit", None)  # a resumed run trains nothing again
    again = told.experiment(cfg, start_run("donod", cfg, root=tmp_path, resume=True))
    assert str(again.claims) == str(report.claims)


def test_resume_repeats_only_the_seed_that_is_missing(tmp_path, monkeypatch):
    cfg = SMALL.replace(tracks=("digits",), seeds=(0, 1), budgets=(0.7,), shorter=(0.5,),
                        turns=(0.0,), digits=Training(steps=2, lr=0.02))
    fit, seeds = Training.fit, []

    def until_seed_1(self, *args, **more):
        seeds.append(more["seed"])
        if seeds.count(1) == 3:
            raise KeyboardInterrupt
        return fit(self, *args, **more)

    monkeypatch.setattr(told.Training, "fit", until_seed_1)
    with pytest.raises(KeyboardInterrupt):
        told.experiment(cfg, start_run("donod", cfg, root=tmp_path))
    first = seeds.count(0)
    report = told.experiment(cfg, start_run("donod", cfg, root=tmp_path, resume=True))
    assert set(report.tables["digits"]["seed"]) == {0, 1}
    assert seeds.count(0) == first
    assert seeds.count(1) == first + 1  # the one cut short


def test_full_scale_path(recorded, tmp_path, monkeypatch):
    "The data as on the hub; a tiny model of the same architecture in place of the large one."
    monkeypatch.setattr(told.models, "load", lambda *a, **k: toy())
    cfg = FULL.replace(seeds=(0,), n_train=8, n_test=2, max_new_tokens=3, language=Training(
        steps=2, batch_size=2, lr=1e-3), subsets=("all", "DONOD"))
    report = launch("donod", cfg, root=tmp_path)
    assert "openai/gsm8k@main#test" in recorded.asked
    assert schemas.rows("openai/gsm8k@main#train") * 0.3 * 3 / 32 == pytest.approx(
        FULL.language.steps, abs=1)
    table = report.tables["language"]
    assert list(table["method"]) == ["before", "all", "DONOD"]
    assert table[["new nats", "old nats", "new right"]].notna().all(axis=None)
    assert not report.tables["scores"]["wrong"].any()


def test_subsets():
    pairs = Pairs.load("cldr_territories")
    scores = don_nod_scores(*(lambda m, t: (m, pairs[:10], t))(*toy()))
    subsets = choose_subsets(scores, 0.3, seed=0)
    assert all(len(rows) == 3 for name, rows in subsets.items() if not name.startswith("all"))
    wrong = torch.arange(10) < 4
    right = choose_subsets(scores, 0.3, 0, wrong)
    assert sorted(right["all right labels"]) == [4, 5, 6, 7, 8, 9]
    assert not wrong[right["random right labels"]].any()
    with pytest.raises(ValueError, match="keep"):
        SMALL.replace(keep=0)
