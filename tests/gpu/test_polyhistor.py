"""Polyhistor on a GPU: every mode, the branch, the small experiment, a step of FULL."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from adaptlab.bench.runs import launch
from adaptlab.experiments import polyhistor as told
from adaptlab.experiments.polyhistor import FULL, NYU_WORK, SMALL
from adaptlab.modular.polyhistor import (
    Branch,
    LayerwiseScalingKernel,
    MLPDecoder,
    PolyhistorConfig,
    PolyhistorModel,
    export_adapters,
    load_adapters,
)
from gpu.card import DEVICE, DRY, clock, full, in_turn, row

TASKS = tuple(NYU_WORK.tasks)


def swin(mode, small, **options):
    "A Swin-T of random weights, or one of a few blocks, with the adapters of a mode."
    from transformers import SwinBackbone, SwinConfig

    torch.manual_seed(0)
    few = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
           "drop_path_rate": 0.0}
    backbone = SwinBackbone(SwinConfig(out_indices=(1, 2, 3, 4), **(few if small else {})))
    config = PolyhistorConfig(tasks=TASKS, mode=mode, **options)
    return PolyhistorModel(backbone, config, {
        name: MLPDecoder(backbone.channels, t.out, FULL.hidden, t.measure == "angle")
        for name, t in NYU_WORK.tasks.items()}).to(DEVICE)


def rooms(n, size):
    rng = torch.Generator().manual_seed(0)
    found = {"image": torch.rand(n, 3, *size, generator=rng),
             "segmentation": torch.randint(-1, 13, (n, *size), generator=rng),
             "depth": torch.rand(n, 1, *size, generator=rng),
             "normal": F.normalize(torch.randn(n, 3, *size, generator=rng), dim=1)}
    return {name: t.to(DEVICE) for name, t in found.items()}


def stepper(model, batch, precision, clip=None, **options):
    "A step of training; it returns the loss, still on the card."
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, **options)

    def step():
        adam.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = NYU_WORK.loss(model, batch)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        adam.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("mode, precision", [
    ("lite", torch.float32), ("lite", torch.bfloat16), ("polyhistor", torch.bfloat16),
    ("hyperformer", torch.float32), ("templates", torch.bfloat16), ("shared", torch.float32)])
def test_trains_three_tasks_on_a_swin(mode, precision):
    model, batch = swin(mode, small=True, reduction=8, embed_dim=8, rank=2), rooms(2, (64, 96))
    step = stepper(model, batch, precision, lr=1e-3)
    losses = [step() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model.eval()
    plain = swin("adapter", small=True, reduction=8).eval()
    plain.decoders.load_state_dict(model.decoders.state_dict())
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.no_grad(), exact:  # short normals are made long: their rounding, too
        found = model(batch["image"])
        with model.cached():
            torch.testing.assert_close(model(batch["image"]), found, rtol=1e-3, atol=1e-3)
        for task in TASKS:
            load_adapters(plain, task, export_adapters(model, task))
        torch.testing.assert_close(plain(batch["image"]), found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branch_against_the_kronecker_product(dtype):
    "The last stage of a Swin-T: four tasks, sixteen pictures."
    torch.manual_seed(0)
    n, places = 12, 64 if DRY else 16 * 108
    kernels = [LayerwiseScalingKernel(8).to(DEVICE) for _ in range(2)]
    h = torch.randn(4, places, 768, device=DEVICE, dtype=dtype, requires_grad=True)
    D = (torch.randn(4, 1, 96, n, device=DEVICE) / 96**0.5).requires_grad_()
    U = (torch.randn(4, 1, n, 96, device=DEVICE) / n**0.5).requires_grad_()
    branch = Branch(D, U, tuple(kernels))

    def materialised(h):
        down, up = (m.to(h.dtype) for m in branch.dense())
        return torch.baddbmm(h, F.gelu(h @ down), up)

    a, b = branch(h).float(), materialised(h).float()
    assert (a - b).norm() <= (1e-4 if dtype == torch.float32 else 0.02) * b.norm()
    leaves = [h, D, U, *(kernel.S for kernel in kernels)]

    def step(f):
        torch.autograd.grad(f(h).float().square().mean(), leaves)

    ours, theirs = in_turn(partial(step, branch), partial(step, materialised))
    kind = str(dtype).removeprefix("torch.")
    row(f"Lite's branch, width 768, {kind}", ours, reference=theirs, against="Kronecker product")


@pytest.mark.parametrize("mode, name", [("lite", "Lite"), ("adapter", "plain adapters")])
def test_full_step(mode, name):
    "Eight rooms, three tasks, as FULL trains them."
    model = swin(mode, small=DRY, reduction=FULL.reduction if not DRY else 8,
                 embed_dim=FULL.embed_dim, rank=FULL.rank if not DRY else 2)
    t = FULL.training
    batch = rooms(t.batch_size, (288, 384) if not DRY else (64, 96))
    step = stepper(model.train(), batch, torch.bfloat16, t.clip, lr=t.lr,
                   weight_decay=t.weight_decay, fused=True)
    full(f"Swin-T, {name}, 8 rooms, 3 tasks", model, batch["image"], step,
         autocast=torch.bfloat16)
    alone = stepper(model, rooms(1, batch["image"].shape[-2:]), torch.bfloat16, t.clip, lr=t.lr)
    row(f"the same, {name}, 1 room", *clock(alone, rounds=5, warm=2))  # is the card kept busy?


def test_small_experiment(tmp_path, monkeypatch):
    "Every method of SMALL in two steps; an untrained backbone and noise in place of digits."
    rng = torch.Generator().manual_seed(0)
    digits = torch.rand(5000, 20, 20, generator=rng), torch.arange(5000) % 10
    monkeypatch.setattr(told, "small_hvt", lambda: told.SmallHVT().eval())
    monkeypatch.setattr(told, "crops", lambda: digits)
    cfg = SMALL.replace(seeds=(0,), device=DEVICE, sizes=(16, 8, 40), lrs=(1e-6,), training={
        "steps": 2, "lr": 1e-6})  # with more of both, "no digit" is said everywhere: mIoU 0
    assert launch("polyhistor", cfg, root=tmp_path).claims
