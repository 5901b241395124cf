"""data: properties that hold for all inputs (hypothesis), and bad input."""
import numpy as np
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


# streams

@quick
@given(LABELS, SEEDS)
def test_iid_and_sorted_streams_are_permutations(labels, seed):
    assert is_permutation(data.iid_stream(labels, seed), len(labels))
    stream = data.sorted_stream(labels, seed)
    assert is_permutation(stream, len(labels))
    order = torch.tensor(labels)[stream]
    assert (order.diff() != 0).sum() == len(set(labels)) - 1  # each class in one run


@quick
@given(LABELS, SEEDS, st.floats(0.001, 1000), st.integers(1, 20))
def test_dirichlet_stream_is_a_permutation_and_deterministic(labels, seed, alpha, n_slots):
    stream = data.dirichlet_stream(labels, alpha, n_slots, seed)
    assert is_permutation(stream, len(labels))
    assert torch.equal(stream, data.dirichlet_stream(torch.tensor(labels), alpha, n_slots, seed))


def test_dirichlet_goes_from_sorted_to_iid():
    y = torch.arange(10).repeat_interleave(100)

    def classes_per_window(stream):  # of 20 samples
        return np.mean([len(set(w.tolist())) for w in y[stream].split(20)])

    streams = [data.dirichlet_stream(y, alpha, 50) for alpha in (0.01, 0.3, 1e6)]
    few, some, many = map(classes_per_window, streams)
    iid = classes_per_window(data.iid_stream(y))
    assert few < some < many and abs(many - iid) < 0.5


@quick
@given(st.integers(1, 30), st.floats(0, 5), SEEDS)
def test_zipf_weights(n_classes, a, seed):
    w = data.zipf_weights(n_classes, a, seed)
    assert w.shape == (n_classes,) and abs(w.sum() - 1) < 1e-9 and (w > 0).all()
    falling = w.sort(descending=True).values
    assert torch.allclose(falling / falling[0], torch.arange(1, n_classes + 1).double() ** -a)


@quick
@given(LABELS, SEEDS, st.integers(1, 300), st.data())
def test_label_shift_has_the_shares(labels, seed, n, draw):
    y = torch.tensor(labels)
    size = 7
    weights = [draw.draw(st.floats(0.01, 1)) if c in labels else 0.0 for c in range(size)]
    index = data.label_shift(labels, weights, n, seed)
    assert len(index) == n and torch.equal(index, data.label_shift(labels, weights, n, seed))
    got = y[index].bincount(minlength=size)
    assert ((got - n * torch.tensor(weights) / sum(weights)).abs() < 1 + 1e-3).all()


def test_label_shift_without_replacement():
    y = [0] * 10 + [1] * 3
    index = data.label_shift(y, [0.5, 0.5], 6, replace=False)
    assert len(index.unique()) == 6
    with pytest.raises(ValueError, match="class 1 has 3 samples, not 4"):
        data.label_shift(y, [0.5, 0.5], 8, replace=False)


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


# parts

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
    with pytest.raises(ValueError, match="no such column"):
        data.split(ds, (0.5, 0.5), stratify="class")


@pytest.mark.parametrize("fractions", [(), (0.5, 0.6), (-0.1, 0.5), (6, 5), (1e-9, 0.5), (0, 1)])
def test_split_refuses(fractions):
    with pytest.raises(ValueError, match="fractions"):
        data.split(10, fractions)


# corruptions

IMAGES = st.builds(
    lambda n, c, h, w, seed: torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed)),
    st.integers(1, 4), st.sampled_from([1, 3]), st.integers(4, 20), st.integers(4, 20), SEEDS,
)


@quick
@given(IMAGES, st.sampled_from(list(data.CORRUPTIONS)), st.integers(1, 5), SEEDS)
def test_corruptions_keep_shape_range_input_and_are_deterministic(x, kind, severity, seed):
    before = x.clone()
    out = data.corrupt(x, kind, severity, seed)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(x, before)
    assert torch.equal(out, data.corrupt(x, kind, severity, seed))


@quick
@given(IMAGES, st.sampled_from(["blur", "contrast", "brightness", "pixelate", "rotation"]),
       st.integers(1, 5))
def test_plain_corruptions_treat_images_one_by_one(x, kind, severity):
    alone = torch.cat([data.corrupt(image[None], kind, severity) for image in x])
    assert torch.allclose(data.corrupt(x, kind, severity), alone, atol=1e-6)


