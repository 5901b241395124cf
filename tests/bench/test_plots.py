"""The recurring plots: what they draw, what they leave alone, and what they refuse."""

import io
import re
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from adaptlab.bench import plots


@pytest.fixture(autouse=True)
def clean():
    with plt.rc_context():
        plots.use_style()
        yield
        plt.close("all")


@pytest.fixture
def runs():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [(m, s, t, rng.random()) for m in "ab" for s in range(3) for t in (0, 10, 20)],
        columns=["method", "seed", "step", "loss"],
    )


@pytest.fixture
def points():
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {"bytes": rng.random(12), "acc": rng.random(12), "name": [f"model {i}" for i in range(12)]}
    )


def test_style_needs_no_font_that_could_be_missing(recwarn):
    fig, ax = plt.subplots()
    ax.set_title("αβγ → θ₁ − θ₂ ± ‖τ‖ ≤ ½")
    fig.canvas.draw()
    assert not [w for w in recwarn if "lyph" in str(w.message) or "font" in str(w.message)]


def test_figures_are_opaque_and_not_huge(tmp_path, runs):
    ax = plots.curves(runs, "step", "loss", "method")
    ax.figure.savefig(tmp_path / "a.png")
    image = plt.imread(tmp_path / "a.png")
    assert image.shape[-1] == 3 or (image[..., 3] == 1).all()
    assert 600 < image.shape[1] < 1000 and (tmp_path / "a.png").stat().st_size < 100_000


@pytest.mark.parametrize("interval", ["t", "range"])
def test_curves_band(runs, interval):
    ax = plots.curves(runs, "step", "loss", "method", interval=interval)
    values = runs[(runs.method == "b") & (runs.step == 10)]["loss"]
    low, high = values.min(), values.max()
    if interval == "t":
        low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    path = ax.collections[1].get_paths()[0].vertices
    at = path[path[:, 0] == 10, 1]
    assert np.isclose(at.min(), low) and np.isclose(at.max(), high)
    assert np.isclose(ax.lines[1].get_ydata()[1], values.mean())
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]


def test_curves_of_one_seed_have_no_t_band(runs):
    ax = plots.curves(runs[runs.seed == 0], "step", "loss", "method")
    vertices = [p.vertices[:, 1] for c in ax.collections for p in c.get_paths()]
    assert not vertices or np.isnan(np.concatenate(vertices)).all()


def test_curves_with_many_lines_differ_in_dash_and_colour():
    df = pd.DataFrame([(m, t, m * t) for m in range(8) for t in range(3)], columns=["m", "x", "y"])
    ax = plots.curves(df, "x", "y", "m", band=None)
    looks = {(line.get_color(), line.get_linestyle(), line._dash_pattern[0]) for line in ax.lines}
    assert len(ax.lines) == 8 and len({look[0] for look in looks}) == 8


def test_curves_refuses(runs):
    with pytest.raises(ValueError, match=r"no column \['lr'\].*'step'"):
        plots.curves(runs, "step", "lr")
    with pytest.raises(ValueError, match="two values of 'loss'"):
        plots.curves(runs, "step", "loss")
    with pytest.raises(ValueError, match="must be 't' or 'range'"):
        plots.curves(runs, "step", "loss", "method", interval="sd")
    with pytest.raises(ValueError, match="must hold numbers"):
        plots.curves(runs, "method", "loss")
    with pytest.raises(ValueError, match="empty"):
        plots.curves(runs[:0], "step", "loss")
    with pytest.raises(TypeError, match="DataFrame"):
        plots.curves([1, 2], "step", "loss")
    with pytest.raises(TypeError, match="Axes"):
        plots.curves(runs, "step", "loss", "method", ax=plt.figure())


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def test_differences_colours_say_on_which_side_of_zero():
    found = {"a": Estimate(2, 1, 3), "b": Estimate(-2, -3, -1), "c": Estimate(1, -1, 3)}
    for lower, colors in ((False, ("blue", "vermillion")), (True, ("vermillion", "blue"))):
        ax = plots.differences(found, lower=lower)
        dots = [x.get_color() for x in ax.lines if x.get_solid_capstyle() == "butt"]
        assert dots == [plots.COLORS[c] for c in (*colors, "grey")]
        assert ("\N{LEFTWARDS ARROW} better" in ax.get_xlabel()) == lower
    assert [t.get_text() for t in ax.texts][1] == "-2.00 [-3.00, -1.00]"
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first comparison is not on top"


