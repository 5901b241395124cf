"""Adapt-Pruner: cuts equal masks, ragged models live on, all or nothing, the full-scale path."""

import copy
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptlab import adapters, models, train
from adaptlab.compression import adapt_pruner as lesson
from adaptlab.compression.adapt_pruner import (
    FULL,
    AdaptPruner,
    DistillationLoss,
    LayerShape,
    WSDSchedule,
    adapt_accel,
    calibration_draws,
    choice_items,
    count_parameters,
    experiment,
    hidden_taylor_scores,
    kv_group_taylor_scores,
    layer_importance,
    layer_shapes,
    load_pruned,
    mlp_taylor_scores,
    normalise_importance,
    pad_to_plain,
    planned_shape,
    prune_hidden_,
    prune_kv_groups_,
    prune_mlp_,
    rank_importance,
    save_pruned,
    stage_data_shares,
    stage_targets,
    to_messages,
    update_sparsity,
)
from adaptlab.experiment import start_run


def llama(seed=0, layers=3, heads=6, kv_heads=3, hidden_size=48, tie=False, vocab_size=64):
    torch.manual_seed(seed)
    return models.tiny_llama(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        tie=tie,
    )


def family(name):
    "A random model of another family; Qwen2 has biases on q, k and v."
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, intermediate_size=40, head_dim=8, pad_token_id=0,
        max_position_embeddings=128,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.ndim == 1:  # biases and norms start at 0 and 1: nothing would show if they were mixed
            nn.init.uniform_(p, 0.5, 1.5)
    return model


def ids(n=2, length=12, seed=0):
    return torch.randint(0, 64, (n, length), generator=torch.Generator().manual_seed(seed))


def draw(step):
    return ids(4, 16, seed=step)


