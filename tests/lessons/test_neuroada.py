"""NeuroAda: selection, the sparse forward and backward, life cycle, and the full-scale path."""

import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptlab import adapter_files, adapters, evaluate, recipes
from adaptlab.bench.runs import launch, start_run
from adaptlab.bench.testbeds import Pairs, questions
from adaptlab.experiments import neuroada as told
from adaptlab.experiments.neuroada import FULL, PAPER_RUNS, SMALL, experiment, wrap_masked
from adaptlab.sparse import neuroada
from adaptlab.sparse.neuroada import (
    NeuroAda,
    NeuroAdaConfig,
    NeuroAdaLinear,
    Selection,
    choose_positions,
    count_trainable,
    gradient_scores,
    neuroada_linear,
    select_topk,
)
from adaptlab.train import Training

RULES = Selection.__args__


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


def config(**options):
    return NeuroAdaConfig(target_modules=("0", "2"), **options)


def square(model, x):
    return model(x).square().mean()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_topk_has_distinct_largest_columns(d_out, d_in, k, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-3, 4, (d_out, d_in), generator=generator).float()  # many ties
    k = min(k, d_in)
    found = select_topk(w, k)
    order = w.abs().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    assert torch.equal(found, order)  # ties: lower column first
    smallest = select_topk(w, k, "reverse")
    reverse = w.abs().sort(dim=1, stable=True).indices[:, :k].sort(1).values
    assert torch.equal(smallest, reverse)


@pytest.mark.parametrize("impl", ["gather", "materialize"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_gradients_are_the_dense_ones_at_the_positions(impl, k):
    torch.manual_seed(k)
    w, b = torch.randn(5, 6).double(), torch.randn(5).double()
    x = torch.randn(2, 3, 6).double().requires_grad_()
    idx = select_topk(w, k)
    theta = torch.randn(5, k).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, t: neuroada_linear(x, w, b, idx, t, impl=impl), (x, theta)
    )
    dense = w.scatter_add(1, idx, theta.detach()).requires_grad_()
    expected = torch.autograd.grad((x @ dense.T + b).square().sum(), (x, dense))
    y = neuroada_linear(x, w, b, idx, theta, impl=impl)
    found = torch.autograd.grad(y.square().sum(), (x, theta))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1].gather(1, idx))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_every_rule_in_both_implementations(rule, kind):
    x, outputs, gradients = torch.randn(7, 12), [], []
    for impl in ("gather", "materialize"):
        model = net()
        if kind == "conv1d":
            torch.manual_seed(1)
            model = nn.Sequential(Conv1D(9, 12), nn.Tanh(), Conv1D(4, 9))
        before = model(x)
        NeuroAda.wrap(model, config(k=2, selection=rule, impl=impl), [x], square)
        assert torch.equal(model(x), before)
        assert count_trainable(model)[0] == 2 * (9 + 4)
        torch.manual_seed(3)
        for p in adapters.trainable_parameters(model):
            nn.init.normal_(p)
        y = model(x)
        square(model, x).backward()
        outputs.append(y.detach())
        gradients.append([p.grad for p in adapters.trainable_parameters(model)])
        adapters.merge(model)
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
        adapters.detach(model)
        assert torch.equal(model(x), before)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("rule", RULES)
def test_budget_and_distinct_positions(rule):
    torch.manual_seed(0)
    weights = {f"h.{i}.{n}": torch.randn(6, 8) for i in range(3) for n in "ab"}
    found = choose_positions(weights, 2, rule, weights)
    total = 0
    for indices, rows in found.values():
        own = torch.arange(6) if rows is None else rows
        flat = (own[:, None] * 8 + indices).flatten()
        assert len(flat.unique()) == len(flat)
        total += len(flat)
    assert total == 2 * 6 * 6
    again = choose_positions(weights, 2, rule, weights)
    assert all(torch.equal(found[n].indices, again[n].indices) for n in found)


def test_rules_that_do_not_go_by_neurons():
    weights = {n: torch.randn(6, 8) for n in "abcd"}
    anywhere = choose_positions(weights, 2, "random_layer")
    assert {len(p.indices) for p in anywhere.values()} == {12}
    weights["d"] = weights["d"] + 100
    best = choose_positions(weights, 2, "global")
    assert list(best) == ["d"]  # all the budget goes to the layer of large weights
    everything = torch.cat([w.abs().flatten() for w in weights.values()]).topk(48).values
    flat = weights["d"].abs()[best["d"].rows, best["d"].indices[:, 0]]
    torch.testing.assert_close(flat.sort().values, everything.sort().values)


