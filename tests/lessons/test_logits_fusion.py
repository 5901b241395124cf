"""Dynamic logits fusion: the search, models that write, bad input, the experiment."""

import math
from functools import partial

import pytest
import tiny_models
import torch
import two_processes

from adaptlab import recipes
from adaptlab.arithmetic.logits_fusion import (
    DynamicFusionLogitsProcessor,
    DynamicLogitFusion,
    distances,
    dynamic_alpha,
    fuse_logits,
    gap_closed,
    same_tokens,
    score_ratio,
    static_fusion,
)
from adaptlab.bench.runs import start_run
from adaptlab.experiments import logits_fusion as told
from adaptlab.experiments.logits_fusion import FULL, SMALL, experiment
from adaptlab.train import Training
from one_seed import UNDECIDED, goes_on

VOCABULARY = 30


def rows(*shape, n=3, scale=2.0, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, VOCABULARY, generator=g, dtype=dtype) for _ in range(n)]


def divergence(a, b):
    "KL of softmax(a) against softmax(b), by torch's distributions."
    return torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b))


def objective(large, small, experts, alpha):
    "The paper's objective as it stands, [...]."
    fused = large + sum(alpha[..., t, None] * (e - small) for t, e in enumerate(experts))
    return sum((divergence(fused, large) - divergence(e, small)) ** 2
               + (divergence(large, fused) - divergence(small, e)) ** 2 for e in experts)


# fusion and distances


def test_no_strength_is_the_large_model_and_one_is_proxy_tuning():
    L, S, E = rows(4)
    assert torch.equal(fuse_logits(L, S, E, 0.0), L)
    assert torch.equal(static_fusion(0.0)(L, S, [E]).logits, L)
    torch.testing.assert_close(static_fusion()(L, S, [E]).logits, L + E - S)
    torch.testing.assert_close(fuse_logits(L, S, [E, L], [0.5, 2.0]), L + (E - S) / 2 + 2 * (L - S))
    each = torch.rand(4, 1)
    torch.testing.assert_close(fuse_logits(L, S, E, each), L + each * (E - S))


def test_distances_are_divergences_that_grow():
    L, S, E = rows(6, dtype=torch.float64)
    P, d = L.log_softmax(-1), E - S
    last = None
    for alpha in (0.0, 0.4, 1.0, 3.0):
        at = distances(P, d, alpha)
        torch.testing.assert_close(at.forward, divergence(L + alpha * d, L))
        torch.testing.assert_close(at.backward, divergence(L, L + alpha * d))
        if last is None:
            assert at.forward.abs().max() < 1e-12 and at.backward.abs().max() < 1e-12
        else:
            assert (at.forward > last.forward).all() and (at.backward > last.backward).all()
        last = at


# the search


@pytest.mark.parametrize("multi", ["sequential", "joint"])
@pytest.mark.parametrize("n", [1, 2])
def test_no_candidate_is_better(multi, n):
    "Against the paper's objective, for every candidate of the search."
    L, S, *E = rows(12, n=2 + n, dtype=torch.float64)
    alphas = torch.arange(0, 2.01, 0.25, dtype=torch.float64)
    step = dynamic_alpha(L, S, E, alphas, multi=multi)
    torch.testing.assert_close(step.objective, objective(L, S, E, step.alpha))
    torch.testing.assert_close(step.logits, fuse_logits(L, S, E, step.alpha))
    tried = torch.cartesian_prod(*[alphas] * n).reshape(-1, n)
    if multi == "sequential":
        tried = tried[(tried > 0).sum(1) <= 1]
    for alpha in tried:
        assert (step.objective <= objective(L, S, E, alpha.expand(12, n)) + 1e-9).all()
    if multi == "sequential":
        assert ((step.alpha > 0).sum(-1) <= 1).all()


