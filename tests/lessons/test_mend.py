"""MEND: factored gradients, editor networks, edited views, training, and the full-scale path."""

import json
import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from adaptlab import adapters, models
from adaptlab.editing import mend
from adaptlab.editing.mend import (
    FULL,
    MEND,
    SMALL,
    EditedModel,
    Factors,
    GradientTransform,
    MENDTrainer,
    RunningMoments,
    Tail,
    cached_batch,
    edit_collate,
    edit_losses,
    experiment,
    fine_tune,
    fine_tune_each,
    gradient_factors,
    locality_kl,
    select_layers,
    sequence_nll,
    tail_logits,
)
from adaptlab.experiment import start_run


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2,
                        bos_token_id=0, eos_token_id=0, initializer_range=0.2)
    return GPT2LMHeadModel(config)


def llama():
    torch.manual_seed(0)
    return models.tiny_llama(vocab_size=50, hidden_size=16, layers=3, heads=2, kv_heads=1)


def batch(rows=2, length=7, prompt=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def triple(rows=4):
    parts = (batch(rows, seed=s) for s in range(3))
    return dict(zip(("edit", "rephrase", "locality"), parts, strict=True))


def row(b, i):
    return {k: v[i : i + 1] for k, v in b.items()}


def warmed(model, **options):
    "An editor with statistics and networks that are not the identity, in eval mode."
    torch.manual_seed(1)
    editor = MEND(model, "mlp:-2:", **{"rank": 4, "edit_lr": 0.05} | options)
    editor.fit_normalization([batch(rows=6, seed=9)])
    with torch.no_grad():
        for name, p in editor.named_parameters():
            if name.endswith(("U", "bias")):
                p.normal_(std=0.1)
    return editor.eval()


# ------------------------------------------------------------------ gradients


class Twice(nn.Module):
    "One layer used twice, with an in-place activation after it."

    def __init__(self):
        super().__init__()
        self.mlp, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(2):
            x = F.relu(self.mlp(x), inplace=True)
        return self.head(x)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_outer_products_sum_to_the_gradient(make):
    model, data = make().eval(), batch()
    layers = select_layers(model, "mlp:-3:")
    found = gradient_factors(model, layers, lambda m: m(**data).loss)
    model(**data).loss.backward()
    for name, layer in layers.items():
        matrix = found[name].dense().sum(0)
        matrix = matrix.T if make is gpt2 else matrix
        torch.testing.assert_close(matrix, layer.weight.grad, rtol=1e-5, atol=1e-7)


def test_a_layer_that_runs_twice_counts_twice():
    torch.manual_seed(0)
    model, x, y = Twice(), torch.randn(5, 6), torch.randint(3, (5,))
    found = gradient_factors(model, {"mlp": model.mlp}, lambda m: F.cross_entropy(m(x), y))
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(found["mlp"].dense().sum(0), model.mlp.weight.grad)


# ------------------------------------------------------------------ the editor network


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(lambda x: sum(x) > 1),
       st.integers(0, 99))
def test_moments_do_not_depend_on_the_pieces(sizes, seed):
    x = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed)) * 5 + 100
    moments = RunningMoments(3)
    for piece in x.split(sizes):
        moments.update(piece)
    expected = (x.double() - x.double().mean(0)) / (x.double().std(0) + 1e-7)
    torch.testing.assert_close(moments.normalize(x.double()), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.integers(1, 4))
def test_number_of_parameters(m, n, rank, shared):
    g, width = GradientTransform(m, n, rank=rank, n_layers=shared), m + n
    rank = min(rank, width)
    expected = 4 * rank * width + 2 * width + 4 * shared * width
    assert sum(p.numel() for p in g.parameters()) == expected


def by_hand(g, u, delta, layer):
    "The paper's equation 3, token by token."
    outputs = []
    for a, b in zip(u, delta, strict=True):
        z = torch.cat([a, b])
        for block in g.nets["both"].layers:
            inner = block.U @ (block.V @ z) + block.bias
            z = z + torch.relu(block.scale[layer] * inner + block.offset[layer])
        outputs.append(z)
    return torch.stack(outputs).split([u.shape[1], delta.shape[1]], 1)


