"""CorDA: what must hold, agreement with PEFT, what is refused, the full-scale path in small."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import calibration
import pytest
import schemas
import torch
from calibration import llama, token_batches
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from adaptlab import recipes
from adaptlab.adapter_files import load, save, to_peft
from adaptlab.adapters import (
    adapters,
    attach,
    count_parameters,
    detach,
    enabled,
    merge,
    merge_and_unload,
    trainable_parameters,
    unmerge,
)
from adaptlab.bench import runs
from adaptlab.experiments import corda as told
from adaptlab.experiments.corda import FULL, SMALL
from adaptlab.lowrank import corda as lesson
from adaptlab.lowrank.corda import (
    CordaAdapter,
    CorDAConfig,
    Covariance,
    collect_covariance,
    context_svd,
    corda_adapter,
    corda_to_lora,
    damped,
    get_corda_model,
    starting_factors,
    truncate,
)

ROOT = Path(__file__).parents[2]
SHAPES = [(12, 8), (8, 12), (10, 10)]
MODES = ["ipm", "kpm"]


def matrix(out, width, seed=0):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)).double()


def inputs(n, width, seed=1, decay=-1.5):
    "Mixed, so that no channel is independent of the others."
    return calibration.inputs(n, width, seed, 0) @ matrix(width, width, seed + 1).float() * (
        torch.logspace(0, decay, width))


def covariance(width, n=300, **kw):
    return Covariance.zeros(width).add(inputs(n, width, **kw))


@torch.no_grad()
def shake(model, size=0.02):
    "Move the adapters as training would."
    torch.manual_seed(1)
    for p in trainable_parameters(model):
        p += size * torch.randn_like(p)


# ---------------------------------------------------------------- decomposition


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["corda", "svd", "asvd", "whiten"])
def test_the_decomposition_is_exact(shape, method):
    W, C = matrix(*shape), covariance(shape[1])
    U, S, Vhat = context_svd(W, C, method=method)
    assert (U @ S.diag() @ Vhat - W).norm() <= 1e-5 * W.norm()
    R = min(shape)
    assert U.shape == (shape[0], R) and S.shape == (R,) and Vhat.shape == (R, shape[1])
    torch.testing.assert_close(U.T @ U, torch.eye(R).double())
    assert (S.diff() <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_orthonormal_after_the_context_only(shape):
    W, C = matrix(*shape), covariance(shape[1])
    Cd, _, _ = damped(C)
    _, _, Vhat = context_svd(W, C)
    eye = torch.eye(min(shape)).double()
    torch.testing.assert_close((Vhat @ Cd) @ (Vhat @ Cd).T, eye)
    assert not torch.allclose(Vhat @ Vhat.T, eye, atol=0.1)


@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_truncation_is_optimal_in_its_own_norm(k):
    W, C = matrix(12, 8), covariance(8)
    Cd, L, _ = damped(C)
    S = context_svd(W, C)[1]
    cut = {m: W - truncate(W, C, k, m) for m in ("corda", "svd", "asvd", "whiten")}
    weighted = {m: float((d @ Cd).norm()) for m, d in cut.items()}
    output = {m: float((d @ L).norm()) for m, d in cut.items()}
    assert weighted["corda"] == pytest.approx(float(S[k:].norm()), rel=1e-6, abs=1e-8)
    assert all(weighted["corda"] <= w + 1e-8 for w in weighted.values())
    assert all(output["whiten"] <= o + 1e-8 for o in output.values())
    assert output["corda"] <= output["svd"] + 1e-8
    g = torch.Generator().manual_seed(k)
    for _ in range(20 if k else 0):  # any other matrix of this rank is worse
        near = truncate(W, C, k) + 0.1 * torch.randn(12, 8, generator=g).double()
        other = truncate(near, None, k, "svd")
        assert ((W - other) @ Cd).norm() >= weighted["corda"] - 1e-8


@pytest.mark.parametrize("mode", MODES)
def test_scale_and_white_inputs(mode):
    W, C = matrix(12, 8).float(), covariance(8)

    def start(C, scaling=1.0):
        A, B = starting_factors(W, C, 3, mode, scaling)
        return scaling * B @ A

    torch.testing.assert_close(start(1e6 * C.matrix), start(C), rtol=1e-5, atol=1e-5)
    A, B = starting_factors(W, C, 3, mode)
    A9, B9 = starting_factors(W, 9 * C.matrix, 3, mode)  # a factor moves size from A to B
    torch.testing.assert_close(3 * A9.norm(dim=1), A.norm(dim=1))
    torch.testing.assert_close(B9.norm(dim=0), 3 * B.norm(dim=0))
    torch.testing.assert_close(start(C, 4.0), start(C))
    for c in (1e-6, 1.0, 1e6):
        torch.testing.assert_close(start(c * torch.eye(8)), start(None), rtol=1e-5, atol=1e-5)


def test_the_pencil_exercise():
    "Solution 1: damage to the context per squared gain, and what a doubled C changes."
    W, C = torch.diag(torch.tensor([2.0, 1])), torch.diag(torch.tensor([0.5, 8]))
    for c, mode, expected in ((1, "ipm", 560.25 / 16.25**2), (1, "kpm", 0.285),
                              (2, "ipm", 2.124), (2, "kpm", 0.656)):
        A, B = starting_factors(W, c * C, 1, mode, damp=1e-9)
        A, B, G = A.float(), B.float(), torch.ones(2, 2)
        step = B @ B.T @ G + G @ A.T @ A
        found = float((step @ C * step).sum() / (G * step).sum() ** 2)
        assert found == pytest.approx(expected, rel=2e-3)


def test_damping_copes_with_rank_deficiency_and_doubles_when_it_must():
    x = torch.randn(3, 8).double()
    Cd, L, used = damped(x.T @ x)
    assert used == 0.01
    torch.testing.assert_close(L @ L.T, Cd)
    C = torch.diag(torch.tensor([1.0] * 7 + [-0.0])).double()
    C[0, 1] = C[1, 0] = 1.1  # an eigenvalue of -0.1: not a covariance, within reach of damping
    assert damped(C)[2] > 0.01
    C[0, 1] = C[1, 0] = 1e9
    with pytest.raises(ValueError, match="can't be inverted"):
        damped(C)


# ---------------------------------------------------------------- whole models


def test_block_by_block_gives_the_same_model():
    "Adapted blocks start exactly, so the next ones see the same inputs."
    starts = []
    for groups in (None,), (["layers.0.self_attn.q_proj"], ["layers.1.mlp.down_proj"]):
        model = llama()
        for targets in groups:
            get_corda_model(model, CorDAConfig(r=4, target_modules=targets),
                            calibration_batches=token_batches())
        starts.append({n: a.B0 @ a.A0 for n, a in adapters(model).items()})
    assert len(starts[1]) == 2
    for name, part in starts[1].items():
        torch.testing.assert_close(starts[0][name], part, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [None, 1, 64])
def test_the_start_is_exact(dtype, mode, alpha):
    model, ids = llama().to(dtype), token_batches(1)[0]["input_ids"]
    contexts = collect_covariance(model, token_batches())
    with torch.no_grad():
        before = model(ids).logits
        get_corda_model(model, CorDAConfig(r=4, alpha=alpha, mode=mode), contexts)
        assert torch.equal(model(ids).logits, before)
        shake(model)
        assert not torch.equal(model(ids).logits, before)
        with enabled(model, False):
            assert torch.equal(model(ids).logits, before)  # the original, not the residual
        assert torch.equal(detach(model)(ids).logits, before)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_forward_is_the_papers_residual_form(kind):
    torch.manual_seed(0)
    layer = nn.Linear(8, 12) if kind == "linear" else Conv1D(12, 8)
    model, x = nn.Sequential(layer), inputs(30, 8).view(3, 10, 8)
    C = covariance(8)
    attach(model, partial(corda_adapter, covariance=C, rank=3, alpha=6, mode="kpm"), ["0"])
    shake(model)
    a = adapters(model)["0"]
    assert a.A.shape == (3, 8) and a.B.shape == (12, 3)
    assert count_parameters(model)[0] == 3 * (8 + 12)
    paper = x @ a.residual().T + a.scaling * x @ a.A.T @ a.B.T + layer.bias
    torch.testing.assert_close(model(x), paper, rtol=1e-5, atol=1e-5)
    out = model(x)
    merge(model)
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_leaves_no_residual(shape):
    layer = nn.Linear(shape[1], shape[0])
    a = corda_adapter(layer, covariance(shape[1]), rank=min(shape))
    assert a.residual().norm() <= 1e-5 * layer.weight.norm()


def test_gradients_reach_only_the_factors():
    model = llama()
    get_corda_model(model, CorDAConfig(r=4, mode="kpm"), calibration_batches=token_batches())
    ids = token_batches(1)[0]["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    reached = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"A", "B"}
    assert all(p.grad.abs().sum() > 0 for p in trainable_parameters(model))


def test_life_cycle(tmp_path):
    model, ids = llama(), token_batches(1)[0]["input_ids"]
    base = copy.deepcopy(model)
    config = CorDAConfig(r=4, alpha=8, mode="kpm")
    get_corda_model(model, config, calibration_batches=token_batches())
    assert all((B @ A).abs().max() == 0 for A, B in corda_to_lora(model).values())
    shake(model)
    with torch.no_grad():
        tuned = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, tuned)
        save(model, tmp_path / "corda.safetensors")
        again = load(copy.deepcopy(base), tmp_path / "corda.safetensors")
        assert torch.equal(again(ids).logits, tuned)
        assert {type(a) for a in adapters(again).values()} == {CordaAdapter}
        plain = copy.deepcopy(base)
        for name, (A2, B2) in corda_to_lora(model).items():
            assert A2.shape[0] == B2.shape[1] == 8
            plain.get_submodule(name).weight += B2 @ A2
        torch.testing.assert_close(plain(ids).logits, tuned, rtol=1e-4, atol=1e-5)
        merged = merge_and_unload(model)
        assert not adapters(merged)
        torch.testing.assert_close(merged(ids).logits, tuned, rtol=1e-4, atol=1e-5)


def test_gpt2_with_conv1d_layers():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval()
    batches = [{"input_ids": torch.randint(50, (4, 30))} for _ in range(2)]
    before = model(**batches[0]).logits
    get_corda_model(model, CorDAConfig(r=2), calibration_batches=batches)
    assert len(adapters(model)) == 4 and torch.equal(model(**batches[0]).logits, before)


# ---------------------------------------------------------------- gradients by hand


def residual_form(a, x):
    "The paper's W'x + s B A x, left to autograd."
    return x @ a.residual().T + a.scaling * x @ a.A.T @ a.B.T


def adapted_layer(dtype=torch.float32, mode="kpm"):
    "A layer whose adapter has moved, its adapter, and an input that wants a gradient."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False).to(dtype))
    attach(model, partial(corda_adapter, covariance=covariance(8), rank=3, alpha=6, mode=mode), "0")
    shake(model, 0.1)
    return model, adapters(model)["0"], inputs(30, 8).view(3, 10, 8).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 1e-4),
                                         (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_residual_form(dtype, rtol, mode):
    model, a, x = adapted_layer(dtype, mode)
    g = torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((model(x) * g.to(dtype)).sum(), [a.A, a.B, x])
    wide = x.detach().to(a.A.dtype).requires_grad_()
    expected = torch.autograd.grad((residual_form(a, wide) * g).sum(), [a.A, a.B, wide])
    for mine, other, like in zip(found, expected, (a.A, a.B, x), strict=True):
        assert mine.dtype == like.dtype and mine.shape == like.shape
        assert (mine.to(other.dtype) - other).norm() <= rtol * other.norm()


@pytest.mark.parametrize("x_wants", [True, False])
def test_first_and_second_derivatives(x_wants):
    model, a, x = adapted_layer(torch.float64)
    parts = [x[0, :4].detach().requires_grad_(x_wants), a.A, a.B]

    def run(x, A, B):
        return torch.func.functional_call(model, {"0.adaptlab.A": A, "0.adaptlab.B": B}, (x,))

    assert torch.autograd.gradcheck(run, parts) and torch.autograd.gradgradcheck(run, parts)


def test_forward_mode_is_refused_in_words():
    model, _, x = adapted_layer()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(model, (x.detach(),), (x.detach(),))


def test_per_sample_gradients_by_torch_func():
    model, a, x = adapted_layer(torch.float64)
    start = {"0.adaptlab.A": a.A.detach(), "0.adaptlab.B": a.B.detach()}

    def loss(weights, one):
        return torch.func.functional_call(model, weights, (one,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(start, x.detach())
    for i in range(len(x)):
        alone = torch.autograd.grad(residual_form(a, x[i]).square().sum(), [a.A, a.B])
        torch.testing.assert_close([each[k][i] for k in start], list(alone))


def adapted_llama():
    model = llama()
    get_corda_model(model, CorDAConfig(r=4, mode="kpm"), calibration_batches=token_batches())
    shake(model)
    ids = token_batches(1)[0]["input_ids"]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = [p.grad.clone() for p in trainable_parameters(model)]
    model.zero_grad()
    return model, ids, loss.detach(), found


def test_compile_without_a_graph_break():
    model, a, x = adapted_layer()
    slow = torch.autograd.grad(model(x).square().sum(), [a.A, a.B])
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(fast, [a.A, a.B]), slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, ids, loss, gradients = adapted_llama()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = model(input_ids=ids, labels=ids).loss
    again.backward()
    torch.testing.assert_close(again.detach(), loss)
    torch.testing.assert_close([p.grad for p in trainable_parameters(model)], gradients)


def test_autocast_computes_in_its_own_precision():
    model, a, x = adapted_layer()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and a.A.grad.dtype == x.grad.dtype == torch.float32
    expected = torch.autograd.grad(residual_form(a, x).square().sum(), [a.A, a.B])
    for mine, other in zip((a.A.grad, a.B.grad), expected, strict=True):
        assert (mine - other).norm() <= 5e-2 * other.norm()


# ---------------------------------------------------------------- agreement with PEFT


def peft_side(mode, batches, targets, r=4, alpha=8):
    "PEFT's covariances, eigenvalues and LoRA after its own preprocessing."
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model = llama()
    settings = CordaConfig(corda_method=mode, prune_temporary_fields=False)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets,
                             init_lora_weights="corda", corda_config=settings)

    def run():
        for batch in batches:  # one sequence per forward pass
            model(**batch)

    preprocess_corda(model, config, run_model=run)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "covariance_matrix")}
    covs = {n: m.covariance_matrix.clone() for n, m in layers.items()}
    values = {n: m.eigens.S_WC.clone() for n, m in layers.items()}
    return covs, values, peft.get_peft_model(model, config), config


@pytest.mark.parametrize("mode", MODES)
def test_agreement_with_peft(mode, tmp_path):
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    batches = [{"input_ids": b["input_ids"][i:i + 1]}
               for b in token_batches(20, 40) for i in range(2)]
    covs, values, theirs, _ = peft_side(mode, batches, targets)
    ours = llama()
    mine = collect_covariance(ours, batches, targets, normalize="sample_max")
    for name in covs:
        torch.testing.assert_close(mine[name].matrix.float(), covs[name], rtol=1e-4, atol=1e-5)
        W = ours.get_submodule(name).weight
        S = context_svd(W, covs[name])[1]
        chosen = S[:4] if mode == "ipm" else S[-4:]
        rounding = 1e-6 * float(S[0])  # PEFT's SVD is float32: errors relative to the largest
        torch.testing.assert_close(chosen.float(), values[name], rtol=1e-4, atol=rounding)
    get_corda_model(ours, CorDAConfig(r=4, alpha=8, mode=mode, target_modules=targets), covs)
    peft_layers = theirs.base_model.model
    for name, a in adapters(ours).items():
        layer = peft_layers.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(a.B @ a.A, B @ A, rtol=0, atol=1e-4)
        torch.testing.assert_close(a.residual(), layer.base_layer.weight, rtol=0, atol=1e-4)


def test_peft_loads_the_export(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = llama(), token_batches(1)[0]["input_ids"]
    base = copy.deepcopy(model)
    get_corda_model(model, CorDAConfig(r=4, mode="kpm"), calibration_batches=token_batches())
    shake(model)
    to_peft(model, tmp_path / "lora", "somewhere/base")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 8


# ---------------------------------------------------------------- bad input

W8, C8 = matrix(12, 8).float(), covariance(8).matrix
NAN = C8.clone()
NAN[2, 2] = torch.nan


@pytest.mark.parametrize("call, error, says", [
    (lambda: CorDAConfig(r=0), ValueError, "at least 1"),
    (lambda: CorDAConfig(r=2.5), ValueError, "integer"),
    (lambda: CorDAConfig(mode="kpa"), ValueError, "'ipm'.*'kpm'"),
    (lambda: CorDAConfig(alpha=0), ValueError, "positive"),
    (lambda: CorDAConfig(alpha=float("nan")), ValueError, "positive"),
    (lambda: CorDAConfig(damp=-1), ValueError, "positive"),
    (lambda: CorDAConfig(damp=float("inf")), ValueError, "finite"),
    (lambda: damped(C8, float("inf")), ValueError, "finite"),  # doubling would never end
    (lambda: starting_factors(0 * W8, C8, 2), ValueError, "weight is zero"),
    (lambda: starting_factors(W8, C8[0], 2), TypeError, "covariance"),
    (lambda: truncate(W8, C8, 2.5), ValueError, "between 0 and"),
    (lambda: starting_factors(W8, C8, 9), ValueError, r"rank=9 exceeds min\(out, in\)=8"),
    (lambda: starting_factors(W8, C8, 2, scaling=0), ValueError, "scaling"),
    (lambda: starting_factors(W8, C8[:5, :5], 2), ValueError, "8 inputs"),
    (lambda: starting_factors(W8, C8[:5], 2), ValueError, "not square"),
    (lambda: starting_factors(W8, C8.triu(), 2), ValueError, "not symmetric"),
    (lambda: starting_factors(W8, NAN, 2), ValueError, "NaN"),
    (lambda: starting_factors(W8, 0 * C8, 2), ValueError, "zero"),
    (lambda: starting_factors(W8, -C8, 2), ValueError, "negative"),
    (lambda: starting_factors(W8, Covariance.zeros(8), 2), ValueError, "no tokens"),
    (lambda: context_svd(W8.to(torch.int8), C8), TypeError, "floating"),
    (lambda: context_svd(W8.to(torch.float8_e4m3fn), C8), TypeError, "floating"),
    (lambda: context_svd(W8[0], C8), ValueError, "matrix"),
    (lambda: context_svd(W8 * torch.nan, C8), ValueError, "NaN"),
    (lambda: truncate(W8, C8, 9), ValueError, "between 0 and"),
    (lambda: truncate(W8, C8, 2, "asvd"), ValueError, "collect_covariance"),
    (lambda: truncate(W8, None, 2), ValueError, "needs C"),
    (lambda: truncate(W8, C8, 2, "qr"), ValueError, "'whiten'"),
    (lambda: corda_adapter(nn.Embedding(8, 8), C8), TypeError, "nn.Linear"),
    (lambda: corda_adapter(nn.Conv2d(3, 3, 3)), TypeError, "nn.Linear"),
])
def test_bad_numbers_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def mixed():
    torch.manual_seed(0)
    return nn.ModuleDict({"emb": nn.Embedding(9, 6), "used": nn.Linear(6, 6),
                          "idle": nn.Linear(6, 6), "conv": nn.Conv2d(1, 1, 1)})


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = mixed()
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.parts["emb"].weight  # tied

    def forward(self, ids):
        return self.head(self.parts["used"](self.parts["emb"](ids)))


IDS = [torch.randint(9, (4, 12))]


@pytest.mark.parametrize("targets, batches, error, says", [
    (["used"], [], ValueError, "no calibration batches"),
    (["used", "idle"], IDS, ValueError, "idle.*never ran"),
    (["conv"], IDS, TypeError, "'parts.conv' is Conv2d"),
    (["emb"], IDS, TypeError, "Embedding"),
    (["head"], IDS, ValueError, "shares its weight"),
    (["nothing"], IDS, ValueError, "parts.used"),
    (["used"], IDS[0], TypeError, "wrap it in a list"),
    (["used"], {"ids": IDS[0]}, TypeError, "wrap it in a list"),
    (["used"], ["text"], TypeError, "give a tensor"),
])
def test_bad_models_and_batches_are_refused(targets, batches, error, says):
    model, config = Mixed(), CorDAConfig(r=2, target_modules=targets)
    with pytest.raises(error, match=says):
        get_corda_model(model, config, calibration_batches=batches)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_wrong_use_of_get_corda_model():
    model, contexts = llama(), collect_covariance(llama(), token_batches())
    config = CorDAConfig(r=4)
    with pytest.raises(ValueError, match="either"):
        get_corda_model(model, config)
    with pytest.raises(ValueError, match="either"):
        get_corda_model(model, config, contexts, token_batches())
    with pytest.raises(ValueError, match="no covariance for"):
        get_corda_model(model, config, dict(list(contexts.items())[:3]))
    with pytest.raises(ValueError, match="k_proj.*rank=17 exceeds"):
        get_corda_model(model, CorDAConfig(r=17), contexts)
    wrong = contexts | {"model.layers.1.mlp.down_proj": torch.eye(5)}
    with pytest.raises(ValueError, match="down_proj.*5 channels"):
        get_corda_model(model, config, wrong)
    assert not adapters(model)
    get_corda_model(model, config, contexts)
    with pytest.raises(ValueError, match="has an adapter already"):
        get_corda_model(model, config, contexts)
    quantised = llama()
    weight = quantised.model.layers[0].mlp.up_proj.weight
    quantised.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), False)
    with pytest.raises(TypeError, match="up_proj.*quantised"):
        get_corda_model(quantised, config, contexts)
    with pytest.raises(ValueError, match="no starting factors"):
        attach(llama(), partial(CordaAdapter, rank=2), ["q_proj"])
    with pytest.raises(ValueError, match="CordaAdapter"):
        corda_to_lora(llama())


# ---------------------------------------------------------------- by eigenvectors


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(256, 256), (384, 192), (160, 320)])
def test_eigenvectors_give_the_numbers_of_the_svd(shape, mode):
    "Rank 128 from the eigenvectors of a Gram matrix: within 1e-7 of a float64 SVD."
    g = torch.Generator().manual_seed(0)
    W = torch.randn(*shape, generator=g).double() / 16
    X = torch.randn(4000, shape[1], generator=g) * torch.logspace(0, -2, shape[1])
    C = Covariance.zeros(shape[1]).add(X)
    Cd = damped(C)[0]
    U, S, Vt = torch.linalg.svd(W @ Cd, full_matrices=False)
    part = slice(0, 128) if mode == "ipm" else slice(len(S) - 128, None)
    exact = (U[:, part] * S[part]) @ torch.linalg.solve(Cd, Vt[part].T).T
    A0, B0 = starting_factors(W, C, 128, mode)
    assert (B0 @ A0 - exact).norm() <= 1e-7 * exact.norm()
    torch.testing.assert_close(context_svd(W, C)[1], S, rtol=1e-6, atol=1e-9)


def test_tall_weights_whose_columns_hardly_differ():
    "Cholesky can't take them; the numbers are those of the SVD."
    W = matrix(40, 12)
    W[:, 5] = W[:, 4] * (1 + 1e-9)
    for weight in (W, 1e-6 * W, torch.cat([W, torch.zeros(3, 12).double()])):
        U, S, Vhat = context_svd(weight, covariance(12))
        exact = torch.linalg.svdvals(weight @ damped(covariance(12))[0])
        torch.testing.assert_close(S, exact, rtol=1e-6, atol=1e-9 * float(exact[0]))
        assert (U @ S.diag() @ Vhat - weight).norm() <= 1e-6 * weight.norm()
        torch.testing.assert_close(U.T @ U, torch.eye(12).double())


def test_tiny_values_are_taken_from_the_svd(monkeypatch):
    "Below a millionth of the largest the Gram matrix knows nothing; the SVD does."
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(40, 40).double())[0]
    W = Q @ torch.diag(torch.logspace(0, -9, 40).double()) @ Q.T
    asked, real = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: asked.append(1) or real(*a, **k))
    S = context_svd(W, None, method="svd")[1]
    torch.testing.assert_close(S, torch.logspace(0, -9, 40).double(), rtol=1e-5, atol=0)
    assert asked
    starting_factors(W, None, 4, "ipm")
    assert len(asked) == 1  # the largest need none


# ---------------------------------------------------------------- the experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny random Llama as a folder, and texts and pairs as files."
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    recipes.tiny_llama(hidden_size=32, layers=2, max_length=1024).save_pretrained(root / "model")
    recipes.byte_tokenizer().save_pretrained(root / "model")
    for name, rows in {
        "pairs": [{"query": f"What is {i} plus 1?", "response": f"The answer is: {i + 1}"}
                  for i in range(30)],
        "text": [{"text": f"Sentence {i} is about rivers and mountains."} for i in range(60)],
    }.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def tiny(folder, **changes):
    "FULL with a model and sizes for a CPU; nothing else changes."
    small = {
        "model": str(folder / "model"), "device": "cpu", "dtype": "float32",
        "calibration_samples": 8, "calibration_length": 48, "window": 32,
        "windows": 3, "drop": (0.25, 0.5), "rank": 4, "n_test": 4, "max_length": 900,
        "n_questions": 1,
        "language": {"batch_size": 8, "accumulate": 2, "lr": 1e-3, "precision": "no"},
    }
    return FULL.replace(**small | changes)


def test_full_scale_path_with_the_hubs_schemas(recorded, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(told, "QUESTIONS", {
        name: (source, 4, read) for name, (source, _, read) in told.QUESTIONS.items()})
    report = runs.launch("corda", tiny(folder, drop=(0.5,)), "full", root=tmp_path, progress=False)
    assert {s for s in recorded.asked if "MetaMath" in s} == {
        "meta-math/MetaMathQA#train[:100000]"}
    assert {f"{FULL.cut_text}#train", f"{FULL.cut_text}#test", "openai/gsm8k@main#test",
            "google-research-datasets/nq_open#train",
            "google-research-datasets/nq_open#validation"} <= set(recorded.asked)
    assert schemas.rows("meta-math/MetaMathQA#train") >= 100_000
    assert set(report.tables["truncation"]["method"]) == {"none", "svd", "asvd", "whiten", "corda"}
    table = report.tables["language"]
    assert set(table["method"]) == {"none", *FULL.methods}
    assert set(table["part"]) == {"task", *FULL.questions}
    assert len(report.claims) == 2 + 3 * 3  # truncation; three pairs of methods on three measures


def test_truncation_leaves_the_model_whole_and_is_that_of_the_lesson(folder, monkeypatch):
    from adaptlab import models

    cfg, seen = tiny(folder), []
    model = models.load(cfg.model, device="cpu", dtype="float32").model
    name, before = "model.layers.1.mlp.up_proj", copy.deepcopy(model.state_dict())
    context = collect_covariance(model, token_batches())
    monkeypatch.setattr(told.evaluate, "token_losses", lambda m, *a, **k: seen.append(
        m.get_submodule(name).weight.clone()) or [torch.zeros(3)])
    for method in ("none", "corda", "asvd", "svd"):
        seen.clear()
        found = told._cut(cfg, method, model, None, lambda: context)
        levels = {0.0} if method == "none" else {0.25, 0.5}
        assert set(found["dropped"]) == levels
        W = before[f"{name}.weight"]
        for share, cut in zip(sorted(levels), seen, strict=True):
            keep = min(W.shape) - round(share * min(W.shape))
            expected = W if method == "none" else truncate(W, context[name], keep, method)
            torch.testing.assert_close(cut, expected, rtol=1e-3, atol=1e-5)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_full_scale_in_two_processes_is_the_same(folder, tmp_path):
    files = {"task": str(folder / "pairs.jsonl")}
    cfg = tiny(folder, tracks=("language",), methods=("corda-ipm",), questions=(), **files)
    alone = runs.launch("corda", cfg, "full", root=tmp_path / "one", progress=False)
    options = []
    for name in ("model", "device", "dtype", "calibration_samples", "calibration_length",
                 "window", "windows", "rank", "n_test", "max_length", "task"):
        options += [f"--{name.replace('_', '-')}", str(getattr(cfg, name))]
    options += ["--tracks", "language", "--methods", "corda-ipm", "--questions",
                "--language.batch-size", "8", "--language.accumulate", "2", "--language.lr",
                "1e-3", "--language.precision", "no", "--root", str(tmp_path / "two")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", "-m", "adaptlab", "run", "corda", "--scale", "full", *options]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    from adaptlab.bench.report import load_report

    pair = load_report(runs.runs("corda", tmp_path / "two")[-1].folder / "report")
    for a, b in zip(alone.tables["language"]["nats"], pair.tables["language"]["nats"],
                    strict=True):
        assert b == pytest.approx(a, rel=1e-3)


FEW = {"tracks": ("vision",), "seeds": (0,), "lrs": (4e-3,), "images": (64, 30), "test_images": 20,
       "context_images": 100, "every": 2, "vision": {"steps": 4}}


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    "One seed gives no verdicts on seeds and no crash; what is done is not done again."
    cfg, tuned, real = SMALL.replace(**FEW), [], told._tune
    monkeypatch.setattr(told, "_protection", lambda cfg: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs.launch("corda", cfg, root=tmp_path, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(told, "_tune", lambda *a, **k: tuned.append(a) or real(*a, **k))
    report = runs.launch("corda", cfg, root=tmp_path, resume=True, progress=False)
    assert not tuned
    table = report.tables["vision"]
    assert set(table["method"]) == {*told.LABELS, "none"} - {"svd", "asvd", "whiten", "corda"}
    assert {c.verdict for c in report.claims} == {"not decided at this scale"}
    assert len(report.claims) == 11 and "main" in report.figures


def test_balanced_factors_are_the_same_part():
    found = []
    for balanced in (False, True):
        model = nn.Sequential(nn.Linear(8, 12))
        torch.manual_seed(0)
        nn.init.normal_(model[0].weight)
        told._start(model, None, 0, mode="kpm", rank=3, targets=["0"], balanced=balanced,
                    context=lambda bed, mode: [inputs(300, 8)])
        a = adapters(model)["0"]
        assert torch.equal(a.A, a.A0) and torch.equal(a.B, a.B0)
        assert (abs(a.A0.norm() / a.B0.norm() - 1) < 1e-5) == balanced
        found.append(a.B0 @ a.A0)
    torch.testing.assert_close(*found)


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match="questions.*nq_open"):
        SMALL.replace(questions=("mmlu",))
    with pytest.raises(ValueError, match="drop"):
        SMALL.replace(drop=(1.0,))


def test_module_is_the_one_of_the_catalogue():
    from adaptlab import catalog

    assert catalog.find("corda").module == lesson.__name__
