"""Model soups: what must hold, what must be refused, and the full-scale path on tiny models."""

import copy
import gc
import json
import os
import re
import subprocess
import sys
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

from adaptlab import adapters, models
from adaptlab import experiment as core
from adaptlab.arithmetic import model_soups as lesson
from adaptlab.evaluate import peak_memory
from adaptlab.arithmetic.model_soups import (
    FULL,
    SMALL,
    LearnedSoup,
    LossPlane,
    angle,
    estimate,
    greedy_soup,
    interpolate,
    interpolation_advantage,
    logit_ensemble,
    lora_soup,
    merged_state_dict,
    recalibrate_batchnorm,
    soup_ensemble_gap,
    train_copies,
    uniform_soup,
)


def family(k, spread=0.1, sizes=(8, 16, 3), seed=0):
    "Networks around a common centre, and the centre."
    torch.manual_seed(seed)
    start = models.MLP(sizes).eval()
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
    nets = [models.SmallCNN(channels=(4, 8)) for _ in range(4)]
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
    outside = uniform_soup(COPIES[:2], [1.5, -0.5], allow_negative=True)
    torch.testing.assert_close(outside["head.weight"], 1.5 * a - 0.5 * b)
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
        for candidates, most in ((paths, 2), (functions, 3)):  # mean, trial; what a function gave
            for accept in (0.0, -1.0):  # all are accepted; none is
                scores = iter([*[0.0] * k, *[accept] * k])
                peak = peak_memory(lambda c=candidates, s=scores: greedy_soup(
                    c, lambda state: next(s)), "cpu")
                assert peak < (most + 0.5) * 4 * size  # and the pieces in work
    finally:
        gc.enable()
    assert len(reads) == 2 * (2 * k + 1)  # score, trial; the first once more, to compare with


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
    held = [p for m in pot._stack.model.modules() for p in m._parameters.values()]
    assert all(p is None or p.is_meta for p in held)
    assert pot.raw.shape == (3, 2)  # the tied weight, and two biases
    assert pot._stack.model.first.weight is pot._stack.model.second.weight
    with torch.device("meta"):
        empty = models.MLP((8, 16, 3))
    for call in (lambda: LearnedSoup(empty, COPIES), lambda: greedy_soup(COPIES, accuracy, empty)):
        with pytest.raises(ValueError, match="meta device"):
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


def test_lines_and_planes() -> None:
    a, b, c = (m.state_dict() for m in COPIES[:3])
    for t, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(interpolate(a, b, t), dict(end))
    zero = {"w": torch.zeros(2)}
    assert angle({"w": torch.tensor([1.0, 0])}, {"w": torch.tensor([1.0, 1])}, zero) == (
        pytest.approx(45))
    plane = LossPlane.through(a, b, c)
    mix = uniform_soup([a, b, c], plane.shares(0.3, 0.4), allow_negative=True)
    moved = torch.cat([(mix[k] - a[k]).flatten() for k in a])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)
    with pytest.raises(ValueError, match="one line"):
        LossPlane.through(a, b, interpolate(a, b, 0.3))
    assert interpolation_advantage(COPIES[0], COPIES[0], accuracy, START) == pytest.approx(0)
    known = interpolation_advantage(a, b, accuracy, START, scores=(0.0, 0.0))
    assert known == accuracy(_filled(uniform_soup([a, b])))


def _filled(state):
    model = copy.deepcopy(START)
    model.load_state_dict(state)
    return model


# ------------------------------------------------------------------ BatchNorm and LoRA


def test_recalibration() -> None:
    "Statistics become those of the soup on the data; nothing else changes."
    torch.manual_seed(0)
    nets = [models.SmallCNN(channels=(4, 8)) for _ in range(2)]
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


def with_lora(seed, rank=2, targets=("layers.0", "head")):
    torch.manual_seed(seed)
    make = partial(adapters.LoraAdapter, rank=rank, alpha=4)
    pattern = re.compile("|".join(map(re.escape, targets)))
    model = adapters.attach(copy.deepcopy(START), make, pattern)
    for adapter in adapters.adapters(model).values():
        nn.init.normal_(adapter.B, std=0.3)
    return model.eval()