def test_network_is_equation_three():
    torch.manual_seed(0)
    g = GradientTransform(6, 4, rank=3, n_layers=2, norm=False)
    for p in g.parameters():
        nn.init.normal_(p)
    u, delta = torch.randn(5, 6), torch.randn(5, 4)
    for layer in (0, 1):
        for found, expected in zip(g(u, delta, layer), by_hand(g, u, delta, layer), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode, touched", [
    ("both", "u delta"), ("separate", "u delta"), ("x_only", "u"), ("delta_only", "delta"),
    ("one_sided", "delta"),
])
def test_modes_touch_what_they_say(mode, touched):
    torch.manual_seed(0)
    g = GradientTransform(6, 4, rank=3, mode=mode, norm=False)
    for p in g.parameters():
        nn.init.normal_(p)
    u, delta = torch.randn(5, 6), torch.randn(5, 4)
    new = dict(zip(("u", "delta"), g(u, delta), strict=True))
    for name, old in (("u", u), ("delta", delta)):
        assert torch.equal(new[name], old) != (name in touched.split())


def test_first_gradient_reaches_u_only():
    editor = MEND(llama(), "mlp:-1:", rank=4, edit_lr=0.1)
    sum(edit_losses(editor, triple())).backward()
    first = next(iter(editor.transforms.values())).nets["both"].layers[0]
    assert first.U.grad.abs().sum() > 0 and not first.V.grad.any()


# ------------------------------------------------------------------ edits


@pytest.mark.parametrize("make", [gpt2, llama])
def test_identity_without_norm_is_gradient_descent(make):
    model, data = make().eval(), batch()
    edited = MEND(model, "mlp:-2:", rank=3, edit_lr=0.3, norm=False).edit(data)
    sum(model(**row(data, i)).loss for i in range(2)).backward()
    for name, layer in edited.layers.items():
        torch.testing.assert_close(edited.delta(name), -0.3 * layer.weight.grad,
                                   rtol=1e-4, atol=1e-7)


def test_alpha_zero_changes_nothing():
    model, data = llama(), batch()
    edited = MEND(model, edit_lr=0.0, rank=3).edit(data)
    inputs = data["input_ids"]
    torch.testing.assert_close(edited(inputs).logits, model(inputs).logits, rtol=0, atol=1e-6)


