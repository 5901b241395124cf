"""Tiny Time Mixers: peers on the same weights, symmetries, checkpoints, data, bad input, runs."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import schemas
from adaptlab.bench.runs import launch, start_run
from adaptlab.bench.testbeds import Bed
from adaptlab.experiments import ttm as lab
from adaptlab.experiments.ttm import FULL, SMALL, experiment
from adaptlab.inference import ttm
from adaptlab.inference.ttm import (
    ForecastChannelMixer,
    ResolutionSampler,
    TTMConfig,
    TTMForPrediction,
    TTMLayer,
    WindowDataset,
    evaluate,
    fine_tune,
    freeze_backbone,
    frequency_token,
    from_pretrained,
    pretrain,
    pretraining_windows,
    reconfigure,
    std_scale,
)
from adaptlab.series import load_series, time_step

BASE = dict(
    context_length=96, prediction_length=12, patch_length=8, d_model=32, decoder_d_model=16,
    num_layers=2, decoder_num_layers=2, adaptive_patching_levels=3, num_input_channels=4,
)
EXOGENOUS = dict(
    enable_forecast_channel_mixing=True, prediction_channel_indices=(0, 2),
    exogenous_channel_indices=(1, 3), fcm_context_length=2,
)
VARIANTS = {
    "adaptive": {},
    "plain": dict(adaptive_patching_levels=0),
    "prefix": dict(resolution_prefix_tuning=True),
    "mix_channel decoder": dict(decoder_mode="mix_channel"),
    "mix_channel backbone": dict(mode="mix_channel"),
    "raw residual": dict(decoder_raw_residual=True, resolution_prefix_tuning=True),
    "exogenous": dict(**EXOGENOUS, decoder_mode="mix_channel"),
    "exogenous, cropped": dict(**EXOGENOUS, prediction_filter_length=7),
    "forecast mixing": dict(enable_forecast_channel_mixing=True),
    "categories": dict(decoder_mode="mix_channel", categorical_vocab_size_list=(3, 5)),
    "patches that do not divide": dict(context_length=101),
    "mae": dict(loss="mae"),
}


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    return TTMForPrediction(TTMConfig(**{**BASE, **changes})).eval()


def inputs_of(config, extra=0, seed=1):
    torch.manual_seed(seed)
    batch = {
        "past_values": torch.randn(3, config.context_length + extra, 4) * 3 + 5,
        "future_values": torch.randn(3, config.prediction_length, 4),
    }
    if config.resolution_prefix_tuning:
        batch["freq_token"] = torch.tensor([1, 7, 0])
    if config.categorical_vocab_size_list:
        batch["static_categorical_values"] = torch.tensor([[0, 4], [2, 2], [1, 0]])
    return batch


def days(n=400, freq="h", period=24, seed=0):
    noise = np.random.default_rng(seed).normal(size=(n, 2))
    wave = np.sin(2 * np.pi * np.arange(n) / period)
    index = pd.date_range("2024-01-01", periods=n, freq=freq)
    return pd.DataFrame({"y": wave + 0.1 * noise[:, 0], "known": noise[:, 1]}, index=index)


def windows_of(frame=None, context=48, horizon=12, **options):
    return WindowDataset(days() if frame is None else frame, ["y"], context=context,
                         horizon=horizon, **options)


def bed_of():
    frame = days()
    return Bed(None, windows_of(frame[:200]), windows_of(frame[200:300]), windows_of(frame[300:]))


def small_model(**changes):
    torch.manual_seed(0)
    sizes = dict(context_length=48, prediction_length=12, patch_length=8, d_model=16,
                 decoder_d_model=8, num_layers=1, decoder_num_layers=1,
                 adaptive_patching_levels=2)
    return TTMForPrediction(TTMConfig(**{**sizes, **changes}))


# ------------------------------------------------------------------ peers on the same weights


def official(model):
    "The official package's model with the same settings and weights."
    try:
        from tsfm_public.models.tinytimemixer import (
            TinyTimeMixerConfig,
            TinyTimeMixerForPrediction,
        )
    except ImportError as error:
        pytest.skip(f"granite-tsfm is not installed ({error})")
    stored = asdict(model.config) | {"patch_stride": model.config.patch_length}
    stored = {k: list(v) if isinstance(v, tuple) else v for k, v in stored.items()}
    peer = TinyTimeMixerForPrediction(TinyTimeMixerConfig(**stored)).eval()
    peer.load_state_dict(model.state_dict())  # strict: the same names and shapes
    return peer


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_official_package_agrees(variant):
    model = model_of(**VARIANTS[variant])
    peer = official(model)
    batch = inputs_of(model.config, extra=3)
    seen = torch.rand_like(batch["past_values"]) > 0.2
    future_seen = torch.rand_like(batch["future_values"]) > 0.2
    for masks in ({}, {"past_observed_mask": seen.float(), "future_observed_mask": future_seen}):
        ours, theirs = model(**batch, **masks), peer(**batch, **masks)
        for name in ("prediction_outputs", "loss", "loc", "scale", "backbone_hidden_state"):
            found = getattr(ours, name)
            torch.testing.assert_close(found, theirs[name], rtol=1e-5, atol=1e-5)


def test_official_package_reads_what_we_save(tmp_path):
    model = model_of(**VARIANTS["exogenous"])
    peer_class = type(official(model))
    model.save_pretrained(tmp_path)
    peer = peer_class.from_pretrained(tmp_path).eval()
    batch = inputs_of(model.config)
    torch.testing.assert_close(peer(**batch).prediction_outputs, model(**batch).prediction_outputs)


def patchtsmixer_config(**changes):
    from transformers import PatchTSMixerConfig

    return PatchTSMixerConfig(**{
        "context_length": 96, "patch_length": 8, "patch_stride": 8, "num_input_channels": 4,
        "prediction_length": 12, "d_model": 32, "expansion_factor": 2, "num_layers": 2,
        "gated_attn": True, "scaling": "std", "norm_mlp": "LayerNorm", **changes})


@pytest.mark.parametrize("mode", ["common_channel", "mix_channel"])
def test_layer_agrees_with_transformers(mode):
    from transformers.models.patchtsmixer.modeling_patchtsmixer import PatchTSMixerLayer

    peer = PatchTSMixerLayer(patchtsmixer_config(mode=mode)).eval()
    ours = TTMLayer(12, 32, channels=4 if mode == "mix_channel" else 0).eval()
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(3, 4, 12, 32)
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-6, atol=1e-6)


def test_scaler_agrees_with_transformers():
    from transformers.models.patchtsmixer import modeling_patchtsmixer as peer

    config = patchtsmixer_config(context_length=101)
    x, mask = torch.randn(3, 101, 4) * 9 - 4, (torch.rand(3, 101, 4) > 0.3).float()
    for ours, theirs in zip(std_scale(x, mask), peer.PatchTSMixerStdScaler(config)(x, mask),
                            strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length", [96, 101])
@pytest.mark.parametrize("mode", ["common_channel", "mix_channel"])
@torch.no_grad()
def test_whole_model_agrees_with_transformers(mode, length):
    "Without a decoder and adaptive patching, it is the parent model of transformers."
    from transformers import PatchTSMixerForPrediction

    peer = PatchTSMixerForPrediction(patchtsmixer_config(mode=mode, context_length=length)).eval()
    ours = model_of(adaptive_patching_levels=0, decoder_num_layers=0, decoder_d_model=32, mode=mode,
                    context_length=length)
    state = {k.replace("model.", "backbone.", 1): v for k, v in peer.state_dict().items()}
    ours.load_state_dict({k: v for k, v in state.items() if k in ours.state_dict()})
    batch = inputs_of(ours.config)
    found, wanted = ours(**batch), peer(**batch)
    torch.testing.assert_close(found.prediction_outputs, wanted.prediction_outputs)
    torch.testing.assert_close(found.loss, wanted.loss)


# ------------------------------------------------------------------ what must hold


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(1, 48))
def test_parameters_of_a_layer(n, d):
    layer = TTMLayer(n, d)
    assert sum(p.numel() for p in layer.parameters()) == 5 * n**2 + 4 * n + 5 * d**2 + 8 * d


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 1000), st.floats(-1e4, 1e4))
def test_scale_and_shift_go_through(a, b):
    model = small_model().double().eval()
    x = torch.randn(2, 48, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100
    f, g = model(x).prediction_outputs, model(a * x + b).prediction_outputs
    # the 1e-5 in the scale is the only thing that does not scale
    slack = 1e-5 / min(1.0, a) ** 2 * 10
    torch.testing.assert_close(g, a * f + b, rtol=1e-6, atol=(slack + 1e-6) * max(a, 1) * 10)


def test_a_mask_of_ones_is_no_mask_and_gaps_do_not_count():
    model = model_of()
    x = inputs_of(model.config)["past_values"]
    plain = model(x).prediction_outputs
    ones = torch.ones_like(x)
    torch.testing.assert_close(model(x, past_observed_mask=ones).prediction_outputs, plain)
    ones[:, 10:20] = 0
    y = x.clone()
    y[:, 10:20] = 1e4
    a, b = (model(v, past_observed_mask=ones) for v in (x, y))
    torch.testing.assert_close(a.loc, b.loc)
    torch.testing.assert_close(a.scale, b.scale)
    rows = [t for t in range(96) if not 10 <= t < 20]
    torch.testing.assert_close(a.loc[:, 0], x[:, rows].mean(1))


def test_future_mask_selects_the_loss():
    model = model_of()
    batch = inputs_of(model.config)
    mask = torch.zeros(3, 12, 4)
    mask[1, 5, 2] = 1
    out = model(**batch, future_observed_mask=mask)
    error = out.prediction_outputs[1, 5, 2] - batch["future_values"][1, 5, 2]
    torch.testing.assert_close(out.loss, error**2)


def test_targets_may_come_alone_or_with_all_channels():
    config = dict(prediction_channel_indices=(1, 3))
    model = model_of(**config)
    batch = inputs_of(model.config)
    whole = model(**batch)
    batch["future_values"] = batch["future_values"][..., [1, 3]]
    assert torch.equal(model(**batch).loss, whole.loss)
    assert whole.prediction_outputs.shape == (3, 12, 2)


@pytest.mark.parametrize("c", [0, 1, 3])
def test_known_values_reach_c_steps(c):
    config = TTMConfig(**{**BASE, **EXOGENOUS, "fcm_context_length": c})
    fcm = ForecastChannelMixer(config)
    base, past, future = torch.randn(2, 12, 2), torch.randn(2, 96, 4), torch.randn(2, 12, 4)
    other = future.clone()
    other[:, 6, 3] += 1
    moved = (fcm(base, past, future) != fcm(base, past, other)).any(2).any(0).nonzero().flatten()
    assert moved.tolist() == list(range(6 - c, 6 + c + 1))
    other = future.clone()
    other[..., [0, 2]] += 1  # the targets' future is not read
    assert torch.equal(fcm(base, past, future), fcm(base, past, other))


def test_infusion_takes_the_past_as_given_and_is_inside_the_scale():
    model = model_of(**EXOGENOUS)
    batch = inputs_of(model.config)
    out = model(**batch)
    base = model.head.base_forecast_block(out.decoder_hidden_state.flatten(2)).mT[..., [0, 2]]
    added = model.head.fcm_block(base, batch["past_values"], batch["future_values"])
    assert (added - base).abs().max() > 1e-2
    torch.testing.assert_close(out.prediction_outputs, added * out.scale + out.loc)


def test_loss_is_on_the_scale_of_the_data():
    model = model_of()
    batch = inputs_of(model.config)
    batch["past_values"] = 50 * batch["past_values"]
    out = model(**batch)
    error = out.prediction_outputs - batch["future_values"]
    torch.testing.assert_close(out.loss, error.square().mean())


def test_zeros_on_the_left_are_unobserved_where_there_is_a_mask():
    model = model_of()
    x = 5 + torch.randn(2, 60, 4)
    seen = model(x, past_observed_mask=torch.ones_like(x))
    torch.testing.assert_close(seen.loc, x.mean(1, keepdim=True))
    torch.testing.assert_close(model(x).loc, x.sum(1, keepdim=True) / 96)


def test_a_constant_is_forecast_up_to_epsilon():
    model = model_of().double()
    found = model(torch.full((1, 96, 4), 7.0, dtype=torch.float64)).prediction_outputs
    at_zero = model.backbone["encoder"](torch.zeros(1, 4, 12, 8, dtype=torch.float64), None)
    hidden = model.decoder(at_zero, None, None)
    f = model.head(hidden, None, None)
    torch.testing.assert_close(found, 7 + 1e-5**0.5 * f)


def test_prefix_changes_the_forecast():
    model = model_of(resolution_prefix_tuning=True)
    x = inputs_of(model.config)["past_values"]
    hourly, daily = (model(x, freq_token=torch.full((3,), t)) for t in (7, 8))
    assert not torch.equal(hourly.prediction_outputs, daily.prediction_outputs)


def test_crop_and_pad():
    model = model_of()
    x = torch.randn(2, 200, 4)
    assert torch.equal(model(x).prediction_outputs, model(x[:, -96:]).prediction_outputs)
    padded = torch.cat((torch.zeros(2, 50, 4), x[:, -46:]), 1)
    short = model(x[:, -46:]).prediction_outputs
    assert torch.equal(short, model(padded).prediction_outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = model_of(**VARIANTS["exogenous"], resolution_prefix_tuning=True)
    batch = inputs_of(model.config)
    wanted = model(**batch).prediction_outputs
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    found = model.to(dtype)(**batch).prediction_outputs
    assert found.dtype == dtype
    # bfloat16 keeps 8 bits of a value; of values near 5 +- 3 that is about 0.03
    tolerance = 1e-4 if dtype == torch.float64 else 0.3
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=tolerance)


def test_a_level_too_thin_warns_and_runs_plain():
    with pytest.warns(UserWarning, match="features per patch"):
        model = model_of(d_model=16, adaptive_patching_levels=3)
    assert [m.factor for m in model.backbone.encoder.mlp_mixer_encoder.mixers] == [1, 2, 1]


# ------------------------------------------------------------------ checkpoints


def released_layout():
    "Names and shapes of a released checkpoint in miniature, written out by hand."
    d, p, n, e = 16, 8, 6, 2
    shapes = {"backbone.encoder.patcher.weight": (d, p), "backbone.encoder.patcher.bias": (d,)}

    def layer(at, n, d):
        for mixer, m in (("patch_mixer", n), ("feature_mixer", d)):
            for norm in ("weight", "bias"):
                shapes[f"{at}.{mixer}.norm.norm.{norm}"] = (d,)
            for name, rows, columns in (("mlp.fc1", e * m, m), ("mlp.fc2", m, e * m),
                                        ("gating_block.attn_layer", m, m)):
                shapes[f"{at}.{mixer}.{name}.weight"] = (rows, columns)
                shapes[f"{at}.{mixer}.{name}.bias"] = (rows,)

    for level, factor in ((0, 2), (1, 1)):
        at = f"backbone.encoder.mlp_mixer_encoder.mixers.{level}.mixer_layers.0"
        layer(at, n * factor, d // factor)
    layer("decoder.decoder_block.mixers.0", n, 8)
    shapes |= {"decoder.adapter.weight": (8, d), "decoder.adapter.bias": (8,)}
    head = "head.base_forecast_block"
    return shapes | {f"{head}.weight": (12, n * 8), f"{head}.bias": (12,)}


def write_checkpoint(folder, drop=(), settings=None):
    config = {"architectures": ["TinyTimeMixerForPrediction"], "model_type": "tinytimemixer",
              "context_length": 48, "prediction_length": 12, "patch_length": 8, "patch_stride": 8,
              "d_model": 16, "decoder_d_model": 8, "num_layers": 1, "decoder_num_layers": 1,
              "adaptive_patching_levels": 2, "scaling": "std", "self_attn": False,
              "prediction_channel_indices": None, "init_std": 0.02, "num_patches": 6,
              "transformers_version": "4.37.2", "distribution_output": "student_t",
              **(settings or {})}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = {k: torch.randn(s) * 0.1 for k, s in released_layout().items() if k not in drop}
    save_file(state, folder / "model.safetensors")
    return state


def test_released_layout_loads(tmp_path):
    state = write_checkpoint(tmp_path)
    model = TTMForPrediction.from_pretrained(tmp_path, context_length=48, prediction_length=5)
    assert set(model.state_dict()) == set(state) and not model.training
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    x = torch.randn(2, 48, 3)
    whole = from_pretrained(tmp_path)(x).prediction_outputs
    assert torch.equal(model(x).prediction_outputs, whole[:, :5])
    mixed = from_pretrained(tmp_path, num_input_channels=3, decoder_mode="mix_channel")
    assert any("channel_feature_mixer" in k for k in mixed.state_dict())


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(drop=("decoder.adapter.bias",)), "decoder.adapter.bias"),
        (dict(settings={"self_attn": True}), "self_attn"),
        (dict(settings={"register_tokens": 4}), "register_tokens"),
        (dict(settings={"decoder_d_model": 16}), "decoder"),
        (dict(settings={"resolution_prefix_tuning": True}), "freq_mod"),
        (dict(settings={"use_decoder": False}), "use_decoder"),
        (dict(settings={"patch_stride": 4}), "patch_stride"),
        (dict(settings={"fcm_use_mixer": True}), "fcm_use_mixer"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, how, words):
    write_checkpoint(tmp_path, **how)
    with pytest.raises(ValueError, match=words):
        from_pretrained(tmp_path)


def test_lengths_of_a_checkpoint_are_binding(tmp_path):
    write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="revision"):
        from_pretrained(tmp_path, context_length=512)
    with pytest.raises(ValueError, match="prediction_filter_length"):
        from_pretrained(tmp_path, prediction_length=96)


def test_a_missing_checkpoint_is_an_os_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(OSError):
        from_pretrained("adaptlab-tests/no-such-model")


def test_save_and_load(tmp_path):
    model = model_of(**VARIANTS["categories"])
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert json.dumps(asdict(again.config)) == json.dumps(asdict(model.config))
    batch = inputs_of(model.config)
    assert torch.equal(again(**batch).prediction_outputs, model(**batch).prediction_outputs)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_reconfigure_keeps_what_exists():
    model = model_of()
    new = reconfigure(model, **EXOGENOUS)
    assert all(torch.equal(new.state_dict()[k], v) for k, v in model.state_dict().items())
    back = reconfigure(new, enable_forecast_channel_mixing=False, exogenous_channel_indices=None,
                       prediction_channel_indices=None)
    batch = inputs_of(model.config)
    assert torch.equal(back(**batch).prediction_outputs, model(**batch).prediction_outputs)
    with pytest.raises(ValueError, match="shape"):
        reconfigure(model, d_model=64)
    with pytest.raises(TypeError):
        reconfigure(model, no_such_field=1)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(patch_length=96), "smaller than context_length"),
        (dict(d_model=30), "divisible"),
        (dict(patch_length=0), "below 1"),
        (dict(adaptive_patching_levels=-1), "below 0"),
        (dict(fcm_context_length=97), "fcm_context_length"),
        (dict(prediction_filter_length=0), "prediction_filter_length"),
        (dict(prediction_filter_length=13), "prediction_filter_length"),
        (dict(categorical_vocab_size_list=(3,)), "mix_channel"),
        (dict(**{**EXOGENOUS, "exogenous_channel_indices": (0, 1)}), "both forecast"),
        (dict(exogenous_channel_indices=(1,), prediction_channel_indices=(0,)), "mixing"),
        (dict(prediction_channel_indices=(2, 0)), "increasing"),
        (dict(prediction_channel_indices=(4,)), "num_input_channels"),
        (dict(mode="all"), "mode"),
        (dict(loss="nll"), "loss"),
    ],
)
def test_a_wrong_config_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        TTMConfig(**{**BASE, **changes})


def spoil(name, value):
    return lambda batch: batch | {name: value}


def with_nan(batch):
    past = batch["past_values"].clone()
    past[0, 0, 0] = math.nan
    return batch | {"past_values": past}


@pytest.mark.parametrize(
    "variant, change, words",
    [
        ("adaptive", spoil("past_values", torch.zeros(3, 96)), "x\\[None, :, None\\]"),
        ("adaptive", with_nan, "NaN"),
        ("adaptive", spoil("future_values", torch.zeros(3, 11, 4)), "future_values"),
        ("adaptive", spoil("future_values", torch.zeros(3, 12, 3)), "targets of shape"),
        ("adaptive", spoil("past_values", torch.zeros(0, 96, 4)), "batch, steps"),
        ("adaptive", spoil("past_values", torch.zeros(3, 0, 4)), "batch, steps"),
        ("adaptive", spoil("past_observed_mask", torch.ones(3, 90, 4)), "zeros and ones"),
        ("adaptive", spoil("past_observed_mask", torch.full((3, 96, 4), math.nan)), "and ones"),
        ("adaptive", spoil("past_observed_mask", torch.zeros(3, 96, 4)), "never observed"),
        ("adaptive", spoil("future_observed_mask", torch.zeros(3, 12, 4)), "some observed"),
        ("adaptive", spoil("future_observed_mask", torch.ones(3, 12)), "mask of the same"),
        ("exogenous", spoil("future_values", torch.full((3, 12, 4), math.nan)), "no NaN"),
        ("prefix", spoil("freq_token", 7), "integers"),
        ("prefix", spoil("freq_token", torch.tensor([7, 7])), "integers"),
        ("prefix", spoil("freq_token", torch.full((3,), 7.5)), "integers"),
        ("mix_channel decoder", spoil("past_values", torch.zeros(3, 96, 3)), "steps, 4"),
        ("exogenous", spoil("future_values", None), "exogenous"),
        ("exogenous", spoil("future_values", torch.zeros(3, 12, 2)), "all 4"),
        ("exogenous", spoil("past_values", torch.zeros(3, 96, 5)), "steps, 4"),
        ("prefix", spoil("freq_token", None), "freq_token"),
        ("prefix", spoil("freq_token", torch.tensor([1, 10, 0])), "0..9"),
        ("categories", spoil("static_categorical_values", None), "static_categorical"),
        ("categories", spoil("static_categorical_values", torch.tensor([[0, 7]] * 3)),
         "below .3, 5."),
    ],
)
def test_a_wrong_batch_is_refused(variant, change, words):
    model = model_of(**VARIANTS[variant])
    with pytest.raises(ValueError, match=words):
        model(**change(inputs_of(model.config)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_values_of_another_type_are_refused(dtype):
    model = model_of()
    with pytest.raises(TypeError, match="the weights torch.float32"):
        model(torch.ones(2, 96, 4, dtype=dtype))
    if dtype == torch.float16:  # autocast brings them together
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(torch.randn(2, 96, 4).to(dtype)).prediction_outputs).all()


def test_errors_are_those_of_the_forecast_channels():
    "A model that forecasts the second channel is measured on it."
    frame = days()
    ds = WindowDataset(frame, ["known", "y"], context=48, horizon=12)
    model = small_model(num_input_channels=2, prediction_channel_indices=(1,)).eval()
    batch = ds.fetch_batch(slice(None))
    with torch.no_grad():
        out = model(batch["past_values"]).prediction_outputs[..., 0]
    wanted = float((out - batch["future_values"][..., 1]).square().mean())
    assert abs(evaluate(model, ds).mse - wanted) < 1e-5
    with pytest.raises(ValueError, match="the model's horizon"):
        evaluate(small_model(prediction_filter_length=6), ds)


gap = days().assign(y=lambda f: f["y"].where(f.index != f.index[7]))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: windows_of(days()[::-1]), "increase"),
        (lambda: windows_of(pd.concat([days(), days()])), "increase"),
        (lambda: windows_of(days().drop(days().index[9])), "2024-01-01 10:00.*resolution"),
        (lambda: windows_of(gap), "NaN"),
        (lambda: windows_of(days(20)), "no window"),
        (lambda: windows_of(days().assign(y=pd.array([1, None] * 200, "Int64"))), "'y'.*NaN"),
        (lambda: WindowDataset(days().assign(w="sun"), ["y"], ["w"], 48, 12), "'w'.*not numbers"),
        (lambda: WindowDataset(days(), ["z"], context=48, horizon=12), "z"),
        (lambda: WindowDataset(days(), ["y"], ["y"], context=48, horizon=12), "once"),
        (lambda: WindowDataset(days(), [], context=48, horizon=12), "target"),
        (lambda: ResolutionSampler((0,)), "factors"),
        (lambda: pretraining_windows([], 48, 12), "no series"),
        (lambda: pretraining_windows([(np.ones(100), 60)], 48, 12), "change"),
        (lambda: pretraining_windows([(np.full(100, np.nan), 60)], 48, 12), "gaps"),
        *[(lambda freq=freq: frequency_token(freq), "fixed length")
          for freq in ("soon", "MS", "YE", "", None, True, -5, 0)],
        (lambda: fine_tune(small_model(), windows_of(), windows_of(), epochs=0), "epochs"),
        (lambda: SMALL.replace(split=(0.7, 0.1, 0.1)), "add up"),
    ],
)
def test_wrong_data_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------ data


def test_resolutions_become_tokens():
    series = [(np.random.default_rng(0).normal(size=900), 5.0)]
    ds = pretraining_windows(series, 24, 6, ResolutionSampler((1, 2, 3, 7)))
    counts = dict(enumerate(ds.more["freq_token"].bincount().tolist()))
    assert counts == {0: 99, 1: 0, 2: 0, 3: 871, 4: 421, 5: 271}  # 5, 10, 15 and 35 minutes
    coarse = ds.values[900:1350, 0].numpy()
    z = (series[0][0] - series[0][0].mean()) / series[0][0].std()
    np.testing.assert_allclose(coarse, z.reshape(-1, 2).mean(1), atol=1e-5)


def test_no_window_crosses_two_series():
    series = [(np.r_[np.zeros(50), np.ones(50)] + 10 * i, 60.0) for i in range(3)]
    ds = pretraining_windows(series, 20, 5)
    assert len(ds) == 3 * 76 and all(s // 100 == (s + 24) // 100 for s in ds.starts.tolist())


def test_tokens_of_the_official_package():
    expected = {"min": 1, "2min": 2, "5min": 3, "10min": 4, "15min": 5, "30min": 6, "h": 7,
                "D": 8, "W": 9, "W-SUN": 9, "3h": 0, "90s": 0}
    assert {f: frequency_token(f) for f in expected} == expected


def test_nothing_of_a_test_series_is_in_the_corpus():
    sources = {t.split("|")[0].split(",")[0] for t in SMALL.tests}
    assert not sources & set(SMALL.corpus)
    assert not any(c.startswith("traffic") for c in SMALL.corpus)


def test_test_windows_do_not_look_into_training_rows():
    cfg = SMALL.replace(stride=1)
    bed, wide = (lab._bed(cfg, "traffic::traffic_volume|temp", known=k) for k in (False, True))
    frame = load_series("traffic", ["traffic_volume"])[0]["traffic_volume"].to_numpy()
    a, b = round(0.7 * len(frame)), round(0.8 * len(frame))
    z = ((frame - frame[:a].mean()) / frame[:a].std()).astype(np.float32)
    first = bed.test[0]
    np.testing.assert_allclose(first["future_values"][:, 0], z[b : b + 24], rtol=1e-4, atol=1e-4)
    last = bed.choose[len(bed.choose) - 1]["future_values"][:, 0]
    np.testing.assert_allclose(last, z[b - 24 : b], rtol=1e-4, atol=1e-4)
    assert len(bed.train) == int(0.05 * (a - 336)) + 336 - 336 - 24 + 1
    assert torch.equal(wide.test.values[:, :1], bed.test.values) and bed.name == "traffic_volume"


# ------------------------------------------------------------------ training and baselines


def test_fine_tuning_ends_with_the_best_weights_and_spares_the_backbone():
    model = freeze_backbone(small_model())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frame = days()
    train, val = windows_of(frame[:250]), windows_of(frame[250:])
    seen = []
    original = ttm.evaluate

    def spy(m, ds, *rest):
        found = original(m, ds, *rest)
        seen.append(found.mse)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ttm, "evaluate", spy)
        result = fine_tune(model, train, val, lr=3e-2, epochs=6, patience=2, progress=False)
    assert abs(evaluate(model, val).mse - min(seen)) < 1e-7
    assert result.steps <= 6 * math.ceil(len(train) / 64)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("backbone"))
    assert not torch.equal(before["decoder.adapter.weight"], after["decoder.adapter.weight"])


def test_early_stopping_waits_for_its_patience():
    frame = days()
    train, val = windows_of(frame[:200]), windows_of(frame[200:])
    model = small_model(head_dropout=0.0, dropout=0.0)
    result = fine_tune(model, train, val, lr=1e-9, epochs=40, patience=1, progress=False)
    assert result.steps < 40 * math.ceil(len(train) / 64)


def test_pretraining_clips_and_fine_tuning_does_not(monkeypatch):
    asked = []
    monkeypatch.setattr(ttm, "fit", lambda *a, **options: asked.append(options))
    pretrain(small_model(), windows_of(), 5)
    fine_tune(small_model(), windows_of(), windows_of(), epochs=2)
    assert [options["clip"] for options in asked] == [1.0, None]
    adam = torch.optim.AdamW(small_model().parameters())
    assert asked[0]["schedule"](adam).get_last_lr()[0] < 3e-3 / 10  # one cycle starts low


def test_pretraining_is_reproducible():
    states = []
    for _ in range(2):
        model = small_model()
        pretrain(model, windows_of(), 5, 16, progress=False, seed=3)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_trainer_of_transformers_works(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = freeze_backbone(small_model())
    before = model.head.base_forecast_block.weight.clone()
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True,
                                  label_names=["future_values"], save_strategy="no",
                                  disable_tqdm=True)
    Trainer(model, arguments, train_dataset=windows_of()).train()
    assert not torch.equal(before, model.head.base_forecast_block.weight)


def rival(name, bed, **setting):
    "A forecaster of the experiment."
    return lab._rivals(SMALL.replace(seasons=(24, 7, 12)))[name].adapt(None, bed, 0, **setting)


def test_seasonal_naive_and_long_horizons():
    ds = windows_of(context=24, horizon=60)
    naive = rival("repeat 24 steps", Bed(None, ds, ds, ds), period=24)
    past = torch.arange(24.0)[None, :, None]
    assert naive(past_values=past)[0, :, 0].tolist() == [t % 24 for t in range(60)]
    naive = rival("repeat 7 steps", Bed(None, ds, ds, ds), period=7)
    assert naive(past_values=past)[0, :9, 0].tolist() == [17, 18, 19, 20, 21, 22, 23, 17, 18]


def test_a_season_must_fit_into_the_context():
    names = set(lab._rivals(SMALL.replace(context_length=200, seasons=(24, 168, 500))))
    assert names == {"repeat 24 steps", "repeat 168 steps", "exponential smoothing", "ridge"}
    smooth = lab._rivals(SMALL.replace(context_length=200))["exponential smoothing"]
    assert smooth.grid == [{"period": 24}]  # 168 does not fit in twice


def test_smoothing_continues_a_season_per_channel():
    t = np.arange(500)
    frame = pd.DataFrame({"a": np.sin(2 * np.pi * t / 12), "b": 5 + 3 * np.cos(2 * np.pi * t / 12)},
                         index=pd.date_range("2024", periods=500, freq="h"))
    ds = WindowDataset(frame, ["a", "b"], context=48, horizon=20, stride=50)
    forecast = rival("exponential smoothing", Bed(None, ds, ds, ds), period=12)
    assert evaluate(forecast, ds).mse < 1e-3


def test_ridge_is_scikit_learns_on_standardised_windows():
    from sklearn.linear_model import Ridge

    bed = bed_of()
    ours = rival("ridge", bed, penalty=3.0)
    batch = bed.train.fetch_batch(slice(None))
    x, loc, scale = std_scale(batch["past_values"].double())
    y = (batch["future_values"].double() - loc) / scale
    peer = Ridge(alpha=3.0).fit(x[..., 0].numpy(), y[..., 0].numpy())
    past = bed.test.fetch_batch(slice(None))["past_values"]
    vx, vloc, vscale = std_scale(past.double())
    wanted = torch.tensor(peer.predict(vx[..., 0].numpy()))[..., None] * vscale + vloc
    torch.testing.assert_close(ours(past), wanted.float(), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ mended faults


@pytest.mark.parametrize("c, n", [(20.0, 400), (0.3, 400), (123.456, 400), (0.3, 1000), (0.1, 300)])
def test_constants_are_refused_whatever_their_sum_rounds_to(c, n):
    index = pd.date_range("2024", periods=n, freq="h")
    frame = pd.DataFrame({"y": np.full(n, c)}, index)
    with pytest.raises(ValueError, match="'y'.*never change"):
        windows_of(frame, scaler=(frame.mean(), frame.std(ddof=0)))
    with pytest.raises(ValueError, match="constant"):
        pretraining_windows([(np.full(n, c), 60)], 64, 8)


@pytest.mark.parametrize("minutes", [60, 60.0, np.int64(60), np.float64(60), np.int32(60),
                                     timedelta(hours=1), pd.Timedelta("1h"),
                                     np.timedelta64(1, "h"), pd.tseries.frequencies.to_offset("h")])
def test_an_hour_is_an_hour(minutes):
    assert frequency_token(minutes) == 7
    ds = pretraining_windows([(np.random.rand(200), minutes)], 64, 8)
    assert ds.more["freq_token"].unique().tolist() == [7]


def test_calendar_days_are_regular_over_a_change_of_the_clock():
    index = pd.date_range("2024-02-01", periods=100, freq="D", tz="Europe/Berlin")
    ds = WindowDataset(pd.DataFrame({"y": np.arange(100.0)}, index), ["y"], context=8, horizon=2)
    assert ds.more["freq_token"].unique().tolist() == [8]


@pytest.mark.parametrize("folder", ["me@host", "12:30", "a#b", "[x]*"])
def test_signs_of_a_path_are_its_own(tmp_path, folder):
    (tmp_path / folder).mkdir()
    file = tmp_path / folder / "t.csv"
    file.write_text("date,y,z\n2024-01-01,1,5\n2024-01-02,2,6\n")
    for spec, columns in ((f"{file}", "yz"), (f"{file}::z", "z"), (f"{file}::|z", "yz")):
        assert load_series(*lab._parts(spec))[0].columns.tolist() == [*columns]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    model = small_model().eval()
    x = 1000 * torch.randn(2, 48, 1, generator=torch.Generator().manual_seed(0))
    wanted = model(x).prediction_outputs
    half = model.to(dtype)(x.to(dtype), future_values=torch.zeros(2, 12, 1, dtype=dtype))
    assert half.prediction_outputs.dtype == dtype and torch.isfinite(half.loss)
    error = (half.prediction_outputs.float() - wanted).abs().max()
    assert error < (20 if dtype == torch.float16 else 60)  # of a spread of 1000


# ------------------------------------------------------------------ runs


LARGE = dict(patch_length=128, d_model=384, decoder_d_model=256)


@pytest.mark.parametrize(
    "settings, total, trained",
    [
        ({"context_length": 1024}, 946_336, 389_984),
        ({"context_length": 1024, **LARGE}, 2_964_960, 955_424),
        ({"context_length": 1536, **LARGE}, 3_081_120, 1_054_560),
        (dict(resolution_prefix_tuning=True, frequency_token_vocab_size=8), 854_972, 302_162),
        ({"prediction_length": 192}, 903_680, None),
        ({"prediction_length": 336}, 1_051_280, None),
        ({"prediction_length": 720}, 1_444_880, None),
    ],
)
def test_released_counts(settings, total, trained):
    with torch.device("meta"):
        model = TTMForPrediction(TTMConfig(**settings))
    parts = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    assert sum(parts.values()) == total
    assert trained in (None, total - parts["backbone"])


def test_full_is_the_papers_model():
    model = TTMForPrediction(lab.architecture(FULL))
    assert sum(p.numel() for p in model.parameters()) == 805_280
    assert sum(p.numel() for p in freeze_backbone(model).parameters() if p.requires_grad) == 289_696


def test_full_builds_its_data(recorded, tmp_path, monkeypatch):
    "Names, configurations, splits and value columns as on the hub; ETT's few shots."
    frames = {c: load_series(c) for c in FULL.corpus}
    assert recorded.asked == list(FULL.corpus) and sum(map(len, frames.values())) > 100
    steps = {time_step(f.index) / timedelta(minutes=1) for part in frames.values() for f in part}
    assert steps == {5.0, 30.0, 60.0, 1440.0}
    columns = {c: part[0].columns[0] for c, part in frames.items()}
    assert {columns[c] for c in FULL.corpus if "solar" in c} == {"power_mw"}
    assert {columns[c] for c in FULL.corpus if "saugeen" in c} == {"T1"}
    windows = lab._corpus(FULL.corpus, 512, 96, FULL.factors)
    assert len(windows) > 10_000
    monkeypatch.chdir(tmp_path)
    for name in FULL.tests:
        recorded.write(name, tmp_path)
    bed = lab._bed(FULL, FULL.tests[0])
    assert len(bed.train) == 918 - 608 + 1 and bed.train.values.shape == (8640, 7)
    assert len(bed.choose) == len(bed.test) == 2880 - 96 + 1
    assert schemas.rows("autogluon/chronos_datasets@solar#train") == 5_166


def tiny_world(folder):
    "FULL in miniature: a corpus with one series per row, and a table of several channels."
    rng = np.random.default_rng(0)
    hours = pd.date_range("2020-01-01", periods=300, freq="h")
    rows = [{"id": str(i), "timestamp": [str(t) for t in hours], "target": rng.normal(size=300)}
            for i in range(2)]
    rows.append({**rows[0], "id": "still", "target": np.full(300, 0.3)})  # teaches nothing
    corpus, table = folder / "corpus.parquet", folder / "ett.csv"
    pd.DataFrame(rows).to_parquet(corpus)
    wide = pd.DataFrame(rng.normal(size=(600, 3)), columns=["HUFL", "HULL", "OT"])
    wide.insert(0, "date", pd.date_range("2016-07-01", periods=600, freq="h"))
    wide.to_csv(table, index=False)
    return FULL.replace(
        corpus=(str(corpus),), tests=(str(table),), context_length=48, prediction_length=8,
        patch_length=8, d_model=32, decoder_d_model=16, num_layers=1,
        pretraining={"steps": 3, "batch_size": 16}, tuning={"epochs": 1.0, "batch_size": 16},
        rows=560, stride=16, fraction=0.3, lrs=(1e-3,), penalties=(1.0,), seasons=(24,),
        device="cpu")


def test_full_scale_path_in_miniature(tmp_path):
    cfg = tiny_world(tmp_path)
    report = experiment(cfg, start_run("ttm", cfg, "full", root=tmp_path / "runs"))
    frame = report.tables["results"]
    assert set(frame["method"]) >= {"repeat 24 steps", "ridge", "exponential smoothing", "TTM 5 %"}
    assert np.isfinite(frame["mse"]).all() and (frame["mse"] > 0).all()
    assert set(report.figures) == {"main"}
    assert {c.verdict for c in report.claims} == {"not decided at this scale"}  # one seed


def test_ablation_and_resume(tmp_path, monkeypatch):
    "What is left out is pre-trained anew; a second start repeats nothing."
    cfg = tiny_world(tmp_path).replace(tracks=("ablation",), seeds=(0, 1), prefix=True)
    run = start_run("ttm", cfg, "full", root=tmp_path / "runs")
    report = experiment(cfg, run)
    table = report.tables["ablation"]
    assert set(table["method"]) == {"whole", "adaptive patching", "other resolutions",
                                    "resolution prefix"}
    assert len(table) == 8 and len(report.claims) == 3
    monkeypatch.setattr(ttm, "pretrain", None)  # would fail if it were called
    again = experiment(cfg, run)
    pd.testing.assert_frame_equal(again.tables["ablation"], table)
    kept = {p.stem: load_file(p) for p in run.path("stages").rglob("pretrain-*.safetensors")}
    assert len(kept) == 8
    levels = "backbone.encoder.mlp_mixer_encoder.mixers.2.mixer_layers.0.patch_mixer.mlp.fc1.bias"
    assert levels in kept["pretrain-whole-0"] and levels not in kept["pretrain-adaptive-patching-0"]
    assert not any("freq_mod" in k for k in kept["pretrain-resolution-prefix-0"])


def test_a_checkpoint_replaces_pre_training(tmp_path):
    cfg = tiny_world(tmp_path).replace(checkpoint=str(tmp_path / "model"), corpus=("nothing",))
    TTMForPrediction(lab.architecture(cfg)).save_pretrained(tmp_path / "model")
    cfg = cfg.replace(tests=(cfg.tests[0] + "::OT|HUFL",), lrs=(1e-3, 1e-2))
    report = launch("ttm", cfg, root=tmp_path / "runs", progress=False)
    table = report.tables["results"]
    assert {"TTM 5 %, future known", "TTM 5 %, all weights"} <= set(table["method"])
    assert set(table["series"]) == {"OT"}
    tuned = table.loc[table["method"] == "TTM 5 %", "setting"]
    assert set(tuned) <= {"lr=0.001", "lr=0.01"}
    with pytest.raises(ValueError, match="'ablation' out of tracks"):
        launch("ttm", cfg.replace(tracks=("ablation",)), root=tmp_path / "runs", progress=False)


def test_gain_is_a_geometric_mean_over_shared_series():
    rows = [("a", 0, "x", 1.0), ("a", 0, "y", 1.0), ("b", 0, "x", 2.0), ("b", 0, "y", 8.0),
            ("b", 0, "z", 9.0)]
    table = pd.DataFrame(rows, columns=["method", "seed", "series", "mse"])
    found = lab._gain(table, "a", "b")
    assert abs(found.value - 75) < 1e-9 and math.isnan(found.low) and found.n == 1
    both = pd.concat([table, table.assign(seed=1, mse=table["mse"] * 1.5)])
    found = lab._gain(both, "a", "b")
    assert found.low <= found.value <= found.high


def test_command_line_with_two_processes(tmp_path):
    cfg = tiny_world(tmp_path).replace(seasons=(8,))
    args, full = [], data_of(FULL)
    for name, value in data_of(cfg).items():
        if value != full[name] and value is not None:
            values = value if isinstance(value, list) else [value]
            args += [f"--{name.replace('_', '-')}", *map(str, values)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--standalone", "-m", "adaptlab", "run", "ttm", "--scale", "full", *args,
               "--root", str(tmp_path / "runs")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    (folder,) = (p for p in (tmp_path / "runs" / "ttm").iterdir() if p.is_dir())
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["claims"] and report["environment"]["processes"] == 2


def data_of(cfg):
    "Settings by their names on the command line."
    from adaptlab.bench.runs import flat_settings

    return flat_settings(cfg.to_dict())
