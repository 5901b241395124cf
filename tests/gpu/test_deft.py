"""DEFT on a GPU: the slope in half precision, a step of a large model, the small experiment."""

import pytest
import torch

from adaptlab import adapters
from adaptlab.bench.runs import launch
from adaptlab.experiments.deft import SMALL
from adaptlab.sparse.deft import activation_density, deft_loss, density_loss
from gpu.card import DEVICE, clock, llama, row, token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_count_and_slope(dtype):
    a = torch.randn(2, 64, 128, device=DEVICE).relu().to(dtype)
    sharp = (a * (a > 0.1)).requires_grad_()
    found = density_loss([sharp])
    found.backward()
    assert abs(float(found.detach()) - float(activation_density([sharp]).mean())) < 1e-4
    small = torch.full((1, 1, 4), 2e-4, device=DEVICE, dtype=dtype, requires_grad=True)
    density_loss([small]).backward()
    assert (small.grad > 100).all() and small.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_of_a_language_model(dtype):
    model, ids = llama("smollm2", layers=2, dtype=dtype), token_ids(2, 64)
    adapters.attach(model, lambda m: adapters.LoraAdapter(m, rank=8), ["q_proj", "v_proj"])
    adam = torch.optim.AdamW(adapters.trainable_parameters(model), lr=1e-3)
    batch = {"input_ids": ids, "labels": ids}

    def step():
        adam.zero_grad()
        deft_loss(eps=1e-3)(model, batch).backward()
        adam.step()

    row(f"DEFT, step, {dtype}", *clock(step))
    assert all(p.grad.isfinite().all() for p in adapters.trainable_parameters(model))


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE)
    assert launch("deft", cfg, root=tmp_path).claims
