"""LocFT-BF on SmolLM2-135M: kept states against a pass through the whole model."""

import torch
from clock import in_turn, row

from adaptlab import models
from adaptlab.editing.locft_bf import EditRequest, LocFT, LocFTConfig

COUNTRIES = ("France", "Spain", "Japan", "Poland", "Brazil", "Egypt", "Greece", "Norway")


def test_kept_states():
    model, tokenizer = models.load("smollm2", device="cpu")
    edits = [EditRequest(f"The capital of {c} is", "Quito") for c in COUNTRIES]

    def edit(cached):
        editor = LocFT(model, tokenizer, LocFTConfig(22, batch_size=8, epochs=25, cached=cached,
                                                     loss_threshold=0.0))
        delta = editor.edit(edits).delta
        editor.revert()
        return next(iter(delta.values()))

    one, two = edit(True), edit(False)
    assert one.abs().max() > 1e-4
    assert (one - two).norm() <= 0.02 * two.norm()
    kept, whole = in_turn(lambda: edit(True), lambda: edit(False), rounds=1)
    row("LocFT-BF, 25 epochs of 8 edits, kept states against the whole pass", kept, whole,
        bound=0.7)


def test_memory():
    "What autograd keeps for a step: it begins at the trained block."
    from adaptlab.bench import cost
    from adaptlab.editing.locft_bf import Trunk, select_parameters

    model, _ = models.load("smollm2", device="cpu")
    model.requires_grad_(False)
    for p in select_parameters(model, 22).values():
        p.requires_grad_(True)
    rows = [(torch.randint(5, 900, (24,)).tolist(), 20) for _ in range(8)]

    class Step(torch.nn.Module):
        "The logits of all rows, as a module: so what autograd keeps can be counted."

        def __init__(self, cached):
            super().__init__()
            self.model, self.trunk = model, Trunk(model, rows, 22, cached)

        def forward(self, which):
            return self.trunk(which.tolist())[0]

    kept, whole = (cost.activation_bytes(Step(c), torch.arange(8)) / 2**20 for c in (True, False))
    row("LocFT-BF, kept for the backward pass, against the whole pass", kept, whole, bound=0.7,
        unit="MiB")