@torch.no_grad()
def logits(model, x=None):
    return model(ids() if x is None else x).logits


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model, before, kind=transformers.LlamaForCausalLM):
    now = model.state_dict()
    return (
        type(model) is kind
        and now.keys() == before.keys()
        and all(torch.equal(now[k].nan_to_num(), v.nan_to_num()) for k, v in before.items())
    )


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_cut_equals_a_mask_in_every_family(name, tmp_path):
    model = family(name)
    masked = copy.deepcopy(model)
    masked.model.layers[0].mlp.down_proj.weight.data[:, [1, 4]] = 0
    masked.model.layers[2].self_attn.o_proj.weight.data[:, :16] = 0
    prune_mlp_(model.model.layers[0].mlp, [j for j in range(40) if j not in (1, 4)])
    prune_kv_groups_(model.model.layers[2].self_attn, torch.tensor([False, True, True]))
    torch.testing.assert_close(logits(model), logits(masked), atol=1e-5, rtol=1e-5)
    again = load_pruned(save_pruned(model, tmp_path / "pruned"), device="cpu")
    assert type(again).__name__ == f"Ragged{name}ForCausalLM"
    assert torch.equal(logits(again), logits(model))
    plain = pad_to_plain(again)
    assert type(plain).__name__ == f"{name}ForCausalLM"
    torch.testing.assert_close(logits(plain), logits(again), atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_count_follows_the_formula(data):
    kv = data.draw(st.sampled_from([1, 2, 3, 6]))
    model = llama(kv_heads=kv, layers=1)
    layer, d, h, g = model.model.layers[0], 48, 8, 6 // kv
    neurons = data.draw(st.sets(st.integers(0, 127), min_size=1))
    groups = data.draw(st.sets(st.integers(0, kv - 1), min_size=1))
    before = count_parameters(model)
    prune_mlp_(layer.mlp, list(neurons))
    prune_kv_groups_(layer.self_attn, list(groups))
    n, k = 128 - len(neurons), kv - len(groups)
    assert before - count_parameters(model) == 3 * d * n + k * h * d * (2 * g + 2)
    assert layer_shapes(model) == [LayerShape(len(groups), len(neurons))]
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_scores_agree_with_loops(kv_heads):
    model = llama(kv_heads=kv_heads)
    model(ids(), labels=ids()).loss.backward()
    layer, h, g = model.model.layers[1], 8, 6 // kv_heads
    t = {n: (p * p.grad).abs().detach() for n, p in layer.named_parameters() if p.ndim == 2}
    mlp = [
        t["mlp.gate_proj.weight"][j].sum()
        + t["mlp.up_proj.weight"][j].sum()
        + t["mlp.down_proj.weight"][:, j].sum()
        for j in range(128)
    ]
    torch.testing.assert_close(mlp_taylor_scores(layer.mlp), torch.stack(mlp))
    groups = []
    for k in range(kv_heads):
        kv, q = slice(k * h, (k + 1) * h), slice(k * g * h, (k + 1) * g * h)
        groups.append(
            t["self_attn.k_proj.weight"][kv].sum()
            + t["self_attn.v_proj.weight"][kv].sum()
            + t["self_attn.q_proj.weight"][q].sum()
            + t["self_attn.o_proj.weight"][:, q].sum()
        )
    torch.testing.assert_close(kv_group_taylor_scores(layer.self_attn), torch.stack(groups))


def test_gradients_add_up_over_the_batches_of_a_step():
    whole, parts = llama(), llama()
    data = ids(4)
    for batch in data.split(2):
        whole(batch, labels=batch).loss.backward()
    expected = mlp_taylor_scores(whole.model.layers[0].mlp)
    seen = lesson._calibrate(parts, data.split(2), "cosine", lesson._taylor)
    torch.testing.assert_close(seen.neurons[0], expected)
    torch.testing.assert_close(seen.importance, layer_importance(parts, data.split(2)))


def test_importance_is_the_cosine_of_the_hidden_states():
    model = llama()
    with torch.no_grad():
        states = model.model(ids(), output_hidden_states=True).hidden_states
    found = layer_importance(model, [ids()])
    for i in range(2):  # the last state of the list is already normalised
        cosine = nn.functional.cosine_similarity(states[i], states[i + 1], dim=-1).mean()
        assert math.isclose(found[i], -cosine, rel_tol=1e-5)
    far = layer_importance(model, [ids()], "euclidean")
    assert math.isclose(far[0], (states[1] - states[0]).norm(dim=-1).mean(), rel_tol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=40), st.floats(0.1, 10), st.floats(-5, 5)
)
def test_normalised_importance(values, scale, shift):
    raw = torch.tensor(values, dtype=torch.float64)
    hat = normalise_importance(raw)
    if float(raw.max() - raw.min()) > 1e-6:
        assert abs(float(hat.mean())) < 1e-9 and math.isclose(float(hat.abs().max()), 1)
        torch.testing.assert_close(normalise_importance(scale * raw + shift), hat)
    assert abs(float(rank_importance(raw).mean())) < 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(0, 99), st.floats(0, 0.02))
def test_mean_sparsity_grows_by_the_increment(n, seed, amplitude):
    s = torch.zeros(n, dtype=torch.float64)
    rng = torch.Generator().manual_seed(seed)
    for k in range(1, 6):
        hat = normalise_importance(torch.rand(n, generator=rng))
        s = update_sparsity(s, hat, 0.02, amplitude)  # amplitude <= increment: never clipped at 0
        assert math.isclose(float(s.mean()), 0.02 * k, abs_tol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(1, 500), st.floats(0, 0.99), st.floats(0, 0.99))
def test_planned_shape_follows_the_floor_rule(groups, neurons, s, later):
    first, h = LayerShape(groups, neurons), 8
    once = planned_shape(first, first, s, h)
    assert once.neurons == max(1, math.floor(neurons * (1 - s) + 1e-9))
    assert once.kv_groups == max(1, math.ceil(math.floor(groups * h * (1 - s) + 1e-9) / h))
    twice = planned_shape(first, once, max(s, later), h)
    assert twice.neurons <= once.neurons and twice.kv_groups <= once.kv_groups
    assert planned_shape(first, once, 0.0, h) == once


@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.45])
@pytest.mark.parametrize("amplitude", [0.0, 0.02])
def test_it_lands_at_the_target(ratio, amplitude):
    model = llama(layers=4)
    found = AdaptPruner(model, target_ratio=ratio, amplitude=amplitude).run(draw)
    target = int(ratio * found.params_before)
    assert found.params_after == count_parameters(model) <= target
    coarse = 4 * (8 * 48 * 6 + 3 * 48 * 2)  # a KV group and a few neurons of every layer
    assert target - found.params_after < coarse
    assert found.shapes == layer_shapes(model)
    assert [tuple(map(len, k)) for k in found.kept] == [tuple(x) for x in found.shapes]


