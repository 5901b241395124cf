"""CoLa: paths, prefix sharing, the search and its invariants, and the full-scale path."""

import copy
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import schemas
from adaptlab import data, evaluate, models, recipes
from adaptlab.bench.report import load_report
from adaptlab.bench.runs import launch, start_run
from adaptlab.experiments import cola as lab
from adaptlab.experiments.cola import FULL, SMALL, Judge, boxed_answer, experiment, questions
from adaptlab.testtime import cola
from adaptlab.testtime.cola import (
    ChainOfLayersSearch,
    PathBatch,
    SearchResult,
    depth_statistics,
    find_layers,
    layer_path,
    legal_edits,
    random_edit_paths,
    random_edit_search,
    repeat_block,
    run_path,
    search_many,
    skip_block,
    teacher_forced_match,
    ucb_score,
)

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
PATHS = [(0, 1, 2, 3), (3, 0, 0, 1, 1, 1, 2), (2,), (0, 3, 3, 3, 3, 3, 2, 1)]


def family(name):
    "A random model of four layers of several families."
    import transformers as t

    torch.manual_seed(0)
    size = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    kv = {"num_key_value_heads": 2, "head_dim": 8}
    if name == "llama":
        model = recipes.tiny_llama(vocab_size=100, hidden_size=32, layers=4)
    elif name == "gpt2":
        gpt2 = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, **gpt2)
        )
    elif name == "neox":
        model = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**size, **more))
    elif name == "olmoe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2}
        model = t.OlmoeForCausalLM(t.OlmoeConfig(**size, **more, **experts))
    else:  # full and sliding attention in turn, the window shorter than the input
        types = ["sliding_attention", "full_attention"] * 2
        config = t.Gemma3TextConfig(**size, **more, **kv, layer_types=types, sliding_window=4)
        model = t.Gemma3ForCausalLM(config)
    model.generation_config.pad_token_id = 0
    return model.eval()


