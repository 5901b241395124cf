"""LoRA's gradient through attention: the fast form against the closed form and autograd."""

import torch
from clock import in_turn, row

from adaptlab.evaluate import peak_memory
from adaptlab.experiments.lora_limits import random_problem
from adaptlab.lowrank.lora_limits import lora_gradient_exact, lora_gradient_fast


def test_fast_gradient_against_exact_ones():
    given = random_problem(4096, 2, 0.5, dtype=torch.float32)

    def by_autograd():
        A, B = ({n: t.clone().requires_grad_() for n, t in given[g].items()} for g in "AB")
        Q, K, H = (given[f"X{n.lower()}"] @ (given["W"][n] + B[n] @ A[n]) for n in "QKV")
        out = torch.nn.functional.scaled_dot_product_attention(Q, K, H, scale=given["beta"])
        (out - given["Y"]).square().sum().backward()

    def fast():
        lora_gradient_fast(**given, degree=4)

    ours, exact, fused = in_turn(fast, lambda: lora_gradient_exact(**given), by_autograd, rounds=3)
    row("LoRA gradient, L = 4096, d = 2, against L x L", ours, exact, bound=0.2)
    row("LoRA gradient, L = 4096, d = 2, against autograd", ours, fused, bound=1.0)
    row("LoRA gradient, L = 4096, d = 2, memory", peak_memory(fast, "cpu") / 2**20,
        peak_memory(lambda: lora_gradient_exact(**given), "cpu") / 2**20, bound=0.05, unit="MiB")
