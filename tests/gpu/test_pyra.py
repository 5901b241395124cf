"""PYRA on a GPU: matching as on the CPU, throughput, FULL's step, training, the experiment."""

from functools import partial

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from adaptlab import adapters, modules
from adaptlab.bench.runs import launch
from adaptlab.experiments.pyra import FULL, QKV, SMALL
from adaptlab.modular.pyra import (
    MergingBlock,
    PYRAModulator,
    apply_token_merging,
    bipartite_soft_matching,
    merge_wavg,
    merging_schedule,
    pyra_param_groups,
    remove_token_merging,
)
from adaptlab.train import Training
from gpu.card import DEVICE, DRY, full, in_turn, row


def vit(dtype=torch.float32):
    "ViT-B/16 with random weights; a toy where only the code is tried."
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": 112} if DRY else {}
    with torch.device(DEVICE):
        return ViTForImageClassification(ViTConfig(num_labels=100, **size)).to(dtype).eval()


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


def in_turn_on(x, *names):
    "Seconds of a pass over some images: nothing merged, or a schedule, with PYRA or without."
    made = []
    for name in names:
        level, _, kind = name.partition(" ")
        made.append(vit(x.dtype))
        if level != "whole":
            apply_token_merging(made[-1], schedule(level), pyra=kind != "plain")
    with torch.inference_mode():
        return in_turn(*(partial(net, x) for net in made), rounds=5, warm=2)


def test_throughput_at_large_batch():
    "As the paper measures it: images per second at large batch."
    x = images(512, torch.bfloat16)
    whole, low, high, plain = in_turn_on(x, "whole", "low", "high", "high plain")
    row("ViT-B, 512 images, bf16, low", low, reference=whole, bound=0.85,
        against="the pass without merging")
    row("ViT-B, 512 images, bf16, high", high, reference=whole, bound=0.6,
        against="the pass without merging")
    row("ViT-B, 512 images, bf16, high", high, reference=plain, against="plain merging", bound=1.25)


def test_throughput_as_full_measures_it():
    whole, low = in_turn_on(images(FULL.batch), "whole", "low")
    row(f"FULL: {FULL.batch} images, float32, low", low, reference=whole, bound=0.85,
        against="the pass without merging")


def test_throughput_where_the_launches_count():
    whole, low = in_turn_on(images(FULL.batch, torch.bfloat16), "whole", "low")
    row(f"ViT-B, {FULL.batch} images, bf16, low", low, reference=whole,
        against="the pass without merging")


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
    size = next(b for b in model.modules() if isinstance(b, MergingBlock)).flow.size
    assert (size.sum(1) == (50 if DRY else 197)).all()  # each patch is in one token
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
