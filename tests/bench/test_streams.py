"""Streams of shifted pictures: what is seen, in which order, and what is refused."""

import pytest
import torch
from torch import nn

from adaptlab.bench.streams import Streams, prepare
from adaptlab.bench.suites import Photos, image_data


class Normalised:
    "An image processor of a hub or, with `timm`, of a timm model: numbers alone matter here."

    def __init__(self, timm: bool):
        numbers = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
        if timm:
            self.data_config = numbers
        else:
            self.do_normalize = True
            self.image_mean, self.image_std = numbers["mean"], numbers["std"]

    def __call__(self, images, return_tensors):
        x = torch.stack([torch.as_tensor(i) for i in images]).permute(0, 3, 1, 2) / 255
        return {"pixel_values": (x - 0.5) / 0.25}


@pytest.mark.parametrize("timm", [False, True])
def test_a_shift_sees_pixels_not_normalised_ones(timm):
    rows, labels = image_data("mnist5k#test")
    some = torch.arange(4)
    plain = prepare(Photos(rows, labels, None), "contrast-3", some, noise=0)
    found = prepare(Photos(rows, labels, Normalised(timm)), "contrast-3", some, noise=0)
    torch.testing.assert_close(found[:, :1] * 0.25 + 0.5, plain, atol=1e-5, rtol=0)


def test_noise_by_image_or_by_batch():
    rows, labels = image_data("mnist5k#test")
    photos, some = Photos(rows, labels, None), torch.tensor([4, 9])
    alone = prepare(photos, "gaussian_noise-3", some[1:])
    assert torch.equal(prepare(photos, "gaussian_noise-3", some)[1:], alone)
    one, two = (prepare(photos, "gaussian_noise-3", some, noise=n) for n in (0, 1000))
    assert not torch.equal(one, two)
    assert torch.equal(prepare(photos, "clean", some, noise=1000), photos.pixels(some))
    with pytest.raises(ValueError, match="one corruption at a time"):
        prepare(photos, "blur-2+contrast-2", some, noise=0)


@pytest.mark.parametrize("ragged, sizes", [(True, [64, 36]), (False, [64])])
def test_batches_and_their_order(ragged, sizes):
    part = Streams("mnist5k#test", [("clean", "class")], 100, (0, 1), ragged=ragged)
    for seed in (0, 1):
        found = list(part.batches("clean", "class/64", seed))
        assert [len(y) for _, y in found] == sizes
        order = part.order("clean", "class", seed)[: sum(sizes)]
        assert torch.equal(torch.cat([y for _, y in found]), part.labels[order])
        assert torch.equal(torch.cat([x for x, _ in found]), part.photos.pixels(order))
    assert not torch.equal(part.order("clean", "class", 0), part.order("clean", "class", 1))
    short = Streams("mnist5k#test", [], 10, ragged=False)
    assert [len(y) for _, y in short.batches("clean", "iid/64")] == [10]  # not nothing


def test_accuracy_counts_images_and_starts_anew():
    class Zero(nn.Linear):
        resets = 0

        def reset(self):
            self.resets += 1

        def forward(self, x):
            return nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 10)

    part, model = Streams("mnist5k#test", [("clean", "iid")], 100, (0, 1)), Zero(1, 1)
    (row,) = part.accuracy(model)
    zeros = [int((part.labels[part.order("clean", "iid", s)] == 0).sum()) for s in (0, 1)]
    assert row["accuracy"] == 100 * sum(zeros) / 200 and model.resets == 2
