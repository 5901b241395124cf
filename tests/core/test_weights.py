"""Arithmetic on states: properties, agreement with torch and safetensors, files, memory."""

import gc
import json
import math
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from adaptlab import models, weights
from adaptlab.weights import (
    PackedDelta,
    QuantizedDelta,
    SparseDelta,
    add,
    average,
    average_checkpoints,
    check_compatible,
    cosine,
    cosines,
    interpolate,
    linear_combination,
    load_state,
    norm,
    norms,
    open_state,
    save_state,
    scale,
    task_vector,
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
fast = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    "Pieces of 7 entries, so that small tensors have several and a last one that is shorter."
    old, weights._PIECE = weights._PIECE, 7
    yield
    weights._PIECE = old


@st.composite
def layouts(draw, dtypes=tuple(FLOATS)):
    "Names with shape and dtype, among them scalars and empty tensors."
    shape = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    n = draw(st.integers(1, 4))
    return {f"t{i}": (draw(shape), draw(st.sampled_from(dtypes))) for i in range(n)}


def make(layout, seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g).to(d) for n, (s, d) in layout.items()}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def near(a, b, factor=1.0):
    return a.keys() == b.keys() and all(
        torch.allclose(a[n].double(), b[n].double(), rtol=0, atol=factor * EPS[a[n].dtype])
        for n in a
    )


EPS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def test_a_state_is_freed_when_it_is_dropped(tmp_path):
    "No reference cycle: with large models one cannot wait for the garbage collector."
    save_file({"w": torch.randn(9)}, tmp_path / "a.safetensors")
    gc.collect()
    gc.disable()
    try:
        for source in ({"w": torch.randn(9)}, tmp_path / "a.safetensors"):
            lazy = linear_combination([source, source], [0.5, 0.5], lazy=True)
            gone = [weakref.ref(s) for s in (lazy, open_state(source))]
            load_state(lazy)
            del lazy
            assert all(r() is None for r in gone)
    finally:
        gc.enable()


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
    nets = [models.SmallCNN() for _ in range(4)]
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
@given(layouts(), st.integers(0, 99), st.floats(0, 1), st.sampled_from(["linear", "slerp"]))
def test_interpolation_ends_and_symmetry(layout, seed, t, method):
    a, b = make(layout, seed), make(layout, seed + 1)
    assert same(interpolate(a, b, 0, method), a)
    assert near(interpolate(a, b, 1, method), b)
    assert near(interpolate(a, b, t, method), interpolate(b, a, 1 - t, method), 5)


@fast
@given(st.integers(0, 999), st.floats(0, 1), st.integers(2, 40))
def test_slerp_against_its_formula(seed, t, n):
    a, b = (make({"w": ((n,), torch.float64)}, seed + i)["w"] for i in (0, 1))
    b = b * a.norm() / b.norm()
    got = interpolate({"w": a}, {"w": b}, t, "slerp")["w"]
    angle = math.acos(float(a @ b / (a.norm() * b.norm())))
    expected = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    assert torch.allclose(got, expected, atol=1e-9)
    assert math.isclose(float(got.norm()), float(a.norm()), rel_tol=1e-6)


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.0, 1 + 1e-9])
def test_slerp_of_parallel_vectors_is_linear(factor):
    a = torch.arange(1.0, 20).double()
    got = interpolate({"w": a}, {"w": factor * a}, 0.3, "slerp")["w"]
    assert torch.allclose(got, 0.7 * a + 0.3 * factor * a)


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
    each = cosines(a, b)
    assert each.keys() == norms(a).keys() == layout.keys()
    assert all(math.isnan(c) or abs(c) <= 1 + 1e-12 for c in each.values())


def test_norm_of_a_difference_needs_no_copy_of_it():
    a, b = (make({"w": ((9, 9), torch.float32)}, i) for i in range(2))
    assert math.isclose(
        norm(task_vector(a, b, lazy=True)), float((a["w"] - b["w"]).norm()), rel_tol=1e-6
    )


def test_tied_tensors_count_once():
    w = torch.ones(4, 4)
    assert norm({"a": w, "b": w}) == 4 and list(norms({"a": w, "b": w})) == ["a"]


