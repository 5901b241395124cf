"""What merging saves and what PYRA takes back: a forward pass, and a training step with LoRA."""

from functools import partial

import torch
from clock import in_turn, row
from transformers import ViTConfig, ViTForImageClassification

from adaptlab import adapters
from adaptlab.evaluate import peak_memory
from adaptlab.modular.pyra import apply_token_merging, merging_schedule


def vit(level=None, pyra=False):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536))
    if level:
        apply_token_merging(model, merging_schedule(12, 197, level), pyra=pyra)
    return model.eval()


def training(model):
    "One step of LoRA, the head, and modulators where there are some."
    pyra = any("pyra" in name for name, _ in model.named_parameters())
    adapters.attach(model, partial(adapters.LoraAdapter, rank=8, alpha=8), ["q_proj", "v_proj"],
                    also_train=("classifier", "pyra") if pyra else ("classifier",))
    adam = torch.optim.AdamW(adapters.trainable_parameters(model))
    x = torch.randn(2, 3, 224, 224)

    def step():
        adam.zero_grad()
        model(x).logits.square().mean().backward()
        adam.step()

    return step


def test_forward_pass():
    x = torch.randn(2, 3, 224, 224)
    made = [vit("high", True), vit("high"), vit()]
    with torch.inference_mode():
        ours, plain, whole = in_turn(*(partial(net, x) for net in made), rounds=7)
    row("ViT-S, PYRA high against plain merging, pass", ours, plain, bound=1.1)
    row("ViT-S, PYRA high against nothing merged, pass", ours, whole, bound=0.6)


def test_training_step():
    steps = [training(vit("high", True)), training(vit("high")), training(vit())]
    ours, plain, whole = in_turn(*steps, rounds=5)
    row("ViT-S with LoRA, PYRA high against plain merging, step", ours, plain, bound=1.1)
    row("ViT-S with LoRA, PYRA high against nothing merged, step", ours, whole, bound=0.6)
    memory = [peak_memory(step, "cpu") / 2**20 for step in steps]
    row("PYRA high against plain merging, memory of a step", memory[0], memory[1], bound=1.15,
        unit="MiB")  # the leaving tokens are kept once more, and normalised
    row("PYRA high against nothing merged, memory of a step", memory[0], memory[2], bound=0.7,
        unit="MiB")
