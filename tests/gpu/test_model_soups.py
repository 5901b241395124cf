"""Model soups on a GPU: the method in float32 and bf16, SMALL, and FULL's shape."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

from adaptlab import recipes
from adaptlab.arithmetic.model_soups import (
    LearnedSoup, greedy_soup, logit_ensemble, recalibrate_batchnorm, uniform_soup)
from adaptlab.bench.runs import launch
from adaptlab.bench.pictures import ClipClassifier
from adaptlab.experiments.model_soups import FULL, SMALL
from gpu.card import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_method(dtype):
    torch.manual_seed(0)
    net = recipes.SmallCNN(channels=(4, 8)).to(DEVICE, dtype).eval()
    nets = [copy.deepcopy(net) for _ in range(4)]
    for other in nets:
        for p in other.parameters():
            p.data += 0.05 * torch.randn_like(p)
    x, y = torch.rand(32, 1, 8, 8, device=DEVICE, dtype=dtype), torch.randint(10, (32,))
    mean = {k: torch.stack([n.state_dict()[k].double() for n in nets]).mean(0)
            for k in net.state_dict()}
    near = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    greedy = greedy_soup(nets, lambda m: 0.0, net).state_dict
    for soup in (uniform_soup(nets), greedy):
        for key, value in soup.items():
            assert value.device.type == DEVICE
            torch.testing.assert_close(value.double(), mean[key], **near)
    pot = LearnedSoup(net, nets)
    assert torch.isfinite(pot(x)).all() and torch.isfinite(logit_ensemble(nets)(x)).all()
    pot.fit((x, y.to(DEVICE)), epochs=2)
    far = LearnedSoup(net, nets, stack_device="cpu")
    F.cross_entropy(far(x).float(), y.to(DEVICE)).backward()
    assert torch.isfinite(far.raw.grad).all()
    assert recalibrate_batchnorm(net, greedy, [x])


def test_small(tmp_path):
    cfg = SMALL.replace(device=DEVICE, seeds=(0, 1), members=3, epochs=(1, 1), sizes=(64, 64),
                        limit_seeds=1)
    assert launch("model_soups", cfg, root=tmp_path, progress=False).claims


def test_shape_of_full():
    model = ClipClassifier(transformers.CLIPModel(transformers.CLIPConfig()), 1000).to(DEVICE)
    x = torch.randn(FULL.training.batch_size, 3, 224, 224)
    y = torch.randint(1000, (len(x),))
    found = FULL.training.fit(model, (x, y), lambda m, b: F.cross_entropy(m(b[0]), b[1]),
                              steps=2, warmup=0, device=DEVICE, progress=False)
    assert found.steps == 2
    nets = [model, copy.deepcopy(model)]
    x = x[:16].to(DEVICE)
    pot = LearnedSoup(model, nets, stack_device="cpu")
    assert torch.isfinite(pot(x)).all()
    assert len(uniform_soup(nets)) == len(model.state_dict())