def test_kept_channels_are_original_ones_in_order():
    model = llama()
    original = copy.deepcopy(model)
    found = AdaptPruner(model, target_ratio=0.5).run(draw)
    for layer, old, (groups, neurons) in zip(
        model.model.layers, original.model.layers, found.kept, strict=True
    ):
        assert torch.equal(layer.mlp.up_proj.weight, old.mlp.up_proj.weight[neurons])
        keys = old.self_attn.k_proj.weight.unflatten(0, (3, 8))[groups].flatten(0, 1)
        assert torch.equal(layer.self_attn.k_proj.weight, keys)


@pytest.mark.parametrize("criterion", ["taylor", "magnitude", "random"])
def test_same_seed_same_channels(criterion):
    def kept(seed):
        found = AdaptPruner(llama(), target_ratio=0.6, criterion=criterion, seed=seed).run(draw)
        return [x.tolist() for pair in found.kept for x in pair]

    assert kept(1) == kept(1)
    assert (kept(1) != kept(2)) == (criterion == "random")


def test_random_scores_leave_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    AdaptPruner(llama(seed=3), target_ratio=0.9, criterion="random", amplitude=0).run()
    torch.manual_seed(3)
    AdaptPruner(llama(), target_ratio=0.9, criterion="random", amplitude=0).run()
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), expected)


def test_magnitude_needs_no_data_and_drops_the_smallest():
    model = llama(layers=1)
    for j in (5, 9):
        model.model.layers[0].mlp.gate_proj.weight.data[j] *= 1e-3
        model.model.layers[0].mlp.up_proj.weight.data[j] *= 1e-3
        model.model.layers[0].mlp.down_proj.weight.data[:, j] *= 1e-3
    target = count_parameters(model) - 2 * 3 * 48
    found = AdaptPruner(model, target, criterion="magnitude", amplitude=0).run()
    assert set(range(128)) - set(found.kept[0][1].tolist()) == {5, 9}
    with pytest.raises(ValueError, match="calibration data"):
        AdaptPruner(model, target_ratio=0.5).run()


def test_protected_layers_stay():
    model = llama(layers=5)
    found = AdaptPruner(model, target_ratio=0.7, amplitude=0.01, protect=(0, 3)).run(draw)
    assert found.shapes[0] == found.shapes[3] == (3, 128) and found.shapes[1].neurons < 128
    assert (found.sparsity[:, [0, 3]] == 0).all()