FAMILIES = ["llama", "gpt2", "neox", "olmoe", "gemma3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_path_equals_a_rebuilt_model(name):
    model = family(name)
    before, stock = model.config.to_dict(), model(IDS, use_cache=False).logits
    stack = find_layers(model)
    for path in PATHS:
        rebuilt = copy.deepcopy(model)
        there = find_layers(rebuilt)
        layers = nn.ModuleList(copy.deepcopy(there.layers[p]) for p in path)
        setattr(there.owner, there.name, layers)
        rebuilt.config.num_hidden_layers = len(path)
        if getattr(rebuilt.config, "layer_types", None):
            rebuilt.config.layer_types = [model.config.layer_types[p] for p in path]
        with layer_path(model, path):
            found = model(IDS, use_cache=False).logits
        expected = rebuilt(IDS, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        if path == (0, 1, 2, 3):
            assert torch.equal(found, stock)
    assert model.config.to_dict() == before and find_layers(model).layers is stack.layers


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_cache_equals_without(name):
    model = family(name)
    for path in PATHS:
        with layer_path(model, path):
            fast = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=-1)
            slow = model.generate(
                IDS, max_new_tokens=8, do_sample=False, eos_token_id=-1, use_cache=False
            )
            plain, cached = (model(IDS, use_cache=c).logits for c in (False, True))
        assert torch.equal(fast, slow)
        torch.testing.assert_close(plain, cached, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("max_bytes", [2**28, 3 * 9 * 32 * 4, 0])
def test_a_cache_changes_no_bit(name, max_bytes):
    model = family(name)
    cache, calls = PathBatch(model, IDS, max_bytes=max_bytes), 0
    for _, path in random_jobs(12, 1):
        calls += 2 * len(path)
        with torch.no_grad():
            fresh = run_path(model, IDS, path)
        found = run_path(model, IDS, path, cache)
        torch.testing.assert_close(found, fresh, atol=1e-5, rtol=0)
        assert torch.equal(found, fresh) or max_bytes != 2**28  # else rows may not go together
        assert cache.bytes == sum(x.nbytes for x in cache.states.values()) <= max_bytes
    if max_bytes == 2**28:
        assert cache.layer_calls < calls


def random_jobs(n, rows, seed=0):
    rng = np.random.default_rng(seed)
    jobs = [(row, (0, 1, 2, 3)) for row in range(rows)]
    for _ in range(n):
        edits = legal_edits(range(4), max_len=8)
        edits = legal_edits(edits[rng.integers(len(edits))], max_len=8)
        jobs.append((int(rng.integers(rows)), edits[rng.integers(len(edits))]))
    return jobs


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("limits", [{}, {"max_bytes": 40_000}, {"max_bytes": 0}])
def test_a_batch_equals_one_by_one(name, limits):
    "Rows of unequal length, padded; with room for all prefixes, for a few, for none."
    model = family(name)
    rows = [IDS[0].tolist(), IDS[1, :5].tolist(), IDS[0, 2:9].tolist()]
    batch = PathBatch(model, rows, [1, 5, 3], **limits)
    for seed in (0, 1):  # the second time, most prefixes are known
        jobs = random_jobs(12, 3, seed)
        for (row, path), found in zip(jobs, batch.each(jobs), strict=True):
            with torch.no_grad():
                whole = run_path(model, torch.tensor([rows[row]]), path)[0]
            torch.testing.assert_close(found, whole[-len(found) :], atol=2e-5, rtol=1e-4)
            assert len(found) == (1, 5, 3)[row]
        assert batch.bytes <= batch.max_bytes
    assert model.training is False and find_layers(model).layers[0].forward.__self__ is not None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_with_masks_and_in_half_precision(attention, dtype):
    model = family("llama").to(dtype)
    model.set_attn_implementation(attention)
    rows = [IDS[0].tolist(), IDS[1, :4].tolist()]
    jobs = random_jobs(6, 2)
    for (row, path), found in zip(jobs, PathBatch(model, rows, [2, 2]).each(jobs), strict=True):
        with torch.no_grad():
            whole = run_path(model, torch.tensor([rows[row]]), path)[0, -2:]
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert found.dtype == dtype
        torch.testing.assert_close(found, whole, atol=tolerance, rtol=tolerance)


def test_a_batch_runs_each_shared_prefix_once():
    calls = []
    model = family("llama")
    PathBatch(model, [[3, 4, 5]])  # checks, once per model, that layers can be run one by one
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, a, out, i=i: calls.append((i, len(out))))
    batch = PathBatch(model, [[3, 4, 5]] * 3, [1, 1, 1])
    list(batch.each([]))  # listens
    calls.clear()
    jobs = [(0, (0, 1, 2, 3)), (0, (0, 1, 3)), (1, (0, 1, 2)), (2, (2, 0, 1, 1))]
    list(batch.each(jobs))
    # rows at 0 and 2 first; (2, 0, ...) falls behind layer 0 and catches up
    assert calls == [(0, 2), (1, 2), (2, 3), (0, 1), (1, 1), (1, 1), (3, 2)]
    assert batch.layer_calls == sum(n for _, n in calls) == 12
    calls.clear()
    list(batch.each(jobs))
    assert calls == []


def test_games_in_lockstep_are_the_games_one_by_one():
    def games():
        return [
            ChainOfLayersSearch(Toy(), wants, n, mode, seed=n)
            for n in (1, 30, 80) for mode in ("skip", "repeat", "both")
        ]  # fmt: skip

    rounds = []

    def judge(jobs):
        rounds.append(len(jobs))
        return [wants(path) for _, path in jobs]

    together, alone = search_many(games(), judge), [game.search() for game in games()]
    assert [list(r.evaluated.items()) for r in together] == [
        list(r.evaluated.items()) for r in alone
    ]
    assert len(rounds) == max(r.n_executed for r in alone) and rounds[0] == 9
    assert search_many([], judge) == []


def test_kept_positions_and_a_cache_of_another_input():
    model = family("llama")
    cache = PathBatch(model, IDS, keep=[3, 3])
    for path in PATHS:
        with torch.no_grad():
            fresh = run_path(model, IDS, path)
        torch.testing.assert_close(run_path(model, IDS, path, cache), fresh[:, -3:])
    with pytest.raises(ValueError, match="another model or input"):
        run_path(model, IDS + 1, PATHS[0], cache)
    with pytest.raises(ValueError, match="another model or input"):
        run_path(family("llama"), IDS, PATHS[0], cache)


def test_gradients_flow_through_a_path():
    model = family("llama")
    with layer_path(model, (0, 2, 2)):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    layers = model.model.layers
    assert layers[2].mlp.up_proj.weight.grad is not None
    assert layers[1].mlp.up_proj.weight.grad is None


def test_wrapped_models_are_found():
    from peft import LoraConfig, get_peft_model

    model = family("llama")
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad(), layer_path(wrapped, (0, 1, 1)), layer_path(model, (0, 1, 1)):
        torch.testing.assert_close(wrapped(IDS).logits, model(IDS).logits)


paths_ = st.lists(st.integers(0, 9), min_size=1, max_size=20).map(tuple)


@settings(max_examples=60, deadline=None)
@given(paths_, st.integers(0, 10**6), st.sampled_from(["skip", "repeat", "both"]))
def test_edits_obey_their_algebra(path, pick, mode):
    edits, n = legal_edits(path, mode, min_len=1, max_len=30), len(path)
    assert all(1 <= len(e) <= 30 and set(e) <= set(path) for e in edits)
    blocks = [(i, k) for i in range(n) for k in range(1, 5) if i + k <= n]
    skips = [skip_block(path, i, k) for i, k in blocks if k < n]
    repeats = [
        repeat_block(path, i, k, r) for i, k in blocks for r in range(1, 5) if n + k * r <= 30
    ]
    assert edits == {"skip": skips, "repeat": repeats, "both": skips + repeats}[mode]
    i, k = blocks[pick % len(blocks)]
    if k < n:
        assert skip_block(path, i, k) == path[:i] + path[i + k :]
    longer = repeat_block(path, i, k, 2)
    assert len(longer) == n + 2 * k and skip_block(longer, i + k, 2 * k) == path


def test_ucb_in_closed_form():
    expected = 0.75 + math.sqrt(2) * math.sqrt(math.log(34) / 4) - 4.285714285714286
    assert math.isclose(ucb_score(3, 4, 34, 24, 28, 2**0.5, 5.0), expected)
    assert ucb_score(0, 0, 34, 24, 28) == ucb_score(0, 1, 34, 24, 28)  # finite when unvisited


class Toy:
    depth = 6

    def __call__(self, path):
        return path


def wants(path):
    return float(2 not in path and path.count(4) == 2)


def nodes(node):
    yield node
    for child in node.children or ():
        yield from nodes(child)


@pytest.mark.parametrize("mode", ["skip", "repeat", "both"])
@pytest.mark.parametrize("seed", range(4))
def test_invariants_of_the_search(mode, seed):
    options = {"n_simulations": 80, "mode": mode, "seed": seed}
    game = ChainOfLayersSearch(Toy(), wants, max_len=8, **options)
    result = game.search()
    assert sum(c.visits for c in game.root.children) + 1 == game.total == result.n_simulations
    assert all(n.value <= n.visits for n in nodes(game.root))
    assert all(n.visits == 0 for n in nodes(game.root) if n.path not in result.evaluated)
    assert all(1 <= len(p) <= 8 for p in result.evaluated) and result.n_executed <= 80
    assert tuple(range(6)) in result.evaluated
    again = ChainOfLayersSearch(Toy(), wants, max_len=8, **options).search()
    assert list(again.evaluated.items()) == list(result.evaluated.items())
    for node in nodes(game.root):
        paths = [c.path for c in node.children or ()]
        assert len(paths) == len(set(paths)) <= game.n_candidates


def test_each_path_is_executed_once_and_the_oracle_never_loses():
    seen = []

    def count(path):
        seen.append(path)
        return wants(path)

    result = ChainOfLayersSearch(Toy(), count, 300, length_weight=0.5).search()
    assert len(seen) == len(set(seen)) == result.n_executed < result.n_simulations
    assert result.evaluated[result.best_path] >= result.initial_reward
    union = {**result.evaluated}
    for mode in ("skip", "repeat"):
        part = ChainOfLayersSearch(Toy(), wants, 100, mode).search()
        union |= part.evaluated
        assert max(union.values()) >= max(part.evaluated.values())


def test_nothing_to_edit_ends_the_search():
    class One(Toy):
        depth = 1

    result = ChainOfLayersSearch(One(), lambda p: 1.0, 50, mode="skip").search()
    assert result.evaluated == {(0,): 1.0} and result.n_simulations == 1
    assert random_edit_search(One(), lambda p: 1.0, 50, mode="skip").n_executed == 1
    two = type("Two", (Toy,), {"depth": 2})()
    assert ChainOfLayersSearch(two, lambda p: 1.0, 50, mode="skip").search().n_simulations == 50


def test_search_on_a_model_leaves_it_as_it_was():
    model = family("llama")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    config, stack = model.config.to_dict(), model.model.layers

    def generates(m):
        out = m.generate(IDS, max_new_tokens=3, do_sample=False)
        return float(out[0, -1] % 2)

    ChainOfLayersSearch(model, generates, 6).search()

    def fails(m):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        ChainOfLayersSearch(model, fails, 6).search()
    broken = PathBatch(model, IDS)
    handle = model.model.layers[1].register_forward_pre_hook(fails_hook)
    with pytest.raises(RuntimeError, match="hook"):
        broken((0, 1))
    handle.remove()
    assert broken((0, 1)).shape[:2] == IDS.shape
    assert model.config.to_dict() == config and model.model.layers is stack
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [x.self_attn.layer_idx for x in stack] == [0, 1, 2, 3]
    assert not any(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in stack)
    assert not any("forward" in vars(x) for x in stack)


def fails_hook(module, args):
    raise RuntimeError("hook")


@pytest.mark.parametrize("path", PATHS)
def test_teacher_forcing_equals_greedy_generation(path):
    model, ids = family("llama"), IDS[:1]
    with layer_path(model, path):
        written = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1)[0, 9:]
    for i in range(6):
        answer = written.clone()
        if i < 5:
            answer[i] = (answer[i] + 1) % 100
        logits = run_path(model, torch.cat([ids, answer[None]], 1), path)
        assert teacher_forced_match(logits, answer, 9) == (i == 5)
        assert teacher_forced_match(logits[0, -6:], answer.tolist(), 1) == (i == 5)
    logits[0, 9, 0] = math.nan
    assert not teacher_forced_match(logits, answer, 9)


