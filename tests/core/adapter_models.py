"""What the tests of adapters share: small methods, small models, and ways to shake and compare."""

from functools import partial

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adaptlab.adapters import Adapter, LoraAdapter, LowRank, trainable_parameters


class Scale(Adapter):
    "y = gamma * (W x + b)"

    def __init__(self, layer, start=1.0):
        super().__init__(layer)
        self.start = start
        self.gamma = nn.Parameter(torch.full((self.out_features,), start, **self.factory))

    def forward(self, x, base_output):
        return base_output * self.gamma.to(base_output.dtype)

    def delta_weight(self):
        return self.as_weight((self.gamma - 1)[:, None] * self.base_weight())

    def delta_bias(self):
        return None if self.base_bias() is None else (self.gamma - 1) * self.base_bias()


class Shift(Adapter):
    "y = W x + b + shift; can be merged also where there is no bias yet"

    def __init__(self, layer):
        super().__init__(layer)
        self.shift = nn.Parameter(torch.zeros(self.out_features, **self.factory))

    def forward(self, x, base_output):
        return base_output + self.shift.to(base_output.dtype)

    def delta_weight(self):
        return torch.zeros_like(self.layer.weight)

    def delta_bias(self):
        return self.shift


class Split(LowRank):
    "Residual plus the leading singular directions; the frozen weight changes."

    scaling = 1.0

    def __init__(self, layer, rank=2):
        super().__init__(layer)
        self.rank = rank
        U, S, Vh = torch.linalg.svd(self.base_weight().float(), full_matrices=False)
        root = S[:rank].sqrt()
        self.A, self.B = nn.Parameter(root[:, None] * Vh[:rank]), nn.Parameter(U[:, :rank] * root)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def prepare(self):
        self.replace_base(self.base_weight() - self.B0 @ self.A0)

    def lora_factors(self):
        return torch.cat([self.A, -self.A0]), torch.cat([self.B, self.B0], dim=1), 1.0


class Bottleneck(Adapter):
    "Serial, non-linear, on any module: can't be merged."

    supports = (nn.Module,)

    def __init__(self, layer, width=8, rank=2):
        super().__init__(layer)
        self.width, self.rank = width, rank
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)

    def forward(self, x, base_output):
        first = base_output[0] if isinstance(base_output, tuple) else base_output
        first = first + self.up(torch.relu(self.down(first)))
        return (first, *base_output[1:]) if isinstance(base_output, tuple) else first


METHODS = [partial(LoraAdapter, rank=2), Scale, Shift, Split]


def llama(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).eval()


IDS = torch.arange(14).reshape(2, 7)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def shake(model, seed=1, std=0.5):
    "Give adapters (and what else is trained) other values, as training would."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p += (torch.randn(p.shape, generator=generator) * std).to(p.dtype)


def snapshot(model):
    values = {k: v.clone() for k, v in model.state_dict().items()}
    return values, {n: p.requires_grad for n, p in model.named_parameters()}


def same(model, before):
    values, flags = snapshot(model)
    return (
        values.keys() == before[0].keys()
        and all(torch.equal(v, before[0][k]) for k, v in values.items())
        and flags == before[1]
    )
