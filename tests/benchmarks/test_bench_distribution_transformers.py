"""A posterior in one forward pass against variational inference; log-densities against torch's."""

import torch
from clock import in_turn, row

from adaptlab.experiments.distribution_transformers import SMALL, transformer, world


def test_a_thousand_posteriors_against_variational_inference():
    "A hundred steps of the simplest rival: one Gaussian per problem, by reparametrised gradients."
    torch.manual_seed(0)
    (prior, _, seen), model = world(SMALL).simulate(1000), transformer(SMALL).eval()
    z = seen["z"]

    @torch.no_grad()
    def ours():
        model(prior, z=z)

    def variational():
        mean, log_scale = z.clone().requires_grad_(), torch.zeros_like(z, requires_grad=True)
        adam = torch.optim.Adam([mean, log_scale], lr=0.05)
        for _ in range(100):
            x = mean + log_scale.exp() * torch.randn_like(z)
            fit = (z - x).square()[:, 0] / (2 * SMALL.noise) - prior.log_prob(x)
            adam.zero_grad()
            (fit - log_scale[:, 0]).sum().backward()
            adam.step()

    row("1,000 posteriors, DT against 100 steps of VI", *in_turn(ours, variational, rounds=5),
        bound=0.5)


def test_log_density_against_torch():
    torch.manual_seed(0)
    prior, x, _ = world(SMALL).simulate(2000)
    torchs = prior.distribution()
    row("log-density of a mixture against torch's", *in_turn(
        lambda: prior.log_prob(x), lambda: torchs.log_prob(x), rounds=9, number=5), bound=1.0)
