"""PYRA: matching and merging against loops, layouts of ViTs, bad input, the experiment."""

import copy
import warnings
from functools import partial

import pytest
import tiny_models
import torch
import two_processes
from torch import nn
from torch.nn import functional as F
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
)

from adaptlab import adapters, evaluate, modules, recipes
from adaptlab.bench.runs import start_run
from adaptlab.experiments import pyra as told
from adaptlab.experiments.pyra import FULL, PHOTOS, SMALL, experiment
from adaptlab.modular.pyra import (
    PAPER,
    MergingBlock,
    PYRAModulator,
    apply_token_merging,
    bipartite_soft_matching,
    flops,
    merge_source,
    merge_wavg,
    merging_schedule,
    parse_r,
    pyra_param_groups,
    remove_token_merging,
    vit_blocks,
)
from adaptlab.train import Training
from one_seed import goes_on

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 64, "image_size": 32, "patch_size": 4}


def hf(kind=ViTForImageClassification, config=ViTConfig, **more):
    torch.manual_seed(0)
    return kind(config(**TINY, **more)).eval()


def course(**sizes):
    torch.manual_seed(0)
    return recipes.TinyViT(**{"patch_size": 4, "dim": 32, "depth": 3} | sizes).eval()


# a stand-in with the attribute names of timm


class TimmAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        return x * self.gamma


class TimmMlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class TimmBlock(nn.Module):
    def __init__(self, dim=32, heads=4):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), TimmAttention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), TimmMlp(dim)
        self.ls1, self.ls2, self.drop_path1, self.drop_path2 = (
            Scale(dim), Scale(dim), nn.Identity(), nn.Identity())

    def forward(self, x, attn_mask=None):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Timm(nn.Module):
    def __init__(self, class_token=True, dim=32, patches=16):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.randn(1, patches + class_token, dim))
        self.blocks = nn.Sequential(*(TimmBlock(dim) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, 0] if self.cls_token is not None else x.mean(1))


def timm(**more):
    torch.manual_seed(0)
    return Timm(**more).eval()


MODELS = {"vit": (hf, (3, 32)), "course": (course, (1, 28)), "timm": (timm, (3, 32)),
          "deit": (partial(hf, DeiTForImageClassificationWithTeacher, DeiTConfig), (3, 32))}


@pytest.fixture(params=MODELS)
def case(request):
    make, (channels, side) = MODELS[request.param]
    x = torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(1))
    return make(), x


def logits(model, x):
    return modules.logits_of(model(x))


# matching and merging


def by_loops(metric, r, class_token, distill):
    "Who leaves, most alike first, and whom each joins, as positions; one sample."
    m = metric.double() / metric.double().norm(dim=1, keepdim=True)
    found = []
    for i in range(2 * class_token, len(m), 2):
        found.append(max((float(m[i] @ m[j]), i, j) for j in range(1, len(m), 2)
                         if not (distill and j == 1)))
    return [(i, j) for _, i, j in sorted(found, reverse=True)[:r]]