def test_differences_of_one_pair_has_no_whisker_and_decides_nothing():
    ax = plots.differences({"a": Estimate(2, np.nan, np.nan)})
    (dot,) = [x for x in ax.lines if x.get_marker() == "o"]
    assert dot.get_markeredgecolor() == plots.COLORS["grey"]
    assert dot.get_markerfacecolor() == "white" and ax.texts[0].get_text() == "+2.00 (one pair)"


def test_differences_touching_zero_decides_nothing():
    ax = plots.differences({"a": Estimate(1, 0, 2)})
    assert ax.lines[0].get_color() == plots.COLORS["grey"]


def test_differences_refuses():
    with pytest.raises(ValueError, match="no difference"):
        plots.differences({})
    with pytest.raises(TypeError, match="'a': an estimate with value, low and high"):
        plots.differences({"a": 1.0})
    with pytest.raises(ValueError, match="lie in"):
        plots.differences({"a": Estimate(1, 2, 3)})


def _line(slope):
    fig, ax = plt.subplots()
    ax.plot([0, 1], [0, slope])
    ax.set_ylabel("y" * (1 + int(slope)))
    return fig


def test_worth_is_a_tradeoff_beside_differences(points):
    shown = {"a over b": Estimate(1.0, 0.5, 1.5)}
    fig = plots.worth(points, *points.columns[:2], shown, xlim=(1, 10), label=points.columns[2])
    left, right = fig.axes
    assert left.get_xscale() == "log" and left.get_xlim() == (1, 10)
    assert len(right.get_yticks()) == 1
    with pytest.raises(ValueError, match="no difference"):
        plots.worth(points, *points.columns[:2], {}, xlim=(1, 10), label=points.columns[2])


def test_slider_has_a_picture_of_one_size_for_every_value():
    made = plots.slider(_line, slope=[0, 0.5, 4.0, 10])
    assert made.texts == ("0", "0.5", "4", "10") and made.label == "slope" and made.middle == 2
    sizes = {plt.imread(io.BytesIO(p), format="png").shape[:2] for p in made.pictures}
    assert len(sizes) == 1 and len(set(made.pictures)) == 4
    assert not plt.get_fignums(), "a figure was left open: the notebook would show it too"


def test_slider_without_script_or_style_is_a_list_of_folded_figures():
    page = plots.slider(_line, label="slope <m>", slope=[0, 1, 2])._repr_mimebundle_()
    assert set(page) == {"text/html", "image/png", "text/plain"}
    bare = re.sub(r"<(style|script)>.*?</\1>", "", page["text/html"], flags=re.S)
    assert bare.count("<details") == bare.count("<summary>slope &lt;m&gt;: <b>") == 3
    assert re.findall(r'<details[^>]* open><summary>[^<]*<b>(.)', bare) == ["1"]
    # an attribute without a value is taken away by JupyterLab's filter
    assert 'class="al-bar" hidden="hidden"' in bare, "a slider that nothing moves must not be seen"
    assert re.search(f'class="al-middle" open>.*?base64,{re.escape(page["image/png"])}', bare)
    assert not re.search(r"https?:|//", re.sub(r"base64,[^\"]*", "", bare))


def test_sliders_of_different_content_have_different_names():
    names = {plots.slider(_line, slope=v).html().split('"')[1] for v in ([0, 1], [0, 2], [0, 1])}
    assert len(names) == 2, "the name must follow from the content: the same in every run"


def test_slider_refuses():
    with pytest.raises(ValueError, match="one name"):
        plots.slider(_line)
    with pytest.raises(ValueError, match="one name"):
        plots.slider(_line, a=[1, 2], b=[1, 2])
    with pytest.raises(ValueError, match="two values"):
        plots.slider(_line, slope=[1])
    with pytest.raises(TypeError, match="must return a matplotlib figure or axes, got int"):
        plots.slider(abs, slope=[1, 2])


