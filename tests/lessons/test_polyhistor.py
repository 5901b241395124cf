"""Polyhistor: generators, Kronecker products that are not made, real backbones, full scale."""

import copy
import warnings
from functools import partial

import pytest
import torch
import two_processes
from torch import nn

from adaptlab import adapters
from adaptlab.bench.runs import start_run
from adaptlab.experiments import polyhistor as told
from adaptlab.experiments.polyhistor import FULL, PREPARE, RATES, SCENES, SMALL, experiment
from adaptlab.modular.polyhistor import (
    Branch,
    DecomposedHyperNetwork,
    LayerwiseScalingKernel,
    MLPDecoder,
    MultiTaskLoss,
    PolyhistorConfig,
    PolyhistorModel,
    TaskAdapters,
    delta_m,
    export_adapters,
    load_adapters,
    normals_loss,
    regression_loss,
    segmentation_loss,
)
from adaptlab.train import Training
from one_seed import goes_on

MODES = ("lite", "polyhistor", "hyperformer", "templates", "adapter", "shared", "decoders")


def config(mode="lite", **more):
    return PolyhistorConfig(**{"tasks": ("a", "b"), "mode": mode, "reduction": 4, "embed_dim": 6,
                               "rank": 2} | more)


def swin(**more):
    from transformers import SwinBackbone, SwinConfig

    torch.manual_seed(0)
    return SwinBackbone(SwinConfig(**{
        "image_size": 32, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4],
        "window_size": 4, "drop_path_rate": 0.0, "out_indices": (1, 2, 3, 4)} | more))


def model_of(mode="lite", backbone=None, **more):
    backbone = swin() if backbone is None else backbone
    torch.manual_seed(1)
    made = config(mode, **more)
    return PolyhistorModel(backbone, made, {
        t: MLPDecoder(backbone.channels, 3, hidden=8) for t in made.tasks})


def moved(model):
    "Adapters away from their start."
    g = torch.Generator().manual_seed(2)
    for p in model.adapters.parameters():
        p.data.add_(0.3 * torch.randn(p.shape, generator=g))
    return model


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))

# pieces


@pytest.mark.parametrize("kind", ["factors", "weight"])
def test_generating_all_at_once_is_one_by_one(kind):
    torch.manual_seed(0)
    net = DecomposedHyperNetwork(3, [(8, 2), (16, 4), (8, 2)], 5, 2, 2, kind).double()
    for p in net.parameters():
        p.data.normal_()
    made = net.generate(torch.tensor([2, 0]))
    for layer, (D, U) in enumerate(made):
        for row, task in enumerate((2, 0)):
            down, up = net(task, layer)
            torch.testing.assert_close(D[row], down)
            torch.testing.assert_close(U[row], up)
    assert made[1][0].shape == (2, 2, 16, 4) and made[1][1].shape == (2, 2, 4, 16)
    rank = torch.linalg.matrix_rank(made[1][0][0, 0], rtol=1e-4)
    assert rank <= 2 if kind == "factors" else rank == 4


def test_the_weight_reading_stays_in_a_space_of_r_dimensions():
    "All matrices of a shape are mixtures of r, whatever the embeddings."
    net = DecomposedHyperNetwork(6, [(8, 4)] * 2, 5, 3, decomposition="weight")
    made = net.generate(torch.arange(6))
    rows = torch.cat([D.flatten(1) for D, _ in made])
    assert torch.linalg.matrix_rank(rows, rtol=1e-4) == 3


@pytest.mark.parametrize("scale, templates, a, b", [(1, 1, 8, 2), (3, 1, 8, 2), (4, 2, 2, 8)])
def test_products_and_their_gradients_without_the_kronecker_product(scale, templates, a, b):
    torch.manual_seed(0)
    kernel = LayerwiseScalingKernel(scale, templates, noise=1.0).double()
    h = torch.randn(2, 7, scale * a, dtype=torch.float64, requires_grad=True)
    template = torch.randn(2, templates, a, b, dtype=torch.float64, requires_grad=True)
    dense = sum(torch.stack([torch.kron(kernel.S[m], t[m]) for t in template])
                for m in range(templates))
    torch.testing.assert_close(kernel(template), dense)
    found, wanted = kernel.shrink(h, template).mT.flatten(2), h @ dense
    torch.testing.assert_close(found, wanted)
    inputs = [h, template, kernel.S]
    for g, w in zip(torch.autograd.grad(found.square().sum(), inputs),
                    torch.autograd.grad(wanted.square().sum(), inputs), strict=True):
        torch.testing.assert_close(g, w)


