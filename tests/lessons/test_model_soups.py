"""Model soups: what must hold, what must be refused, and the full-scale path on tiny models."""

import copy
import gc
import json
import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from adaptlab import adapters, recipes
from adaptlab.arithmetic.model_soups import (
    LearnedSoup,
    angle,
    greedy_soup,
    interpolate,
    interpolation_advantage,
    logit_ensemble,
    recalibrate_batchnorm,
    soup_ensemble_gap,
    uniform_soup,
)

from adaptlab.bench.report import Report
from adaptlab.bench.runs import launch
from adaptlab.evaluate import peak_memory
from adaptlab.experiments import model_soups as lab
from adaptlab.experiments.model_soups import FULL, SMALL


def family(k, spread=0.1, sizes=(8, 16, 3), seed=0):
    "Networks around a common centre, and the centre."
    torch.manual_seed(seed)
    start = recipes.MLP(sizes).eval()
    copies = [copy.deepcopy(start) for _ in range(k)]
    for model in copies:
        for p in model.parameters():
            p.data += spread * torch.randn_like(p)
    return start, copies


START, COPIES = family(5)
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(2))


def accuracy(model):
    return float((model(X).argmax(1) == Y).float().mean())


# ------------------------------------------------------------------ uniform soups


@given(
    k=st.integers(1, 5),
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_uniform_is_the_mean(k, shape, dtype, seed) -> None:
    "Property 1, 2, 8: stack and mean, whatever the order; one model is itself, bit for bit."
    torch.manual_seed(seed)
    states = [{"w": torch.randn(shape).to(dtype), "n": torch.tensor(3)} for _ in range(k)]
    wide = torch.promote_types(dtype, torch.float32)
    mean = torch.stack([s["w"].to(wide) for s in states]).mean(0)
    soup = uniform_soup(states)
    assert soup["w"].dtype == dtype and soup["n"] == 3
    torch.testing.assert_close(soup["w"], mean.to(dtype))  # within the rounding of the dtype
    torch.testing.assert_close(uniform_soup(states[::-1]), soup)
    assert torch.equal(uniform_soup(states[:1])["w"], states[0]["w"])
    torch.testing.assert_close(uniform_soup(states[:1] * 4)["w"], states[0]["w"])


def test_averaged_model_agrees() -> None:
    "Property 2: torch's own running average, updated once per model, BatchNorm included."
    torch.manual_seed(0)
    nets = [recipes.SmallCNN(channels=(4, 8)) for _ in range(4)]
    for net in nets:
        net.train()(torch.rand(8, 1, 8, 8))
    reference = AveragedModel(nets[0], use_buffers=True)
    for net in nets:
        reference.update_parameters(net)
    soup = uniform_soup(nets)
    for key, value in reference.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(soup[key], value)


def test_weights_dtype_and_ties() -> None:
    soup = uniform_soup(COPIES[:2], weights=[0.25, 0.75])
    a, b = (m.head.weight for m in COPIES[:2])
    torch.testing.assert_close(soup["head.weight"], 0.25 * a + 0.75 * b)
    halves = [{k: v.bfloat16() for k, v in m.state_dict().items()} for m in COPIES]
    wide = uniform_soup(halves, dtype=torch.float32)["head.weight"]
    exact = torch.stack([h["head.weight"].float() for h in halves]).mean(0)
    torch.testing.assert_close(wide, exact)  # not rounded to bfloat16 on the way
    tied = torch.randn(3)
    double = 2 * tied
    soup = uniform_soup([{"a": tied, "b": tied}, {"a": double, "b": double}])
    torch.testing.assert_close(soup["a"], 1.5 * tied)
    assert soup["a"] is soup["b"]  # still tied


def test_permuted_units_spoil_the_soup() -> None:
    "Property 8, second half."
    shuffled, order = copy.deepcopy(COPIES[0]), torch.randperm(16)
    shuffled.layers[0].weight.data = shuffled.layers[0].weight[order]
    shuffled.layers[0].bias.data = shuffled.layers[0].bias[order]
    shuffled.head.weight.data = shuffled.head.weight[:, order]
    torch.testing.assert_close(shuffled(X), COPIES[0](X))
    soup, other = uniform_soup(COPIES), uniform_soup([shuffled, *COPIES[1:]])
    assert not torch.allclose(soup["head.weight"], other["head.weight"], atol=1e-3)


# ------------------------------------------------------------------ greedy soups


@given(scores=st.lists(st.integers(0, 6), min_size=1, max_size=7), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_greedy_rules(scores, seed) -> None:
    "Properties 3, 4, 5 with arbitrary scores, ties included."
    k, rng, calls = len(scores), np.random.default_rng(seed), []
    states = [{"w": torch.tensor([float(i)], dtype=torch.float64)} for i in range(k)]

    def score(state):
        calls.append(float(state["w"]))
        return scores[len(calls) - 1] if len(calls) <= k else float(rng.integers(0, 8))

    found = greedy_soup(states, score)
    order = sorted(range(k), key=lambda i: -scores[i])
    assert len(calls) == 2 * k - 1
    assert found.scores == scores and found.score >= max(scores)
    assert found.ingredients[0] == order[0]
    assert found.ingredients == [i for i in order if i in found.ingredients]
    assert float(found.state_dict["w"]) == pytest.approx(np.mean(found.ingredients))
    assert len(found.history) == k


def test_greedy_returns_the_best_unchanged() -> None:
    "Property 5: when every addition hurts."
    found = greedy_soup(COPIES, lambda m: -1.0, scores=[1, 3, 2, 0, 0])
    assert found.ingredients == [1] and found.score == 3
    mine = {v.data_ptr() for v in COPIES[1].state_dict().values()}
    assert not mine & {v.data_ptr() for v in found.state_dict.values()}  # a copy, not the model
    assert all(torch.equal(v, COPIES[1].state_dict()[k]) for k, v in found.state_dict.items())


def test_the_bar_is_the_soups_last_score() -> None:
    "Not the best single model's; with `order`, the first score is that of its first model."
    trials = iter([5.0, 4.0, 5.0])
    found = greedy_soup(COPIES[:4], lambda s: next(trials), scores=[3, 2, 1, 0])
    assert found.ingredients == [0, 1, 3] and found.score == 5
    assert [t.accepted for t in found.history] == [True, True, False, True]
    trials = iter([2.5, 2.0])
    found = greedy_soup(COPIES[:3], lambda s: next(trials), scores=[3, 2, 1], order=[1, 0, 2])
    assert found.ingredients == [1, 0] and found.score == 2.5


def test_greedy_ties_order_and_kinds(tmp_path) -> None:
    "Both tie rules; modules, dicts, files, folders and functions; the model is only lent."
    same = [COPIES[0].state_dict()] * 3
    assert greedy_soup(same, lambda s: 1).ingredients == [0, 1, 2]
    assert greedy_soup(same, lambda s: 1, tie="reject").ingredients == [0]
    assert greedy_soup(same, lambda s: 1, order=[2, 0, 1]).ingredients == [2, 0, 1]
    save_file(COPIES[1].state_dict(), tmp_path / "one.safetensors")
    (tmp_path / "folder").mkdir()
    save_file(COPIES[2].state_dict(), tmp_path / "folder" / "model.safetensors")
    mixed = [COPIES[0], str(tmp_path / "one.safetensors"), tmp_path / "folder",
             lambda: COPIES[3].state_dict(), COPIES[4].state_dict()]
    host = copy.deepcopy(START).train()
    before = {k: v.clone() for k, v in host.state_dict().items()}
    parameters = [id(p) for p in host.parameters()]
    found = greedy_soup(mixed, accuracy, host)
    assert found.scores == greedy_soup(COPIES, accuracy, host).scores
    assert host.training and parameters == [id(p) for p in host.parameters()]
    assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())


def test_greedy_in_half_precision_adds_in_float32() -> None:
    "Twenty bfloat16 models: the running mean is as good as the mean of all at once."
    torch.manual_seed(0)
    states = [{"w": torch.randn(100).bfloat16()} for _ in range(20)]
    found = greedy_soup(states, lambda s: 0.0)
    exact = torch.stack([s["w"].float() for s in states]).mean(0).bfloat16()
    assert len(found.ingredients) == 20 and found.state_dict["w"].dtype == torch.bfloat16
    assert (found.state_dict["w"] != exact).float().mean() < 0.1  # rounding of the last bit only
    torch.testing.assert_close(found.state_dict["w"].float(), exact.float(), atol=2e-3, rtol=8e-3)


def test_greedy_keeps_few_models_in_memory(tmp_path) -> None:
    "Files and functions are read when their turn comes, and freed at once, not by the collector."
    reads, k, size = [], 5, 2_000_000
    for i in range(k):
        save_file({"w": torch.randn(size)}, tmp_path / f"{i}.safetensors")

    def loads(i):
        reads.append(i)
        return load_file(tmp_path / f"{i}.safetensors")

    paths = [tmp_path / f"{i}.safetensors" for i in range(k)]
    functions = [partial(loads, i) for i in range(k)]
    gc.collect()
    gc.disable()
    try:
        for candidates in (paths, functions):  # mean, trial, and the candidate (a file: mapped)
            for accept in (0.0, -1.0):  # all are accepted; none is
                scores = iter([*[0.0] * k, *[accept] * k])
                peak = peak_memory(lambda c=candidates, s=scores: greedy_soup(
                    c, lambda state: next(s)), "cpu")
                assert peak < 3.5 * 4 * size
    finally:
        gc.enable()
    assert len(reads) == 2 * 2 * k  # to score each alone, and to add it


def test_tied_weights_stay_tied() -> None:
    "Property 10, on a language model whose output layer is its embedding."
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    nets = [transformers.LlamaForCausalLM(config).eval() for _ in range(3)]
    ids = torch.randint(31, (2, 5))
    found = greedy_soup(nets, lambda m: float(m(ids).logits.sum()) * 0, nets[0])
    assert nets[0].lm_head.weight is nets[0].model.embed_tokens.weight
    key = "lm_head.weight"
    assert found.state_dict[key] is found.state_dict["model.embed_tokens.weight"]
    pot = LearnedSoup(nets[0], nets)
    torch.testing.assert_close(pot.to_state_dict()[key], uniform_soup(nets)[key])
    host = copy.deepcopy(nets[0])
    host.load_state_dict(uniform_soup(nets))
    torch.testing.assert_close(pot(ids), host(ids).logits)
    assert pot.raw.shape[0] == len(list(nets[0].parameters()))  # a tied tensor has one row


def test_tied_checkpoint_folder(tmp_path) -> None:
    "A folder of transformers stores a tied tensor once; it is still a candidate."
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)
    nets = [transformers.LlamaForCausalLM(config).eval() for _ in range(2)]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
    paths = [tmp_path / "0", tmp_path / "1"]
    found = greedy_soup(paths, lambda m: 0.0, nets[0])
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(found.state_dict[name], uniform_soup(nets)[name])
    torch.testing.assert_close(LearnedSoup(nets[0], paths).to_state_dict()[name],
                               uniform_soup(nets)[name])