def test_statistics_by_hand():
    results = [
        SearchResult({(0, 1, 2): 1.0, (0, 2): 1.0, (0, 0, 2, 2): 1.0}, 3, 3),
        SearchResult({(0, 1, 2): 0.0, (0, 2, 2, 2): 1.0, (1,): 0.0}, 3, 3),
        SearchResult({(0, 1, 2): 0.0, (1,): 0.0}, 3, 2),
        SearchResult({(0, 1, 2): 1.0, (0, 1, 1, 2): 1.0, (1,): 0.0}, 3, 3),
    ]
    best = depth_statistics(results)
    assert best.depth == {"C->C": 2.5, "W->C": 4} and best.unique_depth == {"C->C": 2.5, "W->C": 2}
    moves = {"C->C": 2, "W->C": 1, "W->W": 1, "shorter": 1, "original best": 1}
    assert best.transitions == moves
    np.testing.assert_allclose(best.skip_rate, [0, (2 / 3 + 1 + 0) / 3, 0])
    np.testing.assert_allclose(best.repeats, [1 / 9, 1 / 6, (1 / 3 + 2) / 3])
    assert results[0].pareto == [(0, 2)] and results[1].pareto == [(1,), (0, 2, 2, 2)]
    assert results[2].best_path == (0, 1, 2)


