"""VTrans: masks, sizes, folding on three families, the constraint, bad input, the experiment."""

import copy

import pytest
import tiny_models
import torch
from torch import nn

from adaptlab import data as sources
from adaptlab import recipes
from adaptlab.bench import suites
from adaptlab.bench.runs import launch, start_run
from adaptlab.compression.vtrans import (
    UNITS, InformationBottleneckMask, VIBPruner, attention_profile, expected_size, find_layout, fit,
    norm_over)
from adaptlab.experiments import vtrans as told
from adaptlab.experiments.vtrans import FULL, SMALL, cut_like, tuned, unit_scores
from adaptlab.train import Training


def vit():
    torch.manual_seed(0)
    return recipes.TinyViT(dim=24, depth=2, heads=4).eval()


def llama(**more):
    torch.manual_seed(0)
    return recipes.tiny_llama(hidden_size=32, **more)


def shaken(model, **more):
    torch.manual_seed(1)
    pruner = VIBPruner(copy.deepcopy(model), **more)
    for mask in pruner.masks.values():
        mask.mu.data = 1 + 0.3 * torch.randn(mask.size)
        mask.rho.data = 2 * torch.randn(mask.size) - (1 if mask.size > 1 else 9)
    return pruner.attach().eval()


def images(n=4):
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))


IDS = torch.arange(20).view(2, 10) + 5
MODELS = {"vit": (vit, lambda: images()), "llama": (llama, lambda: {"input_ids": IDS}),
          "untied": (lambda: llama(tie=False), lambda: {"input_ids": IDS}),
          "bert": (lambda: recipes.tiny_bert(n_classes=3), lambda: {"input_ids": IDS})}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("units", [(u,) for u in UNITS] + [UNITS])
@torch.no_grad()
def test_sliced_is_masked(kind, units):
    make, inputs = MODELS[kind]
    pruner = shaken(make(), units=units)
    if "layers" in units:
        pruner.masks["layer_attn_0"].rho.data.fill_(9.0)
    if "ffn" in units:
        pruner.masks["ffn_1"].rho.data.fill_(9.0)
    sliced, x = pruner.fold_and_slice(), inputs()
    out = sliced(**x) if isinstance(x, dict) else sliced(x)
    masked = pruner(x)
    out, masked = getattr(out, "logits", out), getattr(masked, "logits", masked)
    torch.testing.assert_close(out, masked, atol=1e-5, rtol=0)
    size = sum(p.numel() for p in sliced.parameters())
    assert size == round((1 - pruner.hard_sparsity()) * pruner.full) < pruner.full


@torch.no_grad()
def test_cached_generation_of_a_sliced_llama():
    pruner = shaken(llama(layers=3), units=UNITS)
    pruner.masks["layer_attn_0"].rho.data.fill_(9.0)  # the layer that counts the cache's tokens
    sliced = pruner.fold_and_slice()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = sliced.generate(input_ids=IDS, use_cache=True, **settings)
    assert torch.equal(with_cache, sliced.generate(input_ids=IDS, use_cache=False, **settings))


def test_detached_model_is_as_before():
    model = vit()
    before = {n: p.clone() for n, p in model.named_parameters()}
    pruner = VIBPruner(model, train_weights=False).attach()
    assert not any(p.requires_grad for p in model.parameters())
    y = pruner.eval()(images())
    assert not torch.equal(y, pruner.train()(images()))
    pruner.detach()
    assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(model(images()), model(images()))


def test_fresh_masks_change_little_and_drop_nothing():
    torch.manual_seed(0)
    pruner, x = VIBPruner(vit()).attach(), torch.randn(50, 24)
    mask = pruner.masks["hidden"].train()
    assert ((mask(x) - x).abs() / x.abs()).mean() < 0.03
    assert pruner.hard_sparsity() == 0 and abs(pruner.expected_sparsity().item()) < 1e-6


def test_kl_depends_on_the_ratio_alone_and_is_zero_without_signal():
    a, b = (InformationBottleneckMask(1, init_std=0) for _ in range(2))
    a.mu.data.fill_(2.0), a.rho.data.fill_(1.0)
    b.mu.data.fill_(4.0), b.rho.data.fill_(1.0 + 2 * torch.tensor(2.0).log())
    torch.testing.assert_close(a.kl(), b.kl())
    assert a.kl() > 0
    a.mu.data.zero_()
    assert a.kl() == 0
    one = InformationBottleneckMask(1, init_mag=0, init_std=0)
    torch.testing.assert_close(one.kl(), torch.tensor(2.0).log() / 2)


