"""CoLa on a GPU: paths, batches and generation; SMALL with a stand-in; FULL's shape."""

import pytest
import torch

from adaptlab import recipes
from adaptlab.bench import cost
from adaptlab.bench.runs import launch
from adaptlab.experiments.cola import FULL, SMALL, Judge, Question, search_all
from adaptlab.testtime.cola import PathBatch, layer_path, random_edit_paths, run_path
from gpu.card import DEVICE, DRY, clock, in_turn, llama, machine, row, token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paths(dtype):
    torch.manual_seed(0)
    model = recipes.tiny_llama(hidden_size=64, layers=4).to(DEVICE, dtype)
    ids = token_ids(2, 12) % 260
    paths = random_edit_paths(4, 6, max_len=8)
    batch, cache = PathBatch(model, ids, [2, 2]), PathBatch(model, ids)
    found = list(batch.each([(r, p) for p in paths for r in range(2)]))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for n, path in enumerate(paths):
        with torch.no_grad():
            fresh = run_path(model, ids, path)
        assert fresh.device.type == DEVICE and fresh.dtype == dtype
        torch.testing.assert_close(run_path(model, ids, path, cache), fresh, atol=tolerance,
                                   rtol=tolerance)
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
    cfg = SMALL.replace(model=str(tmp_path / "model"), max_tokens=0, device=DEVICE, n_samples=6,
                        n_simulations=6, n_transfer=2)
    report = launch("cola", cfg, root=tmp_path / "runs", progress=False)
    table = report.tables["methods"]
    assert (table["after (oracle)"] >= table["before"]).all() and "main" in report.figures


@pytest.fixture(scope="module")
def three_b():
    "Llama-3.2-3B's shape, FULL's model."
    return llama("llama3.2-3b")


def test_full_searches(three_b):
    "A batch of FULL's questions, of ARC's length, and a few of its 200 simulations."
    n = 2 if DRY else FULL.batch
    ids = token_ids(n, 110)
    sample = [Question("", "", x[:-1], x[-1:]) for x in ids.tolist()]
    cfg = FULL.replace(n_simulations=4, methods=("both", "random edits"))
    judges, found = [], []

    def search():
        judges.append(Judge(three_b, None, sample, cfg))
        found[:] = search_all(judges[-1], range(n), cfg, seed=0)

    seconds, gib = clock(search, rounds=1, warm=1)
    assert {r["method"] for r in found} == set(cfg.methods) and len(found) <= 4 * 2 * n
    batch, depth = judges[-1].batch, len(three_b.model.layers)
    layer = cost.forward_flops(three_b.base_model, ids[:1], 1) / depth
    weights = sum(p.nbytes for p in three_b.parameters())
    row(f"FULL: 3B, {len(found)} paths of {n} questions", seconds, gib, counted=(
        layer * batch.layer_calls / machine().flops, (weights + batch.bytes) / 2**30))


def test_side_by_side_against_one_by_one(three_b):
    "Layers side by side must pay; a shared prefix alone need not: it spares calls, not launches."
    ids, depth = token_ids(2 if DRY else 8, 64), len(three_b.model.layers)
    jobs = [(i, p) for i in range(len(ids)) for p in random_edit_paths(depth, 3, seed=i)]

    def alone():
        found = []
        for i, p in jobs:
            with torch.no_grad(), layer_path(three_b, p):
                found.append(three_b(ids[i : i + 1], use_cache=False, logits_to_keep=2).logits)
        return [z.sum().item() for z in found]

    def shared():
        runs = [PathBatch(three_b, x[None], [2]) for x in ids]
        return [runs[i](p).sum().item() for i, p in jobs]

    def together():
        return [z.sum().item() for z in PathBatch(three_b, ids, [2] * len(ids)).each(jobs)]

    a, s, t = in_turn(alone, shared, together, rounds=2, warm=0)
    row(f"{len(jobs)} paths of 3B, side by side", t, reference=a, bound=0.5,
        against="paths one by one")
    row(f"{len(jobs)} paths of 3B, shared prefixes alone", s, reference=a,
        against="paths one by one")