# ------------------------------------------------------------------ learned soups


@pytest.mark.parametrize("per", ["tensor", "model", [r"^layers\.", r"."]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_learned_soup(per, dtype) -> None:
    "Property 7, in every grouping and precision."
    nets = [copy.deepcopy(m).to(dtype) for m in COPIES]
    held = [{k: v.clone() for k, v in m.state_dict().items()} for m in nets]
    pot = LearnedSoup(copy.deepcopy(START).to(dtype), nets, per)
    rows = {"tensor": 4, "model": 1}.get(per if isinstance(per, str) else "", 2)
    assert sum(p.numel() for p in pot.parameters()) == rows * 5 + 1
    torch.testing.assert_close(pot.to_state_dict(), uniform_soup(nets))
    x, before = X.to(dtype), None
    for _ in range(2):
        before = before or F.cross_entropy(pot(x).float(), Y).item()
        pot.fit((x, Y), epochs=30, batch_size=40)
    assert pot.raw.abs().max() > 0.1 and abs(pot.beta - 1) > 0.1  # both are trained
    alpha = pot.alpha()
    assert float(alpha.detach().min()) >= 0
    torch.testing.assert_close(alpha.sum(1), torch.ones_like(alpha.sum(1)))
    assert F.cross_entropy(pot(x).float(), Y).item() < before
    assert all(torch.equal(m.state_dict()[k], v)
               for m, s in zip(nets, held, strict=True) for k, v in s.items())
    host = copy.deepcopy(START).to(dtype)
    host.load_state_dict(pot.to_state_dict())
    torch.testing.assert_close(pot(x).float(), (pot.beta.to(dtype) * host(x)).float(),
                               atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_learned_soup_gradient() -> None:
    "Property 7: finite differences; one model leaves only β to learn; α can stay elsewhere."
    x = X.double()

    def loss(raw, beta):
        logits = torch.func.functional_call(pot, {"raw": raw, "beta": beta}, x)
        return F.cross_entropy(logits, Y)

    pot = LearnedSoup(copy.deepcopy(START), COPIES[:3]).double()
    assert START.head.weight.dtype == torch.float32  # only the soup was cast
    raw = torch.randn_like(pot.raw).requires_grad_()
    assert torch.autograd.gradcheck(loss, (raw, pot.beta))
    far = LearnedSoup(START, COPIES[:3], stack_device="cpu")
    torch.testing.assert_close(far(X), LearnedSoup(START, COPIES[:3])(X))
    with torch.autocast("cpu", torch.bfloat16):  # the network runs in bfloat16, not the sum
        mixed, logits = far.to_state_dict(), far(X)
        torch.testing.assert_close(logits, torch.func.functional_call(START, mixed, X))
    assert all(torch.equal(v, mixed[k]) for k, v in far.to_state_dict().items())
    single = LearnedSoup(START, COPIES[:1])
    F.cross_entropy(single(X), Y).backward()
    assert single.raw.grad.abs().max() == 0 and single.beta.grad.abs() > 0


class Rotary(nn.Module):
    "A network with a buffer that no state dict holds, dropout, and tied layers."

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("angles", torch.arange(8.0), persistent=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.second(self.dropout(self.first(x) * self.angles.cos()))


def test_the_template_stays_the_users() -> None:
    "Casts and training of the soup do not reach the model; its weights are not held."
    torch.manual_seed(0)
    model = Rotary().train()
    states = [{k: torch.randn_like(v) for k, v in model.state_dict().items()} for _ in range(2)]
    for state in states:
        state["second.weight"] = state["first.weight"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pot = LearnedSoup(model, states).double()
    assert model.training and model.first.weight.dtype == model.angles.dtype == torch.float32
    assert pot(X.double()).dtype == torch.float64
    host = Rotary().eval()
    host.load_state_dict(uniform_soup(states))
    torch.testing.assert_close(pot(X.double()).float(), host(X), atol=1e-5, rtol=1e-5)
    pot.fit((X.double(), Y), epochs=2, batch_size=40)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    held = [p for m in pot._skeleton[0].modules() for p in m._parameters.values()]
    assert all(p is None or p.is_meta for p in held)
    assert pot.raw.shape == (3, 2)  # the tied weight, and two biases
    assert pot._skeleton[0].first.weight is pot._skeleton[0].second.weight
    with torch.device("meta"):
        empty = recipes.MLP((8, 16, 3))
    for call in (lambda: LearnedSoup(empty, COPIES), lambda: greedy_soup(COPIES, accuracy, empty)):
        with pytest.raises(ValueError, match="meta"):
            call()


# ------------------------------------------------------------------ ensembles, lines, planes


def test_linear_models_soup_is_ensemble() -> None:
    "Property 6."
    heads = [nn.Linear(8, 3) for _ in range(4)]
    soup = nn.Linear(8, 3)
    soup.load_state_dict(uniform_soup(heads))
    torch.testing.assert_close(soup(X), logit_ensemble(heads)(X), atol=1e-5, rtol=0)


class Smooth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16).double(), nn.Linear(16, 3).double()

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.double())))


@pytest.mark.parametrize("seed", range(4))
def test_second_order(seed) -> None:
    "Properties 6 and 9: the gap shrinks by four, and is what the approximation says."
    torch.manual_seed(seed)
    center = Smooth()
    step = {k: torch.randn_like(v) for k, v in center.state_dict().items()}
    ends = [center.state_dict()]
    gaps = []
    for size in (0.1, 0.05):
        ends[1:] = [{k: v + size * step[k] for k, v in ends[0].items()}]
        other = Smooth()
        other.load_state_dict(ends[1])
        middle = Smooth()
        middle.load_state_dict(uniform_soup(ends))
        with torch.no_grad():
            gap = middle(X) - logit_ensemble([center, other])(X)
        gaps.append(gap.norm().item())
    assert 3.2 < gaps[0] / gaps[1] < 4.8
    ends[1] = {k: v + 0.01 * step[k] for k, v in ends[0].items()}  # close: the expansion's domain
    for alpha, beta in ((0.25, 1.0), (0.5, 2.0), (0.8, 1.0)):
        gap = soup_ensemble_gap(center, *ends, [(X, Y)], alpha, beta)
        assert gap.true == pytest.approx(gap.soup_loss - gap.ensemble_loss)
        assert gap.predicted == pytest.approx(gap.true, rel=0.25)
    for alpha in (0.0, 1.0):
        gap = soup_ensemble_gap(center, *ends, [{"x": X, "labels": Y}], alpha)
        assert gap.true == 0 and gap.predicted == 0


def test_gap_is_that_of_the_soups_prediction() -> None:
    "β in both losses; the variance under the soup's softmax, not the ensemble's."
    torch.manual_seed(0)
    ends = [Smooth() for _ in range(2)]
    middle = Smooth()
    middle.load_state_dict(uniform_soup(ends, [0.7, 0.3]))
    with torch.no_grad():
        f0, f1, here = (m(X) for m in (*ends, middle))
    p, change = (3 * here).softmax(1), f1 - f0
    variance = (p * (change - (p * change).sum(1, keepdim=True)) ** 2).sum(1).mean()
    gap = soup_ensemble_gap(middle, *ends, [(X[:25], Y[:25]), (X[25:], Y[25:])], 0.3, 3.0)
    assert gap.variance == pytest.approx(float(variance))
    assert gap.soup_loss == pytest.approx(float(F.cross_entropy(3 * here, Y)))
    ensemble = F.cross_entropy(3 * (0.7 * f0 + 0.3 * f1), Y)
    assert gap.ensemble_loss == pytest.approx(float(ensemble))
    assert gap.predicted == pytest.approx(0.105 * (9 * gap.variance - gap.curvature))


def test_gap_of_a_loader_that_shuffles() -> None:
    "Every place on the line sees the same batches: one pass, so an iterator will do, too."
    ends = [Smooth() for _ in range(2)]
    plain = soup_ensemble_gap(ends[0], *ends, [(X, Y)])
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 7, shuffle=True)
    for loader in (shuffled, iter(shuffled)):
        assert soup_ensemble_gap(ends[0], *ends, loader) == pytest.approx(plain)