def test_lora_soups() -> None:
    "Different ranks and weights; merged deltas are averaged, factors are refused."
    pair = [with_lora(1, 2), with_lora(2, 3)]
    soup = lora_soup(pair, [0.3, 0.7])
    assert {len(a.A) for a in adapters.adapters(soup).values()} == {5}
    torch.testing.assert_close(merged_state_dict(soup), uniform_soup(pair, [0.3, 0.7]))
    greedy = greedy_soup(pair, lambda s: 0.0)
    torch.testing.assert_close(greedy.state_dict, uniform_soup(pair))
    with pytest.raises(ValueError, match="average of A and B"):
        uniform_soup([m.state_dict() for m in pair])
    with pytest.raises(ValueError, match="no layer"):
        lora_soup([pair[0], START])
    with pytest.raises(ValueError, match="must be the same"):
        lora_soup([pair[0], with_lora(3, 2, ("head",))])


def test_lora_soup_averages_what_was_trained_beside() -> None:
    "A head that was trained as it is, beside the adapters."
    pair = []
    for seed in range(2):
        torch.manual_seed(seed)
        make = partial(adapters.LoraAdapter, rank=2)
        model = adapters.attach(copy.deepcopy(START), make, "layers.0", also_train=["head"])
        nn.init.normal_(adapters.adapters(model)["layers.0"].B)
        model.head.weight.data += torch.randn_like(model.head.weight)
        pair.append(model)
    torch.testing.assert_close(merged_state_dict(lora_soup(pair)), uniform_soup(pair))


def test_peft_models_are_merged(tmp_path) -> None:
    "PEFT's models go in as their merged weights; a soup of adapters comes out in PEFT's format."
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(START)
    base.config = transformers.PretrainedConfig(name_or_path="toy")
    pair = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["head"])
        model = peft.get_peft_model(copy.deepcopy(base), config)
        nn.init.normal_(model.base_model.model.head.lora_B["default"].weight)
        model.save_pretrained(tmp_path / str(seed))
        pair.append(model)
    soup = uniform_soup(pair)
    deltas = [m.base_model.model.head.get_delta_weight("default") for m in pair]
    torch.testing.assert_close(soup["head.weight"], base.head.weight + sum(deltas) / 2)
    ours = [adapters.from_peft(copy.deepcopy(base), tmp_path / str(i)) for i in range(2)]
    folder = adapters.to_peft(lora_soup(ours), tmp_path / "soup", base_model_name="toy")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    torch.testing.assert_close(back(X), _filled(soup)(X), atol=1e-5, rtol=1e-5)


def test_lora_soup_is_what_peft_concatenates() -> None:
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
    change = merged_state_dict(lora_soup(ours, [0.3, 0.7]))["layers.0.weight"]
    change = change - START.layers[0].weight
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
                                  lambda c: LearnedSoup(models.MLP((8, 16, 3)), c)])
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
    ([models.MLP((8, 16, 3)), nn.Linear(8, 3)], TypeError, "classes"),
    ([STATE, broken(STATE, **{"head.bias": torch.empty(3, device="meta")})], ValueError, "meta"),
    ([STATE, "nowhere.safetensors"], FileNotFoundError, "nowhere"),
])
def test_bad_ingredients(make, given, error, words) -> None:
    with pytest.raises(error, match=words):
        make(given)


def test_which_model_is_spoilt_is_said() -> None:
    for make in (uniform_soup, partial(greedy_soup, score_fn=lambda s: 0.0),
                 lambda c: LearnedSoup(models.MLP((8, 16, 3)), c)):
        with pytest.raises(ValueError, match="model 1") as error:
            make([STATE, SPOILT, STATE])
        assert "head.bias" in str(error.value)


@pytest.mark.parametrize("weights, words", [
    ([0.5, 0.6], "sum"), ([0.5], "give one each"), ([1.5, -0.5], "allow_negative"),
    ([float("nan"), 1.0], "sum")])
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
    ({"model": nn.Linear(2, 2)}, ValueError, "different tensors"),
    ({"model": models.MLP((8, 17, 3))}, ValueError, "shape"),
])
def test_bad_greedy_arguments(options, error, words) -> None:
    with pytest.raises(error, match=words):
        greedy_soup(COPIES, **{"score_fn": lambda s: 0.0, **options})


