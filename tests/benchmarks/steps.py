"""A training step of four blocks of SmolLM2, or of any model: methods are compared by it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adaptlab import models


def four_blocks() -> tuple[nn.Module, torch.Tensor]:
    "The first four blocks of SmolLM2 in float32, and token ids [2, 128]."
    model, _ = models.load("smollm2", device="cpu", dtype="float32")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    return model, torch.randint(1000, (2, 128), generator=torch.Generator().manual_seed(0))


def _own_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def training_step(
    model: nn.Module,  # copied
    batch: Any,  # what `loss` takes
    wrap: Callable,  # prepares the copy; what requires a gradient then is trained, and stays put
    loss: Callable = _own_loss,  # (model, batch); of token ids a language model's own
) -> Callable[[], None]:
    "Forward, backward and AdamW at a rate of 0."
    net = copy.deepcopy(model)
    wrap(net)
    adam = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.0)

    def work() -> None:
        adam.zero_grad()
        loss(net, batch).backward()
        adam.step()

    return work
