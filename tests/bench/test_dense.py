"""Dense tasks: measures by hand, several tasks at once, rooms as models take them."""

import pytest
import torch
from torch import nn

from adaptlab.bench.dense import Task, Work, figure, read_rooms, rooms, sums


def test_measures_by_hand():
    miou = Task(None, 3, 1.0, "miou", 2)
    y = nn.functional.one_hot(torch.tensor([[[0, 1, 1, 2]]]), 3).permute(0, 3, 1, 2).float()
    labels = torch.tensor([[[0, 0, 1, 255]]])
    assert figure(miou, sums(miou, y, labels)) == pytest.approx(50)
    rmse = Task(None, 1, 1.0, "rmse")
    target = torch.tensor([[[[0.0, float("nan"), 4.0]]]])
    found = sum(sums(rmse, torch.full((1, 1, 1, 3), 3.0), target) for _ in range(2))
    assert figure(rmse, found) == pytest.approx(5**0.5)
    angle = Task(None, 3, 1.0, "angle")
    up, side = (torch.eye(3)[i].view(1, 3, 1, 1) for i in (2, 0))
    assert figure(angle, sums(angle, up, side)) == pytest.approx(90)


def test_rooms_are_read_as_the_models_take_them():
    batch = {"image": torch.full((1, 3, 2, 2), 0.5),
             "segmentation": torch.tensor([[[0, -1], [3, 4]]]),
             "depth": torch.tensor([[[[0.0, 2.0], [1.0, 1.0]]]]), "normal": torch.zeros(1, 3, 2, 2)}
    x, labels = read_rooms(batch)
    assert x[0, 0, 0, 0] == pytest.approx((0.5 - 0.485) / 0.229)
    assert labels["depth"].isnan().sum() == 1 and labels["segmentation"].dtype == torch.int64


class Constant(nn.Module):
    "One output for each of two tasks, on a coarse grid."

    def forward(self, x):
        return {"classes": x.new_tensor([[2.0], [1.0]])[None, :, :, None].expand(len(x), 2, 2, 2),
                "depth": x.new_ones(len(x), 1, 2, 2)}


def test_figures_do_not_depend_on_the_batches_and_losses_have_weights():
    g = torch.Generator().manual_seed(0)
    part = {"x": torch.rand(7, 1, 4, 4, generator=g),
            "classes": torch.randint(-1, 2, (7, 4, 4), generator=g),
            "depth": torch.rand(7, 1, 4, 4, generator=g)}
    tasks = {"classes": Task(lambda y, labels: y.mean(), 2, 3.0, "miou", 2),
             "depth": Task(lambda y, labels: labels.mean(), 1, 0.5, "rmse")}
    work = Work(tasks, lambda batch: (batch["x"], batch))
    model = Constant()
    whole = work.figures(model, part)
    assert work.figures(model, part, size=2) == pytest.approx(whole)
    known = part["classes"] >= 0
    share = (part["classes"] == 0).sum() / known.sum()  # class 0 is always said, class 1 never
    assert whole["classes"] == pytest.approx(50 * share.item())
    assert whole["depth"] == pytest.approx((1 - part["depth"]).square().mean().sqrt().item())
    assert work.loss(model, part) == pytest.approx(3 * 1.5 + 0.5 * part["depth"].mean().item())
    assert work.lower == ["depth"]
    better = work.score(whole | {"depth": whole["depth"] / 2})
    assert better - work.score(whole) == pytest.approx(0.5 * 0.6931, abs=1e-4)
    with pytest.raises(KeyError, match="depth"):
        work.loss(model, {k: part[k] for k in ("x", "classes")})


def test_rooms_are_set_aside(recorded):
    train, choose, test = rooms(0, held=2)
    other = rooms(1, held=2)[1]
    assert len(choose) == 2 and len(train) > 0 and len(test) > 0
    assert not torch.equal(torch.as_tensor(choose["depth"][:]), torch.as_tensor(other["depth"][:]))
    assert {"tanganke/nyuv2#train", "tanganke/nyuv2#val"} <= set(map(str, recorded.asked))
