"""ComPEFT: selection, sizes, codes, masks, files, whole experts, bad input, full scale."""

import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
import two_processes
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from adaptlab import checkpoints, recipes, weights
from adaptlab.arithmetic import compeft
from adaptlab.arithmetic.compeft import (
    ComPEFTCompressor, TernaryBitmask, TernaryVector, entropy_bits, expert_tensors, golomb_bits,
    golomb_decode, golomb_encode, golomb_parameter, load_compressed, magnitude_prune,
    save_compressed, stc_ternarize, task_of, ternarize, top_entries)
from adaptlab.bench.runs import start_run
from adaptlab.experiments import compeft as told
from adaptlab.experiments.compeft import FULL, SMALL, experiment
from adaptlab.train import Training
from one_seed import UNDECIDED, goes_on


def noise(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return (torch.equal(a.indices, b.indices) and torch.equal(a.negative, b.negative)
            and (a.scale, a.size, a.entries) == (b.scale, b.size, b.entries))


# selection


@pytest.mark.parametrize("x", [
    noise(1000), torch.zeros(9), torch.ones(9), noise(1000).round(), noise(300) * 1e-42,
    noise(100).double(), noise(100).half(), torch.tensor([0.0, -0.0, 2, -2, 2])])
@pytest.mark.parametrize("k", [0.25, 0.5, 0.99, 1.0])
def test_the_largest_entries_with_ties_to_the_lower_index(x, k):
    top, mu = top_entries(x, k), x.float().abs()
    n = min(math.floor(k * len(x) + 1e-9), int((mu > 0).sum()))
    wanted = mu.argsort(descending=True, stable=True)[:n].sort().values
    assert torch.equal(top.indices, wanted) and torch.equal(top.values, x.float()[wanted])
    assert math.isclose(top.sigma, float(x.double().std()), rel_tol=1e-5, abs_tol=1e-44)
    assert math.isclose(top.norm, float(x.double().norm()), rel_tol=1e-5, abs_tol=1e-44)


def test_the_official_threshold():
    x = noise(1000)
    limit = x.abs().kthvalue(1000 - 200).values
    assert torch.equal(top_entries(x, 0.2, inclusive=True).indices,
                       (x.abs() >= limit).nonzero()[:, 0])
    assert len(ternarize(x, 0.2, inclusive=True).indices) == 201
    ties = torch.tensor([3.0, 1, 1, 1, 0, 0, 0, 0])
    assert len(top_entries(ties, 0.25, inclusive=True).indices) == 4
    assert top_entries(ties, 0.25).indices.tolist() == [0, 1]


def test_a_state_is_one_vector_in_the_order_of_names(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PIECE", 7)
    state = {"b": noise(60, 1).view(6, 10), "a": noise(40, 2)}
    flat = torch.cat([state["a"], state["b"].flatten()])
    checkpoints.save_state(state, tmp_path / "x.safetensors")
    for source in (state, checkpoints.open_state(tmp_path / "x.safetensors")):
        v = ternarize(source, 0.3, 2.0)
        assert [e.name for e in v.entries] == ["a", "b"]
        assert torch.equal(v.to_dense(), ternarize(flat, 0.3, 2.0).to_dense())
    assert torch.equal(v.tensors()["b"].flatten(), v.to_dense()[40:])
    unpacked = weights.unpack(weights.pack(v.deltas()))
    assert all(torch.equal(unpacked[n].to_dense(), t) for n, t in v.tensors().items())


def test_ties_between_tensors_count_once():
    shared = noise(20)
    v = ternarize({"embed": shared, "head": shared, "norm": noise(5)}, 0.4)
    assert v.size == 25 and [e.name for e in v.entries] == ["embed", "norm"]


# sizes


@pytest.mark.parametrize("alpha", [0.5, 1.0, 8.0])
def test_three_values_and_the_sign_of_what_is_kept(alpha):
    x = noise(997) + 0.3
    v = ternarize(x, 0.1, alpha)
    s = float(np.float16(alpha * float(x.double().std())))
    assert v.scale == s and set(v.to_dense().tolist()) == {-s, 0.0, s} and len(v.indices) == 99
    kept = torch.zeros(997, dtype=torch.bool)
    kept[v.indices] = True
    assert x[~kept].abs().max() <= x[kept].abs().min()
    assert torch.equal(v.signs, x[kept].sign().to(torch.int8))


def test_scaling_and_turning_the_vector():
    x = noise(500)
    v = ternarize(x, 0.2, 3.0).to_dense()
    assert torch.equal(ternarize(-x, 0.2, 3.0).to_dense(), -v)
    assert torch.equal(ternarize(8 * x, 0.2, 3.0).to_dense(), 8 * v)


def test_closed_forms_of_the_size():
    x = noise(2000).double().float()
    top = top_entries(x, 0.2)
    signs = top.ternary(1.0).to_dense()
    best = float(x @ signs / (signs @ signs))  # least squares
    assert math.isclose(top.mean, best, rel_tol=1e-5)
    assert math.isclose(stc_ternarize(x, 0.2).scale, best, rel_tol=1e-3)  # 16 bits
    assert math.isclose(top.whole_way, float(x @ x / (x @ signs)), rel_tol=1e-5)
    assert math.isclose(top.cosine, float(x @ signs / x.norm() / signs.norm()), rel_tol=1e-5)
    assert top.whole_way > top.mean


def test_pruning_keeps_values_and_everything_at_one():
    x = noise(50)
    assert torch.equal(magnitude_prune(x, 1.0).to_dense(), x)
    found = magnitude_prune(x, 0.2)
    assert torch.equal(found.values, x[found.indices.long()]) and len(found.values) == 10


@pytest.mark.parametrize("scale, wide", [(1.0, False), (3e-9, True), (1e6, True), (0.0, False)])
def test_sizes_that_16_bits_lose_take_32(scale, wide):
    v = TernaryVector(torch.tensor([1]), torch.tensor([True]), scale, 4)
    assert math.isclose(v.scale, scale, rel_tol=1e-3)
    code = golomb_encode(v)
    assert code[17] == (4 if wide else 2) and same(golomb_decode(code), v)


# codes


def test_values_of_the_formulas():
    said = {0.05: (4, 0.3393), 0.1: (3, 0.5756), 0.2: (2, 0.9388), 0.3: (1, 1.1882), 0.5: (0, 1.5)}
    for k, (b, bits) in said.items():
        assert golomb_parameter(k) == b
        assert abs((golomb_bits(10**9, k) - 16) / 1e9 - bits) < 1e-4
    for k, bits in {0.05: 0.3364, 0.1: 0.5690, 0.2: 0.9219, 0.3: 1.1813, 0.5: 1.5}.items():
        assert abs((entropy_bits(10**9, k) - 16) / 1e9 - bits) < 1e-4
    for k in torch.linspace(0.001, 0.5, 200).tolist():
        assert entropy_bits(10**6, k) <= golomb_bits(10**6, k) + 1e-6
    assert golomb_parameter(1.0) == 0 and entropy_bits(100, 1.0) == 116


@pytest.mark.parametrize("x, k", [
    (noise(100_000), 0.001), (noise(100_000), 0.2), (noise(999), 0.5), (noise(999), 1.0),
    (torch.zeros(7), 0.5), (torch.ones(1000), 1.0), (-torch.ones(8), 1.0),
    (torch.eye(300)[299], 0.1), (torch.eye(300)[0], 0.1)])
def test_nothing_is_lost(x, k):
    v = top_entries(x, k).ternary(0.5)
    code = golomb_encode(v)
    assert same(golomb_decode(code, v.entries), v)
    assert same(TernaryBitmask.of(v).vector(), v)


@pytest.mark.parametrize("k", [0.02, 0.05, 0.1, 0.2, 0.5])
def test_real_bytes_are_what_the_formula_says(k):
    bits = 8 * len(golomb_encode(ternarize(noise(200_000), k)))
    assert entropy_bits(200_000, k) <= bits <= 1.02 * golomb_bits(200_000, k)


def test_code_that_is_damaged():
    v = ternarize(noise(1000), 0.1)
    code = golomb_encode(v)
    for wrong in (b"", code[:10], code[:40], code[:-3], code + b"\x00"):
        with pytest.raises(ValueError, match="damaged"):
            golomb_decode(wrong)
    short = struct.pack("<Q", 500) + code[8:]  # fewer entries than the places reach
    with pytest.raises(ValueError, match="beyond 500"):
        golomb_decode(short)
    with pytest.raises(ValueError, match="damaged"):
        golomb_decode(code[:8] + struct.pack("<Q", 99) + code[16:])


def test_files(tmp_path):
    vectors = [ternarize({"b": noise(100), "a": noise(30).view(5, 6)}, 0.2), ternarize(noise(9))]
    file = save_compressed(tmp_path / "x.cpft", vectors)
    assert all(map(same, load_compressed(file), vectors))
    whole = file.read_bytes()
    for wrong, words in ((b"PK" + whole[2:], "no file"), (whole[:-1], "damaged"),
                         (whole[:60] + b"?" + whole[61:], "damaged")):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=words):
            load_compressed(file)
    with pytest.raises(ValueError, match="at least one"):
        save_compressed(file, [])


# masks


def test_arithmetic_on_masks(monkeypatch):
    a, b = (TernaryBitmask.of(ternarize(noise(777, s), k, 2.0)) for s, k in ((1, 0.3), (2, 0.6)))
    x, y = a.vector().to_dense().double(), b.vector().to_dense().double()
    for _ in range(2):
        assert round(a.dot(b) / a.scale / b.scale) == int(x.sign() @ y.sign())
        assert a.conflicts(b) == int((x * y < 0).sum())
        assert a.hamming(b) == int((x.sign() != y.sign()).sum()) and a.hamming(a) == 0
        monkeypatch.delattr(np, "bitwise_count", raising=False)  # the other way to count
    torch.testing.assert_close((a + b).to_dense().double(), x + y)
    minus = TernaryBitmask(a.negative, a.positive, a.scale, a.size)
    assert not len((a + minus).indices)
    other = TernaryBitmask.of(ternarize(noise(50)))
    for work in (a.dot, a.hamming, a.conflicts, a.__add__):
        with pytest.raises(ValueError, match="777 and 50"):
            work(other)
    with pytest.raises(ValueError, match="overlap"):
        TernaryBitmask(a.positive, a.positive, 1.0, 777)
    with pytest.raises(ValueError, match="bytes"):
        TernaryBitmask(a.positive[:-8], a.negative[:-8], 1.0, 777)


# whole experts


def lora(seed, **more):
    torch.manual_seed(0)
    llama = recipes.tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(llama, LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **more)).eval()


