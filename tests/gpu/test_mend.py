"""MEND on a GPU: the same numbers, edits of an 8B shape, SMALL, and FULL's shape."""

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from adaptlab import recipes
from adaptlab.bench.runs import launch
from adaptlab.editing.mend import MEND, GradientTransform, edit_losses, gradient_factors
from adaptlab.experiments import mend as lab
from gpu.card import DEVICE, DRY, clock, llama, row, token_ids


def batch(rows=2, length=12, seed=0):
    ids = token_ids(rows, length, seed) % 256
    labels = ids.clone()
    labels[:, :-4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def triple(rows=2):
    return {part: batch(rows, seed=i) for i, part in enumerate(("edit", "rephrase", "locality"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_cpu(dtype):
    torch.manual_seed(0)
    model = llama("smollm2", layers=2, dtype=dtype)
    editor, data = MEND(model, "mlp:-1:", rank=8, edit_lr=1e-3), batch(4)
    editor.fit_normalization([data])
    each, pooled = editor.eval().edit_each(data), editor.edit(data)
    assert next(editor.parameters()).device.type == DEVICE and len(each) == 4
    name = next(iter(editor.layers))
    total = sum(each[i].delta(name) for i in range(4))
    assert (pooled.delta(name) - total).norm() <= 0.02 * total.norm()
    written = pooled.materialize()(input_ids=data["input_ids"]).logits.float()
    view = pooled(input_ids=data["input_ids"]).logits.float()
    before = model(input_ids=data["input_ids"]).logits.float()
    assert (view - written).norm() <= 0.1 * (view - before).norm()
    model.cpu(), editor.cpu()
    alone = editor.edit({k: v.cpu() for k, v in data.items()}).delta(name)
    assert (pooled.delta(name).cpu() - alone).norm() <= (
        1e-3 if dtype == torch.float32 else 0.1) * alone.norm()


def test_transform_and_its_statistics():
    g = GradientTransform(64, 96, rank=16, n_layers=2).to(DEVICE)
    u, delta = torch.randn(2, 50, 64, device=DEVICE), torch.randn(2, 50, 96, device=DEVICE)
    for mode in ("both", "x_only", "delta_only", "one_sided"):
        g = GradientTransform(64, 96, rank=16, mode=mode).to(DEVICE)
        out = g(u, delta)
        assert all(x.device.type == DEVICE and torch.isfinite(x).all() for x in out)
        if g.norm:
            assert g.u_moments.count.item() == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step(dtype):
    model = llama("smollm2", layers=2, dtype=dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    editor = MEND(model, "mlp:-1:", rank=8, edit_lr=1e-3)
    sum(edit_losses(editor, triple())).backward()
    assert all(torch.isfinite(p.grad).all() for p in editor.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_edits_of_8b():
    "Two blocks of the shape of Llama-3-8B in bf16, against the model's forward pass."
    model = llama("llama3-8b", layers=2)
    editor, data = MEND(model, "mlp:-1:", rank=64, edit_lr=1e-4), batch(10, 24)
    editor.fit_normalization([data])
    editor.eval()
    one = {k: v[:1] for k, v in data.items()}
    with torch.no_grad():
        forward, _ = clock(lambda: model(input_ids=data["input_ids"]))
    row("MEND, one edit, 2 layers of 8B", *clock(lambda: editor.edit(one)), reference=forward)
    row("MEND, ten separate edits", *clock(lambda: editor.edit_each(data)), reference=forward)
    factors = gradient_factors(model, editor.layers, lambda m: editor.loss_fn(
        editor.forward_fn(m, one), one["labels"]))
    assert all(f.u.device.type == DEVICE for f in factors.values())


def test_small_experiment(tmp_path, monkeypatch):
    "SMALL with a stand-in that states every fact: nothing is downloaded."
    model = llama("smollm2", layers=4, dtype=torch.float32)
    monkeypatch.setattr(lab.models, "load", lambda *a, **k: (model, recipes.byte_tokenizer()))
    monkeypatch.setattr(lab, "_stated", lambda tail, rows, collate: rows)
    report = launch("mend", lab.SMALL.replace(device=DEVICE), root=tmp_path, progress=False)
    assert len(report.claims) == 8 and report.tables["edits"]["method"].nunique() == 5


def test_full_shape(tmp_path, monkeypatch):
    "FULL's model cut to four blocks, a few steps."
    size = {"hidden_size": 64, "num_heads": 4} if DRY else {"hidden_size": 2560, "num_heads": 20}
    torch.manual_seed(0)
    neo = GPTNeoForCausalLM(GPTNeoConfig(
        **size, num_layers=4, attention_types=[[["global", "local"], 2]])).to(DEVICE).eval()
    items = [{"edit": (f"text {i}", " one"), "rephrase": (f"ext {i}", " one"),
              "locality": "something else"} for i in range(12)]
    probes = [{part: [x[part]] for part in ("edit", "rephrase")} | {"text": [x["locality"]]}
              for x in items]
    monkeypatch.setattr(lab.models, "load", lambda *a, **k: (neo, recipes.byte_tokenizer()))
    monkeypatch.setitem(lab.TASKS, "continuations", lambda *a: {
        "train": items[:8], "held_out": items[8:10], "choose": probes[8:10], "test": probes[10:]})
    cfg = lab.FULL.replace(device=DEVICE, rank=8 if DRY else lab.FULL.rank, at_once=(2,),
                           look_every=1, ft_steps=2, training={"steps": 2, "accumulate": 2,
                                                               "batch_size": 4})
    seconds, gib = clock(lambda: launch("mend", cfg, "full", root=tmp_path, progress=False),
                         rounds=1, warm=0)
    row("MEND, FULL with 4 blocks, 2 steps", seconds, gib)
