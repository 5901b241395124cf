"""A step on the coefficients, against the naive sum of whole models and against training all."""

import copy

import torch
from clock import in_turn, row
from torch import nn
from torch.func import functional_call

from adaptlab import modules, recipes
from adaptlab.arithmetic.atlas import AnisotropicComposer, TaskVector, block_gradients
from adaptlab.evaluate import peak_memory

N = 8  # task vectors


def beds():
    "A ViT of 2.4 million weights in blocks of 192, its vectors, and a batch."
    torch.manual_seed(0)
    model = recipes.TinyViT(28, 7, 192, 6, 6)
    base = dict(model.named_parameters())
    vectors = [TaskVector.of({k: 0.02 * torch.randn_like(p) for k, p in base.items()})
               for _ in range(N)]
    return model, vectors, (torch.rand(8, 1, 28, 28), torch.randint(0, 10, (8,)))


def stacked(model, vectors):
    "The naive way: whole models are made, and summed; from all coefficients in one go."
    base = {k: p.detach() for k, p in model.named_parameters()}
    stacks = {k: torch.stack([v[k] for v in vectors]) for k in base}
    coef = nn.Parameter(torch.zeros(N, len(base)))

    def step(batch):
        coef.grad = None
        made = {k: b + (coef[:, j].view(-1, *[1] * b.ndim) * stacks[k]).sum(0)
                for j, (k, b) in enumerate(base.items())}
        out = functional_call(model, made, (batch[0],))
        nn.functional.cross_entropy(out, batch[1]).backward()
    return step


def ours(model, vectors, **options):
    made = AnisotropicComposer(model, vectors, **options)

    def step(batch):
        made.coef.grad = None
        modules.cross_entropy(made, batch).backward()
    return step


def everything(model):
    model = copy.deepcopy(model).eval()

    def step(batch):
        model.zero_grad()
        modules.cross_entropy(model, batch).backward()
    return step


def test_step_against_the_naive_sum():
    model, vectors, batch = beds()
    steps = [ours(model, vectors), stacked(model, vectors), everything(model)]
    times = in_turn(*(lambda s=s: s(batch) for s in steps), rounds=5)
    row("aTLAS step, 8 vectors, against a sum of whole models", times[0], times[1], bound=0.95)
    row("the same, against a step on all weights", times[0], times[2])
    small = batch[0][:2], batch[1][:2]
    peaks = [peak_memory(lambda s=s: s(small), "cpu") / 2**20 for s in steps[:2]]
    row("aTLAS step, memory above the stored vectors", *peaks, bound=0.6, unit="MiB")


def test_parts_against_a_gather_per_vector():
    model, vectors, batch = beds()
    base = {k: p.detach() for k, p in model.named_parameters() if p.ndim > 1}
    step = ours(model, vectors, granularity=16, only_matrices=True)
    stacks = {k: torch.stack([v[k].flatten() for v in vectors]) for k in base}
    part = {k: torch.randint(16, (b.numel(),)) for k, b in base.items()}
    coef = nn.Parameter(torch.zeros(N, len(base), 16))

    def gathered(batch):
        coef.grad = None
        made = {k: b + (coef[:, j][:, part[k]] * stacks[k]).sum(0).view(b.shape)
                for j, (k, b) in enumerate(base.items())}
        nn.functional.cross_entropy(functional_call(model, made, (batch[0],)), batch[1]).backward()

    times = in_turn(lambda: step(batch), lambda: gathered(batch), rounds=3)
    row("aTLAS x16 step against coefficients gathered for each vector", *times, bound=0.95)


def test_scores_against_autograd():
    model, vectors, batch = beds()
    made = AnisotropicComposer(model, vectors)

    def by_autograd():
        made.coef.grad = None
        modules.cross_entropy(made, batch).backward()

    times = in_turn(lambda: block_gradients(model, vectors, batch), by_autograd, rounds=3)
    row("scores of all blocks from one backward pass, against autograd", *times)