# ------------------------------------------------------------------ BatchNorm and LoRA


def test_recalibration() -> None:
    "Statistics become those of the soup on the data; nothing else changes."
    torch.manual_seed(0)
    nets = [recipes.SmallCNN(channels=(4, 8)) for _ in range(2)]
    x = torch.rand(64, 1, 8, 8)
    soup, host = uniform_soup(nets), nets[0]
    before = {k: v.clone() for k, v in host.state_dict().items()}
    fresh = recalibrate_batchnorm(host, soup, [(part, None) for part in x.split(16)])
    assert fresh["blocks.0.1.num_batches_tracked"] == 4
    out = F.conv2d(x, soup["blocks.0.0.weight"], padding=1)
    torch.testing.assert_close(fresh["blocks.0.1.running_mean"], out.mean((0, 2, 3)))
    assert all(torch.equal(fresh[k], v) for k, v in soup.items() if "running" not in k
               and "tracked" not in k)
    assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())
    with pytest.raises(ValueError, match="no BatchNorm"):
        recalibrate_batchnorm(START, START.state_dict(), [X])
    norm = nn.Sequential(nn.Linear(X.shape[1], 4), nn.BatchNorm1d(4))
    for loader, error in (([], ValueError), ([X * float("nan")], ValueError),
                          ([{"x": X}], AttributeError)):
        with pytest.raises(error):
            recalibrate_batchnorm(norm, norm.state_dict(), loader)
        assert norm[1].momentum == 0.1 and not norm[1].num_batches_tracked