def test_answers():
    assert boxed_answer(r"so \boxed{\sqrt{\frac{1}{2}}} it is") == r"\sqrt{\frac{1}{2}}"
    assert boxed_answer(r"\boxed{\frac{3}{4}}") == r"\frac{3}{4}"
    assert evaluate.same_answer(r"\frac{3}{4}", "0.75") and evaluate.same_answer("75%", "0.75")
    assert not evaluate.same_answer("x", "y") and evaluate.same_answer(" Paris", "paris")
    assert boxed_answer("no number") == "no number" and boxed_answer("a 1/2") == "1/2"


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m: run_path(m, IDS, ()), ValueError, "empty"),
        (lambda m: run_path(m, IDS, (0, 4)), ValueError, "0..3"),
        (lambda m: run_path(m, IDS, (0, -1)), ValueError, "0..3"),
        (lambda m: run_path(m, IDS, (0, 1.0)), TypeError, "integers"),
        (lambda m: run_path(m, IDS, (0, True)), TypeError, "integers"),
        (lambda m: skip_block((0, 1), 0, 2), ValueError, "empty"),
        (lambda m: skip_block((0, 1), 1, 2), ValueError, "lie in"),
        (lambda m: repeat_block((0, 1), 0, 1, 0), ValueError, "times"),
        (lambda m: legal_edits((0, 1), "jump"), ValueError, "mode"),
        (lambda m: legal_edits((0, 1), max_len=0), ValueError, "max_len"),
        (lambda m: legal_edits((0, 1), min_len=3, max_len=2), ValueError, "max_len"),
        (lambda m: legal_edits((0, 1), max_block=0), ValueError, "max_block"),
        (lambda m: ucb_score(0, -1, 1, 1, 1), ValueError, "visits"),
        (lambda m: ChainOfLayersSearch(Toy(), wants, 0), ValueError, "n_simulations"),
        (lambda m: ChainOfLayersSearch(Toy(), wants, max_repeat=0), ValueError, "max_repeat"),
        (lambda m: ChainOfLayersSearch(Toy(), wants, mode="x"), ValueError, "mode"),
        (lambda m: ChainOfLayersSearch(Toy(), wants, max_len=3), ValueError, "standard path"),
        (lambda m: ChainOfLayersSearch(Toy(), wants, epsilon=2), ValueError, "epsilon"),
        (lambda m: ChainOfLayersSearch(len, wants), TypeError, "depth"),
        (lambda m: ChainOfLayersSearch(Toy(), lambda p: math.nan).search(), ValueError, "finite"),
        (lambda m: ChainOfLayersSearch(Toy(), lambda p: [1, 0]).search(), TypeError, "real number"),
        (lambda m: random_edit_search(Toy(), wants, 0), ValueError, "n_executions"),
        (lambda m: random_edit_search(Toy(), wants, 9, mode="x"), ValueError, "mode"),
        (lambda m: random_edit_paths(4, 9, max_len=0), ValueError, "max_len"),
        (lambda m: search_many([ChainOfLayersSearch(Toy(), wants)], lambda j: []), ValueError, "0"),
        (lambda m: PathBatch(m, [], []), ValueError, "at least one input"),
        (lambda m: PathBatch(m, [[1, 2]], [3]), ValueError, "keep"),
        (lambda m: PathBatch(m, [[1, 2]], [1, 1]), ValueError, "keep"),
        (lambda m: PathBatch(m, [[1, 2]], [1]).each([(1, (0,))]), ValueError, "rows outside"),
        (lambda m: PathBatch(m, [[1, 2]], [1]).each([(0, (4,))]), ValueError, "0..3"),
        (lambda m: PathBatch(nn.Linear(2, 2), [[1]], [1]), ValueError, "model.layers"),
        (lambda m: find_layers(nn.Linear(2, 2)), ValueError, "model.layers"),
        (lambda m: find_layers(m, "nowhere"), ValueError, "nowhere"),
        (lambda m: PathBatch(m, [[1]], max_bytes=-1), ValueError, "max_bytes"),
        (lambda m: teacher_forced_match(torch.zeros(3, 5), [], 1), ValueError, "answer"),
        (lambda m: teacher_forced_match(torch.zeros(3, 5), [1], 9), ValueError, "prompt_len"),
        (lambda m: depth_statistics([]), ValueError, "at least one"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(family("llama"))


def test_a_reward_outside_the_usual_range_warns():
    with pytest.warns(UserWarning, match="outside"):
        ChainOfLayersSearch(Toy(), lambda p: 7.0, 3).search()


def tiny_world(folder, **changes):
    "FULL in miniature: a random Llama, a byte tokenizer, and questions with options."
    torch.manual_seed(0)
    model = recipes.tiny_llama(hidden_size=16, layers=3, heads=2, kv_heads=1)
    model.save_pretrained(folder / "model")
    tokenizer = recipes.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    sets = folder / "sets"
    sets.mkdir()
    rows = [
        {"question": f"{i} + {i}?", "answerKey": "AB"[i % 2],
         "choices": {"label": ["A", "B"], "text": [str(2 * i), str(3 * i)]}}
        for i in range(7)
    ]  # fmt: skip
    (sets / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return FULL.replace(
        model=str(folder / "model"), dataset=str(sets / "test.jsonl"), dtype="float32",
        n_samples=5, n_simulations=10, device="cpu", chunk=3, batch=2, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("check", ["teacher_forced", "generate"])
def test_full_scale_path_with_a_tiny_model(tmp_path, check):
    cfg = tiny_world(tmp_path, judge=check, max_new_tokens=4)
    report = experiment(cfg, start_run("cola", cfg, "full", root=tmp_path / "runs"))
    table = report.tables["methods"].set_index("method")
    assert list(table.index) == list(cfg.methods)
    assert (table["after (oracle)"] >= table["before"]).all()
    assert (table["executed paths"] <= 10).all()
    assert table.loc["random edits", "executed paths"] == table.loc["both", "executed paths"]
    assert report.tables["paths"]["sample"].nunique() == 5
    assert {"main", "depth"} <= report.figures.keys() and report.claims


def test_full_scale_path_with_two_processes(tmp_path):
    cfg = tiny_world(tmp_path)
    alone = experiment(cfg, start_run("cola", cfg, "full", root=tmp_path / "alone"))
    args = []
    for name in ("model", "dataset", "dtype", "n_samples", "n_simulations",
                 "device", "chunk", "batch"):  # fmt: skip
        args += [f"--{name.replace('_', '-')}", str(getattr(cfg, name))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "-m", "adaptlab", "run", "cola", "--scale", "full", *args]
    command += ["--root", str(tmp_path / "runs")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("report in") == 1
    found = load_report(next((tmp_path / "runs").rglob("report.json")).parent)
    names = ["sample", "method", "path", "reward"]
    both = found.tables["paths"][names], alone.tables["paths"][names]
    assert both[0].reset_index(drop=True).equals(both[1].reset_index(drop=True))


def test_questions_are_checked(tmp_path):
    cfg = tiny_world(tmp_path)
    tokenizer = recipes.byte_tokenizer()
    with pytest.raises(ValueError, match="no column"):
        questions(cfg.replace(answer="nothing", chat=False), tokenizer, 0)
    q = questions(cfg.replace(chat=False), tokenizer, 0)[0]
    assert "\nA. " in q.prompt and q.answer in (" A", " B")
    short = recipes.tiny_llama(max_length=16)
    for kind in ("teacher_forced", "generate"):
        with pytest.raises(ValueError, match="context"):
            Judge(short, tokenizer, [q], SMALL.replace(judge=kind))
        with pytest.raises(ValueError, match="need a token"):
            Judge(short, tokenizer, [q._replace(answer_ids=[])], SMALL.replace(judge=kind))
    with pytest.raises(ValueError, match="none within max_tokens = 3"):
        questions(cfg.replace(max_tokens=3, chat=False), tokenizer, 0)
    with pytest.raises(ValueError, match="chat = False"):
        questions(cfg, tokenizer, 0)
    with pytest.raises(ValueError, match="methods"):
        cfg.replace(methods=("both", "luck"))


def test_a_data_set_without_questions(tmp_path, monkeypatch):
    cfg, full = tiny_world(tmp_path).replace(chat=False), data.load
    monkeypatch.setattr(lab.data, "load", lambda *a, **k: full(*a, **k).select([]))
    with pytest.raises(ValueError, match="holds 0 questions"):
        questions(cfg, recipes.byte_tokenizer(), 0)


def test_one_method_and_no_controls(tmp_path):
    cfg = tiny_world(tmp_path, methods=("skip",), n_transfer=0)
    cfg = cfg.replace(chat=False, max_tokens=0)
    report = experiment(cfg, start_run("cola", cfg, "full", root=tmp_path / "runs"))
    assert list(report.tables["methods"]["method"]) == ["skip"]
    assert not len(report.tables["transfer"])
    paths = report.tables["paths"]
    assert (paths["path"].str.split().str.len() <= 3).all()  # nothing was repeated


def test_both_judges_agree_on_short_answers():
    "Teacher forcing in a batch says what writing with a cache says, path by path."
    model, tokenizer = family("llama"), recipes.byte_tokenizer()
    paths = [path for _, path in random_jobs(8, 1)]
    prompts = IDS.tolist() + IDS[:, :5].tolist()
    for path in paths[:4]:  # answers that some paths get right
        sample = []
        for ids in prompts:
            with layer_path(model, path):
                written = model.generate(
                    torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=[0]
                )[0, len(ids) :].tolist()
            sample.append(lab.Question("", tokenizer.decode(written), ids, written))
        forced = Judge(model, tokenizer, sample, SMALL)
        jobs = [(row, p) for row in range(len(sample)) for p in paths]
        for (row, p), reward in zip(jobs, forced(jobs), strict=True):
            q = sample[row]
            with layer_path(model, p):
                again = model.generate(
                    torch.tensor([q.prompt_ids]), max_new_tokens=len(q.answer_ids),
                    do_sample=False, eos_token_id=[0],
                )[0, len(q.prompt_ids) :].tolist()  # fmt: skip
            assert reward == (again == q.answer_ids)
            assert reward == 1 or p != path
        before = forced.batch.layer_calls
        assert len(forced.table) == len(set(jobs)) and forced(jobs) and before > 0
        assert forced.batch.layer_calls == before  # nothing runs twice


def test_a_chain_saved_as_a_checkpoint(tmp_path):
    "Solution 2 of the exercises."
    model, path = family("llama"), (0, 2, 2, 1)
    with layer_path(model, path):
        chain = copy.deepcopy(model)
        expected = model(IDS, use_cache=False).logits
    stack = find_layers(chain)
    own = torch.nn.ModuleList(copy.deepcopy(layer) for layer in stack.layers)
    setattr(stack.owner, stack.name, own)
    chain.save_pretrained(tmp_path)
    found, _ = models.load(str(save_with_tokenizer(tmp_path)), device="cpu")
    assert found.config.num_hidden_layers == 4
    torch.testing.assert_close(found(IDS).logits, expected)


def save_with_tokenizer(folder):
    recipes.byte_tokenizer().save_pretrained(folder)
    return folder


def test_module_is_the_one_of_the_catalogue():
    from adaptlab import catalog

    assert catalog.find("cola").module == cola.__name__


def test_full_asks_for_what_the_hub_has(recorded, tmp_path):
    tokenizer = recipes.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = questions(FULL.replace(n_samples=20), tokenizer, 0)
    assert recorded.asked == [FULL.dataset] and len(found) == 20
    assert schemas.rows(FULL.dataset) >= FULL.n_samples
    assert all(q.answer in tuple("ABCD1234") and "\n" in q.prompt for q in found)
    other = FULL.replace(dataset="allenai/ai2_arc@ARC-Challenge#test", n_samples=2)
    assert len(questions(other, tokenizer, 0)) == 2
    with pytest.raises(ValueError, match="column"):
        questions(FULL.replace(answer="gold"), tokenizer, 0)


def test_resume_repeats_nothing(tmp_path, monkeypatch):
    cfg = tiny_world(tmp_path)
    root, real, done = tmp_path / "runs", lab.search_all, []

    def counted(judge, numbers, cfg, seed):
        done.append(sorted(numbers))
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(judge, numbers, cfg, seed)

    monkeypatch.setattr(lab, "search_all", counted)
    with pytest.raises(KeyboardInterrupt):
        launch("cola", cfg, root=root, progress=False)
    report = launch("cola", cfg, root=root, resume=True, progress=False)
    assert sorted(sum(done[:2], [])) == [0, 1, 2]  # the first chunk
    assert sorted(sum(done[3:], [])) == [3, 4]  # only the second is done again
    assert len(report.tables["items"]) == 5 * len(cfg.methods)


STD = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
       "intermediate_size": 48}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4}
MORE = {
    "gpt_neo": {"hidden_size": 32, "num_layers": 4, "num_heads": 4,
                "attention_types": [[["global", "local"], 2]]},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8},
    "mixtral": {**STD, "num_key_value_heads": 2, "num_local_experts": 2,
                "output_router_logits": True},
    "xglm": {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48},
    "opt": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 48,
            "word_embed_proj_dim": 32},
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "alibi": True},
    "phi": STD, "codegen": {**GPT, "rotary_dim": 4}, "gptj": {**GPT, "rotary_dim": 4},
}


