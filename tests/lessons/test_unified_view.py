"""The unified view: every preset on every kind of model, the formulas, PEFT, files, full scale."""

import copy
import shutil
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
import two_processes
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig, BartForConditionalGeneration, BertConfig, BertForSequenceClassification,
    GPT2Config, GPT2LMHeadModel, MBartConfig, MBartForConditionalGeneration, RobertaConfig,
    RobertaForMaskedLM, RobertaForSequenceClassification, ViTConfig, ViTForImageClassification)

from adaptlab import adapter_files, adapters, recipes
from adaptlab.bench.runs import start_run
from adaptlab.experiments import unified_view as told
from adaptlab.experiments.unified_view import FULL, SMALL, TEXTS, bleu, experiment, rouge2
from adaptlab.modular import unified_view as uv
from adaptlab.modular.unified_view import DeltaConfig, apply_delta
from adaptlab.train import Training
from one_seed import UNDECIDED, goes_on

SIZE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64}
BART = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 1}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZE)),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(**SIZE, max_position_embeddings=66)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**BART)),
    "llama": lambda: recipes.tiny_llama(99, 32),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "vit": lambda: ViTForImageClassification(ViTConfig(
        **{k: v for k, v in SIZE.items() if k != "vocab_size"}, image_size=32, patch_size=16)),
}
PRESETS = {
    "houlsby": uv.houlsby(5), "pfeiffer": uv.pfeiffer(5), "PA": uv.parallel_adapter(5),
    "PA attn": uv.parallel_adapter(5, "attn"), "scaled PA": uv.scaled_parallel_adapter(5),
    "prefix": uv.prefix_tuning(3, 8), "direct": uv.prefix_tuning(3, None),
    "multi-head": uv.multihead_parallel_adapter(3), "lora": uv.lora(3, 6),
    "lora ffn": uv.lora(3, 6, "ffn"), "MAM": uv.mam_adapter(3, 5, 4.0, 8),
}
STILL = ("scaled PA", "multi-head", "lora", "lora ffn")  # no change at the start