def test_bisection_finds_what_the_grid_finds():
    L, S, E = rows(300)
    grid, fine = dynamic_alpha(L, S, E, bounds=True), dynamic_alpha(L, S, E, method="bisect")
    assert (fine.objective <= grid.objective + 1e-6).all()
    assert (fine.alpha - grid.alpha).abs().max() <= 0.1 + 1e-4  # mild rows: one minimum
    low, high = grid.bounds.sort(-1).values.unbind(-1)
    assert ((low - 1e-3 <= fine.alpha[:, 0]) & (fine.alpha[:, 0] <= high + 1e-3)).all()
    inside = high < 2
    assert inside.sum() > 100
    f = distances(L.log_softmax(-1), E - S, grid.bounds[:, 0]).forward
    torch.testing.assert_close(f[inside], divergence(E, S)[inside], rtol=1e-3, atol=1e-3)


def test_two_minima():
    "The grid takes its best candidate; bisection may come to the worse dip, then it takes 0."
    torch.manual_seed(1)
    L, S, E = (6 * torch.randn(300, VOCABULARY, dtype=torch.float64)[190] for _ in range(3))
    at = [objective(L, S, [E], torch.tensor([a], dtype=torch.float64)).item()
          for a in (0.0, 0.65, 0.95, 1.2, 1.5)]
    assert at[1] < at[0] < at[3] < min(at[2], at[4])  # a deep dip, a ridge, a dip above no move
    grid, found = dynamic_alpha(L, S, E), dynamic_alpha(L, S, E, method="bisect")
    assert abs(grid.alpha.item() - 0.65) < 0.1 and found.alpha.item() == 0
    torch.testing.assert_close(found.objective.item(), at[0])


@pytest.mark.parametrize("method", ["grid", "bisect"])
def test_small_moves_are_moves(method):
    "Ties are relative: however little an expert moved, large = small gives it, strength 1."
    S, N = rows(40, n=2, dtype=torch.float64)
    for size in (1e-2, 1e-3, 1e-4):
        step = dynamic_alpha(S, S, S + size * N, method=method)
        torch.testing.assert_close(step.alpha, torch.ones_like(step.alpha), rtol=0, atol=1e-2)
    S, N = S.float(), N.float()
    assert dynamic_alpha(S, S, S + 1e-3 * N, method=method).alpha.mean() > 0.9
    for shift in (0.0, 3.0, -0.1, 40.0):
        assert not dynamic_alpha(2 * N, S, S + shift, method=method).alpha.any()


@pytest.mark.parametrize("method", ["grid", "bisect"])
def test_special_cases(method):
    search = partial(dynamic_alpha, method=method)
    L, S, E = rows(20)
    alike = search(S, S, E)
    torch.testing.assert_close(alike.alpha, torch.ones(20, 1), rtol=0,
                               atol=1e-6 if method == "grid" else 1e-3)
    torch.testing.assert_close(alike.logits.softmax(-1), E.softmax(-1), rtol=0, atol=1e-3)
    assert alike.objective.max() < 1e-6
    for shift in (0.0, 3.0, -0.1):  # the expert is its base: every strength ties
        base = search(L, S, S + shift)
        assert not base.alpha.any() and torch.equal(base.logits, L)
    sure = search(10 * L, S, 4 * E)  # a large model that is much surer: the limit
    assert sure.alpha.max() == 2 and sure.alpha.min() >= 0
    assert torch.allclose(sure.logits.softmax(-1).sum(-1), torch.ones(20))


def test_constants_order_batch_and_twins():
    L, S, E = rows(5, 4)
    step = dynamic_alpha(L, S, E)
    assert step.alpha.shape == (5, 4, 1) and step.logits.shape == L.shape
    moved = dynamic_alpha(L + 7, S - 2, E + 1)
    torch.testing.assert_close(moved.logits.softmax(-1), step.logits.softmax(-1))
    order = torch.randperm(VOCABULARY)
    permuted = dynamic_alpha(L[..., order], S[..., order], E[..., order])
    torch.testing.assert_close(permuted.logits, step.logits[..., order])
    alone = dynamic_alpha(L[2, 3], S[2, 3], E[2, 3])
    torch.testing.assert_close(alone.logits, step.logits[2, 3])
    for multi in ("sequential", "joint"):
        one = dynamic_alpha(L, S, [E], multi=multi)
        assert torch.equal(one.logits, step.logits)
    torch.testing.assert_close(dynamic_alpha(L, S, [E, E]).logits, step.logits)