def test_scale_one_and_kernel_one_is_polyhistor():
    "Equal widths: Lite's templates are the adapters."
    lite, poly = (TaskAdapters([16, 16], config(mode)) for mode in ("lite", "polyhistor"))
    poly.hyper.load_state_dict(lite.hyper.state_dict())
    for pair in lite.kernels:
        for kernel in pair:
            kernel.S.data.fill_(1.0)
    for p, q in zip(lite.hyper.parameters(), poly.hyper.parameters(), strict=True):
        p.data.add_(0.1)
        q.data.copy_(p)
    h = torch.randn(2, 5, 16)
    for a, b in zip(lite(torch.arange(2)), poly(torch.arange(2)), strict=True):
        torch.testing.assert_close(a(h), b(h))
        torch.testing.assert_close(a.dense(), b.dense())


def test_one_more_task_costs_one_vector():
    def numbers(mode, tasks):
        made = TaskAdapters([16, 32], config(mode, tasks=tuple("abcdef"[:tasks])))
        return sum(p.numel() for p in made.parameters())

    for mode in ("lite", "polyhistor", "hyperformer"):
        assert numbers(mode, 6) - numbers(mode, 2) == 4 * 6
    assert numbers("adapter", 6) == 3 * numbers("adapter", 2) == 6 * numbers("shared", 6)


