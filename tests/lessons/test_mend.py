"""MEND: factored gradients, editor networks, edited views, training, and the full-scale path."""

import copy
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import schemas
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

from adaptlab import catalog, recipes
from adaptlab.bench import facts
from adaptlab.bench.facts import Tail
from adaptlab.bench.runs import launch, start_run
from adaptlab.editing import mend
from adaptlab.editing.mend import (
    MEND,
    EditedModel,
    Factors,
    GradientTransform,
    MENDTrainer,
    RunningMoments,
    edit_collate,
    edit_losses,
    gradient_factors,
    locality_kl,
    select_layers,
    sequence_nll,
)
from adaptlab.experiments import mend as lab
from adaptlab.experiments.mend import FULL, SMALL


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2,
                        bos_token_id=0, eos_token_id=0, initializer_range=0.2)
    return GPT2LMHeadModel(config)


def llama():
    torch.manual_seed(0)
    return recipes.tiny_llama(vocab_size=50, hidden_size=16, layers=3, heads=2, kv_heads=1)


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
        matrix = found[name].dense()[0]
        matrix = matrix.T if make is gpt2 else matrix
        torch.testing.assert_close(matrix, layer.weight.grad, rtol=1e-5, atol=1e-7)


def test_a_layer_that_runs_twice_counts_twice():
    torch.manual_seed(0)
    model, x, y = Twice(), torch.randn(5, 6), torch.randint(3, (5,))
    found = gradient_factors(model, {"mlp": model.mlp}, lambda m: F.cross_entropy(m(x), y))
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(found["mlp"].dense()[0], model.mlp.weight.grad)


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
        for block in g.layers:
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
    ("both", "u delta"), ("x_only", "u"), ("delta_only", "delta"), ("one_sided", "delta"),
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


def test_without_the_identity_nothing_is_negative():
    torch.manual_seed(0)
    g = GradientTransform(6, 4, rank=3, init="xavier")
    for x in g(torch.randn(50, 6), torch.randn(50, 4)):
        assert (x >= 0).all() and (x > 0).any()


@pytest.mark.parametrize("mode", ["x_only", "delta_only"])
def test_the_other_vector_is_normalised_too(mode):
    torch.manual_seed(0)
    g, u, delta = GradientTransform(6, 4, mode=mode), torch.randn(50, 6), torch.randn(50, 4)
    nn.init.normal_(g.layers[0].U)
    x, found = (delta, g(u, delta)[1]) if mode == "x_only" else (u, g(u, delta)[0])
    torch.testing.assert_close(found, (x - x.mean(0)) / x.std(0))


def test_layers_of_one_shape_share_their_statistics():
    editor = MEND(gpt2(), "mlp:-2:", rank=2)
    editor.edit(batch(3))
    editor.eval().edit(batch(3))  # statistics stand still
    counts = {k: int(g.u_moments.count) for k, g in editor.transforms.items()}
    assert counts == {"16x64": 18 + 9, "64x16": 18 + 9}  # last block: before a target only


