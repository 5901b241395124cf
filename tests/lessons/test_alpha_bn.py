"""α-BN and Core: what must hold, what must be refused, and the full-scale path on tiny models."""

import copy
from functools import partial

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils import parametrize

from adaptlab.bench.runs import launch, start_run
from adaptlab.bench.streams import Streams, prepare
from adaptlab.experiments import alpha_bn as told
from adaptlab.experiments.alpha_bn import FULL, SMALL, Config, Entropy
from adaptlab.testtime.alpha_bn import (
    AlphaBatchNorm,
    Core,
    alpha_bn,
    alpha_layers,
    class_correlation,
    convert_alpha_bn,
    core_loss,
    mixed_statistics,
    pseudo_count_alpha,
    revert_alpha_bn,
    set_alpha,
)
from one_seed import UNDECIDED

SHAPES = [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm1d, (6, 3, 5)), (nn.BatchNorm2d, (6, 3, 4, 5)),
          (nn.BatchNorm3d, (6, 3, 2, 4, 5)), (nn.SyncBatchNorm, (6, 3, 4, 5))]
NORMS = ("row", "cosine", "raw")


def trained(kind=nn.BatchNorm2d, dtype=torch.float64, **more):
    "A BatchNorm layer with statistics, scales and shifts of its own."
    g = torch.Generator().manual_seed(0)
    bn = kind(3, **more).to(dtype)
    with torch.no_grad():
        for t in (bn.running_mean, bn.weight, bn.bias):
            if t is not None:
                t.copy_(torch.randn(3, generator=g))
        if bn.running_var is not None:
            bn.running_var.copy_(0.5 + torch.rand(3, generator=g))
    return bn.eval()


def batch(*shape, dtype=torch.float64):
    return 1.5 + 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


