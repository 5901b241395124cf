"""VTrans: the sliced model against the masked one, a step of masks against a plain step."""

import copy

import torch
from clock import in_turn, row

from adaptlab import modules, recipes
from adaptlab.compression.vtrans import VIBPruner


def parts():
    torch.manual_seed(0)
    model = recipes.TinyViT(dim=128, depth=4, heads=8)
    return model, (torch.rand(32, 1, 28, 28), torch.arange(32) % 10)


@torch.no_grad()
def test_sliced_against_masked():
    model, batch = parts()
    pruner = VIBPruner(model).attach().eval()
    pruner.set_kept({m: torch.arange(k.size) < k.size // 2 for m, k in pruner.masks.items()})
    small = pruner.fold_and_slice()
    torch.testing.assert_close(small(batch[0]), pruner(batch), atol=1e-5, rtol=0)
    times = in_turn(lambda: small(batch[0]), lambda: pruner(batch))
    # no operation of the sliced model runs on more than half of the numbers (most products on a
    # quarter), and it has no masks
    row("half of all units sliced, forward, against masks", *times, bound=0.5)


def test_a_step_of_masks_against_a_plain_step():
    model, batch = parts()
    plain, pruner = copy.deepcopy(model), VIBPruner(model).attach()
    masked_adam, adam = pruner.optimizer(), torch.optim.AdamW(
        plain.parameters(), fused=True)

    def masked():
        masked_adam.zero_grad()
        pruner.loss(pruner(batch), batch)["total"].backward()
        masked_adam.step()
        pruner.step()

    def normal():
        adam.zero_grad()
        modules.cross_entropy(plain, batch).backward()
        adam.step()

    times = in_turn(masked, normal)
    # the experiment gives rivals as many batches as VTrans: a masked one must cost less than two
    row("VTrans, a step with masks, against one without", *times, bound=2.0)