def with_lora(seed, rank=2, targets=("layers.0", "head")):
    torch.manual_seed(seed)
    make = partial(adapters.LoraAdapter, rank=rank, alpha=4)
    pattern = re.compile("|".join(map(re.escape, targets)))
    model = adapters.attach(copy.deepcopy(START), make, pattern)
    for adapter in adapters.adapters(model).values():
        nn.init.normal_(adapter.B, std=0.3)
    return model.eval()


def test_adapters_are_merged() -> None:
    "Different ranks and weights; merged deltas are averaged, factors are refused."
    pair = [with_lora(1, 2), with_lora(2, 3)]
    soup = uniform_soup(pair, [0.3, 0.7])
    for name, start in (("layers.0", START.layers[0]), ("head", START.head)):
        change = sum(w * s * B @ A for w, (A, B, s) in zip(
            (0.3, 0.7), (adapters.adapters(m)[name].lora_factors() for m in pair), strict=True))
        torch.testing.assert_close(soup[f"{name}.weight"], start.weight + change)
    greedy = greedy_soup(pair, lambda s: 0.0)
    torch.testing.assert_close(greedy.state_dict, uniform_soup(pair))
    with pytest.raises(ValueError, match="average of A and B"):
        uniform_soup([m.state_dict() for m in pair])


