"""MEND on a GPU: the same numbers, edits of an 8B shape, SMALL, a step and an edit of FULL."""

from dataclasses import asdict

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from adaptlab import evaluate, recipes
from adaptlab.bench import cost, facts
from adaptlab.bench.runs import launch
from adaptlab.editing.mend import (
    MEND,
    GradientTransform,
    MENDTrainer,
    edit_losses,
    gradient_factors,
)
from adaptlab.experiments import mend as lab
from adaptlab.text import causal_lm_collate
from gpu.card import DEVICE, DRY, clock, llama, machine, row, token_ids


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
    with torch.device(DEVICE):
        editor = MEND(model, "mlp:-1:", rank=64, edit_lr=1e-4)
    data = batch(10, 24)
    editor.fit_normalization([data])
    editor.eval()
    one = {k: v[:1] for k, v in data.items()}
    with torch.no_grad():
        forward, _ = clock(lambda: model(input_ids=data["input_ids"]))
    for what, work in (("an edit", lambda: editor.edit(one)),
                       ("ten separate edits", lambda: editor.edit_each(data))):
        row(f"{what}, 2 of 32 layers of 8B", *clock(work), reference=forward,
            against="forward, 10 texts")
    factors = gradient_factors(model, editor.layers, lambda m: editor.loss_fn(
        editor.forward_fn(m, one), one["labels"]))
    assert all(f.u.device.type == DEVICE for f in factors.values())


def test_small_experiment(tmp_path, monkeypatch):
    "SMALL with a stand-in that states every fact: nothing is downloaded."
    model = llama("smollm2", layers=4, dtype=torch.float32)
    monkeypatch.setattr(lab.models, "load", lambda *a, **k: (model, recipes.byte_tokenizer()))
    monkeypatch.setattr(facts, "stated", lambda tail, rows, collate: rows)
    cfg = lab.SMALL.replace(
        device=DEVICE, n_train=8, n_choose=2, n_test=4, look_every=1, ft_lrs=(1e-3,), ft_steps=2,
        step_sizes=(4e-4,), at_once=(2,), rank=8,
        training={**asdict(lab.SMALL.training), "steps": 2, "batch_size": 4})
    report = launch("mend", cfg, root=tmp_path, progress=False)
    assert len(report.claims) == 8 and report.tables["edits"]["method"].nunique() == 5


def gpt_neo(layers, wide):
    "Random weights, in the shape of GPT-Neo 2.7B if wide."
    size = {"hidden_size": 2560, "num_heads": 20} if wide else {"hidden_size": 64, "num_heads": 4}
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return GPTNeoForCausalLM(GPTNeoConfig(
            **size, num_layers=layers, attention_types=[[["global", "local"], layers // 2]])).eval()


def items(n, short=5, long=14):
    "Edits as text; the tokenizer makes a token of each byte."
    return [{"edit": (f"{i}" * short, "t" * 9), "rephrase": (f"{i}" * (short // 2 + 1), "t" * 9),
             "locality": f"{i}" * long} for i in range(n)]


def test_full_experiment(tmp_path, monkeypatch):
    "FULL with a narrow model of four blocks, two steps."
    edits = items(12)
    probes = [{part: [x[part]] for part in ("edit", "rephrase")} | {"text": [x["locality"]]}
              for x in edits]
    monkeypatch.setattr(lab.models, "load", lambda *a, **k: (gpt_neo(4, False),
                                                             recipes.byte_tokenizer()))
    monkeypatch.setattr(lab, "_task", lambda *a: {
        "train": edits[:8], "held_out": edits[8:10], "choose": probes[8:10], "test": probes[10:]})
    cfg = lab.FULL.replace(device=DEVICE, rank=8, at_once=(2,), look_every=1, ft_steps=2,
                           training={"steps": 2, "accumulate": 2, "batch_size": 4})
    assert launch("mend", cfg, "full", root=tmp_path, progress=False).claims


class Loss(torch.nn.Module):
    "The trainer's loss of one edit, as a module: so what autograd keeps for it can be counted."

    def __init__(self, trainer):
        super().__init__()
        self.editor, self.model, self.trainer = trainer.editor, trainer.editor.model, trainer

    def forward(self, **parts):
        return self.trainer.loss(self.editor, parts)


def test_full_shape():
    "An edit of GPT-Neo 2.7B in float32, and a step of its editor: ten edits, Adam."
    cfg, rows = lab.FULL.replace(device=DEVICE), items(10, 5 if DRY else 50, 14 if DRY else 200)
    cfg = cfg.replace(rank=8) if DRY else cfg
    model = gpt_neo(32 if not DRY else 4, not DRY).requires_grad_(False)
    bed = lab.EditBed(model, rows, rows, rows, lend=True, cfg=cfg, held_out=rows,
                      tail=facts.Tail(model, cfg.stack, cfg.blocks, cfg.cached),
                      collate=causal_lm_collate(recipes.byte_tokenizer(), add_eos=False))
    with torch.device(DEVICE):  # the networks are made where they are needed
        editor = bed.editor()
    settings, rate = cfg.training, machine(half=False).flops
    trainer = MENDTrainer(editor, rows, cfg.c_edit, settings.lr, cfg.lr_lr, settings.accumulate)
    adam = torch.optim.Adam(editor.parameters(), lr=settings.lr)

    def learn(item):
        (trainer.loss(editor, bed.batch([item])) / settings.accumulate).backward()

    def step():
        for item in rows:
            learn(item)
        torch.nn.utils.clip_grad_norm_(editor.parameters(), settings.clip)
        adam.step()
        adam.zero_grad()

    found = clock(step, rounds=1, warm=1)
    size, own = (sum(p.numel() for p in m.parameters()) for m in (model, editor))
    kept = cost.activation_bytes(Loss(trainer), bed.batch(rows[:1]))
    flops = len(rows) * evaluate.count_flops(lambda: learn(rows[0]))
    row("FULL: GPT-Neo 2.7B, a step of the editor", *found,
        counted=(flops / rate, (4 * size + 16 * own + kept) / 2**30))
    adam.zero_grad()
    editor.eval()

    def edit():
        return editor.edit(bed.pairs([rows[0]["edit"]]))

    flops = evaluate.count_flops(edit)
    row("FULL: GPT-Neo 2.7B, an edit", *clock(edit, rounds=5, warm=1),
        counted=(flops / rate, None))