# ------------------------------------------------------------------ what must not happen


@pytest.mark.parametrize("method", ["average", "add", "interpolate", "slerp", "task_vector"])
def test_inputs_are_left_alone_and_share_no_memory(method):
    layout = {"w": ((4, 5), torch.float32)}
    a, b = ({**make(layout, i), "n": torch.tensor([1, 2])} for i in range(2))
    delta = {"w": b["w"]}
    copies = [{n: t.clone() for n, t in s.items()} for s in (a, b)]
    result = {
        "average": lambda: average([a, b], [1, 0]),
        "add": lambda: add(a, delta, 0),
        "interpolate": lambda: interpolate(a, b, 0),
        "slerp": lambda: interpolate(a, b, 0, "slerp"),
        "task_vector": lambda: task_vector(a, {**b, "w": 0 * b["w"]}),
    }[method]()
    for t in result.values():
        t.mul_(2)
    assert same(a, copies[0]) and same(b, copies[1])


def test_results_need_no_gradient():
    net = models.MLP((4, 3, 2))
    parameters = dict(net.named_parameters())
    for result in (average([parameters]), add(parameters, parameters), scale(parameters, 2)):
        assert not any(t.requires_grad for t in result.values())


def test_lazy_reads_nothing_before_it_is_asked():
    read = []

    def pieces(name):
        read.append(name)
        yield torch.ones(3)

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
    assert same(load_state(tau), task_vector(a, b))
    assert same(load_state(add(c, tau, 0.5, lazy=True)), add(c, task_vector(a, b), 0.5))


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


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_ties_survive_every_operation(tmp_path):
    a, b = Tied(), Tied()
    tau = task_vector(a, b)
    for result in (
        average([a, b]), interpolate(a, b, 0.5, "slerp"), tau, add(b, tau), scale(tau, 2),
        linear_combination([tau, tau], [1, 1]),
    ):
        assert result["head.weight"] is result["embed.weight"]
    save_state(average([a, b], lazy=True), tmp_path / "out.safetensors")
    back = open_state(tmp_path / "out.safetensors")
    assert back.aliases == {"head.weight": "embed.weight"}
    assert "head.weight" not in load_file(tmp_path / "out.safetensors")
    state = load_state(back)
    assert state["head.weight"] is state["embed.weight"]
    missing, unexpected = load_model(Tied(), tmp_path / "out.safetensors")
    assert not missing and not unexpected


def test_a_tie_that_not_all_have_is_untied():
    a, b = Tied(), Tied(tie=False)
    for states in ([a, b], [b, a]):
        mean = average(states)
        assert mean["head.weight"] is not mean["embed.weight"]
        assert torch.allclose(mean["head.weight"], (a.head.weight + b.head.weight) / 2)


def test_a_tied_tensor_fits_a_file_that_has_it_once(tmp_path):
    a, b = Tied(), Tied()
    save_model(b, tmp_path / "b.safetensors")  # notes the alias
    once = {n: t for n, t in b.state_dict().items() if n != "head.weight"}
    save_file(once, tmp_path / "once.safetensors")  # does not
    expected = average([a, b])
    assert same(average([a, tmp_path / "b.safetensors"]), expected)
    assert same(average([a, tmp_path / "once.safetensors"]), expected)
    from_file = average([tmp_path / "once.safetensors", a])
    assert "head.weight" not in from_file
    assert torch.allclose(from_file["embed.weight"], expected["embed.weight"])
    moved = add(a, {"head.weight": torch.ones(6, 4)}, allow_missing=True)
    assert torch.equal(moved["embed.weight"], a.embed.weight + 1)
    assert moved["head.weight"] is moved["embed.weight"]


# ------------------------------------------------------------------ files


SAVED = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
         torch.float8_e4m3fn, torch.float8_e5m2]