def test_gradient_selection_takes_the_largest_gradients():
    model, batches = net(), [torch.randn(4, 12) for _ in range(3)]
    scores = gradient_scores(model, {"0": model[0]}, batches, square)
    square(model, batches[0]).backward()
    once = gradient_scores(model, {"0": model[0]}, batches[:1], square)
    torch.testing.assert_close(once["0"], model[0].weight.grad.abs())
    model.zero_grad()
    expected = select_topk(model[0].weight, 2, scores["0"])
    NeuroAda.wrap(model, config(k=2, selection="gradient"), batches, square)
    assert torch.equal(adapters.adapters(model)["0"].indices.long(), expected)
    assert all(p.grad is None for p in model.parameters())


def test_only_the_bypasses_move():
    model, x = net(), torch.randn(8, 12)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    NeuroAda.wrap(model, config(impl="gather"))
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=0.1)
    for _ in range(5):
        square(model, x).backward()
        adam.step()
    for name, p in model.named_parameters():
        if name in before:
            assert torch.equal(p, before[name]) and not p.requires_grad and p.grad is None
        else:
            assert p.requires_grad and p.abs().sum() > 0


def test_bias_and_whole_modules_can_be_trained_too():
    model = net()
    NeuroAda.wrap(model, NeuroAdaConfig(target_modules=("0",), train_bias=True,
                                        modules_to_save=["2"]))  # fmt: skip
    assert count_trainable(model)[0] == 9 + 9 + 4 * 9 + 4
    no_bias = nn.Sequential(nn.Linear(3, 3, bias=False))
    with pytest.raises(ValueError, match="bias"):
        NeuroAda.wrap(no_bias, NeuroAdaConfig(target_modules=("0",), train_bias=True))


def test_all_columns_with_sgd_is_full_fine_tuning():
    x, ours, full = torch.randn(8, 12), net(), net()
    with torch.no_grad():
        for p in (full[0].bias, full[2].bias):
            p.requires_grad_(False)
    with pytest.warns(UserWarning, match="more than the 9"):
        NeuroAda.wrap(ours, config(k=12))
    for model in (ours, full):
        square(model, x).backward()
        torch.optim.SGD(adapters.trainable_parameters(model), lr=0.5).step()
    torch.testing.assert_close(ours(x), full(x))


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=0.3), torch.optim.Adam])
def test_additive_equals_masked(make):
    x, models_ = torch.randn(8, 12), [net(), net()]
    NeuroAda.wrap(models_[0], config(k=2, impl="gather"))
    masked = wrap_masked(models_[1], config(k=2))
    for model in models_:
        optimizer = make(adapters.trainable_parameters(model))
        for _ in range(10):
            optimizer.zero_grad()
            square(model, x).backward()
            optimizer.step()
    torch.testing.assert_close(models_[0](x), models_[1](x), rtol=1e-5, atol=1e-5)
    moved = models_[1][0].weight != net()[0].weight
    assert not (moved & ~masked.masks["0"]).any()
    for hook in masked.hooks:
        hook.remove()
    square(models_[1], x).backward()
    assert models_[1][0].weight.grad[~masked.masks["0"]].abs().sum() > 0


def test_state_does_not_depend_on_the_number_of_inputs():
    found = []
    for d_in in (64, 640):
        model = nn.Sequential(nn.Linear(d_in, 8))
        NeuroAda.wrap(model, NeuroAdaConfig(target_modules=("0",), k=3))
        adam = torch.optim.Adam(adapters.trainable_parameters(model))
        model(torch.randn(2, d_in)).sum().backward()
        adam.step()
        moments = [t for s in adam.state.values() for t in s.values() if t.ndim]
        trained = adapters.trainable_parameters(model)
        found.append((sum(t.nbytes for t in moments), sum(p.grad.nbytes for p in trained)))
    assert found[0] == found[1] == (2 * 4 * 3 * 8, 4 * 3 * 8)