def made(family, attention="sdpa"):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation(attention)
    ids = torch.randint(3, 99, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "vit":
        batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if "bart" in family:
        batch["decoder_input_ids"] = torch.randint(3, 99, (2, 5))
    return model, batch


@torch.no_grad()
def moved(model, seed=1, size=0.2):
    g = torch.Generator().manual_seed(seed)
    for p in adapters.trainable_parameters(model):
        p.add_(size * torch.randn(p.shape, generator=g))
    return model


# every preset on every kind of model


@pytest.mark.parametrize("family", FAMILIES)
def test_life_of_every_preset(family, tmp_path):
    model, batch = made(family)
    with torch.no_grad():
        y0 = model(**batch).logits
    for name, preset in PRESETS.items():
        apply_delta(model, preset)
        y = model(**batch).logits
        assert ((y - y0).abs().max() < 1e-6) == (name in STILL), name
        y.square().sum().backward()
        own = adapters.trainable_parameters(model)
        assert all(p.grad is not None for p in own), name
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        model.zero_grad()
        with torch.no_grad():
            y = moved(model)(**batch).logits
            assert (y - y0).abs().max() > 1e-6
            model.set_attn_implementation("eager")
            torch.testing.assert_close(model(**batch).logits, y, rtol=1e-3, atol=1e-4)
            model.set_attn_implementation("sdpa")
            again = copy.deepcopy(model)
            file = adapter_files.save(model, tmp_path / "delta.safetensors")
            assert torch.equal(adapters.detach(model)(**batch).logits, y0)
            for other in (adapter_files.load(model, file), again):
                torch.testing.assert_close(other(**batch).logits, y)
            torch.testing.assert_close(uv.materialize_prefix(model)(**batch).logits, y)
            kept = adapters.count_parameters(model)[0]
            adapters.detach(model)
        assert kept == uv.count_delta_parameters(preset, model), name


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_numbers_by_the_papers_formulas(family):
    model, _ = made(family)
    d, attentions, ffns = 32, {"bert": 2, "llama": 2, "bart": 6}[family], {"bart": 4}.get(family, 2)
    kv = 16 if family == "llama" else d  # two of four heads have keys of their own
    count = partial(uv.count_delta_parameters, model=model)
    assert count(uv.prefix_tuning(7)) == 2 * 7 * kv * attentions
    assert count(uv.parallel_adapter(7)) == (2 * 7 * d + 7 + d) * ffns
    assert count(uv.parallel_adapter(7, "attn")) == (2 * 7 * d + 7 + d) * attentions
    assert count(uv.houlsby(7)) == (2 * 7 * d + 7 + d) * (ffns + attentions) + 2 * d * attentions
    if family != "llama":
        assert count(uv.lora(7, 7)) == 4 * 7 * d * attentions
        assert count(uv.prefix_tuning(7)) == 2 * 7 * d * attentions
        assert count(uv.lora(7, 7, "ffn")) == 2 * 7 * (d + 64) * ffns


def test_training_moves_what_is_new_and_the_head():
    model, batch = made("bert")
    before = {n: p.clone() for n, p in model.named_parameters()}
    apply_delta(model, PRESETS["MAM"], also_train=("classifier",))
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-2)
    for _ in range(2):
        adam.zero_grad()
        F.cross_entropy(model(**batch).logits, torch.tensor([0, 1])).backward()
        adam.step()
    now = dict(model.named_parameters())
    changed = {n for n, p in before.items() if not torch.equal(p, now[n])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert all(now[n].grad is None for n in before if n not in changed)


# the formulas


def test_where_a_bottleneck_stands_in_a_post_norm_block():
    "BERT's last block, written out."
    model, batch = made("bert")
    batch = {"input_ids": batch["input_ids"]}
    block, seen = model.bert.encoder.layer[1], {}

    def note(key):
        return lambda _, args, out: seen.update({key: (args, out)})

    block.attention.register_forward_hook(note("attention"))
    block.output.dense.register_forward_hook(note("ffn"))
    block.attention.output.dense.register_forward_hook(note("heads"))
    block.register_forward_hook(note("block"))
    for name in ("PA", "pfeiffer", "houlsby", "PA attn"):
        moved(apply_delta(model, PRESETS[name]))
        with torch.no_grad():
            model(**batch)
            own = adapters.adapters(model)["bert.encoder.layer.1"].bottlenecks
            delta = {k: b.delta for k, b in own.items()}
            x, h, out = seen["attention"][1][0], seen["ffn"][1], seen["block"][1]
            norm = partial(nn.LayerNorm.forward, block.output.LayerNorm)
            if name == "PA":
                expected = norm(x + h + delta["0_0"](x))
            elif name == "pfeiffer":
                expected = norm(x + h + delta["0_0"](norm(x + h)))
            elif name == "houlsby":
                expected = norm(x + h + delta["1_0"](h))
                put, at = seen["heads"][1], block.attention.output.LayerNorm
                first = at(put + delta["0_0"](put) + seen["block"][0][0])
                torch.testing.assert_close(first, x)
            else:  # before W_o: what W_o reads has the change in it already
                expected = norm(x + h)
                inner = seen["heads"][0][0] - delta["0_0"](seen["block"][0][0])
                adapters.detach(model)
                heads = block.attention.self(seen["block"][0][0])[0]
                torch.testing.assert_close(inner, heads, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        if adapters.adapters(model):
            adapters.detach(model)


@pytest.mark.parametrize("name", ["direct", "multi-head"])
def test_heads_of_a_llama_with_shared_keys(name, monkeypatch):
    "The dense formulas, with rotary positions, a causal mask and two queries per key."
    model, batch = made("llama")
    layer, caught, real = model.model.layers[0].self_attn, [], uv.attend_with
    moved(apply_delta(model, PRESETS[name]), size=1.0)

    def spy(prefixes, run, module, q, k, v, mask, options):
        caught.append((q, k, v))
        return real(prefixes, run, module, q, k, v, mask, options)

    monkeypatch.setattr(uv, "attend_with", spy)
    first = []
    layer.o_proj.register_forward_pre_hook(lambda _, args: first.append(args[0]))
    with torch.no_grad():
        model(input_ids=batch["input_ids"])
    q, k, v = caught[0]
    pk, pv = (t.repeat_interleave(2, 0) for t in
              adapters.adapters(model)["model.layers.0"].prefixes["0_0"]())
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    a = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    p = q @ pk.mT / 8**0.5
    if name == "direct":
        gate = uv.prefix_gate(*caught[0][:2], pk[::2], torch.ones(7, 7).bool().tril()[None, None])
        h = (1 - gate[..., None]) * (a.softmax(-1) @ v) + gate[..., None] * (p.softmax(-1) @ pv)
    else:
        h = a.softmax(-1) @ v + p.relu() @ pv
    torch.testing.assert_close(first[0], h.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


def test_the_identity_with_padding_and_a_causal_mask():
    "Eq. 7, for every text, head and query; boolean masks and masks of floats."
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    prefix = uv.Prefix(uv.prefix_tuning(3, None)[0], 4, 8, 32)
    nn.init.normal_(prefix.table)
    pk, pv = prefix()

    def run(_, q, k, v, mask, **options):
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2), None

    seen = torch.arange(7) < torch.tensor([[7], [4]])
    mask = torch.ones(7, 7, dtype=torch.bool).tril() & seen[:, None, None]
    for kind in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)):
        both = uv.attend_with([prefix], run, nn.Identity(), q, k, v, kind, {})[0].transpose(1, 2)
        gate = uv.prefix_gate(q, k, pk, kind)
        assert ((0 < gate) & (gate < 1)).all()
        h = run(None, q, k, v, kind)[0].transpose(1, 2)
        change = (q @ pk.mT / 8**0.5).softmax(-1) @ pv
        torch.testing.assert_close(both, h + gate[..., None] * (change - h), rtol=1e-5, atol=1e-5)
    left = uv.attend_with([prefix], run, nn.Identity(), q, k, v, None, {})[0]  # to the kernel
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(
        left, uv.attend_with([prefix], run, nn.Identity(), q, k, v, causal, {})[0])


