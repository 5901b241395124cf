"""Distribution Transformers: mixtures, exact posteriors, symmetry, bad input, runs."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import InverseGamma

from adaptlab.bench.runs import start_run
from adaptlab.experiments import distribution_transformers as told
from adaptlab.experiments.distribution_transformers import FULL, SMALL, experiment
from adaptlab.inference import distribution_transformers as dt
from adaptlab.inference.distribution_transformers import GaussianMixture
from adaptlab.train import Training
from one_seed import UNDECIDED, goes_on
from two_processes import assert_alike


def mixtures(n=4, k=3, d=2, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    G = torch.randn(n, k, d, d + 2, dtype=dtype)
    return GaussianMixture(torch.rand(n, k, dtype=dtype).softmax(-1),
                           torch.randn(n, k, d, dtype=dtype),
                           covariance_matrix=G @ G.mT + 0.1 * torch.eye(d, dtype=dtype))


def network(d=1, seed=0, **options):
    torch.manual_seed(seed)
    model = dt.DistributionTransformer(
        dt.ComponentEmbedding(d, 16, (8,)),
        {"z": dt.ObservationEmbedding(d, 16, sequential=True)}, d_model=16, **options)
    with torch.no_grad():  # a network that has learned something
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


# mixtures


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_log_prob_is_torchs(d, dtype, near):
    phi = mixtures(d=d, dtype=dtype)
    x = torch.randn(7, 4, d, dtype=dtype)
    wanted = phi.distribution().log_prob(x)
    torch.testing.assert_close(phi.log_prob(x), wanted, atol=near, rtol=near)


def test_log_prob_with_tiny_and_zero_weights():
    w = torch.tensor([1 - 1e-30, 1e-30, 0.0], dtype=torch.float64)
    phi = GaussianMixture(w, torch.tensor([[0.0], [40], [1]], dtype=torch.float64),
                          torch.ones(3, 1, 1, dtype=torch.float64))
    x = torch.tensor([[0.0], [40.0]], dtype=torch.float64)
    found = phi.log_prob(x)
    at_forty = torch.log(torch.tensor(1e-30, dtype=torch.float64)) - 0.918938533204672
    torch.testing.assert_close(found[1], at_forty)  # -800 of the first component is no match
    assert found.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from(["softmax", "sigmoid"]))
def test_features_round_trip(d, k, link):
    phi = mixtures(k=k, d=d, seed=10 * d + k)
    again = GaussianMixture.from_tokens(phi.to_tokens(link), d, link)
    for name in ("weights", "loc", "covariance_matrix"):
        torch.testing.assert_close(getattr(again, name), getattr(phi, name), atol=1e-6, rtol=1e-6)


def test_links_differ_and_tiny_logits_keep_their_ratios():
    features = torch.zeros(1, 2, 3)
    features[0, :, 0] = torch.tensor([-20.0, -21.0])
    for link in ("softmax", "sigmoid"):
        w = dt.from_tokens(features, 1, link).weights[0]
        torch.testing.assert_close(w[1] / w[0], torch.tensor(-1.0).exp(), atol=1e-5, rtol=1e-5)
    features[0, :, 0] = torch.tensor([0.0, 3.0])
    soft, sig = (dt.from_tokens(features, 1, link).weights for link in ("softmax", "sigmoid"))
    assert (soft - sig).abs().max() > 0.1


def test_draws_collapse_and_predict():
    phi = mixtures(n=2, d=2)
    draws = phi.sample(60_000)
    one = phi.collapse()
    torch.testing.assert_close(one.loc[:, 0], draws.mean(0), atol=0.1, rtol=0)
    for i in range(2):
        torch.testing.assert_close(one.covariance_matrix[i, 0], draws[:, i].T.cov(), atol=0.3,
                                   rtol=0.05)
    assert phi.sample().shape == (2, 2)
    A, Q = torch.tensor([[1.0, 0.5], [0, 1]]).double(), 0.1 * torch.eye(2).double()
    moved = phi.predict(A, Q)
    torch.testing.assert_close(moved.covariance_matrix, A @ phi.covariance_matrix @ A.T + Q)
    assert torch.equal(moved.weights, phi.weights)


# what is exact


def test_linear_gaussian_posterior_against_integration_in_two_dimensions():
    phi = mixtures(n=1, k=2, d=2)
    H, R = torch.tensor([[1.0, 0.5]]).double(), torch.tensor([[0.3]]).double()
    z = torch.tensor([[0.7]]).double()
    found = dt.gmm_linear_gaussian_posterior(phi, z, H, R)
    side = torch.linspace(-14, 14, 561).double()
    grid = torch.cartesian_prod(side, side)[:, None]
    noise = torch.distributions.Normal(0.0, 0.3**0.5)
    joint = phi.log_prob(grid)[:, 0] + noise.log_prob(z[0, 0] - (grid[:, 0] @ H.T)[:, 0])
    numeric = (joint - joint.logsumexp(0) - 2 * torch.log(side[1] - side[0])).exp()
    torch.testing.assert_close(found.log_prob(grid)[:, 0].exp(), numeric, atol=1e-5, rtol=1e-3)


def test_limits_of_the_noise():
    phi, z, eye = mixtures(), torch.randn(4, 2).double(), torch.eye(2).double()
    vague = dt.gmm_linear_gaussian_posterior(phi, z, eye, 1e12 * eye)
    torch.testing.assert_close(vague.loc, phi.loc, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(vague.weights, phi.weights, atol=1e-6, rtol=1e-6)
    sharp = dt.gmm_linear_gaussian_posterior(phi, z, eye, 1e-9 * eye)
    torch.testing.assert_close(sharp.loc, z[:, None].expand(4, 3, 2), atol=1e-6, rtol=1e-6)
    assert sharp.covariance_matrix.abs().max() < 1e-8


def test_inverse_gamma_against_integration():
    a, b, y = torch.tensor([3.0]).double(), torch.tensor([2.0]).double(), torch.randn(1, 6).double()
    grid = torch.logspace(-3, 3, 20_001).double()
    lik = torch.distributions.Normal(0.5, grid[:, None].sqrt()).log_prob(y).sum(1)
    joint = InverseGamma(a, b).log_prob(grid) + lik
    numeric = joint - torch.trapezoid(joint.exp(), grid).log()
    found = InverseGamma(*dt.inverse_gamma_posterior(a, b, y, mean=0.5)).log_prob(grid)
    torch.testing.assert_close(found.exp(), numeric.exp(), atol=1e-5, rtol=1e-4)


# the network


@pytest.mark.parametrize("d", [1, 3])
def test_permutations(d):
    model, phi = network(d), mixtures(d=d, dtype=torch.float32)
    z, order = torch.randn(4, 6, d), torch.tensor([1, 2, 0])
    with torch.no_grad():
        out = model(phi, z=z).posterior
        moved = model(phi.map(lambda t: t[:, order]), z=z[:, torch.randperm(6)]).posterior
    torch.testing.assert_close(moved.loc, out.loc[:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.log_prob(z[:, 0]), out.log_prob(z[:, 0]), atol=1e-5, rtol=1e-5)
    more = model(mixtures(k=7, d=d, dtype=torch.float32), z=z)  # any number of components
    assert more.posterior.weights.shape == (4, 7)


def test_zeros_at_the_start_and_no_norm_at_the_end():
    model = dt.DistributionTransformer(dt.ComponentEmbedding(1, 32),
                                       {"z": dt.ObservationEmbedding(1, 32)})
    x = torch.randn(5, 3, 32)
    for block in model.decoder.layers:
        assert not block.linear2(torch.randn(5, 64)).any()
        assert not block.self_attn(x, x, x)[0].any() and not block.norm_first
        assert block.multihead_attn.out_proj.weight.any()
    assert model.decoder.norm is None


def test_null_token_allows_no_observations():
    phi, none = mixtures(d=1, dtype=torch.float32), torch.zeros(4, 0, 1)
    with pytest.raises(ValueError, match="null_token"):
        network()(phi, z=none)
    model = network(null_token=True)
    assert model(phi, z=none).posterior.loc.isfinite().all()
    assert not torch.equal(model(phi, z=none).posterior.loc,
                           model(phi, z=torch.ones(4, 1, 1)).posterior.loc)


def test_several_sources_are_told_apart():
    torch.manual_seed(0)
    model = dt.DistributionTransformer(
        dt.ComponentEmbedding(1, 16), {"a": dt.ObservationEmbedding(1, 16),
                                       "b": dt.ObservationEmbedding(1, 16, sequential=True)},
        d_model=16)
    phi, one, more = mixtures(d=1, dtype=torch.float32), torch.ones(4, 1), torch.zeros(4, 1, 1)
    first = model(phi, a=one, b=more).posterior
    assert not torch.allclose(first.loc, model(phi, a=more[:, 0], b=one[:, None]).posterior.loc)
    with pytest.raises(ValueError, match="each must be there"):
        model(phi, a=one)
    with pytest.raises(ValueError, match="each must be there"):
        model(phi, a=one, b=more, c=one)
    two = torch.randn(4, 3, 1), torch.randn(4, 3, 1)
    steps = dt.bayes_filter(model, phi, {"a": two[0], "b": two[1][:, :, None]})
    first = model(phi, a=two[0][:, 0], b=two[1][:, :1]).posterior
    torch.testing.assert_close(steps[0].loc, first.loc)


def test_one_forward_a_step_of_the_filter(monkeypatch):
    model, phi = network(), mixtures(d=1, dtype=torch.float32)
    calls, real = [], dt.DistributionTransformer.update
    monkeypatch.setattr(dt.DistributionTransformer, "update",
                        lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    still = torch.eye(1), torch.zeros(1, 1)
    found = model.filter(phi, torch.randn(4, 9, 2, 1), still)
    assert len(calls) == 9 and len(found) == 9
    plain = model.filter(phi, torch.randn(4, 0, 2, 1), still)
    assert plain == []


def test_a_second_call_says_the_same_and_nothing_is_changed():
    model, phi, z = network(), mixtures(d=1, dtype=torch.float32), torch.randn(4, 2, 1)
    before = copy.deepcopy((phi.log_weights, phi.loc, phi.scale_tril))
    first, second = (model.train(mode)(phi, z=z).posterior.loc for mode in (True, False))
    torch.testing.assert_close(first, second)
    assert all(torch.equal(a, b) for a, b in zip(
        before, (phi.log_weights, phi.loc, phi.scale_tril), strict=True))


def test_half_precision_is_decoded_in_single():
    model, phi = network().bfloat16(), mixtures(d=1, dtype=torch.float32)
    out = model(phi.map(lambda t: t.bfloat16()), z=torch.randn(4, 2, 1).bfloat16())
    assert out.posterior.loc.dtype == torch.float32 and out.posterior.loc.isfinite().all()


def test_decoded_priors_match_where_the_prior_loss_is_on():
    "Priors that are no mixtures: mean and deviation of log x, as the network reads the prior."
    torch.manual_seed(0)
    meta = dt.InverseGammaMetaPrior((2.0, 8.0))
    data = dt.SimulatorDataset(meta, {"y": lambda x: x.sqrt() * torch.randn_like(x)}, 250 * 128)
    model = dt.DistributionTransformer(
        dt.ComponentEmbedding(1, 32), {"y": dt.ObservationEmbedding(1, 32)},
        dt.PriorEmbedding(2, 3, 32, torch.log), sample_space_transform=dt.SUPPORTS["positive"])
    before = copy.deepcopy(model.component_embedding.embedding.state_dict())
    dt.train_distribution_transformer(
        model, data, Training(steps=250, batch_size=128, lr=8e-3), device="cpu", progress=False)
    after = model.component_embedding.embedding  # never read, and trainable again
    assert all(torch.equal(before[k], v) for k, v in after.state_dict().items())
    assert all(p.requires_grad for p in after.parameters())
    prior = meta.sample(200)
    draws = InverseGamma(*prior.T).sample((2000,)).log()
    with torch.no_grad():
        read = model(prior, y=torch.ones(200, 1)).prior.collapse()
    assert (read.loc[:, 0, 0] - draws.mean(0)).abs().mean() < 0.15
    assert (read.scale_tril[:, 0, 0, 0] / draws.std(0)).log().abs().mean() < 0.15


def test_npe_learns_under_priors_of_both_kinds():
    "It has one answer for all priors, whatever they are told by, and its tokens are trained."
    for name, meta in (("variances", dt.InverseGammaMetaPrior()),
                       ("mixtures", dt.BoundedMetaPrior(3))):
        npe = dt.NPE(told.transformer(SMALL, name), 3)
        key = "y" if name == "variances" else "z"
        data = dt.SimulatorDataset(meta, {
            key: lambda x, key=key: x[:, None] if key == "y" else x}, 64)
        before = npe.prior_tokens.detach().clone()
        dt.train_distribution_transformer(npe, data, Training(steps=2, batch_size=8), device="cpu",
                                          progress=False)
        assert not torch.equal(before, npe.prior_tokens)
        prior, _, seen = data.simulate(4)
        assert torch.equal(npe(prior, **seen).posterior.loc, npe(None, **seen).posterior.loc)


def test_in_your_project():
    model = dt.DistributionTransformer(
        dt.ComponentEmbedding(2, 32, (64,), eps=1e-4), {"z": dt.ObservationEmbedding(2, 32, (64,))})
    data = dt.SimulatorDataset(
        dt.BoundedMetaPrior(4, state_dim=2), {"z": lambda x: x.exp() + 0.3 * torch.randn_like(x)})
    data.size = 64
    dt.train_distribution_transformer(model, data, Training(steps=2, batch_size=16, lr=2e-3),
                                      device="cpu", progress=False)
    phi = mixtures(dtype=torch.float32)
    out = model(GaussianMixture(phi.weights, phi.loc, covariance_matrix=phi.covariance_matrix),
                z=torch.randn(4, 2)).posterior
    assert out.loc.shape == (4, 3, 2)


def test_gradients_are_clamped_and_hooks_are_gone():
    model = network()
    data = dt.SimulatorDataset(dt.BoundedMetaPrior(2), {"z": lambda x: 1e9 * x[:, None]}, 64)

    class Steep(torch.nn.Module):
        f, component_embedding = None, model.component_embedding

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, prior, **obs):
            out = model(prior, **obs)
            big = GaussianMixture.of(out.posterior.log_weights, 1e8 * out.posterior.loc,
                                     out.posterior.scale_tril)
            return dt.DTOutput(out.prior, big, out.tokens)

    steep, seen = Steep(), []
    for p in steep.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.abs().max())))
    dt.train_distribution_transformer(steep, data, Training(steps=1, batch_size=4, lr=1e-9),
                                      device="cpu", progress=False)
    assert seen and max(seen) == 1e4
    assert not any(p._backward_hooks for p in model.parameters())


def test_schedule_is_the_papers():
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = dt.epoch_schedule(5, 10, 3)(sgd)
    rates = []
    for _ in range(30):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    expected = [(e + 1) / 6 if e < 5 else 0.5 * (1 + torch.cos(torch.tensor(
        torch.pi * (e - 5) / 5)).item()) for e in range(10) for _ in range(3)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


def test_problems_are_fresh_and_can_be_had_again():
    data = dt.SimulatorDataset(dt.BoundedMetaPrior(2), {"z": lambda x: x}, 1000, seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, b, c = (data.fetch_batch(torch.tensor(rows)) for rows in ([5, 6], [5, 6], [6, 5]))
    assert torch.equal(a["x"], b["x"]) and not torch.equal(a["x"], c["x"])
    assert torch.equal(state, torch.get_rng_state())  # the caller's chance is left alone
    other = dt.SimulatorDataset(dt.BoundedMetaPrior(2), {"z": lambda x: x}, 1000, seed=4)
    assert not torch.equal(a["x"], other.fetch_batch(torch.tensor([5, 6]))["x"])


# bad input


ONE = torch.ones(2, 1)
EYE = torch.eye(1).expand(2, 1, 1)


@pytest.mark.parametrize("call, words", [
    (lambda: GaussianMixture(torch.tensor([0.5, 0.6]), ONE, EYE), "sum to 1"),
    (lambda: GaussianMixture(torch.tensor([1.5, -0.5]), ONE, EYE), "negative"),
    (lambda: GaussianMixture(torch.tensor([float("nan"), 0.5]), ONE, EYE), "NaN"),
    (lambda: GaussianMixture(torch.tensor([0.5, 0.5]), ONE * float("nan"), EYE), "NaN"),
    (lambda: GaussianMixture(torch.tensor([0.5, 0.5]), torch.ones(2), EYE), "loc"),
    (lambda: GaussianMixture(torch.tensor([0.5, 0.5]), ONE, -EYE), "positive diagonal"),
    (lambda: GaussianMixture(torch.tensor([0.5, 0.5]), ONE), "either"),
    (lambda: GaussianMixture(torch.tensor([0.5, 0.5]), ONE, torch.ones(2, 2, 2)), "needs matrices"),
    (lambda: GaussianMixture(torch.tensor([0.5, 0.5]), ONE, covariance_matrix=-EYE),
     "positive definite"),
    (lambda: GaussianMixture(torch.ones(1), torch.ones(1, 2), covariance_matrix=torch.tensor(
        [[[1.0, 0.5], [0.1, 1]]])), "symmetric"),
    (lambda: GaussianMixture(torch.tensor([1.0, 0.0]), ONE, EYE).to_tokens(), "eps"),
    (lambda: mixtures().log_prob(torch.randn(4, 1).double()), "last axis"),
    (lambda: dt.from_tokens(torch.zeros(2, 3, 4), 1), "features"),
    (lambda: dt.ComponentEmbedding(1, 8, weight_link="max"), "weight_link"),
    (lambda: dt.ComponentEmbedding(3, 8)(mixtures()), "dimensions"),
    (lambda: dt.ObservationEmbedding(2, 8)(torch.zeros(4, 3)), "m = 2"),
    (lambda: dt.ObservationEmbedding(2, 8)(torch.full((4, 2), float("nan"))), "finite"),
    (lambda: dt.ObservationEmbedding(2, 8, sequential=True)(torch.zeros(4, 2)), "n, m"),
    (lambda: network(n_head=3), "divisible"),
    (lambda: network(n_components=2)(mixtures(d=1, dtype=torch.float32), z=torch.ones(4, 1, 1)),
     "2 components"),
    (lambda: network()(mixtures(d=1, dtype=torch.float32), z=torch.ones(3, 1, 1)), "4 rows"),
    (lambda: dt.PriorEmbedding(2, 3, 8, torch.log)(-torch.ones(4, 2)), "finite after"),
    (lambda: dt.PriorEmbedding(2, 3, 8)(torch.ones(4, 3)), "n_p|\\[B, 2\\]"),
    (lambda: dt.transformed(dt.SUPPORTS["positive"], torch.tensor([-1.0])), "outside"),
    (lambda: dt.transformed(dt.SUPPORTS["unit interval"], torch.tensor([1.5])), "outside"),
    (lambda: dt.transformed(None, torch.tensor([float("nan")])), "outside"),
    (lambda: dt.gmm_linear_gaussian_posterior(mixtures(), torch.ones(4, 1), torch.ones(1, 3),
                                              torch.ones(1, 1)), "do not fit"),
    (lambda: dt.inverse_gamma_posterior(torch.zeros(1), torch.ones(1), torch.ones(1, 2)),
     "positive"),
    (lambda: dt.inverse_gamma_posterior(ONE[:, 0], ONE[:, 0], torch.ones(2, 2), mean=ONE),
     "one per problem"),
    (lambda: mixtures().predict(torch.eye(2).double(), torch.ones(1, 1).double()), "must be"),
    (lambda: dt.inverse_gamma_posterior(torch.ones(2), torch.ones(2), torch.ones(3, 2)), "times n"),
    (lambda: dt.InverseGammaMetaPrior((0.0, 1.0)), "positive"),
    (lambda: dt.inverse_gamma_posterior(torch.ones(2), torch.ones(2, 1), torch.ones(2, 3)),
     "must be alike"),
    (lambda: mixtures(d=1).predict(*torch.tensor([[[1.0]], [[-0.05]]]).double()), "Q is no"),
    (lambda: dt.gmm_linear_gaussian_posterior(
        mixtures(), torch.ones(4, 2).double(), torch.eye(2).double(),
        torch.tensor([[1.0, 0.9], [0.0, 1.0]]).double()), "R is no"),
    (lambda: mixtures().to_tokens("logit"), "weight_link"),
    (lambda: dt.from_tokens(torch.zeros(1, 2, 3), 1, "logit"), "weight_link"),
    (lambda: mixtures().to_tokens(eps=2.0), "between 0 and 1"),
    (lambda: network()(mixtures(d=1).map(lambda t: t * float("nan")), z=torch.ones(4, 1, 1)),
     "holds NaN"),
    (lambda: dt.DistributionTransformer(
        dt.ComponentEmbedding(1, 16), {"z": dt.ObservationEmbedding(1, 16)}), "widths"),
    (lambda: dt.BoundedMetaPrior(2, min_weight=0.9), "min_weight"),
    (lambda: dt.BoundedMetaPrior(2, log_variance=(1.0, -3.0)), "range"),
    (lambda: dt.transformed(dt.SUPPORTS["unit interval"], torch.ones(1)), "outside"),
    (lambda: dt.transformed(dt.SUPPORTS["positive"], torch.tensor([float("inf")])), "outside"),
    (lambda: dt.dt_loss(network(), {"prior": mixtures(d=1), "x": torch.ones(1, 1),
                                    "obs": {"z": torch.ones(4, 1, 1)}}), "per problem"),
    (lambda: dt.NPE(network(), 3)(None), "each must be there"),
    (lambda: dt.epoch_schedule(5, 5, 10), "warmup < epochs"),
    (lambda: network().filter(mixtures(d=1, dtype=torch.float32), {
        "z": torch.ones(4, 2, 1, 1), "y": torch.ones(4, 3, 1)}), "equally long"),
])
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_parameters_without_an_embedding_are_refused():
    with pytest.raises(TypeError, match="prior_embedding"):
        network()(torch.ones(4, 2), z=torch.ones(4, 1, 1))


def test_mixtures_are_refused_by_a_model_that_never_learned_to_read_them():
    "Told priors by parameters, its posteriors can't be fed back as mixtures: by tokens they can."
    model = network(prior_embedding=dt.PriorEmbedding(2, 3, 16))
    phi, seen = mixtures(d=1, dtype=torch.float32), torch.ones(4, 2, 1, 1)
    with pytest.raises(TypeError, match="update"):
        model(phi, z=seen[:, 0])
    with pytest.raises(TypeError, match="update"):
        model.filter(torch.ones(4, 2), seen)
    first = model(torch.ones(4, 2), z=seen[:, 0])
    assert model.update(first.tokens, z=seen[:, 1]).posterior.loc.shape == (4, 3, 1)


def test_counts_and_float64_are_read():
    model, phi, z = network(), mixtures(d=1), torch.tensor([0, 1, 1, 2])[:, None, None]
    torch.testing.assert_close(model(phi, z=z).posterior.loc, model(
        phi.map(torch.Tensor.float), z=z.double()).posterior.loc)


# the experiment


SHORT = {"seeds": (0,), "training": {"steps": 2, "batch_size": 8},
         "variance_training": {"steps": 2, "batch_size": 8}, "n_test": 20, "n_draws": 10,
         "times": (1, 2), "shifts": (1.0, 2.0), "visits": (1, 2)}


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    report = goes_on(
        told, SMALL.replace(**SHORT, tracks=("variances", "mixtures")), tmp_path, monkeypatch)
    assert {c.verdict for c in report.claims} == UNDECIDED


def test_full_scale_path_with_a_narrow_network(tmp_path):
    assert len(FULL.seeds) > 1 and FULL.training.steps == FULL.epochs * 100
    cfg = FULL.replace(**SHORT, dim_feedforward=16, num_layers=2, epochs=2, warmup=1, device="cpu")
    report = experiment(cfg, start_run("distribution_transformers", cfg, "full", root=tmp_path))
    assert set(report.tables) == {"static", "filter", "densities", "variances", "parts",
                                  "prior loss"}
    assert set(report.tables["parts"]["method"]) >= {"no self-attention", "norms in front"}


def test_arms_have_the_same_budget_and_the_flat_one_as_many_weights():
    sizes = {arm: sum(p.numel() for p in told.build(SMALL, arm).parameters())
             for arm in ("DT", "NPE", "flat")}
    assert sizes["flat"] >= sizes["DT"]
    with pytest.raises(ValueError, match="not known"):
        told.build(SMALL, "best")


TRAINS = """
import torch
from adaptlab.inference import distribution_transformers as dt
from adaptlab.processes import is_main
from adaptlab.train import Training

