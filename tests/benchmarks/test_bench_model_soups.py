"""Greedy and learned soups against the plain way of writing them, in one run: same result."""

import pytest
import torch
import torch.nn.functional as F
from clock import seconds
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

from adaptlab import models
from adaptlab.arithmetic.model_soups import LearnedSoup, greedy_soup, train_copies
from adaptlab.evaluate import peak_memory

TENSORS, ENTRIES = 6, 1_000_000  # 24 MB per checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, g = tmp_path_factory.mktemp("sweep"), torch.Generator().manual_seed(0)
    for i in range(24):
        state = {f"w{j}": torch.randn(ENTRIES, generator=g) for j in range(TENSORS)}
        save_file(state, folder / f"{i}.safetensors")
    return folder


def closeness(state):
    "A score that looks at all weights and that every addition improves."
    return -sum(float(t.norm()) for t in state.values())


def plain_greedy(paths, load=load_file):
    "Files one at a time, and the weighted sum of two dicts, as in the published code."
    scores = [closeness(load(p)) for p in paths]
    order = sorted(range(len(paths)), key=lambda i: -scores[i])
    chosen, best, soup = order[:1], scores[order[0]], load(paths[order[0]])
    for i in order[1:]:
        n, new = len(chosen), load(paths[i])
        trial = {k: v.clone() * (n / (n + 1)) + new[k].clone() * (1 / (n + 1))
                 for k, v in soup.items()}
        score = closeness(trial)
        if score >= best:
            chosen, best, soup = [*chosen, i], score, trial
    return chosen, soup


def greedy_with_all_in_memory(paths):
    "What one writes first: a list of state dicts."
    states = dict(zip(paths, map(load_file, paths), strict=True))
    return plain_greedy(paths, states.__getitem__)


@pytest.mark.parametrize("k", [6, 12, 24])
def test_greedy(benchmark, folder, k, capsys):
    paths = [folder / f"{i}.safetensors" for i in range(k)]
    chosen, soup = plain_greedy(paths)
    ours = greedy_soup(paths, closeness)
    assert ours.ingredients == chosen
    torch.testing.assert_close(ours.state_dict, soup, atol=1e-5, rtol=1e-4)
    benchmark.pedantic(greedy_soup, (paths, closeness), rounds=2)
    fast = seconds(lambda: greedy_soup(paths, closeness), 3)
    slow = seconds(lambda: plain_greedy(paths), 3)
    model = 4 * TENSORS * ENTRIES
    memory = [peak_memory(f, "cpu") / model for f in (
        lambda: greedy_soup(paths, closeness), lambda: plain_greedy(paths),
        lambda: greedy_with_all_in_memory(paths))]
    benchmark.extra_info |= {"ratio": fast / slow, "models in memory": memory}
    with capsys.disabled():
        print(f"\ngreedy soup of {k} ({len(chosen)} accepted): {fast:.2f} s, plain {slow:.2f} s: "
              f"ratio {fast / slow:.2f}; models in memory {memory[0]:.1f}, plain {memory[1]:.1f}, "
              f"with a list of models {memory[2]:.1f}")
    # The time is that of reading and adding up; in earnest nearly all of it goes into the scores.
    assert memory[0] < 2.5 and memory[0] < memory[1]


def plain_learned_step(model, states, raw, beta, x, y):
    "Mixes each tensor by a sum over models in Python, as a first attempt would."
    alpha = raw.softmax(1)
    mixed = {name: sum(alpha[p, m] * s[name] for m, s in enumerate(states))
             for p, name in enumerate(states[0])}
    loss = F.cross_entropy(beta * functional_call(model, mixed, (x,)), y)
    return torch.autograd.grad(loss, (raw, beta))


@pytest.mark.parametrize("k", [4, 16, 48])
def test_learned_step(benchmark, k, capsys):
    torch.manual_seed(0)
    model = models.MLP((512, 512, 512, 100))
    states = [{n: p + 0.01 * torch.randn_like(p) for n, p in model.state_dict().items()}
              for _ in range(k)]
    x, y = torch.randn(64, 512), torch.randint(100, (64,))
    soup = LearnedSoup(model, states)

    def ours():
        return torch.autograd.grad(F.cross_entropy(soup(x), y), (soup.raw, soup.beta))

    def plain():
        return plain_learned_step(model, states, soup.raw, soup.beta, x, y)

    for a, b in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    benchmark(ours)
    fast, slow = seconds(ours, 10), seconds(plain, 10)
    memory = [peak_memory(f, "cpu") / 1e6 for f in (ours, plain)]
    benchmark.extra_info |= {"ratio": fast / slow, "MB": memory}
    with capsys.disabled():
        print(f"\nlearned soup of {k}, one gradient: {1e3 * fast:.1f} ms, plain {1e3 * slow:.1f} "
              f"ms: ratio {fast / slow:.2f}; {memory[0]:.0f} MB above the models, plain "
              f"{memory[1]:.0f} MB")
    assert fast < slow and memory[0] < memory[1]


def test_stacked_training(benchmark, capsys):
    "Twelve small networks at once against one after another, same weights."
    torch.manual_seed(0)
    x, y = torch.randn(600, 196), torch.randint(10, (600,))
    net = models.MLP((196, 128, 128, 10))
    recipes = [{"lr": 1e-3, "weight_decay": 0.1, "epochs": 3, "seed": i} for i in range(12)]
    starts = [net.state_dict()] * 12

    def loop():
        found = []
        for recipe in recipes:
            model = models.MLP((196, 128, 128, 10))
            model.load_state_dict(net.state_dict())
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 36)
            stream = models_stream(recipe["seed"])
            for step in range(36):
                rows = stream.step(step)
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            found.append(model.state_dict())
        return found

    def ours():
        return train_copies(net, starts, x, y, recipes, batch_size=50)

    for a, b in zip(ours(), loop(), strict=True):
        torch.testing.assert_close(a, dict(b), atol=1e-4, rtol=1e-3)
    benchmark.pedantic(ours, rounds=3)
    fast, slow = seconds(ours), seconds(loop)
    benchmark.extra_info["ratio"] = fast / slow
    with capsys.disabled():
        print(f"\n12 networks at once: {fast:.2f} s, one by one {slow:.2f} s: "
              f"ratio {fast / slow:.2f}")
    assert fast < slow


def models_stream(seed):
    "The order of the samples, as `train.fit` has it."
    from adaptlab.train import IndexStream

    return IndexStream(600, 50, seed)


def test_the_ensemble_costs_k(benchmark, capsys):
    "What the soup saves at inference."
    from adaptlab.arithmetic.model_soups import logit_ensemble

    nets = [models.MLP((512, 512, 100)).eval() for _ in range(16)]
    x = torch.randn(256, 512)
    with torch.inference_mode():
        ensemble: nn.Module = logit_ensemble(nets)
        benchmark(nets[0], x)
        one, many = seconds(lambda: nets[0](x), 20), seconds(lambda: ensemble(x), 20)
    with capsys.disabled():
        print(f"\nensemble of 16: {many / one:.1f} times the time of the soup")
    assert many > 8 * one