def test_counts_of_the_paper():
    "Percent of the published models that are trained, for k = 1 and 20."
    from transformers import LlamaConfig, LlamaForCausalLM

    published = {  # hidden, intermediate, layers, heads, kv heads, vocabulary -> percent
        (4096, 11008, 32, 32, 32, 32000): [0.020, 0.404],  # LLaMA-7B
        (5120, 13824, 40, 40, 40, 32000): [0.016, 0.327],  # LLaMA-13B
        (4096, 14336, 32, 32, 8, 128256): [0.017, 0.343],  # Llama-3-8B
    }
    for (hidden, inner, depth, heads, kv, vocabulary), percents in published.items():
        llama = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1,
                            num_attention_heads=heads, num_key_value_heads=kv,
                            vocab_size=vocabulary, tie_word_embeddings=False)
        with torch.device("meta"):
            one = LlamaForCausalLM(llama)
        layers = adapters.match_layers(one, neuroada.LINEARS).values()
        neurons = depth * sum(m.out_features for m in layers)
        total, block = (adapters.count_parameters(m)[1] for m in (one, one.model.layers))
        found = [100 * k * neurons / (total + (depth - 1) * block) for k in (1, 20)]
        assert [round(p, 3) for p in found] == percents


def test_gather_never_holds_a_dense_change():
    w, x = torch.randn(1024, 1024), torch.randn(4, 1024, requires_grad=True)
    idx, theta = select_topk(w, 4), torch.zeros(1024, 4, requires_grad=True)

    def step():
        torch.autograd.grad(
            neuroada_linear(x, w, None, idx, theta, impl="gather").sum(), (x, theta)
        )

    assert evaluate.peak_memory(step, "cpu") < w.nbytes / 4


def test_permuting_the_inputs_changes_nothing():
    w, x, order = torch.randn(5, 8), torch.randn(3, 8), torch.randperm(8)
    idx, permuted = select_topk(w, 2), select_topk(w[:, order], 2)
    assert torch.equal(order[permuted].sort(1).values, idx)
    theta = torch.ones(5, 2)
    torch.testing.assert_close(
        neuroada_linear(x, w, None, idx, theta, impl="gather"),
        neuroada_linear(x[:, order], w[:, order], None, permuted, theta, impl="gather"),
    )


@pytest.mark.parametrize("rule", ["magnitude", "global"])
def test_save_and_load(rule, tmp_path):
    model, x = net(), torch.randn(3, 12)
    NeuroAda.wrap(model, config(k=2, selection=rule))
    for p in adapters.trainable_parameters(model):
        nn.init.normal_(p)
    file = adapter_files.save(model, tmp_path / "a.safetensors")
    fresh = adapter_files.load(net(), file)
    assert torch.equal(fresh(x), model(x))
    assert set(adapters.adapters(model)["0"].state_dict()) <= {"indices", "rows", "delta"}
    other = net()
    state = {n: t.clone() for n, t in other.state_dict().items()}
    import safetensors.torch as safe

    tensors = safe.load_file(file)
    with safe.safe_open(file, "pt") as f:
        header = f.metadata()
    name = next(n for n in tensors if n.endswith("indices"))
    tensors[name] = tensors[name] + 100
    safe.save_file(tensors, tmp_path / "bad.safetensors", header)
    with pytest.raises(ValueError, match="another layer"):
        adapter_files.load(other, tmp_path / "bad.safetensors")
    assert all(torch.equal(v, state[n]) for n, v in other.state_dict().items())
    assert not adapters.adapters(other)


def test_half_precision_models_keep_single_precision_bypasses():
    model = net()
    NeuroAda.wrap(model, config(k=1, impl="gather"))
    model.to(torch.bfloat16)
    assert adapters.adapters(model)["0"].delta.dtype == torch.float32
    y = model(torch.randn(3, 12, dtype=torch.bfloat16))
    y.float().square().sum().backward()
    gradient = adapters.adapters(model)["0"].delta.grad
    assert y.dtype == torch.bfloat16 and gradient.dtype == torch.float32


def test_a_share_of_the_neurons():
    llama = recipes.tiny_llama()
    NeuroAda.wrap(llama, NeuroAdaConfig(k=2, row_fraction=0.25))
    wanted = sum(2 * math.ceil(0.25 * a.out_features) for a in adapters.adapters(llama).values())
    assert count_trainable(llama)[0] == wanted


