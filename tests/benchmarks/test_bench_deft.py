"""A training step with the density loss: against one without, and against plain autograd."""

from functools import partial

import torch
from clock import in_turn, row
from steps import training_step

from adaptlab import adapters, modules, recipes
from adaptlab.evaluate import peak_memory
from adaptlab.sparse.deft import activation_modules, deft_loss


def by_autograd(model, batch):
    "The term written out; autograd keeps what it needs."
    seen = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o))
             for m in activation_modules(model).values()]
    loss = modules.cross_entropy(model, batch)
    for hook in hooks:
        hook.remove()
    count = [(a.float() ** 2 / (a.float() ** 2 + 1e-7)).mean() for a in seen]
    return loss + torch.stack(count).mean()


def test_step_with_the_density_loss():
    torch.manual_seed(0)
    base = recipes.TinyViT(dim=256, depth=4, act="relu")
    batch = torch.rand(64, 1, 28, 28), torch.randint(10, (64,))

    attach = partial(adapters.attach, make=partial(adapters.LoraAdapter, rank=8),
                     targets=["q_proj", "v_proj"])
    ours, plain, naive = (training_step(base, batch, attach, loss) for loss in (
        deft_loss(), modules.cross_entropy, by_autograd))
    row("DEFT step against the formula by autograd", *in_turn(ours, naive, rounds=7), bound=1.0)
    row("DEFT step against the same without the term", *in_turn(ours, plain, rounds=7), bound=1.2)
    peak = partial(peak_memory, device="cpu")
    row("DEFT memory against the formula by autograd", peak(ours) / 2**20, peak(naive) / 2**20,
        bound=1.0, unit="MiB")
