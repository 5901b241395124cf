"""The small denoiser: changes beside its weights, drawings, and parts that share no image."""

import copy

import torch

from adaptlab.bench.denoiser import POOL, Denoiser, concepts, judge, pictures, small_denoiser


def test_changes_are_what_folding_them_in_would_do():
    torch.manual_seed(0)
    model = Denoiser()
    folded, changes = copy.deepcopy(model), {}
    for name in ("look.1", "hidden.0", "out"):
        layer = folded.get_submodule(name)
        A, B = torch.randn(layer.out_features, 3), torch.randn(layer.in_features, 3)
        changes[name] = A, B
        layer.weight.data += A @ B.T
    x, t, prompt = torch.randn(4, 64), torch.arange(4), torch.randn(1, 3, 64)
    torch.testing.assert_close(model(x, t, prompt, changes), folded(x, t, prompt),
                               rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.error(x, t, 0 * x, prompt, changes),
                               folded.error(x, t, 0 * x, prompt), rtol=1e-4, atol=1e-4)


def test_several_prompts_are_drawn_as_one_by_one():
    model = small_denoiser()
    together = model.draw(3, model.words.detach()[:, None])
    assert together.shape == (5, 3, 64) and together.abs().max() <= 1
    again = model.draw(3, model.words.detach()[:, None])
    assert torch.equal(together, again)
    names = judge().predict(model.draw(20, model.words.detach()[:, None]).flatten(0, 1).numpy())
    assert (names.reshape(5, 20) == torch.arange(5)[:, None].numpy()).mean() > 0.8


def test_concepts_come_from_the_pool_and_share_no_image():
    bed = concepts(3)
    assert [part.shape[1] for part in (bed.train, bed.choose, bed.test)] == [16, 16, 28]
    for i, digit in enumerate(pictures()[5:]):
        images = torch.cat([bed.train[i], bed.choose[i], bed.test[i]])
        gaps = torch.cdist(images, digit[:POOL])
        assert sorted(gaps.argmin(1).tolist()) == list(range(POOL)) and gaps.amin(1).max() < 0.1
    assert not torch.equal(bed.train, concepts(4).train)
