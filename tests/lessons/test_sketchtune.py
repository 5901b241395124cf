"""SketchTune: k-means and greedy codes against references, the layer, models, files, experiment."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptlab import adapters, checkpoints, recipes
from adaptlab.bench.runs import start_run
from adaptlab.experiments import sketchtune as told
from adaptlab.experiments.sketchtune import FULL, SMALL, experiment
from adaptlab.sparse import sketchtune
from adaptlab.sparse.sketchtune import (
    Sketch, SketchConfig, SketchedLinear, assign_codes, collect_hessians, compressed_nbytes, decode,
    hessian_factor, learn_sketch, load_sketch_state_dict, merge_sketches, output_error, pack_codes,
    sketch_model, sketch_state_dict, sketched, unpack_codes, weighted_kmeans_1d)
from adaptlab.train import Training
from one_seed import goes_on


def problem(o=6, i=24, seed=0, tokens=200):
    "A weight, and the Hessian of correlated inputs."
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(o, i, generator=g, dtype=torch.float64)
    x = torch.randn(tokens, i, generator=g, dtype=torch.float64)
    x = x @ torch.randn(i, i, generator=g, dtype=torch.float64) / i**0.5
    return W, 2 * x.T @ x


def inertia(x, w, table):
    return float((w * (x[:, None] - table).abs().amin(1) ** 2).sum())


# tables


def exact(x, w, k):
    "The optimum in one dimension: every cut of the sorted points into k runs."
    order = x.argsort()
    x, w, best = x[order], w[order], float("inf")
    for cut in itertools.combinations(range(1, len(x)), k - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *cut, len(x))):
            mean = (w[a:b] * x[a:b]).sum() / w[a:b].sum()
            total += float((w[a:b] * (x[a:b] - mean) ** 2).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("init", ["linspace", "kmeans++"])
def test_between_the_optimum_and_the_start(init):
    torch.manual_seed(0)
    for _ in range(5):
        x, w = torch.randn(14, dtype=torch.float64), torch.rand(14, dtype=torch.float64) + 0.01
        found = inertia(x, w, weighted_kmeans_1d(x[None], w, 3, init)[0])
        start = inertia(x, w, weighted_kmeans_1d(x[None], w, 3, init, iters=0)[0])
        assert exact(x, w, 3) * (1 - 1e-9) <= found <= start


def test_kmeans_plus_plus_at_sixteen_entries():
    "Where an even start ends up worse."
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((40, 256)).double()
    w = torch.ones(256, dtype=torch.float64)
    total = {init: sum(inertia(r, w, t) for r, t in zip(
        x, weighted_kmeans_1d(x, w, 16, init), strict=True)) for init in ("linspace", "kmeans++")}
    assert total["kmeans++"] < 0.7 * total["linspace"]


def test_weights_over_decades_and_entries_without_points():
    x = torch.tensor([[0.0, 1, 2, 100, 101]])
    w = torch.tensor([1e-30, 1e-30, 1e-30, 1e30, 1e30])
    table = weighted_kmeans_1d(x, w, 2, "linspace")
    torch.testing.assert_close(table, torch.tensor([[1.0, 100.5]], dtype=torch.float64))
    lonely = weighted_kmeans_1d(torch.tensor([[0.0, 0.1, 0.2, 10]]), torch.ones(4), 3, "linspace")
    torch.testing.assert_close(lonely, torch.tensor([[0.1, 5, 10]], dtype=torch.float64))


def test_a_generator_decides_and_rows_may_have_their_own_weights():
    x, w = torch.randn(3, 50), torch.rand(3, 50)
    same = [weighted_kmeans_1d(x, w, 8) for _ in range(2)]
    assert torch.equal(*same) and (same[0].diff(dim=1) >= 0).all()
    other = weighted_kmeans_1d(x, w, 8, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(same[0], other)
    alone = weighted_kmeans_1d(x[1:2], w[1], 4, "linspace")
    torch.testing.assert_close(weighted_kmeans_1d(x, w, 4, "linspace")[1:2], alone)


@pytest.mark.parametrize("rows, weights, k, init, words", [
    (torch.ones(2, 3), torch.ones(4), 2, "linspace", "rows"),
    (torch.ones(3), torch.ones(3), 2, "linspace", "rows"),
    (torch.ones(2, 3), -torch.ones(3), 2, "linspace", "at least 0"),
    (torch.ones(2, 3), torch.zeros(3), 2, "linspace", "not all 0"),
    (torch.ones(2, 3), torch.full((3,), float("nan")), 2, "linspace", "finite"),
    (torch.ones(2, 3), torch.ones(3), 0, "linspace", "k >= 1"),
    (torch.ones(2, 3), torch.ones(3), 2, "random", "random"),
])
def test_what_k_means_refuses(rows, weights, k, init, words):
    with pytest.raises(ValueError, match=words):
        weighted_kmeans_1d(rows, weights, k, init)


# codes


def leanquant(W, lut, H, damp, block):
    "LeanQuant's pass, written again: blocks of columns, float32, one table per row."
    W, H = W.float().clone(), H.float()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H))
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    codes = torch.zeros(W.shape, dtype=torch.long)
    for a in range(0, W.shape[1], block):
        b = min(a + block, W.shape[1])
        part, err, Ub = W[:, a:b].clone(), torch.zeros(len(W), b - a), U[a:b, a:b]
        for j in range(b - a):
            codes[:, a + j] = (lut.float() - part[:, j : j + 1]).abs().argmin(-1)
            q = lut.float().gather(1, codes[:, a + j : a + j + 1])[:, 0]
            err[:, j] = (part[:, j] - q) / Ub[j, j]
            part[:, j:] -= err[:, j : j + 1] @ Ub[j : j + 1, j:]
        W[:, b:] -= err @ U[a:b, b:]
    return codes


def surgeon(W, lut, H):
    "The optimal brain surgeon: fix a column, move the later ones, take it out of the inverse."
    W, inverse, codes = W.clone(), torch.linalg.inv(H), torch.zeros(W.shape, dtype=torch.long)
    for j in range(W.shape[1]):
        codes[:, j] = (lut - W[:, j : j + 1]).abs().argmin(-1)
        gap = W[:, j] - lut.gather(1, codes[:, j : j + 1])[:, 0]
        W -= torch.outer(gap / inverse[j, j], inverse[j]) * (torch.arange(W.shape[1]) >= j)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # gone
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("o, i", [(12, 32), (5, 150)])  # one block, two
def test_codes_are_leanquants_and_the_surgeons(bits, o, i):
    W, H = problem(o, i, seed=bits, tokens=4 * i)
    lut, codes = learn_sketch(W, H, bits=bits)
    assert torch.equal(codes.long(), leanquant(W, lut[:, 0], H, 0.1, 128))
    damped = H + 0.1 * H.diagonal().mean() * torch.eye(i)
    assert torch.equal(codes.long(), surgeon(W, lut[:, 0], damped))
    assert torch.equal(assign_codes(W, lut, hessian_factor(H), block=7), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_making_up_for_errors(bits):
    W, H = problem(12, 32, seed=1)
    made = decode(*learn_sketch(W, H, bits=bits))
    near = decode(*learn_sketch(W, H, bits=bits, compensate=False))
    assert output_error(W, made, H) < output_error(W, near, H)
    assert (W - made).norm() > (W - near).norm()
    assert output_error(W, torch.zeros_like(W), H) == 1 and output_error(W, W, H) == 0


def test_the_pass_adds_up_the_damped_error():
    "The plain output error is smaller, by what damping adds."
    W, H = problem(5, 40)
    mean, U = H.diagonal().mean(), hessian_factor(H)
    gap = W - decode(*learn_sketch(W, H, 2)).double()
    passed = (gap @ torch.linalg.inv(U)).square().sum()
    plain = (gap @ H @ gap.T).trace()
    torch.testing.assert_close(passed, plain + 0.1 * mean * gap.square().sum())
    assert plain < passed


def test_uncorrelated_inputs_have_nothing_to_make_up():
    W, H = problem()
    flat = H.diagonal().diag()
    lut, codes = learn_sketch(W, flat)
    assert torch.equal(codes, assign_codes(W, lut))
    plain, _ = learn_sketch(W, H, bits=2, power=0.0)
    torch.testing.assert_close(plain, learn_sketch(W, bits=2).lut)
    assert not torch.allclose(plain, learn_sketch(W, H, bits=2).lut)


def test_act_order_is_a_permutation():
    W, H = problem()
    order = H.diagonal().argsort(descending=True, stable=True)
    lut, codes = learn_sketch(W, H, bits=2, act_order=True)
    wanted = learn_sketch(W[:, order], H[order][:, order], bits=2)
    torch.testing.assert_close(lut, wanted.lut)
    assert torch.equal(codes[:, order], wanted.codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_groups_are_runs_of_the_original_columns(act_order):
    W, H = problem(4, 24)
    lut, codes = learn_sketch(W, H, bits=2, groups_per_row=3, act_order=act_order)
    made = decode(lut, codes)
    for g, run in enumerate(made.split(8, 1)):
        assert all(set(r.tolist()) <= set(t.tolist()) for r, t in zip(run, lut[:, g], strict=True))
    finer = lut.repeat_interleave(2, 1)  # the same weight with twice as many tables
    assert torch.equal(decode(finer, codes), made)


def test_errors_fall_with_bits_and_groups():
    W, H = problem(8, 48)
    by_bits = [output_error(W, decode(*learn_sketch(W, H, b)), H) for b in (1, 2, 3, 4)]
    by_groups = [output_error(W, decode(*learn_sketch(W, H, 2, g)), H) for g in (1, 2, 4)]
    assert sorted(by_bits, reverse=True) == by_bits and sorted(by_groups, reverse=True) == by_groups


@pytest.mark.parametrize("bits, groups", [(1, 1), (2, 2), (4, 1)])
def test_few_values_are_kept_exactly(bits, groups):
    torch.manual_seed(0)
    values = torch.randn(5, groups, 2**bits)
    W = decode(values, torch.randint(2**bits, (5, 64)))
    _, H = problem(i=64)
    made = learn_sketch(W, H, bits, groups)
    assert torch.equal(decode(*made), W) and made.lut.shape == (5, groups, 2**bits)


def test_dead_inputs_and_small_groups_warn():
    W, H = problem(3, 8)
    H[2] = H[:, 2] = 0
    with pytest.warns(UserWarning, match="1 of 8 inputs"):
        lut, codes = learn_sketch(W, H, 3)
    assert torch.isfinite(lut).all() and (decode(lut, codes)[:, 2].abs() < W[:, 2].abs() + 1).all()
    with pytest.warns(UserWarning, match="compress nothing"):
        made = learn_sketch(W, None, 3, 2)
    torch.testing.assert_close(decode(*made), W)


def test_dead_columns_are_zero_before_anything_else():
    W, H = problem(3, 24)
    H[2] = H[:, 2] = 0
    alive = H.clone()
    alive[2, 2] = 1
    cleared = W.clone()
    cleared[:, 2] = 0
    with pytest.warns(UserWarning, match="1 of 24"):
        found = learn_sketch(W, H, 2)
    wanted = learn_sketch(cleared, alive, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_table_with_room_repeats_the_largest_value():
    x = torch.tensor([[3.0, 1, 3, 1], [5, 5, 5, 5]])
    for init in ("linspace", "kmeans++"):
        table = weighted_kmeans_1d(x, torch.ones(4), 4, init)
        assert table.tolist() == [[1, 3, 3, 3], [5, 5, 5, 5]]


@pytest.mark.parametrize("change, error, words", [
    ({"bits": 5}, ValueError, "bits = 5"), ({"bits": 0}, ValueError, "bits"),
    ({"bits": True}, ValueError, "bits"), ({"groups_per_row": 5}, ValueError, "divide"),
    ({"groups_per_row": 0}, ValueError, "divide"), ({"power": -1.0}, ValueError, "power"),
    ({"damp": -0.1}, ValueError, "damp"), ({"hessian": torch.eye(3)}, ValueError, "shape"),
    ({"hessian": torch.ones(24)}, ValueError, "shape"),
    ({"hessian": torch.full((24, 24), float("nan"))}, ValueError, "NaN"),
    ({"hessian": torch.ones(24, 24).triu()}, ValueError, "symmetric"),
    ({"hessian": torch.ones(24, 24), "damp": 0.0}, ValueError, "raise it"),
    ({"W": torch.ones(3)}, TypeError, "shape"),
    ({"W": torch.ones(3, 24, dtype=torch.int8)}, TypeError, "int8"),
    ({"W": torch.full((3, 24), float("inf"))}, ValueError, "infinity"),
])
def test_bad_input(change, error, words):
    W, H = problem()
    with pytest.raises(error, match=words):
        learn_sketch(**{"W": W, "hessian": H} | change)


@pytest.mark.parametrize("codes, words", [
    (torch.zeros(2, 3).long(), "odd|3 columns"), (torch.full((2, 4), 16), "0 to 15"),
    (torch.full((2, 4), -1), "0 to 15"), (torch.zeros(2, 4), "integers")])
def test_codes_that_can_not_be_packed(codes, words):
    with pytest.raises(ValueError, match=words):
        pack_codes(codes)


def test_packing_is_the_official_layout():
    codes = torch.randint(16, (2, 3, 8))
    packed = pack_codes(codes)
    assert torch.equal(packed.long(), codes[..., ::2] * 16 + codes[..., 1::2])
    assert torch.equal(unpack_codes(packed).long(), codes) and packed.nbytes == codes.numel() // 2


# the layer


@pytest.mark.parametrize("slab", [8, 60, 2**20])
@pytest.mark.parametrize("groups", [1, 3])
def test_outputs_and_gradients_are_those_of_a_gather(slab, groups, monkeypatch):
    monkeypatch.setattr(sketchtune, "SLAB", slab)
    torch.manual_seed(0)
    W, H = problem(7, 24)
    layer = SketchedLinear(learn_sketch(W, H, 2, groups), torch.randn(7, dtype=torch.float64))
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    index = unpack_codes(layer.packed).long().view(7, groups, -1)
    y = x @ layer.lut.gather(2, index).view(7, 24).T + layer.bias
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)
    found = torch.autograd.grad(layer(x).cos().sum(), [x, layer.lut])
    wanted = torch.autograd.grad(y.cos().sum(), [x, layer.lut])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    dense = (-y.sin()).flatten(0, 1).T @ x.flatten(0, 1)
    summed = torch.zeros_like(layer.lut).scatter_add(2, index, dense.view_as(index))
    torch.testing.assert_close(found[1], summed.detach(), rtol=1e-10, atol=1e-10)


def test_one_entry_per_row_moves_a_matrix_of_full_rank():
    torch.manual_seed(0)
    layer = SketchedLinear(learn_sketch(torch.randn(32, 32), bits=2))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lut[:, :, 1] += 0.1  # 32 numbers
    change = layer.weight.detach() - before
    torch.testing.assert_close(change, 0.1 * (unpack_codes(layer.packed) == 1))
    assert torch.linalg.matrix_rank(change) == 32


def test_nothing_dense_is_kept_for_the_backward_pass():
    layer, kept = SketchedLinear(learn_sketch(torch.randn(64, 32))), []
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in kept} == {
        t.data_ptr() for t in (x, layer.lut, layer.packed)}


def test_half_precision_sums_in_float32():
    layer = SketchedLinear(learn_sketch(torch.randn(8, 32).bfloat16()))
    assert layer.lut.dtype == torch.float32
    x = torch.randn(500, 32).bfloat16()
    layer(x).float().sum().backward()
    assert layer(x).dtype == torch.bfloat16
    dense = x.float().sum(0).expand(8, -1)
    wanted = torch.zeros(8, 16).scatter_add(1, unpack_codes(layer.packed).long(), dense)
    assert (layer.lut.grad[:, 0] - wanted).norm() < 0.02 * wanted.norm()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


@pytest.mark.parametrize("layer", [nn.Linear(6, 9), nn.Linear(6, 9, bias=False), Conv1D(9, 6)])
def test_from_a_layer_and_back(layer):
    with pytest.warns(UserWarning, match="nothing"):  # 16 entries for 6 weights: nothing is lost
        made = SketchedLinear.from_linear(layer)
    x = torch.randn(5, 6)
    torch.testing.assert_close(made(x), layer(x))
    torch.testing.assert_close(made.merge()(x), layer(x))
    assert made.merge(torch.bfloat16).weight.dtype == torch.bfloat16
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["lut"]


@pytest.mark.parametrize("layer", [
    nn.Embedding(4, 6), SketchedLinear(Sketch(torch.zeros(2, 1, 2), torch.zeros(2, 4).long()))])
def test_layers_that_are_refused(layer):
    with pytest.raises(TypeError, match="no linear layer"):
        SketchedLinear.from_linear(layer)


@pytest.mark.parametrize("lut, codes, bias, words", [
    (torch.zeros(2, 1, 4), torch.full((2, 6), 4), None, "no entry"),
    (torch.zeros(2, 1, 4), torch.zeros(3, 6).long(), None, "fit"),
    (torch.zeros(2, 4), torch.zeros(2, 6).long(), None, "fit"),
    (torch.zeros(2, 4, 2), torch.zeros(2, 6).long(), None, "divide"),
    (torch.zeros(2, 1, 4), torch.zeros(2, 5).long(), None, "5 columns"),
    (torch.zeros(2, 1, 4), torch.zeros(2, 6).long(), torch.zeros(3), "bias"),
])
def test_sketches_that_fit_no_layer(lut, codes, bias, words):
    with pytest.raises(ValueError, match=words):
        SketchedLinear(Sketch(lut, codes), bias)


# models


@pytest.fixture
def llama():
    model, ids = recipes.tiny_llama(), torch.randint(0, 260, (8, 40))
    return model, [{"input_ids": rows} for rows in ids.split(4)]


def test_a_llama_is_sketched_trained_and_swapped(llama, tmp_path):
    model, batches = llama
    reference, dense = copy.deepcopy(model), compressed_nbytes(model)
    sketch_model(model, batches, SketchConfig(groups_per_row=2))
    layers = sketched(model)
    assert len(layers) == 7 * model.config.num_hidden_layers
    trained = sum(layer.out_features for layer in layers.values()) * 2 * 16
    assert adapters.count_parameters(model)[0] == trained
    assert compressed_nbytes(model) < dense
    gap = model(**batches[0]).logits - reference(**batches[0]).logits
    assert gap.norm() < 0.2 * reference(**batches[0]).logits.norm()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = sketch_state_dict(model)
    data = [{"input_ids": r, "labels": r} for r in torch.cat([b["input_ids"] for b in batches])]
    Training(steps=4, batch_size=4, lr=1e-2).fit(model, data, device="cpu", progress=False)
    after = model.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == set(first) and {k.rpartition(".")[2] for k in first} == {"lut"}
    checkpoints.save_state(sketch_state_dict(model), tmp_path / "task.safetensors")
    logits = model(**batches[0]).logits
    load_sketch_state_dict(model, first)
    assert not torch.allclose(model(**batches[0]).logits, logits, atol=1e-3)
    load_sketch_state_dict(model, checkpoints.load_state(tmp_path / "task.safetensors"))
    torch.testing.assert_close(model(**batches[0]).logits, logits)
    merge_sketches(model)
    torch.testing.assert_close(model(**batches[0]).logits, logits, rtol=1e-4, atol=1e-5)
    assert not sketched(model) and type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_sequential_sees_the_partly_sketched_model(llama):
    model, batches = llama
    base = copy.deepcopy(model)
    found = {}
    for sequential in (False, True):
        net = sketch_model(copy.deepcopy(base), batches, SketchConfig(bits=2), sequential)
        found[sequential] = sketch_state_dict(net)
    same = [torch.equal(found[True][k], found[False][k]) for k in found[True]]
    first = [k for k in found[True] if "layers.0.self_attn" in k and "o_proj" not in k]
    assert all(torch.equal(found[True][k], found[False][k]) for k in first) and not all(same)


def test_layers_come_in_the_order_in_which_they_run(llama):
    model, batches = llama
    layers = adapters.match_layers(model, sketchtune.LLAMA)
    steps = sketchtune._fed_together(model, layers, batches[0])
    assert [sorted(n.rpartition(".")[2] for n in names) for names in steps[:4]] == [
        ["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_shared_layer_is_sketched_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    net.append(net[0])
    sketch_model(net, [torch.randn(100, 32)], SketchConfig(bits=2, target_modules=("0",)))
    assert net[2] is net[0] and len(sketched(net)) == 1


def test_without_calibration_it_is_plain_k_means():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 8))
    wanted = learn_sketch(net[0].weight, bits=2)
    sketch_model(net, None, SketchConfig(bits=2, target_modules=("0",)))
    assert torch.equal(net[0].lut, wanted.lut)


class Lazy(nn.Module):
    "Has a layer that never runs."

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_that_never_runs_is_refused(sequential):
    net = Lazy()
    with pytest.raises(ValueError, match="idle.*never ran"):
        sketch_model(net, [torch.randn(40, 8)], SketchConfig(bits=1, target_modules=(
            "used", "idle")), sequential)
    assert not sketched(net)


@pytest.mark.parametrize("net, config, batches, error, words", [
    (nn.Sequential(nn.Linear(8, 4)), {"target_modules": ("1",)}, None, ValueError, "layers are"),
    (nn.Sequential(nn.Embedding(8, 4)), {"target_modules": ("0",)}, None, TypeError, "Embedding"),
    (nn.Sequential(nn.Linear(7, 4)), {"target_modules": ("0",)}, None, ValueError, "odd"),
    (nn.Sequential(nn.Linear(8, 4)), {"target_modules": ("0",), "bits": 9}, None, ValueError, "9"),
    (nn.Sequential(nn.Linear(8, 4)), {"target_modules": ("0",), "groups_per_row": 3}, None,
     ValueError, "divide"),
    (nn.Sequential(nn.Linear(64, 4)), {"target_modules": ("0",)}, [], ValueError, "no calibration"),
])
def test_models_that_are_refused(net, config, batches, error, words):
    with pytest.raises(error, match=words):
        sketch_model(net, batches, SketchConfig(**config))


def test_tables_of_another_model_are_refused(llama):
    model, batches = llama
    with pytest.raises(ValueError, match="no sketched layer"):
        sketch_state_dict(model)
    other = sketch_model(copy.deepcopy(model), None, SketchConfig(bits=2))
    sketch_model(model, None, SketchConfig(bits=3))
    kept = sketch_state_dict(model)
    with pytest.raises(ValueError, match="bits or groups"):
        load_sketch_state_dict(model, sketch_state_dict(other))
    with pytest.raises(ValueError, match="in the model or in the file"):
        load_sketch_state_dict(model, dict(list(kept.items())[1:]))
    assert all(torch.equal(v, kept[k]) for k, v in sketch_state_dict(model).items())
    with pytest.raises(TypeError, match="plain linear"):  # once is enough
        sketch_model(model, None, SketchConfig(bits=3))


def test_hessians_leave_padding_out(llama):
    model, batches = llama
    ids = batches[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros(4, 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 5, dtype=torch.long)], 1)
    name = "model.layers.0.self_attn.q_proj"
    plain = collect_hessians(model, [{"input_ids": ids}], [name])[name]
    hidden = collect_hessians(model, [{"input_ids": padded, "attention_mask": mask}], [name])[name]
    torch.testing.assert_close(plain, hidden, rtol=1e-4, atol=1e-4)


def test_the_papers_counts():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        layers = adapters.match_layers(LlamaForCausalLM(LlamaConfig()), sketchtune.LLAMA)
    rows = sum(layer.out_features for layer in layers.values())
    assert [round(rows * g * 16 / 1e6, 1) for g in (1, 2, 4, 8)] == [21.8, 43.5, 87.0, 174.1]


# the experiment


def tiny(**more):
    return SMALL.replace(seeds=(0,), images=(32, 32), lrs=(1e-2,), calibration_images=16,
                         bits=(2,), training=Training(steps=1, batch_size=8), **more)


@pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    report = goes_on(told, tiny(), tmp_path, monkeypatch)
    compared = [c for c in report.claims if "LoRA" in c.text]
    assert compared and {c.verdict for c in compared} == {"not decided at this scale"}


def test_rounding_to_the_nearest_on_an_even_grid():
    W = torch.tensor([[0.0, 0.4, 0.6, 3.0]])
    assert decode(*told.uniform_sketch(W, 2)).tolist() == [[0.0, 0.0, 1.0, 3.0]]


@pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
def test_full_scale_path_with_a_tiny_model(tmp_path, recorded):
    "From the authors' files and a recorded text to tables."
    folder = recorded.write("LLM-Adapters", tmp_path)
    model = recipes.tiny_llama(vocab_size=260, hidden_size=32, layers=1, heads=2, kv_heads=1)
    model.save_pretrained(tmp_path / "model")
    recipes.byte_tokenizer().save_pretrained(tmp_path / "model")
    cfg = FULL.replace(
        model=str(tmp_path / "model"), dtype="float32", device="cpu", n_choose=2, n_test=2,
        source=str(tmp_path / FULL.source), tasks=tuple(str(tmp_path / t) for t in FULL.tasks),
        sequences=(2, 16), groups=(1, 2), lora_rank=2, max_length=300, max_new_tokens=2,
        language=Training(steps=1, batch_size=2))
    assert folder.is_dir()
    report = experiment(cfg, start_run("sketchtune", cfg, "full", root=tmp_path / "runs"))
    table = report.tables["language"]
    assert set(table["method"]) == {"before", "sketch g=1", "sketch g=2", "LoRA", "RTN + LoRA"}
    assert set(table["part"]) == {"new", *cfg.tasks} and len(report.claims) == 2 * 8


def test_values_that_are_not_finite_and_tables_that_do_not_fit():
    with pytest.raises(ValueError, match="rows hold NaN"):
        weighted_kmeans_1d(torch.full((2, 5), float("nan")), torch.ones(5), 2)
    W = torch.randn(4, 10)
    for lut, factor in ((torch.randn(4, 3, 4), None), (torch.randn(3, 1, 4), None),
                        (torch.randn(4, 1, 4), torch.eye(9))):
        with pytest.raises(ValueError, match="divisor of i"):
            assign_codes(W, lut, factor)
    model = nn.Sequential(SketchedLinear(learn_sketch(W, bits=2)))
    before = sketch_state_dict(model)
    with pytest.raises(ValueError, match="diverged"):
        load_sketch_state_dict(model, {n: t * float("nan") for n, t in before.items()})
    assert all(torch.equal(t, before[n]) for n, t in sketch_state_dict(model).items())


@pytest.mark.parametrize("names", [("0", "2"), ("2",)])
def test_two_layers_with_one_weight_are_refused(names):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    net[2].weight = net[0].weight
    with pytest.raises(ValueError, match="'0' and '2' share one weight"):
        sketch_model(net, None, SketchConfig(bits=2, target_modules=names))
    assert not sketched(net) and net[0].weight.requires_grad
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())  # as the message says
    assert len(sketched(sketch_model(net, None, SketchConfig(bits=2, target_modules=names))))


@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_is_as_it_was_after_an_error(sequential):
    "The second layer's Hessian has no inverse: one of its inputs is a copy of another."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        net[0].weight[1:] = net[0].weight[:1]
        net[0].bias[1:] = net[0].bias[:1]
    first, x = net[0], torch.randn(400, 16)
    with pytest.raises(ValueError, match="raise it"):
        sketch_model(net, [x], SketchConfig(bits=2, damp=0.0, target_modules=("0", "1")),
                     sequential)
    assert net[0] is first and not sketched(net)
    assert all(p.requires_grad for p in net.parameters())


def test_the_share_of_a_layer_of_zeros_and_shapes():
    W, zero, H = torch.randn(4, 10), torch.zeros(4, 10), torch.eye(10)
    assert output_error(zero, zero, H) == 0 and output_error(zero, W, H) == float("inf")
    assert output_error(W, W, H) == 0 and output_error(W, zero, H) == 1
    for bad in ((W, W[:1], H), (W, W, H[:1]), (W[0], W[0], H)):
        with pytest.raises(ValueError, match="are needed"):
            output_error(*bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_half_precision_sum_in_float32(dtype):
    "Thousands of ones: half precision would stop counting at 256 or 2048."
    sketch = Sketch(torch.randn(2, 1, 2), torch.zeros(2, 8192, dtype=torch.uint8))
    layer = SketchedLinear(sketch).to(dtype)
    layer(torch.ones(1, 8192, dtype=dtype)).sum().backward()
    assert layer.lut.dtype == layer.lut.grad.dtype == dtype
    assert layer.lut.grad.tolist() == [[[8192, 0]], [[8192, 0]]]


def test_no_rows_and_checkpointing():
    torch.manual_seed(0)
    layer = SketchedLinear(learn_sketch(torch.randn(6, 32)), torch.randn(6))
    assert layer(torch.ones(0, 5, 32)).shape == (0, 5, 6)
    layer(torch.ones(0, 5, 32)).sum().backward()
    assert layer.lut.grad.count_nonzero() == 0
    x = torch.randn(3, 32)
    wanted, = torch.autograd.grad(layer(x).square().sum(), layer.lut)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    found, = torch.autograd.grad(again.square().sum(), layer.lut)
    torch.testing.assert_close(found, wanted)


def test_a_fresh_model_takes_tables_and_codes(llama, tmp_path):
    model, batches = llama
    fresh, config = copy.deepcopy(model), SketchConfig(groups_per_row=2)
    sketch_model(model, batches, config)
    checkpoints.save_state(model.state_dict(), tmp_path / "base.safetensors")
    sketch_model(fresh, None, config)
    assert not torch.allclose(fresh(**batches[0]).logits, model(**batches[0]).logits)
    fresh.load_state_dict(checkpoints.load_state(tmp_path / "base.safetensors"))
    assert torch.equal(fresh(**batches[0]).logits, model(**batches[0]).logits)


def test_what_would_be_wrong_in_silence():
    net = nn.Sequential(SketchedLinear(learn_sketch(torch.randn(4, 32), bits=2)))
    with pytest.raises(TypeError, match="int64"):  # the weight would be cut to whole numbers
        net(torch.ones(3, 32, dtype=torch.long))
    with pytest.raises(ValueError, match="int64"):
        load_sketch_state_dict(net, {n: t.long() for n, t in sketch_state_dict(net).items()})
    for batches in (torch.randn(8, 32), {"input": torch.randn(8, 32)}):
        with pytest.raises(TypeError, match="give .batch"):
            sketch_model(nn.Sequential(nn.Linear(32, 8)), batches, SketchConfig(
                bits=2, target_modules=("0",)))
