"""Distribution Transformers on a GPU: mixtures, FULL's step, training, the small experiment."""

import pytest
import torch

from adaptlab.bench.runs import launch
from adaptlab.experiments import distribution_transformers as lab
from adaptlab.experiments.distribution_transformers import FULL, SMALL
from adaptlab.inference import distribution_transformers as dt
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, row


def mixtures(n, k=3, d=2):
    G = torch.randn(n, k, d, d + 2, device=DEVICE)
    return dt.GaussianMixture(torch.rand(n, k, device=DEVICE).softmax(-1),
                              torch.randn(n, k, d, device=DEVICE),
                              covariance_matrix=G @ G.mT + 0.1 * torch.eye(d, device=DEVICE))


def test_mixtures_and_exact_posteriors():
    phi, x = mixtures(50), torch.randn(50, 2, device=DEVICE)
    wanted = phi.distribution().log_prob(x)
    torch.testing.assert_close(phi.log_prob(x), wanted, atol=1e-3, rtol=1e-3)
    again = dt.from_tokens(phi.to_tokens(), 2)
    torch.testing.assert_close(again.covariance_matrix, phi.covariance_matrix, atol=1e-4, rtol=1e-3)
    eye = torch.eye(2, device=DEVICE)
    exact = dt.gmm_linear_gaussian_posterior(phi, x, eye, 0.5 * eye)
    assert exact.predict(eye, eye).collapse().loc.device.type == DEVICE
    assert phi.sample(5).device.type == DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_filter(dtype):
    model = dt.DistributionTransformer(
        dt.ComponentEmbedding(2, 32, eps=1e-4), {"z": dt.ObservationEmbedding(2, 32)}).to(DEVICE)
    phi, z = mixtures(20), torch.randn(20, 4, 2, device=DEVICE)
    with torch.no_grad():
        whole = model(phi, z=z[:, 0]).posterior.loc
        found = model.to(dtype)(phi.map(lambda t: t.to(dtype)), z=z[:, 0].to(dtype)).posterior.loc
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0.1)
    if dtype == torch.float32:
        still = torch.eye(2, device=DEVICE), 0.1 * torch.eye(2, device=DEVICE)
        assert len(model.filter(phi, z, still)) == 4


def test_step_of_full():
    n = 16 if DRY else FULL.training.batch_size
    torch.manual_seed(0)
    model, data = lab.build(FULL, "DT").to(DEVICE), lab.world(FULL)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    rows = torch.arange(n)

    def step():
        loss = dt.dt_loss(model, data.fetch_batch(rows, DEVICE))
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert loss.isfinite()

    row(f"DT of 6 layers, {n} problems, drawn and trained on", *clock(step, rounds=5, warm=2))


def test_trains_on_fresh_problems():
    model = lab.build(SMALL, "DT")
    how = Training(steps=3 if DRY else 60, batch_size=128, lr=5e-3)
    result = dt.train_distribution_transformer(model, lab.world(SMALL), how, device=DEVICE,
                                               progress=False)
    assert result.steps == how.steps
    assert next(model.parameters()).device.type == DEVICE
    assert DRY or result.rows[-1]["loss"] < result.rows[0]["loss"]


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, tracks=("mixtures", "variances", "parts"),
                        training={"steps": 2}, variance_training={"steps": 2}, n_test=20,
                        n_draws=10, times=(1, 2), visits=(1, 2))
    assert launch("distribution_transformers", cfg, root=tmp_path).claims
