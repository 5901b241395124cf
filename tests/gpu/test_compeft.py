"""ComPEFT on a GPU: selection of many entries, the same as on the CPU; the small experiment."""

import pytest
import torch

from adaptlab.arithmetic.compeft import ComPEFTCompressor, golomb_decode, golomb_encode, ternarize
from adaptlab.bench.runs import launch
from adaptlab.experiments.compeft import SMALL
from gpu.card import DEVICE, DRY, clock, in_turn, llama, row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_entries_as_on_the_cpu(dtype):
    tau = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = ternarize(tau, 0.2, 2.0), ternarize(tau.to(DEVICE), 0.2, 2.0)
    assert torch.equal(here.indices, there.indices.cpu())
    assert torch.equal(here.negative, there.negative.cpu())
    assert abs(here.scale - there.scale) <= 1e-3 * here.scale
    again = golomb_decode(golomb_encode(there))
    assert torch.equal(again.indices, here.indices) and again.scale == there.scale
    dense = there.to_dense()
    assert dense.device.type == DEVICE and int((dense != 0).sum()) == len(here.indices)


def test_many_entries():
    tau = torch.randn(10**5 if DRY else 10**8, device=DEVICE)
    seconds, gib = clock(lambda: ternarize(tau, 0.2), rounds=3, warm=1)
    ours, sort = in_turn(lambda: ternarize(tau, 0.2), lambda: tau.abs().sort(), rounds=3, warm=1)
    row("ternarize 1e8 entries", seconds, gib)
    row("ternarize 1e8 entries against a sort", ours, reference=sort)


def test_a_full_fine_tune_in_bfloat16():
    base, tuned = (llama("smollm2", layers=2, seed=s) for s in (0, 1))
    start = {n: p.detach().clone() for n, p in base.named_parameters()}
    packer = ComPEFTCompressor(0.1, 2.0, reference=start)
    (v,) = packer.compress({n: p.detach() for n, p in tuned.named_parameters()})
    assert v.size == sum(p.numel() for p in start.values())
    packer.apply_(tuned)
    for name, p in tuned.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.isfinite(p).all(), name


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), device=DEVICE)
    assert launch("compeft", cfg, root=tmp_path).claims