def test_other_bad_arguments() -> None:
    net = models.MLP((8, 16, 3))
    with pytest.raises(ValueError, match="different tensors"):
        LearnedSoup(models.MLP((8, 16, 16, 3)), COPIES)
    with pytest.raises(ValueError, match="matches"):
        LearnedSoup(net, COPIES, per=[r"^layers"])
    with pytest.raises(ValueError, match="match no parameter"):
        LearnedSoup(net, COPIES, per=[r".", r"head"])
    with pytest.raises(ValueError, match="regular expressions"):
        LearnedSoup(net, COPIES, per="layer")
    with pytest.raises(TypeError, match="modules"):
        logit_ensemble([STATE])
    with pytest.raises(ValueError, match="same classes"):
        logit_ensemble([models.MLP((8, 3)), models.MLP((8, 4))])(X)
    with pytest.raises(ValueError, match="alpha"):
        soup_ensemble_gap(net, STATE, STATE, [(X, Y)], alpha=1.2)
    with pytest.raises(TypeError, match="iterator"):
        soup_ensemble_gap(net, STATE, STATE, iter([(X, Y)]))
    with pytest.raises(ValueError, match="no batch"):
        soup_ensemble_gap(net, STATE, STATE, [])
    with pytest.raises(ValueError, match="no direction"):
        angle(STATE, COPIES[1], STATE)
    with pytest.raises(ValueError, match="finite"):
        interpolate(STATE, STATE, float("inf"))
    with pytest.raises(ValueError, match="floating"):
        uniform_soup(COPIES, dtype=torch.int32)
    with pytest.raises(ValueError, match="BatchNorm"):
        train_copies(models.SmallCNN(), [{}], X, Y, [{}])
    with pytest.raises(ValueError, match="recipes"):
        train_copies(net, [STATE], X, Y, [])


# ------------------------------------------------------------------ the sweep