def test_identity_with_norm_is_the_normalised_outer_product():
    model, data = llama(), batch(rows=3)
    editor = MEND(model, ["model.layers.2.mlp.down_proj.weight"], rank=3, edit_lr=0.1)
    name, layer = next(iter(editor.layers.items()))
    raw = gradient_factors(model, {name: layer}, lambda m: sequence_nll(
        m(data["input_ids"]).logits[:, :-1], data["labels"][:, 1:]))[name]
    u, delta = (x.flatten(0, 1) for x in raw)
    keep = delta.any(1)
    u, delta = ((x[keep] - x[keep].mean(0)) / (x[keep].std(0) + 1e-7) for x in (u, delta))
    torch.testing.assert_close(editor.edit(data).delta(name), -0.1 * delta.T @ u,
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_view_weights_and_adapters_agree(make):
    model, data = make().eval(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    edited = warmed(model).edit(data)
    ids = batch(3, seed=5)["input_ids"]
    view = edited(ids).logits
    assert not torch.allclose(view, model(ids).logits, atol=1e-3)
    torch.testing.assert_close(edited.materialize()(ids).logits, view, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(edited.attach()(ids).logits, view, rtol=1e-4, atol=1e-4)
    adapters.detach(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_edits_add_up_and_do_not_see_each_other():
    model, data = llama(), batch(rows=3)
    editor = warmed(model)
    both, each = editor.edit(data), editor.edit_each(data)
    assert len(both) == 1 and len(each) == 3
    ids = batch(6, seed=3)["input_ids"]
    together = each(ids).logits
    for i in range(3):
        alone = editor.edit(row(data, i))
        torch.testing.assert_close(each[i].delta("model.layers.2.mlp.up_proj"),
                                   alone.delta("model.layers.2.mlp.up_proj.weight"))
        torch.testing.assert_close(alone(ids[2 * i : 2 * i + 2]).logits,
                                   together[2 * i : 2 * i + 2], rtol=1e-4, atol=1e-5)
    for name in editor.layers:
        total = sum(each[i].delta(name) for i in range(3))
        torch.testing.assert_close(both.delta(name), total, rtol=1e-4, atol=1e-6)
        assert torch.linalg.matrix_rank(both.delta(name)) <= data["input_ids"].numel()


def test_padding_changes_nothing():
    model, data = llama(), batch()
    editor = warmed(model)
    longer = {k: F.pad(v, (0, 4), value=-100 if k == "labels" else 0) for k, v in data.items()}
    for name in editor.layers:
        torch.testing.assert_close(editor.edit(longer).delta(name), editor.edit(data).delta(name))


def test_one_edit_after_the_other():
    editor = warmed(llama(), edit_lr=1e-3)
    first = editor.edit(batch(1, seed=1))
    second = first.edit(batch(1, seed=2))
    twin = MEND(first.materialize(), "mlp:-2:", rank=4)
    twin.load_state_dict(editor.state_dict())
    on_copy, alone = (e.eval().edit(batch(1, seed=2)) for e in (twin, editor))
    for name in editor.layers:
        added = second.delta(name) - first.delta(name)
        torch.testing.assert_close(added, on_copy.delta(name), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(added, alone.delta(name), rtol=1e-3, atol=1e-4)


def test_the_model_never_notices():
    model = llama().train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    editor = MEND(model, "mlp:-1:", rank=2, edit_lr=0.1)
    MENDTrainer(editor, items(8), grad_accum=2, batch_size=4, lr=1e-2,
                collate_fn=stack).train(steps=3, progress=False, device="cpu")
    bad = batch()
    bad["labels"][:] = -100
    with pytest.raises(ValueError, match="no target"):
        editor.edit(bad)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert model.lm_head.weight.grad.sum() == model.lm_head.weight.numel()
    assert not any(m._forward_hooks for m in model.modules())


def test_a_bfloat16_model_keeps_its_type():
    model = llama().bfloat16()
    editor = MEND(model, "mlp:-1:", rank=2, edit_lr=0.1)
    edited = editor.edit(batch(6))
    assert next(editor.parameters()).dtype == torch.float32
    assert edited(batch()["input_ids"]).logits.dtype == torch.bfloat16
    assert edited.materialize().dtype == torch.bfloat16


def test_encoder_decoder_and_classifier():
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0)).eval()
    editor = MEND(t5, "DenseReluDense:-1:", rank=2, edit_lr=0.1, norm=False)
    assert len(editor.layers) == 4 and editor.loss_fn is sequence_nll
    data = batch()
    edited = editor.edit(data)
    sum(t5(**row(data, i)).loss for i in range(2)).backward()
    for name, layer in editor.layers.items():
        torch.testing.assert_close(edited.delta(name), -0.1 * layer.weight.grad,
                                   rtol=1e-4, atol=1e-7)
    bert = BertForSequenceClassification(BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=1)).eval()
    editor = MEND(bert, ["bert.encoder.layer.1.output.dense.weight"], rank=2, edit_lr=0.5,
                  norm=False)
    facts = batch() | {"labels": torch.tensor([1, 0])}
    edited = editor.edit(facts)
    with torch.no_grad():
        inputs = {k: v for k, v in facts.items() if k != "labels"}
        loss = [F.binary_cross_entropy_with_logits(m(**inputs).logits[:, 0], torch.tensor([1.0, 0]))
                for m in (bert, edited)]
    assert loss[1] < loss[0]


def test_any_module_with_its_own_functions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    editor = MEND(net, ["0", "2"], rank=2, edit_lr=0.5, norm=False,
                  forward_fn=lambda m, b: m(b["x"]), loss_fn=sequence_nll)
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    edited = editor.edit({"x": x, "labels": y})
    assert F.cross_entropy(edited(x), y) < F.cross_entropy(net(x), y)


# ------------------------------------------------------------------ training


def items(n):
    data = triple(n)
    return [{part: {k: v[i] for k, v in b.items()} for part, b in data.items()} for i in range(n)]


stack = torch.utils.data.default_collate


def test_training_lowers_the_loss_and_is_resumable(tmp_path):
    def train(steps, folder):
        torch.manual_seed(0)
        editor = MEND(llama(), "mlp:-2:", rank=4, edit_lr=0.02)
        trainer = MENDTrainer(editor, items(8), c_edit=1.0, lr=1e-2, lr_lr=1e-2, grad_accum=2,
                              batch_size=8, collate_fn=stack)
        history = trainer.train(steps=steps, log_every=1, progress=False, device="cpu",
                                checkpoint_dir=folder, checkpoint_every=6).history
        return editor, history["loss"].to_numpy()

    editor, loss = train(12, tmp_path / "a")
    assert loss[-1] < loss[0]
    train(6, tmp_path / "b")
    again, _ = train(12, tmp_path / "b")
    for (name, a), b in zip(editor.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_saved_editor_is_the_same_and_knows_its_model(tmp_path):
    model, data = llama(), batch()
    editor = warmed(model, mode="one_sided", shared=False)
    again = MEND.from_pretrained(model, editor.save_pretrained(tmp_path / "editor"))
    for name in editor.layers:
        assert torch.equal(again.edit(data).delta(name), editor.edit(data).delta(name))
    saved = json.loads((tmp_path / "editor" / "mend.json").read_text())
    assert saved["options"]["mode"] == "one_sided"
    wider = models.tiny_llama(vocab_size=50, hidden_size=32, layers=3, heads=2, kv_heads=1)
    with pytest.raises(ValueError, match="other shapes"):
        MEND.from_pretrained(wider, tmp_path / "editor")
    with pytest.raises(ValueError, match="no editor"):
        MEND.from_pretrained(model, tmp_path)


def test_text_items_make_batches():
    collate = edit_collate(models.byte_tokenizer())
    two = [{"edit": ("ab", "c"), "rephrase": ("b", "c"), "locality": ["x", "yz"]}] * 2
    found = collate(two)
    assert found["edit"]["labels"].tolist()[0][:2] == [-100, -100]
    assert found["locality"]["input_ids"].shape[0] == 4
    with pytest.raises(ValueError, match="equally many"):
        collate([two[0], {**two[0], "locality": ["x"]}])


def test_kl_agrees_with_torch():
    p, q = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(locality_kl(p, q), expected.mean())
    torch.testing.assert_close(locality_kl(p, q, mask), expected[mask.bool()].mean())


def test_known_answers_of_the_base_model_give_the_same_losses():
    model, data = llama(), triple()
    editor = warmed(model)
    known = {**data["locality"], "base_logits": model(data["locality"]["input_ids"]).logits}
    for a, b in zip(edit_losses(editor, data), edit_losses(editor, {**data, "locality": known}),
                    strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------ the trunk, the rivals


def neo():
    torch.manual_seed(0)
    return GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=260, max_position_embeddings=512, hidden_size=16, num_layers=3, num_heads=2,
        attention_types=[[["global"], 3]], intermediate_size=32, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize("make", [gpt2, llama, neo])
def test_tail_equals_the_whole_model(make):
    model = make().eval()
    data = batch(4)
    data["attention_mask"][2, 5:] = 0
    data["labels"][2, 5:] = -100
    tail = Tail(model, -2)
    short = cached_batch(tail, data)
    assert len(tail.cache) == 4
    whole = MEND(model, "mlp:-2:", rank=2, norm=False)
    fast = MEND(model, "mlp:-2:", rank=2, norm=False, loss_fn=sequence_nll,
                forward_fn=partial(tail_logits, tail))
    for name in whole.layers:
        torch.testing.assert_close(fast.edit(short).delta(name), whole.edit(data).delta(name),
                                   rtol=1e-3, atol=1e-8)
    assert cached_batch(tail, data)["hidden"].equal(short["hidden"])


def test_fine_tuning_is_adam_on_the_weights():
    import copy

    model, data = llama(), batch(1)
    name = "model.layers.2.mlp.up_proj"

    def forward(m, b):
        return m(input_ids=b["input_ids"]).logits[:, :-1]

    aligned = {**data, "labels": data["labels"][:, 1:]}
    edited = fine_tune(model, {name: model.get_submodule(name)}, aligned, forward_fn=forward,
                       lr=1e-2, max_steps=3)
    twin = copy.deepcopy(model)
    weight = twin.get_submodule(name).weight
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        sequence_nll(forward(twin, aligned), aligned["labels"]).mean().backward()
        optimizer.step()
    torch.testing.assert_close(edited.materialize().get_submodule(name).weight, weight,
                               rtol=1e-4, atol=1e-6)


def test_fine_tuning_side_by_side_is_fine_tuning_alone():
    model, data = llama(), batch(4)
    layers = select_layers(model, "mlp:-1:")
    options = {"forward_fn": lambda m, b: m(input_ids=b["input_ids"]).logits[:, :-1],
               "lr": 3e-2, "max_steps": 12}
    aligned = {**data, "labels": data["labels"][:, 1:]}
    together = fine_tune_each(model, layers, aligned, **options)
    alone = [fine_tune(model, layers, row(aligned, i), **options) for i in range(4)]
    for name in layers:
        for i in range(4):
            torch.testing.assert_close(together[i].delta(name), alone[i].delta(name),
                                       rtol=1e-3, atol=1e-4)
    right = mend.sequence_right(options["forward_fn"](together, aligned), aligned["labels"])
    assert right.any()


# ------------------------------------------------------------------ bad input


def left_padded():
    data = batch()
    data["attention_mask"][0, :2] = 0
    return data


def without_gradients(context):
    with context():
        warmed(llama()).edit(batch())


def broken():
    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
    return model


def no_target():
    data = batch()
    data["labels"][1] = -100
    return data


@pytest.mark.parametrize("call, words", [
    (lambda: MEND(llama(), ["model.layers.2.mlp.up_prj.weight"]), "did you mean"),
    (lambda: MEND(llama(), ["model.embed_tokens.weight"]), "Embedding"),
    (lambda: MEND(llama(), ["model.norm.weight"]), "Norm"),
    (lambda: MEND(gpt2(), ["transformer.h.0.mlp.c_fc.bias"]), "no linear layer"),
    (lambda: MEND(llama(), ["lm_head"]), "shared"),
    (lambda: MEND(llama(), "moe:-1:"), "no block has a part"),
    (lambda: MEND(llama(), "mlp"), "start:stop"),
    (lambda: MEND(llama(), []), "selects no"),
    (lambda: MEND(llama(), edit_lr=math.inf), "edit_lr"),
    (lambda: MEND(llama(), rank=0), "rank = 0"),
    (lambda: MEND(llama(), mode="both x_only"), "combined"),
    (lambda: MEND(llama(), init="zeros"), "init"),
    (lambda: GradientTransform(3, 4)(torch.ones(2, 4), torch.ones(2, 4)), "do not fit"),
    (lambda: GradientTransform(3, 4)(torch.ones(2, 3), torch.ones(2, 4), 1), "layer = 1"),
    (lambda: warmed(llama()).edit(left_padded()), "on the right"),
    (lambda: warmed(llama()).edit(no_target()), "no target"),
    (lambda: MEND(llama(), rank=2).eval().edit(batch()), "fit_normalization"),
    (lambda: without_gradients(torch.no_grad), "outside torch.no_grad"),
    (lambda: without_gradients(torch.inference_mode), "inference_mode"),
    (lambda: MEND(broken(), rank=2).edit(batch()), "NaN or infinite"),
    (lambda: warmed(llama()).edit_each(batch(3))(batch(4)["input_ids"]), "3 separate edits"),
    (lambda: warmed(llama()).edit_each(batch(3)).materialize(), "take one"),
    (lambda: warmed(llama()).edit(batch()).delta("lm_head"), "not edited"),
    (lambda: EditedModel(llama(), {}, {"x": Factors(None, torch.ones(1, 2, 2))}).edit({}), "MEND"),
    (lambda: MENDTrainer(MEND(llama(), rank=2), []), "empty"),
    (lambda: MENDTrainer(MEND(llama(), rank=2), [1], lr=0.0), "positive"),
    (lambda: Tail(nn.Linear(2, 2), -1), "no block"),
    (lambda: Tail(llama(), -7), "no block -7"),
    (lambda: mend.WorldBench(tiny_facts(world_train=18)), "left for the test"),
    (lambda: experiment(SMALL.replace(tracks=("word",)), None), "world, model"),
    (lambda: experiment(SMALL.replace(tracks=()), None), "world, model"),
])
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_batch_without_labels_is_refused():
    with pytest.raises(TypeError, match="labels"):
        warmed(llama()).edit({"input_ids": batch()["input_ids"]})


# ------------------------------------------------------------------ the experiment


def tiny_world(folder):
    "FULL in miniature: a random GPT-Neo, a random Llama that writes, and files of texts."
    neo().save_pretrained(folder / "model")
    models.tiny_llama(hidden_size=16, layers=1, heads=2, kv_heads=1).save_pretrained(folder / "gen")
    for name in ("model", "gen"):
        models.byte_tokenizer().save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(["to", "be", "or", "not"], 60))} for _ in range(12)]
    (folder / "texts").mkdir()
    (folder / "texts" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return FULL.replace(
        model=str(folder / "model"), generator=str(folder / "gen"), dataset=str(folder / "texts"),
        dataset_config=None, locality=str(folder / "texts"), n_train=8, n_valid=2, n_test=2,
        prompt_tokens=12, target_tokens=3, text_tokens=4, rank=4, batch=4, grad_accum=2, steps=3,
        eval_every=2, ft_steps=2, at_once=(2,), device="cpu")


def test_full_scale_path_with_a_tiny_model(tmp_path):
    cfg = tiny_world(tmp_path).replace(ablations=("no normalisation",))
    report = experiment(cfg, start_run("mend", cfg, "full", root=tmp_path / "runs"))
    assert set(report.tables["methods"]["method"]) == {"MEND", "FT", "FT+KL", "untrained MEND"}
    assert {"methods", "training"} <= set(report.figures) and len(report.claims) >= 4
    assert report.tables["methods"]["perplexity +"].notna().all()


def test_full_scale_path_with_two_processes(tmp_path):
    cfg = tiny_world(tmp_path)
    args = []
    for name in ("model", "generator", "dataset", "dataset_config", "locality", "n_train",
                 "n_valid", "n_test", "prompt_tokens", "target_tokens", "text_tokens", "rank",
                 "batch", "steps", "eval_every", "ft_steps", "device"):
        args += [f"--{name.replace('_', '-')}", str(getattr(cfg, name))]
    args += ["--grad-accum", "2", "--at-once", "2", "--root", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "-m", "adaptlab", "run", "mend", "--scale", "full", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("report in") == 1


WORLD = {"world_subjects": 6, "world_relations": 3, "world_objects": 4, "world_width": 16,
         "world_base_steps": 150, "world_train": 12, "world_others": 3, "world_rank": 4,
         "world_batch": 4, "world_steps": 4, "world_eval_every": 2, "world_ft_steps": 3}


def tiny_facts(**changes):
    return SMALL.replace(**{"tracks": ("world",), "world_seeds": (0, 1), **WORLD, **changes})


def test_a_world_has_every_fact_in_two_orders():
    cfg = tiny_facts()
    facts = mend.world_facts(cfg)
    (a, b), n = facts.prompts, 18
    assert facts.prompts.shape == (2, n, 3) and len(a.unique(dim=0)) == len(b.unique(dim=0)) == n
    assert torch.equal(a[:, 0], b[:, 2])  # the subject
    relation = (facts.first - facts.first.min()) // 4
    for words in (a[:, 1], b[:, 0]):  # each relation has a word of its own in each order
        assert len(torch.stack((words, relation), 1).unique(dim=0)) == len(words.unique()) == 3
    assert not set(a[:, 1].tolist()) & set(b[:, 0].tolist())
    within = facts.answers - facts.first
    assert within.min() >= 0 and within.max() < 4 and facts.vocabulary == facts.first.max() + 4
    assert torch.equal(facts.answers, mend.world_facts(cfg).answers)
    assert not torch.equal(facts.answers, mend.world_facts(cfg, seed=1).answers)


def test_edits_of_the_world_are_wrong_and_elsewhere():
    bench = mend.WorldBench(tiny_facts())
    edits = bench.sample(torch.arange(12).repeat(30), bench.known, 2, seed=3)
    fact, target, other = edits[:, 0], edits[:, 1], edits[:, 2:4]
    assert set(edits[:, :1].flatten().tolist()) == set(bench.known.tolist())
    assert set(other.flatten().tolist()) == set(bench.known.tolist())
    assert (other != fact[:, None]).all() and (target != bench.facts.answers[fact]).all()
    within = target - bench.facts.first[fact]
    assert within.min() == 0 and within.max() == 3
    assert not set(bench.test[:, 0].tolist()) & set(bench.known.tolist())


def test_measurements_of_the_world_agree_with_the_whole_model():
    bench = mend.WorldBench(tiny_facts())
    editor = bench.editor(norm=False, edit_lr=3.0).eval()
    found = bench.measure(editor.edit_each)
    for i, (fact, target, *rest) in enumerate(bench.test.tolist()):
        a, b = bench.facts.prompts[:, fact]
        with torch.enable_grad():
            changed = editor.edit(bench.rows(0, *torch.tensor([[fact], [target]])))
        others = torch.stack([bench.facts.prompts[f, o] for o, f in
                              zip(rest[:3], rest[3:], strict=True)])
        whole = changed.materialize()
        with torch.no_grad():
            says = [whole(input_ids=x).logits[:, -1].argmax(-1) for x in (a[None], b[None], others)]
            before = bench.model(input_ids=others).logits[:, -1].argmax(-1)
        expected = [says[0] == target, says[1] == target, says[2] == before]
        assert found.loc[i, ["rel", "gen", "loc"]].tolist() == pytest.approx(
            [float(x.float().mean()) for x in expected])
    assert found["rel"].mean() > 0  # or the comparison would say little


def test_the_world_from_the_command_line(tmp_path):
    args = ["--tracks", "world", "--root", str(tmp_path), "--world-seeds", "0", "1"]
    for name, value in WORLD.items():
        args += [f"--{name.replace('_', '-')}", str(value)]
    out = subprocess.run([sys.executable, "-m", "adaptlab", "run", "mend", *args], text=True,
                         capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-3000:]
    (path,) = tmp_path.rglob("report.json")
    claims = [c["text"] for c in json.loads(path.read_text())["claims"]]
    assert len(claims) == 4 and all(c.startswith("small world") for c in claims)
    assert len(list(tmp_path.rglob("mend.safetensors"))) == 4  # two seeds, two ablations


def test_both_parts_in_one_report(tmp_path):
    cfg = tiny_world(tmp_path).replace(**WORLD, tracks=("world", "model"), world_seeds=(0,))
    report = experiment(cfg, start_run("mend", cfg, "full", root=tmp_path / "runs"))
    assert {"world", "methods", "training"} <= set(report.figures)
    assert report.tables["world"]["method"].tolist() == [
        "MEND", "FT 0.001", "FT 0.003", "raw gradient", "untrained MEND"]
    assert report.tables["world"][["rel", "gen", "loc"]].stack().between(0, 100).all()
    assert set(report.tables["world ablations"]["method"]) == {"MEND", *cfg.world_ablations}
    assert len(report.claims) >= 8


def test_parts_of_the_task_have_no_country_in_common():
    tokenizer = models.byte_tokenizer()
    assert not SMALL.n_test % 2 and tokenizer is not None
    rng = np.random.default_rng(0)
    rows = [{"country": c, "language": lang, "capital": c.upper(), "continent": "x"}
            for c, lang in zip("abcdefgh", "pqrspqrs", strict=True)]
    item = mend._language_item(rows[0], rows[1], rng, ["p", "q", "r"])
    assert item["edit"][1] == item["rephrase"][1] != " p"
    probe = mend._language_probe(rows[0], rows[1:5], ["text"], " q")
    assert len(probe["neighbours"]) == 4 and probe["edit"][0][0] != probe["unseen"][0][0]


def test_module_is_the_one_of_the_catalogue():
    from adaptlab import catalog

    assert catalog.find("mend").module == mend.__name__