@pytest.mark.parametrize("kind, M", [("factors", 1), ("factors", 2), ("weight", 1)])
def test_numbers_are_those_of_the_formulas(kind, M):
    widths, k, r, rho, T = [16, 16, 32, 64], 6, 2, 4, 3
    shapes = [(16, 4), (32, 8), (64, 16)]
    mixing = k * (T + len(widths)) + 3 * k * k + 2 * k  # embeddings and MLP
    kernels = 2 * M * sum((d // 16) ** 2 for d in widths)
    one = {"factors": lambda d, n, m: k * r * m * (d + n),
           "weight": lambda d, n, m: r * (k + m * d * n)}[kind]
    wanted = {"adapter": 2 * T * sum(d * d // rho for d in widths),
              "templates": 2 * T * M * len(widths) * 16 * 4 + kernels,
              "hyperformer": 2 * k * sum(d * n for d, n in shapes) + mixing,
              "polyhistor": 2 * sum(one(d, n, 1) for d, n in shapes) + mixing,
              "lite": 2 * one(16, 4, M) + kernels + mixing}
    for mode, count in wanted.items():
        made = TaskAdapters(widths, config(mode, tasks=tuple("abc"), num_templates=M,
                                           decomposition=kind))
        assert sum(p.numel() for p in made.parameters()) == count


def test_in_the_first_step_only_the_last_map_of_up_learns():
    "And in the second all the rest."
    torch.manual_seed(0)
    made = TaskAdapters([16, 32], config())
    h = torch.randn(2, 5, 32)
    adam = torch.optim.Adam(made.parameters(), lr=0.01)
    reached = []
    for _ in range(2):
        adam.zero_grad()
        made(torch.arange(2))[1](h).square().sum().backward()
        reached.append({n for n, p in made.named_parameters()
                        if p.grad is not None and p.grad.any()})
        adam.step()
    assert reached[0] == {"hyper.maps.16x4.up.second"}
    assert {"hyper.task", "hyper.layer", "hyper.maps.16x4.down.first", "kernels.1.0.S",
            "kernels.1.1.S"} <= reached[1]


def test_a_rank_above_the_bottleneck_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # rank 8 of `weight` has nothing to do with the bottleneck
        DecomposedHyperNetwork(2, [(16, 4)], 6, 8, decomposition="weight")
    for bad in ({"rank": 0}, {"decomposition": "svd"}):
        with pytest.raises(ValueError, match="give a rank of at least 1"):
            DecomposedHyperNetwork(2, [(16, 4)], 6, **bad)
    with pytest.warns(UserWarning, match="rank = 8 is above the bottleneck 4"):
        DecomposedHyperNetwork(2, [(16, 4)], 6, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DecomposedHyperNetwork(2, [(16, 4)], 6, 4)


@pytest.mark.parametrize("rank", [None, 2, 8])
def test_the_scale_at_the_start_depends_on_the_width_only(rank):
    torch.manual_seed(0)
    for k in (32, 256):
        nets = [DecomposedHyperNetwork(1, [(64, 16)], k, rank) for _ in range(30)]
        D = torch.stack([net(0, 0)[0] for net in nets])
        assert 0.7 < D.std() * 64**0.5 < 1.4


# models


@pytest.mark.parametrize("mode", MODES)
def test_a_swin_begins_as_itself_and_is_left_as_it_was(mode):
    model = model_of(mode).eval()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    with torch.no_grad():
        maps = list(model.backbone(X).feature_maps)
        for task, y in model(X).items():
            torch.testing.assert_close(y, model.decoders[task](maps), rtol=1e-5, atol=1e-5)
        again = list(model.backbone(X).feature_maps)
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert len(model.sites) == 4 and model.sites[0].endswith("layers.0.blocks.0.mlp")


def test_a_pvt_of_four_stages():
    from transformers import PvtV2Backbone, PvtV2Config

    pvt = PvtV2Backbone(PvtV2Config(
        hidden_sizes=[8, 16, 16, 32], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2],
        sr_ratios=[4, 2, 2, 1], mlp_ratios=[2] * 4, image_size=32,
        out_features=["stage1", "stage2", "stage3", "stage4"])).eval()
    model = moved(model_of(backbone=pvt)).eval()
    with torch.no_grad():
        alone = {t: model(X, [t])[t] for t in ("a", "b")}
        both = model(X)
    assert len(model.sites) == 4 and model.adapters.kernels[3][0].S.shape == (1, 4, 4)
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both["a"], model.decoders["a"](list(pvt(X).feature_maps)), atol=1e-3)


@pytest.mark.parametrize("mode", MODES[:-1])
@pytest.mark.parametrize("targets", [("mlp",), ("mlp", "o_proj")])
def test_one_pass_for_all_tasks_is_a_pass_for_each(mode, targets):
    "Also after the attention's projection, where places are in windows."
    model = moved(model_of(mode, targets=targets, tasks=("a", "b", "c"))).eval()
    with torch.no_grad():
        both = model(X, ["c", "a"])
        for task in ("a", "c"):
            torch.testing.assert_close(model(X, [task])[task], both[task], rtol=1e-4, atol=1e-5)
        with model.cached():
            torch.testing.assert_close(model(X, ["c", "a"]), both, rtol=1e-4, atol=1e-5)
    assert list(both) == ["c", "a"]


@pytest.mark.parametrize("mode", ["lite", "polyhistor", "hyperformer", "templates"])
def test_exported_adapters_are_plain_adapters(mode):
    model = moved(model_of(mode, num_templates=2)).eval()
    plain = model_of("adapter").eval()
    plain.decoders.load_state_dict(model.decoders.state_dict())
    for task in ("a", "b"):
        found = export_adapters(model, task)
        load_adapters(plain, task, found)
    D, U = found[model.sites[3]]
    assert D.shape == (64, 16) and U.shape == (16, 64) and not D.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(plain(X), model(X), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="mode='adapter'"):
        load_adapters(model, "a", found)
    load_adapters(plain, "b", dict(reversed(found.items())))  # in any order
    with torch.no_grad():
        torch.testing.assert_close(plain(X)["b"], model(X)["b"], rtol=1e-4, atol=1e-4)
    thin = {name: (D[:, :1], U) for name, (D, U) in found.items()}  # would be repeated
    with pytest.raises(ValueError, match="D \\[8, 1\\].*give the same reduction"):
        load_adapters(plain, "a", thin)
    with pytest.raises(KeyError, match="no task 'c'"):
        load_adapters(plain, "c", found)


def test_training_moves_what_is_trained_and_the_task_in_the_batch():
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    model(X, ["b"])["b"].square().mean().backward()
    grads = model.adapters.hyper.task.grad
    assert not grads[0].any()
    assert model.decoders["a"].out.weight.grad is None
    assert all(p.grad is None for p in model.backbone.parameters())
    model.zero_grad()
    Training(steps=8, batch_size=2, lr=1e-2).fit(
        model, (X, X[:, :, ::4, ::4]), lambda m, b: sum(
            (y - b[1]).square().mean() for y in m(b[0]).values()), device="cpu", progress=False)
    after = model.state_dict()
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"adapters", "decoders"}
    assert not torch.equal(before["adapters.kernels.3.0.S"], after["adapters.kernels.3.0.S"])


def test_saved_without_the_backbone():
    model = moved(model_of()).eval()
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    other = model_of().eval()
    other.load_state_dict(kept, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(other(X), model(X))


def test_bfloat16_keeps_the_generator_in_float32():
    model = moved(model_of()).eval()
    with torch.no_grad():
        exact = model(X)
        with torch.autocast("cpu", torch.bfloat16):
            branches = model.branches(["a"])
            found = model(X)
    assert branches[0].down.dtype == torch.float32
    for task in exact:
        error = (found[task].float() - exact[task]).norm() / exact[task].norm()
        assert error < 0.1


# bad input


@pytest.mark.parametrize("options, words", [
    ({"mode": "best"}, "give one of lite"), ({"decomposition": "svd"}, "give one of factors"),
    ({"rank": 0}, "rank = 0"), ({"embed_dim": 0}, "embed_dim = 0"),
    ({"reduction": 2.0}, "reduction = 2.0"), ({"tasks": ()}, "at least one name"),
    ({"tasks": ("a", "a")}, "each once"), ({"targets": ()}, "targets is empty"),
])
def test_settings_that_nothing_can_have(options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_widths_that_do_not_fit():
    with pytest.raises(ValueError, match="no whole multiple of the smallest, 16"):
        TaskAdapters([16, 24], config())
    TaskAdapters([16, 24], config("polyhistor"))
    with pytest.raises(ValueError, match="reduction = 4 does not divide the width 18"):
        TaskAdapters([18], config("adapter"))


def test_models_that_cannot_be_adapted():
    with pytest.raises(TypeError, match="no sub-layer named mlp"):
        PolyhistorModel(nn.Linear(2, 2), config(), {"a": nn.Identity(), "b": nn.Identity()})
    with pytest.raises(ValueError, match="give one decoder for each task"):
        PolyhistorModel(swin(), config(), {"a": nn.Identity()})
    model = model_of()
    with pytest.raises(KeyError, match="no task 'c'"):
        model(X, ["c"])
    with pytest.raises(KeyError, match="no task 'c'"):
        export_adapters(model, "c")
    with pytest.raises(RuntimeError, match="eval"), model.train().cached():
        pass


def test_losses_without_any_label():
    y = torch.randn(1, 3, 4, 4, requires_grad=True)
    for loss, labels in ((segmentation_loss, torch.full((1, 8, 8), 255)),
                         (segmentation_loss, torch.full((1, 8, 8), -1)),
                         (regression_loss, torch.full((1, 3, 8, 8), float("nan"))),
                         (normals_loss, torch.zeros(1, 3, 8, 8))):
        y.grad = None
        lost = loss(y, labels)
        lost.backward()
        assert lost == 0 and not y.grad.any()


def test_losses_look_at_known_places_only():
    y, labels = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 255], [2, -1]]])
    wanted = nn.functional.cross_entropy(y[..., :, 0], labels[..., :, 0])
    torch.testing.assert_close(segmentation_loss(y, labels), wanted)
    target = torch.tensor([[[[1.0, float("nan")]]]])
    assert regression_loss(torch.tensor([[[[3.0, 9.0]]]]), target) == 2
    n = torch.tensor([0.0, 0.0, 2.0])[None, :, None, None].expand(1, 3, 1, 2)
    known = torch.stack([torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3)], 1)[None, :, None]
    torch.testing.assert_close(normals_loss(n, known), torch.tensor(1.0))