class Plain(nn.Module):
    "A block of one's own; its sub-layer is the identity."

    def __init__(self, width=8):
        super().__init__()
        self.inner, self.out = nn.Identity(), nn.Linear(width, width)
        nn.init.eye_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        return x + self.out(self.inner(x))


def test_sequential_and_parallel_agree_where_the_sub_layer_is_the_identity():
    own = {"Plain": uv.Layout((("inner", "out", "out"),), ("inner", "out"))}
    x, outs = torch.randn(3, 8), {}
    for identity in (True, False):
        for insertion in ("parallel", "sequential"):
            net = nn.Sequential(Plain())
            if not identity:
                nn.init.constant_(net[0].out.weight, 0.5)
            torch.manual_seed(0)
            apply_delta(net, DeltaConfig(insertion=insertion, dim=4), layouts=own)
            outs[identity, insertion] = moved(net, size=1.0)(x)
    torch.testing.assert_close(outs[True, "parallel"], outs[True, "sequential"])
    assert (outs[False, "parallel"] - outs[False, "sequential"]).abs().max() > 0.1
    with pytest.raises(ValueError, match="registry"):
        apply_delta(nn.Sequential(Plain()), uv.prefix_tuning(2), layouts=own)


def test_a_file_knows_the_layout_of_a_block_of_ones_own(tmp_path):
    own = {"Plain": uv.Layout((("inner", "out", "out"),), ("inner", "out"))}
    net, x = nn.Sequential(Plain()), torch.randn(3, 8)
    y = moved(apply_delta(net, uv.parallel_adapter(4), layouts=own))(x)
    file = adapter_files.save(net, tmp_path / "own.safetensors")
    torch.testing.assert_close(adapter_files.load(adapters.detach(net), file)(x), y)


def test_layer_norms_scale_and_dropout_of_a_bottleneck():
    torch.manual_seed(0)
    x, h = torch.randn(2, 5, 8)
    for where in ("in", "out"):
        config = DeltaConfig(dim=4, composition="scaled", scale=3.0, layernorm=where)
        one = uv.Bottleneck(config, 8, 8)
        nn.init.normal_(one.up.weight)
        nn.init.normal_(one.norm.weight)
        inner = one.norm(x) if where == "in" else x
        delta = 3.0 * ((inner @ one.down.weight.T).relu() @ one.up.weight.T)
        torch.testing.assert_close(one(x, h), h + (one.norm(delta) if where == "out" else delta))
    learned = uv.Bottleneck(DeltaConfig(dim=4, composition="scaled", train_scale=True), 8, 8)
    learned(x, h).sum().backward()
    assert learned.scale.item() == 1 and learned.scale.grad is not None
    dropped = uv.Bottleneck(DeltaConfig(dim=64, dropout=0.5), 8, 8)
    assert not torch.equal(dropped(x, h), dropped(x, h))
    dropped.eval()
    assert torch.equal(dropped(x, h), dropped(x, h))


