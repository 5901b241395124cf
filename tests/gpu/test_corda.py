"""CorDA on a GPU: the same numbers, what covariances and decompositions cost, the experiment."""

import warnings

import pytest
import torch

from adaptlab.adapters import adapters, merge, trainable_parameters
from adaptlab.bench.runs import launch
from adaptlab.experiments.corda import FULL, SMALL
from adaptlab.lowrank.corda import (
    CorDAConfig,
    Covariance,
    collect_covariance,
    damped,
    get_corda_model,
    starting_factors,
)
from gpu.card import DEVICE, DRY, clock, in_turn, llama, once, row, token_ids

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_covariances_are_those_of_float64(dtype):
    "Half precision by the tensor cores loses nothing; single precision is not rounded."
    torch.manual_seed(0)
    x = torch.randn(4, 200, 96).to(dtype)
    keep = torch.arange(200) < torch.tensor([200, 150, 20, 7])[:, None]
    ours = Covariance.zeros(96, DEVICE).add(x.to(DEVICE), keep.to(DEVICE))
    rows = x[keep].double()
    exact = rows.T @ rows / len(rows)
    assert (ours.matrix.cpu().double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_train_merge(dtype, mode):
    model, ids = llama("smollm2", layers=1, dtype=dtype), token_ids(2, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = model(input_ids=ids).logits
        get_corda_model(model, CorDAConfig(r=4, mode=mode), calibration_batches=[
            {"input_ids": ids}])
        assert torch.equal(model(input_ids=ids).logits, before)  # exact, in every format
    assert all(a.A.device.type == DEVICE for a in adapters(model).values())
    adam = torch.optim.AdamW(trainable_parameters(model), lr=1e-3)
    for _ in range(2):
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
    with torch.no_grad():
        tuned = model(input_ids=ids).logits.float()
        merged = merge(model)(input_ids=ids).logits.float()
    assert (merged - tuned).norm() <= (1e-3 if dtype == torch.float32 else 5e-2) * tuned.norm()


def test_covariances_cost_at_most_three_forwards():
    "All layers of the shape of Llama-3-8B in bf16, in one pass."
    layers = 8
    model = llama("llama3-8b", layers=layers)
    batches = [{"input_ids": token_ids(8, 512, seed=i)} for i in range(2)]

    def forward():
        with torch.no_grad():
            for batch in batches:
                model.model(**batch, use_cache=False)

    def collect():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            collect_covariance(model, batches, LINEARS)

    ours, plain = in_turn(collect, forward)
    row(f"CorDA, covariances of {layers} layers of 8B", ours, reference=plain, bound=3.0)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_decompositions_of_an_8b_model_take_half_a_minute(mode):
    "Rank 128 of every kind of layer: within 1e-6 of the SVD, and 32 blocks in 30 s at most."
    n, inner, shared = (4096, 14336, 1024) if not DRY else (64, 160, 32)
    rank, kinds = min(128, shared), {(n, n): 2, (shared, n): 2, (inner, n): 2, (n, inner): 1}
    g, total = torch.Generator(DEVICE).manual_seed(0), 0.0
    for (out, width), count in kinds.items():
        W = torch.randn(out, width, generator=g, device=DEVICE).bfloat16() / width**0.5
        X = torch.randn(4 * n, width, generator=g, device=DEVICE)
        C = Covariance.zeros(width, DEVICE).add(X * torch.logspace(0, -2, width, device=DEVICE))
        starting_factors(W, C, rank, mode)
        total += count * once(lambda W=W, C=C: starting_factors(W, C, rank, mode))
        if (out, width) == (n, n):
            A0, B0 = starting_factors(W, C, rank, mode)
            Cd = damped(C)[0]
            U, S, Vt = torch.linalg.svd(W.double() @ Cd, full_matrices=False)
            part = slice(0, rank) if mode == "ipm" else slice(n - rank, None)
            exact = U[:, part] @ (U[:, part].T @ W.double())
            assert (B0 @ A0 - exact).norm() <= 1e-6 * exact.norm()
            row(f"CorDA {mode}, 4096 x 4096", once(lambda W=W, C=C: starting_factors(
                W, C, rank, mode)), reference=once(lambda W=W, Cd=Cd: torch.linalg.svd(
                    W.double() @ Cd, full_matrices=False)), bound=0.5)
    row(f"CorDA {mode}, decompositions of 8B, 32 blocks", 32 * total, reference=30.0, bound=1.0)


def test_full_scale_shape():
    "Four layers of Llama-2-7b in bf16, rank 128 on all linears, a few steps of FULL."
    model, ids = llama("llama2-7b", layers=4), token_ids(1, FULL.max_length)
    rank = FULL.rank if not DRY else 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_corda_model(model, CorDAConfig(r=rank, target_modules=LINEARS), calibration_batches=[
            {"input_ids": ids}])
    adam = torch.optim.AdamW(trainable_parameters(model), lr=FULL.language.lr)

    def step():
        adam.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        adam.step()
        return float(loss.detach())

    assert step() > step() > step()
    row("CorDA r = 128, step of 4 layers of 7B, 512 tokens", *clock(step))


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, tracks=("vision",))
    report = launch("corda", cfg, root=tmp_path, progress=False)
    assert len(report.claims) == 11


def test_truncation_of_a_model_on_the_card(monkeypatch):
    from adaptlab import recipes
    from adaptlab.experiments import corda as told

    model = recipes.tiny_llama(hidden_size=64, layers=2).to(DEVICE)
    cfg = SMALL.replace(cut_layers=r".*up_proj")
    context = collect_covariance(model, [{"input_ids": token_ids(8, 64)[:, :16] % 250}])
    monkeypatch.setattr(told.evaluate, "token_losses", lambda *a, **k: [torch.ones(3)])
    found = told._cut(cfg, "corda", model, None, lambda: context)
    assert len(found) == len(cfg.drop)