def test_labels_of_another_shape_are_refused():
    y = torch.randn(4, 3, 4, 4)
    for loss, labels in ((regression_loss, torch.zeros(4, 8, 8)),  # would be broadcast
                         (regression_loss, torch.zeros(4, 1, 8, 8)),
                         (normals_loss, torch.zeros(4, 8, 8, 3)),
                         (segmentation_loss, torch.zeros(4, 1, 8, 8).long())):
        with pytest.raises(ValueError, match="labels must be"):
            loss(y, labels)
    small = torch.ones(4, 8, 8, dtype=torch.uint8)
    torch.testing.assert_close(segmentation_loss(y, small), segmentation_loss(y, small.long()))
    normals = torch.nn.functional.normalize(torch.randn(4, 3, 8, 8), dim=1)
    zeros, nan = normals.clone(), normals.clone()
    zeros[:, :, 0], nan[:, :, 0] = 0, float("nan")
    torch.testing.assert_close(normals_loss(y, nan), normals_loss(y, zeros))


class Places(nn.Module):
    "A backbone with BatchNorm whose MLP is of linear layers, or of convolutions."

    channels = [8]

    def __init__(self, conv=False):
        super().__init__()
        layer = partial(nn.Conv2d, kernel_size=1) if conv else nn.Linear
        self.norm, self.patch = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 4, stride=4)
        self.mlp, self.last = nn.Sequential(layer(8, 8), nn.GELU(), layer(8, 8)), not conv

    def forward(self, x):
        f = self.patch(self.norm(x))
        return [f + (self.mlp(f.movedim(1, -1)).movedim(-1, 1) if self.last else self.mlp(f))]