def test_peft_models_are_merged() -> None:
    "PEFT's models go in as their merged weights."
    peft = pytest.importorskip("peft")
    pair = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["head"])
        model = peft.get_peft_model(copy.deepcopy(START), config)
        nn.init.normal_(model.base_model.model.head.lora_B["default"].weight)
        pair.append(model)
    deltas = [m.base_model.model.head.get_delta_weight("default") for m in pair]
    torch.testing.assert_close(uniform_soup(pair)["head.weight"],
                               START.head.weight + sum(deltas) / 2)


def test_a_soup_is_what_peft_concatenates() -> None:
    "PEFT's `cat` of two adapters is the same average; its `linear` one is the trap."
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["layers.0"])
    theirs = peft.get_peft_model(copy.deepcopy(START), config, "one")
    theirs.add_adapter("two", config)
    layer, ours = theirs.base_model.model.layers[0], []
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        make = partial(adapters.LoraAdapter, rank=2, alpha=2)
        model = adapters.attach(copy.deepcopy(START), make, "layers.0")
        adapter = adapters.adapters(model)["layers.0"]
        nn.init.normal_(adapter.B)
        layer.lora_A[name].weight.data.copy_(adapter.A.data)
        layer.lora_B[name].weight.data.copy_(adapter.B.data)
        ours.append(model)
    change = uniform_soup(ours, [0.3, 0.7])["layers.0.weight"] - START.layers[0].weight
    for kind, same in (("cat", True), ("linear", False)):
        theirs.add_weighted_adapter(["one", "two"], [0.3, 0.7], kind, combination_type=kind)
        assert torch.allclose(layer.get_delta_weight(kind), change, atol=1e-5) == same


