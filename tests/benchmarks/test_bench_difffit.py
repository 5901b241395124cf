"""A training step of DiffFit against full fine-tuning and against LoRA at about the same count."""

import copy

import torch
from clock import in_turn, row
from steps import training_step

from adaptlab import adapters
from adaptlab.bench import rivals
from adaptlab.bench.diffusion import ddpm_loss
from adaptlab.evaluate import peak_memory
from adaptlab.experiments.difffit import make_dit
from adaptlab.sparse.difffit import DiffFit

LAYERS = ("attn.qkv", "attn.proj", "fc1", "fc2", "adaLN_modulation.1")


def test_train_step():
    torch.manual_seed(0)
    model = make_dit(16, dim=384, depth=3, heads=6)
    with torch.no_grad():  # gates of a trained model
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    batch = torch.rand(8, 1, 16, 16), torch.zeros(8, dtype=torch.int64)

    count = adapters.count_parameters(DiffFit.wrap(copy.deepcopy(model)))[0]
    rank = rivals.lora_rank(model, LAYERS, count)
    lora = rivals.lora(rank, LAYERS, also=("y_embedder",))
    ours, full, other = (training_step(model, batch, wrap, ddpm_loss) for wrap in (
        DiffFit.wrap, lambda net: net, lambda net: lora(net, None, 0)))
    seconds = in_turn(ours, full, other, rounds=7)
    row("DiffFit against full fine-tuning, step", *seconds[:2], bound=1.0)
    row(f"DiffFit against LoRA r = {rank}, step", seconds[0], seconds[2], bound=1.0)
    held = [peak_memory(work, "cpu") / 2**20 for work in (ours, full, other)]
    row("DiffFit against full fine-tuning, memory", *held[:2], bound=1.0, unit="MiB")
    row(f"DiffFit against LoRA r = {rank}, memory", held[0], held[2], bound=1.0, unit="MiB")
