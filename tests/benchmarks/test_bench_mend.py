"""MEND on SmolLM2-135M: edits sharing one pass, and a cached trunk, against the plain way."""

from functools import partial

import torch
from clock import seconds

from adaptlab import models
from adaptlab.editing.mend import (
    MEND,
    Tail,
    cached_batch,
    edit_losses,
    sequence_nll,
    tail_logits,
)
from adaptlab.train import causal_lm_collate

COUNTRIES = ("France", "Spain", "Japan", "Poland", "Brazil", "Egypt", "Greece", "Norway")


def materialized_step(editor, batch, rows):
    "The plain way: one edit at a time, each written out as full weights."
    weights = [layer.weight for layer in editor.layers.values()]
    for i in range(rows):
        one = {part: {k: v[i : i + 1] for k, v in b.items()} for part, b in batch.items()}
        edited = editor.edit(one["edit"])
        new = {f"{n}.weight": w + edited.changes[n].dense()[0].neg()
               for n, w in zip(editor.layers, weights, strict=True)}
        loss = 0.0
        for part in ("rephrase", "locality"):
            inputs = {k: v for k, v in one[part].items() if k != "labels"}
            logits = torch.func.functional_call(editor.model, new, (), inputs).logits[:, :-1]
            loss = loss + sequence_nll(logits, one[part]["labels"][:, 1:]).mean()
        loss.backward()


def test_shared_pass_and_cached_trunk_against_single_dense_edits(benchmark):
    model, tokenizer = models.load("smollm2", device="cpu")
    model.requires_grad_(False)
    collate = causal_lm_collate(tokenizer, add_eos=False)
    forms = {"edit": "The main language spoken in {} is", "rephrase": "People in {} speak",
             "locality": "The capital of {} is"}
    text = {part: collate([(form.format(c), " Turkish") for c in COUNTRIES])
            for part, form in forms.items()}
    torch.manual_seed(0)
    whole = MEND(model, "mlp:-2:", rank=64)
    tail = Tail(model, -2)
    fast = MEND(model, "mlp:-2:", rank=64, loss_fn=sequence_nll,
                forward_fn=partial(tail_logits, tail))
    fast.load_state_dict(whole.state_dict())
    short = {part: cached_batch(tail, b) for part, b in text.items()}
    whole.fit_normalization([text["edit"]])
    fast.load_state_dict(whole.state_dict())
    torch.testing.assert_close(edit_losses(whole.eval(), text).edit,
                               edit_losses(fast.eval(), short).edit, rtol=1e-3, atol=1e-3)
    whole.train(), fast.train()

    def step(editor, batch):
        sum(edit_losses(editor, batch)).backward()

    plain = seconds(lambda: materialized_step(whole, text, len(COUNTRIES)), 1)
    shared = seconds(lambda: step(whole, text))
    benchmark.pedantic(lambda: step(fast, short), rounds=3, iterations=1, warmup_rounds=1)
    cached = benchmark.stats.stats.min
    ratios = {"one dense edit at a time / shared pass": plain / shared,
              "shared pass / with cached trunk": shared / cached}
    benchmark.extra_info |= {k: round(v, 2) for k, v in ratios.items()}
    for name, ratio in ratios.items():
        print(f"\nMEND training step, {len(COUNTRIES)} edits: {name} {ratio:.1f}")
    assert min(ratios.values()) > 1