def test_adapter_folders_are_refused(tmp_path) -> None:
    "A folder that PEFT wrote holds factors, not weights."
    peft = pytest.importorskip("peft")
    for i in range(2):
        config = peft.LoraConfig(r=2, target_modules=["head"])
        peft.get_peft_model(copy.deepcopy(START), config).save_pretrained(tmp_path / str(i))
    with pytest.raises(ValueError, match="average of A and B"):
        uniform_soup([tmp_path / "0", tmp_path / "1"])


# ------------------------------------------------------------------ bad input


def broken(state, **changes):
    return {**{k: v.clone() for k, v in state.items()}, **changes}


STATE = COPIES[0].state_dict()
SPOILT = broken(STATE, **{"head.bias": torch.tensor([0.0, torch.nan, 0.0])})


@pytest.mark.parametrize("make", [uniform_soup, partial(greedy_soup, score_fn=lambda s: 0.0),
                                  lambda c: LearnedSoup(recipes.MLP((8, 16, 3)), c)])
@pytest.mark.parametrize("given, error, words", [
    ([], ValueError, "empty"),
    (STATE, TypeError, "list"),
    ([STATE, 3], TypeError, "int"),
    ([STATE, {k: v for k, v in STATE.items() if k != "head.bias"}], ValueError, "head.bias"),
    ([STATE, broken(STATE, extra=torch.zeros(1))], ValueError, "extra"),
    ([STATE, broken(STATE, **{"head.bias": torch.zeros(4)})], ValueError, "head.bias"),
    ([STATE, broken(STATE, **{"head.bias": torch.zeros(3, dtype=torch.int64)})], ValueError,
     "head.bias"),
    ([STATE, SPOILT], ValueError, "model 1.*|head.bias"),
    ([SPOILT], ValueError, "head.bias"),
    ([recipes.MLP((8, 16, 3)), nn.Linear(8, 3)], TypeError, "classes"),
    ([STATE, broken(STATE, **{"head.bias": torch.empty(3, device="meta")})], ValueError, "meta"),
    ([STATE, "nowhere.safetensors"], FileNotFoundError, "nowhere"),
])
def test_bad_ingredients(make, given, error, words) -> None:
    with pytest.raises(error, match=words):
        make(given)


def test_which_model_is_spoilt_is_said() -> None:
    for make in (uniform_soup, partial(greedy_soup, score_fn=lambda s: 0.0),
                 lambda c: LearnedSoup(recipes.MLP((8, 16, 3)), c)):
        with pytest.raises(ValueError, match="model 1") as error:
            make([STATE, SPOILT, STATE])
        assert "head.bias" in str(error.value)


@pytest.mark.parametrize("weights, words", [
    ([0.5, 0.6], "sum"), ([0.5], "need 2 weights"), ([1.5, -0.5], "negative"),
    ([float("nan"), 1.0], "finite")])
def test_bad_weights(weights, words) -> None:
    with pytest.raises(ValueError, match=words):
        uniform_soup(COPIES[:2], weights)


