"""LAME's core against plain ways of writing it, in one run: same numbers, less time."""

import pytest
import torch
from clock import seconds
from torch.nn import functional as F

from adaptlab.testtime.lame import lame, laplacian_optimization, nearest_neighbors


def batch(n, dim=128, classes=100):
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, dim, generator=g)
    labels = torch.randint(classes, (n,), generator=g)
    features = centers[labels] + 2 * torch.randn(n, dim, generator=g)
    return features @ centers.T / dim**0.5 + torch.randn(n, classes, generator=g), features


def loop_lame(logits, features, k=5, max_steps=100):
    "One sample at a time, as a first attempt would be written."
    x, log_q = F.normalize(features), logits.log_softmax(1)
    neighbors = []
    for i in range(len(x)):
        distance = (x - x[i]).norm(dim=1)
        distance[i] = torch.inf
        neighbors.append(distance.argsort()[:k])
    z, old = log_q.exp(), float("inf")
    for step in range(max_steps):
        new, energy = torch.empty_like(z), 0.0
        for i in range(len(x)):
            scores = log_q[i] + z[neighbors[i]].sum(0)
            new[i] = scores.softmax(0)
            energy -= float(scores.logsumexp(0))
        z = new
        if step > 1 and abs(energy - old) <= 1e-8 * abs(old):
            break
        old = energy
    return z


def broadcast_lame(logits, features, k=5, max_steps=100):
    "The paper's formulas on whole arrays: [N, N, d] differences, dense W, the energy's terms."
    x = F.normalize(features)
    distance = (x[None] - x[:, None]).norm(dim=-1)
    near = distance.topk(k + 1, largest=False).indices[:, 1:]
    return formula_iteration(logits, torch.zeros(len(x), len(x)).scatter_(1, near, 1.0), max_steps)


def formula_iteration(logits, w, max_steps=100):
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


@pytest.mark.parametrize("n", [64, 256, 1024])
def test_against_a_loop_over_samples(benchmark, n):
    logits, features = batch(n)
    torch.testing.assert_close(
        lame(logits, features), loop_lame(logits, features), atol=1e-4, rtol=0
    )
    benchmark(lame, logits, features)
    slow = seconds(lambda: loop_lame(logits, features), 1)
    fast = seconds(lambda: lame(logits, features), 5)
    benchmark.extra_info["ratio"] = fast / slow
    print(f"\nLAME, n = {n}: {1e3 * fast:.2f} ms, loop {1e3 * slow:.0f} ms: {slow / fast:.0f}x")
    assert fast < slow


@pytest.mark.parametrize("n, dim, classes", [(64, 2048, 1000), (256, 512, 100), (1024, 512, 100)])
def test_against_the_formulas_on_whole_arrays(benchmark, n, dim, classes):
    logits, features = batch(n, dim, classes)
    expected = broadcast_lame(logits, features)
    torch.testing.assert_close(lame(logits, features), expected, atol=1e-4, rtol=0)
    benchmark(lame, logits, features)
    repeat = 5 if n < 1024 else 1
    slow = seconds(lambda: broadcast_lame(logits, features), repeat)
    fast = seconds(lambda: lame(logits, features), 5)
    benchmark.extra_info["ratio"] = fast / slow
    print(
        f"\nLAME, n = {n}, d = {dim}, K = {classes}: {1e3 * fast:.2f} ms, "
        f"formulas as they stand {1e3 * slow:.2f} ms: ratio {fast / slow:.2f}"
    )
    assert fast <= slow


@pytest.mark.parametrize("n, classes", [(64, 1000), (2048, 100)])
def test_iteration_alone(benchmark, n, classes):
    "The fixed-point iteration, given the neighbours: lists, dense W, and the formulas."
    logits, features = batch(n, classes=classes)
    near = nearest_neighbors(features)
    w = torch.zeros(n, n).scatter_(1, near, 1.0)
    expected = formula_iteration(logits, w)
    for affinity in (near, w):
        found = laplacian_optimization(logits, affinity)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    benchmark(laplacian_optimization, logits, near)
    slow = seconds(lambda: formula_iteration(logits, w), 3)
    dense = seconds(lambda: laplacian_optimization(logits, w), 3)
    fast = seconds(lambda: laplacian_optimization(logits, near), 3)
    benchmark.extra_info["ratio"] = fast / slow
    print(
        f"\niteration, n = {n}, K = {classes}: lists {1e3 * fast:.2f} ms, dense "
        f"{1e3 * dense:.2f} ms, formulas {1e3 * slow:.2f} ms: ratio {fast / slow:.2f}"
    )
    assert fast <= slow