@pytest.mark.parametrize("n", [4, 9, 16, 31])
@pytest.mark.parametrize("special", [(False, False), (True, False), (True, True)])
def test_matching_and_order_against_loops(n, special):
    torch.manual_seed(n)
    metric, x = torch.randn(2, n, 6), torch.randn(2, n, 3)
    for r in range(1, (n - sum(special)) // 2 + 1):
        plan = bipartite_soft_matching(metric, r, *special)
        merged = plan.merge(x)
        assert merged.shape == (2, n - r, 3)
        for b in range(2):
            pairs = by_loops(metric[b], r, *special)
            assert [(2 * int(i), 2 * int(j) + 1) for i, j in
                    zip(plan.src[b], plan.dst[b], strict=True)] == pairs
            total, gone = x[b].clone(), {i for i, _ in pairs}
            for i, j in pairs:
                total[j] += x[b, i]
            stay, odd = [i for i in range(0, n, 2) if i not in gone], list(range(1, n, 2))
            if special[1]:
                order = [stay[0], odd[0], *stay[1:], *odd[1:]]
            else:
                order = stay + odd
            if special[0]:
                torch.testing.assert_close(merged[b], total[order])
            else:  # without a class token, those that stay are sorted by likeness
                torch.testing.assert_close(merged[b].sort(0).values, total[order].sort(0).values)


@pytest.mark.parametrize("special", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("mode", ["sum", "mean", "amax"])
def test_unmerge_puts_back_what_each_token_became(special, mode):
    torch.manual_seed(0)
    x = torch.randn(2, 14, 4)
    plan = bipartite_soft_matching(torch.randn(2, 14, 5), 5, *special)
    back = plan.unmerge(plan.merge(x, mode))
    where = plan.merge(torch.eye(14).expand(2, -1, -1), "amax")  # [B, out, in]
    torch.testing.assert_close(back, where.mT @ plan.merge(x, mode))
    nothing = bipartite_soft_matching(torch.randn(2, 14, 5), 0, *special)
    assert nothing.merge(x) is x and torch.equal(nothing.unmerge(x), x)
    assert merge_wavg(nothing, x)[0] is x and (merge_wavg(nothing, x)[1] == 1).all()


def test_special_tokens_stay_alone_even_if_all_are_alike():
    metric = torch.ones(1, 10, 4)
    plan = bipartite_soft_matching(metric, 4, True, True)
    where = merge_source(plan, None)
    assert torch.equal(where[0, :2], torch.eye(10)[:2]) and (where.sum(1) == 1).all()
    assert plan.src[0].tolist() == [1, 2, 3, 4]  # ties in order, on each device alike


def test_too_many_are_cut_with_a_warning():
    metric = torch.randn(1, 9, 4)
    with pytest.warns(UserWarning, match="at most 4"):
        plan = bipartite_soft_matching(metric, 6)
    assert plan.src.shape == (1, 4)
    for n in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert bipartite_soft_matching(torch.randn(1, n, 4), 3).src.shape[1] == 0


@pytest.mark.parametrize("metric, r, words", [
    (torch.ones(3, 4), 1, r"\[batch, tokens, width\]"), (torch.ones(1, 4, 4), -1, "negative"),
])
def test_no_matching(metric, r, words):
    with pytest.raises(ValueError, match=words):
        bipartite_soft_matching(metric, r)


@pytest.mark.parametrize("x, size, words", [
    (torch.ones(1, 6), None, "width"), (torch.ones(1, 5, 2), None, "6"),
    (torch.ones(1, 6, 2), torch.zeros(1, 6, 1), "> 0"),
    (torch.ones(1, 6, 2), torch.ones(1, 6), "> 0"),
])
def test_no_merge(x, size, words):
    plan = bipartite_soft_matching(torch.randn(1, 6, 4), 2)
    with pytest.raises(ValueError, match=words):
        merge_wavg(plan, x, size)


def test_other_tokens_than_were_matched_are_refused():
    plan = bipartite_soft_matching(torch.randn(2, 9, 4), 3)
    for x in (torch.randn(2, 12, 5), torch.randn(1, 9, 5), torch.randn(4, 9, 5)):
        for use in (plan.merge, plan.split, lambda x: merge_wavg(plan, x)):
            with pytest.raises(ValueError, match=r"give the \[2, 9, width\]"):
                use(x)
    with pytest.raises(ValueError, match="give the 6 that are left"):
        plan.unmerge(torch.randn(2, 9, 5))
    with pytest.raises(ValueError, match="give one for each"):
        PYRAModulator(5, 3)(torch.randn(2, 3, 5), torch.randn(2, 1, 5))


def test_matching_is_done_in_float32_and_takes_zeros():
    torch.manual_seed(0)
    metric = torch.randn(2, 20, 8).bfloat16()
    metric[:, 5] = 0
    plan = bipartite_soft_matching(metric, 8)
    exact = bipartite_soft_matching(metric.float(), 8)
    assert torch.equal(plan.src, exact.src) and torch.equal(plan.dst, exact.dst)
    with torch.autocast("cpu", torch.bfloat16):
        inside = bipartite_soft_matching(metric.float(), 8)
    assert torch.equal(inside.src, exact.src)
    x, size = merge_wavg(plan, metric)
    assert x.dtype == torch.bfloat16 and size.dtype == torch.float32 and x.isfinite().all()


def test_gradients_flow_through_tokens_only():
    torch.manual_seed(0)
    metric, x = torch.randn(1, 9, 4, requires_grad=True), torch.randn(1, 9, 3, requires_grad=True)
    modulator = PYRAModulator(3, 4)
    nn.init.normal_(modulator.W_D)
    out, _ = merge_wavg(bipartite_soft_matching(metric, 4), x, None, modulator)
    out.square().sum().backward()
    assert metric.grad is None and x.grad.abs().sum(-1).min() > 0
    assert all(p.grad.abs().sum() > 0 for p in modulator.parameters())


def test_modulator_by_the_papers_formula():
    torch.manual_seed(0)
    src, dst, m = torch.randn(2, 3, 5), torch.randn(2, 3, 5), PYRAModulator(5, 3)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_()
    for b in range(2):  # columns are tokens, as the paper writes them
        s, t = src[b].T, dst[b].T
        M = m.norm((s + t).T).T
        d_D, d_r = M @ m.W_r, m.W_D @ M
        hat = 2 * torch.sigmoid(d_D) * s
        torch.testing.assert_close(m(src, dst)[b].T, s + (2 * torch.sigmoid(d_r) - 1) * hat)
    start = PYRAModulator(400, 300)
    assert start.W_r.abs().max() <= 1 and abs(start.W_r.detach().std() - 3**-0.5) < 0.05
    with pytest.raises(ValueError, match="made for 3"):
        m(src[:, :2], dst[:, :2])
    with pytest.raises(ValueError, match="r = 0"):
        PYRAModulator(5, 0)


def test_unweighted_modulation_does_not_see_sizes():
    torch.manual_seed(0)
    x, size = torch.randn(1, 9, 3), torch.randint(1, 9, (1, 9, 1)).float()
    plan, m = bipartite_soft_matching(torch.randn(1, 9, 4), 4), PYRAModulator(3, 4, False)
    nn.init.normal_(m.W_D)
    u, v = 2 * plan.src[0], 2 * plan.dst[0] + 1  # positions of the pairs
    total = x * size
    for i, j, token in zip(u, v, m(x[:, u], x[:, v])[0], strict=True):
        total[0, i] = token * size[0, i]
        total[0, j] = total[0, j] + total[0, i]
    left = [i for i in range(0, 9, 2) if i not in u.tolist()] + [1, 3, 5, 7]
    merged = merge_wavg(plan, x, size, m)[0]
    torch.testing.assert_close(merged, total[:, left] / plan.merge(size))


# schedules


def test_the_papers_schedules_fit_their_models():
    for level, known in PAPER.items():
        for (depth, n), removed in known.items():
            assert merging_schedule(depth, n, level) == removed and len(removed) == depth
            for r in removed:
                assert r <= (n - 1) // 2
                n -= r
    assert sum(PAPER["low"][12, 197]) == 186 and sum(PAPER["low"][24, 197]) == 190
    rule = [round(196 / 12)] * 11 + [10]  # the general rule gives the paper's low schedule
    assert rule == PAPER["low"][12, 197]


@pytest.mark.parametrize("r", [-1, [1, 2, 3, 4], [1, -1], [1.5]])
def test_no_schedule(r):
    with pytest.raises(ValueError, match="give numbers >= 0"):
        parse_r(3, r)
    with pytest.raises(ValueError, match="'low' or 'high'"):
        merging_schedule(3, 17, "middle")
    with pytest.raises(ValueError, match=">= 1"):
        merging_schedule(0, 17)


# models


def test_nothing_merged_is_the_same_model(case):
    model, x = case
    before, names = logits(model, x), set(model.state_dict())
    apply_token_merging(model, 0)
    torch.testing.assert_close(logits(model, x), before)
    assert set(model.state_dict()) == names
    kinds = {type(b) for b in model.modules() if isinstance(b, MergingBlock)}
    remove_token_merging(model)
    assert torch.equal(logits(model, x), before)
    assert kinds and not any(isinstance(b, MergingBlock) for b in model.modules())


def test_merged_models(case):
    "Length, sizes, one place for each token, independence of samples, no memory of a pass."
    model, x = case
    apply_token_merging(model, [6, 3, 1])
    n = next(p for k, p in model.named_parameters() if "pos" in k).shape[1]
    y = logits(model, x)
    special = 2 if any("distillation" in k for k, _ in model.named_parameters()) else 1
    size = next(b for b in model.modules() if isinstance(b, MergingBlock)).flow.size
    assert size.shape == (3, n - 10, 1) and (size[:, :special] == 1).all()  # in front, and alone
    torch.testing.assert_close(logits(model, x[[2, 0]]), y[[2, 0]])
    flow = next(b for b in model.modules() if isinstance(b, MergingBlock)).flow
    torch.testing.assert_close(flow.size.sum(1), torch.full((2, 1), float(n)))
    plain = apply_token_merging(remove_token_merging(model), [6, 3, 1], pyra=False)
    assert torch.equal(logits(plain, x), y)  # modulators start as plain merging


def test_a_whole_pass_against_plain_code():
    model, x = course(), torch.randn(2, 1, 28, 28)
    apply_token_merging(model, [20, 9, 4])
    with torch.no_grad():
        for block in model.blocks:
            block.pyra.W_D.normal_()
    tokens, size = model.embed(x), torch.ones(2, 50, 1)
    for block in model.blocks:
        h = block.norm1(tokens)
        q, k, v = (getattr(block.attn, f"{p}_proj")(h).unflatten(-1, (4, 8)).transpose(1, 2)
                   for p in "qkv")
        scores = (q @ k.mT / 8**0.5 + size.log().mT[:, None]).softmax(-1)
        tokens = tokens + block.attn.o_proj((scores @ v).transpose(1, 2).flatten(2))
        plan = bipartite_soft_matching(k.mean(1), block.r)
        tokens, size = merge_wavg(plan, tokens, size, block.pyra)
        tokens = tokens + block.fc2(block.act(block.fc1(block.norm2(tokens))))
    expected = model.head(model.norm(tokens[:, 0]))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    remove_token_merging(model)
    apply_token_merging(model, [20, 9, 4], prop_attn=False, pyra=False)
    assert not torch.allclose(model(x), expected, atol=1e-3)


def test_proportional_attention_is_exact_where_merged_tokens_were_equal():
    model = course()
    torch.manual_seed(0)
    few, counts = torch.randn(2, 9, 32), torch.tensor([1, 3, 1, 2, 4, 1, 1, 2, 1])
    block = apply_token_merging(model, 0).blocks[1]  # reads the sizes that it is given
    block.flow.size = counts[None, :, None].float().expand(2, -1, -1)
    merged = block(few)
    whole = vit_blocks(course())["blocks.1"](few.repeat_interleave(counts, 1))
    torch.testing.assert_close(merged.repeat_interleave(counts, 1), whole)


def test_without_a_class_token():
    model, x = timm(class_token=False), torch.randn(2, 3, 32, 32)
    apply_token_merging(model, [8, 4, 2])
    model(x)
    size = model.blocks[0].flow.size
    assert size.shape == (2, 2, 1) and (size.sum(1) == 16).all()
    with pytest.raises(ValueError, match="cls_token"):
        apply_token_merging(timm(class_token=False), 2, class_token=True)


def test_a_schedule_that_does_not_fit_is_cut():
    model = course(patch_size=7)
    with pytest.warns(UserWarning, match=r"becomes \[8, 4, 2\]"):
        apply_token_merging(model, 16)
    assert [b.pyra.r for b in model.blocks] == [8, 4, 2]
    assert model(torch.randn(1, 1, 28, 28)).shape == (1, 10)
    other = hf()
    apply_token_merging(other, [30, 10, 5])
    with pytest.raises(ValueError, match="fits the images"), pytest.warns(UserWarning):
        other(torch.randn(1, 3, 16, 16), interpolate_pos_encoding=True)


def test_what_is_refused():
    model, x = hf(), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="no tokens are merged"):
        remove_token_merging(model)
    apply_token_merging(model, 0)
    with pytest.raises(ValueError, match="already"):
        apply_token_merging(model, 2)
    block = model.vit.layers[0]
    with pytest.raises(ValueError, match="mask"):
        block(torch.randn(1, 65, 32), torch.ones(1, 1, 65, 65))
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointing"):
        model.train()(x)
    with pytest.raises(TypeError, match="no blocks"):
        apply_token_merging(recipes.MLP(), 1)
    window = timm()
    window.blocks[1].attn.relative_position_bias_table = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="relative_position_bias_table"):
        apply_token_merging(window, 1)
    assert not any(isinstance(m, MergingBlock) for m in window.modules())
    prompted = timm()
    prompted.prompt_tokens = nn.Parameter(torch.ones(1, 2, 32))
    with pytest.raises(ValueError, match="prompts"):
        apply_token_merging(prompted, 1)


