"""shifts: properties that hold for all inputs (hypothesis), and bad input."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptlab import shifts

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=200)
SEEDS = st.integers(0, 2**32 - 1)
quick = settings(max_examples=40, deadline=None)


def is_permutation(index, n):
    return index.dtype == torch.int64 and torch.equal(index.sort().values, torch.arange(n))


# streams

@quick
@given(LABELS, SEEDS)
def test_iid_and_sorted_streams_are_permutations(labels, seed):
    assert is_permutation(shifts.iid_stream(labels, seed), len(labels))
    stream = shifts.sorted_stream(labels, seed)
    assert is_permutation(stream, len(labels))
    order = torch.tensor(labels)[stream]
    assert (order.diff() != 0).sum() == len(set(labels)) - 1  # each class in one run


@quick
@given(LABELS, SEEDS, st.integers(1, 300), st.data())
def test_label_shift_has_the_shares(labels, seed, n, draw):
    y = torch.tensor(labels)
    size = 7
    weights = [draw.draw(st.floats(0.01, 1)) if c in labels else 0.0 for c in range(size)]
    index = shifts.label_shift(labels, weights, n, seed)
    assert len(index) == n and torch.equal(index, shifts.label_shift(labels, weights, n, seed))
    got = y[index].bincount(minlength=size)
    assert ((got - n * torch.tensor(weights) / sum(weights)).abs() < 1 + 1e-3).all()


def test_label_shift_without_replacement():
    y = [0] * 10 + [1] * 3
    index = shifts.label_shift(y, [0.5, 0.5], 6, replace=False)
    assert len(index.unique()) == 6
    with pytest.raises(ValueError, match="class 1 has 3 samples, not 4"):
        shifts.label_shift(y, [0.5, 0.5], 8, replace=False)


@pytest.mark.parametrize("seed", range(5))
def test_zipf_shares(seed):
    for n_classes in (2, 10, 1000):
        shares = shifts.zipf_shares(n_classes, seed=seed)
        assert shares.shape == (n_classes,) and (shares > 0).all()
        torch.testing.assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64))
        assert shares.sort().values[-max(1, n_classes // 10) :].sum() < 0.9
    assert torch.equal(shifts.zipf_shares(10, seed=seed), shifts.zipf_shares(10, seed=seed))
    strict = shifts.zipf_shares(100, seed, top=0.2, most=0.8)
    assert strict.sort().values[-20:].sum() < 0.8


def test_streams_by_name():
    labels = torch.arange(6).repeat(20)
    for n in (None, 50):
        iid = shifts.stream_order(labels, "iid", n, seed=1)
        grouped = shifts.stream_order(labels, "class", n, seed=1)
        assert set(iid.tolist()) == set(grouped.tolist()) and len(iid) == (n or 120)
        assert (labels[grouped].diff() != 0).sum() == 5
    video = torch.arange(120) // 30
    by_video = shifts.stream_order(labels, "video", seed=2, groups={"video": video})
    assert (video[by_video].diff() != 0).sum() == 3
    shifted = shifts.stream_order(labels, "iid+zipf", seed=3)
    assert labels[shifted].bincount(minlength=6).max() > 2 * 20
    sparse = torch.tensor([0, 7] * 20)  # classes that do not occur get no share
    assert set(sparse[shifts.stream_order(sparse, "class+zipf")].tolist()) <= {0, 7}


@pytest.mark.parametrize("message, call", [
    ("stream 'sorted'", lambda: shifts.stream_order(torch.arange(4), "sorted")),
    ("stream 'iid.pareto'", lambda: shifts.stream_order(torch.arange(4), "iid+pareto")),
    ("raise `most`", lambda: shifts.zipf_shares(10, most=0.1)),
    ("corruptions are", lambda: shifts.parse_shift("fog-2")),
    ("corruptions are", lambda: shifts.parse_shift("blur-6")),
    ("corruptions are", lambda: shifts.parse_shift("clean+")),
])
def test_names_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


# corruptions

IMAGES = st.builds(
    lambda n, c, h, w, seed: torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed)),
    st.integers(1, 4), st.sampled_from([1, 3]), st.integers(4, 20), st.integers(4, 20), SEEDS,
)


@quick
@given(IMAGES, st.sampled_from(list(shifts.CORRUPTIONS)), st.integers(1, 5), SEEDS)
def test_corruptions_keep_shape_range_input_and_are_deterministic(x, kind, severity, seed):
    before = x.clone()
    out = shifts.corrupt(x, kind, severity, seed)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(x, before)
    assert torch.equal(out, shifts.corrupt(x, kind, severity, seed))


@quick
@given(IMAGES, st.sampled_from(["blur", "contrast", "brightness", "pixelate", "rotation"]),
       st.integers(1, 5))
def test_plain_corruptions_treat_images_one_by_one(x, kind, severity):
    alone = torch.cat([shifts.corrupt(image[None], kind, severity) for image in x])
    assert torch.allclose(shifts.corrupt(x, kind, severity), alone, atol=1e-6)


def test_corruptions_do_not_touch_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for kind in shifts.CORRUPTIONS:
        shifts.corrupt(torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)), kind, 3)
    assert torch.equal(state, torch.get_rng_state())


def test_named_shifts():
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([5, 2, 9, 4])
    assert shifts.parse_shift("clean+shot_noise-3") == [None, ("shot_noise", 3)]
    assert torch.equal(shifts.named_shift(x, "clean", index), x)
    out, before = shifts.named_shift(x, "blur-2+shot_noise-3", index), x.clone()
    torch.testing.assert_close(out[[1, 3]], shifts.corrupt(x[[1, 3]], "blur", 2))
    for row in (0, 2):  # the noise depends on the image's number alone
        expected = shifts.corrupt(x[row][None], "shot_noise", 3, seed=int(index[row]))
        assert torch.equal(out[row][None], expected)
    assert torch.equal(x, before)


def test_float64_and_float16_images():
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    for kind in shifts.CORRUPTIONS:
        exact = shifts.corrupt(x, kind, 2)
        assert exact.dtype == torch.float64
        assert torch.allclose(exact.float(), shifts.corrupt(x.float(), kind, 2), atol=1e-5)


@pytest.mark.parametrize("bad, message", [
    (torch.full((1, 1, 8, 8), float("nan")), "NaN"),
    (torch.full((1, 1, 8, 8), 255.0), "rescale"),
    (torch.zeros(1, 8, 8), "add axes"),
    (torch.zeros(0, 1, 8, 8), "images must be"),
])
def test_corrupt_refuses_images(bad, message):
    for kind in shifts.CORRUPTIONS:
        with pytest.raises(ValueError, match=message):
            shifts.corrupt(bad, kind, 1)


def test_corrupt_refuses_the_rest():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="did you mean 'gaussian_noise'"):
        shifts.corrupt(x, "gausian_noise", 1)
    for severity in (0, 6, 2.5, True, "3"):
        with pytest.raises(ValueError, match="severity"):
            shifts.corrupt(x, "blur", severity)
    with pytest.raises(TypeError, match="float tensor"):
        shifts.corrupt(x.to(torch.uint8), "blur", 1)
    for call in (lambda: shifts.gaussian_noise(x, -1), lambda: shifts.blur(x, 0),
                 lambda: shifts.pixelate(x, 2), lambda: shifts.contrast(x, float("nan"))):
        with pytest.raises(ValueError, match="must lie between"):
            call()


@pytest.mark.parametrize("call", [
    lambda: shifts.iid_stream([]),
    lambda: shifts.sorted_stream([0.5, 1.5]),
    lambda: shifts.sorted_stream([-1, 0]),
    lambda: shifts.iid_stream(torch.zeros(2, 2, dtype=torch.long)),
    lambda: shifts.label_shift([0, 1], [1.0], 5),
    lambda: shifts.label_shift([0, 1], [1.0, float("nan")], 5),
    lambda: shifts.label_shift([0, 0], [0.5, 0.5], 5),
])
def test_streams_refuse(call):
    with pytest.raises(ValueError):
        call()
