"""Costs: ratios of two ways, bytes of activations, and what a run needs."""

import gc
import time
import weakref

import pytest
import torch
from torch import nn

from adaptlab.bench import cost


def test_speedup_is_the_ratio_of_the_times():
    found = cost.speedup(lambda: time.sleep(0.03), lambda: time.sleep(0.01), repeats=3)
    assert found.value > 1 and found.low <= found.value <= found.high
    with pytest.raises(ValueError, match="at least one"):
        cost.speedup(print, print, repeats=0)


def test_activations_are_what_backward_needs():
    "The input of each layer that has a gradient to compute, and nothing else."
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(32, 8)
    assert cost.activation_bytes(net, x) == 4 * 32 * (8 + 16)
    net[0].requires_grad_(False)
    assert cost.activation_bytes(net, x) == 4 * 32 * 16
    net.requires_grad_(False)
    assert cost.activation_bytes(net, x) == 0
    meta = nn.Linear(8, 16).to("meta")
    assert cost.activation_bytes(meta, x.to("meta")) == 4 * 32 * 8


def test_what_was_counted_is_freed():
    "The output of a sigmoid is kept for its gradient: no cycle may keep it afterwards."
    made = []
    net = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4))
    net[1].register_forward_hook(lambda m, args, out: made.append(weakref.ref(out)))
    gc.disable()
    try:
        assert cost.activation_bytes(net, torch.randn(32, 8)) == 4 * 32 * (8 + 16)
        assert made[0]() is None
    finally:
        gc.enable()


def test_memory_of_a_step_counts_what_it_allocates():
    big = 2**20
    assert cost.step_memory(lambda: torch.zeros(big)) >= 4 * big
    assert cost.step_memory(lambda: torch.zeros(big // 4)) < 2 * big


def test_forward_flops_are_counted_per_sample():
    net = nn.Linear(8, 16)
    assert cost.forward_flops(net, torch.randn(32, 8), 32) == 2 * 8 * 16
    assert net.training


def test_needs_follow_the_counts():
    net = nn.Linear(1000, 1000, bias=False)
    machine = cost.Machine("toy", 1.0, 2.0, share=0.5)
    found = cost.needs(net, trained=1e6, looked_at=1e6, machine=machine).set_index("what")["amount"]
    assert found["time"] == pytest.approx((3 + 1) * 2e6 * 1e6 / 0.5e12 / 3600)
    assert found["weights"] == pytest.approx(4e6 / 2**20)  # MiB: in GiB it would read 0.00
    assert found["memory, together"] == pytest.approx(16e6 / 2**30)
    assert "activations of a step" not in found  # nobody counted them
    frozen = cost.needs(net, trained=1e6, trainable=0, bytes_per_weight=2, machine=machine)
    frozen = frozen.set_index("what")["amount"]
    assert frozen["time"] == pytest.approx(2 * 2e6 * 1e6 / 0.5e12 / 3600)
    assert frozen["weights"] == pytest.approx(2e6 / 2**20) and "gradients and AdamW" not in frozen
    counted = cost.needs(net, trained=1, activations=3 * 2**30).set_index("what")
    assert counted.loc["activations of a step", ["amount", "unit"]].tolist() == [3, "GiB"]
    assert "not counted" not in counted.loc["memory, together", "from"]


def test_what_a_card_said():
    "Each row belongs to a lesson or to the core; a paper without one says how to get some."
    import pandas as pd

    from adaptlab import catalog

    rows = pd.read_csv(cost.resources.files("adaptlab.bench") / "card.csv")
    assert set(rows["paper"]) <= {p.slug for p in catalog.papers()} | {"core"}
    measured = rows[["seconds", "gib"]].notna().any(axis=1)
    assert measured.all() and rows[["card", "torch"]].notna().all(axis=None)
    for paper in set(rows["paper"]):
        found = cost.on_card(paper)
        assert len(found) == (rows["paper"] == paper).sum() and rows["card"][0] in found.index.name
    with pytest.raises(ValueError, match="make test-gpu"):
        cost.on_card("no_such_paper")