class Net(nn.Module):
    def __init__(self, classes=5, **norm):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6, **norm), nn.ReLU(),
                                  nn.Dropout(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


# --- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, shape", SHAPES)
@pytest.mark.parametrize("gradient", [False, True])
def test_closed_form_in_float64(kind, shape, gradient):
    bn, x = trained(kind, eps=1e-3), batch(*shape).requires_grad_(gradient)
    axes, wide = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    for alpha in (1.0, 0.9, 0.4, 0.0):
        for unbiased in (False, True):
            var = alpha * bn.running_var + (1 - alpha) * x.var(axes, correction=int(unbiased))
            mean = alpha * bn.running_mean + (1 - alpha) * x.mean(axes)
            want = (x - mean.view(wide)) / (var.view(wide) + 1e-3).sqrt()
            want = bn.weight.view(wide) * want + bn.bias.view(wide)
            torch.testing.assert_close(AlphaBatchNorm(bn, alpha, unbiased)(x), want)


@pytest.mark.parametrize("kind, shape", SHAPES[:4])
def test_the_ends_are_the_plain_layers(kind, shape):
    bn, x = trained(kind, torch.float32), batch(*shape, dtype=torch.float32)
    source = AlphaBatchNorm(bn, 1.0)
    assert torch.equal(source(x), bn(x))
    spoilt = x.clone()
    spoilt[1:] = torch.nan
    assert torch.equal(source(spoilt)[0], source(x)[0])  # nobody else matters
    by_batch = F.batch_norm(x, None, None, bn.weight, bn.bias, training=True)
    assert torch.equal(AlphaBatchNorm(bn, 0.0)(x), by_batch)
    torch.testing.assert_close(by_batch, copy.deepcopy(bn).train()(x))


def test_linear_statistics_and_an_output_that_is_not():
    bn, x = trained(), batch(6, 3, 4, 5)
    means, outs = [], []
    for alpha in (0.0, 0.5, 1.0):
        found = mixed_statistics(x, bn.running_mean, bn.running_var, alpha)
        means.append(torch.stack(found))
        outs.append(AlphaBatchNorm(bn, alpha)(x))
    torch.testing.assert_close(means[1], (means[0] + means[2]) / 2)
    assert (outs[1] - (outs[0] + outs[2]) / 2).abs().max() > 1e-2


def test_order_copies_and_scale_of_a_batch():
    bn, x = trained(), batch(6, 3, 4, 5)
    layer, turn = AlphaBatchNorm(bn, 0.3), torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(layer(x[turn]), layer(x)[turn])
    torch.testing.assert_close(layer(torch.cat([x, x]))[:6], layer(x))
    scaled = 40 * x + torch.tensor([7.0, -3.0, 100.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(AlphaBatchNorm(bn, 0.0)(scaled), AlphaBatchNorm(bn, 0.0)(x),
                               atol=1e-4, rtol=0)
    assert (layer(scaled) - layer(x)).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients(alpha, affine):
    bn = trained(affine=affine)
    layer = AlphaBatchNorm(bn, alpha)
    inputs = [batch(3, 3, 2, 2).requires_grad_()] + [p for p in layer.parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)


def test_agrees_with_the_peers_way():
    "A helper layer with momentum 1 reads the batch's statistics; its alpha weighs the batch."
    bn, x, alpha = trained(), batch(16, 3, 4, 5), 0.1
    helper = nn.BatchNorm2d(3, momentum=1.0, affine=False).double()
    helper(x)
    mean = (1 - alpha) * bn.running_mean + alpha * helper.running_mean
    var = (1 - alpha) * bn.running_var + alpha * helper.running_var
    theirs = F.batch_norm(x, mean, var, bn.weight, bn.bias, False, 0.0, bn.eps)
    torch.testing.assert_close(AlphaBatchNorm(bn, 1 - alpha, unbiased=True)(x), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_half_precision_sums_in_float32(dtype, alpha):
    "4,096 values around 200: sums in float16 would overflow, variances would be noise."
    bn, x = trained(dtype=torch.float32), (200 + batch(16, 3, 16, 16)).to(dtype)
    found = AlphaBatchNorm(copy.deepcopy(bn).to(dtype), alpha)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), AlphaBatchNorm(bn, alpha)(x.float()),
                               atol=0.02 * float(found.detach().abs().max()), rtol=0.02)
    with torch.autocast("cpu", dtype):
        assert AlphaBatchNorm(bn, alpha)(x.float()).isfinite().all()


def test_channels_last_and_odd_strides():
    bn, x = trained(dtype=torch.float32), batch(6, 3, 4, 5, dtype=torch.float32)
    for alpha in (0.0, 0.5, 1.0):
        layer = AlphaBatchNorm(bn, alpha)
        for other in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            torch.testing.assert_close(layer(other), layer(x), atol=1e-5, rtol=1e-5)


# --- a network ----------------------------------------------------------------------------------


def test_nothing_is_remembered_and_modes_mean_nothing():
    model, x, other = Net().train(), torch.randn(16, 1, 8, 8), 5 + torch.randn(16, 1, 8, 8)
    model.body[3].eval()  # mixed modes; no dropout in the comparison
    before = copy.deepcopy(model.state_dict())
    wrapped = convert_alpha_bn(model, 0.6)
    assert [m.training for m in wrapped.modules()] == [m.training for m in model.modules()]
    first = wrapped(x)
    for _ in range(3):
        wrapped(other)
    assert torch.equal(wrapped(x), first) and torch.equal(wrapped.eval()(x), first)
    for held in (model, wrapped):
        assert held.state_dict().keys() == before.keys()
        assert all(torch.equal(v, before[k]) for k, v in held.state_dict().items())
    wrapped.load_state_dict(before)  # an old checkpoint fits


def test_revert_hands_back_what_was_learned_or_moved():
    wrapped = convert_alpha_bn(Net(), 0.5)
    with torch.no_grad():
        alpha_layers(wrapped)["body.1"].weight.fill_(3.0)
    wrapped = copy.deepcopy(wrapped).double()  # the tensors are new ones now
    plain = revert_alpha_bn(wrapped)
    assert type(plain.body[1]) is nn.BatchNorm2d
    assert plain.body[1].running_mean.dtype == torch.float64
    assert plain.body[1].weight.eq(3).all()
    plain.eval()(torch.randn(2, 1, 8, 8).double())
    with pytest.raises(ValueError, match="no α-BN layer"):
        revert_alpha_bn(plain)


def test_a_layer_that_stands_in_two_places_stays_one():
    bn = nn.BatchNorm1d(4)
    model = nn.Sequential(bn, nn.Linear(4, 4), bn)
    wrapped = convert_alpha_bn(model, 0.5, inplace=True)
    assert wrapped is model and wrapped[0] is wrapped[2]
    assert revert_alpha_bn(model)[0] is bn and model[2] is bn
    alone = convert_alpha_bn(bn, 0.5)
    assert isinstance(alone, AlphaBatchNorm) and type(revert_alpha_bn(alone)) is nn.BatchNorm1d


def test_the_context_puts_the_layers_back_also_after_an_error():
    model = Net().eval()
    bn, x = model.body[1], torch.randn(4, 1, 8, 8)
    plain = model(x)
    with pytest.raises(RuntimeError), alpha_bn(model, 0.3):
        assert isinstance(model.body[1], AlphaBatchNorm)
        model(torch.randn(4, 2, 8, 8))
    assert model.body[1] is bn and torch.equal(model(x), plain)


def test_bad_layers_and_weights():
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
            convert_alpha_bn(Net(), alpha)
    for alpha in ("0.5", True, None):
        with pytest.raises(TypeError, match="must be a number"):
            AlphaBatchNorm(nn.BatchNorm1d(3), alpha)
    with pytest.raises(ValueError, match="no BatchNorm layer .*LayerNorm"):
        convert_alpha_bn(nn.Sequential(nn.LayerNorm(3)))
    wrapped = convert_alpha_bn(Net())
    with pytest.raises(ValueError, match="already"):
        convert_alpha_bn(wrapped)
    with pytest.raises(ValueError, match="already"):
        Core(wrapped)
    with pytest.raises(ValueError, match="no α-BN layer"):
        set_alpha(Net(), 0.5)
    with pytest.raises(ValueError, match="'body.1'.*track_running_stats=False"):
        convert_alpha_bn(Net(track_running_stats=False), 0.5)
    stateless = convert_alpha_bn(Net(track_running_stats=False), 0.0)
    assert stateless.eval()(torch.randn(4, 1, 8, 8)).isfinite().all()
    with pytest.raises(ValueError, match="only alpha = 0"):
        set_alpha(stateless, 0.5)
    with pytest.raises(TypeError, match="no BatchNorm"):
        AlphaBatchNorm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="has not seen a batch"):
        AlphaBatchNorm(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="itself a BatchNorm"), alpha_bn(nn.BatchNorm1d(3)):
        pass

    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(ValueError, match="more than BatchNorm"):
        convert_alpha_bn(nn.Sequential(Activated(3)))


def test_what_would_get_lost_is_refused():
    "Hooks and parametrizations of the plain layer, and whole numbers that came back rounded."
    hooked = Net()
    handle = hooked.body[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'body.1'.*hooks"):
        convert_alpha_bn(hooked)
    handle.remove()
    convert_alpha_bn(hooked)
    bent = nn.Sequential(nn.BatchNorm1d(3))
    parametrize.register_parametrization(bent[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match="parametrization"):
        convert_alpha_bn(bent)
    with pytest.raises(TypeError, match="float tensor"):
        AlphaBatchNorm(nn.BatchNorm1d(3))(torch.ones(4, 3, dtype=torch.long))


@pytest.mark.parametrize("kind, shape", [
    (nn.BatchNorm2d, (6, 4, 5, 5)), (nn.BatchNorm2d, (6, 3)), (nn.BatchNorm1d, (6, 3, 4, 4)),
    (nn.BatchNorm2d, (0, 3, 4, 4)), (nn.BatchNorm3d, (6, 3, 4, 4)), (nn.BatchNorm1d, (3,))])
def test_bad_inputs_of_a_layer(kind, shape):
    for alpha in (0.0, 0.5, 1.0):
        with pytest.raises(ValueError, match="is needed"):
            AlphaBatchNorm(kind(3), alpha)(torch.zeros(shape))


def test_one_value_per_channel():
    bn, x = trained(nn.BatchNorm1d), batch(1, 3)
    found = AlphaBatchNorm(bn, 0.5)(x)
    half = (bn.running_mean + x[0]) / 2
    want = bn.weight * (x - half) / (0.5 * bn.running_var + bn.eps).sqrt() + bn.bias
    torch.testing.assert_close(found, want)
    for layer in (AlphaBatchNorm(bn, 0.0), AlphaBatchNorm(bn, 0.5, unbiased=True)):
        with pytest.raises(ValueError, match="larger batch"):
            layer(x)
    with pytest.raises(ValueError, match="others"):
        mixed_statistics(batch(4, 3), torch.zeros(1), torch.ones(1), 0.5)


def test_the_pseudo_count():
    assert pseudo_count_alpha(16, 48) == 0.25
    for bad in ((0, 8), (-1, 8), (float("inf"), 8), (16, 0)):
        with pytest.raises(ValueError, match="above 0"):
            pseudo_count_alpha(*bad)


@pytest.mark.parametrize("n", [4, 64])
def test_the_best_weight_of_the_lesson(n):
    "α* = q / (q + Δ²) on simulated batches, and the pseudo-count that it amounts to."
    rng, v, delta = np.random.default_rng(0), 2.0, 0.5
    error = rng.normal(0, np.sqrt(v / n), 200_000)
    best = pseudo_count_alpha(v / delta**2, n)

    def mse(a):
        return float(np.mean((a * delta + (1 - a) * error) ** 2))

    q = v / n
    assert abs(mse(best) - q * delta**2 / (q + delta**2)) < 0.01 * q
    assert mse(best) < min(mse(best - 0.05), mse(best + 0.05), mse(0), mse(1))


# --- Core ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMS)
def test_the_loss_is_the_definition_and_has_its_symmetries(normalize):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(20, 6, generator=g)).double()
    p = logits.softmax(1)
    whole = class_correlation(p, normalize)
    share = {"row": 6, "cosine": 30, "raw": 1}[normalize]
    loss = core_loss(logits, normalize)
    torch.testing.assert_close(loss, (whole.sum() - whole.trace()) / share)
    for other in (logits.flip(0), logits.flip(1), torch.cat([logits, logits]), logits + 7):
        torch.testing.assert_close(core_loss(other, normalize), loss)
    dense = logits.view(4, 5, 1, 6).movedim(-1, 1)
    torch.testing.assert_close(core_loss(dense, normalize), loss)
    assert core_loss(logits.half(), normalize).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda z: core_loss(z, normalize), logits.requires_grad_())
    if normalize == "raw":
        torch.testing.assert_close(loss, 1 - p.square().sum(1).mean(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("normalize", NORMS)
def test_certain_and_uniform_predictions(normalize):
    sure = (1e4 * torch.eye(4)[[0, 1, 1]]).requires_grad_()  # classes 2 and 3 are never predicted
    loss = core_loss(sure, normalize)
    loss.backward()
    assert loss == 0 and sure.grad.isfinite().all()
    assert class_correlation(torch.eye(4)[[0, 1, 1]], normalize).isfinite().all()
    want = {"row": 0.75, "cosine": 1.0, "raw": 0.75}[normalize]
    torch.testing.assert_close(core_loss(torch.zeros(5, 4), normalize), torch.tensor(want))


def test_only_the_divided_loss_resists_the_collapse():
    logits = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double()
    leaning = logits + 40 * torch.eye(5)[2]
    assert core_loss(leaning, "raw") < 1e-9
    torch.testing.assert_close(core_loss(leaning), torch.tensor(0.8).double())


def test_bad_predictions():
    good = torch.zeros(4, 3)
    for bad in (torch.zeros(4), torch.zeros(4, 3, 2), torch.zeros(0, 3), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match=r"\[B, C\]"):
            core_loss(bad)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            core_loss(good.index_fill(0, torch.tensor([1]), value))
    with pytest.raises(TypeError, match="float tensor"):
        core_loss(torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="give 'row'"):
        core_loss(good, "rows")
    for bad in (good, torch.tensor([[1.5, -0.5]])):
        with pytest.raises(ValueError, match="sum to 1"):
            class_correlation(bad)


def images(n=32):
    return 2 + 3 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_core_moves_scale_and_shift_only_and_resets():
    model, x = Net().train(), images()
    before = copy.deepcopy(model.state_dict())
    core = Core(model, 0.7, partial(torch.optim.Adam, lr=0.05))
    with torch.no_grad():
        expected = convert_alpha_bn(model, 0.7).eval()(x)
    first = core(x)
    torch.testing.assert_close(first, expected)
    assert not first.requires_grad and core.updates == 1
    second, third = core(x), core(images(16))
    assert not torch.equal(first, second) and core.updates == 3
    moved = {k for k, v in core.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"body.1.weight", "body.1.bias"}
    core.reset()
    assert core.updates == 0
    assert all(torch.equal(v, before[k]) for k, v in core.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in
               zip((core(x), core(x), core(images(16))), (first, second, third), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and model.training
    assert core.train().model.body[3].training and torch.equal(core(x), core(x)) is False
    core.reset()
    torch.testing.assert_close(core(x), expected)  # no dropout, whatever the mode


def test_core_with_rate_zero_is_alpha_bn_and_steps_lower_the_loss():
    model, x = Net(), images()
    still = Core(model, 0.7, partial(torch.optim.SGD, lr=0.0))
    a, b = still(x), still(x)
    assert torch.equal(a, b)
    losses = [float(core_loss(Core(model, 0.7, partial(torch.optim.SGD, lr=0.1), steps=n)(x)))
              for n in (1, 5)]
    assert losses[0] == losses[1]  # the first prediction is handed back
    core = Core(model, 0.7, partial(torch.optim.SGD, lr=0.1), steps=5)
    core(x)
    assert core.updates == 5 and core_loss(core(x)) < losses[0]


def test_small_steps_survive_in_half_precision():
    core = Core(Net().bfloat16(), 0.7)
    x, start = images().bfloat16(), core.state()[0]
    first = core(x)
    assert first.dtype == torch.bfloat16
    for now, then in zip(core.trained, start, strict=True):
        assert now.dtype == torch.float32 and 0 < (now - then).abs().max() <= 1.1e-3


def test_a_damaged_batch_teaches_nothing():
    x, core, twin = images(), Core(Net()), Core(Net())
    bad = x.clone()
    bad[0, 0, 0, 0] = torch.nan
    core(x)
    twin(x)
    with pytest.raises(ValueError, match="NaN or infinity"):
        core(bad)
    assert core.updates == 1 and torch.equal(core(x), twin(x))
    wild = Core(Net(), optimizer=partial(torch.optim.SGD, lr=1e38, weight_decay=10.0))
    start = wild.state()[0]
    with pytest.raises(ValueError, match="lower the rate"):
        wild(x)
    assert all(torch.equal(a, b) for a, b in zip(wild.trained, start, strict=True))


def test_inference_mode_and_other_outputs():
    x = images(8)
    want = Core(Net())(x)
    with torch.inference_mode():
        core = Core(Net())
        torch.testing.assert_close(core(x.clone()), want)
        assert core.updates == 1

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(1), nn.Conv2d(1, 4, 1)

        def forward(self, pixels):
            return {"logits": self.conv(self.norm(pixels))}

    core = Core(Dense())
    assert core(pixels=x).shape == (8, 4, 8, 8) and core.updates == 1


def test_core_is_refused_where_it_has_nothing_to_train():
    with pytest.raises(ValueError, match="affine=False"):
        Core(Net(affine=False))
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="at least one step"):
            Core(Net(), steps=steps)
    with pytest.raises(ValueError, match="give 'row'"):
        Core(Net(), normalize="rows")
    with pytest.raises(TypeError, match="function of the parameters"):
        Core(Net(), optimizer=torch.optim.Adam(Net().parameters()))
    with pytest.raises(ValueError, match="another model"):  # a length of 1 would spread
        Core(Net()).restore(Core(nn.Sequential(nn.BatchNorm2d(1))).state())


def test_hugging_face_resnet():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                       num_labels=4)
    model, x = transformers.ResNetForImageClassification(config).eval(), torch.randn(6, 3, 32, 32)
    with alpha_bn(model, 1.0):
        ours = model(pixel_values=x).logits
    torch.testing.assert_close(ours, model(pixel_values=x).logits)
    assert Core(model)(pixel_values=x).shape == (6, 4)


# --- the experiment -----------------------------------------------------------------------------


TINY = {"alphas": (1.0, 0.5, 0.0), "lrs": (1e-2,), "tent_lrs": (0.1,), "momenta": (0.3,)}


def test_one_seed_and_a_resumed_run(tmp_path, monkeypatch):
    "No interval, no verdict that needs one, and nothing that is done is measured again."
    cfg = SMALL.replace(seeds=(0,), shifts=("clean", "blur-3"), choose_shifts=("pixelate-3",),
                        n_test=128, n_choose=64, device="cpu", **TINY)
    run = start_run("alpha_bn", cfg, "small", root=tmp_path)
    report = told.experiment(cfg, run)
    run.close()
    assert {c.verdict for c in report.claims} == UNDECIDED and len(report.claims) == 12
    assert set(report.figures) == {"main"}
    monkeypatch.setattr(Streams, "accuracy", None)
    again = told.experiment(cfg, start_run("alpha_bn", cfg, "small", root=tmp_path, resume=True))
    assert again.tables["online"].equals(report.tables["online"])
    assert [c.to_dict() for c in again.claims] == [c.to_dict() for c in report.claims]


def test_streams():
    "No ragged last batch; other noise for every seed; the same again."
    bed, other = (told.make_bed(SMALL.replace(n_test=130, device="cpu"), s) for s in (3, 4))
    assert [len(y) for _, y in bed.test.batches("clean", "class/64")] == [64, 64]
    (x, y), (z, w) = (next(b.test.batches("gaussian_noise-3", "iid/8")) for b in (bed, other))
    assert x.shape == z.shape == (8, 1, 28, 28)
    (clean, _) = next(bed.test.batches("clean", "iid/8"))
    bed.test.seeds = (4,)  # the order of the other seed
    assert not torch.equal(next(bed.test.batches("gaussian_noise-3", "iid/8"))[0], z)
    bed.test.seeds = (3,)
    again, _ = next(bed.test.batches("gaussian_noise-3", "iid/8"))
    assert torch.equal(x, again) and not torch.equal(x, clean)
    kinds = {(s, m) for s, m in bed.test.names} & {(s, m) for s, m in bed.choose.names}
    assert not kinds


def test_a_split_is_a_reason_only_beyond_noise():
    rows = [{"method": m, "seed": s, "a/8": a + s % 2, "b/8": b - s % 3} for s in range(6)
            for m, a, b in (("Core", 5.0, 1.0), ("far", 1.0, 5.0), ("near", 5.0, 1.0))]
    rows = pd.DataFrame(rows)
    noise = np.where(rows["method"] == "near", np.arange(len(rows)) % 5 - 2.0, 0.0)
    rows["a/8"] += noise
    assert told._split(rows, "near", ("a/8", "b/8")) == "no reason was tested"
    assert "a/8 +4.00" in told._split(rows, "far", ("a/8", "b/8"))
    one = rows[rows["seed"] == 0]
    assert told._split(one, "far", ("a/8", "b/8")) == "no reason was tested"


def test_entropy_is_the_formula():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    torch.testing.assert_close(Entropy(Net()).loss(p.log()), -(p * p.log()).sum(1).mean())


@pytest.mark.parametrize("change, said", [
    ({"streams": ("class",)}, "batch size"), ({"streams": ("class/1",)}, "batch size"),
    ({"streams": ("size/8",)}, "unknown|stream"), ({"alphas": (1.0, 0.0)}, "between"),
    ({"shifts": ("pixelate-3",)}, "can't serve"), ({"shifts": ("blur-9",)}, "blur-9"),
    ({"shifts": ("blur-2+contrast-2",)}, "one corruption"),
    ({"choose_streams": ("class/32",)}, "none of the test")])
def test_bad_settings(change, said):
    with pytest.raises(ValueError, match=said):
        Config(**change)


def test_full_scale_path(tmp_path):
    "FULL through the same code: a tiny ResNet from a folder, folders of images."
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                       num_labels=3)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    transformers.ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(
        tmp_path / "resnet")
    rng = np.random.default_rng(0)
    for part in ("choose", "test"):
        for label in range(3):
            folder = tmp_path / part / str(label)
            folder.mkdir(parents=True)
            for i in range(6):
                PIL.Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png")
    cfg = FULL.replace(
        model=str(tmp_path / "resnet"), test_data=f"{tmp_path / 'test'}#train", workers=2,
        choose_data=f"{tmp_path / 'choose'}#train", seeds=(0, 1), device="cpu",
        streams=("iid/8", "class/8", "iid+zipf/8"), choose_streams=("iid/8", "class/8"),
        shifts=("clean", "contrast-5"), choose_shifts=("brightness-5",), **TINY)
    report = launch("alpha_bn", cfg, scale="full", root=tmp_path / "runs", progress=False)
    table = report.tables["alpha"]
    assert len(table) == 3 * 2 * 2 * 3 and table["accuracy"].between(0, 100).all()


def test_full_builds_its_data(recorded, tmp_path):
    "As on the hub: names, splits, columns, and the true numbers of rows."
    import schemas

    folder = recorded.write("imagenetv2", tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    for source in (FULL.test_data, f"{folder}#train"):
        part = Streams(source, [], 8, processor=processor, noise=0)
        x = prepare(part.photos, FULL.shifts[-1], torch.arange(3), part.noise)
        assert x.shape == (3, 3, 8, 8)
        assert int(part.photos.labels.max()) > 100
    assert recorded.asked == [FULL.test_data]
    assert schemas.rows(FULL.test_data) >= FULL.n_test and FULL.model in schemas.MODELS