# prefixes


def test_one_mlp_for_a_stack_and_its_file(tmp_path):
    model, batch = made("bart")
    apply_delta(model, uv.prefix_tuning(4, 8))
    found = [p for p in model.modules() if isinstance(p, uv.Prefix)]
    assert len(found) == 6 and len({id(p.inner) for p in found}) == 3  # encoder, decoder, cross
    assert len({id(p.outer) for p in found}) == 6
    y = moved(model)(**batch).logits
    file = adapter_files.save(model, tmp_path / "mlp.safetensors")
    adapter_files.load(adapters.detach(model), file)
    found = [p for p in model.modules() if isinstance(p, uv.Prefix)]
    assert len({id(p.inner.weight) for p in found}) == 3  # still shared
    torch.testing.assert_close(model(**batch).logits, y)
    uv.materialize_prefix(model)
    assert adapters.count_parameters(model)[0] == 3 * 2 * 4 * 2 * 32  # 2 l L d for each attention
    small = adapter_files.save(model, tmp_path / "table.safetensors")
    assert small.stat().st_size < file.stat().st_size


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_generation_with_a_cache_writes_the_same(family):
    model, batch = made(family)
    moved(apply_delta(model, uv.mam_adapter(3, 5, 4.0, 8)), size=0.5)
    batch.pop("decoder_input_ids", None)
    mask = batch["attention_mask"]
    batch = {"input_ids": batch["input_ids"], "attention_mask": mask.flip(1) if family != "bart"
             else mask}
    written = [model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False,
                              use_cache=cache, **more)
               for more in ({}, {"num_beams": 3}) for cache in (True, False)]
    assert torch.equal(written[0], written[1]) and torch.equal(written[2], written[3])


def test_the_order_of_prefixes_and_of_units_does_not_matter():
    model, batch = made("bart")
    y = moved(apply_delta(model, uv.mam_adapter(4, 6, 4.0, None)), size=0.5)(**batch).logits
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in adapters.adapters(model).values():
            for prefix in block.prefixes.values():
                prefix.table.copy_(prefix.table[torch.randperm(4, generator=g)])
            for one in block.bottlenecks.values():
                order = torch.randperm(6, generator=g)
                for t in (one.down.weight, one.down.bias):
                    t.copy_(t[order])
                one.up.weight.copy_(one.up.weight[:, order])
    torch.testing.assert_close(model(**batch).logits, y, rtol=1e-4, atol=1e-5)


def test_gates_and_what_has_none():
    model, batch = made("bart")
    with pytest.raises(ValueError, match="no prefix here has a gate"):
        uv.prefix_gates(model, batch)
    apply_delta(model, uv.prefix_tuning(4, None))
    with torch.no_grad():
        for p in adapters.trainable_parameters(model):
            p.zero_()
    gates = uv.prefix_gates(model, batch)
    assert len(gates) == 6
    cross = gates["model.decoder.layers.0.encoder_attn"]
    assert cross.shape == (2, 4, 5)
    assert (gates["model.decoder.layers.0.self_attn"][..., 0] < 4 / 5 + 0.1).all()
    assert cross[0].mean() < cross[1].mean()  # five words to see against seven
    assert not any(b.note for b in adapters.adapters(model).values())


def test_a_text_without_a_word_is_refused():
    q = torch.randn(2, 1, 3, 4)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    mask[1] = False
    for kind in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)):
        with pytest.raises(ValueError, match="no token that may be seen"):
            uv.prefix_gate(q, q, torch.randn(1, 2, 4), kind)