def test_an_adapter_of_peft_comes_back(tmp_path):
    here, there, ids = lora(1), lora(2), torch.arange(9)[None]
    base = {n: p.clone() for n, p in here.named_parameters() if "lora" not in n}
    packer, other = ComPEFTCompressor(0.3, 2.0), ComPEFTCompressor()
    save_compressed(tmp_path / "x", packer.compress(here))
    other.vectors = load_compressed(tmp_path / "x")
    torch.testing.assert_close(other.apply_(there)(ids).logits, packer.apply_(here)(ids).logits)
    assert all(torch.equal(p, here.get_parameter(n)) for n, p in base.items())
    flat = torch.cat([t.flatten() for t in other.decompress().values()])
    assert len(flat.unique()) == 3


def test_vectors_of_ia3_count_from_one():
    torch.manual_seed(0)
    model = get_peft_model(recipes.tiny_llama(), IA3Config(
        target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "ia3_l" in n:
                p.add_(0.1 * torch.randn_like(p))
    packer = ComPEFTCompressor(0.5, 1.0)
    packer.compress(model)
    for t in packer.decompress().values():
        assert abs(float(t.median()) - 1) < 0.2
    packer.apply_(model)
    state = get_peft_model_state_dict(model)
    assert all(torch.equal(state[n], t) for n, t in packer.decompress().items())


def test_names_say_where_a_change_counts_from():
    names = ["blocks.0.fc1.adaptlab.B", "q.ia3_l", "q.lora_A.weight"]
    tau, kinds = task_of({n: torch.ones(8) for n in names})
    assert list(kinds.values()) == ["zero", "one", "zero"] and not tau["q.ia3_l"].any()
    x = torch.tensor([1.0, 0, -4, 0, 1, -1, 0, 3])
    (part,) = expert_tensors([ternarize({names[0]: x}, 0.25, 2.0)], {names[0]: x}).values()
    assert part.tolist() == (x + torch.tensor([0, 0, -4, 0, 0, 0, 0, 4.0])).tolist()


def test_a_full_fine_tune_and_its_size_zero():
    base, tuned = nn.Linear(6, 5), nn.Linear(6, 5)
    packer = ComPEFTCompressor(0.4, 2.0, reference=base)
    (v,) = packer.compress(tuned)
    change = torch.cat([(tuned.bias - base.bias), (tuned.weight - base.weight).flatten()])
    assert torch.equal(v.to_dense(), ternarize(change.detach(), 0.4, 2.0).to_dense())
    zero = expert_tensors([replace(v, scale=0.0)], base)
    assert all(torch.equal(zero[n], p) for n, p in base.named_parameters())
    packer.apply_(tuned)
    assert (tuned.weight - base.weight != 0).sum() + (tuned.bias - base.bias != 0).sum() == 14
    packer = ComPEFTCompressor(0.4, reference=base, exclude=("bias",))
    assert [e.name for e in packer.compress(tuned)[0].entries] == ["weight"]
    each = ComPEFTCompressor(0.4, reference=base, per_tensor=True).compress(tuned)
    assert [e.name for v in each for e in v.entries] == ["bias", "weight"]


def test_the_search_takes_the_best_and_leaves_the_model():
    model = lora(1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    packer = ComPEFTCompressor()

    def score(m):
        flat = torch.cat([t.flatten() for t in get_peft_model_state_dict(m).values()])
        return -abs(float(flat.norm()) - 3.0)

    tried = packer.fit_alpha(model, score, alphas=(1, 2, 3), densities=(0.1, 0.3))
    best = max(tried, key=lambda t: t["score"])
    assert len(tried) == 6 and (packer.density, packer.alpha) == (best["density"], best["alpha"])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert math.isclose(score(packer.apply_(model)), best["score"], abs_tol=1e-5)
    state = {n: t.clone() for n, t in get_peft_model_state_dict(lora(1)).items()}
    again = ComPEFTCompressor()
    again.fit_alpha(state, lambda t: -abs(float(torch.cat([x.flatten() for x in t.values()]).norm())
                                          - 3.0), alphas=(1, 2, 3), densities=(0.1, 0.3))
    assert (again.density, again.alpha) == (packer.density, packer.alpha)


# bad input


@pytest.mark.parametrize("work, error, words", [
    (lambda: ternarize(noise(9), 0.0), ValueError, "density"),
    (lambda: ternarize(noise(9), 20), ValueError, "0.2 for 20 %"),
    (lambda: ternarize(noise(9), 0.01), ValueError, "keeps none"),
    (lambda: ternarize(noise(9), 0.5, 0.0), ValueError, "alpha"),
    (lambda: ternarize(noise(9), 0.5, math.inf), ValueError, "alpha"),
    (lambda: ternarize(noise(1), 1.0), ValueError, "one entry"),
    (lambda: ternarize({}), ValueError, "empty"),
    (lambda: ternarize(torch.zeros(0)), ValueError, "empty"),
    (lambda: ternarize(torch.ones(3, dtype=torch.int64)), TypeError, "floating"),
    (lambda: ternarize(torch.tensor([1.0, math.nan]), 0.5), ValueError, "NaN"),
    (lambda: ternarize(torch.tensor([1.0, -math.inf]), 0.5), ValueError, "NaN or infinity"),
    (lambda: golomb_parameter(0.0), ValueError, "share"),
    (lambda: entropy_bits(10, 1.5), ValueError, "density"),
    (lambda: TernaryVector(torch.tensor([1, 1]), torch.ones(2).bool(), 1.0, 3), ValueError, "incr"),
    (lambda: TernaryVector(torch.tensor([1, 3]), torch.ones(2).bool(), 1.0, 3), ValueError, "incr"),
    (lambda: TernaryVector(torch.tensor([1]), torch.ones(2).bool(), 1.0, 3), ValueError, "bool"),
    (lambda: TernaryVector(torch.tensor([1]), torch.ones(1).bool(), -1.0, 3), ValueError, "scale"),
    (lambda: ComPEFTCompressor(2.0), ValueError, "density"),
    (lambda: ComPEFTCompressor().decompress(), ValueError, "compress, or load"),
    (lambda: TernaryVector(torch.tensor([1]), torch.ones(1).bool(), 1.0, 3,
                           (compeft.Entry("a", (2,)),)), ValueError, "entries"),
    (lambda: task_of({"weight": noise(3)}), ValueError, "neither factors"),
    (lambda: task_of({"weight": noise(3)}, "init"), ValueError, "reference"),
    (lambda: task_of({"weight": noise(3)}, {"weight": noise(4)}), ValueError, "weight"),
    (lambda: expert_tensors([ternarize({"w": noise(9)})]), ValueError, "lacks a tensor"),
    (lambda: ComPEFTCompressor(0.5, reference="zero").compress({"w": noise(4)})
     and compeft.ComPEFTCompressor(reference="zero").top(nn.Linear(2, 2), 3.0), ValueError, "dens"),
])
def test_what_is_refused(work, error, words):
    with pytest.raises(error, match=words):
        work()


def test_another_model_is_refused():
    packer = ComPEFTCompressor(0.5, reference="zero")
    packer.compress({"w": noise(4)})
    with pytest.raises(ValueError, match="no w"):
        packer.apply_(nn.Linear(2, 2))
    packer.compress({"weight": noise(2).view(1, 2)})  # could be broadcast
    with pytest.raises(ValueError, match="another shape"):
        packer.apply_(nn.Linear(2, 2))
    packer = ComPEFTCompressor(0.5)
    packer.compress(lora(1))
    for other in (LoraConfig(r=3, target_modules=["q_proj"]),
                  LoraConfig(r=8, target_modules=["down_proj"])):
        with pytest.raises(ValueError, match="the model has no"):
            packer.apply_(get_peft_model(recipes.tiny_llama(), other))


@pytest.mark.parametrize("alphas, score, words", [
    ((), lambda m: 1.0, "alphas"), ((1, 0), lambda m: 1.0, "alphas"),
    ((1, 2), lambda m: math.nan, "NaN"), ((1, 2), lambda m: 1 / 0, "zero"),
])
def test_a_search_that_fails_leaves_the_model(alphas, score, words):
    base, tuned = nn.Linear(6, 5), nn.Linear(6, 5)
    before = tuned.weight.detach().clone()
    with pytest.raises((ValueError, ZeroDivisionError), match=words):
        ComPEFTCompressor(reference=base).fit_alpha(tuned, score, alphas)
    assert torch.equal(tuned.weight, before)


def test_a_tensor_that_keeps_nothing_goes_back_to_its_reference():
    base, tuned = nn.Linear(6, 3), nn.Linear(6, 3)
    seen, packer = [], ComPEFTCompressor(0.2, reference=base, per_tensor=True)
    packer.fit_alpha(tuned, lambda m: seen.append(m.bias.detach().clone()) or 1.0, (1,))
    assert torch.equal(seen[0], base.bias) and not torch.equal(tuned.bias, base.bias)
    assert torch.equal(packer.decompress()["bias"], base.bias)  # as the search has seen it


def test_signs_of_all_tensors_are_made_once():
    v = ternarize({f"layer{i}": noise(50, i) for i in range(20)}, 0.2)
    deltas = v.deltas()
    assert len({d.values.untyped_storage().data_ptr() for d in deltas.values()}) == 1
    assert torch.equal(torch.cat([d.to_dense() for d in deltas.values()]),
                       torch.cat([v.tensors()[n] for n in deltas]))
    assert sum(len(d.values) for d in deltas.values()) == 200


# the experiment


@pytest.mark.parametrize("name, other", ["AB", "BA"])
def test_one_factor_is_cut_and_the_other_left(name, other):
    model = nn.ModuleDict({"adaptlab": nn.ParameterDict({
        "A": noise(40).view(4, 10), "B": noise(24).view(6, 4)})})
    expert = {n: p.detach().clone() for n, p in model.named_parameters()}
    bed = told.ExpertBed(model, None, None, None, expert=expert, score=lambda m, part: 0.0)
    told._one_factor(model, bed, 0, 0.2, name)
    kept, cut = (model.get_parameter(f"adaptlab.{n}") for n in (other, name))
    assert torch.equal(kept, expert[f"adaptlab.{other}"])
    assert len(cut.unique()) == 3 and int((cut != 0).sum()) == int(0.2 * cut.numel())


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    short = Training(steps=2, batch_size=8)
    cfg = SMALL.replace(seeds=(0,), tracks=("residuals",), images=(32, 32), curve=(0.5,),
                        training=short)
    report = goes_on(told, cfg, tmp_path, monkeypatch)
    assert {c.verdict for c in report.claims} == UNDECIDED


@pytest.fixture
def tiny(tmp_path):
    "A RoBERTa and a Llama with two adapters, of the paper's architecture, small."
    for seed in (1, 2):
        lora(seed).save_pretrained(tmp_path / f"adapter{seed}")
    return {"model": tiny_models.roberta(tmp_path / "roberta"),
            "base": tiny_models.llama(tmp_path / "llama", max_length=4096),
            "adapters": tuple(str(tmp_path / f"adapter{s}") for s in (1, 2))}


def test_full_scale_path_with_tiny_models(tmp_path, tiny, recorded, monkeypatch):
    "Tasks and adapters, from data of the hub's form to tables."
    letters = told.suites.mmlu
    monkeypatch.setattr(told.suites, "mmlu", lambda *a: [  # three questions, their last words
        item | {"context": item["context"][-60:]} for item in letters(*a)[:3]])
    monkeypatch.setattr(told, "ALPHAS", (1, 2))
    monkeypatch.setattr(told, "SCALES", (1, 2))
    cfg = FULL.replace(**tiny, device="cpu", seeds=(0,), max_length=16, densities=(0.2,),
                       glue_training=Training(steps=1, batch_size=2))
    report = experiment(cfg, start_run("compeft", cfg, "full", root=tmp_path / "runs"))
    assert sorted(report.tables["glue_full"]["task"].unique()) == sorted(FULL.glue)
    assert len(report.tables["glue_lora"]) == 4 * len(FULL.glue)
    published = report.tables["published"]
    assert len(published) == 6 and (published.query("method == 'ComPEFT'")["times"] > 8).all()
    assert "cais/mmlu@all#test" in set(map(str, recorded.asked))


# two processes

TRAIN = """
import torch

from adaptlab import modules, processes, recipes
from adaptlab.arithmetic.compeft import ComPEFTCompressor
from adaptlab.train import Training

torch.manual_seed(0)
model, x, y = recipes.MLP((8, 16, 4)), torch.randn(32, 8), torch.arange(32) % 4
start = {n: p.detach().clone() for n, p in model.named_parameters()}
Training(steps=4, batch_size=8, lr=0.5).fit(
    model, (x, y), modules.cross_entropy, optimizer=torch.optim.SGD, device="cpu", progress=False)
packer = ComPEFTCompressor(0.2, reference=start)
tried = packer.fit_alpha(model, lambda m: -modules.cross_entropy(m, (x, y)).item(), (1, 2, 4))
packer.apply_(model)
if processes.is_main():
    print("tried", *(t["score"] for t in tried))
    print("places", *packer.vectors[0].indices.tolist())
    print("logits", *model.eval()(x[:4]).flatten().tolist())
"""


def test_two_processes_make_and_compress_one_expert(tmp_path, capsys):
    found = two_processes.assert_alike(TRAIN, tmp_path, capsys)
    assert len(found) == 3
