"""Soups against the plain way of writing them, in one run: same result, time and memory."""

import pytest
import torch
import torch.nn.functional as F
from clock import in_turn, row
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from adaptlab import recipes
from adaptlab.arithmetic.model_soups import LearnedSoup, greedy_soup
from adaptlab.evaluate import peak_memory

TENSORS, ENTRIES, K = 6, 1_000_000, 12  # 24 MB per checkpoint


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder, g = tmp_path_factory.mktemp("sweep"), torch.Generator().manual_seed(0)
    for i in range(K):
        state = {f"w{j}": torch.randn(ENTRIES, generator=g) for j in range(TENSORS)}
        save_file(state, folder / f"{i}.safetensors")
    return [folder / f"{i}.safetensors" for i in range(K)]


def closeness(state):
    "A score that looks at all weights and that every addition improves."
    return -sum(float(t.norm()) for t in state.values())


def published_greedy(paths):
    "Files one at a time, and the weighted sum of two dicts, as in the published code."
    scores = [closeness(load_file(p)) for p in paths]
    order = sorted(range(len(paths)), key=lambda i: -scores[i])
    chosen, best, soup = order[:1], scores[order[0]], load_file(paths[order[0]])
    for i in order[1:]:
        n, new = len(chosen), load_file(paths[i])
        trial = {k: v.clone() * (n / (n + 1)) + new[k].clone() * (1 / (n + 1))
                 for k, v in soup.items()}
        score = closeness(trial)
        if score >= best:
            chosen, best, soup = [*chosen, i], score, trial
    return chosen, soup


def test_greedy(paths):
    chosen, soup = published_greedy(paths)
    ours = greedy_soup(paths, closeness)
    assert ours.ingredients == chosen
    torch.testing.assert_close(ours.state_dict, soup, atol=1e-5, rtol=1e-4)
    times = in_turn(lambda: greedy_soup(paths, closeness), lambda: published_greedy(paths))
    row(f"greedy soup of {K}, against the published code", *times, bound=1.0)
    memory = [peak_memory(f, "cpu") / 2**20 for f in (
        lambda: greedy_soup(paths, closeness), lambda: published_greedy(paths))]
    row(f"greedy soup of {K}, memory", *memory, bound=1.0, unit="MiB")


@pytest.mark.parametrize("k", [4, 16])
def test_learned_step(k):
    torch.manual_seed(0)
    model = recipes.MLP((512, 512, 512, 100))
    states = [{n: p + 0.01 * torch.randn_like(p) for n, p in model.state_dict().items()}
              for _ in range(k)]
    x, y = torch.randn(64, 512), torch.randint(100, (64,))
    soup = LearnedSoup(model, states)

    def ours():
        return torch.autograd.grad(F.cross_entropy(soup(x), y), (soup.raw, soup.beta))

    def plain():
        alpha = soup.raw.softmax(1)
        mixed = {name: sum(alpha[p, m] * s[name] for m, s in enumerate(states))
                 for p, name in enumerate(states[0])}
        loss = F.cross_entropy(soup.beta * functional_call(model, mixed, (x,)), y)
        return torch.autograd.grad(loss, (soup.raw, soup.beta))

    for a, b in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    row(f"learned soup of {k}, one gradient", *in_turn(ours, plain), bound=1.0)
