"""Arithmetic on states: properties, agreement with torch, what is refused and warned about."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from adaptlab import recipes, weights
from adaptlab.weights import (
    SparseDelta,
    add,
    as_state,
    average,
    cosine,
    factor_pairs,
    interpolate,
    linear_combination,
    align,
    norm,
    pack,
    scale,
    task_vector,
    unpack,
)
from states import Tied, fast, layouts, make, near, same, small_pieces  # noqa: F401


# ------------------------------------------------------------------ averages


@fast
@given(layouts(), st.integers(1, 5), st.integers(0, 99))
def test_average_is_the_mean(layout, k, seed):
    states = [make(layout, seed + i) for i in range(k)]
    mean = average(states)
    expected = {n: torch.stack([s[n].double() for s in states]).mean(0) for n in layout}
    assert near(mean, {n: t.to(mean[n].dtype) for n, t in expected.items()})
    assert near(mean, average(states[::-1]))


@fast
@given(layouts(), st.integers(0, 99), st.integers(1, 4))
def test_average_of_one_or_of_equals(layout, seed, k):
    state = make(layout, seed)
    assert same(average([state]), state)
    assert near(average([state] * k), state)
    weights_ = [0.0] * k
    weights_[seed % k] = 1.0
    assert same(average([state] * k, weights_), state)


def test_average_agrees_with_averaged_model():
    torch.manual_seed(0)
    nets = [recipes.SmallCNN() for _ in range(4)]
    reference = AveragedModel(nets[0])
    for net in nets:
        reference.update_parameters(net)
    mean = average(nets)
    for name, p in reference.module.named_parameters():
        assert torch.allclose(mean[name], p, atol=1e-6)


def test_running_update_is_the_mean():
    torch.manual_seed(0)
    states = [make({"w": ((5, 9), torch.float32)}, i) for i in range(6)]
    running = states[0]
    for n, state in enumerate(states[1:], start=1):
        running = average([running, state], [n / (n + 1), 1 / (n + 1)])
    assert near(running, average(states))


def test_half_precision_is_rounded_once():
    g = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(1000, generator=g).bfloat16()} for _ in range(8)]
    exact = torch.stack([s["w"].double() for s in states]).mean(0).bfloat16()
    assert (average(states, precision=torch.float64)["w"] == exact).all()
    assert (average(states)["w"] == exact).float().mean() > 0.999


# ------------------------------------------------------------------ task vectors


@fast
@given(layouts((torch.float32, torch.bfloat16, torch.float16)), st.integers(0, 99))
def test_task_vector_is_undone_exactly_in_float64(layout, seed):
    base, tuned = make(layout, seed), make(layout, seed + 1)
    tau = task_vector(tuned, base, dtype=torch.float64)
    assert same(add(base, tau), tuned)
    assert same(add(base, tau, 0), base)
    assert same(add(tuned, task_vector(base, base)), tuned)


@fast
@given(layouts((torch.float64,)), st.integers(0, 99), st.floats(-3, 3), st.floats(-3, 3))
def test_linear(layout, seed, x, y):
    base, a, b = (make(layout, seed + i) for i in range(3))
    both = linear_combination([a, b], [x, y])
    assert near(add(base, both), add(add(base, a, x), b, y), 10)
    assert near(both, linear_combination([scale(a, x), scale(b, y)], [1, 1]), 10)
    assert near(scale(both, 2), add(both, both), 10)


def test_bf16_sum_is_the_rounded_exact_sum():
    base, tuned, target = (make({"w": ((40, 30), torch.bfloat16)}, i) for i in range(3))
    exact = target["w"].double() + 0.3 * (tuned["w"].double() - base["w"].double())
    result = add(target, task_vector(tuned, base, dtype=torch.float64), 0.3)
    assert torch.equal(result["w"], exact.bfloat16())


def test_skip_is_left_out_of_a_task_vector_and_alone_in_a_sum():
    base, tuned = make({"a": ((3,), torch.float32), "b": ((3,), torch.float32)}, 0), {}
    tuned = {n: t + 1 for n, t in base.items()}
    tau = task_vector(tuned, base, skip="b")
    assert list(tau) == ["a"]
    with pytest.raises(ValueError, match="b is missing"):
        add(base, tau)
    moved = add(base, tau, allow_missing=True)
    assert torch.equal(moved["b"], base["b"]) and torch.equal(moved["a"], tuned["a"])
    assert same(add(base, {"a": tau["a"]}, skip="b"), moved)


# ------------------------------------------------------------------ interpolation


@fast
@given(layouts(), st.integers(0, 99), st.floats(0, 1))
def test_interpolation_ends_and_symmetry(layout, seed, t):
    a, b = make(layout, seed), make(layout, seed + 1)
    assert same(interpolate(a, b, 0), a)
    assert near(interpolate(a, b, 1), b)
    assert near(interpolate(a, b, t), interpolate(b, a, 1 - t), 5)


def test_extrapolation():
    a, b = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    assert torch.equal(interpolate(a, b, 1.5)["w"], torch.full((3,), 1.5))
    assert torch.equal(interpolate(a, b, -1)["w"], torch.full((3,), -1.0))


# ------------------------------------------------------------------ norms and angles


@fast
@given(layouts(), st.integers(0, 99))
def test_norm_and_cosine_against_flat_vectors(layout, seed):
    a, b = make(layout, seed), make(layout, seed + 1)
    x, y = (torch.cat([t.double().reshape(-1) for t in s.values()]) for s in (a, b))
    assert math.isclose(norm(a), float(x.norm()), rel_tol=1e-12, abs_tol=1e-300)
    if x.norm() * y.norm() > 0:
        expected = float(x @ y / (x.norm() * y.norm()))
        assert math.isclose(cosine(a, b), expected, rel_tol=1e-9, abs_tol=1e-12)
        assert cosine(a, b) == cosine(b, a)


def test_norm_of_a_difference_needs_no_copy_of_it():
    a, b = (make({"w": ((9, 9), torch.float32)}, i) for i in range(2))
    assert math.isclose(
        norm(task_vector(a, b, lazy=True)), float((a["w"] - b["w"]).norm()), rel_tol=1e-6
    )


def test_tied_tensors_count_once():
    w = torch.ones(4, 4)
    assert norm({"a": w, "b": w}) == 4


# ------------------------------------------------------------------ what must not happen


@pytest.mark.parametrize("method", ["average", "add", "interpolate", "task_vector"])
def test_inputs_are_left_alone_and_share_no_memory(method):
    layout = {"w": ((4, 5), torch.float32)}
    a, b = ({**make(layout, i), "n": torch.tensor([1, 2])} for i in range(2))
    delta = {"w": b["w"]}
    copies = [{n: t.clone() for n, t in s.items()} for s in (a, b)]
    result = {
        "average": lambda: average([a, b], [1, 0]),
        "add": lambda: add(a, delta, 0),
        "interpolate": lambda: interpolate(a, b, 0),
        "task_vector": lambda: task_vector(a, {**b, "w": 0 * b["w"]}),
    }[method]()
    for t in result.values():
        t.mul_(2)
    assert same(a, copies[0]) and same(b, copies[1])


def test_results_need_no_gradient():
    net = recipes.MLP((4, 3, 2))
    parameters = dict(net.named_parameters())
    for result in (average([parameters]), add(parameters, parameters), scale(parameters, 2)):
        assert not any(t.requires_grad for t in result.values())


def test_lazy_reads_nothing_before_it_is_asked():
    read = []

    def pieces(name, start, stop):
        read.append(name)
        return torch.ones(3)[start:stop]

    specs = {n: weights.Spec((3,), torch.float32) for n in "ab"}
    a, b = weights.LazyState(specs, pieces), weights.LazyState(specs, pieces)
    delta = linear_combination([a, task_vector(a, b, lazy=True)], [2, 1], lazy=True)
    lazy = add(a, delta, lazy=True)
    assert not read and "a" in lazy and len(lazy) == 2
    assert lazy["b"].tolist() == [3, 3, 3] and set(read) == {"b"}


@fast
@given(layouts(), st.integers(0, 99))
def test_lazy_and_eager_agree(layout, seed):
    a, b, c = (make(layout, seed + i) for i in range(3))
    tau = task_vector(a, b, lazy=True)
    assert same(tau.load(), task_vector(a, b))
    assert same(add(c, tau, 0.5, lazy=True).load(), add(c, task_vector(a, b), 0.5))


# ------------------------------------------------------------------ integers and ties


def test_integers_must_agree():
    a = {"w": torch.ones(2), "ids": torch.arange(20), "mask": torch.tensor(True)}
    b = {"w": torch.zeros(2), "ids": torch.arange(20), "mask": torch.tensor(True)}
    mean = average([a, b])
    assert torch.equal(mean["ids"], a["ids"]) and mean["mask"].dtype == torch.bool
    assert list(task_vector(a, b)) == ["w"]
    b["ids"] = b["ids"].clone()
    b["ids"][19] = 0  # in the last piece
    calls = (lambda: average([a, b]), lambda: task_vector(a, b), lambda: interpolate(a, b, 0.5))
    for call in calls:
        with pytest.raises(ValueError, match="ids is torch.int64 and differs.*dequantised"):
            call()
    assert torch.equal(average([b, a], skip="ids")["ids"], b["ids"])


def test_batch_counters_are_taken_from_the_first():
    nets = [nn.BatchNorm1d(3) for _ in range(2)]
    nets[1](torch.randn(8, 3))
    assert average(nets)["num_batches_tracked"] == 0
    assert average(nets[::-1])["num_batches_tracked"] == 1
    assert "num_batches_tracked" not in task_vector(*nets)


def test_ties_survive_every_operation():
    a, b = Tied(), Tied()
    tau = task_vector(a, b)
    for result in (
        average([a, b]), interpolate(a, b, 0.5), tau, add(b, tau), scale(tau, 2),
        linear_combination([tau, tau], [1, 1]),
    ):
        assert result["head.weight"] is result["embed.weight"]


def test_a_tie_that_not_all_have_is_untied():
    a, b = Tied(), Tied(tie=False)
    for states in ([a, b], [b, a]):
        mean = average(states)
        assert mean["head.weight"] is not mean["embed.weight"]
        assert torch.allclose(mean["head.weight"], (a.head.weight + b.head.weight) / 2)


# ------------------------------------------------------------------ refusals


def state(**shapes):
    return {n.replace("_", "."): torch.ones(s) for n, s in shapes.items()}


def test_differences_are_listed_ten_and_counted():
    a = {f"layer{i}": torch.ones(2) for i in range(25)}
    with pytest.raises(ValueError) as error:
        align([as_state(a), as_state({"other": torch.ones(2)})])
    text = str(error.value)
    assert "in 26 place(s)" in text and "and 16 more" in text and "skip" in text
    assert text.index("other is only in state 1") < text.index("layer0 is missing in state 1")


def test_shapes_and_dtypes_are_compared():
    a = {"w": torch.ones(2, 3), "v": torch.ones(2)}
    for b, match in [
        ({"w": torch.ones(3, 2), "v": torch.ones(2)}, r"w is \[2, 3\], in state 1 \[3, 2\]"),
        ({"w": torch.ones(2, 3).half(), "v": torch.ones(2)}, "w is torch.float32, in state 1"),
    ]:
        for call in (lambda b=b: average([a, b]), lambda b=b: task_vector(a, b),
                     lambda b=b: interpolate(a, b, 0.5)):
            with pytest.raises(ValueError, match=match):
                call()
        assert align([as_state(a), as_state(b)], skip="w").common == ["v"]
        assert torch.equal(average([a, b], skip=["w"])["w"], a["w"])
    assert add(a, {"w": torch.ones(2, 3).half(), "v": torch.ones(2).double()})["w"].mean() == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_infinity_are_named(value, where):
    states = [{"v": torch.ones(3), "w": torch.ones(20)} for _ in range(2)]
    states[where]["w"][17] = value
    for call in (
        lambda: average(states), lambda: interpolate(*states, 0.5), lambda: task_vector(*states),
        lambda: add(*states), lambda: linear_combination(states, [1, 2]),
        lambda: cosine(*states), lambda: norm(states[where]),
    ):
        with pytest.raises(ValueError, match="1 entries of w in state"):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_overflow_is_named(dtype):
    big = {"w": torch.full((3,), torch.finfo(dtype).max * 0.9).to(dtype)}
    with pytest.raises(ValueError, match=f"result for w is too large for {dtype}"):
        add(big, big)
    assert torch.equal(average([big, big])["w"].float(), big["w"].float())


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: average([]), ValueError, "empty"),
        (lambda: average(state(w=2)), TypeError, "must be a list"),
        (lambda: average("folder"), TypeError, "must be a list"),
        (lambda: average([{}]), ValueError, "empty"),
        (lambda: average([state(w=2)], [1.0, 0.0]), ValueError, "1 states need 1 weights"),
        (lambda: average([state(w=2)] * 2, [2, -1]), ValueError, "not negative"),
        (lambda: average([state(w=2)] * 2, [0.5, 0.4]), ValueError, "sum to 0.9"),
        (lambda: average([state(w=2)] * 2, [0.5, math.nan]), ValueError, "finite"),
        (lambda: average([state(w=2)], precision=torch.half), ValueError, "float32 or torch"),
        (lambda: task_vector(state(w=2), state(w=2), dtype=torch.int8), ValueError, "float32 or"),
        (lambda: add(state(w=2), state(v=2)), ValueError, "v is only in state 1"),
        (lambda: add(state(w=2), state(v=2), allow_missing=True), ValueError, "v is only in"),
        (lambda: add(state(w=2), state(w=3)), ValueError, r"w is \[2\], in state 1 \[3\]"),
        (lambda: add(state(w=2), state(w=2), math.inf), ValueError, "scale = inf"),
        (lambda: add(state(w=2), {"w": torch.tensor([1, 2])}), ValueError, "no integers"),
        (lambda: scale(state(w=2), math.nan), ValueError, "factor = nan"),
        (lambda: interpolate(state(w=2), state(w=2), math.nan), ValueError, "t = nan"),
        (lambda: linear_combination([state(w=2)], [1, 2]), ValueError, "need 1 scales"),
        (lambda: cosine(state(w=2), scale(state(w=2), 0)), ValueError, "no direction"),
        (lambda: average([state(w=2), state(w=2)], skip="x"), ValueError, "no state has: x"),
        (lambda: as_state({"w": 1.0}), TypeError, "'w' is a float"),
        (lambda: as_state({1: torch.ones(1)}), TypeError, "names to tensors"),
        (lambda: as_state([1]), TypeError, "not as list"),
        (lambda: as_state({"w": torch.ones(2, device="meta")}), ValueError, "meta tensor"),
        (lambda: as_state({"w": torch.ones(2).to_sparse()}), ValueError, "sparse"),
        (lambda: as_state({"w": torch.ones(2) * 1j}), ValueError, "complex"),
        (lambda: average(["folder"]), TypeError, "checkpoints.open_state"),
    ],
)
def test_wrong_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ------------------------------------------------------------------ names and configs


@pytest.mark.parametrize(
    "first, second",
    [
        ("x.lora_A.weight", "x.lora_B.weight"), ("x.lora_A", "x.lora_B"),
        ("x.lora_A.default.weight", "x.lora_B.default.weight"),
        ("x.lora_embedding_A", "x.lora_embedding_B"),
        ("x.lora_embedding_A.default", "x.lora_embedding_B.default"),
        ("layers.0.wq.lora_a.weight", "layers.0.wq.lora_b.weight"),
        ("x.lora_down.weight", "x.lora_up.weight"),
        ("lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.lora_up.weight"),
        ("attn.processor.to_q_lora.down.weight", "attn.processor.to_q_lora.up.weight"),
        ("attn.to_q.lora.down.weight", "attn.to_q.lora.up.weight"),
        ("attn.to_q.lora_linear_layer.down.weight", "attn.to_q.lora_linear_layer.up.weight"),
        ("q.hada_w1_a", "q.hada_w1_b"), ("q.lokr_w2_a", "q.lokr_w2_b"), ("q.lokr_w1", "q.lokr_w2"),
        ("q.vera_lambda_d.default", "q.vera_lambda_b.default"),
        ("attn.lora_kqv_adapter.linear_in.weight", "attn.lora_kqv_adapter.linear_out.weight"),
        ("layers.0.q_proj.adaptlab.A", "layers.0.q_proj.adaptlab.B"),
    ],
)
def test_factors_are_known_by_their_names(first, second):
    state = {first: torch.ones(2, 3), second: torch.ones(3, 2), "norm.weight": torch.ones(3)}
    assert factor_pairs(state) == [(first, second)]
    with pytest.warns(UserWarning, match="factors of a low-rank change"):
        average([state, state])
    with pytest.warns(UserWarning, match="factors of a low-rank change"):
        interpolate(state, state, 0.5)


@pytest.mark.parametrize(
    "first, second",
    [
        ("ssm.A", "ssm.B"), ("A", "B"), ("mlp.down.weight", "mlp.up.weight"),
        ("model.adapter.layers.0.conv.weight", "model.adapter.proj.bias"),
        ("unet.down_blocks.0.weight", "unet.up_blocks.0.weight"),
        ("adapter.down.weight", "adapter.up.weight"), ("explora.A", "explora.B"),
        ("layer.adapter.weight", "layer.adapter.bias"),
    ],
)
def test_plain_weights_are_no_factors(first, second):
    state = {first: torch.ones(2, 3), second: torch.ones(3, 2)}
    assert factor_pairs(state) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average([state, state])


def llama(**changes):
    settings = {"vocab_size": 260, "hidden_size": 32, "layers": 1, "heads": 4, "kv_heads": 4}
    return recipes.tiny_llama(**{**settings, **changes})


def test_models_of_the_same_shapes_that_differ_are_warned_about():
    a, b = llama(), llama(heads=8, kv_heads=8)
    for call in (lambda: average([a, b]), lambda: interpolate(a, b, 0.5),
                 lambda: task_vector(a, b), lambda: cosine(a, b)):
        with pytest.warns(UserWarning, match=r"num_attention_heads \(4 and 8\)"):
            call()
    p, q = recipes.tiny_bert(n_classes=2), recipes.tiny_bert(n_classes=2)
    p.config.id2label, q.config.id2label = {0: "neg", 1: "pos"}, {0: "pos", 1: "neg"}
    with pytest.warns(UserWarning, match="id2label"):
        average([p, q])


def test_models_that_differ_harmlessly_are_not_warned_about():
    a, b = llama(), llama()
    b.config.attention_dropout, b.config.pad_token_id, b.config.use_cache = 0.5, 3, False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average([a, b])


@pytest.mark.parametrize("scale_name", ["l.weight_scale_inv", "l.weight_scale", "l.scale_weight"])
def test_scaled_float8_is_refused(scale_name):
    state = {"l.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), scale_name: torch.ones(1)}
    for call in (lambda: average([state, state]), lambda: task_vector(state, state),
                 lambda: scale(state, 2)):
        with pytest.raises(ValueError, match=f"l.weight is quantised.*{scale_name}"):
            call()


# ------------------------------------------------------------------ other devices


def elsewhere(state):
    "A state whose specs say that it is on a GPU: the path that tensors there take, on a CPU."
    state = as_state(state)
    for name, spec in state.specs.items():
        state.specs[name] = spec._replace(device=torch.device("cuda", 0))
    return state


@fast
@given(layouts(), st.integers(1, 4), st.integers(0, 99))
def test_on_another_device_the_results_are_the_same(layout, k, seed):
    states = [make(layout, seed + i) for i in range(k)]
    assert near(average([elsewhere(s) for s in states]), average(states))
    assert math.isclose(norm(elsewhere(states[0])), norm(states[0]), rel_tol=1e-5, abs_tol=1e-30)
    if norm(states[0]):
        got = cosine(*map(elsewhere, (states[0], states[-1])))
        assert math.isclose(got, cosine(states[0], states[-1]), rel_tol=1e-9, abs_tol=1e-12)


def test_another_device_is_waited_for_once(monkeypatch):
    waits = []

    def counted(old):
        def run(self, *args):
            waits.append(1)
            return old(self, *args)

        return run

    for name in ("tolist", "item", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    states = [{f"w{i}": torch.randn(4, 4) for i in range(30)} for _ in range(3)]
    for call in (lambda: average([elsewhere(s) for s in states]),
                 lambda: add(elsewhere(states[0]), elsewhere(states[1])),
                 lambda: task_vector(elsewhere(states[0]), elsewhere(states[1])),
                 lambda: norm(elsewhere(states[0])),
                 lambda: cosine(elsewhere(states[0]), elsewhere(states[1]))):
        waits.clear()
        call()
        assert len(waits) == 1


@pytest.mark.parametrize("where", [0, 1])
def test_nan_on_another_device_is_named(where):
    states = [{"v": torch.ones(3), "w": torch.ones(20)} for _ in range(2)]
    states[where]["w"][17] = math.nan
    for call in (lambda: average([elsewhere(s) for s in states]),
                 lambda: norm(elsewhere(states[where])), lambda: cosine(*map(elsewhere, states))):
        with pytest.raises(ValueError, match="1 entries of w in state"):
            call()


def test_norm_of_tiny_and_huge_entries_elsewhere():
    for value in (1e-30, 1e30):
        state = elsewhere({"w": torch.full((100,), value)})
        assert norm(state) == pytest.approx(10 * value, rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 10), (3, 4, 5), (1, 7), (7, 1)])
def test_pieces_of_tensors_that_are_not_contiguous(shape):
    x = torch.arange(float(math.prod(shape))).reshape(shape)
    for t in (x.transpose(0, -1), x.expand(2, *shape), x[..., ::2], x.flatten()[::3]):
        pieces = list(as_state({"w": t}).pieces("w", 4))
        assert torch.equal(torch.cat(pieces), t.reshape(-1))


# ------------------------------------------------------------------ changes of a few entries


@fast
@given(layouts((torch.float32,)), st.integers(0, 99), st.floats(-2, 2))
def test_sparse_deltas_add_like_dense_ones(layout, seed, factor):
    base, change = make(layout, seed), make(layout, seed + 1)
    kept = {n: t * (t.abs() > 0.8) for n, t in change.items()}
    sparse = {n: SparseDelta.from_dense(t) for n, t in kept.items()}
    assert same({n: s.to_dense() for n, s in sparse.items()}, kept)
    for name, delta in unpack(pack(sparse)).items():
        x = base[name].clone()
        delta.scaled(factor).add_to(x)
        assert torch.allclose(x, base[name] + factor * kept[name], atol=1e-5)


def test_ternary_is_sparse_with_a_scale():
    values = torch.tensor([1, -1, 1], dtype=torch.int8)
    signs = SparseDelta(torch.tensor([0, 8, 15]), values, (4, 4), scale=0.25)
    x = torch.zeros(4, 4, dtype=torch.float64)
    signs.add_to(x, 2)
    assert x.flatten()[[0, 8, 15]].tolist() == [0.5, -0.5, 0.5] and x.abs().sum() == 1.5
    with pytest.raises(ValueError, match="can't be added"):
        signs.add_to(torch.zeros(16))


@pytest.mark.parametrize(
    "indices, values, match",
    [
        ([1, 1], [1.0, 2.0], "increase strictly"),
        ([2, 1], [1.0, 2.0], "increase strictly"),
        ([0, 9], [1.0, 2.0], "inside shape"),
        ([-1, 0], [1.0, 2.0], "inside shape"),
        ([0, 1], [1.0, math.nan], "finite"),
        ([0], [1.0, 2.0], "one value each"),
    ],
)
def test_sparse_refuses(indices, values, match):
    with pytest.raises(ValueError, match=match):
        SparseDelta(torch.tensor(indices), torch.tensor(values), (3, 3))



def test_directions_of_tiny_float64_changes():
    a = {"w": torch.tensor([3e-100, 4e-100], dtype=torch.float64)}
    b = {"w": torch.tensor([4e-100, -3e-100], dtype=torch.float64)}
    assert cosine(a, a) == pytest.approx(1)
    assert cosine(a, b) == pytest.approx(0, abs=1e-12)
    assert norm(a) == pytest.approx(5e-100)


def test_cosine_of_integers_alone_is_refused():
    with pytest.raises(ValueError, match="no floating-point"):
        cosine({"n": torch.tensor([1])}, {"n": torch.tensor([1])})