def test_a_frozen_backbone_keeps_its_statistics():
    model = model_of(backbone=Places()).train()
    before = copy.deepcopy(model.backbone.state_dict())
    model(X)
    torch.testing.assert_close(model.backbone.state_dict(), before)
    assert model.training and model.eval().train().backbone.patch.training


def test_channels_first_and_gradient_checkpointing_are_refused():
    with pytest.raises(TypeError, match="mlp ends with a Conv2d, its channels come first"):
        model_of(backbone=Places(conv=True))
    model = model_of().train()
    model.backbone.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(X)
    model.eval()(X)  # nothing runs again there


def test_no_task_no_picture_and_a_cache_in_training():
    model = moved(model_of()).eval()
    with pytest.raises(ValueError, match="name at least one"):
        model(X, ())
    torch.testing.assert_close(  # nothing to adapt
        Branch(torch.ones(2, 1, 8, 2), torch.ones(2, 1, 2, 8))(torch.ones(2, 0, 8)).numel(), 0)
    with model.cached():
        with model.cached():
            pass
        assert model.branches(["a"])[0].down.grad_fn is None
        model.train()(X)["a"].square().mean().backward()  # not from the cache
    assert model.adapters.hyper.task.grad[0].any()


def test_weights_and_tasks_of_the_loss():
    y = torch.ones(1, 1, 1, 1)
    loss = MultiTaskLoss({"a": regression_loss, "b": regression_loss}, {"a": 1, "b": 3})
    assert loss({"a": y, "b": y}, {"a": y * 2, "b": y * 3}) == 1 + 3 * 2
    assert loss({"b": y}, {"b": y * 3}) == 6
    with pytest.raises(KeyError, match="no labels for 'b'"):
        loss({"b": y}, {"a": y})
    with pytest.raises(KeyError, match="no loss for 'c'"):
        loss({"c": y}, {"c": y})
    for weights in ({}, {"a": 1, "b": float("nan")}):
        with pytest.raises(ValueError, match="give one of at least 0"):
            MultiTaskLoss({"a": regression_loss, "b": regression_loss}, weights)
    with pytest.raises(ValueError, match="give one of at least 0"):
        MultiTaskLoss({"a": regression_loss}, {"b": 1})