def test_copies_go_their_own_way():
    model, x = course(), torch.randn(2, 1, 28, 28)
    apply_token_merging(model, [10, 5, 2])
    other = copy.deepcopy(model)
    assert other.blocks[0].flow is other.blocks[2].flow is not model.blocks[0].flow
    y = model(x)
    other(x[:1])
    assert torch.equal(model(x), y)
    other.load_state_dict(model.state_dict())


def test_lora_beside_it_trains_and_merges_into_the_weights():
    model, x = hf(), torch.randn(4, 3, 32, 32)
    apply_token_merging(model, [30, 10, 5])
    make = partial(adapters.LoraAdapter, rank=2, alpha=2)
    adapters.attach(model, make, ["q_proj", "k_proj", "v_proj"],
                    also_train=("classifier", "pyra"))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    groups = pyra_param_groups(model, lr=1e-2, pyra_lr=0.05, weight_decay=0.1)
    assert sum(len(g["params"]) for g in groups) == len(adapters.trainable_parameters(model))
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {
        (1e-2, 0.1), (1e-2, 0.0), (0.05, 0.1), (0.05, 0.0)}
    adam = torch.optim.AdamW(groups)
    model.train()
    for _ in range(3):
        adam.zero_grad()
        F.cross_entropy(logits(model, x), torch.tensor([0, 1, 0, 1])).backward()
        adam.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])}
    assert any("pyra.W_D" in k for k in moved) and not any("fc1" in k for k in moved)
    model.eval()
    y = logits(model, x)
    torch.testing.assert_close(logits(adapters.merge(model), x), y, rtol=1e-4, atol=1e-5)