def broken():
    model = net()
    model[0].weight.data[0, 0] = math.nan
    return model


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda: NeuroAda.wrap(net(), config(k=0)), ValueError, "whole number"),
        (lambda: NeuroAda.wrap(net(), config(k=1.5)), ValueError, "whole number"),
        (lambda: NeuroAda.wrap(net(), NeuroAdaConfig()), ValueError, "layers are"),
        (lambda: NeuroAda.wrap(net(), NeuroAdaConfig(target_modules=("1",))), TypeError, "Tanh"),
        (lambda: NeuroAda.wrap(broken(), config()), ValueError, "NaN"),
        (lambda: NeuroAda.wrap(net(), config(selection="gradient")), ValueError, "needs data"),
        (lambda: NeuroAda.wrap(net(), config(selection="gradient"), []), ValueError, "empty"),
        (lambda: NeuroAda.wrap(net(), config(selection="best")), ValueError, "selection"),
        (lambda: NeuroAda.wrap(net(), config(impl="magic")), ValueError, "impl"),
        (lambda: NeuroAda.wrap(net(), config(row_fraction=0)), ValueError, "row_fraction"),
        (lambda: NeuroAdaLinear(nn.Conv2d(1, 1, 1)), TypeError, "supports"),
        (lambda: NeuroAdaLinear(nn.Embedding(3, 3)), TypeError, "supports"),
        (lambda: select_topk(torch.ones(2, 3).int(), 1), TypeError, "floating"),
        (lambda: select_topk(torch.ones(2, 3), 1, torch.ones(3, 2)), ValueError, "scores"),
        (lambda: NeuroAdaLinear(nn.Linear(3, 2), indices=torch.tensor([[0], [3]])), ValueError,
         "another layer"),
        (lambda: NeuroAdaLinear(nn.Linear(3, 2), indices=torch.tensor([[0, 0], [1, 2]])),
         ValueError, "twice"),
        (lambda: NeuroAdaLinear(nn.Linear(3, 2), indices=torch.tensor([[0], [1]]),
                                rows=torch.tensor([1, 0])), ValueError, "ascend"),
        (lambda: neuroada_linear(torch.ones(1, 4), torch.ones(2, 3), None,
                                 torch.zeros(2, 1).long(), torch.zeros(2, 1)), ValueError, "fit"),
        (lambda: neuroada_linear(torch.ones(1, 3), torch.ones(2, 3), None,
                                 torch.ones(2, 2).long(), torch.zeros(2, 2)), ValueError, "twice"),
        (lambda: neuroada_linear(torch.ones(1, 3), torch.ones(2, 3), None,
                                 torch.ones(2, 1), torch.zeros(2, 1)), TypeError, "int32"),
        (lambda: NeuroAdaLinear(nn.Linear(3, 2), indices=torch.tensor([[0.5], [1.0]])), TypeError,
         "int32"),
        (lambda: choose_positions({"a": torch.ones(2, 3)}, 1, "gradient", scores={}), ValueError,
         "scores of every layer"),
        (lambda: NeuroAda.wrap(net(), config(selection="gradient"), [
            (torch.full((4, net()[0].in_features), math.nan), torch.zeros(4).long())]),
         ValueError, "not finite"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_merging_twice_and_unmerging_first_are_refused():
    model = net()
    NeuroAda.wrap(model, config())
    with pytest.raises(ValueError, match="not merged"):
        adapters.unmerge(model)
    adapters.merge(model)
    with pytest.raises(ValueError, match="already merged"):
        adapters.merge(model)


def test_the_same_algebra_as_pefts_sparse_adapter():
    "SHiRA trains a sparse change at random positions: same outputs and gradients at its places."
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    x, theirs = torch.randn(5, 12), net()
    wrapped = peft.get_peft_model(theirs, peft.ShiraConfig(r=1, target_modules=["0", "2"]))
    ours, pairs = net(), []
    for name in ("0", "2"):
        layer = wrapped.base_model.model.get_submodule(name)
        rows, columns = layer.shira_indices["default"].long()
        torch.nn.init.normal_(layer.shira_weight["default"])
        make = partial(NeuroAdaLinear, indices=columns[:, None], rows=rows, impl="gather")
        pairs.append((name, make, layer.shira_weight["default"]))
    adapters.attach(ours, {name: make for name, make, _ in pairs})
    for name, _, values in pairs:
        adapters.adapters(ours)[name].delta.data.copy_(values.data[:, None])
    torch.testing.assert_close(ours(x), wrapped(x))
    for model in (ours, wrapped):
        square(model, x).backward()
    for name, _, values in pairs:
        found = adapters.adapters(ours)[name].delta.grad[:, 0]
        torch.testing.assert_close(found, values.grad)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(adapters.merge_and_unload(ours)(x), merged(x))


def test_a_classifier_with_its_head_trained_in_full():
    "RoBERTa, as in the paper's tasks of understanding: bypasses in the encoder, the whole head."
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    roberta = RobertaForSequenceClassification(RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=20, num_labels=3))
    head = sum(p.numel() for p in roberta.classifier.parameters())
    cfg = NeuroAdaConfig(k=2, target_modules=("query", "key", "value", "attention.output.dense"),
                         modules_to_save=("classifier",))
    NeuroAda.wrap(roberta, cfg)
    assert count_trainable(roberta)[0] == 2 * 2 * 4 * 16 + head
    batch = {"input_ids": torch.randint(3, 40, (6, 7)), "labels": torch.randint(3, (6,))}
    adam = torch.optim.AdamW(adapters.trainable_parameters(roberta), lr=1e-2)
    before = float(roberta(**batch).loss.detach())
    for _ in range(10):
        adam.zero_grad()
        roberta(**batch).loss.backward()
        adam.step()
    assert float(roberta(**batch).loss.detach()) < before