@pytest.mark.parametrize("kind", ["array", "tensor", "bf16", "list", "frame"])
def test_heatmap_takes_any_matrix(kind):
    matrix = np.array([[0.0, 0.5], [1.0, np.nan]])
    given = {
        "array": matrix,
        "tensor": torch.tensor(matrix, requires_grad=True),
        "bf16": torch.tensor(matrix, dtype=torch.bfloat16),
        "list": matrix.tolist(),
        "frame": pd.DataFrame(matrix),
    }[kind]
    ax = plots.layer_heatmap(given, ["a", "b"], ["c", "d"])
    assert sorted(t.get_text() for t in ax.texts) == ["0.00", "0.50", "1.00"]


def test_heatmap_center_is_white_and_large_ones_are_not_written():
    ax = plots.layer_heatmap(np.array([[-1.0, 4.0]]), ["a"], ["b", "c"], center=1.0)
    low, high = ax.images[0].get_clim()
    assert (low + high) / 2 == 1.0 and high == 4.0
    ax = plots.layer_heatmap(np.zeros((32, 60)), range(32), range(60), center=0)
    assert not ax.texts and len(ax.get_xticks()) <= 24


def test_heatmap_writes_no_minus_zero():
    ax = plots.layer_heatmap([[-0.001, -0.1]], ["a"], ["b", "c"])
    assert [t.get_text() for t in ax.texts] == ["0.00", "-0.10"]


def test_heatmap_refuses():
    for matrix, match in [
        (np.ones((2, 2)), "1 rows and 2 columns"),
        (np.array([[np.inf, 1]]), "finite"),
        (np.full((1, 2), np.nan), "finite"),
    ]:
        with pytest.raises(ValueError, match=match):
            plots.layer_heatmap(matrix, ["a"], ["b", "c"])
    with pytest.raises(ValueError, match="either center or limits"):
        plots.layer_heatmap([[1, 2]], ["a"], ["b", "c"], center=0, limits=(0, 1))


def test_tradeoff_labels_do_not_overlap(points):
    ax = plots.tradeoff(points, "bytes", "acc", "name")
    boxes = [t.get_window_extent() for t in ax.texts]
    frame = ax.get_window_extent()
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(frame.containsx(b.x0) and frame.containsx(b.x1) for b in boxes)


def test_tradeoff_of_72_anonymous_points_and_stars(points):
    many = pd.concat([points] * 6, ignore_index=True).assign(name="")
    many.loc[3, "name"], many.loc[9, "name"] = "soup", None
    many.index = [0] * len(many)  # a concatenated table has such an index
    ax = plots.tradeoff(many, "bytes", "acc", "name", highlight=iter(["soup"]))
    assert [t.get_text() for t in ax.texts] == ["soup"]
    assert [len(c.get_offsets()) for c in ax.collections] == [71, 1]


def test_tradeoff_whiskers_and_groups(points):
    df = points.assign(acc_low=points.acc - 0.1, acc_high=points.acc + 0.1, kind=list("ab") * 6)
    ax = plots.tradeoff(df, "bytes", "acc", "name", hue="kind")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert any(isinstance(c, matplotlib.collections.LineCollection) for c in ax.collections)


def test_tradeoff_refuses(points):
    with pytest.raises(ValueError, match="there is no such name"):
        plots.tradeoff(points, "bytes", "acc", "name", highlight=["ours"])
    with pytest.raises(ValueError, match="finite"):
        plots.tradeoff(points.assign(acc=np.nan), "bytes", "acc", "name")


def test_nothing_is_shown(monkeypatch, runs):
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show was called"))
    plots.curves(runs, "step", "loss", "method")


def test_input_tables_are_left_alone(runs, points):
    before = runs.copy(), points.copy()
    plots.curves(runs.drop(columns="seed").drop_duplicates(["method", "step"]), "step", "loss",
                 "method", band=None)
    plots.tradeoff(points, "bytes", "acc", "name")
    pd.testing.assert_frame_equal(runs, before[0])
    pd.testing.assert_frame_equal(points, before[1])
