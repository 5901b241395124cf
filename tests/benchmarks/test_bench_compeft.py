"""Selecting and coding ten million entries, against what the memory, a sort and zlib take."""

import zlib

import torch
from clock import in_turn, row

from adaptlab.arithmetic.compeft import (
    TernaryBitmask, golomb_decode, golomb_encode, ternarize, top_entries)
from adaptlab.evaluate import peak_memory

N = 10_000_000
TAU = torch.randn(N, generator=torch.Generator().manual_seed(0))


def official(tau, k):
    "As the official code does it: a k-th value, then a mask."
    size = tau.abs()
    kept = size >= size.kthvalue(int(N - k * N)).values
    return tau.sign() * kept * tau.std()


def test_ternarize():
    ours = in_turn(lambda: ternarize(TAU, 0.2), lambda: official(TAU, 0.2),
                   lambda: TAU.abs().sort(), rounds=3)
    row("ternarize 1e7 entries against kthvalue and mask", ours[0], ours[1], bound=1.0)
    row("ternarize 1e7 entries against a sort", ours[0], ours[2], bound=1.0)
    row("ternarize 1e7 entries, memory", peak_memory(lambda: ternarize(TAU, 0.2), "cpu") / 2**20,
        peak_memory(lambda: official(TAU, 0.2), "cpu") / 2**20, bound=1.0, unit="MiB")


def test_coders():
    v = ternarize(TAU, 0.2)
    code = golomb_encode(v)
    raw = TAU[: N // 10].half().numpy().tobytes()
    encode, copy = in_turn(lambda: golomb_encode(v), lambda: TAU.clone().sign_(), rounds=3)
    row("Golomb code of 1e7 entries, a fifth kept, against sign of a copy", encode, copy)
    row("the same against zlib of a tenth of the 16-bit numbers",
        *in_turn(lambda: golomb_encode(v), lambda: zlib.compress(raw, 6), rounds=3), bound=1.0)
    row("decoding", *in_turn(lambda: golomb_decode(code), lambda: golomb_encode(v), rounds=3),
        bound=2.0)


def test_dot_of_masks():
    vectors = [ternarize(TAU, 0.2), ternarize(TAU.flip(0), 0.2)]
    a, b = map(TernaryBitmask.of, vectors)
    x, y = (v.to_dense() for v in vectors)
    row("dot product of masks against the dense one", *in_turn(
        lambda: a.dot(b), lambda: float(x @ y), rounds=5), bound=2.0)


def test_cost_is_linear():
    "Twice the entries, about twice the time."
    small, large = TAU[: N // 4], TAU[: N // 2]
    row("top entries, 5e6 against 2.5e6 entries", *in_turn(
        lambda: top_entries(large, 0.1), lambda: top_entries(small, 0.1), rounds=3), bound=2.5)
