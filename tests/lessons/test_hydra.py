"""Hydra: both heads, their merge, their budget, and the full-scale path."""

import math
from functools import partial

import pytest
import tiny_models
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptlab import adapter_files, adapters
from adaptlab.bench.runs import start_run
from adaptlab.experiments import hydra as told
from adaptlab.experiments.hydra import FULL, SMALL, best_update, experiment
from adaptlab.lowrank.hydra import (
    HydraConfig,
    HydraLinear,
    branch_report,
    inject_hydra,
    parameter_count,
)
from adaptlab.train import Training
from one_seed import UNDECIDED, goes_on


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9, bias=bias), nn.Tanh(), nn.Linear(9, 4, bias=bias))


def config(**options):
    return HydraConfig(target_modules=("0", "2"), **options)


def fill(model, std=0.5):
    torch.manual_seed(1)
    for p in adapters.trainable_parameters(model):
        nn.init.normal_(p, std=std)


@pytest.mark.parametrize("init", ["kaiming", "xavier", "normal"])
@pytest.mark.parametrize("branch_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_starts_as_the_base_and_merges(init, branch_bias, bias):
    model, x = net(bias), torch.randn(5, 12)
    y0 = model(x)
    inject_hydra(model, config(scale=2.5, init=init, branch_bias=branch_bias))
    assert torch.equal(model(x), y0)
    fill(model)
    y = model(x)
    merged = adapters.merge_and_unload(model)
    assert type(merged[0]) is nn.Linear and merged[0].weight.shape == (9, 12)
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-4)


def test_unmerging_is_exact():
    model = net()
    state = {n: p.clone() for n, p in model.state_dict().items()}
    inject_hydra(model, config(scale=4.5))
    fill(model)
    adapters.merge(model)
    adapters.unmerge(model)
    adapters.detach(model)
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())


def test_without_the_sequential_head_it_is_pefts_lora():
    peft = pytest.importorskip("peft")
    ours, x = net(), torch.randn(3, 12)
    lora = peft.get_peft_model(net(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    inject_hydra(ours, HydraConfig(r_parallel=3, r_sequential=0, scale=2.0,
                                   target_modules=("0",)))
    fill(ours)
    theirs, adapter = lora.base_model.model[0], adapters.adapters(ours)["0"]
    theirs.lora_A["default"].weight.data.copy_(adapter.A_parallel)
    theirs.lora_B["default"].weight.data.copy_(adapter.B_parallel)
    torch.testing.assert_close(ours(x), lora(x))
    for model in (ours, lora):
        model(x).square().sum().backward()
    torch.testing.assert_close(adapter.A_parallel.grad, theirs.lora_A["default"].weight.grad)
    torch.testing.assert_close(adapter.B_parallel.grad, theirs.lora_B["default"].weight.grad)


def test_the_sequential_head_alone():
    model = nn.Sequential(nn.Linear(20, 6))
    inject_hydra(model, HydraConfig(r_parallel=0, r_sequential=2, target_modules=("0",)))
    fill(model)
    adapter, W = adapters.adapters(model)["0"], model[0].weight
    change = adapter.change()
    torch.testing.assert_close(change, adapter.B_sequential @ adapter.A_sequential @ W)
    assert torch.linalg.matrix_rank(change) == 2
    zero, b = torch.zeros(1, 20), model[0].bias
    expected = b + adapter.B_sequential @ adapter.A_sequential @ b
    torch.testing.assert_close(model(zero)[0], expected)
    adapters.detach(model)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    inject_hydra(model, HydraConfig(r_parallel=0, r_sequential=2, target_modules=("0",)))
    fill(model)
    assert not model(torch.randn(3, 20)).any()  # nothing to recombine


def test_gradients():
    layer = nn.Linear(5, 3).double()
    adapter = HydraLinear(layer, 1, 2, scale=1.5, branch_bias=True).double()
    for p in adapter.parameters():
        nn.init.normal_(p)
    x = torch.randn(4, 5, dtype=torch.double, requires_grad=True)

    def call(x, *values):
        names = [n for n, _ in adapter.named_parameters()]
        return torch.func.functional_call(
            adapter, dict(zip(names, values, strict=True)), (x, layer(x)))

    values = tuple(p.detach().clone().requires_grad_() for p in adapter.parameters())
    assert torch.autograd.gradcheck(call, (x, *values))


def test_at_the_start_only_the_up_projections_learn():
    model = net()
    inject_hydra(model, config())
    model(torch.randn(3, 12)).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert bool(p.grad.any()) == (".B_" in name), name


def test_counts_and_ranks_for_a_budget():
    for r_p, r_s, bias in ((2, 3, False), (0, 3, True), (2, 0, True), (1, 1, True)):
        cfg = HydraConfig(r_parallel=r_p, r_sequential=r_s, branch_bias=bias,
                          target_modules=("0",))
        model = nn.Sequential(nn.Linear(16, 4))
        inject_hydra(model, cfg)
        assert adapters.count_parameters(model)[0] == parameter_count(16, 4, cfg)
    d = 8
    for budget in range(10 * d, 40 * d, d):
        lora = budget // (5 * d)
        both = max(r_p + r_s for r_p in range(1, lora + 1)
                   for r_s in range(budget) if 5 * r_p * d + 2 * r_s * d <= budget)
        assert both > lora


def test_autocast_half_precision_and_other_shapes():
    model, x = net(), torch.randn(2, 3, 4, 12)
    inject_hydra(model, config(branch_bias=True))
    fill(model)
    y = model(x)
    assert y.shape == (2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), y, rtol=0.1, atol=0.3)
    half = model.to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).float(), y, rtol=0.1, atol=0.3)


