"""CoLa on a GPU: paths, batches and generation; SMALL with a stand-in; FULL's shape."""

import pytest
import torch

from adaptlab import recipes
from adaptlab.bench.runs import launch
from adaptlab.experiments.cola import FULL, SMALL, Judge, Question, search_all
from adaptlab.testtime.cola import PathBatch, layer_path, random_edit_paths, run_path
from gpu.card import DEVICE, DRY, in_turn, llama, row, token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paths(dtype):
    torch.manual_seed(0)
    model = recipes.tiny_llama(hidden_size=64, layers=4).to(DEVICE, dtype)
    ids = token_ids(2, 12) % 260
    paths = random_edit_paths(4, 12, max_len=8)
    batch, cache = PathBatch(model, ids, [2, 2]), PathBatch(model, ids)
    found = list(batch.each([(r, p) for p in paths for r in range(2)]))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for n, path in enumerate(paths):
        with torch.no_grad():
            fresh = run_path(model, ids, path)
        assert fresh.device.type == DEVICE and fresh.dtype == dtype
        assert torch.equal(run_path(model, ids, path, cache), fresh)
        for r in range(2):
            torch.testing.assert_close(found[2 * n + r], fresh[r, -2:], atol=tolerance,
                                       rtol=tolerance)
    with layer_path(model, (0, 1, 1, 3)):
        written = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1,
                                 pad_token_id=0)
    assert written.shape[1] == ids.shape[1] + 4


def test_small(tmp_path):
    torch.manual_seed(0)
    recipes.tiny_llama(hidden_size=32, layers=4).save_pretrained(tmp_path / "model")
    recipes.byte_tokenizer().save_pretrained(tmp_path / "model")
    cfg = SMALL.replace(model=str(tmp_path / "model"), max_tokens=0, device=DEVICE)
    cfg = cfg.replace(n_samples=6 if DRY else 40)
    report = launch("cola", cfg, root=tmp_path / "runs", progress=False)
    table = report.tables["methods"]
    assert (table["after (oracle)"] >= table["before"]).all() and "main" in report.figures


def test_full_shape():
    "Llama-3.2-3B with random weights: a few questions of ARC's length, a few simulations."
    model, n = llama("llama3.2-3b"), 2 if DRY else FULL.batch
    ids = token_ids(n, 110).tolist()
    sample = [Question("", "", x[:-1], x[-1:]) for x in ids]
    cfg = FULL.replace(n_simulations=3 if DRY else 8, methods=("both", "random edits"))
    rows = search_all(Judge(model, None, sample, cfg), range(n), cfg, seed=0)
    assert {r["method"] for r in rows} == set(cfg.methods) and len(rows) <= 16 * 2 * n


def test_speed():
    "Side by side must pay; the cache alone is only recorded: on a GPU it need not."
    model = llama("llama3-8b", layers=8)
    ids, depth = token_ids(8, 64), len(model.model.layers)
    jobs = [(i, p) for i in range(8) for p in random_edit_paths(depth, 4 if DRY else 16, seed=i)]

    def alone():
        found = []
        for i, p in jobs:
            with torch.no_grad(), layer_path(model, p):
                found.append(model(ids[i : i + 1], use_cache=False, logits_to_keep=2).logits)
        return [z.sum().item() for z in found]

    def shared():
        runs = [PathBatch(model, x[None], [2]) for x in ids]
        return [runs[i](p).sum().item() for i, p in jobs]

    def together():
        return [z.sum().item() for z in PathBatch(model, ids, [2] * 8).each(jobs)]

    a, s, t = in_turn(alone, shared, together, rounds=3)
    row("CoLa, 8B's layers, PathBatch", t, reference=a, bound=0.5)
    row("CoLa, 8B's layers, shared prefixes alone", s, reference=a)