def test_penalty_alone_drops_everything():
    mask = InformationBottleneckMask(5)
    adam = torch.optim.Adam(mask.parameters(), lr=0.1)
    for _ in range(200):
        adam.zero_grad()
        mask.kl().backward()
        adam.step()
    assert not mask.hard_mask().any()


def test_soft_size_goes_to_the_hard_one_and_to_the_ends():
    pruner = shaken(vit(), units=UNITS)
    pruner.slope = 1e5
    assert pruner.expected_sparsity().item() == pytest.approx(pruner.hard_sparsity(), abs=1e-6)
    nothing = {m: 0 for m in pruner.masks}
    assert pruner.size({}) == pruner.full
    assert pruner.size(nothing) == 10  # the biases of the classifier
    counts = {m: pruner.layout.sizes.get(m, (1,))[0] for m in pruner.masks}
    for m, n in counts.items():
        assert pruner.size(counts | {m: n - 1}) < pruner.full


def test_the_multipliers_ascend():
    pruner, batch = VIBPruner(vit(), target=0.5, warmup=0.0).attach(), (images(), torch.arange(4))
    optimizer, seen = pruner.optimizer(0.0), []
    for step in range(4):
        optimizer.zero_grad()
        pruner.loss(pruner(batch), batch, step)["constraint"].backward()
        optimizer.step()
        seen.append(pruner.lagrangian.tolist())
    first, second = zip(*seen, strict=True)
    assert list(first) == sorted(first, reverse=True) and first[-1] < first[0] < 0
    assert list(second) == sorted(second) and second[-1] > second[0] > 0


def test_target_rises_over_the_warm_up():
    pruner, batch = VIBPruner(vit(), target=0.5, warmup=0.5, steps=10).attach(), (
        images(), torch.arange(4))
    found = [float(pruner.loss(pruner(batch), batch, k)["target"]) for k in (0, 1, 5, 9)]
    assert found == pytest.approx([0, 0.1, 0.5, 0.5])


def test_noise_differs_per_token_and_not_in_evaluation():
    mask = InformationBottleneckMask(4, init_mag=1.0, repeat=2)
    x = torch.ones(2, 3, 8)
    y = mask(x)
    assert len(y.flatten().unique()) == y.numel()
    y = mask.eval()(x)
    assert torch.equal(y[0, 0], y[1, 2]) and torch.equal(y[..., 0], y[..., 1])


def test_kv_heads_take_their_queries_along():
    model = llama(heads=4, kv_heads=2)
    pruner = VIBPruner(model, units=("heads",)).attach()
    pruner.set_kept({m: torch.tensor([True, False]) for m in pruner.masks})
    attn, whole = pruner.fold_and_slice().model.layers[0].self_attn, model.model.layers[0].self_attn
    assert torch.equal(attn.q_proj.weight, whole.q_proj.weight[:16])
    assert torch.equal(attn.o_proj.weight, whole.o_proj.weight[:, :16])
    assert torch.equal(attn.k_proj.weight, whole.k_proj.weight[:8])


def test_flops_by_hand():
    model = llama(layers=1, heads=4, kv_heads=2, intermediate_size=16)
    layout, shapes = find_layout(model), {n: p.shape for n, p in model.named_parameters()}
    by_hand = 32 * (32 + 16 + 16 + 32) + 3 * 16 * 32 + 2 * 7 * 32
    assert expected_size(layout, shapes, {}, "flops", 7) == by_hand  # tied: no matrix of its own


def test_distillation_sees_hidden_states_and_checks_the_teacher():
    model, batch = vit(), (images(), torch.arange(4))
    pruner = VIBPruner(model, teacher=copy.deepcopy(model), init_mag=30.0).attach()
    assert float(pruner.loss(pruner(batch), batch, 0)["distilled"].detach()) == pytest.approx(
        0, abs=0.1)
    other = recipes.TinyViT(dim=24, depth=2, heads=4, n_classes=7)
    pruner = VIBPruner(vit(), teacher=other, distill=(1.0, 0.0)).attach()
    with pytest.raises(ValueError, match="same classes"):
        pruner.loss(pruner(batch), batch, 0)
    for shape in ({"dim": 24, "depth": 3}, {"dim": 32, "depth": 2}):
        with pytest.raises(ValueError, match="hidden states can't be compared"):
            VIBPruner(vit(), teacher=recipes.TinyViT(heads=4, **shape))