def test_recomputed_blocks_and_half_precision():
    model, batch = made("llama")
    ids = batch["input_ids"]
    moved(apply_delta(model, PRESETS["MAM"]))
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad.clone() for p in adapters.trainable_parameters(model)]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for p, g in zip(adapters.trainable_parameters(model), grads, strict=True):
        torch.testing.assert_close(p.grad, g)
    half, _ = made("llama")
    half = apply_delta(half.to(torch.bfloat16), PRESETS["MAM"])
    assert {p.dtype for p in adapters.trainable_parameters(half)} == {torch.float32}
    full = made("llama")[0]
    apply_delta(full, PRESETS["MAM"])
    full.load_state_dict({n: t.float() for n, t in half.state_dict().items()})
    torch.testing.assert_close(half(ids).logits.float(), full(ids).logits, rtol=0.05, atol=0.05)
    half(ids).logits.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapters.trainable_parameters(half))


TRAIN = """
import torch

from adaptlab import adapters, modules, processes, recipes
from adaptlab.modular import unified_view as uv
from adaptlab.train import Training

torch.manual_seed(0)
model = recipes.tiny_llama(99, 32)
ids = torch.randint(3, 99, (16, 9))
uv.apply_delta(model, uv.mam_adapter(3, 5, 4.0, 8) + uv.lora(2, 2))
Training(steps=3, batch_size=8, lr=1e-2).fit(
    model, {"input_ids": ids, "labels": ids}, modules.cross_entropy, device="cpu", progress=False)
if processes.is_main():
    with torch.no_grad():
        out = uv.materialize_prefix(model.eval())(input_ids=ids[:1]).logits[0, -1]
    print("logits", adapters.count_parameters(model)[0], *out.tolist())
"""


def test_two_processes_train_as_one(tmp_path, capsys):
    "Prefixes whose MLP is shared by blocks, an adapter and LoRA, under DDP."
    two_processes.assert_alike(TRAIN, tmp_path, capsys)


# the library on PyPI


def test_lora_equals_peft():
    model, batch = made("bert")
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["query", "value"])).eval()
    apply_delta(model, uv.lora(3, 6))
    own = adapters.adapters(model)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, adapter in own.items():
            layer = theirs.get_submodule(f"base_model.model.{name}")
            for mine, other in ((adapter.A, layer.lora_A), (adapter.B, layer.lora_B)):
                mine.normal_(generator=g)
                other["default"].weight.copy_(mine)
        y = model(**batch).logits
        torch.testing.assert_close(y, theirs(**batch).logits)
        torch.testing.assert_close(adapters.merge(model)(**batch).logits, y, rtol=1e-4, atol=1e-5)


def test_prefix_equals_peft_but_for_its_positions():
    "PEFT counts the prefix as positions; ours does not move them."
    model, batch = made("gpt2")
    ids = batch["input_ids"]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    apply_delta(model, uv.prefix_tuning(3, None))
    table = theirs.prompt_encoder["default"].embedding.weight.detach()  # [l, 2 L d]
    with torch.no_grad():
        for i, block in enumerate(adapters.adapters(model).values()):
            block.prefixes["0_0"].table.copy_(table.view(3, 2, 2, 4, 8)[:, i])
        positions = torch.arange(3, 10)[None]
        torch.testing.assert_close(model(ids, position_ids=positions).logits,
                                   theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(ids).logits, theirs(input_ids=ids).logits, atol=1e-4)


def test_joint_lora_changes_its_thirds_and_merges():
    model, batch = made("gpt2")
    moved(apply_delta(model, uv.lora(3, 6)))
    layer = adapters.adapters(model)["transformer.h.0.attn.c_attn"]
    q, k, v = layer.delta_weight().split(32, -1)  # Conv1D keeps the outputs last
    assert q.any() and v.any() and not k.any()
    torch.testing.assert_close(q.T, 2.0 * layer.parts["q"] @ layer.A[:3])
    torch.testing.assert_close(v.T, 2.0 * layer.parts["v"] @ layer.A[3:])
    y = model(**batch).logits
    torch.testing.assert_close(adapters.merge(model)(**batch).logits, y, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not query, key and value"):
        uv.JointLora(nn.Linear(4, 5), {"q": {"dim": 1, "scale": 1.0, "dropout": 0.0}})


# bad input


def test_gates_of_prefixes_without_one_and_masks_of_numbers():
    for config in (uv.DeltaConfig(function="softmax_prefix", target="attn_head", dim=3),
                   *uv.multihead_parallel_adapter(3)):
        model, batch = made("llama")
        apply_delta(model, config)
        with pytest.raises(ValueError, match="no prefix here has a gate"):
            uv.prefix_gates(model, batch)
    q, k, prefix = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8), torch.randn(4, 2, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.int64)
    with pytest.raises(TypeError, match="mask.bool"):
        uv.prefix_gate(q, k, prefix, mask)
    torch.testing.assert_close(uv.prefix_gate(q, k, prefix, mask.bool()),
                               uv.prefix_gate(q, k, prefix))