def test_conv1d_files_and_head(tmp_path):
    model = nn.Sequential(Conv1D(6, 12), nn.Tanh(), nn.Linear(6, 3))
    other = nn.Sequential(Conv1D(6, 12), nn.Tanh(), nn.Linear(6, 3))
    other.load_state_dict(model.state_dict())
    inject_hydra(model, HydraConfig(target_modules=("0",)), also_train=("2",))
    fill(model)
    x = torch.randn(4, 12)
    file = adapter_files.save(model, tmp_path / "hydra.safetensors")
    torch.testing.assert_close(adapter_files.load(other, file)(x), model(x))
    y = model(x)
    torch.testing.assert_close(adapters.merge(model)(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call, kind, words", [
    (lambda: HydraConfig(r_parallel=0, r_sequential=0), ValueError, "at least one branch"),
    (lambda: HydraConfig(r_parallel=-1), ValueError, "whole number"),
    (lambda: HydraConfig(r_sequential=1.5), ValueError, "whole number"),
    (lambda: HydraConfig(scale=math.nan), ValueError, "finite"),
    (lambda: HydraConfig(dropout=1.0), ValueError, "dropout"),
    (lambda: HydraConfig(init="ones"), ValueError, "init"),
    (lambda: HydraLinear(nn.Linear(3, 3), r_parallel=True), ValueError, "whole number"),
    (lambda: inject_hydra(net(), HydraConfig()), ValueError, "layers are"),
    (lambda: inject_hydra(net(), HydraConfig(target_modules=("1",))), TypeError, "Tanh"),
    (lambda: HydraLinear(nn.Linear(3, 3)).change("left"), ValueError, "branch"),
    (lambda: branch_report(net(), k=0), ValueError, "direction"),
])
def test_bad_input_is_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_twice_is_refused():
    model = net()
    inject_hydra(model, config())
    with pytest.raises(ValueError):
        inject_hydra(model, config())
    adapters.merge(model)
    with pytest.raises(ValueError, match="already merged"):
        adapters.merge(model)


def test_best_updates_are_best():
    "No gradient descent finds a better one; and each kind reaches what it can express."
    g = torch.Generator().manual_seed(0)
    W, T = torch.randn(6, 24, generator=g), torch.randn(6, 24, generator=g)
    found = best_update(W, T, 1, 2)
    assert torch.linalg.matrix_rank(found, rtol=1e-4) == 3
    factors = [torch.randn(*s, generator=g).mul_(0.3).requires_grad_() for s in (
        (6, 1), (1, 24), (6, 2), (2, 6))]
    adam = torch.optim.Adam(factors, lr=0.02)
    for _ in range(600):
        adam.zero_grad()
        loss = (factors[0] @ factors[1] + factors[2] @ factors[3] @ W - T).square().sum()
        loss.backward()
        adam.step()
    assert (found - T).square().sum() <= loss.detach() * 1.001
    exact = torch.randn(6, 2, generator=g) @ torch.randn(2, 6, generator=g) @ W
    assert (best_update(W, exact, 0, 2) - exact).norm() < 1e-3 * exact.norm()


def test_full_scale_path_with_a_tiny_model(tmp_path, recorded):
    "All eight tasks, from data of the hub's form to a table."
    cfg = FULL.replace(model=tiny_models.roberta(tmp_path / "model", 2), device="cpu", seeds=(0,),
                       glue_lrs=(1e-3,), max_length=32,
                       glue_training=Training(steps=2, batch_size=2))
    report = experiment(cfg, start_run("hydra", cfg, "full", root=tmp_path / "runs"))
    table = report.tables["glue"]
    assert sorted(table["task"].unique()) == sorted(FULL.glue) and len(table) == 16
    assert {f"nyu-mll/glue@{t}" for t in FULL.glue} <= {
        str(a).partition("#")[0] for a in recorded.asked}


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(seeds=(0,), images=(32, 32), lrs=(1e-2,), mixes=((4, 4), (0, 5)),
                        vision=Training(steps=2, batch_size=8))
    report = goes_on(told, cfg, tmp_path, monkeypatch, idle=(told, "HydraLinear"))
    assert {c.verdict for c in report.claims} == UNDECIDED


def test_a_step_through_fit_moves_the_branches_only():
    model = net()
    before = {n: p.clone() for n, p in model.named_parameters()}
    inject_hydra(model, config())
    Training(steps=3, batch_size=4, lr=0.1).fit(
        model, (torch.randn(8, 12), torch.randint(4, (8,))), None, device="cpu", progress=False)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) if name in before else p.any()
    assert partial(HydraLinear, r_parallel=1)(nn.Linear(2, 2)).config()["r_parallel"] == 1


@pytest.mark.parametrize("ranks", [{"r_parallel": 4}, {"r_sequential": 4}])
def test_more_rank_than_sides_is_warned_about(ranks):
    with pytest.warns(UserWarning, match="rank 4 is more than the 3"):
        HydraLinear(nn.Linear(5, 3), **ranks)