def test_first_gradient_reaches_u_only():
    editor = MEND(llama(), "mlp:-1:", rank=4, edit_lr=0.1)
    sum(edit_losses(editor, triple())).backward()
    first = next(iter(editor.transforms.values())).layers[0]
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
def test_view_and_weights_agree(make):
    model, data = make().eval(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    edited = warmed(model).edit(data)
    ids = batch(3, seed=5)["input_ids"]
    view = edited(ids).logits
    assert not torch.allclose(view, model(ids).logits, atol=1e-3)
    torch.testing.assert_close(edited.materialize()(ids).logits, view, rtol=1e-4, atol=1e-4)
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


def test_a_state_dict_is_the_editor():
    model, data = llama(), batch()
    editor = warmed(model, mode="one_sided", shared=False)
    again = MEND(model, "mlp:-2:", rank=4, mode="one_sided", shared=False).eval()
    again.load_state_dict(editor.state_dict())
    for name in editor.layers:
        assert torch.equal(again.edit(data).delta(name), editor.edit(data).delta(name))
    wider = recipes.tiny_llama(vocab_size=50, hidden_size=32, layers=3, heads=2, kv_heads=1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        MEND(wider, "mlp:-2:", rank=4, mode="one_sided", shared=False).load_state_dict(
            editor.state_dict())


def test_text_items_make_batches():
    two = [{"edit": ("ab", "c"), "rephrase": ("b", "c"), "locality": "xyz"}] * 2
    found = edit_collate(recipes.byte_tokenizer())(two)
    assert found["edit"]["labels"].tolist()[0][:2] == [-100, -100]
    assert found["locality"]["input_ids"].shape == (2, 3)


def test_all_tokens_of_a_text_count_for_locality_and_no_padding():
    editor, data = warmed(llama()), triple(2)
    data["locality"]["attention_mask"][1, 4:] = 0
    local, edited = data["locality"], editor.edit_each(data["edit"])
    with torch.no_grad():
        before, after = (m(**local).logits for m in (editor.model, edited))
    rows = [locality_kl(before[0], after[0]) * 7, locality_kl(before[1, :4], after[1, :4]) * 4]
    torch.testing.assert_close(edit_losses(editor, data).locality, sum(rows) / 11)


def test_kl_agrees_with_torch():
    p, q = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(locality_kl(p, q), expected.mean())
    torch.testing.assert_close(locality_kl(p, q, mask), expected[mask.bool()].mean())


# ------------------------------------------------------------------ the trunk, the rivals


def neo():
    torch.manual_seed(0)
    return GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=260, max_position_embeddings=512, hidden_size=16, num_layers=3, num_heads=2,
        attention_types=[[["global"], 3]], intermediate_size=32, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize("make", [gpt2, llama, neo])
def test_tail_equals_the_whole_model(make):
    model = make().eval()
    blocks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    stack = max(blocks, key=lambda n: len(model.get_submodule(n)))
    data = batch(4)
    data["attention_mask"][2, 5:] = 0
    data["labels"][2, 5:] = -100
    tail = Tail(model, stack, 2)
    short = tail.batch(data)
    assert len(tail.kept) == 4
    whole = MEND(model, "mlp:-2:", rank=2, norm=False)
    fast = MEND(model, "mlp:-2:", rank=2, norm=False, loss_fn=sequence_nll,
                forward_fn=tail)
    for name in whole.layers:
        torch.testing.assert_close(fast.edit(short).delta(name), whole.edit(data).delta(name),
                                   rtol=1e-3, atol=1e-8)
    assert tail.batch(data)["hidden"].equal(short["hidden"])
    assert [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)] == blocks


def llama_bed(**changes):
    "A tiny Llama with two items of the language task."
    torch.manual_seed(0)
    model = recipes.tiny_llama(hidden_size=16, layers=3, heads=2, kv_heads=1).eval()
    model.requires_grad_(False)
    cfg = SMALL.replace(**{"rank": 2, "chunk": 2, "ft_steps": 30, **changes})
    items = [{**{part: [(f"{part} {i}: ", "x")] for part in facts.SUCCESS},
              "neighbours": [(f"other {i} {k}", "y") for k in range(3)],
              "subject": [(f"sub {i}", "z")], "text": ["so it is"]} for i in range(3)]
    lessons = [{"edit": (f"a{i}", "x"), "rephrase": (f"b{i}", "x"), "locality": (f"c{i}", "y")}
               for i in range(8)]
    return lab.EditBed(model, lessons, items[:2], items, lend=True,
                       cfg=cfg, tail=Tail(model, "model.layers", 2),
                       held_out=lessons[:2], collate=lab.causal_lm_collate(
                           recipes.byte_tokenizer(), add_eos=False))


def test_fine_tuning_is_adam_on_the_weights_and_leaves_none():
    bed = llama_bed(ft_steps=3)
    before = {k: v.clone() for k, v in bed.model.state_dict().items()}
    names, twin = list(select_layers(bed.model, "mlp:-2:")), copy.deepcopy(bed.model)
    weights = [twin.get_submodule(n).weight.requires_grad_() for n in names]
    adam, pair = torch.optim.Adam(weights, lr=1e-2), bed.collate([("edit 0: ", "x")])
    for _ in range(3):
        adam.zero_grad()
        mend.causal_nll(twin(input_ids=pair["input_ids"]).logits, pair["labels"]).sum().backward()
        adam.step()
    edits = lab._tune(bed.model, bed, 0, 1e-2)(bed.test[:1])
    context, items = next(edits)
    with context:
        for name, weight in zip(names, weights, strict=True):
            torch.testing.assert_close(bed.model.get_submodule(name).weight, weight,
                                       rtol=1e-3, atol=1e-5)
    assert items == bed.test[:1] and not list(edits)
    assert all(torch.equal(before[k], v) for k, v in bed.model.state_dict().items())
    assert not any(p.requires_grad for p in bed.model.parameters())


def test_joint_edits():
    bed = llama_bed()
    editor = bed.editor(norm=False, edit_lr=1.0).eval()
    groups = list(lab._by_editor(bed, editor, joint=2)(bed.test))
    assert [items for _, items in groups] == [bed.test[:2], bed.test[2:]]
    whole = editor.edit(bed.pairs([item["edit"][0] for item in bed.test[:2]]))
    for name in editor.layers:
        torch.testing.assert_close(groups[0][0].delta(name), whole.delta(name))


def test_measurements_agree_with_weights_written_out():
    bed = llama_bed()
    torch.manual_seed(0)
    editor = bed.editor(norm=False, edit_lr=100.0).eval()
    found = lab._measure(lab._by_editor(bed, editor), bed)
    for item, row in zip(bed.test, found, strict=True):
        whole = editor.edit(bed.pairs(item["edit"])).materialize()

        def says(model, pair):
            ids = bed.collate([pair])["input_ids"]
            return model(input_ids=ids).logits[0, -2].argmax() == ids[0, -1], \
                model(input_ids=ids).logits[0, -2].argmax()

        for part in facts.SUCCESS:
            assert row[part] == 100 * float(says(whole, item[part][0])[0])
        kept = [says(whole, p)[1] == says(bed.model, p)[1] for p in item["neighbours"]]
        assert row["neighbours"] == pytest.approx(100 * float(torch.stack(kept).float().mean()))
        text = bed.collate(item["text"])
        loss = [mend.causal_nll(m(input_ids=text["input_ids"]).logits, text["labels"])[0]
                for m in (bed.model, whole)]
        assert row["text"] == pytest.approx(float(loss[1] - loss[0]), rel=1e-3, abs=1e-4)
        assert row["score"] == pytest.approx((row["ES"] + row["kept"]) / 2)
    assert any(row["edit"] for row in found)  # or the comparison would say little


def test_base_answers_are_asked_before_the_model_is_fine_tuned():
    bed, other = llama_bed(), llama_bed()
    lab._measure(lab._tune(bed.model, bed, 0, 1e-2), bed)
    lab._measure(lambda items: iter([(nullcontext(), items)]), other)
    assert bed.said.keys() == other.said.keys()
    for key, (said, loss, _) in other.said.items():
        assert torch.equal(bed.said[key][0], said) and bed.said[key][1] == pytest.approx(loss)


# ------------------------------------------------------------------ layers that mix rows


class Shaped(nn.Module):
    "A classifier of sequences whose layer takes its tokens in some other arrangement."

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed = kind, nn.Embedding(9, 6)
        self.mlp, self.head = nn.Linear(6, 6), nn.Linear(6, 9)

    def forward(self, ids):
        x = self.embed(ids)
        if self.kind == "flat":  # as OPT's and many experts'
            x = x + self.mlp(x.flatten(0, 1)).view_as(x)
        elif self.kind == "time first":
            x = x + self.mlp(x.transpose(0, 1)).transpose(0, 1)
        elif self.kind == "routed":  # an expert sees some tokens only
            chosen = (ids.flatten() % 2 == 0).nonzero().flatten()
            y = torch.zeros_like(x.flatten(0, 1)).index_add(0, chosen, self.mlp(
                x.flatten(0, 1)[chosen]))
            x = x + y.view_as(x)
        else:  # windows of an image: [rows, height, width, d]
            x = x + self.mlp(x.unflatten(1, (2, -1))).flatten(1, 2)
        return self.head(x.mean(1))


def shaped(kind):
    model = Shaped(kind)
    editor = MEND(model, ["mlp"], rank=2, edit_lr=0.1, loss_fn=sequence_nll,
                  forward_fn=lambda m, b: m(b["ids"]))
    ids = torch.tensor([[2, 4, 6, 1], [5, 1, 7, 8], [2, 2, 1, 3], [7, 8, 5, 4]])
    data = {"ids": ids, "labels": torch.tensor([1, 2, 3, 4])}
    editor.fit_normalization([data])
    return model, editor.eval(), data


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_separate_edits_of_images(rows):
    model, editor, data = shaped("image")
    data = {k: v[:rows] for k, v in data.items()}
    each = editor.edit_each(data)
    assert len(each) == rows
    for i in range(rows):
        alone = editor.edit(row(data, i))
        torch.testing.assert_close(each[i].delta("mlp"), alone.delta("mlp"))
    together = each(data["ids"].repeat_interleave(2, 0))
    for i in range(rows):
        torch.testing.assert_close(together[2 * i], editor.edit(row(data, i))(data["ids"][[i]])[0])
    with pytest.raises(ValueError, match="spread over"):
        each(torch.ones(rows * 4 + 1, 4).long())


@pytest.mark.parametrize("kind, rows", [
    ("flat", 2), ("time first", 2), ("routed", 2), ("routed", 4)])
def test_separate_edits_are_refused_where_rows_are_mixed(kind, rows):
    model, editor, data = shaped(kind)
    data = {k: v[:rows] for k, v in data.items()}
    with pytest.raises(ValueError, match="one at a time"):
        editor.edit_each(data)
    before = sequence_nll(model(data["ids"]), data["labels"])
    one = editor.edit(row(data, 0))  # one edit is right for any arrangement
    sequence_nll(model(data["ids"][:1]), data["labels"][:1]).sum().backward()
    found = gradient_factors(model, {"mlp": model.mlp}, lambda m: sequence_nll(
        m(data["ids"][:1]), data["labels"][:1]))["mlp"].dense()[0]
    torch.testing.assert_close(found, model.mlp.weight.grad)
    assert sequence_nll(one(data["ids"]), data["labels"])[0] != before[0]


def test_an_encoder_decoder_is_trained_on_its_targets():
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0)).eval()
    editor = MEND(t5, "DenseReluDense:-1:", rank=2, edit_lr=0.1)
    data = triple(4)
    for part in data.values():  # as many tokens in the encoder as in the decoder: no mix-up
        part["attention_mask"][:, 5:] = 0
    editor.fit_normalization([data["edit"]])
    found = edit_losses(editor.eval(), data)
    local, edited = data["locality"], editor.edit_each(data["edit"])
    with torch.no_grad():
        before, after = t5(**local).logits, edited(**local).logits
    torch.testing.assert_close(found.locality, locality_kl(before, after, local["labels"] != -100))