def test_the_rate_of_the_modulators_is_applied():
    "In the official code it never is."
    model = course()
    apply_token_merging(model, [10, 5, 2])
    before = copy.deepcopy(model.state_dict())
    sgd = torch.optim.SGD(pyra_param_groups(model, 0.1, 0.0, 0.0))
    model(torch.randn(2, 1, 28, 28)).square().sum().backward()
    sgd.step()
    for name, value in model.state_dict().items():
        if not name.endswith("k_proj.bias"):  # softmax does not see a bias of the keys
            assert torch.equal(value, before[name]) == ("pyra" in name), name
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trainable"):
        pyra_param_groups(model, 0.1, 0.1)


def test_the_last_block_costs_the_class_token_nothing(case):
    model, x = case
    before = logits(model, x)
    apply_token_merging(model, [0, 0, 5])
    torch.testing.assert_close(logits(model, x), before)


def test_counts_of_a_vit_base():
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig())
        apply_token_merging(model, merging_schedule(12, 197, "high"))
    own = sum(p.numel() for k, p in model.named_parameters() if "pyra" in k)
    assert own == 192 + 12 * 768 + 12 * 2 * 768 == 9_408 + 18_432


def test_operations_are_those_that_are_done(case):
    model, x = case
    for removed in (0, [6, 3, 1]):
        apply_token_merging(model, removed)
        rows = flops(model)
        assert [r.tokens - r.out for r in rows] == ([0] * 3 if removed == 0 else removed)
        blocks = sum(r.attention + r.matching + r.mlp for r in rows)
        counted = evaluate.count_flops(lambda: model(x[:1]))
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        side = x.shape[-1] // conv.stride[0]
        heads = [m for k, m in model.named_modules() if isinstance(m, nn.Linear)
                 and k.rpartition(".")[2] in ("head", "classifier", "cls_classifier",
                                              "distillation_classifier")]
        rest = 2 * side**2 * conv.weight.numel() + sum(2 * m.weight.numel() for m in heads)
        assert counted == blocks + rest
        remove_token_merging(model)


