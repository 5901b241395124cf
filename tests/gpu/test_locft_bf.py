"""LocFT-BF on a GPU: the CPU's numbers, SMALL, FULL's path, a step and an edit of FULL's shape."""

import json

import pytest
import torch

from adaptlab import evaluate, recipes
from adaptlab.bench.runs import launch
from adaptlab.editing.locft_bf import EditRequest, LocFT, LocFTConfig, Trunk, select_parameters
from adaptlab.experiments import locft_bf as lab
from gpu.card import DEVICE, DRY, clock, in_turn, llama, machine, row

TOKENIZER = recipes.byte_tokenizer()
EDITS = [EditRequest("Paris is in", "Peru", "where is Paris:"), EditRequest("Oslo lies in", "Chad"),
         EditRequest("Rome: ", "Iraq again")]


def delta(model, **options):
    editor = LocFT(model, TOKENIZER, LocFTConfig(1, **{"lr": 1e-3, "epochs": 3} | options))
    found = editor.edit(EDITS).delta
    editor.revert()
    return torch.cat([d.flatten() for d in found.values()]).cpu()


@pytest.mark.parametrize("schedule", ["breadth_first", "depth_first"])
def test_agrees_with_the_cpu(schedule):
    model = llama("smollm2", layers=2, dtype=torch.float32)
    here = delta(model, schedule=schedule)
    alone = delta(model.cpu(), schedule=schedule)
    assert (here - alone).norm() <= 0.02 * alone.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", ["mlp.down_proj", "entire"])
def test_kept_states_and_the_whole_pass(dtype, module):
    model = llama("smollm2", layers=2, dtype=dtype)
    kept, whole = (delta(model, module=module, cached=c) for c in (True, False))
    assert torch.isfinite(kept).all() and kept.abs().max() > 1e-4
    # Adam's first steps are the sign of a gradient, so rounding in bfloat16 turns some of them
    assert (kept - whole).norm() <= (0.02 if dtype == torch.float32 else 0.7) * whole.norm()


def test_small_experiment(tmp_path):
    "The world of SMALL, on the card."
    cfg = lab.SMALL.replace(device=DEVICE, seeds=(0,), edits=5, lrs=(3e-3,), epochs=2)
    assert len(launch("locft_bf", cfg, root=tmp_path, progress=False).claims) == 5


def test_full_experiment(tmp_path, monkeypatch):
    "FULL with a narrow model, one epoch, six edits."
    file = tmp_path / "edits.json"
    file.write_text(json.dumps([
        {"src": f"{i}: {e.prompt}", "alt": e.target, "rephrase": f"say {i}: {e.prompt}"}
        for i in range(2) for e in EDITS]))
    monkeypatch.setattr(lab.models, "load", lambda *a, **k: (llama("smollm2", layers=2), TOKENIZER))
    monkeypatch.setattr(lab.suites, "mmlu", lambda *a: [
        {"context": f"{i}?", "choices": [" A", " B"], "answer": i % 2} for i in range(6)])
    cfg = lab.FULL.replace(device=DEVICE, layer=1, epochs=1, edits=6, source=str(file))
    assert launch("locft_bf", cfg, "full", root=tmp_path, progress=False).claims


def test_full_shape():
    "Llama-3-8B in bfloat16: an epoch of a batch of 100 edits of 30 tokens, kept against whole."
    cfg = lab.FULL
    model, n = llama("llama3-8b").requires_grad_(False), 4 if DRY else cfg.batch_size
    layer = 2 if DRY else cfg.layer
    weights = list(select_parameters(model, layer, cfg.module).values())
    for p in weights:
        p.requires_grad_(True)
    torch.manual_seed(0)
    rows = [(torch.randint(5, 500, (30,)).tolist(), 24) for _ in range(n)]
    kept, whole = (Trunk(model, rows, layer, cached) for cached in (True, False))

    def step(trunk):
        logits, y = trunk(range(n))
        loss = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), y)
        return torch.autograd.grad(loss, weights)

    flops = evaluate.count_flops(lambda: step(kept))
    row(f"FULL: gradient of {n} edits, kept states", *clock(lambda: step(kept), rounds=5, warm=2),
        counted=(flops / machine().flops, None))
    ours, theirs = in_turn(lambda: step(kept), lambda: step(whole), rounds=5, warm=1)
    row("FULL: kept states", ours, reference=theirs, against="the whole pass", bound=0.7)
