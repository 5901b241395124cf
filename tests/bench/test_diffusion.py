"""A diffusion transformer: noise and its loss, samples, released weights, other classes."""

import copy

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from adaptlab.bench.diffusion import (
    DiT, ddpm_loss, error, from_diffusers, kept, load_dit, new_classes, noise_error, sample)
from tiny_models import noisy_pictures as batch


def flat(dim, grid):
    "Positions that tell patches apart."
    return torch.arange(grid**2 * dim).sin().view(grid**2, dim)


def alive(**shape):
    "A small DiT whose gates and last layer are not zero, as after training."
    torch.manual_seed(0)
    return tiny_models.alive(DiT(flat, **{"dim": 32, "depth": 2, "heads": 2} | shape))


def test_noise_loss_and_samples():
    a = kept(200)
    assert a[0] > 0.999 and a[-1] < 1e-3 and (a.diff() < 0).all()
    torch.testing.assert_close(kept(1000)[0], torch.tensor(1 - 1e-4))
    x, t, y = batch()
    found = noise_error(DiT(flat, dim=16, depth=1, heads=2), x, y, t, 2 * x)
    torch.testing.assert_close(found, (2 * x).square().flatten(1).mean(1))
    drawn = sample(alive(), torch.tensor([1, 2]), 3)
    assert drawn.shape == (2, 1, 8, 8) and drawn.abs().max() <= 1
    assert torch.equal(drawn, sample(alive(), torch.tensor([1, 2]), 3))


def test_positions_count_and_stay_out_of_files():
    model, (x, t, y) = alive(), batch()
    assert not any("pos_embed" in name for name in model.state_dict())
    before = model(x, t, y)
    model.pos_embed = model.pos_embed.flip(0)
    assert (model(x, t, y) - before).abs().max() > 1e-3


def test_error_is_that_of_one_pass_and_the_loss_drops_labels():
    model, (x, _, y) = alive().train(), batch(n=7)
    assert error(model, (x, y), 2) == pytest.approx(error(model, (x, y)), rel=1e-5)
    assert model.training
    losses = []
    for label in (y, torch.full_like(y, 10)):  # the second: no class at all
        torch.manual_seed(3)
        losses.append(ddpm_loss(model, (x, label)).item())
    assert losses[0] != losses[1] and all(0 < v < 10 for v in losses)


def test_loading_and_new_classes(tmp_path):
    shape = (8, 4, 16, 1, 2, 1000, 2, 1000, 1)
    made = alive(classes=5, size=8, channels=4, dim=16, depth=1, heads=2, learn_sigma=1, steps=1000)
    extra = {"pos_embed": torch.zeros(1, 16, 16)}  # the official file holds it
    save_file({**made.state_dict(), **extra}, tmp_path / "dit.safetensors")
    loaded, (x, t, y) = load_dit(str(tmp_path / "dit.safetensors"), flat, shape), batch(channels=4)
    assert torch.equal(loaded(x, t, y), made(x, t, y))
    free = torch.full((3,), 5)
    again = new_classes(copy.deepcopy(made), 9)
    assert torch.equal(again(x, t, free + 4), made(x, t, free))  # "no class" is as it was
    assert again.y_embedder.embedding_table.weight.requires_grad and again.classes == 9
    with pytest.raises(ValueError, match="not a DiT of diffusers"):
        from_diffusers({"transformer_blocks.0.x": torch.ones(1)})