def test_half_precision_is_searched_in_float32():
    L, S, E = (x.bfloat16() for x in rows(8))
    step = dynamic_alpha(L, S, E)
    assert step.logits.dtype == torch.float32
    torch.testing.assert_close(step.alpha, dynamic_alpha(L.float(), S.float(), E.float()).alpha)


def test_forbidden_tokens():
    L, S, E = rows(6)
    L[:, 3], S[:, 5], E[:, 5] = -math.inf, -math.inf, -math.inf
    S[:, 8] = -math.inf
    for method in ("grid", "bisect"):
        step = dynamic_alpha(L, S, E, method=method)
        assert torch.isfinite(step.objective).all() and (step.logits[:, 3] == -math.inf).all()
        assert torch.equal(step.logits[:, [5, 8]], L[:, [5, 8]])  # nothing is said about them
    keep = [i for i in range(VOCABULARY) if i not in (3, 5, 8)]
    everywhere = [x.clone().index_fill_(1, torch.tensor([3, 5, 8]), -math.inf) for x in (L, S, E)]
    torch.testing.assert_close(dynamic_alpha(*everywhere).alpha,
                               dynamic_alpha(*(x[:, keep] for x in (L, S, E))).alpha)


def test_what_cannot_be_fused():
    with pytest.raises(TypeError, match="floating-point"):
        dynamic_alpha(*torch.ones(3, 2, VOCABULARY, dtype=torch.long))
    L, S, E = rows(4)
    for bad, words in ((S[:, :9], "one vocabulary"), (S[:2], "one batch")):
        with pytest.raises(ValueError, match=words):
            dynamic_alpha(L, bad, E)
    with pytest.raises(ValueError, match="no expert"):
        dynamic_alpha(L, S, [])
    for value in (math.nan, math.inf):
        broken = E.clone()
        broken[1, 2] = value
        with pytest.raises(ValueError, match="expert hold NaN"):
            dynamic_alpha(L, S, broken)
    with pytest.raises(ValueError, match="no token"):
        dynamic_alpha(torch.full_like(L, -math.inf), S, E)
    with pytest.raises(ValueError, match="device"):
        dynamic_alpha(L, S.to("meta"), E)
    for alphas in ([1.0], [1.0, 0.5], [-1.0, 0.0], [0.0, 0.0], [0.0, math.nan], [0.0, math.inf]):
        with pytest.raises(ValueError, match="growing candidates"):
            dynamic_alpha(L, S, E, alphas)
    for options in ({"method": "newton"}, {"multi": "all"}):
        with pytest.raises(ValueError, match="give 'grid'"):
            dynamic_alpha(L, S, E, **options)
    with pytest.raises(ValueError, match="needs the grid"):
        dynamic_alpha(L, S, [E, E], method="bisect", multi="joint")
    with pytest.raises(ValueError, match="combinations"):
        dynamic_alpha(L, S, [E] * 4, multi="joint")
    with pytest.raises(ValueError, match="finite"):
        fuse_logits(L, S, E, math.nan)
    with pytest.raises(ValueError, match="alpha has shape"):
        fuse_logits(L, S, E, [1.0, 2.0])


# models that write


def llama(seed, layers=1, **sizes):
    torch.manual_seed(seed)
    return recipes.tiny_llama(layers=layers, **sizes).eval()


@pytest.fixture(scope="module")
def family():
    return llama(0, 2), llama(1), [llama(2), llama(3)]


