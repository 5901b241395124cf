"""TTM against the official package (or the parent model of transformers), and windows by view."""

import statistics
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from clock import seconds

from adaptlab.inference.ttm import TTMConfig, TTMForPrediction, WindowDataset


def step_of(model, x, y):
    def step():
        model.zero_grad()
        model(past_values=x, future_values=y).loss.backward()

    return step


@pytest.mark.parametrize("work", ["forecast", "train step"])
def test_against_the_official_package(benchmark, work):
    peer = pytest.importorskip("tsfm_public.models.tinytimemixer", reason="needs granite-tsfm")
    config = TTMConfig()  # TTM-B, 512 steps to 96
    ours = TTMForPrediction(config)
    stored = asdict(config) | {"patch_stride": config.patch_length}
    theirs = peer.TinyTimeMixerForPrediction(peer.TinyTimeMixerConfig(**stored))
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(64, 512, 7), torch.randn(64, 96, 7)
    if work == "forecast":
        ours.eval(), theirs.eval()
        with torch.no_grad():
            benchmark.pedantic(lambda: ours(x), rounds=5, iterations=1, warmup_rounds=1)
            plain = seconds(lambda: theirs(x), 5, statistics.median)
            found, wanted = ours(x).prediction_outputs, theirs(x).prediction_outputs
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        benchmark.pedantic(step_of(ours, x, y), rounds=5, iterations=1, warmup_rounds=1)
        plain = seconds(step_of(theirs, x, y), 5, statistics.median)
    ratio = benchmark.stats.stats.median / plain
    benchmark.extra_info["ours / official"] = round(ratio, 2)
    print(f"\nTTM-B, {work}: {ratio:.2f} times the official package's time")
    assert ratio < 1.25


def test_against_transformers_parent_model(benchmark):
    "The plain stack without a decoder is PatchTSMixer; same weights, same numbers."
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    peer = PatchTSMixerForPrediction(PatchTSMixerConfig(
        context_length=512, patch_length=64, patch_stride=64, num_input_channels=7, d_model=192,
        num_layers=6, prediction_length=96, expansion_factor=2, scaling="std")).eval()  # fmt: skip
    ours = TTMForPrediction(TTMConfig(num_input_channels=7, num_layers=6, use_decoder=False,
                                      adaptive_patching_levels=0)).eval()  # fmt: skip
    state = {k.replace("model.", "backbone.", 1): v for k, v in peer.state_dict().items()}
    ours.load_state_dict({k: v for k, v in state.items() if k in ours.state_dict()})
    x = torch.randn(64, 512, 7)
    with torch.no_grad():
        benchmark.pedantic(lambda: ours(x), rounds=5, iterations=1, warmup_rounds=1)
        plain = seconds(lambda: peer(x), 5, statistics.median)
        torch.testing.assert_close(ours(x).prediction_outputs, peer(x).prediction_outputs)
    ratio = benchmark.stats.stats.median / plain
    benchmark.extra_info["ours / PatchTSMixer"] = round(ratio, 2)
    print(f"\nplain stack: {ratio:.2f} times the time of transformers' PatchTSMixer")
    assert ratio < 1.25


def test_windows_by_view_against_a_copy_of_each(benchmark):
    "Making the data set and one epoch of batches: views against windows that are stored."
    n, context, horizon, size = 50_000, 512, 96, 64
    frame = pd.DataFrame({"y": np.random.default_rng(0).normal(size=n)},
                         index=pd.date_range("2020", periods=n, freq="h"))  # fmt: skip
    rows = torch.randperm(n - context - horizon + 1)[: 100 * size].split(size)

    def views():
        ds = WindowDataset(frame, ["y"], context=context, horizon=horizon)
        return sum(float(ds.batch(r)["past_values"].sum()) for r in rows)

    def copies():
        values = torch.tensor(frame.to_numpy(np.float32))
        count = n - context - horizon + 1
        past = torch.stack([values[i : i + context] for i in range(count)])
        return sum(float(past[r].sum()) for r in rows)

    result = benchmark.pedantic(views, rounds=3, iterations=1, warmup_rounds=1)
    assert abs(result - copies()) < 1
    ratio = benchmark.stats.stats.median / seconds(copies, 1)
    benchmark.extra_info["views / copies"] = round(ratio, 2)
    print(f"\n{n:,} rows: windows by view take {ratio:.2f} times the time of stored ones")
    assert ratio < 1
