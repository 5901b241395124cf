"""The limits of LoRA on a GPU: both gradients, the attention layer, heads of a model, SMALL."""

import pytest
import torch

from adaptlab import recipes
from adaptlab.bench.runs import launch
from adaptlab.experiments.lora_limits import SMALL, random_problem, relative_error
from adaptlab.lowrank.lora_limits import (
    LowRankSoftmaxAttention,
    lora_gradient_exact,
    lora_gradient_fast,
    phase_report,
)
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, clock, in_turn, llama, row, token_ids


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-3),
                                              (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(dtype, tolerance, causal):
    given = random_problem(512, 3, 0.5, dtype=dtype, device=DEVICE)
    exact = lora_gradient_exact(**given, causal=causal)
    assert relative_error(lora_gradient_fast(**given, degree=6, causal=causal), exact) < tolerance


def test_long_text():
    length = 2**17 if not DRY else 2**10
    given = random_problem(length, 4, 0.5, dtype=torch.float32, device=DEVICE)
    row(f"LoRA gradient, L = {length}, d = 4", *clock(
        lambda: lora_gradient_fast(**given, degree=4)))
    given = random_problem(length // 8, 4, 0.5, dtype=torch.float32, device=DEVICE)
    ours, exact = in_turn(lambda: lora_gradient_fast(**given, degree=4),
                          lambda: lora_gradient_exact(**given))
    row(f"LoRA gradient, L = {length // 8}, against L x L", ours, reference=exact, bound=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_layer(dtype):
    Q, K, V = (0.3 * torch.randn(3, 2, 4, 300, 8, device=DEVICE)).to(dtype).requires_grad_()
    out = LowRankSoftmaxAttention(4, causal=True)(Q, K, V)
    theirs = torch.nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True)
    assert out.dtype == dtype and (out - theirs).abs().max() < 0.05
    out.float().square().sum().backward()


def test_heads_of_a_real_shape():
    model, ids = llama("smollm2", layers=2), token_ids(1, 1024)
    lengths = [ids.shape[1] // n for n in (4, 2, 1)]
    rows = phase_report(model, lengths, ids)
    assert len(rows) == 2 * model.config.num_attention_heads and rows[0]["gamma_q"] > 0


def test_small_experiment(tmp_path):
    recipes.tiny_llama(max_length=128).save_pretrained(tmp_path / "model")
    recipes.byte_tokenizer().save_pretrained(tmp_path / "model")
    cfg = SMALL.replace(model=str(tmp_path / "model"), device=DEVICE, seeds=(0,), draws=1,
                        lengths=(16, 32, 64), train_length=32, windows=2,
                        training=Training(steps=2, batch_size=2))
    assert launch("lora_limits", cfg, root=tmp_path / "runs").claims