def test_stacked_training_is_plain_training() -> None:
    "A copy in the stack is what a plain loop with torch's AdamW gives."
    recipe = {"lr": 3e-3, "weight_decay": 0.1, "epochs": 3, "smoothing": 0.1, "seed": 5}
    other = {"lr": 1e-3, "weight_decay": 0.0, "epochs": 1, "seed": 6, "noise": 0.3, "mixup": 0.5}
    start = START.state_dict()
    found = train_copies(START, [start, start], X, Y, [other, recipe], 8, warmup=2, clip=0.5)
    model = copy.deepcopy(START)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 15)
    stream = lesson.train.IndexStream(40, 8, seed=5)
    for step in range(15):
        rows = stream.step(step)
        F.cross_entropy(model(X[rows]), Y[rows], label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    torch.testing.assert_close(dict(model.state_dict()), found[1], atol=1e-5, rtol=1e-4)
    alone = train_copies(START, [start], X, Y, [other], 8, warmup=2, clip=0.5)
    torch.testing.assert_close(alone[0], found[0], atol=1e-6, rtol=1e-5)


def test_both_trainers_run_the_same_experiment(tmp_path) -> None:
    "The small experiment, tiny, with members trained one by one: same structure, same claims."
    tiny = SMALL.replace(seeds=(0, 1), members=2, epochs=(1, 1), limit=120, pairs=2, grid=3,
                         scratch=2, learned_epochs=1, noise=(0.0, 0.0), mixup=(0.0, 0.0),
                         warmup=0, batch_size=16)
    reports = [core.launch("model_soups", tiny.replace(trainer=t), root=tmp_path / t)
               for t in ("stacked", "one_by_one")]
    first, second = (r.tables["accuracy"] for r in reports)
    assert first.drop(columns="recipe").sub(second.drop(columns="recipe")).abs().max().max() < 3
    assert [c.text for c in reports[0].claims] == [c.text for c in reports[1].claims]
    assert {"scatter", "growth", "basin", "seeds", "theory"} <= set(reports[0].figures)


# ------------------------------------------------------------------ full scale, tiny


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


def tiny_full(root: Path, **changes):
    "`FULL`, with a tiny model, tiny data and few members."
    return FULL.replace(**{
        "model": str(root / "clip"), "data": str(root / "data"), "members": 2, "epochs": (1, 2),
        "lr": (1e-4, 1e-3), "batch_size": 8, "warmup": 2, "held_out": 0.3, "pairs": 1, "grid": 3,
        "device": "cpu", "precision": "no", "workers": 2, "checkpoint_every": 2, "probe_l2": 1e-3,
        **changes})


def test_full_scale_and_resume(tiny_clip, tmp_path, monkeypatch) -> None:
    "The paper's set-up on a tiny CLIP; stopped in the second member, it goes on from there."
    cfg, train_one, done = tiny_full(tiny_clip), lesson._train_one, []

    def stops(*args):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return train_one(*args)

    monkeypatch.setattr(lesson, "_train_one", stops)
    with pytest.raises(KeyboardInterrupt):
        core.launch("model_soups", cfg, root=tmp_path)
    first = next(tmp_path.rglob("members/seed0-0.safetensors"))
    written = first.stat().st_mtime_ns
    monkeypatch.setattr(lesson, "_train_one", train_one)
    report = core.launch("model_soups", cfg, root=tmp_path, resume=True)
    assert first.stat().st_mtime_ns == written and len(list(tmp_path.glob("*/*"))) == 1
    table = report.tables["accuracy"].set_index("recipe")
    assert {"test", "fewer", "renamed", "shifts"} <= set(table.columns)
    assert len(report.tables["sweep"]) == 3  # the starting point is a candidate, too
    assert not list(tmp_path.rglob("checkpoints/*"))
    assert all(c.holds is True or c.reason for c in report.claims)
    states = [load_file(p) for p in sorted(tmp_path.rglob("members/*.safetensors"))]
    uniform = load_file(next(tmp_path.rglob("soups/*uniform-soup.safetensors")))
    torch.testing.assert_close(uniform, uniform_soup(states))


def test_two_processes(tiny_clip, tmp_path) -> None:
    "The same on two processes: members and accuracies are those of one."
    changes = {"mixup": (0.0, 0.0), "augment_ops": (0, 0), "epochs": (1, 1), "pairs": 0}
    alone = core.launch("model_soups", tiny_full(tiny_clip, **changes), root=tmp_path / "one")
    cfg = tiny_full(tiny_clip, **changes)
    options = []
    for name, value in cfg.to_dict().items():
        if value != FULL.to_dict()[name]:
            values = value if isinstance(value, list) else [value]
            options += ["--" + name.replace("_", "-"), *map(str, values)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", "29561", "-m", "adaptlab", "run", "model_soups", "--scale", "full",
               "--root", str(tmp_path / "two"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr[-3000:]
    names = sorted(p.name for p in (tmp_path / "one").rglob("members/*"))
    for name in names:
        one, two = (load_file(next((tmp_path / where).rglob(f"members/{name}")))
                    for where in ("one", "two"))
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
    other = core.load_report(next((tmp_path / "two").rglob("report")))
    keys = ["test", "fewer", "renamed"]
    gap = (alone.tables["accuracy"][keys] - other.tables["accuracy"][keys]).abs()
    assert float(gap.max().max()) <= 100 / 8  # at most one image that is on the edge


def test_bad_image_folders(tiny_clip, tmp_path) -> None:
    with pytest.raises(ValueError, match="train"):
        lesson._images_task(tiny_full(tiny_clip, data=str(tmp_path)), 0)
    models.tiny_bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="CLIP"):
        lesson._images_task(tiny_full(tiny_clip, model=str(tmp_path / "bert")), 0)
    images = lesson._Images(tiny_clip / "data" / "fewer", 32)
    with pytest.raises(ValueError, match="classes.json"):
        lesson._groups(images, ["red", "green"])
    (tmp_path / "train" / "nothing").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        lesson._Images(tmp_path / "train", 32)


@pytest.mark.parametrize("op", range(len(lesson._AUGMENTATIONS)))
def test_augmentations(op) -> None:
    "Every image operation keeps size and mode, at all magnitudes and both signs."
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    image = PIL.Image.fromarray(pixels)
    for strength in (0.0, 0.5, 1.0):
        for sign in (-1.0, 1.0):
            out = lesson._AUGMENTATIONS[op](image, strength, sign)
            assert out.size == image.size and out.mode == "RGB"


def test_estimate_counts() -> None:
    "The numbers of ViT-B/32 come out of the architecture."
    with torch.device("meta"):
        clip = lesson._ClipClassifier(transformers.CLIPModel(transformers.CLIPConfig()), 1000)
        pixels = torch.empty(2, 3, 224, 224)
    size = sum(p.numel() for p in clip.parameters())
    assert 87.5e6 < size < 89e6
    need = estimate(FULL, clip, pixels, 1_281_167, 160_000).set_index("what")["amount"]
    assert need["memory, learned soup"] == pytest.approx(72 * 4 * size / 1e9)
    half = estimate(FULL.replace(members=35), clip, pixels, 1_281_167, 160_000)
    assert half.set_index("what")["amount"]["hours, compute"] < 0.55 * need["hours, compute"]
