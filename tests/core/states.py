"""States of random layouts, and how two of them are compared."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from adaptlab import weights

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
fast = settings(max_examples=25, deadline=None)


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    "Pieces of 7 entries, so that small tensors have several and a last one that is shorter."
    old, weights.PIECE = weights.PIECE, 7
    yield
    weights.PIECE = old


@st.composite
def layouts(draw, dtypes=tuple(FLOATS)):
    "Names with shape and dtype, among them scalars and empty tensors."
    shape = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    n = draw(st.integers(1, 4))
    return {f"t{i}": (draw(shape), draw(st.sampled_from(dtypes))) for i in range(n)}


def make(layout, seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g).to(d) for n, (s, d) in layout.items()}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def near(a, b, factor=1.0):
    return a.keys() == b.keys() and all(
        torch.allclose(a[n].double(), b[n].double(), rtol=0, atol=factor * EPS[a[n].dtype])
        for n in a
    )


EPS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}
