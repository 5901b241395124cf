"""TTM against the parent model of transformers, training against its bare step, windows by view."""

import numpy as np
import pandas as pd
import torch
from clock import in_turn, row

from adaptlab.inference.ttm import TTMConfig, TTMForPrediction, WindowDataset, pretrain


def test_against_transformers_parent_model():
    "The plain stack without a decoder is PatchTSMixer; same weights, same numbers."
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    peer = PatchTSMixerForPrediction(PatchTSMixerConfig(
        context_length=512, patch_length=64, patch_stride=64, num_input_channels=7, d_model=192,
        num_layers=6, prediction_length=96, expansion_factor=2, scaling="std")).eval()
    ours = TTMForPrediction(TTMConfig(num_input_channels=7, num_layers=6, decoder_num_layers=0,
                                      decoder_d_model=192, adaptive_patching_levels=0)).eval()
    state = {k.replace("model.", "backbone.", 1): v for k, v in peer.state_dict().items()}
    ours.load_state_dict({k: v for k, v in state.items() if k in ours.state_dict()})
    x, y = torch.randn(64, 512, 7), torch.randn(64, 96, 7)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).prediction_outputs, peer(x).prediction_outputs)
        row("TTM's plain stack, forecast", *in_turn(lambda: ours(x), lambda: peer(x)), bound=1.0)

    def step(model):
        model.zero_grad()
        model(past_values=x, future_values=y).loss.backward()

    row("TTM's plain stack, training step", *in_turn(lambda: step(ours), lambda: step(peer)),
        bound=1.0)


def windows(n=50_000, context=512, horizon=96):
    frame = pd.DataFrame({"y": np.random.default_rng(0).normal(size=n)},
                         index=pd.date_range("2020", periods=n, freq="h"))
    return WindowDataset(frame, ["y"], context=context, horizon=horizon)


def test_fit_against_its_bare_step():
    ds, model, steps = windows(), TTMForPrediction(TTMConfig()).train(), 10
    adam, rows = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randperm(50_000 - 607)

    def bare():
        for i in range(steps):
            adam.zero_grad()
            model(**ds.fetch_batch(rows[64 * i : 64 * i + 64])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()

    row("TTM-B, 10 steps in fit", *in_turn(
        lambda: pretrain(model, ds, steps, progress=False, device="cpu"), bare, rounds=5),
        bound=1.1)


def test_windows_by_view_against_a_copy_of_each():
    "Making the data set and one epoch of batches: views against windows that are stored."
    context, horizon, size = 512, 96, 64
    rows = torch.randperm(50_000 - context - horizon + 1)[: 100 * size].split(size)

    def views():
        ds = windows()
        return sum(float(ds.fetch_batch(r)["past_values"].sum()) for r in rows)

    def copies():
        values = windows().values
        past = torch.stack([values[i : i + context] for i in range(len(values) - 607)])
        return sum(float(past[r].sum()) for r in rows)

    assert abs(views() - copies()) < 1
    row("TTM's windows by view, not stored", *in_turn(views, copies, rounds=3), bound=1.0)
