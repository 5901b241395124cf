"""Models of papers' architectures, tiny and of random weights, as folders for a preset or alive."""

from pathlib import Path

import torch
from torch import nn

from adaptlab import recipes


def _with_bytes(model, folder: Path | str) -> str:
    model.save_pretrained(folder)
    recipes.byte_tokenizer().save_pretrained(folder)
    return str(folder)


def roberta(folder: Path | str, layers: int = 1, kind: str = "Roberta") -> str:
    "RoBERTa (or XLMRoberta) that reads bytes."
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=260, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=70, pad_token_id=0, bos_token_id=1,
        eos_token_id=2)
    return _with_bytes(getattr(transformers, f"{kind}ForMaskedLM")(config), folder)


def llama(folder: Path | str, **sizes) -> str:
    "Llama that reads bytes; sizes as `recipes.tiny_llama` takes them."
    torch.manual_seed(0)
    return _with_bytes(recipes.tiny_llama(**sizes), folder)


def vit(folder: Path | str, image: int = 32, patch: int = 16) -> str:
    "Vision transformer for pictures of `image` pixels a side, with its processor."
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=image, patch_size=patch)).save_pretrained(folder)
    ViTImageProcessor(size={"height": image, "width": image}).save_pretrained(folder)
    return str(folder)


def alive(model: nn.Module) -> nn.Module:  # the same, in eval mode
    "Moved from its start, so that gates and last layers which begin at zero count."
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def noisy_pictures(
    n: int = 3, size: int = 8, channels: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # pictures, levels of noise, classes
    "What a diffusion transformer is called with."
    g = torch.Generator().manual_seed(1)
    return (torch.randn(n, channels, size, size, generator=g), torch.arange(n) * 60,
            torch.arange(n) % 3)