@pytest.mark.parametrize("options, error, words", [
    ({"score_fn": lambda s: float("nan")}, ValueError, "nan"),
    ({"score_fn": lambda s: torch.zeros(2)}, TypeError, "one number"),
    ({"score_fn": lambda s: None}, TypeError, "one number"),
    ({"score_fn": lambda s: "0.9"}, TypeError, "one number"),
    ({"order": [0, 0, 1, 2, 3]}, ValueError, "once"),
    ({"order": [0, 1]}, ValueError, "once"),
    ({"scores": [1.0]}, ValueError, "give one each"),
    ({"scores": [1.0, 2.0, float("nan"), 0.0, 0.0]}, ValueError, "finite"),
    ({"tie": "maybe"}, ValueError, "accept"),
    ({"model": nn.Linear(2, 2)}, ValueError, "missing"),
    ({"model": recipes.MLP((8, 17, 3))}, ValueError, "do not match"),
])
def test_bad_greedy_arguments(options, error, words) -> None:
    with pytest.raises(error, match=words):
        greedy_soup(COPIES, **{"score_fn": lambda s: 0.0, **options})


def test_other_bad_arguments() -> None:
    net = recipes.MLP((8, 16, 3))
    with pytest.raises(ValueError, match="missing"):
        LearnedSoup(recipes.MLP((8, 16, 16, 3)), COPIES)
    with pytest.raises(ValueError, match="matches"):
        LearnedSoup(net, COPIES, per=[r"^layers"])
    with pytest.raises(ValueError, match="match no parameter"):
        LearnedSoup(net, COPIES, per=[r".", r"head"])
    with pytest.raises(ValueError, match="regular expressions"):
        LearnedSoup(net, COPIES, per="layer")
    with pytest.raises(TypeError, match="modules"):
        logit_ensemble([STATE])
    with pytest.raises(RuntimeError, match="size"):
        logit_ensemble([recipes.MLP((8, 3)), recipes.MLP((8, 1))])(X)
    with pytest.raises(ValueError, match="alpha"):
        soup_ensemble_gap(net, STATE, STATE, [(X, Y)], alpha=1.2)
    for bad in ({"beta": float("nan")}, {"step": 0}):
        with pytest.raises(ValueError, match="finite numbers"):
            soup_ensemble_gap(START, START, START, [(X, Y)], **bad)
    with pytest.raises(ValueError, match="NaN"):
        soup_ensemble_gap(START, START, START, [(X * float("nan"), Y)])
    for scores in ((1.0, float("nan")), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="two ends"):
            interpolation_advantage(START, START, lambda s: 1.0, scores=scores)
    with pytest.raises(ValueError, match="no batch"):
        soup_ensemble_gap(net, STATE, STATE, [])
    with pytest.raises(ValueError, match="no direction"):
        angle(STATE, COPIES[1], STATE)
    with pytest.raises(ValueError, match="finite"):
        interpolate(STATE, STATE, float("inf"))
    with pytest.raises(ValueError, match="floating"):
        uniform_soup(COPIES, dtype=torch.int32)


def test_lines() -> None:
    a, b = (m.state_dict() for m in COPIES[:2])
    for t, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(interpolate(a, b, t), dict(end))
    ends = [{"w": torch.tensor(w)} for w in ([3.0, 1], [3.0, 2])]
    assert angle(*ends, {"w": torch.tensor([2.0, 1])}) == pytest.approx(45)
    assert interpolation_advantage(*ends, lambda s: float(s["w"][1]) ** 2, alpha=0.25) == (
        pytest.approx(1.25**2 - (0.75 * 1 + 0.25 * 4)))
    assert interpolation_advantage(COPIES[0], COPIES[0], accuracy, START) == pytest.approx(0)


# ------------------------------------------------------------------ faults


class WithAdapter(nn.Module):
    "A plain network one of whose layers happens to be called adapter."

    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(3, 3)
        self.A, self.B = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x):
        return self.B(self.A(self.adapter(x)))


