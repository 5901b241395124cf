"""The limits of LoRA on a GPU: gradients, attention, heads of a model, SMALL, FULL."""

from functools import partial

import pytest
import torch

from adaptlab import adapters, modules, recipes
from adaptlab.bench import cost
from adaptlab.bench.runs import launch
from adaptlab.experiments.lora_limits import FULL, SMALL, random_problem, relative_error
from adaptlab.lowrank.lora_limits import (
    LowRankSoftmaxAttention, hadamard_factors, logit_radius, lora_gradient_exact,
    lora_gradient_fast, lowrank_softmax, norm_bound, phase_report, tight_radius)
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, full, in_turn, llama, machine, row, token_ids


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-3),
                                              (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(dtype, tolerance, causal):
    given = random_problem(512, 3, 0.5, dtype=dtype, device=DEVICE)
    exact = lora_gradient_exact(**given, causal=causal)
    assert relative_error(lora_gradient_fast(**given, degree=6, causal=causal), exact) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_factors_and_norms(dtype, tolerance):
    Q, K = (torch.rand(2, 64, 4, device=DEVICE) - 0.5).to(dtype)  # no logit is above 1
    U, V = lowrank_softmax(Q, K, 8)
    weights = (Q.double() @ K.double().T).softmax(-1)
    assert ((U @ V.T) / weights - 1).abs().max() < tolerance
    left, right = hadamard_factors(U, V, U, V)
    assert ((left @ right.T) / weights.square() - 1).abs().max() < 2 * tolerance
    assert tight_radius(Q, K) <= logit_radius(Q, K) * (1 + tolerance)
    W, A, B = (torch.randn(*s, device=DEVICE).to(dtype) for s in ((4, 3), (2, 3), (4, 2)))
    found = [norm_bound(Q, W, A, B, 1.0, kind) for kind in ("combined", "split", "operator")]
    assert found[0] <= min(found[1:]) * (1 + tolerance)


def test_gradient_of_full():
    "FULL's longest text, and its longest for both gradients."
    length, common = (2**10, 2**8) if DRY else (max(FULL.fast_lengths), max(FULL.exact_lengths))
    given = random_problem(length, FULL.width, 0.5, dtype=torch.float32, device=DEVICE)
    row(f"LoRA gradient, L = {length:,}", *clock(
        lambda: lora_gradient_fast(**given, degree=FULL.cost_degree)))
    given = random_problem(common, FULL.width, 0.5, dtype=torch.float32, device=DEVICE)
    row(f"LoRA gradient, causal, L = {common:,}", *clock(lambda: lora_gradient_fast(
        **given, degree=FULL.cost_degree, causal=True), rounds=3, warm=1))
    ours, exact = in_turn(lambda: lora_gradient_fast(**given, degree=FULL.cost_degree),
                          lambda: lora_gradient_exact(**given), rounds=5, warm=2)
    row(f"LoRA gradient, L = {common:,}", ours, reference=exact, against="L x L matrices",
        bound=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_layer(dtype):
    made = (0.3 * torch.randn(3, 2, 4, 300, 8, device=DEVICE)).to(dtype)
    Q, K, V = (t.clone().requires_grad_() for t in made)
    out = LowRankSoftmaxAttention(4, causal=True)(Q, K, V)
    theirs = torch.nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True)
    assert out.dtype == dtype and (out - theirs).abs().max() < 0.05
    ours, wanted = (torch.autograd.grad(o.float().square().sum(), (Q, K, V)) for o in (out, theirs))
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == dtype and (a - b).abs().max() < 0.1 * b.abs().max()


def test_heads_of_full():
    "The norms of all heads of SmolLM2 on FULL's longest text."
    model, ids = llama("smollm2"), token_ids(1, FULL.lengths[-1])
    lengths = [n for n in FULL.lengths if n <= ids.shape[1]] or [4, 8, 16]
    seconds, gib = clock(lambda: phase_report(model, lengths, ids), rounds=1, warm=1)
    flops = cost.forward_flops(model, {"input_ids": ids}, 1)
    row(f"norms of all heads, {ids.shape[1]:,} tokens", seconds, gib,
        counted=(flops / machine().flops, None))
    rows = phase_report(model, lengths, ids)
    assert len(rows) == model.config.num_hidden_layers * model.config.num_attention_heads
    assert min(r["gamma_q"] for r in rows) > 0


def test_step_of_full():
    "LoRA on queries, keys and values of SmolLM2, in bfloat16 as it is loaded on a GPU."
    model = llama("smollm2").train()
    adapters.attach(model, partial(adapters.LoraAdapter, rank=FULL.rank, alpha=FULL.alphas[0]),
                    ["q_proj", "k_proj", "v_proj"])
    ids = token_ids(FULL.training.batch_size, FULL.train_length)
    batch = {"input_ids": ids, "labels": ids}
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=FULL.training.lr, fused=True)

    def step():
        adam.zero_grad()
        modules.cross_entropy(model, batch).backward()
        adam.step()

    full("LoRA on SmolLM2, 8 x 1,024 tokens", model, batch, step)


def test_small_experiment(tmp_path):
    recipes.tiny_llama(max_length=128).save_pretrained(tmp_path / "model")
    recipes.byte_tokenizer().save_pretrained(tmp_path / "model")
    cfg = SMALL.replace(model=str(tmp_path / "model"), device=DEVICE, seeds=(0,), draws=1,
                        sizes=(0.5, 4.0), degrees=(4, 8), exact_lengths=(1024, 2048),
                        fast_lengths=(1024, 2048), lengths=(16, 32, 64), train_length=32,
                        windows=2, training=Training(steps=2, batch_size=2))
    assert launch("lora_limits", cfg, root=tmp_path / "runs").claims
