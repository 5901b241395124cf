"""CorDA on a GPU: the same numbers, what covariances and decompositions cost, FULL's step."""

import warnings

import pytest
import torch

from adaptlab import recipes
from adaptlab.adapters import adapters, attach, merge, trainable_parameters
from adaptlab.bench.runs import launch
from adaptlab.experiments import corda as told
from adaptlab.experiments.corda import FULL, SMALL
from adaptlab.lowrank.corda import (
    CordaAdapter,
    CorDAConfig,
    Covariance,
    collect_covariance,
    context_svd,
    corda_to_lora,
    damped,
    get_corda_model,
    starting_factors,
    truncate,
)
from gpu.card import DEVICE, DRY, full, in_turn, language_step, llama, once, row, token_ids

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_covariances_are_those_of_float64(dtype):
    "Half precision by the tensor cores loses nothing; single precision is not rounded."
    torch.manual_seed(0)
    x = torch.randn(4, 200, 96).to(dtype)
    keep = torch.arange(200) < torch.tensor([200, 150, 20, 7])[:, None]
    ours = Covariance.zeros(96, DEVICE).add(x.to(DEVICE), keep.to(DEVICE))
    rows = x[keep].double()
    exact = rows.T @ rows / len(rows)
    assert (ours.matrix.cpu().double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("mode, dtype", [("ipm", torch.float32), ("kpm", torch.bfloat16)])
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
        for name, (A, B) in corda_to_lora(model).items():
            assert A.device == B.device and A.shape[0] == B.shape[1] == 8, name
        merged = merge(model)(input_ids=ids).logits.float()
    assert (merged - tuned).norm() <= (1e-3 if dtype == torch.float32 else 5e-2) * tuned.norm()


def test_covariances_cost_at_most_three_forwards():
    "Blocks of the shape of Llama-3-8B in bf16; each batch in one pass."
    layers = 4
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

    ours, plain = in_turn(collect, forward, rounds=5, warm=1)
    row(f"covariances, {layers} blocks of 8B", ours, reference=plain, against="forward passes",
        bound=3.0)


def case(out, width, tokens):
    "A weight in bf16, and the covariance of inputs some of which are a hundred times as large."
    g = torch.Generator(DEVICE).manual_seed(0)
    W = torch.randn(out, width, generator=g, device=DEVICE).bfloat16() / width**0.5
    X = torch.randn(tokens, width, generator=g, device=DEVICE)
    return W, Covariance.of(X * torch.logspace(0, -2, width, device=DEVICE))


def test_decompositions_are_those_of_the_svd():
    n = 2048 if not DRY else 64
    W, C = case(n, n, 4 * n)
    W, rank, found = W.double(), min(128, n // 4), {}
    slow = once(lambda: found.update(svd=torch.linalg.svd(W @ damped(C)[0])))
    U = found["svd"][0]
    for mode, part in (("ipm", slice(0, rank)), ("kpm", slice(n - rank, None))):
        A0, B0 = starting_factors(W, C, rank, mode)
        exact = U[:, part] @ (U[:, part].T @ W)
        assert (B0 @ A0 - exact).norm() <= 1e-6 * exact.norm()
    row(f"rank 128 of {n} x {n}", once(lambda: starting_factors(W, C, rank)), reference=slow,
        against="SVD in float64", bound=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["corda", "svd", "asvd", "whiten"])
def test_splits_are_those_of_the_cpu(dtype, method):
    W, C = case(48, 32, 500)
    W, on_cpu = W.to(dtype), Covariance(C.total.cpu(), C.abs_total.cpu(), C.tokens, C.samples)
    U, S, Vhat = context_svd(W, C, method=method)
    assert (U @ S.diag() @ Vhat - W).norm() <= 1e-6 * W.norm()
    torch.testing.assert_close(S.cpu(), context_svd(W.cpu(), on_cpu, method=method)[1])
    cut = truncate(W, C, 8, method)
    torch.testing.assert_close(cut.cpu(), truncate(W.cpu(), on_cpu, 8, method), rtol=2e-2,
                               atol=1e-4)


def test_decompositions_of_an_8b_model_take_half_a_minute():
    "Rank 128 of each kind of layer, both modes: 32 blocks in 30 s at most."
    n, inner, shared = (4096, 14336, 1024) if not DRY else (64, 160, 32)
    rank, kinds = min(128, shared), {(n, n): 2, (shared, n): 2, (inner, n): 2, (n, inner): 1}
    total = dict.fromkeys(("ipm", "kpm"), 0.0)
    starting_factors(*case(32, 32, 100), 4)  # libraries are loaded
    for (out, width), count in kinds.items():
        W, C = case(out, width, 2 * n)
        for mode in total:
            total[mode] += count * once(
                lambda W=W, C=C, mode=mode: starting_factors(W, C, rank, mode))
    for mode, seconds in sorted(total.items(), key=lambda found: found[1]):
        row(f"{mode}: all decompositions of 8B", 32 * seconds, reference=30.0,
            against="half a minute", bound=1.0)


def test_full_scale_step():
    "Llama-2-7b in bf16 with CorDA's factors on all linear layers, as FULL trains it."
    batch, rank = FULL.language.batch_size // FULL.language.accumulate, FULL.rank if not DRY else 4
    model, ids = llama("llama2-7b"), token_ids(batch, FULL.max_length)

    def adapter(layer):
        start = (torch.randn(shape, device=DEVICE) / 64 for shape in (
            (rank, layer.in_features), (layer.out_features, rank)))
        return CordaAdapter(layer, rank, start=tuple(start))

    attach(model.train(), adapter, LINEARS)

    assert FULL.language.precision == "bf16"
    full(f"a step, r = {rank}, {batch} x {FULL.max_length} tokens", model,
         {"input_ids": ids, "labels": ids}, language_step(model, ids, FULL.language.lr),
         autocast=torch.bfloat16, rounds=2)


def test_small_experiment(tmp_path, monkeypatch):
    "The vision track, with a smaller model that is trained for one epoch."
    monkeypatch.setattr(told, "VIT", {"patch_size": 14, "depth": 1, "dim": 32, "epochs": 1})
    cfg = SMALL.replace(
        seeds=(0,), device=DEVICE, tracks=("vision",), lrs=(4e-3,), images=(64, 32),
        test_images=32, context_images=64, every=1, vision={"steps": 2})
    report = launch("corda", cfg, root=tmp_path, progress=False)
    assert len(report.claims) == 11


def test_truncation_of_a_model_on_the_card(monkeypatch):
    model = recipes.tiny_llama(hidden_size=64, layers=2).to(DEVICE)
    cfg = SMALL.replace(cut_layers=r".*up_proj")
    context = collect_covariance(model, [{"input_ids": token_ids(8, 64)[:, :16] % 250}])
    monkeypatch.setattr(told.evaluate, "token_losses", lambda *a, **k: [torch.ones(3)])
    found = told._cut(cfg, "corda", model, None, lambda: context)
    assert len(found) == len(cfg.drop)