def test_a_prefix_from_an_mlp_starts_at_no_change_where_it_shall():
    model, batch = made("llama")
    before = model(**batch).logits
    for function in ("relu_prefix", "softmax_prefix"):
        config = uv.DeltaConfig(function=function, target="attn_head", dim=3, mlp_dim=8,
                                init="lora")
        apply_delta(model, config)
        torch.testing.assert_close(model(**batch).logits, before)
        (keys, values), *_ = [p() for p in model.modules() if isinstance(p, uv.Prefix)]
        assert keys.any() and not values.any()
        adapters.detach(model)


def test_adapters_of_a_user_are_neither_added_to_nor_counted_nor_lost():
    model, _ = made("llama")
    apply_delta(model, uv.lora(2, 2))
    for change in (lambda: apply_delta(model, uv.houlsby(2)),
                   lambda: uv.count_delta_parameters(uv.houlsby(2), model)):
        with pytest.raises(ValueError, match="the model has adapters already"):
            change()
    assert len(adapters.adapters(model)) == 2 * sum(
        type(m).__name__ == "LlamaDecoderLayer" for m in model.modules())
    for odd in ("lora", [uv.lora(2, 2), uv.houlsby(2)]):
        with pytest.raises(TypeError, match="presets add up"):
            apply_delta(made("llama")[0], odd)


@pytest.mark.parametrize("options, words", [
    ({"dim": 0}, "whole number >= 1"), ({"dim": 2.0}, "dim = 2.0"), ({"dim": True}, "dim = True"),
    ({"function": "softmax_prefix", "target": "attn_head", "dim": -1}, "whole number >= 0"),
    ({"function": "tanh"}, "give one of"), ({"target": "heads"}, "give one of"),
    ({"insertion": "before"}, "give one of"), ({"layernorm": "both"}, "give one of"),
    ({"composition": "scaled", "scale": float("nan")}, "finite"), ({"dropout": 1.0}, "dropout"),
    ({"composition": "gated"}, "gate belongs to softmax"),
    ({"function": "relu_prefix", "target": "attn_head", "composition": "gated"}, "gate belongs"),
    ({"function": "softmax_prefix"}, "change the heads"), ({"target": "attn_head"}, "the heads"),
    ({"scale": 2.0}, "only 'scaled'"), ({"train_scale": True}, "only 'scaled'"),
    ({"target": "q"}, "takes 'linear'"), ({"mlp_dim": 4}, "prefixes only"),
    ({"target": "block"}, "sequential"), ({"mlp_dim": 0}, "whole number"),
    ({"function": "linear", "target": "v", "init": "lora", "insertion": "sequential"}, "sequenti"),
    ({"function": "relu_prefix", "target": "attn_head", "layernorm": "in"}, "for bottlenecks"),
    ({"function": "softmax_prefix", "target": "attn_head", "dropout": 0.5}, "dropout is for"),
])
def test_points_outside_of_the_space(options, words):
    with pytest.raises(ValueError, match=words):
        DeltaConfig(**options)