def test_relative_gain():
    base = {"seg": 0.5, "depth": 2.0}
    assert delta_m(base, base, ["depth"]) == 0
    assert delta_m({"seg": 0.6, "depth": 2.0}, base, ["depth"]) == pytest.approx(10)
    assert delta_m({"seg": 0.5, "depth": 2.2}, base, ["depth"]) == pytest.approx(-5)
    assert delta_m({"seg": 0.5, "depth": 2.2}, base) == pytest.approx(5)
    for bad in ({"seg": 0.5}, {"seg": 1.0, "normals": 1.0}):
        with pytest.raises(ValueError, match="tasks differ"):
            delta_m(bad, base)
    for low in (0.0, -0.5):  # below 0 a gain would read as a loss
        with pytest.raises(ValueError, match=f"baseline of 'seg' is {low}: .* above 0"):
            delta_m(base, {"seg": low, "depth": 2.0})


# the experiment


def test_scenes_say_what_is_there():
    rows = torch.arange(2500, 2600)
    made = told.scenes(20, rows, seed=5)
    again = told.scenes(20, rows, seed=5)
    assert all(torch.equal(made[k], again[k]) for k in made)
    for i in range(20):
        classes = set(made["digits"][i].unique().tolist()) - {10}
        assert len(classes) == 1
    flat = made["digits"] == 10
    assert made["height"][:, 0][flat].mean() < 0.3 * made["height"][:, 0][~flat].mean()
    a, b = (told.scene_bed(s, (8, 8, 8)) for s in (0, 1))
    assert not torch.equal(a.train["x"], b.train["x"])


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(seeds=(0,), sizes=(16, 8, 8), training={"steps": 1})
    report = goes_on(told, cfg, tmp_path, monkeypatch)
    exact = [c for c in report.claims if "tenth" in c.text]
    assert [c.verdict for c in exact] == ["holds"]
    assert {c.verdict for c in report.claims if c not in exact} == {"not decided at this scale"}
    table = report.tables["scenes"].set_index("method")
    assert set(table.index) == set(PREPARE) == set(RATES)
    assert table.loc["full, single", "delta_m"] == 0 and table.loc["decoders", "trained"] == 0
    assert table.loc["templates", "trained"] < table.loc["lite", "trained"]


