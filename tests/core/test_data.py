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


# one call

def table(folder, rows="y\n1\n", name="t.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(rows)
    return folder / name


SIGNS = ["run[1]", "a*b", "q?", "[a", "x{1,2}", "12:30", "me@host", "h#1", "me@host#2", "sp ace",
         "a@b@c#d", "!x"]


@pytest.mark.parametrize("folder", SIGNS)
def test_a_path_means_itself(tmp_path, folder):
    "Whatever signs it has: those of patterns, those of our own notation."
    path = table(tmp_path / folder)
    for other in ("run1", "aXb", "qq", "x1"):  # what a pattern would find instead, or too
        table(tmp_path / other, "y\n999\n")
    for name in (path, str(path), f"{path}#train", f"{path}#train[:1]"):
        assert data.load(name)["y"][:] == [1], name
    table(tmp_path / folder, "y\n2\n", "test.csv")
    path.rename(path.with_name("train.csv"))
    assert data.load(f"{path.parent}#test")["y"][:] == [2]
    assert {k: v["y"][:] for k, v in data.load(path.parent).items()} == {"train": [1], "test": [2]}


def test_other_kinds_of_files(tmp_path):
    import gzip

    table(tmp_path, "y\tz\n1\t2\n", "t.tsv")
    assert data.load(tmp_path / "t.tsv")[0] == {"y": 1, "z": 2}
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write("y\n5\n")
    assert data.load(tmp_path / "t.csv.gz")["y"][:] == [5]
    table(tmp_path, '{"y": 3}\n', "T.JSONL")
    assert data.load(tmp_path / "T.JSONL", "y")["y"][:] == [3]
    (tmp_path / "a::b").mkdir()
    with pytest.raises(ValueError, match="::.*rename"):
        data.load(table(tmp_path / "a::b"))


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    for name, content in (("bad.json", "{"), ("bad.parquet", "x"), ("bad.csv", "")):
        with pytest.raises(ValueError, match=name):
            data.load(table(tmp_path, content, name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        data.load(tmp_path / "empty")


@pytest.mark.parametrize("name", ["./none.csv", "none/table.parquet", "me@host/none.csv",
                                  "~/no such folder", "C:\\data\\none.csv", "/nowhere"])
def test_a_path_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(FetchError, match="there is no file or folder"):
        data.load(name)


def test_a_spec_that_is_none():
    for name in ("a b", "x/y/z", "x@y@z", "@main", "x//y"):
        with pytest.raises(ValueError, match="'id@configuration#split'"):
            data.load(name)


def test_configuration_and_split_reach_the_hub(recorded):
    data.load("openai/gsm8k@main#test")
    data.load("openai/gsm8k@main", split="test")
    data.load("openai/gsm8k", split="test", name="main")  # as `datasets` calls it
    assert recorded.asked == ["openai/gsm8k@main#test"] * 3
    with pytest.raises(ValueError, match="says 'test', and split = 'train'"):
        data.load("openai/gsm8k@main#test", split="train")
    with pytest.raises(ValueError, match="says 'main', and name = 'socratic'"):
        data.load("openai/gsm8k@main#test", name="socratic")


def test_splits_of_bundled_data():
    assert len(data.load("digits#train")) == len(data.load("digits", split="train")) == 1797
    assert len(data.load("digits#train[:10]+train[-5:]")) == 15
    for split in ("test", "train[:x]", "train["):
        with pytest.raises(ValueError, match="digits has no split.*there are train"):
            data.load("digits", split=split)


def test_splits_of_saved_data(tmp_path):
    import datasets

    ds = data.load("sunspots")
    datasets.DatasetDict(old=ds.select(range(9)), new=ds).save_to_disk(tmp_path / "both")
    assert len(data.load(f"{tmp_path}/both#old[3:]")) == 6
    assert set(data.load(tmp_path / "both", "year")) == {"old", "new"}
    with pytest.raises(ValueError, match="no split 'train'; there are old, new"):
        data.load(tmp_path / "both", split="train")
    with pytest.raises(TypeError, match="takes no .'name'"):
        data.load(f"{tmp_path}/both@main")


def test_columns():
    assert data.load("capitals", ["capital", "country"]).column_names == ["capital", "country"]
    assert data.load("capitals", "capital").column_names == ["capital"]
    with pytest.raises(ValueError, match="capitals has no column 'city'; there are .*'capital'"):
        data.load("capitals", ["country", "city"])
    with pytest.raises(ValueError, match="Did you mean 'country'"):
        data.load("capitals", "contry")


def test_the_hubs_errors_are_told_apart(monkeypatch):
    import datasets

    monkeypatch.setattr(data, "hub_problem", lambda: "")

    def says(error):
        def load_dataset(*args, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    says(RuntimeError("Dataset scripts are no longer supported, but found x.py"))
    with pytest.raises(ValueError, match="is a program.*refs/convert/parquet"):
        data.load("some/x")
    says(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left") as caught:
        data.load("some/x")
    assert not isinstance(caught.value, FetchError)
    broken = datasets.exceptions.DatasetGenerationError("An error occurred")
    broken.__cause__ = OSError(28, "No space left on device")
    says(broken)
    with pytest.raises(OSError, match="No space left"):
        data.load("some/x")
    says(datasets.exceptions.DatasetNotFoundError("Dataset 'some/x' doesn't exist"))
    with pytest.raises(FetchError, match="no dataset 'some/x'.*DatasetNotFoundError"):
        data.load("some/x")


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


@pytest.mark.parametrize("fractions", [
    (), (0.5, 0.6), (-0.1, 0.5), (6, 5), (1e-9, 0.5), (0, 1), 0.5, None, "ab", ("a",), (None, 1),
    (float("nan"), 0.5)])
def test_split_refuses(fractions):
    with pytest.raises(ValueError, match="fractions"):
        data.split(10, fractions)


def test_split_needs_a_number_or_a_dataset():
    with pytest.raises(TypeError, match="n_or_ds is a Tensor"):
        data.split(torch.zeros(10), (0.5, 0.5))
    with pytest.raises(ValueError, match="stratify = 'label' is a name"):
        data.split(10, (0.5, 0.5), stratify="label")


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


def picture(mode, value, feature=None, **save):
    "A data set of one picture as a PNG (TIFF for floats), 4 wide and 2 high."
    import io

    import datasets
    import PIL.Image

    image = value if isinstance(value, PIL.Image.Image) else PIL.Image.new(mode, (4, 2), value)
    file = io.BytesIO()
    image.save(file, "TIFF" if image.mode in ("F", "I", "CMYK", "LAB", "YCbCr") else "PNG", **save)
    features = datasets.Features(
        image=feature or datasets.Image(), label=datasets.ClassLabel(names=["a"]))
    rows = {"image": [{"bytes": file.getvalue(), "path": None}], "label": [0]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("mode, value, pixel", [
    ("1", 1, [1]), ("L", 51, [0.2]), ("I;16", 65535, [1]), ("I;16", 13107, [0.2]),
    ("F", 0.2, [0.2]), ("RGB", (255, 0, 51), [1, 0, 0.2]),
    ("RGBA", (255, 0, 0, 51), [1, 0, 0, 0.2]),
    ("LA", (255, 51), [1, 0.2]), ("CMYK", (0, 255, 255, 0), [1, 0, 0]),
])
def test_every_kind_of_picture_is_in_0_to_1(mode, value, pixel):
    x, _ = data.as_tensors(picture(mode, value))
    assert x.shape == (1, len(pixel), 2, 4) and x.dtype == torch.float32
    assert torch.allclose(x[0, :, 0, 0], torch.tensor(pixel, dtype=torch.float32), atol=0.01)


def test_palettes_turns_and_modes():
    import PIL.Image
    from datasets import Image

    red = PIL.Image.new("RGB", (4, 2), "red").quantize(4)
    assert data.as_tensors(picture("", red))[0][0, :, 0, 0].tolist() == [1, 0, 0]
    clear = data.as_tensors(picture("", red, transparency=0))[0][0, :, 0, 0]
    assert clear.shape == (4,) and clear[:3].tolist() == [1, 0, 0]
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = picture("RGB", 0, exif=exif)
    assert turned[0]["image"].size == (2, 4) and data.as_tensors(turned)[0].shape == (1, 3, 4, 2)
    grey = picture("RGB", (255, 255, 255), Image(mode="L"))
    assert data.as_tensors(grey)[0].shape == (1, 1, 2, 4)
    assert data.as_tensors(picture("RGB", (255, 255, 255), Image(decode=False)))[0].max() == 1


@pytest.mark.parametrize("mode, value", [("L", 51), ("I;16", 13107), ("F", 0.2), ("LA", (51, 9))])
def test_one_mode_for_all_pictures(mode, value):
    for wanted, channels in (("L", 1), ("RGB", 3)):
        x, _ = data.as_tensors(picture(mode, value), mode=wanted)
        assert x.shape == (1, channels, 2, 4) and torch.allclose(x, torch.full_like(x, 0.2))


def test_what_is_no_picture_or_label_is_named():
    import datasets

    both = datasets.concatenate_datasets([picture("L", 0), picture("RGB", 0)])
    with pytest.raises(ValueError, match="some images have 1 channels, some 3: give mode='RGB'"):
        data.as_tensors(both)
    assert data.as_tensors(both, mode="RGB")[0].shape == (2, 3, 2, 4)
    for value in (7.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="does not lie in"):
            data.as_tensors(picture("F", value))
    with pytest.raises(ValueError, match="mode = 'grey'"):
        data.as_tensors(both, mode="grey")
    one = picture("L", 0)
    none = datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=one.features)
    with pytest.raises(ValueError, match="column 'image', row 0: there is no image"):
        data.as_tensors(none)
    hidden = datasets.Dataset.from_dict(
        {"image": one.cast_column("image", datasets.Image(decode=False))["image"][:],
         "label": [-1]}, features=one.features)  # as in the test sets of competitions
    with pytest.raises(ValueError, match="column 'label', row 0: -1 is no class"):
        data.as_tensors(hidden)
    with pytest.raises(ValueError, match="holds .*not images"):
        data.as_tensors(one, image="label")