@fast
@given(layouts(tuple(SAVED)), st.integers(0, 99), st.sampled_from([1, 100, "1KB", "5GB"]))
def test_round_trip(tmp_path_factory, layout, seed, size):
    folder = tmp_path_factory.mktemp("round")
    state = make(layout, seed)
    save_state(state, folder / "ours", max_shard_size=size)
    back = load_state(folder / "ours")
    assert list(back) and all(_bits(back[n]) == _bits(state[n]) for n in state)
    theirs = {}
    for file in (folder / "ours").glob("*.safetensors"):
        theirs |= load_file(file)
    assert all(_bits(theirs[n]) == _bits(state[n]) for n in state)
    save_file(state, folder / "theirs.safetensors")
    lazy = open_state(folder / "theirs.safetensors")
    assert all(_bits(lazy[n]) == _bits(state[n]) for n in state)
    assert all(torch.cat([torch.empty(0, dtype=state[n].dtype), *lazy.pieces(n)]).shape
               == (state[n].numel(),) for n in state if state[n].dtype.itemsize > 1)


def _bits(t):
    return t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("alignment", [torch.int8, torch.bool])
def test_tensors_are_aligned_in_the_file(tmp_path, alignment):
    state = {"a": torch.ones(3).to(alignment), "b": torch.ones(5), "c": torch.ones(3).half(),
             "d": torch.ones(2).double()}
    save_state(state, tmp_path / "x.safetensors")
    header = (tmp_path / "x.safetensors").read_bytes()
    n = int.from_bytes(header[:8], "little")
    assert (8 + n) % 8 == 0
    for name, entry in json.loads(header[8 : 8 + n]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % state[name].element_size() == 0


def test_non_contiguous_tensors_are_written_as_they_look(tmp_path):
    state = {"t": torch.arange(60.0).reshape(6, 10).T, "s": torch.arange(40.0)[::3],
             "e": torch.ones(1).expand(9)}
    save_state(state, tmp_path / "x.safetensors")
    assert same(load_state(tmp_path / "x.safetensors"), state)
    assert near(average([state, state]), state)


def test_streamed_equals_in_memory(tmp_path):
    layout = {"w": ((11, 13), torch.bfloat16), "b": ((5,), torch.float32), "s": ((), torch.float16)}
    states = [make(layout, i) for i in range(3)]
    paths = [save_state(s, tmp_path / f"{i}", max_shard_size=200) for i, s in enumerate(states)]
    share = [0.5, 0.25, 0.25]
    out = average_checkpoints(paths, tmp_path / "mean", share, max_shard_size=100)
    assert same(load_state(out), {n: average(states, share)[n] for n in load_state(out)})
    assert len(list(out.glob("*.safetensors"))) > 1
    single = average_checkpoints(paths, tmp_path / "mean.safetensors", share)
    assert {n: t.tolist() for n, t in load_file(single).items()} == {
        n: t.tolist() for n, t in average(states, share).items()
    }


def test_hugging_face_layout(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    nets = [models.tiny_llama(hidden_size=32, vocab_size=260).bfloat16() for _ in range(2)]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / f"{i}", max_shard_size="20KB")
    models.byte_tokenizer().save_pretrained(tmp_path / "0")
    (tmp_path / "0" / "trainer_state.json").write_text("{}")
    (tmp_path / "0" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "0" / "README.md").write_text("another model's card")
    out = average_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "soup",
                              max_shard_size="30KB")
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= names
    assert not {"trainer_state.json", "optimizer.pt", "README.md"} & names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = [os.path.getsize(out / f) for f in set(index["weight_map"].values())]
    biggest = max(t.nbytes for t in nets[0].state_dict().values())
    assert len(sizes) > 2 and max(sizes) < max(30_000, biggest) + 4000
    assert index["metadata"]["total_size"] == open_state(out).nbytes

    soup = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert soup.dtype == torch.bfloat16 and len(AutoTokenizer.from_pretrained(out))
    assert soup.lm_head.weight is soup.model.embed_tokens.weight
    for name, p in soup.named_parameters():
        a, b = (dict(n.named_parameters())[name].double() for n in nets)
        assert torch.equal(p, ((a + b) / 2).bfloat16())


def test_name_of_the_weights_follows_the_folder(tmp_path):
    (tmp_path / "a").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    out = average_checkpoints([tmp_path / "a"], tmp_path / "b")
    assert {p.name for p in out.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}