def test_half_precision_scores_are_single(tmp_path):
    model = llama().to(torch.bfloat16)
    found = AdaptPruner(model, target_ratio=0.7).run(draw)
    assert model.dtype is torch.bfloat16 and found.params_after < found.params_before
    again = load_pruned(save_pruned(model, tmp_path / "m"), device="cpu", dtype=torch.bfloat16)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_gradients_flags_and_modes_of_the_user_are_put_back():
    model = llama()
    model.train()
    model.model.norm.weight.requires_grad_(False)
    model.model.embed_tokens.weight.grad = torch.ones_like(model.model.embed_tokens.weight)
    AdaptPruner(model, target_ratio=0.8).run(draw)
    assert model.training and not model.model.norm.weight.requires_grad
    assert (model.model.embed_tokens.weight.grad == 1).all()
    assert all(p.requires_grad for p in model.model.layers.parameters())
    assert all(p.grad is None for p in model.model.layers.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_plain_result_loads_without_this_library(tmp_path):
    model = llama(tie=True)
    AdaptPruner(model, target_ratio=0.5, amplitude=0).run(draw)
    save_pruned(model, tmp_path / "plain")
    code = (
        "import sys, torch, transformers;"
        f"m = transformers.AutoModelForCausalLM.from_pretrained(r'{tmp_path / 'plain'}');"
        "assert 'adaptlab' not in sys.modules;"
        "print(type(m).__name__, m.config.intermediate_size, m.num_parameters())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert out.returncode == 0, out.stderr[-2000:]
    name, width, params = out.stdout.split()
    assert name == "LlamaForCausalLM" and int(width) == layer_shapes(model)[0].neurons
    assert int(params) == count_parameters(model)


@pytest.mark.parametrize("tie", [True, False])
def test_ragged_model_lives_on(tie, tmp_path):
    model = llama(tie=tie)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e-3)
    AdaptPruner(model, target_ratio=0.8).run(draw)
    assert len(set(layer_shapes(model))) > 1 and isinstance(model, transformers.LlamaForCausalLM)
    model.save_pretrained(tmp_path / "saved")  # as the Trainer does
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(model) and layer_shapes(again) == layer_shapes(model)
    assert torch.equal(logits(again), logits(model))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = again.generate(ids(), use_cache=True, **options)
    assert torch.equal(cached, again.generate(ids(), use_cache=False, **options))
    assert [x.self_attn.layer_idx for x in again.model.layers] == [0, 1, 2]
    again(ids(), labels=ids()).loss.backward()  # and it trains
    assert all(p.grad is not None for p in again.parameters())
    smaller = AdaptPruner(again, target_ratio=0.8).run(draw)  # and can be pruned further
    assert smaller.params_after <= 0.8 * smaller.params_before
    copied = copy.deepcopy(again)
    assert torch.equal(logits(copied), logits(again))


def test_heads_that_do_not_divide_the_width(tmp_path):
    model = llama(hidden_size=80, heads=5, kv_heads=5)
    for layer in model.model.layers:
        prune_kv_groups_(layer.self_attn, [0, 1, 2])  # 80 is no multiple of 3
    assert not lesson.sync_config(model)
    again = load_pruned(save_pruned(model, tmp_path / "m"), device="cpu")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="multiple of the heads"):
        pad_to_plain(model)


def test_hidden_size_of_a_tied_model_saves_as_a_plain_one(tmp_path):
    model = llama(tie=True)
    model(ids(), labels=ids()).loss.backward()
    scores = hidden_taylor_scores(model)
    reads = model.model.layers[0].mlp.up_proj.weight
    assert scores.shape == (48,) and (scores >= (reads * reads.grad).abs().sum(0).detach()).all()
    prune_hidden_(model, scores.topk(36).indices)
    assert lesson.sync_config(model) and model.config.hidden_size == 36
    again = load_pruned(save_pruned(model, tmp_path / "m"), device="cpu")
    assert type(again) is transformers.LlamaForCausalLM
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="no multiple"):
        prune_hidden_(model, range(35))
    assert torch.equal(logits(again), logits(model))


def poisoned():
    model = llama()
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = math.nan
    return model


def quantised():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        torch.zeros(128, 48, dtype=torch.int8), requires_grad=False)  # fmt: skip
    return model


