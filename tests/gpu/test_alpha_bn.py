"""α-BN and Core on a GPU: the same numbers, SMALL, and FULL's shape."""

import copy

import pytest
import torch
import transformers
from torch import nn

from adaptlab.bench.runs import launch
from adaptlab.experiments.alpha_bn import FULL, SMALL
from adaptlab.testtime.alpha_bn import AlphaBatchNorm, Core, alpha_layers, convert_alpha_bn
from gpu.card import DEVICE, DRY, clock, row


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind, shape", [(nn.BatchNorm1d, (64, 3)),
                                         (nn.BatchNorm2d, (16, 3, 12, 12)),
                                         (nn.BatchNorm3d, (8, 3, 4, 5, 6)),
                                         (nn.SyncBatchNorm, (16, 3, 7))])
def test_agrees_with_float64(kind, shape, alpha, dtype, atol):
    g = torch.Generator().manual_seed(0)
    x, bn = (5 + 2 * torch.randn(shape, generator=g)).to(dtype), kind(3).to(dtype)
    bn.running_mean.copy_(torch.tensor([4.0, 5.0, 6.0]))
    exact = AlphaBatchNorm(copy.deepcopy(bn).double().eval(), alpha)(x.double())
    x = x.to(DEVICE)
    for needs_gradient in (False, True):
        layer = AlphaBatchNorm(bn.to(DEVICE).eval(), alpha)
        found = layer(x.requires_grad_(needs_gradient))
        assert found.device.type == DEVICE and found.dtype == dtype
        torch.testing.assert_close(found.detach().cpu().double(), exact, atol=atol, rtol=0.01)
    found.float().sum().backward()
    assert x.grad.isfinite().all()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(x).isfinite().all()


def resnet(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {} if not DRY else {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(num_labels=1000, **sizes))
    return model.to(DEVICE, dtype).to(memory_format=torch.channels_last).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_core(dtype):
    model = resnet(dtype)
    x = torch.rand(8, 3, 64, 64, device=DEVICE, dtype=dtype)
    before, core = copy.deepcopy(model.state_dict()), Core(model, 0.7)
    first = core(x)
    core(x)
    assert first.dtype == dtype and core.updates == 2
    assert all(p.dtype == torch.float32 for p in core.trained)
    core.reset()
    torch.testing.assert_close(core(x), first, atol=2e-2, rtol=2e-2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_small(tmp_path):
    "Every method, on short streams."
    cfg = SMALL.replace(
        seeds=(0,), device=DEVICE, n_test=128, n_choose=64, shifts=("clean", "blur-3"),
        choose_shifts=("pixelate-3",), alphas=(1.0, 0.5, 0.0), lrs=(1e-2,), tent_lrs=(0.1,),
        momenta=(0.3,))
    report = launch("alpha_bn", cfg, root=tmp_path, progress=False)
    assert report.tables["online"]["accuracy"].between(0, 100).all()


@pytest.mark.parametrize("size", [64, 200])
def test_full_shape(size):
    "ResNet-50 with random weights: a batch by the frozen network, α-BN, and Core."
    assert f"iid/{size}" in FULL.streams
    model, side = resnet(), 32 if DRY else 224
    x = torch.rand(size, 3, side, side, device=DEVICE).to(memory_format=torch.channels_last)
    plain, _ = clock(lambda: torch.no_grad()(model)(x), rounds=5)
    row(f"FULL: ResNet-50, {size} images, frozen", plain)
    wrapped = convert_alpha_bn(model, 0.7)
    assert len(alpha_layers(wrapped)) == (53 if not DRY else len(alpha_layers(wrapped)))
    core = Core(model, 0.7)
    for name, work in (("α-BN", lambda: torch.no_grad()(wrapped)(x)), ("Core", lambda: core(x))):
        seconds, gib = clock(work, rounds=5)
        row(f"FULL: ResNet-50, {size} images, {name}", seconds, gib, reference=plain,
            against="the frozen network")