def test_half_precision_keeps_its_dtype():
    model = course().bfloat16()
    apply_token_merging(model, [20, 9, 4])
    with torch.no_grad():
        model.blocks[0].pyra.W_D.normal_()
    y = model(torch.randn(2, 1, 28, 28).bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


# the experiment


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(seeds=(0,), images=(32, 32), shape=(16, 2, 2), rounds=1,
                        training=Training(steps=1, batch_size=8))
    report = goes_on(told, cfg, tmp_path, monkeypatch)
    verdicts = {c.verdict for c in report.claims if "beats" in c.text}
    assert verdicts == {"not decided at this scale"}
    counts = report.tables["digits"].set_index("method")["trained"]
    pyra = counts["LoRA + PYRA"] - counts["LoRA + merging"]
    assert pyra == 14 + 3 * 3 * 64
    assert counts["LoRA + merging, more rank"] - counts["LoRA + merging"] >= pyra


TRAIN = """
import torch
from adaptlab import processes, recipes
from adaptlab.bench.testbeds import Bed
from adaptlab.experiments import pyra as told
from adaptlab.train import Training

torch.manual_seed(0)
model, x = recipes.TinyViT(), torch.randn(32, 1, 28, 28)
told._adapt(model, Bed(model, (x, torch.arange(32) % 10), None, None), 0, 1e-2, pyra=True,
            removed=(8, 4, 2), device="cpu", training=Training(steps=3, batch_size=8))
if processes.is_main():
    print("logits", *model.eval()(x[:1]).flatten().tolist())
"""


def test_two_processes_train_as_one(tmp_path, capsys):
    two_processes.assert_alike(TRAIN, tmp_path, capsys)


def test_lora_starts_alike_with_and_without_modulators():
    seen = []
    for pyra in (False, True):
        model = recipes.TinyViT()
        bed = told.Bed(model, (torch.randn(8, 1, 28, 28), torch.zeros(8).long()), None, None)
        told._adapt(model, bed, 0, 1e-9, removed=(8, 4, 2), pyra=pyra, device="cpu",
                    training=Training(steps=1, batch_size=8))
        seen.append([v for k, v in model.state_dict().items() if k.endswith(".A")])
    assert seen[0] and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*seen, strict=True))


