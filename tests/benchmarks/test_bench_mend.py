"""MEND on SmolLM2-135M: edits that share one pass, and a cached trunk, against the plain way."""

import torch
from clock import in_turn, row

from adaptlab import models
from adaptlab.editing.mend import MEND, edit_losses, sequence_nll
from adaptlab.bench.facts import Tail
from adaptlab.text import causal_lm_collate

COUNTRIES = ("France", "Spain", "Japan", "Poland", "Brazil", "Egypt", "Greece", "Norway")


def materialized_step(editor, batch):
    "The plain way: one edit at a time, each written out as full weights."
    weights = [layer.weight for layer in editor.layers.values()]
    for i in range(len(COUNTRIES)):
        one = {part: {k: v[i : i + 1] for k, v in b.items()} for part, b in batch.items()}
        edited = editor.edit(one["edit"])
        new = {f"{n}.weight": w - edited.changes[n].dense()[0]
               for n, w in zip(editor.layers, weights, strict=True)}
        loss = 0.0
        for part in ("rephrase", "locality"):
            inputs = {k: v for k, v in one[part].items() if k != "labels"}
            logits = torch.func.functional_call(editor.model, new, (), inputs).logits[:, :-1]
            loss = loss + sequence_nll(logits, one[part]["labels"][:, 1:]).mean()
        loss.backward()


def test_a_training_step():
    model, tokenizer = models.load("smollm2", device="cpu")
    model.requires_grad_(False)
    collate = causal_lm_collate(tokenizer, add_eos=False)
    forms = {"edit": "The main language spoken in {} is", "rephrase": "People in {} speak",
             "locality": "The capital of {} is"}
    text = {part: collate([(form.format(c), " Turkish") for c in COUNTRIES])
            for part, form in forms.items()}
    torch.manual_seed(0)
    whole, tail = MEND(model, "mlp:-2:", rank=64), Tail(model, "model.layers", 2)
    fast = MEND(model, "mlp:-2:", rank=64, loss_fn=sequence_nll, forward_fn=tail)
    short = {part: tail.batch(b) for part, b in text.items()}
    whole.fit_normalization([text["edit"]])
    fast.load_state_dict(whole.state_dict())
    torch.testing.assert_close(edit_losses(whole.eval(), text).edit,
                               edit_losses(fast.eval(), short).edit, rtol=1e-3, atol=1e-3)
    whole.train(), fast.train()

    def step(editor, batch):
        sum(edit_losses(editor, batch)).backward()

    shared, plain, cached = in_turn(lambda: step(whole, text),
                                    lambda: materialized_step(whole, text),
                                    lambda: step(fast, short), rounds=1)
    row("MEND, step of 8 edits against one dense edit at a time", shared, plain, bound=0.7)
    row("MEND, the same with a cached trunk", cached, shared, bound=0.7)
