"""A training step of four blocks of SmolLM2, for methods that are compared by their step."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from adaptlab import models


def four_blocks() -> tuple[nn.Module, torch.Tensor]:
    "The first four blocks of SmolLM2 in float32, and token ids [2, 128]."
    model, _ = models.load("smollm2", device="cpu", dtype="float32")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    return model, torch.randint(1000, (2, 128), generator=torch.Generator().manual_seed(0))


def training_step(model: nn.Module, ids: torch.Tensor, wrap: Callable) -> Callable[[], None]:
    "A step of a copy that `wrap` prepared; what requires a gradient is trained, and stays put."
    net = copy.deepcopy(model)
    wrap(net)
    adam = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.0)

    def work() -> None:
        adam.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        adam.step()

    return work
