"""Fine-tuning transfer on a GPU: the same bits as on the CPU; models of a real shape."""

import pytest
import torch

from adaptlab import checkpoints
from adaptlab.arithmetic.finetuning_transfer import (
    apply_diff,
    diff_vector,
    linear_barrier,
    transfer_finetuning,
)
from adaptlab.bench.runs import launch
from adaptlab.experiments.finetuning_transfer import SMALL
from gpu.card import DEVICE, clock, llama, peak, row, token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_as_on_the_cpu(dtype):
    g = torch.Generator().manual_seed(0)
    here = [{"w": torch.randn(300, 200, generator=g).to(dtype)} for _ in range(3)]
    there = [{"w": s["w"].to(DEVICE)} for s in here]
    ours = apply_diff(there[2], diff_vector(*there[:2]), 0.7)["w"]
    wanted = apply_diff(here[2], diff_vector(*here[:2]), 0.7)["w"]
    assert ours.device.type == DEVICE and ours.dtype == dtype
    torch.testing.assert_close(ours.cpu(), wanted)
    with pytest.warns(UserWarning, match="as long as"):
        made = transfer_finetuning(*there)
        cpu = transfer_finetuning(*here)
    assert made.relative == pytest.approx(cpu.relative, rel=1e-4)


@pytest.mark.filterwarnings("ignore:the diff is .* as long as the old base")
def test_models_of_a_real_shape(tmp_path):
    base, tuned, new = (llama("smollm2", layers=4, seed=s) for s in range(3))
    seconds, gib = clock(lambda: transfer_finetuning(base, tuned, new), rounds=3, warm=1)
    row("transfer between models on the card", seconds, gib)
    row("transfer, memory above the models", gib=peak(
        lambda: transfer_finetuning(base, tuned, new, tmp_path / "out", overwrite=True)))
    made = transfer_finetuning(base, tuned, new).weights
    found = checkpoints.load_state(tmp_path / "out")
    assert all(torch.equal(found[n], made[n].cpu()) for n in found)
    ids = token_ids(2, 32)
    barrier = linear_barrier(new, tuned.state_dict(), made,
                             lambda m: m(input_ids=ids, labels=ids).loss, n=3)
    assert barrier.value >= 0 and torch.isfinite(torch.tensor(barrier.losses)).all()


def test_small_experiment(tmp_path):
    cfg = SMALL.replace(seeds=(0,), lrs=(5e-3,), device=DEVICE)
    assert launch("finetuning_transfer", cfg, root=tmp_path).claims