def test_a_look_at_the_masked_model_between_steps_leaves_no_states():
    model, batch = vit(), (images(), torch.arange(4))
    pruner = VIBPruner(model, teacher=copy.deepcopy(model)).attach()
    pruner(batch)  # without a loss, as one looks at it
    assert pruner.loss(pruner(batch), batch, 0)["distilled"].isfinite()


@pytest.mark.parametrize("variant", ["vtrans", "fast", "faster"])
def test_variants(variant):
    model, data = vit(), (images(40), torch.arange(40) % 10)
    found = fit(model, data, variant, steps=3, batch_size=4, device="cpu", init_mag=2.0, beta=0.1,
                mask_lr=0.15, target=0.3)
    same = all(torch.equal(p, q) for p, q in zip(
        found.pruner.model.parameters(), model.parameters(), strict=True))
    assert same == (variant == "faster")
    again = fit(model, data, variant, steps=3, batch_size=4, device="cpu", init_mag=2.0, beta=0.1,
                mask_lr=0.15, target=0.3)
    assert all(torch.equal(p, q) for p, q in zip(
        found.model.parameters(), again.model.parameters(), strict=True))


def test_norm_over_of_an_rms_norm():
    norm = llama().model.norm
    x, keep = torch.randn(3, 32), torch.arange(32) % 3 > 0
    y = norm_over(norm, x, keep)
    by_hand = x[:, keep] / (x[:, keep].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(y[:, keep], by_hand)
    assert not y[:, ~keep].any()


def test_attention_profile():
    bert = recipes.tiny_bert()
    with pytest.raises(ValueError, match="eager"):
        bert.set_attn_implementation("sdpa")
        attention_profile(bert, {"input_ids": IDS}, [5])
    bert.set_attn_implementation("eager")
    found = attention_profile(bert, {"input_ids": IDS}, [5])
    maps = bert(input_ids=IDS, output_attentions=True).attentions[0]
    torch.testing.assert_close(found[0, 1, 0], maps[0, 1, :, 0].sum() / 20)


# bad input


@pytest.mark.parametrize("settings, words", [
    ({"target": 1.0}, "target"), ({"target": -0.1}, "target"), ({"units": ("head",)}, "units"),
    ({"units": ()}, "empty"), ({"budget": "time"}, "budget"), ({"beta": -1.0}, "beta"),
    ({"kl_weights": {"hidden": 1.0}}, "kl_weights"), ({"steps": 0}, "steps")])
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        VIBPruner(vit(), **settings)


def test_bad_models_masks_and_states():
    for model in (nn.Linear(2, 2), recipes.SmallCNN()):
        with pytest.raises(ValueError, match="not supported"):
            VIBPruner(model)
    changed = vit()
    changed.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra"):
        VIBPruner(changed)
    with pytest.raises(ValueError, match="floating point"):
        InformationBottleneckMask(3)(torch.ones(2, 4))
    with pytest.raises(ValueError, match="floating point"):
        InformationBottleneckMask(3)(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="size"):
        InformationBottleneckMask(0)
    with pytest.raises(ValueError, match="init_mag = nan"):
        InformationBottleneckMask(3, init_mag=float("nan"))
    with pytest.raises(ValueError, match="attach"):
        VIBPruner(vit()).loss(torch.zeros(4, 10), (images(), torch.arange(4)), 0)
    with pytest.warns(UserWarning, match="warmup"):
        VIBPruner(vit(), warmup=1.5)
    pruner = shaken(vit(), target=0.01)
    batch = (images(), torch.arange(4))
    with pytest.raises(ValueError, match="already"):
        pruner.loss(pruner(batch), batch, 0)
    with pytest.raises(ValueError, match="attached already"):
        pruner.attach()
    with pytest.raises(ValueError, match="class numbers"):
        VIBPruner(vit()).attach().loss(torch.zeros(4, 10), (images(), torch.zeros(4, 10)), 0)
    with pytest.raises(ValueError, match="all heads and neurons"):
        pruner.set_kept({m: torch.full((k.size,), m == "hidden")
                         for m, k in pruner.masks.items()})
        pruner.fold_and_slice()
    with pytest.raises(ValueError, match="bool"):
        pruner.set_kept({m: torch.ones(k.size) for m, k in pruner.masks.items()})
    with pytest.raises(ValueError, match="multiple"):
        pruner.round_widths(0)
    with pytest.raises(ValueError, match="variant"):
        fit(vit(), batch, "slow")


# the experiment


def test_rivals_land_at_the_size_that_was_asked_for():
    model = vit()
    for kind in ("magnitude", "random"):
        small, reached = cut_like(model, 0.5, kind, 0, SMALL)
        assert reached == pytest.approx(0.5, abs=0.05)
        size = sum(p.numel() for p in small.parameters())
        assert size / sum(p.numel() for p in model.parameters()) == pytest.approx(1 - reached)
    scores = unit_scores(VIBPruner(model), "magnitude")
    fc1, fc2 = model.blocks[0].fc1, model.blocks[0].fc2
    torch.testing.assert_close(scores["ffn_0"], (fc1.weight.square().sum(1) + fc1.bias.square()
                                                 + fc2.weight.square().sum(0)).detach())
    with pytest.raises(ValueError, match="kind"):
        unit_scores(VIBPruner(model), "size")
    after = tuned(small, model, (images(8), torch.arange(8)), 0, SMALL.replace(
        tuning=Training(steps=1, batch_size=4)))
    assert not torch.equal(after.head.weight, small.head.weight)


def test_rivals_are_trained_as_long_as_an_arm_and_then_cut(monkeypatch):
    cfg = SMALL.replace(steps=3, batch_size=4, images=(100, 10), n_test=50, device="cpu",
                        targets=(0.3,), init_mag=3.0, beta=0.01, tuning=Training(steps=1))
    bed, trained, cut = told.digit_bed(0, cfg), [], []
    real_tuned, real_cut = told.tuned, told.cut_like

    def spy(model, teacher, data, seed, cfg, training=None):
        after = real_tuned(model, teacher, data, seed, cfg, training)
        if training is not None:
            trained.append((after, training.steps, training.batch_size, training.lr, model, data))
        return after

    monkeypatch.setattr(told, "tuned", spy)
    monkeypatch.setattr(told, "cut_like", lambda m, *a: cut.append(m) or real_cut(m, *a))
    told._rows(bed, 0, cfg, lambda m, b: 0.0)
    ((after, steps, batch, lr, model, data),) = trained
    assert (steps, batch, lr) == (cfg.steps, cfg.batch_size, cfg.lr)
    assert model is bed.model and data is bed.train
    assert len(cut) == 4 and all(m is after for m in cut)
    assert not torch.equal(after.head.weight, bed.model.head.weight)


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(seeds=(0,), steps=2, batch_size=4, images=(100, 10), n_test=50,
                        device="cpu", targets=(0.3, 0.4), init_mag=1.0, beta=0.1,
                        tuning=Training(steps=1, batch_size=4))
    monkeypatch.setattr(told, "_plot", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch("vtrans", cfg, root=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(told, "_rows", lambda *a: 1 / 0)  # nothing is done twice
    report = launch("vtrans", cfg, root=tmp_path, resume=True)
    assert {c.verdict for c in report.claims} == {"not decided at this scale"}
    assert len(report.claims) == 8 and len(report.tables["digits"]) == 7 + 3


def test_full_scale_path_with_a_tiny_model(tmp_path, monkeypatch):
    rows = {"sentence1": ["a b", "c", "d e"] * 4, "sentence2": ["b", "c", "e"] * 4,
            "label": [0, 1, 1] * 4}
    asked = []
    monkeypatch.setattr(sources, "load", lambda name, columns: asked.append(name) or rows)
    monkeypatch.setattr(suites.data, "load", lambda name, columns: asked.append(name) or rows)
    cfg = FULL.replace(model=tiny_models.roberta(tmp_path / "m", 2), device="cpu", seeds=(0,),
                       glue=("mrpc",), steps=2, batch_size=4, max_length=16, targets=(0.1, 0.2),
                       teacher_training=Training(steps=1, batch_size=4),
                       tuning=Training(steps=1, batch_size=4))
    report = told.experiment(cfg, start_run("vtrans", cfg, "full", root=tmp_path / "runs"))
    assert asked == ["nyu-mll/glue@mrpc#train", "nyu-mll/glue@mrpc#validation"]
    table = report.tables["glue"]
    asked_for = (table["method"] != "random") & (table["like"] != "fast")
    assert (table["after"].notna() == asked_for).all() and len(table) == 10
