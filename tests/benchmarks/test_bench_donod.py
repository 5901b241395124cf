"""DONOD's closed form against the plain forward pass, and against taking the step literally."""

import pytest
import torch
import torch.nn.functional as F
from clock import in_turn, row

from adaptlab import models, modules
from adaptlab.bench.testbeds import Pairs
from adaptlab.domain.donod import don_nod_from_hidden, don_nod_scores, don_nod_step
from adaptlab.text import causal_lm_collate


@pytest.fixture(scope="module")
def base():
    "SmolLM2-135M (49,152 tokens) in single precision, and a batch of eight pairs."
    model, tokenizer = models.load("smollm2", device="cpu", dtype="float32")
    pairs = [Pairs.load("cldr_territories")[i] for i in range(8)]
    return model.eval(), causal_lm_collate(tokenizer)(pairs)


def test_against_the_forward_pass(base):
    model, batch = base

    def forward():
        with torch.no_grad():
            modules.call(model, batch)

    batches = [batch] * 6  # the first batch is also asked whether the closed form applies
    ours, plain = in_turn(lambda: don_nod_scores(model, batches),
                          lambda: [forward() for _ in batches], rounds=2)
    row("DONOD, 48 samples of SmolLM2, against the forward pass", ours, plain, bound=2.0)


def test_the_probe_against_the_layer(base):
    "Of every token of a long answer: what comes on top of the logits, which the forward pass has."
    weight = base[0].lm_head.weight.detach()
    h, y = torch.randn(1, 122, weight.shape[1]), torch.randint(0, len(weight), (1, 122))
    norm = weight.norm().double()
    ours, logits = in_turn(lambda: don_nod_from_hidden(h, y, weight, 1e-3, norm=norm),
                           lambda: F.linear(h, weight), rounds=5)
    row("DONOD, probe of 122 tokens, V = 49,152, against its logits", ours, logits)


def test_against_literal_steps(base):
    model, batch = base
    params = [model.lm_head.weight]

    def literal():
        found = []
        for i in range(2):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            hidden = modules.layer_inputs(model, "lm_head", one)["lm_head"][0, :-1].detach()

            def loss(m, hidden=hidden, one=one):
                return F.cross_entropy(m.lm_head(hidden), one["labels"][0, 1:])

            found.append(don_nod_step(model, loss, params, 1e-3)[:2])
        return torch.tensor(found).double()

    two = {k: v[:2] for k, v in batch.items()}
    ours, theirs = don_nod_scores(model, [two]), literal()
    torch.testing.assert_close(ours.nod, theirs[:, 1], rtol=1e-3, atol=0)
    torch.testing.assert_close(ours.don, theirs[:, 0], rtol=1e-2, atol=1e-9)
    row("DONOD, closed form against literal steps",
        *in_turn(lambda: don_nod_scores(model, [two]), literal, rounds=2), bound=1.0)