def made(kind, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    special = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**special, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", MORE)
def test_more_architectures_run(kind):
    "Paths, cached generation, shared prefixes and batches."
    model = made(kind, **MORE[kind])
    paths = [(0, 1, 2, 3), (0, 3), (0, 1, 1, 1, 2, 3)]
    rows = [IDS[0].tolist(), IDS[1, :5].tolist(), IDS[0, 2:].tolist()]
    batch = PathBatch(model, rows, [2] * 3).each([(r, p) for p in paths for r in range(3)])
    cache = PathBatch(model, IDS)
    with torch.no_grad():
        for path in paths:
            for row in rows:
                alone = run_path(model, torch.tensor([row]), path)[0, -2:]
                torch.testing.assert_close(next(batch), alone, atol=1e-4, rtol=1e-3)
            fresh = run_path(model, IDS, path)
            torch.testing.assert_close(run_path(model, IDS, path, cache), fresh)
            with layer_path(model, path):
                fast, slow = (model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=c,
                                             eos_token_id=-1, pad_token_id=0)
                              for c in (True, False))
            assert torch.equal(fast, slow)


def test_other_architectures_are_refused_in_words():
    rwkv = made("rwkv", hidden_size=32, num_hidden_layers=4, attention_hidden_size=32)
    with pytest.raises(ValueError, match="not supported by PathBatch"):
        PathBatch(rwkv, IDS)
    assert torch.isfinite(run_path(rwkv, IDS, (0, 1, 1))).all()  # without sharing it runs
    jamba = made("jamba", **STD, num_experts=2, attn_layer_period=2, attn_layer_offset=1,
                 use_mamba_kernels=False, mamba_d_state=4)
    with layer_path(jamba, (0, 1, 1, 3)), pytest.raises(ValueError, match="cache"):
        jamba.generate(IDS, max_new_tokens=2)
    bart = made("bart", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4)
    bart.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_layers(bart)
