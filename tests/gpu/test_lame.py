"""LAME on a GPU: the same numbers, a batch against plain formulas, SMALL, and FULL's shape."""

import copy

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from adaptlab.bench import cost
from adaptlab.bench.runs import launch
from adaptlab.experiments.lame import FULL, SMALL, adapt, make_bed
from adaptlab.testtime.lame import (
    LAME,
    AdaBN,
    PseudoLabel,
    ShotIM,
    Tent,
    knn_affinity,
    lame,
    laplacian_optimization,
    linear_affinity,
    nearest_neighbors,
    rbf_affinity,
)
from gpu.card import DEVICE, DRY, clock, in_turn, row


def batch(n=256, dim=64, classes=10):
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, dim, generator=g)
    features = centers[torch.randint(classes, (n,), generator=g)]
    features = features + torch.randn(n, dim, generator=g)
    return features @ centers.T / 4, features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["knn", "rbf", "linear"])
def test_agrees_with_float64(name, dtype):
    logits, features = (t.to(dtype) for t in batch())
    exact = lame(logits.double(), features.double(), name)
    with torch.autocast(DEVICE, torch.bfloat16):  # must not round what is inside
        found = lame(logits.to(DEVICE), features.to(DEVICE), name)
    assert found.device.type == DEVICE and found.dtype == torch.float32
    assert (found.cpu().argmax(1) == exact.argmax(1)).float().mean() > 0.99
    assert (found.cpu() - exact).abs().mean() < 1e-3
    if name == "knn":
        lists = nearest_neighbors(features.to(DEVICE))
        w = knn_affinity(features.to(DEVICE))
        torch.testing.assert_close(torch.zeros_like(w).scatter_(1, lists, 1.0), w)
        torch.testing.assert_close(laplacian_optimization(logits.to(DEVICE), w), found,
                                   atol=1e-4, rtol=0)
    for affinity in (rbf_affinity, linear_affinity):
        assert torch.isfinite(affinity(features.to(DEVICE))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AdaBN, Tent, ShotIM, PseudoLabel, LAME])
def test_wrappers(kind, dtype):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                       num_labels=4)
    model = transformers.ResNetForImageClassification(config).to(DEVICE, dtype).eval()
    x = torch.rand(16, 3, 32, 32, device=DEVICE, dtype=dtype)
    adapted = kind(model)
    first = adapted(x) + 0
    assert first.dtype == torch.float32 and first.device.type == DEVICE
    torch.testing.assert_close(first.sum(1), torch.ones(16, device=DEVICE))
    with pytest.raises(ValueError, match="NaN"):
        adapted(x.index_fill(0, torch.tensor([3], device=DEVICE), torch.nan))
    with torch.inference_mode():
        assert torch.isfinite(adapted(x)).all()
    if hasattr(adapted, "reset"):
        adapted.reset()
    torch.testing.assert_close(adapted(x) + 0, first, atol=2e-2, rtol=0)


def test_a_batch_against_the_formulas():
    logits, features = (t.to(DEVICE) for t in batch(1000, 2048, 1000))

    def formulas():
        x = torch.nn.functional.normalize(features)
        near = torch.cdist(x, x).fill_diagonal_(torch.inf).topk(5, largest=False).indices
        w = torch.zeros(len(x), len(x), device=DEVICE).scatter_(1, near, 1.0)
        log_q = logits.log_softmax(1)
        z = log_q.exp()
        for _ in range(100):
            z, old = (log_q + w @ z).softmax(1), z
            if (z - old).abs().max() < 1e-6:
                break
        return z

    assert (lame(logits, features).argmax(1) == formulas().argmax(1)).float().mean() > 0.99
    ours, theirs = in_turn(lambda: lame(logits, features), formulas)
    row("LAME, N = 1,000, d = 2,048", ours, reference=theirs, bound=1.0)
    n = 500 if DRY else 50_000
    many = torch.randn(n, 2048, device=DEVICE)
    row(f"LAME, N = {n:,}, d = 2,048", *clock(lambda: lame(many[:, :1000], many)))


def test_small(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE)
    if DRY:
        cfg = cfg.replace(n_test=64, n_validation=64, shifts=("clean",),
                          methods=("LAME", "Tent"))
    report = launch("lame", cfg, root=tmp_path, progress=False)
    assert report.tables["tested"]["accuracy"].between(0, 100).all()
    assert set(report.figures) == {"main"}


def test_full_shape(tmp_path):
    "ResNet-50 with random weights: one stream of a few batches, for every method."
    sizes = {} if not DRY else {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = transformers.ResNetConfig(num_labels=1000, **sizes)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    side = 32 if DRY else 224
    transformers.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(
        tmp_path / "resnet")
    rng, places = np.random.default_rng(0), [tmp_path / "images" / str(i) for i in range(4)]
    for place in places:
        place.mkdir(parents=True)
        for i in range(32):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(place / f"{i}.png")
    data = f"{tmp_path / 'images'}#train"
    cfg = FULL.replace(model=str(tmp_path / "resnet"), test_data=data, device=DEVICE,
                       validation_data=data, shifts=FULL.shifts[1:], streams=("class",), seeds=(0,))
    bed = make_bed(cfg, 0)
    x = torch.rand(cfg.batch_size, 3, side, side, device=DEVICE)
    counted = cost.activation_bytes(copy.deepcopy(bed.model).train(), x) / 2**30
    for name in ("LAME", "AdaBN", "Tent"):
        with bed.fresh() as model:
            adapted = adapt(model, bed, 0, name)
            found = bed.test.accuracy(adapted)
            assert len(found) == 1 and 0 <= found[0]["accuracy"] <= 100
            row(f"ResNet-50, a batch of 64, {name}", *clock(lambda a=adapted: a(x)),
                counted=(None, counted if name == "Tent" else None))