class Fixed(dt.SimulatorDataset):  # the same problem for the same row, whoever asks
    def fetch_batch(self, rows, device="cpu"):
        parts = [super(Fixed, self).fetch_batch(rows[i : i + 1], device) for i in range(len(rows))]
        prior = tuple(torch.cat([p["prior"][j] for p in parts]) for j in range(3))
        return {"prior": prior, "x": torch.cat([p["x"] for p in parts]),
                "obs": {"z": torch.cat([p["obs"]["z"] for p in parts])}}

torch.manual_seed(0)
model = dt.DistributionTransformer(
    dt.ComponentEmbedding(1, 16), {"z": dt.ObservationEmbedding(1, 16)}, d_model=16)
data = Fixed(dt.BoundedMetaPrior(2), {"z": lambda x: x + torch.randn_like(x)}, 64)
dt.train_distribution_transformer(model, data, Training(steps=3, batch_size=8, lr=1e-3),
                                  device="cpu", progress=False)
if is_main():
    for name in ("decoder.layers.0.linear1.weight", "component_embedding.embedding.0.weight"):
        print(name, *model.state_dict()[name].flatten().tolist()[:20])
"""


def test_two_processes_train_as_one(tmp_path, capsys):
    assert_alike(TRAINS, tmp_path, capsys)