def test_a_module_called_adapter_is_a_plain_module() -> None:
    nets = [WithAdapter() for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soup = uniform_soup([n.state_dict() for n in nets])
        greedy = greedy_soup(nets, lambda m: 0.0, nets[0])
    mean = (nets[0].adapter.weight + nets[1].adapter.weight) / 2
    for state in (soup, greedy.state_dict, LearnedSoup(nets[0], nets).to_state_dict()):
        torch.testing.assert_close(state["adapter.weight"], mean.detach())


@pytest.mark.parametrize("a, b", [
    ("x.lora_A.weight", "x.lora_B.weight"), ("x.lora_down.weight", "x.lora_up.weight"),
    ("x.lora_embedding_A", "x.lora_embedding_B"), ("x.adaptlab.A", "x.adaptlab.B")])
def test_bare_factors_are_refused(a, b) -> None:
    states = [{a: torch.ones(2, 3), b: torch.ones(3, 2)}] * 2
    for make in (uniform_soup, partial(greedy_soup, score_fn=lambda s: 0.0)):
        with pytest.raises(ValueError, match="average of A and B"):
            make(states)


@pytest.mark.parametrize("make", [
    uniform_soup, lambda m: greedy_soup(m, lambda s: 0.0), lambda m: LearnedSoup(m[0], m)])
def test_other_configs_are_named(make) -> None:
    "Same shapes, another order of the labels."
    nets = [recipes.tiny_bert(n_classes=2) for _ in range(2)]
    nets[0].config.id2label = {0: "neg", 1: "pos"}
    nets[1].config.id2label = {0: "pos", 1: "neg"}
    with pytest.warns(UserWarning, match="id2label"):
        make(nets)


def test_learned_soup_with_batchnorm() -> None:
    "Running statistics are mixed without a gradient; training works, and they do not move."
    torch.manual_seed(0)
    nets = [recipes.SmallCNN(channels=(4, 8)) for _ in range(3)]
    for net in nets:
        net.train()(torch.rand(8, 1, 8, 8))
        net.eval()
    x, y = torch.rand(20, 1, 8, 8), torch.randint(10, (20,))
    pot = LearnedSoup(nets[0], nets)
    before = F.cross_entropy(pot(x), y)
    pot.fit((x, y), epochs=5)
    assert F.cross_entropy(pot(x), y) < before
    soup = pot.to_state_dict()
    assert not any(t.requires_grad for t in soup.values())
    key = next(n for n in soup if n.endswith("running_var"))
    mix = sum(w * n.state_dict()[key] for w, n in zip(pot.alpha().detach().mean(0), nets,
                                                      strict=True))
    torch.testing.assert_close(soup[key], mix)


# ------------------------------------------------------------------ the experiment


TINY = SMALL.replace(seeds=(0,), members=2, epochs=(1, 1), sizes=(64, 64), pairs=1,
                     limit_seeds=1, learned={"epochs": 1}, training={"batch_size": 16})


def test_one_seed_does_not_crash_and_resume_repeats_nothing(tmp_path, monkeypatch) -> None:
    def stop(report, name, table) -> None:
        if name == "limits":  # after the last stage
            raise ZeroDivisionError
        return table

    with monkeypatch.context() as m:
        m.setattr(Report, "table", stop)
        with pytest.raises(ZeroDivisionError):
            launch("model_soups", TINY, root=tmp_path, progress=False)
    monkeypatch.setattr(lab, "_candidates", lambda *a: 1 / 0)
    report = launch("model_soups", TINY, root=tmp_path, resume=True, progress=False)
    assert len(list(tmp_path.glob("model_soups/*"))) == 1
    assert "main" in report.figures and "limits" in report.tables


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    "A random CLIP of the real architecture, and a folder of image folders with two shifts."
    root = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 50,
            "num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(root / "clip")
    rng = np.random.default_rng(0)

    def write(folder: str, classes: dict[int, str], n: int) -> None:
        for i, name in classes.items():
            (root / "data" / folder / name).mkdir(parents=True)
            for j in range(n):
                pixels = rng.integers(0, 160, (40, 36, 3))
                pixels[..., i] += 40
                image = PIL.Image.fromarray(pixels.astype(np.uint8))
                image.save(root / "data" / folder / name / f"{j}.png")

    write("train", {0: "red", 1: "green", 2: "blue"}, 12)
    write("val", {0: "red", 1: "green", 2: "blue"}, 5)
    write("fewer", {0: "red", 2: "blue"}, 4)
    write("renamed", {0: "rose", 1: "grass"}, 4)
    meaning = {"rose": ["red", "blue"], "grass": ["green"]}
    (root / "data" / "renamed" / "classes.json").write_text(json.dumps(meaning))
    return root


def test_full_on_a_tiny_clip(tiny_clip, tmp_path) -> None:
    "The paper's set-up through the same code."
    cfg = FULL.replace(
        model=str(tiny_clip / "clip"), data=str(tiny_clip / "data"), members=2, epochs=(1, 2),
        held_out=0.3, pairs=1, device="cpu", workers=2,
        training={"batch_size": 8, "warmup": 2, "precision": "no"})
    report = launch("model_soups", cfg, root=tmp_path, progress=False)
    assert len(report.tables["dots"]) == 3  # the starting point is a candidate, too
    states = sorted(tmp_path.rglob("members/*.safetensors"))
    assert len(states) == 3 and report.claims
    bed = lab.make_bed(cfg, 0)
    assert bed.test["fewer"].groups == [[0], [2]] or len(bed.test["fewer"].groups) == 2
    assert sorted(map(len, bed.test["renamed"].groups)) == [1, 2]