def test_a_unit_that_slept_does_not_blow_up_an_edit():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    net[0].bias.data[3] = -1.0
    x = torch.randn(2000, 6)
    awake = net[:2](x)[:, 3] > 0.05
    assert awake.any()
    editor = MEND(net, ["2"], rank=2, edit_lr=1e-2, loss_fn=sequence_nll,
                  forward_fn=lambda model, data: model(data["x"]))
    asleep = x[net[:2](x)[:, 3] == 0][:60]
    editor.fit_normalization([{"x": asleep, "labels": torch.arange(60) % 3}])
    edited = editor.eval().edit({"x": x[awake][:1], "labels": torch.tensor([1])})
    assert edited.delta("2").abs().max() < 1  # divided by 1e-7 it was 84,774
    assert not edited.delta("2")[:, 3].any()


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


def wrapped():
    import peft

    return peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["up_proj"]))


def no_target():
    data = batch()
    data["labels"][1] = -100
    return data


@pytest.mark.parametrize("call, words", [
    (lambda: MEND(llama(), ["model.layers.2.mlp.up_prj.weight"]), "no module is named"),
    (lambda: MEND(llama(), ["model.embed_tokens.weight"]), "Embedding"),
    (lambda: MEND(llama(), ["model.norm.weight"]), "Norm"),
    (lambda: MEND(gpt2(), ["transformer.h.0.mlp.c_fc.bias"]), "no module is named"),
    (lambda: MEND(llama(), ["lm_head"]), "shared"),
    (lambda: MEND(llama(), "moe:-1:"), "no block has a part"),
    (lambda: MEND(llama(), "mlp"), "start:stop"),
    (lambda: MEND(llama(), []), "matches no module"),
    (lambda: MEND(llama(), rank=0), "rank = 0"),
    (lambda: MEND(llama(), mode="both x_only"), "must be one of"),
    (lambda: MEND(llama(), init="zeros"), "init"),
    (lambda: GradientTransform(3, 4)(torch.ones(2, 4), torch.ones(2, 4)), "do not fit"),
    (lambda: warmed(llama()).edit(left_padded()), "on the right"),
    (lambda: warmed(llama()).edit(no_target()), "no target"),
    (lambda: MEND(llama(), rank=2).eval().edit(batch()), "fit_normalization"),
    (lambda: without_gradients(torch.no_grad), "outside torch.no_grad"),
    (lambda: without_gradients(torch.inference_mode), "inference_mode"),
    (lambda: MEND(broken(), rank=2).edit(batch()), "NaN or infinite"),
    (lambda: warmed(llama()).edit_each(batch(3))(batch(4)["input_ids"]), "3 separate edits"),
    (lambda: warmed(llama()).edit_each(batch(3)).materialize(), "take one"),
    (lambda: warmed(llama()).edit(batch()).delta("lm_head"), "edited are"),
    (lambda: EditedModel(llama(), {}, {"x": Factors(*torch.ones(2, 1, 2, 2))}).edit({}), "MEND"),
    (lambda: MENDTrainer(MEND(llama(), rank=2), []), "empty"),
    (lambda: MENDTrainer(MEND(llama(), rank=2), [1], lr=0.0), "positive"),
    (lambda: edit_collate(recipes.byte_tokenizer())([{"edit": ("a", "b")}]), "rephrase"),
    (lambda: warmed(llama()).edit_each(batch(3)).edit(batch(1)), "one edit"),
    (lambda: edit_losses(warmed(llama()), {"edit": batch()}), "rephrase"),
    (lambda: edit_losses(warmed(llama()), {**triple(4), "locality": batch(6)}), "spread over"),
    (lambda: MEND(wrapped(), rank=2), "merge_and_unload"),
    (lambda: MEND(llama(), edit_lr=-1e-4), "not negative"),
    (lambda: MEND(llama(), edit_lr=math.nan), "not negative"),
    (lambda: warmed(llama()).edit({k: v[:0] for k, v in batch().items()}), "no rows"),
    (lambda: warmed(llama()).edit({**batch(2), "labels": batch(4)["labels"]}), "do not fit"),
    (lambda: warmed(llama()).edit({**batch(), "labels": batch()["labels"][:, :-1]}), "do not fit"),
    (lambda: edit_losses(warmed(llama()), {**triple(2), "locality": batch(0)}), "0 rows"),
    (lambda: edit_collate(recipes.byte_tokenizer())(
        [{"edit": "a", "rephrase": ("a", "b"), "locality": "c"}]), "give a pair"),
    (lambda: GradientTransform(3, 4)(torch.ones(1, 3), torch.ones(1, 4)), "of 1 tokens, two"),
    (lambda: SMALL.replace(ablations=("no brain",)), "no brain"),
    (lambda: SMALL.replace(at_once=(1,)), "at_once"),
])
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_batch_without_labels_is_refused():
    with pytest.raises(TypeError, match="labels"):
        warmed(llama()).edit({"input_ids": batch()["input_ids"]})