def test_models_that_cannot_be_changed():
    for wrong in (lambda: uv.lora(3, 6, "heads"), lambda: uv.lora(0, 6)):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError, match="no block of a known class"):
        apply_delta(recipes.MLP(), uv.houlsby(4))
    model, batch = made("llama")
    with pytest.raises(ValueError, match="no configs"):
        apply_delta(model, ())
    with pytest.raises(ValueError, match="two of the configs"):
        apply_delta(model, uv.lora(2, 2) + uv.lora(3, 3))
    apply_delta(model, uv.mam_adapter(2, 3, 4.0, None))
    with pytest.raises(ValueError, match="already"):
        apply_delta(model, uv.houlsby(4))
    with pytest.raises(NotImplementedError, match="folded"):
        adapters.merge(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'sdpa' and 'eager'"):
        model(**batch)
    model.set_attn_implementation("sdpa")
    model(**batch)
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


# the experiment


def test_scores_of_texts():
    assert rouge2(["the cat sat"], ["The cat ran."]) == pytest.approx(100 * 2 / 5)
    said, right = ["the cat sat on the mat today"], ["the cat sat on the mat"]
    expected = 100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25
    assert bleu(said, right) == pytest.approx(expected)
    assert bleu(["the cat sat on"], right) == pytest.approx(100 * torch.e ** (1 - 6 / 4))


def test_methods_have_the_budget_that_they_say():
    counts = {name: uv.count_delta_parameters(configs, told.small_translator())
              for name, (configs, _) in told.PREPARE.items() if configs}
    large = [n for name, n in counts.items() if "tiny" not in name]
    assert max(large) <= 1.03 * min(large)
    assert max(n for name, n in counts.items() if "tiny" in name) < 0.1 * min(large)


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(seeds=(0,), names=(32, 32), lrs=(1e-2,),
                        training=Training(steps=1, batch_size=8))
    report = goes_on(told, cfg, tmp_path, monkeypatch)
    assert {c.verdict for c in report.claims} == UNDECIDED


@pytest.fixture
def tiny(tmp_path):
    "A RoBERTa and a BART of the paper's architecture, small."
    torch.manual_seed(0)
    size = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    RobertaForMaskedLM(RobertaConfig(**SIZE | size | {"num_hidden_layers": 1},
                                     max_position_embeddings=70)).save_pretrained(tmp_path / "r")
    BartForConditionalGeneration(BartConfig(
        **BART | size, decoder_start_token_id=2, forced_eos_token_id=2)).save_pretrained(
        tmp_path / "b")
    for name in "rb":
        recipes.byte_tokenizer().save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    return {"model": str(tmp_path / "r"), "text_models": (str(tmp_path / "b"), str(tmp_path / "c"))}


def test_full_scale_path_with_tiny_models(tmp_path, tiny, recorded, monkeypatch):
    "GLUE, summaries and translation, from data of the hub's form to tables."
    small = {"prefix": uv.prefix_tuning(2, 4), "LoRA": uv.lora(2, 2), "MAM": uv.mam_adapter(
        2, 2, 2.0, 4), "full": None}
    monkeypatch.setattr(told, "SMALL_SHARE", small)
    monkeypatch.setattr(told, "LARGE_SHARE", {k: small[k] for k in ("prefix", "MAM")})
    for name, task in TEXTS.items():
        beams = {"num_beams": 2, "max_length": 6}
        monkeypatch.setitem(TEXTS, name, task._replace(lengths=(12, 12), beams=beams))
    short = Training(steps=1, batch_size=2)
    cfg = FULL.replace(**tiny, device="cpu", seeds=(0,), glue_training=short, xsum=short,
                       enro=short, max_length=16, full_lrs=(1e-3,), text_rows=3)
    report = experiment(cfg, start_run("unified_view", cfg, "full", root=tmp_path / "runs"))
    assert set(report.tables["glue"]["task"]) == {"mnli", "sst2"}
    assert all(len(report.tables[name]) == 2 for name in TEXTS)
    assert {f"{TEXTS[name].source}#train" for name in TEXTS} <= set(map(str, recorded.asked))


def test_presets_of_full_scale_are_the_papers():
    assert told.LARGE_SHARE["MAM"] == (
        DeltaConfig(function="softmax_prefix", target="attn_head", composition="gated", dim=30,
                    mlp_dim=800),
        DeltaConfig(dim=512, composition="scaled", scale=4.0, init="lora"))
    assert told.LARGE_SHARE["LoRA ffn"][0].scale == 4.0
    assert [replace(c, dropout=0.0) for c in told.SMALL_SHARE["LoRA"]] == list(uv.lora(16, 32))