def test_a_tied_head_is_untied_by_merging_and_tied_again():
    "The output layer may share its weight with the embedding, which must not move with it."
    torch.manual_seed(0)
    llama, ids = recipes.tiny_llama(), torch.randint(0, 260, (1, 6))
    embedding = llama.model.embed_tokens.weight.detach().clone()
    NeuroAda.wrap(llama, NeuroAdaConfig(target_modules=("lm_head",)))
    torch.nn.init.normal_(adapters.adapters(llama)["lm_head"].delta)
    logits = llama(ids).logits
    adapters.merge(llama)
    torch.testing.assert_close(llama(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(llama.model.embed_tokens.weight, embedding)
    adapters.unmerge(llama)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_autocast_and_a_frozen_weight():
    model, x = net(), torch.randn(40, 12)
    NeuroAda.wrap(model, config(k=2, impl="materialize"))
    for p in adapters.trainable_parameters(model):
        nn.init.normal_(p)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapters.trainable_parameters(model))
    w = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="frozen"):
        neuroada_linear(torch.randn(2, 4), w, None, torch.zeros(3, 1).long(), torch.zeros(3, 1))


def test_auto_takes_the_way_by_the_number_of_tokens(monkeypatch):
    ways = []
    monkeypatch.setattr(neuroada, "_folded", lambda w, *rest: ways.append("dense") or w.clone())
    model = nn.Sequential(nn.Linear(64, 3))
    NeuroAda.wrap(model, NeuroAdaConfig(target_modules=("0",)))
    with torch.no_grad():
        model(torch.randn(7, 64))
        assert not ways  # 7 x 8 < 64
        model(torch.randn(8, 64))
    assert ways == ["dense"]
    w, idx = torch.randn(3, 64), torch.arange(4).expand(3, 4)  # k = 4: from 64 / 16 tokens on
    for tokens, seen in ((3, 1), (4, 2)):
        neuroada_linear(torch.randn(tokens, 64), w, None, idx, torch.zeros(3, 4))
        assert len(ways) == seen


@pytest.mark.parametrize("method", ["NeuroAda", "random", "LoRA", "masked"])
def test_measured_memory_leaves_the_model_alone(method):
    llama = recipes.tiny_llama()
    state = {n: p.clone() for n, p in llama.state_dict().items()}
    pairs = Pairs.load("capitals")
    bed = questions(pairs, pairs, 0, 4, n_train=8, model=(llama, recipes.byte_tokenizer()))
    cfg = SMALL.replace(memory_methods=(method,), skip_blocks=())
    assert told._memory(cfg, bed).iloc[0]["step MB"] > 0
    assert all(torch.equal(p, state[n]) for n, p in llama.state_dict().items())
    assert not adapters.adapters(llama) and all(p.grad is None for p in llama.parameters())
    assert not any(p._backward_hooks for p in llama.parameters())


def test_answers_are_of_the_kind_of_the_task():
    "A letter is no answer to a sum, nor a number to a choice."
    cfg, words = PAPER_RUNS["math", 1], Pairs(("q",), ("true",))
    sums, choices = Pairs(("q",), ("1200.0",)), Pairs(("q", "r"), ("B", "E"))
    assert told.reader(sums, cfg.read, cfg.read_at)("A fair guess: 3, no, 1,200. A") == "1,200."
    assert told.reader(choices, cfg.read, cfg.read_at)("It is B, since 7 is less. a") == "B"
    assert told.reader(words, FULL.read, "first")("the correct answer is True.") == "True"
    assert told.reader(words, FULL.read, "first")("I do not know") == ""
    assert evaluate.same_answer("1,200.", "1200.0")


