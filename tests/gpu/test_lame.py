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
from gpu.card import DEVICE, DRY, clock, in_turn, machine, row


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


def formulas(logits, features, k=5, max_steps=100):
    "The paper's formulas and its stopping rule, on whole arrays."
    x = torch.nn.functional.normalize(features)
    near = torch.cdist(x, x).fill_diagonal_(torch.inf).topk(k, largest=False).indices
    w = torch.zeros(len(x), len(x), device=x.device).scatter_(1, near, 1.0)
    unary = -(logits.softmax(1) + 1e-10).log()
    z, old = (-unary).softmax(1), float("inf")
    for step in range(max_steps):
        pull = w @ z
        z = (pull - unary).softmax(1)
        energy = float((unary * z - pull * z + z * z.clip(1e-20).log()).sum())
        if step > 1 and abs(energy - old) <= 1e-8 * abs(old):
            break
        old = energy
    return z


def test_a_batch_against_the_formulas():
    "Unsure logits, so that there is something to iterate."
    logits, features = (t.to(DEVICE) for t in batch(1000, 2048, 1000))
    logits = 6 * torch.nn.functional.normalize(logits)
    gap = (lame(logits, features) - formulas(logits, features)).abs()
    assert gap.mean() < 1e-6 and gap.max() < 0.02  # two rules, which do not stop at the same step
    ours, theirs = in_turn(lambda: lame(logits, features), lambda: formulas(logits, features))
    row("a batch, N = 1,000, d = 2,048", ours, reference=theirs, against="plain formulas",
        bound=1.0)
    n = 500 if DRY else 50_000
    many = torch.randn(n, 2048, device=DEVICE)
    row(f"a batch, N = {n:,}, d = 2,048", *clock(lambda: lame(many[:, :1000], many), rounds=3,
                                                 warm=1))


def test_small(tmp_path):
    "Every method, on one short stream."
    cfg = SMALL.replace(
        seeds=(0,), device=DEVICE, n_test=128, n_validation=64, shifts=("clean",),
        validation_shifts=("clean",), streams=("class",), validation_streams=("class",),
        neighbors=(3,), lrs=(1e-2,), bn_momenta=(0.0,), adabn_momenta=(0.3,))
    report = launch("lame", cfg, root=tmp_path, progress=False)
    assert report.tables["tested"]["accuracy"].between(0, 100).all()
    assert set(report.figures) == {"main"}


@torch.enable_grad()
def counted(adapted, x, learns, looks):
    "Seconds and GiB of a batch, from the model's shape alone; only Tent keeps activations."
    model = copy.deepcopy(getattr(adapted, "model", adapted)).to("meta").eval()
    for norm in model.modules() if learns else ():
        norm.train(isinstance(norm, torch.nn.BatchNorm2d))
    x = x.to("meta")
    found = cost.needs(
        model, flops=cost.forward_flops(model, x, 1), trained=learns, looked_at=looks,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad) * learns,
        activations=cost.activation_bytes(model, x) if learns else None,
        machine=machine(half=False)).set_index("what")
    amount, unit = found.loc["memory, together", ["amount", "unit"]]
    gib = amount / 1024 if unit == "MiB" else amount
    return 3600 * found.loc["time", "amount"], gib if learns else None


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
        for i in range(16):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(place / f"{i}.png")
    data = f"{tmp_path / 'images'}#train"
    cfg = FULL.replace(model=str(tmp_path / "resnet"), test_data=data, device=DEVICE,
                       validation_data=data, shifts=FULL.shifts[1:], streams=("class",), seeds=(0,))
    bed, plain = make_bed(cfg, 0), None
    x = torch.rand(cfg.batch_size, 3, side, side, device=DEVICE)
    x, passes = x.to(memory_format=torch.channels_last), {"source": 1, "LAME": 1, "AdaBN": 2}
    for name in (*passes, "Tent"):
        with bed.fresh() as model, torch.no_grad():
            adapted = adapt(model, bed, 0, name)
            if name == "Tent":
                found = bed.test.accuracy(adapted)
                assert len(found) == 1 and 0 <= found[0]["accuracy"] <= 100
            seconds, gib = clock(lambda a=adapted: a(x), rounds=5)
            plain = seconds if name == "source" else plain
            row(f"FULL: ResNet-50, 64 images, {name}", seconds, gib, reference=plain,
                against="the frozen network",
                counted=counted(adapted, x, int(name == "Tent"), passes.get(name, 1)))
