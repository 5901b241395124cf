"""TTM on a GPU: the same numbers, training no slower than its bare step, SMALL, FULL's shape."""

import numpy as np
import pytest
import torch

from adaptlab.bench.runs import launch
from adaptlab.experiments import ttm as lab
from adaptlab.experiments.ttm import FULL, SMALL
from adaptlab.inference.ttm import (
    TTMConfig,
    TTMForPrediction,
    evaluate,
    few_shot_split,
    fine_tune,
    freeze_backbone,
    from_pretrained,
    pretrain,
    pretraining_windows,
    reconfigure,
    save_pretrained,
)
from gpu.card import DEVICE, DRY, full, in_turn, row

MIXED = dict(num_input_channels=3, decoder_mode="mix_channel", prediction_channel_indices=(0, 1),
             exogenous_channel_indices=(2,), enable_forecast_channel_mixing=True,
             resolution_prefix_tuning=True)
SIZES = dict(context_length=128, prediction_length=24, patch_length=16, d_model=32,
             decoder_d_model=16)


def waves(context, horizon, n=6_000):
    rng, t = np.random.default_rng(0), np.arange(n)
    series = [np.sin(2 * np.pi * t / m) + 0.3 * rng.normal(size=n) for m in (24, 168)]
    return pretraining_windows([(y, 60.0) for y in series], context, horizon)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_agrees_with_float64(dtype, tolerance):
    torch.manual_seed(0)
    model = TTMForPrediction(TTMConfig(**SIZES, **MIXED)).eval()
    past, future = 100 * torch.randn(4, 128, 3), torch.randn(4, 24, 3)
    tokens = torch.tensor([7, 8, 1, 0])
    found = []
    for device, kind in (("cpu", torch.float64), (DEVICE, dtype)):
        out = model.to(device, kind)(past.to(device, kind), future.to(device, kind),
                                     freq_token=tokens.to(device))
        assert torch.isfinite(out.loss) and out.prediction_outputs.dtype == kind
        found.append(out.prediction_outputs.detach().cpu().double())
    assert (found[1] - found[0]).norm() <= tolerance * found[0].norm()


def test_saved_on_the_card_and_loaded(tmp_path):
    model = TTMForPrediction(TTMConfig(**SIZES)).to(DEVICE).eval()
    again = from_pretrained(save_pretrained(model, tmp_path / "model")).to(DEVICE)
    x = torch.randn(2, 128, 1, device=DEVICE)
    assert torch.equal(again(x).prediction_outputs, model(x).prediction_outputs)


def test_windows_stay_on_the_card():
    ds = waves(128, 24)
    model = TTMForPrediction(TTMConfig(**SIZES, resolution_prefix_tuning=True))
    batch = ds.fetch_batch(torch.arange(8), DEVICE)
    assert all(v.device.type == torch.device(DEVICE).type for v in batch.values())
    before = evaluate(model.to(DEVICE), few_shot_split(ds, 0.05)).mse
    pretrain(model, ds, 5 if DRY else 40, device=DEVICE, progress=False)
    few = few_shot_split(ds, 0.05)
    tuned = freeze_backbone(reconfigure(model, head_dropout=0.1))
    fine_tune(tuned, few, few, epochs=1, device=DEVICE, progress=False)
    assert evaluate(tuned, few).mse < before
    frozen = (model.backbone.state_dict(), tuned.backbone.state_dict())
    assert all(torch.equal(v, frozen[1][k]) for k, v in frozen[0].items())


def test_fit_against_its_bare_step():
    ds = waves(512, 96)
    model = TTMForPrediction(TTMConfig(resolution_prefix_tuning=True)).to(DEVICE).train()
    size, steps = (8, 2) if DRY else (512, 40)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = ds.fetch_batch(torch.arange(size), DEVICE)

    def bare(steps=steps):
        for _ in range(steps):
            adam.zero_grad()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()

    def fitted(steps=steps):
        pretrain(model, ds, steps, size, device=DEVICE, progress=False)

    fitted(2), bare(2)
    ours, plain = in_turn(fitted, bare, rounds=3, warm=0)
    row(f"{steps} steps of fit, {size} windows", ours, reference=plain, against="bare steps",
        bound=1.1)


def test_small(tmp_path):
    cfg = SMALL.replace(
        seeds=(0,), device=DEVICE, tests=SMALL.tests[:1], corpus=SMALL.corpus[:2], rows=4000,
        lrs=(1e-3,), stride=301, pretraining={"steps": 4, "batch_size": 32, "clip": 1.0},
        tuning={"epochs": 1.0})
    report = launch("ttm", cfg, root=tmp_path, progress=False)
    assert set(report.figures) == {"main"} and set(report.tables) >= {"results", "ablation"}
    assert (report.tables["results"]["mse"] > 0).all()


def test_full_shape():
    "A step of FULL's pre-training, in float32."
    size, how = 16 if DRY else FULL.pretraining.batch_size, FULL.pretraining
    model = TTMForPrediction(lab.architecture(FULL)).to(DEVICE).train()
    batch = waves(FULL.context_length, FULL.prediction_length).fetch_batch(
        torch.arange(size), DEVICE)
    del batch["freq_token"]
    adam = torch.optim.AdamW(model.parameters(), lr=how.lr)

    def step():
        adam.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), how.clip)
        adam.step()

    assert how.precision == "no"
    full(f"a step of pre-training, {size:,} windows", model, batch, step)