def test_factors_of_low_rank_changes_are_warned_about():
    state = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(4, 2)}
    with pytest.warns(UserWarning, match="factors of a low-rank change"):
        average([state, state])
    with pytest.warns(UserWarning, match="factors of a low-rank change"):
        interpolate(state, state, 0.5, "slerp")


# ------------------------------------------------------------------ all or nothing


def test_a_failure_leaves_nothing(tmp_path):
    bad = {"a": torch.ones(50), "b": torch.tensor([math.nan])}
    for i in range(2):
        save_state(bad if i else {**bad, "b": torch.zeros(1)}, tmp_path / f"{i}")
    for out in ("out", "out.safetensors"):
        with pytest.raises(ValueError, match="1 entries of b in state 1"):
            average_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / out, max_shard_size=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_state({"w": torch.ones(3)}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unless_asked(tmp_path):
    save_state({"w": torch.ones(3)}, tmp_path / "a")
    save_state({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    for out in ("a", "a.safetensors"):
        with pytest.raises(FileExistsError, match="overwrite=True"):
            save_state({"w": torch.zeros(3)}, tmp_path / out)
        save_state(scale(tmp_path / out, 5, lazy=True), tmp_path / out, overwrite=True)
        assert load_state(tmp_path / out)["w"].tolist() == [5, 5, 5]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(FileExistsError, match="no checkpoint"):
        save_state({"w": torch.ones(3)}, tmp_path / "thesis", overwrite=True)
    (tmp_path / "empty").mkdir()
    save_state({"w": torch.ones(3)}, tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="can't take its place"):
        save_state({"w": torch.ones(3)}, tmp_path / "file", overwrite=True)


def test_a_file_that_changed_meanwhile_is_noticed(tmp_path):
    path = save_state({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    state = open_state(path)
    save_state({"v": torch.ones(900), "w": torch.zeros(3)}, path, overwrite=True)
    with pytest.raises(ValueError, match="was changed after it was opened"):
        state["w"]


# ------------------------------------------------------------------ compressed changes


@fast
@given(layouts((torch.float32,)), st.integers(0, 99), st.floats(-2, 2))
def test_packed_deltas_add_like_dense_ones(layout, seed, factor):
    base, change = make(layout, seed), make(layout, seed + 1)
    kept = {n: t * (t.abs() > 0.8) for n, t in change.items()}
    packed = {n: SparseDelta.from_dense(t) for n, t in kept.items()}
    dense = {n: p.to_dense() for n, p in packed.items()}
    assert same(dense, kept)
    assert near(add(base, packed, factor), add(base, kept, factor))
    assert near(add(base, scale(packed, factor)), add(base, kept, factor))
    assert math.isclose(norm(packed), norm(kept), rel_tol=1e-6)
    assert near(linear_combination([packed, change], [1, 1]), add(kept, change))


@fast
@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 99))
def test_quantised_error_is_half_a_step(rows, n, seed):
    x = make({"w": ((rows, n), torch.float32)}, seed)["w"]
    q = QuantizedDelta.from_dense(x)
    assert ((q.to_dense() - x).abs() <= 0.5001 * q.step[:, None]).all()
    assert torch.allclose(add({"w": x}, {"w": q}, -1)["w"], x - q.to_dense(), atol=1e-6)
    assert torch.equal(QuantizedDelta.from_dense(q.to_dense()).codes, q.codes)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (300,)])
def test_quantised_shapes(shape):
    x = torch.randn(shape)
    q = QuantizedDelta.from_dense(x)
    assert q.to_dense().shape == x.shape
    assert torch.allclose(q.to_dense(), x, atol=float(x.abs().max()) / 127)
    assert (QuantizedDelta.from_dense(torch.zeros(shape)).to_dense() == 0).all()


def test_ternary_is_sparse_with_a_scale():
    values = torch.tensor([1, -1, 1], dtype=torch.int8)
    signs = SparseDelta(torch.tensor([0, 8, 15]), values, (4, 4), scale=0.25)
    x = torch.zeros(4, 4, dtype=torch.float64)
    signs.add_to(x, 2)
    assert x.flatten()[[0, 8, 15]].tolist() == [0.5, -0.5, 0.5] and x.abs().sum() == 1.5
    with pytest.raises(ValueError, match="can't be added"):
        signs.add_to(torch.zeros(16))


@pytest.mark.parametrize("size", ["5GB", 10])
def test_packed_round_trip(tmp_path, size):
    signs = torch.tensor([1, -1], dtype=torch.int8)
    delta = {
        "a": SparseDelta(torch.tensor([1, 5]), signs, (2, 3), scale=0.5),
        "b": QuantizedDelta.from_dense(torch.randn(4, 5)),
        "c": torch.randn(3),
    }
    save_state(delta, tmp_path / "delta", max_shard_size=size)
    back = open_state(tmp_path / "delta")
    assert back["a"].kind == "sparse" and back["a"].values.dtype == torch.int8
    assert list(back["a"].shape) == [2, 3] and back["a"].scale == 0.5
    base = {"a": torch.zeros(2, 3), "b": torch.zeros(4, 5), "c": torch.zeros(3)}
    assert same(add(base, back), add(base, delta))
    twice = open_state(save_state(scale(back, 2, lazy=True), tmp_path / "twice"))
    assert same(add(base, twice), add(base, delta, 2))


def test_a_new_kind_is_one_short_class(tmp_path):
    from dataclasses import dataclass

    @dataclass(frozen=True, eq=False)
    class Constant(PackedDelta, kind="constant"):
        value: torch.Tensor
        shape: tuple

        def __post_init__(self):
            object.__setattr__(self, "shape", tuple(self.shape))

        def add_piece(self, piece, start, factor):
            piece.add_(self.value.to(piece.dtype), alpha=factor)

        def scaled(self, factor):
            return Constant(self.value * factor, self.shape)

    path = save_state({"w": Constant(torch.tensor(2.0), (3, 3))}, tmp_path / "c.safetensors")
    assert (add({"w": torch.ones(3, 3)}, path, 0.5)["w"] == 2).all()
    del PackedDelta.kinds["constant"]
    with pytest.raises(ValueError, match="'constant', which is not known.*import the module"):
        open_state(path)["w"]


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


# ------------------------------------------------------------------ refusals


def state(**shapes):
    return {n.replace("_", "."): torch.ones(s) for n, s in shapes.items()}


def test_differences_are_listed_ten_and_counted():
    a = {f"layer{i}": torch.ones(2) for i in range(25)}
    with pytest.raises(ValueError) as error:
        check_compatible(a, {"other": torch.ones(2)})
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
                     lambda b=b: interpolate(a, b, 0.5, "slerp")):
            with pytest.raises(ValueError, match=match):
                call()
        assert check_compatible(a, b, skip="w") == ["v"]
        assert torch.equal(average([a, b], skip=["w"])["w"], a["w"])
    assert add(a, {"w": torch.ones(2, 3).half(), "v": torch.ones(2).double()})["w"].mean() == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_infinity_are_named(value, where):
    states = [{"v": torch.ones(3), "w": torch.ones(20)} for _ in range(2)]
    states[where]["w"][17] = value
    for call in (
        lambda: average(states), lambda: interpolate(*states, 0.5),
        lambda: interpolate(*states, 0.5, "slerp"), lambda: task_vector(*states),
        lambda: add(*states), lambda: linear_combination(states, [1, 2]),
        lambda: cosine(*states), lambda: cosines(*states), lambda: norm(states[where]),
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
        (lambda: interpolate(state(w=2), state(w=2), 0.5, "cubic"), ValueError, "'linear' or"),
        (lambda: linear_combination([state(w=2)], [1, 2]), ValueError, "need 1 scales"),
        (lambda: cosine(state(w=2), scale(state(w=2), 0)), ValueError, "no direction"),
        (lambda: check_compatible(state(w=2), state(w=2), skip="x"), ValueError, "no state has: x"),
        (lambda: open_state({"w": 1.0}), TypeError, "'w' is a float"),
        (lambda: open_state({1: torch.ones(1)}), TypeError, "names to tensors"),
        (lambda: open_state([1]), TypeError, "not as list"),
        (lambda: open_state({"w": torch.ones(2, device="meta")}), ValueError, "meta tensor"),
        (lambda: open_state({"w": torch.ones(2).to_sparse()}), ValueError, "sparse"),
        (lambda: open_state({"w": torch.ones(2) * 1j}), ValueError, "complex"),
        (lambda: open_state("/no/such/file"), FileNotFoundError, "does not exist"),
        (lambda: save_state(state(w=2), "x", max_shard_size="5 apples"), ValueError, "200MB"),
        (lambda: save_state(state(w=2), "x", max_shard_size=0), ValueError, "positive"),
        (lambda: save_state(state(w=2), "x", like="/no/such"), ValueError, "checkpoint folder"),
    ],
)
def test_wrong_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_broken_checkpoints(tmp_path):
    folder = save_state({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path / "ok", max_shard_size=1)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())

    def write(**changes):
        weight_map = {**content["weight_map"], **changes}
        index.write_text(json.dumps({**content, "weight_map": weight_map}))

    write(c="model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="lacks tensors of the index: c"):
        open_state(folder)
    for file in ("model-00003-of-00002.safetensors", "../secret.safetensors"):
        write(a=file)
        with pytest.raises(ValueError, match="files that are not there"):
            open_state(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="is no index of shards"):
        open_state(folder)
    index.unlink()
    with pytest.raises(ValueError, match="more than one model"):
        open_state(folder)
    data = (folder / "model-00001-of-00002.safetensors").read_bytes()
    for broken in (data[:-3], data[:5], b"", data + b"xx"):
        (tmp_path / "x.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            open_state(tmp_path / "x.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="pickled"):
        open_state(tmp_path / "w.pt")


# ------------------------------------------------------------------ memory

MEMORY = """
import json, sys
import torch
from adaptlab.weights import *

def status(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024

def peak(work):  # bytes of anonymous, file and shared pages together, above what was there
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
    work()
    return status("VmHWM") - before

k = int(sys.argv[1])
ways = {
    "average": lambda: average_checkpoints(map(str, range(k)), "out", max_shard_size="20MB"),
    "slerp": lambda: save_state(interpolate("0", "1", 0.5, "slerp", lazy=True), "s.safetensors"),
    "transfer": lambda: save_state(add("0", task_vector("1", "0", lazy=True), lazy=True), "t"),
    "cosine": lambda: cosine("0", "1"),
}
print(json.dumps({name: peak(work) for name, work in ways.items()}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_of_streams(tmp_path, dtype):
    "At most k + 2 times the largest tensor; in truth far less than one, for any k."
    entries = 4_000_000
    weights._PIECE, old = 1 << 20, weights._PIECE
    for i in range(4):
        save_state({f"w{j}": torch.full((entries,), i + j / 7, dtype=dtype) for j in range(4)},
                   tmp_path / f"{i}", max_shard_size="20MB")
    weights._PIECE = old
    largest = entries * dtype.itemsize
    for k in (2, 4):
        subprocess.run(["rm", "-rf", "out", "t", "s.safetensors"], cwd=tmp_path, check=True)
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEMORY), str(k)], cwd=tmp_path,
            capture_output=True, text=True, check=True,
        )
        for name, peak in json.loads(run.stdout).items():
            operands = k if name == "average" else 2
            assert peak <= (operands + 2) * largest, (name, peak / largest)
            assert peak <= 16e6, (name, peak)  # whatever the size: libraries on first use, pieces
    mean = open_state(tmp_path / "out")["w3"]
    assert torch.allclose(mean.float(), torch.tensor(1.5 + 3 / 7), atol=1e-2)


def test_directions_of_tiny_float64_changes():
    a = {"w": torch.tensor([3e-100, 4e-100], dtype=torch.float64)}
    b = {"w": torch.tensor([4e-100, -3e-100], dtype=torch.float64)}
    assert cosine(a, a) == pytest.approx(1) and cosines(a, a)["w"] == pytest.approx(1)
    assert cosine(a, b) == pytest.approx(0, abs=1e-12)
    middle = interpolate(a, b, 0.5, "slerp")["w"]
    assert float(middle.norm()) == pytest.approx(5e-100)


def test_cosine_of_integers_alone_is_refused():
    with pytest.raises(ValueError, match="no floating-point"):
        cosine({"n": torch.tensor([1])}, {"n": torch.tensor([1])})