def stepwise(large, small, experts, ids, steps, choose):
    "Greedy writing without caches."
    for _ in range(steps):
        with torch.no_grad():
            found = [m(ids).logits[:, -1] for m in (large, small, *experts)]
        ids = torch.cat([ids, choose(*found[:2], found[2:]).logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("choose", [dynamic_alpha, partial(dynamic_alpha, method="bisect"),
                                    static_fusion([0.3, 0.9])])
def test_writing_with_caches_equals_writing_without(family, choose):
    ids = torch.randint(4, 260, (3, 6), generator=torch.Generator().manual_seed(0))
    fusion = DynamicLogitFusion(*family, choose=choose)
    said = fusion.generate(ids, max_new_tokens=7, do_sample=False)
    assert torch.equal(said, stepwise(*family, ids, said.shape[1] - 6, choose))
    assert len(fusion.trace) == said.shape[1] - 6 and fusion.trace[0].shape == (3, 2)


def test_each_model_reads_a_token_once(family):
    large, small, experts = family
    seen = []
    hook = small.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True)
    ids = torch.randint(4, 260, (2, 5))
    DynamicLogitFusion(large, small, experts).generate(ids, max_new_tokens=4, do_sample=False)
    hook.remove()
    assert seen == [5, 1, 1, 1]


def test_beams_take_their_caches_along(family):
    "Beam search over the processor, against one that reads the whole text at each step."
    large, small, experts = family
    ids = torch.randint(4, 260, (2, 5), generator=torch.Generator().manual_seed(1))
    fresh = DynamicFusionLogitsProcessor(small, experts)

    def forgetful(input_ids, scores):
        fresh._seen = None
        return fresh(input_ids, scores)

    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 4}
    restarts = []
    kept = DynamicFusionLogitsProcessor(small, experts)
    real = kept._unseen
    kept._unseen = lambda ids: restarts.append(real(ids)) or restarts[-1]
    one = large.generate(ids, logits_processor=[kept], **options)
    assert torch.equal(one, large.generate(ids, logits_processor=[forgetful], **options))
    assert restarts[0] == 5 and set(restarts[1:]) == {1}


def test_padding_on_the_left_changes_nothing(family):
    ids = torch.randint(4, 260, (2, 5), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 4).long().expand(2, -1)
    fusion = DynamicLogitFusion(*family)
    said = fusion.generate(ids, max_new_tokens=5, do_sample=False)
    again = fusion.generate(padded, mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(again[:, 4:], said)


def test_a_processor_starts_anew_with_another_text(family):
    large, small, experts = family
    processor = DynamicFusionLogitsProcessor(small, experts)
    for seed in (0, 1):
        ids = torch.randint(4, 260, (2, 5), generator=torch.Generator().manual_seed(seed))
        said = large.generate(ids, logits_processor=[processor], max_new_tokens=3, do_sample=False)
        assert torch.equal(said, stepwise(*family, ids, said.shape[1] - 5, dynamic_alpha))


def test_padded_vocabularies_and_short_contexts(family):
    large, small, experts = family
    wide = llama(0, 2)
    wide.resize_token_embeddings(272)
    ids = torch.randint(4, 260, (1, 5))
    with pytest.raises(ValueError, match="vocab_size"):
        DynamicLogitFusion(wide, small, experts)(ids)
    fusion = DynamicLogitFusion(wide, small, experts, vocab_size=260)
    assert (fusion(ids)[..., 260:] == -math.inf).all()
    assert fusion.generate(ids, max_new_tokens=3, do_sample=False).max() < 260
    with pytest.raises(ValueError, match="vocab_size = 261"):
        DynamicLogitFusion(wide, small, experts, vocab_size=261)(ids)
    limit = small.config.max_position_embeddings
    with pytest.raises(ValueError, match="positions"):
        DynamicFusionLogitsProcessor(small, experts)(
            torch.zeros(1, limit + 1, dtype=torch.long), torch.zeros(1, 260))
    for kind in (partial(DynamicLogitFusion, large), DynamicFusionLogitsProcessor):
        with pytest.raises(ValueError, match="no expert"):
            kind(small, [])
    with pytest.raises(ValueError, match="mask of these prompts"):
        DynamicFusionLogitsProcessor(small, experts, attention_mask=torch.ones(2, 5))(
            ids, torch.zeros(1, 260))


def test_experts_come_straight_from_training():
    "Dropout in any model would give other logits at every call."
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    large, small, expert = (GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=1, n_head=2)) for _ in range(3))
    fusion, ids = DynamicLogitFusion(large, small, [expert]), torch.randint(0, VOCABULARY, (2, 5))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted, written = fusion.eval()(ids), fusion.generate(ids, **options)
    assert torch.equal(fusion.train()(ids), wanted)
    assert torch.equal(fusion.generate(ids, **options), written)
    assert large.training and small.training and expert.transformer.drop.training