def test_a_quantised_layer_is_not_written():
    model = llama()
    edited = warmed(model).edit(batch())
    layer = model.get_submodule("model.layers.2.mlp.up_proj")
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="quantised"):
        edited.materialize()


# ------------------------------------------------------------------ the experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A random GPT-Neo, a random Llama that writes, and files of texts."
    folder = tmp_path_factory.mktemp("full")
    neo().save_pretrained(folder / "model")
    recipes.tiny_llama(hidden_size=16, layers=1, heads=2, kv_heads=1).save_pretrained(
        folder / "gen")
    for name in ("model", "gen"):
        recipes.byte_tokenizer().save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(["to", "be", "or", "not"], 60))} for _ in range(12)]
    (folder / "texts").mkdir()
    (folder / "texts" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


TINY = {"n_train": 8, "n_choose": 2, "n_test": 2, "prompt_tokens": 12,
        "text_words": 4, "rank": 4, "look_every": 2, "ft_steps": 2,
        "at_once": (2,), "device": "cpu"}


def small_full(folder, **changes):
    "FULL in miniature."
    texts = f"{folder / 'texts'}#train"
    return FULL.replace(**{
        **TINY, "model": str(folder / "model"), "generator": str(folder / "gen"), "source": texts,
        "locality": texts, "training": {"steps": 3, "batch_size": 4, "accumulate": 2}, **changes})


def test_full_scale_path_with_a_tiny_model(folder, tmp_path, monkeypatch):
    cfg = small_full(folder, ablations=("no identity", "no normalisation"), ft_lrs=(1e-3, 1e-2))
    trained, measured = [], []
    fit, measure = lab.MENDTrainer.train, lab._measure
    monkeypatch.setattr(lab.MENDTrainer, "train", lambda self, **o: trained.append(1) or fit(
        self, **o))
    monkeypatch.setattr(lab, "_measure", lambda *a: measured.append(1) or measure(*a))
    run = start_run("mend", cfg, "full", root=tmp_path)
    report = lab.experiment(cfg, run)
    table = report.tables["edits"]
    assert list(table["method"].unique()) == [
        "MEND", "FT", "untrained", "step sizes alone", "no identity", "no normalisation"]
    assert table[["edit", "rephrase", "text", "ES"]].notna().all(axis=None)
    assert "main" in report.figures and len(report.claims) >= 5
    assert len(trained) == 3
    assert report.tables["at once"].groupby("edits").size().to_dict() == {2: 2}
    # a run that was stopped repeats nothing that was done
    trained.clear(), measured.clear()
    (run.folder / "stages" / "edits-FT-0.json").unlink()
    again = lab.experiment(cfg, run)
    assert not trained and 3 <= len(measured) <= 4  # FT alone
    tables = (t.drop(columns="seconds") for t in (again.tables["edits"], table))
    pd.testing.assert_frame_equal(*tables, atol=1e-5)  # rounding: other batches


def test_the_parts_have_no_text_in_common(folder, tmp_path):
    cfg = small_full(folder)
    bed = lab.EditBed.make(cfg, start_run("mend", cfg, "full", root=tmp_path))
    parts = [{item["edit"][0][0] for item in part} for part in (bed.test, bed.choose)]
    parts += [{item["edit"][0] for item in part} for part in (bed.train, bed.held_out)]
    test, choose, train, held_out = parts
    assert not test & choose and not (test | choose) & train and held_out == choose


def test_rates_are_chosen_on_the_items_to_choose_on(tmp_path, monkeypatch):
    asked, bed = [], llama_bed()
    monkeypatch.setattr(lab, "_measure", lambda edits, bed, items=None: asked.append(items) or [
        {"score": 1.0, "ES": 1.0, "kept": 1.0, "text": 0.0}])
    monkeypatch.setattr(lab.EditBed, "make", lambda cfg, run: bed)
    monkeypatch.setattr(lab, "sweep", lambda run, name, methods, bed, seeds, measure, choose: (
        choose(None, bed(0)), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        lab.experiment(bed.cfg, start_run("mend", bed.cfg, "small", root=tmp_path))
    assert asked == [bed.choose]


def test_full_scale_path_with_two_processes(folder, tmp_path):
    cfg = small_full(folder)
    args = []
    for name in ("model", "generator", "source", "locality", *TINY):
        value = getattr(cfg, name)
        args += [f"--{name.replace('_', '-')}",
                 *map(str, value if isinstance(value, tuple) else (value,))]
    args += ["--training.steps", "3", "--training.batch-size", "4", "--training.accumulate", "2"]
    args += ["--root", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "-m", "adaptlab", "run", "mend", "--scale", "full", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    assert len(list((tmp_path / "runs").rglob("report.json"))) == 1


def test_full_builds_its_data(recorded, monkeypatch):
    assert recorded is not None
    cfg = FULL.replace(n_train=6, n_choose=2, n_test=2, text_words=20)
    monkeypatch.setattr(facts.models, "load", lambda *a, **k: (None, recipes.byte_tokenizer()))
    monkeypatch.setattr(facts.evaluate, "generate",
                        lambda model, tokenizer, prompts, **k: [" target"] * len(prompts))
    task = lab._task(cfg, None, None)
    assert recorded.asked == [FULL.locality, FULL.source]
    assert {k: len(v) for k, v in task.items()} == {
        "train": 6, "held_out": 2, "choose": 2, "test": 2}
    assert schemas.rows(FULL.source) > 70_000 and schemas.rows(FULL.locality) == 10_000
    assert not {x["edit"] for x in task["train"]} & {x["edit"][0] for x in task["test"]}
    assert FULL.model in schemas.MODELS and FULL.generator in schemas.MODELS


def test_one_seed_and_several(folder, tmp_path):
    cfg = small_full(folder, seeds=(0, 1))
    report = launch("mend", cfg, "full", root=tmp_path, progress=False)
    assert set(report.tables["edits"]["seed"]) == {0, 1}
    stages = {p.stem for p in report.folder.parent.joinpath("stages").iterdir()}
    assert {"edits-MEND-0", "edits-MEND-1", "edits-FT-0", "edits-FT-1", "editor-MEND-1"} <= stages


def test_module_is_the_one_of_the_catalogue():
    assert catalog.find("mend").module == mend.__name__