def test_corruptions_do_not_touch_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for kind in data.CORRUPTIONS:
        data.corrupt(torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)), kind, 3)
    data.dirichlet_stream([0, 1, 2], 1.0, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_float64_and_float16_images():
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    for kind in data.CORRUPTIONS:
        exact = data.corrupt(x, kind, 2)
        assert exact.dtype == torch.float64
        assert torch.allclose(exact.float(), data.corrupt(x.float(), kind, 2), atol=1e-5)


@pytest.mark.parametrize("bad, message", [
    (torch.full((1, 1, 8, 8), float("nan")), "NaN"),
    (torch.full((1, 1, 8, 8), 255.0), "rescale"),
    (torch.zeros(1, 8, 8), "add axes"),
    (torch.zeros(0, 1, 8, 8), "images must be"),
])
def test_corrupt_refuses_images(bad, message):
    for kind in data.CORRUPTIONS:
        with pytest.raises(ValueError, match=message):
            data.corrupt(bad, kind, 1)


def test_corrupt_refuses_the_rest():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="did you mean 'gaussian_noise'"):
        data.corrupt(x, "gausian_noise", 1)
    for severity in (0, 6, 2.5, True, "3"):
        with pytest.raises(ValueError, match="severity"):
            data.corrupt(x, "blur", severity)
    with pytest.raises(TypeError, match="float tensor"):
        data.corrupt(x.to(torch.uint8), "blur", 1)
    for call in (lambda: data.gaussian_noise(x, -1), lambda: data.blur(x, 0),
                 lambda: data.pixelate(x, 2), lambda: data.contrast(x, float("nan"))):
        with pytest.raises(ValueError, match="must lie between"):
            call()


@pytest.mark.parametrize("call", [
    lambda: data.iid_stream([]),
    lambda: data.sorted_stream([0.5, 1.5]),
    lambda: data.sorted_stream([-1, 0]),
    lambda: data.iid_stream(torch.zeros(2, 2, dtype=torch.long)),
    lambda: data.dirichlet_stream([0, 1], 0.0, 2),
    lambda: data.dirichlet_stream([0, 1], 1.0, 0),
    lambda: data.few_shot([0, 1], 0),
    lambda: data.label_shift([0, 1], [1.0], 5),
    lambda: data.label_shift([0, 1], [1.0, float("nan")], 5),
    lambda: data.label_shift([0, 0], [0.5, 0.5], 5),
    lambda: data.zipf_weights(0),
])
def test_streams_refuse(call):
    with pytest.raises(ValueError):
        call()


# datasets

@pytest.mark.parametrize("name", list(data.SOURCES))
def test_bundled_datasets_are_typed_and_say_where_they_come_from(name):
    ds = data.load(name)
    assert len(ds) > 100 and ds.info.description and ds.info.license and ds.info.homepage
    for column, feature in ds.features.items():
        assert type(feature).__name__ in ("Value", "ClassLabel", "Image"), column


def test_known_contents():
    x, y = data.as_tensors(data.load("mnist5k"))
    assert x.shape == (5000, 1, 28, 28) and y.bincount().tolist() == [500] * 10
    assert data.as_tensors(data.load("digits"))[0].shape == (1797, 1, 8, 8)
    traffic = data.load("traffic").to_pandas()
    assert (traffic.datetime.diff().dropna().dt.total_seconds() == 3600).all()
    sensors = data.load("sensor_series")
    names = sensors.features["series"].names
    for label, series in sensors.to_pandas().groupby("series"):  # each regular in time
        step = {"appliances": 600, "mountain_temp": 300}.get(names[label], 3600)
        assert (series["time"].diff().dropna().dt.total_seconds() == step).all(), names[label]
        assert series["value"].isna().mean() < 0.05 and series["value"].std() > 0
    facts = {r["country"]: r for r in data.load("capitals")}
    assert len(facts) > 100 and facts["Japan"]["capital"] == "Tokyo"
    assert all(r["capital"] and r["language"] and r["continent"] for r in facts.values())
    names = data.load("cldr_territories").to_pandas()
    assert not names.duplicated(["code", "language"]).any()
    assert (names[names.language == "en"].name == names[names.language == "en"].english).all()


def test_load_refuses():
    with pytest.raises(ValueError, match="give one of"):
        data.load("")
    with pytest.raises(TypeError, match="takes no options"):
        data.load("digits", split="train")
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


def test_damaged_dataset_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))
    data.load("sunspots")
    arrow, = tmp_path.glob("data/sunspots-*/arrow/*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is corrupt"):
        assert len(data.load("sunspots")) == 309


def test_statsmodels_missing(tmp_path, monkeypatch):
    import sys

    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "statsmodels.datasets.co2", None)
    with pytest.raises(ImportError, match=r"adaptlab\[lab\]"):
        data.load("co2")


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


class Bytes:
    "One token per byte."

    def __call__(self, texts, **options):
        return {"input_ids": [list(t.encode()) for t in texts]}


@quick
@given(st.lists(st.text(max_size=20), min_size=1, max_size=10), st.integers(1, 30))
def test_token_chunks(texts, length):
    stream = list("".join(t + "\n\n" for t in texts).encode())
    if len(stream) < length:
        with pytest.raises(ValueError, match="too few"):
            data.token_chunks(texts, Bytes(), length)
    else:
        chunks = data.token_chunks(texts, Bytes(), length)
        assert chunks.dtype == torch.int64 and chunks.shape[1] == length
        assert chunks.flatten().tolist() == stream[: chunks.numel()]
        assert len(stream) - chunks.numel() < length


def test_token_chunks_refuses():
    with pytest.raises(TypeError, match=r"give \[text\]"):
        data.token_chunks("one text", Bytes(), 4)
    with pytest.raises(ValueError, match="length"):
        data.token_chunks(["text"], Bytes(), 0)