def test_tokenizers_and_ratios():
    tokenizer, other = recipes.byte_tokenizer(), recipes.byte_tokenizer()
    same_tokens(tokenizer, other)
    other.add_tokens(["<other>"])
    with pytest.raises(ValueError, match="<other>"):
        same_tokens(tokenizer, other)
    assert gap_closed(10, 40, 50) == 0.75 and score_ratio(40, 50) == 0.8
    with pytest.raises(ValueError, match="nothing"):
        gap_closed(1, 2, 1)
    with pytest.raises(ValueError, match="above 0"):
        score_ratio(1, 0)


# the experiment


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(seeds=(0,), names=(20, 10), training=Training(steps=1, batch_size=8))
    report = goes_on(told, cfg, tmp_path, monkeypatch)
    assert {c.verdict for c in report.claims} == UNDECIDED


def test_names_are_apart():
    for language in (*told.NEW, told.UNSEEN):
        test, choose, train = map(set, told.cut(language, 3))
        everywhere = set().union(*(set(own) | set(shared) for k, (own, shared) in
                                   told.names().items() if k != language))
        assert not test & (choose | train | everywhere | set(told.names()[language][0][:150]))
    x, y = told.encode(["ab"], 5)
    a, b = told.letters().index("a") + 1, told.letters().index("b") + 1
    assert x.tolist() == [[0, a, b, 0, 0]] and y.tolist() == [[a, b, 0, -100, -100]]


def test_full_scale_path_with_tiny_models(tmp_path, recorded):
    "Experts are tuned, kept, and fused on all tasks."
    large = tiny_models.llama(tmp_path / "large", layers=2, max_length=4096)
    small = tiny_models.llama(tmp_path / "small", layers=1, max_length=4096)
    cfg = FULL.replace(large=large, small=small, device="cpu", dtype="float32", questions=2,
                       tokens=2, expert_training=Training(steps=1, batch_size=2))
    report = experiment(cfg, start_run("logits_fusion", cfg, "full", root=tmp_path / "runs"))
    both = {f"{task}, all experts" for task in ("gsm8k", "trivia_qa", "mmlu")}
    assert set(report.tables) == {"gsm8k", "trivia_qa"} | both
    assert set(report.tables["gsm8k"]["method"]) == {"large", "static", "dynamic", "expert"}
    assert {"openai/gsm8k@main#train", "mandarjoshi/trivia_qa@rc.nocontext#validation",
            "cais/mmlu@all#test"} <= set(recorded.asked)
    assert told._last("2 + 2 = 4\n#### 1,004\nmore") == "1004"


TRAIN = """
import tempfile

import torch

from adaptlab import processes, recipes
from adaptlab.arithmetic.logits_fusion import DynamicLogitFusion
from adaptlab.bench.runs import start_run
from adaptlab.bench.testbeds import Pairs
from adaptlab.experiments import logits_fusion as told
from adaptlab.train import Training

folder, models = processes.together(tempfile.mkdtemp), []
for seed in (0, 1):
    torch.manual_seed(seed)
    models.append(recipes.tiny_llama(layers=2 - seed).eval())


def keep():
    models[1].save_pretrained(folder + "/small")
    recipes.byte_tokenizer().save_pretrained(folder + "/small")


processes.together(keep)
pairs = Pairs(tuple(f"{i} and {i} is" for i in range(16)), tuple(f" {2 * i}" for i in range(16)))
told.TASKS["sums"] = (lambda source: pairs, "", "", {})
cfg = told.FULL.replace(small=folder + "/small", device="cpu", dtype="float32",
                        expert_training=Training(steps=3, batch_size=8, lr=1e-2))
run = start_run("logits_fusion", cfg, "full", root=folder + "/runs")
expert = told._expert(cfg, run, "sums", 0)
run.close()
fusion = DynamicLogitFusion(*models, [expert])
ids = torch.arange(4, 24).view(2, 10)
logits = fusion(ids, logits_to_keep=1)[:, 0]
if processes.is_main():
    print("moved", (expert.lm_head.weight - models[1].lm_head.weight).norm().item())
    print("logits", *logits.flatten().tolist())
"""


def test_two_processes_tune_and_keep_an_expert_as_one(tmp_path, capsys):
    found = two_processes.assert_alike(TRAIN, tmp_path, capsys)
    assert found["moved"] > 0.1
