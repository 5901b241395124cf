"""PYRA on a GPU: matching as on the CPU, throughput, FULL's step, training, the experiment."""

from functools import partial

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from adaptlab import adapters, modules
from adaptlab.bench.runs import launch
from adaptlab.experiments.pyra import FULL, QKV, SMALL
from adaptlab.modular.pyra import (
    PYRAModulator,
    apply_token_merging,
    bipartite_soft_matching,
    merge_wavg,
    merging_schedule,
    pyra_param_groups,
    remove_token_merging,
    token_sources,
)
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, full, in_turn, row


def vit(dtype=torch.float32):
    "ViT-B/16 with random weights; a toy where only the code is tried."
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": 112} if DRY else {}
    return ViTForImageClassification(ViTConfig(num_labels=100, **size)).to(DEVICE, dtype).eval()


def schedule(level):
    return merging_schedule(12, 50 if DRY else 197, level)


def images(n, dtype=torch.float32):
    side = 112 if DRY else 224
    return torch.randn(2 if DRY else n, 3, side, side, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matching_as_on_the_cpu(dtype):
    torch.manual_seed(0)
    metric, x = torch.randn(8, 197, 64, dtype=dtype), torch.randn(8, 197, 96, dtype=dtype)
    modulator = PYRAModulator(96, 40).to(dtype)
    torch.nn.init.normal_(modulator.W_D)
    here = bipartite_soft_matching(metric, 40)
    there = bipartite_soft_matching(metric.to(DEVICE), 40)
    same = (there.src.cpu() == here.src).float().mean()  # sums round differently: rare near-ties
    assert same > 0.9 and there.src.device.type == DEVICE
    ours = merge_wavg(here, x, None, modulator)[0]
    plan = here._replace(src=here.src.to(DEVICE), dst=here.dst.to(DEVICE), unm=here.unm.to(DEVICE))
    theirs = merge_wavg(plan, x.to(DEVICE), None, modulator.to(DEVICE))[0].cpu()
    near = 1e-4 if dtype == torch.float32 else 0.05
    assert (ours - theirs).float().norm() <= near * ours.float().norm()


def test_throughput_of_a_vit_base():
    x = images(FULL.batch, torch.bfloat16)
    made = {"whole": vit(torch.bfloat16)}
    for name, pyra in (("low PYRA", True), ("high", False), ("high PYRA", True)):
        net = made[name] = vit(torch.bfloat16)
        apply_token_merging(net, schedule(name.partition(" ")[0]), pyra=pyra)
    with torch.inference_mode():
        times = dict(zip(made, in_turn(*(partial(net, x) for net in made.values()), rounds=7,
                                       warm=2), strict=True))
    for level, bound in (("low", 0.85), ("high", 0.6)):
        row(f"ViT-B, {len(x)} images, {level} schedule", times[f"{level} PYRA"],
            reference=times["whole"], against="nothing merged", bound=bound)
    row(f"ViT-B, {len(x)} images, high schedule", times["high PYRA"], reference=times["high"],
        against="plain merging", bound=1.25)


def trained(dtype, n):
    "The high schedule with LoRA, as FULL trains it: model, images with labels, a step."
    model, x = vit(dtype), images(n, dtype)
    apply_token_merging(model, schedule("high"))
    adapters.attach(model, partial(adapters.LoraAdapter, rank=FULL.photo_rank,
                                   alpha=FULL.photo_rank), QKV, also_train=("classifier", "pyra"))
    adam = torch.optim.AdamW(pyra_param_groups(model, 1e-3, 1e-3))
    batch = x, torch.arange(len(x), device=DEVICE)

    def step():
        adam.zero_grad()
        modules.cross_entropy(model, batch).backward()
        adam.step()

    return model.train(), batch, step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains(dtype):
    model, batch, step = trained(dtype, 4)
    before = {k: p.detach().clone() for k, p in model.named_parameters()
              if "W_D" in k and ".11." not in k}  # the last block's can't reach the class token
    step()
    step()
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[k], p) and after[k].isfinite().all()
               for k, p in before.items())
    sources = token_sources(model, batch)
    assert (sources.sum(1) == 1).all()  # each patch is in one token
    assert not any("pyra" in n for n, _ in remove_token_merging(model).named_parameters())


def test_step_of_full():
    n = FULL.photo_training.batch_size
    assert FULL.photo_training.precision == "no"
    model, batch, step = trained(torch.float32, n)
    full(f"ViT-B, high schedule, LoRA, {n} images", model, batch, step)


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), few=1, device=DEVICE, images=(64, 32), rounds=2,
                        shape=(64, 2, 2), training=Training(steps=2, batch_size=16))
    assert launch("pyra", cfg, root=tmp_path).claims
