"""Folders of pictures: random operations, classes of other names, CLIP's head as a probe."""

import numpy as np
import pytest
import torch
from PIL import Image

from adaptlab.bench import pictures


def test_image_operations_keep_size_and_mode() -> None:
    "All thirteen of them, in both directions, at the largest magnitude."
    pixels = [np.random.default_rng(i).integers(0, 255, (32, 30, 3)).astype(np.uint8)
              for i in range(20)]
    torch.manual_seed(0)
    changed = pictures.augment(pixels, 13, 30, list)
    assert all(im.size == (30, 32) and im.mode == "RGB" for im in changed)
    assert not np.array_equal(changed[0], pixels[0])
    assert all(map(np.array_equal, pictures.augment(pixels, 0, 30, list), pixels))


@pytest.fixture
def folders(tmp_path):
    for part, names in (("train", ("blue", "green", "red")), ("few", ("blue", "red")),
                        ("odd", ("leaf", "rose"))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (8, 8), "red").save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_classes_of_a_shifted_set_are_those_of_the_training_set(folders):
    known = pictures.Pictures(folders / "train", None)
    assert known.names == ["blue", "green", "red"] and len(known) == 15
    assert pictures.Pictures(folders / "few", None, classes=known.names).groups == [[0], [2]]
    with pytest.raises(ValueError, match="classes.json"):
        pictures.Pictures(folders / "odd", None, classes=known.names)
    (folders / "odd" / "classes.json").write_text('{"rose": ["red", "blue"], "leaf": ["green"]}')
    assert pictures.Pictures(folders / "odd", None, classes=known.names).groups == [[1], [2, 0]]


def test_threads_keep_the_order_and_operations_leave_the_original(folders):
    def see(images, **options):
        stacked = np.stack([np.asarray(x) for x in images]).transpose(0, 3, 1, 2) / 255.0
        return {"pixel_values": torch.tensor(stacked)}

    one, many = (pictures.Pictures(folders / "train", see, workers=n) for n in (1, 3))
    assert torch.equal(one.pixels(range(15)), many.pixels(range(15)))
    assert one.augmented(1, 9).processor is not one.processor and one.processor is see


def test_the_head_starts_as_the_best_probe():
    torch.manual_seed(0)
    body = torch.nn.Identity()
    net = torch.nn.Sequential()
    net.body, net.head = body, torch.nn.Linear(3, 2)
    y = torch.arange(30) % 2
    x = torch.randn(30, 3) + y[:, None]
    pictures.start_head(net, x, y, l2=0.01)
    loss = torch.nn.functional.cross_entropy(net.head(x), y) + 0.01 * net.head.weight.square().sum()
    loss.backward()
    assert all(p.grad.abs().max() < 1e-3 for p in net.head.parameters())  # a minimum