def test_full_scale_path_with_tiny_models(tmp_path, recorded):
    "Speed and all sets, from data of the hub's form to tables."
    short = Training(steps=1, batch_size=2, weight_decay=1e-4)
    cfg = FULL.replace(vit=tiny_models.vit(tmp_path / "vit", patch=8), device="cpu",
                       seeds=(0,), shape=(16, 2, 2), batch=1, rounds=1, photo_rank=2,
                       photo_pyra_lrs=(1e-3, 1e-2), photo_training=short)
    report = experiment(cfg, start_run("pyra", cfg, "full", root=tmp_path / "runs"))
    photos = report.tables["photos"]
    assert sorted(photos["task"].unique()) == sorted(FULL.photos) == sorted(PHOTOS)
    assert set(photos["method"]) == {"LoRA", "merging low", "merging high", "PYRA low",
                                     "PYRA high"}
    assert {PHOTOS[t][0] for t in PHOTOS} <= set(map(str, recorded.asked))
    assert len(report.tables["speed"]) == 3


def test_it_compiles_without_a_break():
    torch.manual_seed(0)
    model = apply_token_merging(recipes.TinyViT().eval(), (8, 4, 2))
    for m in model.modules():
        if isinstance(m, PYRAModulator):
            torch.nn.init.normal_(m.W_D)
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(found, model(x))