def adapted():
    model = llama()
    make = lambda layer: adapters.LoraAdapter(layer, rank=2)  # noqa: E731
    adapters.attach(model, make, ["model.layers.0.mlp.up_proj"])
    return model


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: AdaptPruner(llama(), 0), "target_params"),
        (lambda: AdaptPruner(llama(), -5), "target_params"),
        (lambda: AdaptPruner(llama(), 10), "one KV group and one neuron"),
        (lambda: AdaptPruner(llama()), "target_ratio"),
        (lambda: AdaptPruner(llama(), 10_000, 0.5), "not both"),
        (lambda: AdaptPruner(llama(), target_ratio=0), "target_ratio"),
        (lambda: AdaptPruner(llama(), target_ratio=1.5), "target_ratio"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, amplitude=-0.1), "amplitude"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, amplitude=math.nan), "amplitude"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, steps=0), "steps"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, steps=2.5), "steps"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, channel_sparsity=0), "channel_sparsity"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, channel_sparsity=1.1), "channel_spars"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, criterion="hessian"), "taylor"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, layer_metric="angle"), "cosine"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, protect=(7,)), "protect"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, protect=(0, 1, 2)), "no layer"),
        (lambda: AdaptPruner(nn.Linear(2, 2), 1), "no decoder layers"),
        (lambda: AdaptPruner(models.tiny_bert(), 1), "no decoder layers|no nn.Linear"),
        (lambda: AdaptPruner(quantised(), target_ratio=0.5), "quantised"),
        (lambda: AdaptPruner(adapted(), target_ratio=0.5), "adapters|no nn.Linear"),
        (lambda: layer_importance(llama(), []), "no calibration"),
        (lambda: layer_importance(llama(), [ids()], "angle"), "metric"),
        (lambda: layer_importance(llama(), [ids().float()]), "integer"),
        (lambda: normalise_importance(torch.tensor([0.0, math.nan])), "finite"),
        (lambda: update_sparsity(torch.zeros(2), torch.zeros(2), 0.1, -1), "amplitude"),
        (lambda: update_sparsity(torch.zeros(2), torch.zeros(2), 0, 1), "increment"),
        (lambda: mlp_taylor_scores(llama().model.layers[0].mlp), "backward"),
        (lambda: prune_mlp_(llama().model.layers[0].mlp, []), "empty"),
        (lambda: prune_mlp_(llama().model.layers[0].mlp, [1, 1]), "different"),
        (lambda: prune_mlp_(llama().model.layers[0].mlp, [128]), "from 0 to 127"),
        (lambda: prune_mlp_(llama().model.layers[0].mlp, [0.5]), "numbers or a mask"),
        (lambda: prune_kv_groups_(llama().model.layers[0].self_attn, [-1]), "from 0 to 2"),
        (lambda: stage_targets(100, 100, 3), "p_target"),
        (lambda: stage_targets(100, 50, 0), "stages"),
        (lambda: stage_data_shares(3, "square"), "strategy"),
        (lambda: adapt_accel(llama(), 10, 2, print, draw), "one KV group"),
        (lambda: adapt_accel(llama(), 30_000, 2, print, draw, shares="square"), "strategy"),
        (lambda: WSDSchedule(torch.optim.SGD(llama().parameters(), 1.0), 10, 11), "base_step"),
        (lambda: load_pruned("no/such/folder"), "does not exist"),
        (lambda: to_messages({"a": 1}), "no conversation"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "make, calibration, words",
    [
        (poisoned, draw, "nan"),
        (llama, lambda step: ids().float(), "integer"),
        (llama, lambda step: ids(2, 1), "2 tokens"),
        (llama, lambda step: ids(0, 5), "samples of 2"),
        (llama, lambda step: ids() + 100, r"\[0, 64\)"),
        (llama, lambda step: ids(1, 600), "takes 512"),
        (llama, [ids(), ids()], "ended before step 3"),
        (llama, lambda step: ids() if step < 3 else ids().float(), "integer"),
        (llama, lambda step: 1 / (step - 4) and ids(), "zero"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(make, calibration, words):
    model = make()
    before, parameters = state(model), list(model.parameters())
    config = copy.deepcopy(model.config.to_dict())
    with pytest.raises((ValueError, ZeroDivisionError), match=words):
        AdaptPruner(model, target_ratio=0.5).run(calibration)
    assert unchanged(model, before) and model.config.to_dict() == config
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.model.layers[0].mlp.up_proj.out_features == 128


def test_a_schedule_that_ends_early_is_undone():
    model = llama()
    before = state(model)
    with pytest.raises(ValueError, match="channel_sparsity"):
        AdaptPruner(model, target_ratio=0.3, steps=5, channel_sparsity=0.2).run(draw)
    assert unchanged(model, before)
    with pytest.raises(TypeError, match="lambda step"):
        AdaptPruner(model, target_ratio=0.5).run(ids())


def test_nothing_is_overwritten(tmp_path):
    save_pruned(llama(), tmp_path / "m")
    (tmp_path / "m" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="exists"):
        save_pruned(llama(seed=1), tmp_path / "m")
    assert (tmp_path / "m" / "mine.txt").is_file()


def test_a_family_without_a_ragged_class_is_refused_at_once():
    config = transformers.GemmaConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, intermediate_size=40, head_dim=8)  # fmt: skip
    with pytest.raises(ValueError, match="model_type = 'gemma'"):
        AdaptPruner(transformers.GemmaForCausalLM(config), target_ratio=0.5)


def test_nothing_to_do_warns():
    model = llama()
    before = state(model)
    with pytest.warns(UserWarning, match="nothing to prune"):
        found = AdaptPruner(model, 10**9).run(draw)
    assert unchanged(model, before) and len(found.history) == 0
    assert found.params_after == found.params_before


def test_a_loader_gives_one_batch_per_step():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids(200, 8)), batch_size=4)
    found = AdaptPruner(llama(), target_ratio=0.8).run(loader)
    assert 1 < len(found.history) <= 50


