"""CorDA's start and its train step against PEFT's, and what the start is made of."""

import copy
import warnings

import pytest
import torch
from clock import in_turn, row, seconds

from adaptlab import models
from adaptlab.adapters import adapters, trainable_parameters
from adaptlab.evaluate import peak_memory
from adaptlab.lowrank.corda import (
    CorDAConfig,
    Covariance,
    collect_covariance,
    damped,
    get_corda_model,
    starting_factors,
)

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS, SAMPLES, LENGTH, RANK = 2, 8, 256, 16


@pytest.fixture(scope="module")
def base():
    "The first blocks of SmolLM2-135M: real weights, and a benchmark of seconds."
    model, _ = models.load("smollm2", device="cpu")
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    return model


@pytest.fixture(scope="module")
def samples():
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1000, (1, LENGTH), generator=g)} for _ in range(SAMPLES)]


def config(mode, rank=RANK, **settings):
    from peft.tuners.lora.config import CordaConfig

    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS,
                           init_lora_weights="corda",
                           corda_config=CordaConfig(corda_method=mode, **settings))


def theirs(base, samples, mode):
    from peft.tuners.lora.corda import preprocess_corda

    model, settings = copy.deepcopy(base), config(mode)
    preprocess_corda(model, settings, run_model=lambda: [model(**s) for s in samples])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, settings)


def ours(base, samples, mode):
    model = copy.deepcopy(base)
    context = collect_covariance(model, samples, TARGETS, normalize="sample_max")
    return get_corda_model(model, CorDAConfig(r=RANK, mode=mode, target_modules=TARGETS), context)


def formula(W, C, mode):
    "The chosen part of W in float64, as the paper writes it."
    W, C = W.detach().double(), C.double()
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
    U, S, Vt = torch.linalg.svd(W @ C, full_matrices=False)
    part = slice(0, RANK) if mode == "ipm" else slice(len(S) - RANK, None)
    return (U[:, part] * S[part]) @ Vt[part] @ torch.linalg.inv(C)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_start_against_peft(base, samples, mode):
    "The formula in float64 is met to 1e-5; PEFT's float32 loses the smallest components (kpm)."
    context = collect_covariance(base, samples, TARGETS, normalize="sample_max")
    for name, a in list(adapters(ours(base, samples, mode)).items())[::LAYERS]:
        exact = formula(base.get_submodule(name).weight, context[name].matrix, mode)
        assert ((a.B @ a.A).double() - exact).norm() < 1e-5 * exact.norm()
    times = in_turn(lambda: ours(base, samples, mode), lambda: theirs(base, samples, mode),
                    rounds=2)
    row(f"CorDA {mode}, start of {LAYERS} blocks, against PEFT", *times, bound=1.0)
    memory = [peak_memory(lambda f=f: f(base, samples, mode)) / 2**20 for f in (ours, theirs)]
    row(f"CorDA {mode}, start, memory", *memory, bound=1.0, unit="MiB")


def test_covariances_against_the_forward(base, samples):
    batch = [{"input_ids": torch.cat([s["input_ids"] for s in samples[:4]])}]

    def forward():
        with torch.no_grad():
            base.model(**batch[0], use_cache=False)

    row("CorDA, covariances against the forward pass",
        *in_turn(lambda: collect_covariance(base, batch, TARGETS), forward, rounds=3), bound=3.0)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_eigenvectors_against_the_svd(mode):
    "Rank 128 of 576 x 576, the covariance's preparation included."
    g = torch.Generator().manual_seed(0)
    W, X = torch.randn(576, 576, generator=g) / 24, torch.randn(2000, 576, generator=g)
    C = Covariance.zeros(576).add(X * torch.logspace(0, -2, 576))

    def by_svd():
        Cd, _, _ = damped(C)
        U, S, Vt = torch.linalg.svd(W.double() @ Cd, full_matrices=False)
        return U, S, torch.linalg.solve(Cd, Vt.T)

    row(f"CorDA {mode}, rank 128 by eigenvectors, against a float64 SVD",
        *in_turn(lambda: starting_factors(W, C, 128, mode), by_svd, rounds=5), bound=1.0)


def train_step(model, ids):
    optimizer = torch.optim.AdamW(trainable_parameters(model.train()), lr=1e-5)

    def step():
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return step


def both_with_one_start(base, dtype, rank):
    "All linear layers adapted, here and in PEFT, from PEFT's covariances of a short text."
    from peft.tuners.lora.corda import preprocess_corda

    model, copied = copy.deepcopy(base), copy.deepcopy(base)
    settings = config("ipm", rank, prune_temporary_fields=False)
    ids = torch.randint(1000, (1, 256), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_corda(copied, settings, run_model=lambda: copied(ids))
        covariances = {n: m.covariance_matrix for n, m in copied.named_modules()
                       if hasattr(m, "covariance_matrix")}
        mine = get_corda_model(model.to(dtype), CorDAConfig(r=rank, target_modules=TARGETS),
                               covariances)
        other = peft.get_peft_model(copied.to(dtype), settings)
    for module in other.modules():
        if hasattr(module, "covariance_matrix"):
            del module.covariance_matrix
    return mine, other


@pytest.mark.parametrize("dtype, rank, bound", [
    (torch.float32, 8, 1.0), (torch.float32, 16, 1.05), (torch.bfloat16, 16, 1.0)])
def test_train_step_against_peft(base, dtype, rank, bound):
    "The base weights stay untouched: four of six thin products have twice the rank."
    mine, other = both_with_one_start(base, dtype, rank)
    ids = torch.randint(0, 49152, (4, 64), generator=torch.Generator().manual_seed(0))
    steps = [train_step(mine, ids), train_step(other, ids)]
    assert seconds(steps[0], 1) > 0
    row(f"CorDA r = {rank}, {dtype}, step against PEFT", *in_turn(*steps, rounds=11), bound=bound)
    row(f"CorDA r = {rank}, {dtype}, memory of the step",
        *(peak_memory(s) / 2**20 for s in steps), bound=1.0, unit="MiB")
