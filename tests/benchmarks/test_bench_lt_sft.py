"""Selection against torch's own top-k; a step on chosen entries against a dense step."""

import copy

import torch
from clock import in_turn, row
from torch import nn

from adaptlab.evaluate import peak_memory
from adaptlab.sparse.lt_sft import VectorPhase, select


def test_selection_of_a_large_model():
    moved = {f"{i}": torch.rand(2_000_000, generator=torch.Generator().manual_seed(i))
             for i in range(8)}
    k = 640_000

    def sorted_flat():
        flat = torch.cat([m.flatten() for m in moved.values()])
        return flat.sort(descending=True).values[k - 1]

    row("LT-SFT: select 4 % of 16 M against a sort", *in_turn(
        lambda: select(moved, k), sorted_flat, rounds=3), bound=1.0)


def test_a_step_on_chosen_entries_against_a_dense_step():
    net = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(6)])
    chosen = select({n: torch.rand(p.shape) for n, p in net.named_parameters()}, 60_000)
    x = torch.randn(32, 1000)

    def steps(model):
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

        def work():
            adam.zero_grad()
            model(x).square().mean().backward()
            adam.step()

        return work

    dense = steps(copy.deepcopy(net))
    with VectorPhase(net, chosen, [n for n, _ in net.named_parameters()]):
        ours = steps(net)
        held = peak_memory(ours, "cpu") / 2**20  # first: pages that were freed don't count again
        row("LT-SFT: a step on 1 % of the entries against a dense one, memory", held,
            peak_memory(dense, "cpu") / 2**20, bound=1.0, unit="MiB")
        row("LT-SFT: a step on 1 % of the entries against a dense one", *in_turn(ours, dense),
            bound=1.0)