def test_accel_fails_whole():
    model = llama(tie=True)
    before, parameters = state(model), list(model.parameters())

    def train(m, stage):
        for p in m.parameters():
            p.data.mul_(2)
        if stage.number == 2:
            raise FloatingPointError("loss")

    with pytest.raises(FloatingPointError):
        adapt_accel(model, 40_000, 3, train, draw)
    assert unchanged(model, before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_accel_draws_fresh_data_and_covers_the_training_set():
    seen, drawn = [], []

    def calibration(number):
        drawn.append(number)
        return draw(number)

    model = llama()
    report = adapt_accel(model, 60_000, 4, lambda m, s: seen.append(s), calibration)
    assert drawn == list(range(1, len(drawn) + 1))
    assert [s.begin for s in seen[1:]] == [s.end for s in seen[:-1]]
    assert [s.target_params for s in seen] == stage_targets(
        report.pruned[0].params_before, 60_000, 4
    )
    assert all(p.params_after <= s.target_params for p, s in zip(report.pruned, seen, strict=True))


def test_wsd_against_its_formula():
    for step in range(200):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
        WSDSchedule(optimizer, 200, base_step=step, min_lr=0.3)
        if step < 10:
            expected = 3.0 * step / 10
        elif step < 180:
            expected = 3.0
        else:
            expected = 3.0 - 2.7 * (step - 180) / 20
        assert math.isclose(optimizer.param_groups[0]["lr"], expected, abs_tol=1e-12), step


def test_draws_and_choices():
    pool = torch.arange(30)[:, None].expand(30, 4)
    one = calibration_draws(pool, 5, seed=1)
    assert torch.equal(one(3), one(3)) and len(one(1).unique()) == 5
    assert not torch.equal(one(3), calibration_draws(pool, 5, seed=2)(3))
    row = {"question": "Q", "choices": ["x", "y", "z"], "answer": 2, "subject": "s"}
    item = choice_items([row], {"s": [row] * 5})[0]
    assert item["context"].count("Answer: C") == 5 and item["choices"] == [" A", " B", " C"]


# ------------------------------------------------------------------ the full-scale path


def tiny_world(folder):
    "FULL in miniature: a random Qwen2 and a random Llama, byte tokens, and files for the hub's."
    text = "The quick brown fox jumps over the lazy dog, and then it does so once more. "
    chat = (
        "{% for m in messages %}{{ '<bos>' + m['role'] + ': ' + m['content'] + '<eos>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<bos>assistant: ' }}{% endif %}"
    )
    tokenizer = models.byte_tokenizer()
    tokenizer.chat_template = chat
    torch.manual_seed(0)
    qwen = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=260, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=True, max_position_embeddings=512))  # fmt: skip
    small = llama(vocab_size=260)
    for name, model in (("qwen", qwen), ("llama", small)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = {
        "text/train": [{"text": text * 4}] * 20,
        "text/test": [{"text": text * 3}] * 8,
        "chats/train": [
            {"instruction": f"Say {i}.", "input": "", "output": f"{i} and more"} for i in range(30)
        ],
        "mmlu/validation": [
            {"question": "1+1?", "choices": ["2", "3"], "answer": 0, "subject": "s"}
        ],
        "mmlu/test": [{"question": "2+1?", "choices": ["2", "3"], "answer": 1, "subject": "s"}] * 4,
    }
    for path, items in rows.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(map(json.dumps, items))
        (folder / f"{path}.jsonl").write_text(lines, encoding="utf-8")
    return FULL.replace(
        seeds=(0,),
        prune_model=str(folder / "llama"),
        prune_steps=20,
        text=str(folder / "text"),
        eval_text=str(folder / "text"),
        eval_config=None,
        calibration_samples=6,
        calibration_length=32,
        calibration_batch=3,
        eval_windows=8,
        eval_length=48,
        accel_model=str(folder / "qwen"),
        accel_target=0.7,
        stages=3,
        data=(str(folder / "chats"),),
        n_train=24,
        max_length=64,
        batch=4,
        precision="no",
        device="cpu",
        mmlu=str(folder / "mmlu"),
        mmlu_config="",
        mmlu_shots="validation",
    )


def test_full_scale_path_with_tiny_models(tmp_path):
    cfg = tiny_world(tmp_path)
    run = start_run("adapt_pruner", cfg, "full", root=tmp_path / "runs")
    report = experiment(cfg, run)
    losses = report.tables["losses"]
    assert list(losses.method.unique()) == ["dense", *cfg.methods]
    assert np.isfinite(losses.loss).all() and set(report.figures) == {"smollm2", "accel"}
    frame = report.tables["accel"]
    assert list(frame.arm) == ["one-shot", "interleaved"] and frame.mmlu.between(0, 100).all()
    qwen = models.load(cfg.accel_model, device="cpu").model
    assert (frame.params <= 0.7 * count_parameters(qwen)).all()
    saved = load_pruned(run.path("models", "interleaved-0"), device="cpu")
    assert count_parameters(saved) == frame.params[1]
    assert count_parameters(load_pruned(run.path("models", "adaptive"))) <= losses.params[0]


def test_distillation_moves_the_student_to_its_teacher():
    teacher, student = llama(seed=1), llama(seed=2).requires_grad_(True)
    rows, before = ids(16, 12, seed=5), state(teacher)
    batch = {"input_ids": rows, "labels": rows.clone()}
    batch["labels"][:, :4] = -100
    loss, far = DistillationLoss(teacher, weight=1.0), []
    with torch.no_grad():
        far.append(float(loss(student, batch)[0]))
    # by hand: T² times the mean over learnt positions of KL at temperature T
    p, q = (logits(m, rows)[:, 3:-1].div(2).log_softmax(-1) for m in (teacher, student))
    assert math.isclose(far[0], 4 * float((p.exp() * (p - q)).sum(-1).mean()), rel_tol=1e-4)
    train.fit(student, batch, loss, steps=30, batch_size=16, lr=3e-3, device="cpu", progress=False)
    with torch.no_grad():
        far.append(float(loss(student, batch)[0]))
    assert far[1] < 0.5 * far[0]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("options", [{"weight": 1.5}, {"weight": -0.1}, {"temperature": 0.0}])
def test_distillation_refuses(options):
    with pytest.raises(ValueError, match="weight = .* temperature = "):
        DistillationLoss(llama(), **options)


def test_a_run_with_distillation_is_another_run(tmp_path):
    cfg = tiny_world(tmp_path).replace(tracks=("accel",), mmlu="", stages=2, lr=3e-3)
    found = []
    for weight in (0.0, 0.9):
        one = cfg.replace(distill=weight)
        report = experiment(one, start_run("adapt_pruner", one, "full", root=tmp_path / "runs"))
        found.append(report.tables["accel"].loss.to_numpy())
    assert np.isfinite(found).all() and not np.allclose(*found)


def test_full_scale_path_with_two_processes(tmp_path):
    cfg, default, args = tiny_world(tmp_path), FULL.to_dict(), []
    for name, value in cfg.to_dict().items():
        if value != default[name] and name not in ("seeds", "data"):
            args += [f"--{name.replace('_', '-')}", "" if value == "" else str(value)]
    args += ["--seeds", "0", "--data", cfg.data[0], "--tracks", "accel"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "-m", "adaptlab", "run", "adapt_pruner", "--scale", "full", *args]
    command += ["--root", str(tmp_path / "runs")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("report in") == 1
    (folder,) = (tmp_path / "runs" / "adapt_pruner").iterdir()
    assert count_parameters(load_pruned(folder / "models" / "interleaved-0")) > 0


def test_module_is_the_one_of_the_catalogue():
    from adaptlab import catalog

    assert catalog.find("adapt_pruner").module == lesson.__name__