def test_the_papers_runs_are_those_of_the_scripts():
    found = {key: (c.k, c.language_lrs[0], c.language.batch_size, c.language.warmup,
                   c.language.weight_decay, len(c.tasks)) for key, c in PAPER_RUNS.items()}
    assert found == {
        ("commonsense", 20): (20, 7e-4, 16, 0.06, 0.0, 8),
        ("commonsense", 1): (1, 8e-3, 8, 0.1, 0.0, 8),
        ("math", 20): (20, 3e-3, 8, 0.0, 0.1, 7),
        ("math", 1): (1, 9e-3, 16, 0.06, 0.0, 7),
    }


def tiny_world(folder):
    "FULL in miniature: a random Llama, a byte tokenizer, instruction files and a task."
    model = recipes.tiny_llama(vocab_size=260, hidden_size=16, layers=2, heads=2, kv_heads=1)
    model.save_pretrained(folder / "model")
    recipes.byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"is {i} even?", "output": "the correct answer is true",
             "answer": "true"} for i in range(20)]  # fmt: skip
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "boolq").mkdir()
    (folder / "boolq" / "test.json").write_text(json.dumps(rows[:4]))
    return FULL.replace(
        model=str(folder / "model"), dtype="float32", source=str(folder / "train.jsonl"),
        n_choose=4, n_test=4, max_length=200, k=2, tasks=(str(folder / "boolq" / "test.json"),),
        language=Training(epochs=1, batch_size=4, schedule="linear", warmup=0.06),
        max_new_tokens=4, device="cpu")


def test_full_scale_path_with_a_tiny_model(tmp_path):
    cfg = tiny_world(tmp_path)
    report = experiment(cfg, start_run("neuroada", cfg, "full", root=tmp_path / "runs"))
    assert report.tables["memory"]["method"].tolist() == ["NeuroAda"]
    table = report.tables["language"]
    by = table[table["part"] == "new"].groupby("method")["nats"].mean()
    assert by["NeuroAda"] < by["before"]
    assert len(table[table["part"] == cfg.tasks[0]]) == 2 * 4


def test_full_scale_path_with_two_processes(tmp_path):
    cfg, args = tiny_world(tmp_path), []
    for name in ("model", "dtype", "source", "n_choose", "n_test", "max_length", "k", "tasks",
                 "max_new_tokens", "device"):  # fmt: skip
        value = getattr(cfg, name)
        value = value[0] if isinstance(value, tuple) else value
        args += [f"--{name.replace('_', '-')}", str(value)]
    args += ["--language.epochs", "1", "--language.batch-size", "4",
             "--root", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "-m", "adaptlab", "run", "neuroada", "--scale", "full", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("report in") == 1


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    "One seed gives no verdicts and no crash; what is done is not done again."
    monkeypatch.setattr(told, "PREPARE", {k: told.PREPARE[k] for k in (
        "NeuroAda k=1", "k=1 random", "k=1 gradient", "k=1 in the layer", "global",
            "NeuroAda k=2", "NeuroAda k=4",
        "LoRA r=1", "BitFit")})
    cfg = SMALL.replace(seeds=(0,), tracks=("vision",), lrs=(3e-2,), full_lrs=(3e-3,),
                        images=(32, 32), vision=Training(steps=2, batch_size=8))
    monkeypatch.setattr(told, "_state", lambda cfg: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch("neuroada", cfg, root=tmp_path)
    monkeypatch.undo()
    tuned = []
    real = Training.fit
    monkeypatch.setattr(Training, "fit", lambda *a, **k: tuned.append(a) or real(*a, **k))
    report = launch("neuroada", cfg, root=tmp_path, resume=True)
    assert len(tuned) == 1  # "full" was not there the first time
    decided = [c.verdict for c in report.claims if c.unit == "points"]
    assert decided == ["not decided at this scale"] * 8


def test_small_settings_compare_equal_counts():
    from transformers import LlamaConfig, LlamaForCausalLM

    smol = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                       num_attention_heads=9, num_key_value_heads=3, vocab_size=49152)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(smol)
    ours = sum(m.out_features for m in adapters.match_layers(model, neuroada.LINEARS).values())
    lora = adapters.match_layers(model, SMALL.lora_layers).values()
    assert ours == sum(m.in_features + m.out_features for m in lora)


def test_module_is_the_one_of_the_catalogue():
    from adaptlab import catalog

    assert catalog.find("neuroada").module == neuroada.__name__
