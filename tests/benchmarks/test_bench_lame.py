"""LAME's core against plain ways of writing it, in one run: same numbers, less time."""

import pytest
import torch
from clock import in_turn, row
from torch.nn import functional as F

from adaptlab.testtime.lame import lame, laplacian_optimization, nearest_neighbors


def batch(n, dim=128, classes=100):
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, dim, generator=g)
    labels = torch.randint(classes, (n,), generator=g)
    features = centers[labels] + 2 * torch.randn(n, dim, generator=g)
    return features @ centers.T / dim**0.5 + torch.randn(n, classes, generator=g), features


def by_formulas(logits, features, k=5):
    "The paper's formulas on whole arrays: [N, N, d] differences, dense W, the energy's terms."
    x = F.normalize(features)
    distance = (x[None] - x[:, None]).norm(dim=-1)
    near = distance.topk(k + 1, largest=False).indices[:, 1:]
    return iterated(logits, torch.zeros(len(x), len(x)).scatter_(1, near, 1.0))


def iterated(logits, w, max_steps=100):
    "The iteration alone, with a dense W."
    unary = -(logits.softmax(1) + 1e-10).log()
    y, old = (-unary).softmax(1), float("inf")
    for step in range(max_steps):
        pairwise = w @ y
        y = (pairwise - unary).softmax(1)
        energy = float((unary * y - pairwise * y + y * y.clip(1e-20).log()).sum())
        if step > 1 and abs(energy - old) <= 1e-8 * abs(old):
            break
        old = energy
    return y


@pytest.mark.parametrize("n, dim, classes", [(64, 2048, 1000), (256, 512, 100), (1024, 512, 100)])
def test_a_batch(n, dim, classes):
    logits, features = batch(n, dim, classes)
    expected = by_formulas(logits, features)
    torch.testing.assert_close(lame(logits, features), expected, atol=1e-4, rtol=0)
    ours, theirs = in_turn(lambda: lame(logits, features), lambda: by_formulas(logits, features),
                           rounds=5 if n < 1024 else 3)
    row(f"LAME, N = {n}, d = {dim}, K = {classes}", ours, theirs, bound=1.0)


@pytest.mark.parametrize("n, classes", [(64, 1000), (2048, 100)])
def test_the_iteration_alone(n, classes):
    "Given the neighbours: as lists, and as a dense W."
    logits, features = batch(n, classes=classes)
    near = nearest_neighbors(features)
    w = torch.zeros(n, n).scatter_(1, near, 1.0)
    expected = iterated(logits, w)
    for kind, affinity in (("lists", near), ("dense", w)):
        found = laplacian_optimization(logits, affinity)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        ours, theirs = in_turn(lambda a=affinity: laplacian_optimization(logits, a),
                               lambda: iterated(logits, w), rounds=5)
        row(f"LAME's iteration, N = {n}, {kind}", ours, theirs, bound=1.0)
