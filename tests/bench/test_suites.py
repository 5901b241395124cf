"""GLUE and photographs: the body is kept, parts share nothing, scores are the suites' own."""

import pytest
import tiny_models
import torch

from adaptlab import data
from adaptlab.bench import suites
from adaptlab.bench.compare import Method
from adaptlab.bench.runs import BaseConfig, start_run


def test_scores_of_glue():
    logits = torch.tensor([[2.0, 0], [0, 1], [3, 0], [0, 5]])
    assert suites.glue_score("mrpc", logits, torch.tensor([0, 1, 0, 0])) == 75
    assert suites.glue_score("cola", logits, torch.tensor([0, 1, 0, 1])) == 100
    scores = suites.glue_score("stsb", torch.tensor([[1.0], [2], [3]]), torch.tensor([2.0, 4, 6]))
    assert scores == pytest.approx(100)


@pytest.fixture
def roberta(tmp_path):
    return tiny_models.roberta(tmp_path / "roberta", layers=2)


def test_glue_keeps_the_body_and_cuts_validation_in_two(roberta, recorded):
    from adaptlab import models

    bed, other = (suites.glue(s, "stsb", roberta, max_length=32, device="cpu") for s in (0, 1))
    body = models.load(roberta, device="cpu").model.roberta.state_dict()
    for made in (bed, other):
        own = made.model.roberta.state_dict()
        assert all(torch.equal(v, own[k]) for k, v in body.items() if "pooler" not in k)
    heads = [b.model.classifier.dense.weight for b in (bed, other)]
    assert not torch.equal(*heads) and bed.model.config.num_labels == 1
    rows = [{tuple(r) for r in p["input_ids"].tolist()} for p in (bed.choose, bed.test)]
    assert not rows[0] & rows[1] and bed.choose["labels"].is_floating_point()
    assert recorded.asked[0] == "nyu-mll/glue@stsb#train"
    with pytest.raises(ValueError, match="give one of cola"):
        suites.glue(0, "wnli", roberta)


def test_padding_of_all_rows_costs_nothing(roberta):
    "The loss is that of the padded batch; the model sees the longest text of the batch."
    from adaptlab import models

    model, seen = suites.with_head(models.load(roberta, device="cpu").model, 2, 0), []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    ids = torch.randint(5, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.tensor([7, 3, 5])[:, None]).long()
    batch = {"input_ids": ids * mask + (1 - mask) * model.config.pad_token_id,
             "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}
    loss = suites.model_loss(model, batch)
    torch.testing.assert_close(loss, model(**batch).loss)
    assert seen == [(3, 7), (3, 20)] and suites.trimmed(batch)["labels"] is batch["labels"]
    whole = {k: v for k, v in batch.items() if k != "attention_mask"}
    assert suites.trimmed(whole) is whole
    with pytest.raises(ValueError, match="empty"):
        suites.trimmed(batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])})


def test_every_task_of_glue_gives_a_row_per_method(roberta, recorded, tmp_path):
    run = start_run("hydra", BaseConfig(), root=tmp_path / "runs")
    table = suites.glue_sweep(run, {"before": Method(lambda model, bed, seed: None)}, suites.GLUE,
                              (0,), model=roberta, max_length=16, device="cpu")
    assert list(table["task"]) == list(suites.GLUE) and table["score"].between(-100, 100).all()


def test_photos_come_in_the_order_asked_for():
    rows, labels = suites.image_data("mnist5k#validation")
    every = suites.Photos(rows, labels, None)
    x, y = data.as_tensors(rows.select([5, 2]))
    assert torch.equal(every.pixels([5, 2]), x) and torch.equal(every.labels[[5, 2]], y)
    part = every.subset([9, 5, 2])
    batch = part.__getitems__([1, 2])
    assert torch.equal(torch.stack([b[0] for b in batch]), x) and len(part) == 3
    with pytest.raises(ValueError, match="one for each"):
        suites.Photos(rows, labels[:-1], None)
    with pytest.raises(ValueError, match="add one of #train"):
        suites.image_data("mnist5k")


class Reads(torch.nn.Module):
    "Says the mean of the pixels' rows: a picture of ones is class 0."

    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)


def test_accuracy_on_photos_is_counted_over_batches():
    rows, labels = suites.image_data("mnist5k#validation")
    part = suites.Photos(rows, (torch.arange(len(labels)) % 4 == 0).long(), None)
    assert suites.photo_accuracy(Reads(), part, batch_size=300) == pytest.approx(25.0)


def test_photos_bed_sets_pictures_aside(tmp_path):
    vit = tiny_models.vit(tmp_path / "vit", image=28, patch=7)
    bed = suites.photos(0, "mnist5k#validation", "mnist5k#test", vit, held=0.25, device="cpu")
    assert (len(bed.train), len(bed.choose), len(bed.test)) == (750, 250, 1000)
    assert bed.model.classifier.out_features == 10
    assert bed.train[0][0].shape == (3, 28, 28) and 0 <= suites.photo_accuracy(
        bed.model, bed.choose) <= 100
    with pytest.raises(ValueError, match="held = 1"):
        suites.photos(0, "mnist5k#validation", "mnist5k#test", held=1)


def test_mmlu_shows_five_solved_questions_of_the_subject(recorded):
    items = suites.mmlu(part="test")
    assert {"cais/mmlu@all#dev", "cais/mmlu@all#test"} <= set(map(str, recorded.asked))
    solved = [line for line in items[0]["context"].splitlines() if line.startswith("Answer: ")]
    assert solved and items[0]["context"].endswith("\nAnswer:")
    assert all(0 <= item["answer"] < len(item["choices"]) for item in items)
    assert items[0]["choices"][:2] == [" A", " B"]
