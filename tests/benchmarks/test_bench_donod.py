"""DONOD's closed form against taking the probing step literally, on SmolLM2-135M, in one run."""

import time

import numpy as np
import torch
from torch import nn

from adaptlab import models
from adaptlab.domain.donod import SMALL, don_nod_scores, don_nod_step, text_task
from adaptlab.train import causal_lm_collate


def literal_scores(model, pairs, tokenizer, lr):
    "One forward and one backward pass per sample, and copies of the output layer."
    collate = causal_lm_collate(tokenizer)
    params = [model.get_output_embeddings().weight]
    rows = []
    for pair in pairs:
        batch = collate([pair])

        def loss_fn(m, batch=batch):
            hidden = m.model(input_ids=batch["input_ids"]).last_hidden_state.detach()
            logits = m.lm_head(hidden)[0, :-1]
            return nn.functional.cross_entropy(logits, batch["labels"][0, 1:])

        rows.append(don_nod_step(model, loss_fn, params, lr)[:2])
    return np.array(rows)


def test_closed_form_against_literal_steps(benchmark):
    model, tokenizer = models.load("smollm2", device="cpu")
    pairs = text_task(SMALL, seed=0).train[:16]
    with torch.no_grad():
        don_nod_scores(model, pairs[:2], tokenizer)  # warm up

    found = benchmark.pedantic(
        lambda: don_nod_scores(model, pairs, tokenizer, lr=1e-3), rounds=3, iterations=1
    )
    start = time.perf_counter()
    literal = literal_scores(model, pairs, tokenizer, 1e-3)
    seconds = time.perf_counter() - start
    np.testing.assert_allclose(found["nod"], literal[:, 1], rtol=1e-3)
    np.testing.assert_allclose(found["don"], literal[:, 0], rtol=1e-2, atol=1e-9)
    ratio = seconds / benchmark.stats.stats.median
    benchmark.extra_info["literal / closed form"] = round(ratio, 2)
    print(f"\nDONOD, {len(pairs)} samples: the closed form is {ratio:.1f} times as fast")
    assert ratio > 1
