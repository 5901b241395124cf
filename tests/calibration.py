"""For the tests of second moments and of CorDA: inputs, a tiny Llama, calibration batches."""

import torch

from adaptlab import recipes


def inputs(n: int, width: int, seed: int = 1, decay: float = -1.5) -> torch.Tensor:
    "Independent inputs [n, width] whose sizes fall to 10^decay."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g) * torch.logspace(0, decay, width)


def llama(**sizes) -> torch.nn.Module:
    "Two blocks of width 32, unless `sizes` of `recipes.tiny_llama` say otherwise; fixed weights."
    torch.manual_seed(0)
    return recipes.tiny_llama(**({"hidden_size": 32, "layers": 2} | sizes))


def token_batches(n: int = 4, length: int = 24, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    "n batches of two texts of bytes."
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(4, 260, (2, length), generator=g)} for _ in range(n)]
