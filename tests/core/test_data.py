"""data: one call, columns, splits; images of all kinds; parts (hypothesis); bad input."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptlab import data
from adaptlab.cache import FetchError

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=200)
SEEDS = st.integers(0, 2**32 - 1)
quick = settings(max_examples=40, deadline=None)


def is_permutation(index, n):
    return index.dtype == torch.int64 and torch.equal(index.sort().values, torch.arange(n))


# parts

@quick
@given(LABELS, SEEDS, st.integers(1, 50))
def test_few_shot(labels, seed, k):
    counts = torch.tensor(labels).bincount()
    counts = counts[counts > 0]
    if counts.min() < k:
        with pytest.raises(ValueError, match=f"k = {k}, but class"):
            data.few_shot(labels, k, seed)
    else:
        index = data.few_shot(labels, k, seed)
        got = torch.tensor(labels)[index].bincount()
        assert len(index.unique()) == len(index) and (got[got > 0] == k).all()


@quick
@given(st.integers(1, 300), st.lists(st.floats(0.01, 1), min_size=1, max_size=4), SEEDS)
def test_split_is_disjoint_and_has_the_sizes(n, raw, seed):
    fractions = [f / max(1.0, sum(raw) + 1e-6) for f in raw]
    try:
        parts = data.split(n, fractions, seed)
    except ValueError as error:
        assert "none may be empty" in str(error)
        return
    together = torch.cat(parts)
    assert len(together.unique()) == len(together) and together.max() < n
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - fraction * n) <= 1


@quick
@given(LABELS, SEEDS, st.floats(0.1, 0.9))
def test_split_stratified_keeps_shares(labels, seed, fraction):
    n, y = len(labels), torch.tensor(labels)
    if not 0 < round(fraction * n) < n:
        return
    first, second = data.split(n, (fraction, 1 - fraction), seed, stratify=labels)
    assert is_permutation(torch.cat([first, second]), n)
    share = y[first].bincount(minlength=7) - len(first) / n * y.bincount(minlength=7)
    assert share.abs().max() <= 4  # samples, however many there are


def test_split_of_a_dataset_and_by_counts():
    ds = data.load("digits")
    a, b = data.split(ds, (1000, 500), seed=1, stratify="label")
    assert (len(a), len(b)) == (1000, 500) and a.features == ds.features
    with pytest.raises(ValueError, match="no column .class.; there are"):
        data.split(ds, (0.5, 0.5), stratify="class")


@pytest.mark.parametrize("fractions", [(), (0.5, 0.6), (-0.1, 0.5), (6, 5), (1e-9, 0.5), (0, 1)])
def test_split_refuses(fractions):
    with pytest.raises(ValueError, match="fractions"):
        data.split(10, fractions)


# datasets

def test_load_refuses():
    with pytest.raises(ValueError, match="give one of"):
        data.load("")
    with pytest.raises(TypeError, match="takes no .*revision"):
        data.load("digits", revision="main")
    with pytest.raises(ValueError, match="never run"):
        data.load("some/dataset", trust_remote_code=True)


def test_unknown_name_offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="Did you mean capitals.*HF_HUB_OFFLINE"):
        data.load("capital")


def test_from_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    ds = data.load("sunspots")
    ds.save_to_disk(tmp_path / "arrow")
    assert data.load(tmp_path / "arrow").features == ds.features
    ds.to_parquet(tmp_path / "table.parquet")
    again = data.load(tmp_path / "table.parquet", split="train", cache_dir=str(tmp_path / "hf"))
    assert again["year"][:] == ds["year"][:]
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="files may be"):
        data.load(tmp_path / "x.bin")


def test_as_tensors_refuses(tmp_path):
    import datasets
    import PIL.Image

    two = datasets.Dataset.from_dict(
        {"image": [PIL.Image.new("L", (4, 4)), PIL.Image.new("L", (5, 4))], "label": [0, 1]},
        features=datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"])),
    )
    with pytest.raises(ValueError, match="2 sizes"):
        data.as_tensors(two)
    x, y = data.as_tensors(two.select([1]))
    assert x.shape == (1, 1, 4, 5) and y.tolist() == [1]
    with pytest.raises(ValueError, match="no column 'picture'"):
        data.as_tensors(two, image="picture")
    with pytest.raises(ValueError, match="0 columns are of type Image"):
        data.as_tensors(data.load("sunspots"))


def test_colour_images():
    import datasets
    import PIL.Image

    red = datasets.Dataset.from_dict(
        {"picture": [PIL.Image.new("RGB", (3, 2), (255, 0, 0))], "label": [0]},
        features=datasets.Features(
            picture=datasets.Image(), label=datasets.ClassLabel(num_classes=2)),
    )
    x, _ = data.as_tensors(red)
    assert x.shape == (1, 3, 2, 3) and x[0, :, 0, 0].tolist() == [1, 0, 0]
