"""Adapt-Pruner: cuts equal masks, ragged models live on, all or nothing, resume, the full path."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import peft
import pytest
import schemas
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptlab import adapters, models, recipes
from adaptlab.bench.runs import launch, start_run
from adaptlab.compression import adapt_pruner as lesson
from adaptlab.compression.adapt_pruner import (
    FAMILIES,
    AdaptPruner,
    WSDSchedule,
    adapt_accel,
    kv_group_taylor_scores,
    layer_importance,
    mlp_taylor_scores,
    normalise_importance,
    planned_shape,
    stage_data_shares,
    stage_targets,
    update_sparsity,
)
from adaptlab.decoders import (
    LayerShape,
    decoder_layers,
    layer_shapes,
    load_pruned,
    prune_kv_groups_,
    prune_mlp_,
    save_pruned,
    sync_config,
)
from adaptlab.experiments import adapt_pruner as told
from adaptlab.experiments.adapt_pruner import (
    ARMS,
    FULL,
    SMALL,
    accel_bed,
    calibration_draws,
    experiment,
    prune_arm,
    to_messages,
)
from adaptlab.train import Training


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def llama(seed=0, layers=3, heads=6, kv_heads=3, hidden_size=48, tie=False, vocab_size=64):
    torch.manual_seed(seed)
    return recipes.tiny_llama(vocab_size=vocab_size, hidden_size=hidden_size, layers=layers,
                              heads=heads, kv_heads=kv_heads, tie=tie)


def family(name):
    "A random model of another family; Qwen2 has biases on q, k and v."
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[name](
        vocab_size=64, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, intermediate_size=40, head_dim=8, pad_token_id=0,
        max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
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


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_equals_a_mask_in_every_family(name, tmp_path):
    model = family(name)
    masked = copy.deepcopy(model)
    masked.model.layers[0].mlp.down_proj.weight.data[:, [1, 4]] = 0
    masked.model.layers[2].self_attn.o_proj.weight.data[:, :16] = 0
    prune_mlp_(model.model.layers[0].mlp, [j for j in range(40) if j not in (1, 4)])
    prune_kv_groups_(model.model.layers[2].self_attn, torch.tensor([False, True, True]))
    torch.testing.assert_close(logits(model), logits(masked), atol=1e-5, rtol=1e-5)
    again = load_pruned(save_pruned(model, tmp_path / "pruned"), device="cpu")
    assert type(again) is type(model) and layer_shapes(again) == layer_shapes(model)
    assert torch.equal(logits(again), logits(model))


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


def test_the_score_of_a_weight_is_its_finite_difference():
    model = llama().double()
    w, losses = model.model.layers[0].mlp.up_proj.weight, []
    model(ids(), labels=ids()).loss.backward()
    slope = w.detach() * w.grad
    assert torch.equal(lesson.CRITERIA["taylor"](w.detach(), w.grad), slope.abs())
    at = divmod(int(slope.abs().argmax()), w.shape[1])
    start = float(w.detach()[at])
    for factor in (0.9, 1.1):  # towards zero, and away from it
        w.data[at] = factor * start
        found = logits(model)[:, :-1].flatten(0, 1)
        losses.append(nn.functional.cross_entropy(found, ids()[:, 1:].flatten()).item())
    assert abs((losses[1] - losses[0]) / 0.2 / float(slope[at]) - 1) < 0.01


def test_float16_gradients_do_not_vanish():
    "Gradients that float16 cannot hold still rank the neurons as in float32."
    def model(dtype):
        net = llama()
        net.lm_head.weight.data.mul_(1e-5)  # all gradients below it are tiny
        for layer in net.model.layers:  # what ranks the neurons is no accident of rounding
            layer.mlp.down_proj.weight.data *= torch.linspace(0.5, 2, 128)
        return net.to(dtype)

    half, single = model(torch.float16), model(torch.float32)
    half(ids(), labels=ids()).loss.backward()
    lost = half.model.layers[0].mlp.up_proj.weight.grad == 0
    assert lost.float().mean() > 0.9  # so the plain way loses them
    kept = [AdaptPruner(net, target_ratio=0.7, steps=2, amplitude=0).run(draw).kept
            for net in (single, model(torch.float16))]
    for (_, a), (_, b) in zip(*kept, strict=True):
        assert len(set(a.tolist()) & set(b.tolist())) > 0.95 * len(a)


def test_gradients_add_up_over_the_batches_of_a_step():
    kept = [AdaptPruner(llama(), target_ratio=0.7, batch_size=n).run(draw).kept for n in (4, 2)]
    assert all(torch.equal(a, b) for x, y in zip(*kept, strict=True)
               for a, b in zip(x, y, strict=True))


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
    model = llama()
    torch.manual_seed(3)
    AdaptPruner(model, target_ratio=0.9, criterion="random", amplitude=0).run(draw)
    assert torch.equal(torch.rand(2), expected)


def test_magnitude_drops_the_smallest():
    model = llama(layers=1)
    for j in (5, 9):
        model.model.layers[0].mlp.gate_proj.weight.data[j] *= 1e-3
        model.model.layers[0].mlp.up_proj.weight.data[j] *= 1e-3
        model.model.layers[0].mlp.down_proj.weight.data[:, j] *= 1e-3
    target = count_parameters(model) - 2 * 3 * 48
    found = AdaptPruner(model, target, criterion="magnitude", amplitude=0).run(draw)
    assert set(range(128)) - set(found.kept[0][1].tolist()) == {5, 9}


def test_a_rule_of_ones_own_says_which_layers_stay():
    def spare(importance):
        hat = torch.zeros_like(importance)
        hat[[0, 3]] = 1
        return hat

    model = llama(layers=5)
    found = AdaptPruner(model, target_ratio=0.7, normalise=spare).run(draw)
    assert found.shapes[0] == found.shapes[3] == (3, 128) and found.shapes[1].neurons < 128
    assert all((step.sparsity[[0, 3]] == 0).all() for step in found.history)


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
    assert len(set(layer_shapes(model))) > 1
    model.save_pretrained(tmp_path / "saved")  # as the Trainer does
    again = load_pruned(tmp_path / "saved", device="cpu")
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
    assert not sync_config(model)
    again = load_pruned(save_pruned(model, tmp_path / "m"), device="cpu")
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


def with_peft():
    return peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).base_model.model


def offloaded():
    model = llama()
    model.model.layers[1].to("meta")
    return model


def eight_bit():
    model = llama()
    w = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        w.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


def shared_layers():
    model = llama()
    model.model.layers[2] = model.model.layers[1]
    return model


def padded():
    x = ids()
    mask = torch.ones_like(x)
    mask[0, -3:] = 0
    return {"input_ids": x, "attention_mask": mask}


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
        (lambda: AdaptPruner(llama(), target_ratio=0.5, batch_size=0), "batch_size"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, normalise=torch.sum).run(draw), "3 finite"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, normalise=lambda x: x * math.nan).run(
            draw), "3 finite"),
        (lambda: AdaptPruner(llama(), target_ratio=0.5, criterion=lambda w, g: (w * g).sum(1)).run(
            draw), "each entry"),
        (lambda: update_sparsity(torch.zeros(3), torch.zeros(2), 0.1, 0.1), "3 layers and 2"),
        (lambda: adapt_accel(llama(), 40_000, 2, print, draw, done=3, params_before=9), "0 to 2"),
        (lambda: adapt_accel(llama(), 40_000, 2, print, draw, done=-1, params_before=9), "0 to 2"),
        (lambda: AdaptPruner(nn.Linear(2, 2), 1), "model_type = None"),
        (lambda: AdaptPruner(recipes.tiny_bert(), 1), "model_type = 'bert'"),
        (lambda: decoder_layers(nn.Linear(2, 2)), "no list of layers"),
        (lambda: decoder_layers(recipes.tiny_bert()), "no list of layers"),
        (lambda: AdaptPruner(with_peft(), target_ratio=0.5), "adapters merged"),
        (lambda: AdaptPruner(offloaded(), target_ratio=0.5), "on meta can't be cut"),
        (lambda: AdaptPruner(eight_bit(), target_ratio=0.5), "float8.*can't be cut"),
        (lambda: AdaptPruner(shared_layers(), target_ratio=0.5), "share weights"),
        (lambda: layer_importance(llama(), [padded()]), "without padding"),
        (lambda: adapt_accel(llama(), 40_000, 2, print, draw, done=1), "params_before"),
        (lambda: AdaptPruner(quantised(), target_ratio=0.5), "int8.*quantised"),
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
        (lambda: prune_mlp_(llama().model.layers[0].mlp, [0.5]), "mask of length 128"),
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


@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_batch_size_does_not_matter(size):
    "Four samples in one batch, in four, or in three and one: all tokens count alike."
    runs = [AdaptPruner(llama(), target_ratio=0.6, batch_size=k).run(draw) for k in (4, size)]
    torch.testing.assert_close(runs[0].history[0].importance, runs[1].history[0].importance,
                               atol=1e-5, rtol=1e-5)
    assert abs(runs[0].history[0].loss - runs[1].history[0].loss) < 1e-5
    assert runs[0].shapes == runs[1].shapes
    for a, b in zip(runs[0].kept, runs[1].kept, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_importance_is_a_mean_over_tokens():
    x, y = draw(1), draw(2)[:1]
    each = torch.stack([layer_importance(llama(), [row[None]]) for row in (*x, *y)])
    torch.testing.assert_close(layer_importance(llama(), [x, y]), each.mean(0))


def test_it_runs_where_gradients_are_off():
    with torch.no_grad():
        found = AdaptPruner(llama(), target_ratio=0.7).run(draw)
    assert found.shapes == AdaptPruner(llama(), target_ratio=0.7).run(draw).shapes


@pytest.mark.parametrize(
    "make, calibration, words",
    [
        (poisoned, draw, "nan"),
        (llama, lambda step: ids().float(), "integer"),
        (llama, lambda step: ids(2, 1), r"got \(2, 1\)"),
        (llama, lambda step: ids(0, 5), r"got \(0, 5\)"),
        (llama, lambda step: ids() + 100, r"\[0, 64\)"),
        (llama, lambda step: ids(1, 600), "at most 512"),
        (llama, [ids(), ids()], "one item per step; got NoneType"),
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
    with pytest.raises(ValueError, match=r"got \(12,\)"):
        AdaptPruner(model, target_ratio=0.5).run(ids())


def test_nothing_is_overwritten(tmp_path):
    save_pruned(llama(), tmp_path / "m")
    (tmp_path / "m" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="exists"):
        save_pruned(llama(seed=1), tmp_path / "m")
    assert (tmp_path / "m" / "mine.txt").is_file()


def test_a_family_that_cannot_be_cut_is_refused_at_once():
    config = transformers.Olmo2Config(
        vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, intermediate_size=40)  # it normalises all heads together
    with pytest.raises(ValueError, match="model_type = 'olmo2'"):
        AdaptPruner(transformers.Olmo2ForCausalLM(config), target_ratio=0.5)


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

    report = adapt_accel(llama(), 60_000, 4, lambda m, s: seen.append(s), calibration)
    assert len(set(drawn)) == len(drawn) == sum(len(p.history) for p in report.pruned)
    assert [s.begin for s in seen[1:]] == [s.end for s in seen[:-1]]
    assert [s.target_params for s in seen] == stage_targets(
        report.pruned[0].params_before, 60_000, 4)
    assert all(p.params_after <= s.target_params for p, s in zip(report.pruned, seen, strict=True))


def test_accel_goes_on_where_it_was_cut_off():
    "A model that has a stage behind it ends where an uninterrupted run ends."
    nothing = lambda m, s: None  # noqa: E731
    at_once, in_two = llama(), llama()
    whole = count_parameters(at_once)
    options = {"steps": 20, "amplitude": 0.05}
    report = adapt_accel(at_once, whole // 2, 3, nothing, draw, **options)
    AdaptPruner(in_two, report.stages[0].target_params, **options).run(draw)
    adapt_accel(in_two, whole // 2, 3, nothing, draw, done=1, params_before=whole, **options)
    assert torch.equal(logits(in_two), logits(at_once))


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


def test_draws_are_fresh_and_repeatable():
    pool = torch.arange(30)[:, None].expand(30, 4)
    one = calibration_draws(pool, 5, seed=1)
    assert torch.equal(one(3), one(3)) and len(one(1).unique()) == 5
    assert not torch.equal(one(3), calibration_draws(pool, 5, seed=2)(3))


# ------------------------------------------------------------------ the experiment


def small_accel(**changes):
    return SMALL.replace(**{"tracks": ("accel",), "seeds": (0,), "stages": (1, 3), "n_train": 24,
                            "lrs": (1e-3,), "device": "cpu"} | changes)


def test_arms_end_at_equal_sizes():
    bed, sizes = accel_bed(small_accel(), 0), {}
    for arm in ARMS:
        with bed.fresh() as model:
            prune_arm(model, bed, 0, arm=arm, cfg=small_accel(remove=0.15, steps=20))
            sizes[arm] = count_parameters(model)
    assert max(sizes.values()) - min(sizes.values()) < 12 * 3 * 64  # some neurons of four layers
    assert layer_shapes(bed.model)[0] == (2, 168)  # what was copied is untouched
    with pytest.raises(ValueError, match="arm = 'none'"):
        prune_arm(bed.model, bed, 0, arm="none", cfg=small_accel())


def test_one_seed_and_resume_repeats_nothing(tmp_path, monkeypatch):
    cfg, calls = small_accel(), []
    plain = told.accel_arm

    def arm(*args, **kwargs):
        calls.append(kwargs["name"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(told, "accel_arm", arm)
    with pytest.raises(KeyboardInterrupt):
        launch("adapt_pruner", cfg, root=tmp_path)
    report = launch("adapt_pruner", cfg, root=tmp_path, resume=True)
    assert calls == ["one-shot", "3 stages", "3 stages"]
    assert [c.verdict for c in report.claims] == ["not decided at this scale"]  # one seed
    assert np.isfinite(report.tables["accel"].nats).all()


def test_an_arm_goes_on_after_its_last_stage_and_keeps_one_model(tmp_path, monkeypatch):
    cfg = small_accel(stages=(3,), checkpoints=True)
    kept, stages = [], []
    plain = told.train_stage

    def train(model, stage, *args, **kwargs):
        stages.append(stage.number)
        if stages == [1, 2, 3]:
            raise KeyboardInterrupt
        return plain(model, stage, *args, **kwargs)

    monkeypatch.setattr(told, "train_stage", train)
    with pytest.raises(KeyboardInterrupt):
        launch("adapt_pruner", cfg, root=tmp_path / "cut")
    (folder,) = (tmp_path / "cut" / "adapt_pruner").iterdir()
    kept = sorted(p.name for p in (folder / "models" / "3_stages-0-0.001").iterdir())
    assert kept == ["stage-002"]
    again = launch("adapt_pruner", cfg, root=tmp_path / "cut", resume=True)
    assert stages == [1, 2, 3, 3]
    kept = sorted(p.name for p in (folder / "models" / "3_stages-0-0.001").iterdir())
    assert kept == ["stage-003"]
    whole = launch("adapt_pruner", cfg.replace(checkpoints=False), root=tmp_path / "whole")
    one, other = (r.tables["accel"].nats.to_numpy() for r in (again, whole))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert not (whole.folder.parent / "models").exists() or not any(
        (whole.folder.parent / "models").iterdir())


def test_full_names_what_the_hub_has(recorded):
    tokenizer = recipes.byte_tokenizer()
    pool, choose, test = told._windows(FULL.replace(n_test=8), tokenizer)
    assert pool.shape[1] == FULL.length and test.shape == (8, FULL.test_length)
    rows = told._conversations(FULL.data, FULL.n_train, 42)
    order, begin = np.array(rows.indices), 0
    for end in rows.dataset.cumulative_sizes:
        at = int(np.flatnonzero((order >= begin) & (order < end))[0])
        assert to_messages(rows[at])[-1]["role"] == "assistant"
        begin = end
    sizes = [schemas.rows(s if "#" in s else f"{s}#train") for s in FULL.data]
    assert sum(sizes) == 7_714_363
    assert "HuggingFaceH4/ultrachat_200k#train_sft" in recorded.asked


def tiny_world(folder):
    "FULL in miniature: a random Qwen2 and a random Llama, byte tokens, and files for the hub's."
    text = "The quick brown fox jumps over the lazy dog, and then it does so once more. "
    chat = (
        "{% for m in messages %}{{ '<bos>' + m['role'] + ': ' + m['content'] + '<eos>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<bos>assistant: ' }}{% endif %}"
    )
    tokenizer = recipes.byte_tokenizer()
    tokenizer.chat_template = chat
    torch.manual_seed(0)
    qwen = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=260, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=True, max_position_embeddings=512))
    for name, model in (("qwen", qwen), ("llama", llama(vocab_size=260))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = {
        "text/train": [{"text": text * 4}] * 20,
        "text/test": [{"text": text * 3}] * 8,
        "chats/train": [
            {"instruction": f"Say {i}.", "input": "", "output": f"{i} and more"} for i in range(30)
        ],
    }
    for path, items in rows.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(map(json.dumps, items))
        (folder / f"{path}.jsonl").write_text(lines, encoding="utf-8")
    return FULL.replace(
        seeds=(0,), model=str(folder / "llama"), dtype="float32", steps=20,
        text=str(folder / "text"), test_text=str(folder / "text"), samples=6, length=32, n_test=8,
        test_length=48, accel_model=str(folder / "qwen"), target=0.7, stages=(1, 3),
        data=(str(folder / "chats"),), n_train=24, max_length=64, mmlu="", device="cpu",
        training=Training(epochs=1, batch_size=4, clip=1.0))


def test_full_scale_path_with_tiny_models(tmp_path, monkeypatch):
    cfg = tiny_world(tmp_path).replace(mmlu="cais/mmlu@all")
    questions = [{"question": "2+1?", "choices": ["2", "3"], "answer": 1, "subject": "s"}] * 4
    asked = []
    plain = told.evaluate.multiple_choice
    monkeypatch.setattr(told.evaluate, "multiple_choice", lambda m, t, items: (
        asked.extend(items), plain(m, t, items))[1])
    load = told.data.load
    monkeypatch.setattr(told.data, "load", lambda source, *a, **k: (
        questions if str(source).startswith("cais/") else load(source, *a, **k)))
    run = start_run("adapt_pruner", cfg, "full", root=tmp_path / "runs")
    report = experiment(cfg, run)
    table = report.tables["prune"]
    assert list(table.method.unique()) == list(cfg.arms)
    assert np.isfinite(table.dropna(subset="nats").nats).all()
    assert set(report.figures) == {"main"}
    frame = report.tables["accel"]
    assert list(frame.method) == ["before", "one-shot", "3 stages"]
    assert frame.mmlu.between(0, 100).all()
    assert asked[0]["context"].count("Answer: B\n\n") == 4 and asked[0]["choices"] == [" A", " B"]
    assert asked[0]["context"].endswith("2+1?\nA. 2\nB. 3\nAnswer:")
    qwen = models.load(cfg.accel_model, device="cpu").model
    assert (frame.params[1:] <= 0.7 * count_parameters(qwen)).all()
    saved = load_pruned(run.path("models", "3_stages-0-2e-05", "stage-003"), device="cpu")
    assert count_parameters(saved) == frame.params[2]


def test_full_scale_path_with_two_processes(tmp_path):
    cfg = tiny_world(tmp_path).replace(tracks=("accel",))
    code = (
        "import sys, pickle; from adaptlab.bench.runs import launch;"
        f"launch('adapt_pruner', pickle.load(open(r'{tmp_path / 'cfg'}', 'rb')), scale='full', "
        f"root=r'{tmp_path / 'runs'}', progress=False)")
    (tmp_path / "cfg").write_bytes(pickle.dumps(cfg))
    (tmp_path / "job.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--standalone", str(tmp_path / "job.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    (folder,) = (tmp_path / "runs" / "adapt_pruner").iterdir()
    assert (folder / "report").is_dir()
    found = load_pruned(folder / "models" / "3_stages-0-2e-05" / "stage-003", device="cpu")
    assert count_parameters(found) > 0


def test_module_is_the_one_of_the_catalogue():
    from adaptlab import catalog

    assert catalog.find("adapt_pruner").module == lesson.__name__
    assert catalog.find("adapt_pruner").experiment_module == told.__name__