def test_free_factors_are_factors_of_each_task_and_layer():
    "They begin as Lite's, and a task's own change nothing for another."
    bed = told.scene_bed(0, (8, 8, 8))
    with bed.fresh() as model:
        made = PREPARE["free factors"](model, SMALL)
    trained = [p for p in made.adapters.hyper.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 9 * 2 * 2 * (16 + 4)
    down = torch.stack([b.down for b in made.branches(list(SCENES))])
    assert 0.6 < down.std() * 16**0.5 < 1.6
    made.branches(["digits"])[1].down.square().sum().backward()
    grad = made.adapters.hyper.maps["16x4"]["down"].first.grad
    assert grad.any(dim=1).nonzero().tolist() == [[1]]


def test_orthogonal_embeddings_begin_as_free_factors_and_reach_no_other():
    bed = told.scene_bed(0, (8, 8, 8))
    with bed.fresh() as model:
        made = PREPARE["lite, orthogonal"](model, SMALL)
    hyper = made.adapters.hyper
    assert {n.split(".")[0] for n, p in hyper.named_parameters() if p.requires_grad} == {"maps"}
    e = hyper.embed(torch.arange(3)).flatten(0, 1)
    torch.testing.assert_close(e @ e.T, 9 * torch.eye(9), rtol=1e-4, atol=1e-4)
    before = torch.stack([b.down for b in made.branches(list(SCENES))]).detach()
    assert 0.6 < before.std() * 16**0.5 < 1.6
    first = hyper.maps["16x4"]["down"].first
    made.branches(["digits"])[1].down.square().sum().backward()
    first.data -= 0.1 * first.grad
    after = torch.stack([b.down for b in made.branches(list(SCENES))])  # [layers, tasks, ...]
    moved = (after - before).abs().flatten(2).amax(2) > 1e-5
    assert moved.nonzero().tolist() == [[1, 0]]  # its own place alone


def test_lora_of_each_task_begins_as_the_backbone_and_is_its_own():
    bed = told.scene_bed(0, (8, 8, 8))
    with bed.fresh() as model:
        made = PREPARE["LoRA r=1"](model, SMALL)
    start = bed.model(bed.test["x"])
    torch.testing.assert_close(made(bed.test["x"]), start, rtol=1e-5, atol=1e-5)
    names = list(SCENES)
    assert PREPARE["LoRA r=1"](bed.model, SMALL).models[names[0]].backbone is not bed.model.backbone
    with torch.no_grad():
        for adapter in adapters.adapters(made.models[names[1]]).values():
            adapter.B.normal_()
    changed = made(bed.test["x"])
    torch.testing.assert_close(changed[names[0]], start[names[0]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed[names[1]], start[names[1]], atol=1e-3)


TRAIN = """
import torch

from adaptlab import processes
from adaptlab.experiments import polyhistor as told
from adaptlab.experiments.polyhistor import PREPARE, SCENE_WORK, SMALL

torch.manual_seed(0)
backbone = told.SmallHVT().eval()
told.small_hvt = lambda: backbone
cfg = SMALL.replace(sizes=(32, 8, 8), device="cpu", training={"steps": 3, "lr": 1e-2})
bed = told.scene_bed(0, cfg.sizes)
for name in ("lite", "LoRA r=1"):
    with bed.fresh() as model:
        made = told._adapt(model, bed, 0, 1e-2, prepare=PREPARE[name], work=SCENE_WORK, cfg=cfg,
                           name=name, run=None)
    if processes.is_main():
        with torch.no_grad():
            found = made.eval()(bed.test["x"][:2])
        print(name.split()[0], *torch.cat([y.flatten() for y in found.values()]).tolist())
"""


def test_two_processes_train_as_one(tmp_path, capsys):
    "A generator for all tasks, and an adapter for each."
    two_processes.assert_alike(TRAIN, tmp_path, capsys)


@pytest.fixture
def tiny_swin(tmp_path):
    swin().save_pretrained(tmp_path / "swin")
    return str(tmp_path / "swin")


def test_full_scale_path_with_a_tiny_swin(tmp_path, tiny_swin, recorded):
    "From rooms of the hub's form to claims."
    cfg = FULL.replace(model=tiny_swin, device="cpu", seeds=(0,), lrs=(1e-3,), reduction=4,
                       embed_dim=6, rank=1, hidden=8, held=4,
                       training=Training(steps=1, batch_size=2))
    report = experiment(cfg, start_run("polyhistor", cfg, "full", root=tmp_path / "runs"))
    table = report.tables["nyuv2"].set_index("method")
    assert set(table.index) == set(PREPARE)
    assert {"segmentation", "depth", "normal", "delta_m"} <= set(table.columns)
    assert 0 <= table["normal"].min() and table["normal"].max() <= 180
    assert any("nyuv2" in str(asked) for asked in recorded.asked)


def test_branches_broadcast_over_their_tasks():
    h = torch.randn(2, 3, 8)
    D, U = torch.randn(2, 1, 8, 2), torch.randn(2, 1, 2, 8)
    found = Branch(D, U)(h)
    for t in range(2):
        alone = h[t] + nn.functional.gelu(h[t] @ D[t, 0]) @ U[t, 0]
        torch.testing.assert_close(found[t], alone, rtol=1e-4, atol=1e-4)
    assert partial(Branch, D, U)().kernels is None
