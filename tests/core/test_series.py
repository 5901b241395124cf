"""Series: tables to windows, nothing of the future in them, errors of the right channels."""

import math
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptlab.series import (
    TableWindows,
    Windows,
    evaluate,
    few_shot_split,
    join_series,
    load_series,
    minutes,
    seasonal_naive,
    split_by_time,
    time_step,
)


def table(n=400, freq="h"):
    rng = np.random.default_rng(0)
    index = pd.date_range("2024-01-01", periods=n, freq=freq)
    return pd.DataFrame({"y": np.sin(np.arange(n) / 4) + 0.1 * rng.normal(size=n),
                         "z": rng.normal(size=n)}, index=index)


def windows_of(frame=None, targets=("y",), **options):
    return TableWindows(table() if frame is None else frame, targets,
                        **{"context": 48, "horizon": 12, **options})


class Line(nn.Module):
    "A linear forecaster of every channel, with dropout."

    def __init__(self, context=48, horizon=12):
        super().__init__()
        self.dropout, self.map = nn.Dropout(0.5), nn.Linear(context, horizon)

    def forward(self, past_values, **other):
        return self.map(self.dropout(past_values.mT)).mT


# ------------------------------------------------------------------ tables and times


def test_rows_are_put_in_order_before_gaps_are_filled(tmp_path):
    t = pd.date_range("2024", periods=6, freq="h")
    pd.DataFrame({"date": t[[0, 3, 1, 2, 4, 5]], "y": [0, 3, None, 2, 4, 5]}).to_csv(
        tmp_path / "a.csv", index=False)
    found = load_series(str(tmp_path / "a.csv"))[0]
    assert found["y"].tolist() == [0, 1, 2, 3, 4, 5]
    assert time_step(found.index) == timedelta(hours=1)
    late = t[[0, 1, 3, 3]]  # by time, not by place: and a time that occurs twice
    pd.DataFrame({"date": late, "y": range(4)}).to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ValueError, match="twice"):
        load_series(str(tmp_path / "b.csv"))
    uneven = pd.DataFrame({"date": t[[0, 1, 5]], "y": [0, None, 5]})
    uneven.to_csv(tmp_path / "c.csv", index=False)
    assert load_series(str(tmp_path / "c.csv"))[0]["y"].tolist() == [0, 1, 5]


def test_long_tables_keep_their_series_apart(tmp_path):
    hours, days_ = (pd.date_range("2024", periods=4, freq=f) for f in ("h", "D"))
    times = [t for pair in zip(hours, days_, strict=True) for t in pair]
    table = pd.DataFrame({"series": ["a", "b"] * 4, "time": times,
                          "value": [0, 10, 1, 11, 2, 12, 3, 13]})
    table[::-1].to_csv(tmp_path / "long.csv", index=False)
    b, a = load_series(str(tmp_path / "long.csv"))
    assert a["a"].tolist() == [0, 1, 2, 3] and b["b"].tolist() == [10, 11, 12, 13]
    assert (time_step(a.index), time_step(b.index)) == (timedelta(hours=1), timedelta(days=1))
    assert load_series(str(tmp_path / "long.csv"), ["a"])[0]["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no column 'c'"):
        load_series(str(tmp_path / "long.csv"), ["c"])


def test_times_are_not_guessed(tmp_path):
    def read(times):
        pd.DataFrame({"time": times, "y": range(len(times))}).to_csv(
            file := tmp_path / f"{hash(str(times))}.csv", index=False)
        return load_series(str(file))[0].index

    for numbers in ([1700000000, 1700003600], [20240101, 20240102], [0.5, 1.5]):
        with pytest.raises(ValueError, match="times are numbers"):
            read(numbers)
    for text in (["03/04/2024", "04/05/2024"], ["31.01.2024", "01.02.2024"], ["soon", "later"]):
        with pytest.raises(ValueError, match="ISO8601"):
            read(text)
    assert read(["2024-01-31", "2024-02-01"])[1] == pd.Timestamp(2024, 2, 1)
    berlin = pd.date_range("2024-03-30", periods=48, freq="h", tz="Europe/Berlin")
    found = read([t.isoformat() for t in berlin])
    assert minutes(time_step(found)) == 60 and (found == berlin).all()


def test_one_series_per_row(tmp_path):
    hours = [str(t) for t in pd.date_range("2024", periods=3, freq="h")]
    pd.DataFrame([{"id": k, "timestamp": hours, "target": [k, k + 1.0, k + 2.0]} for k in (0, 5)]
                 ).to_parquet(tmp_path / "rows.parquet")
    a, b = load_series(str(tmp_path / "rows.parquet"))
    assert a["target"].tolist() == [0, 1, 2] and b["target"].tolist() == [5, 6, 7]


def test_classes_are_not_numbers():
    with pytest.raises(ValueError, match="weather_main.*numbers.*zeros and ones"):
        load_series("traffic", ["traffic_volume"], ["weather_main"])
    with pytest.raises(ValueError, match="no_such_column"):
        load_series("traffic", ["no_such_column"])
    assert "weather_main" not in load_series("traffic")[0]


@pytest.mark.parametrize("freq, wanted", [
    ("h", 60), ("15min", 15), (60, 60), (60.0, 60), (np.int64(60), 60), (".5h", 30),
    ("W-SUN", 10080), ("90s", 1.5), (timedelta(hours=1), 60), (pd.Timedelta("1h"), 60),
    (np.timedelta64(1, "h"), 60),
    (pd.tseries.frequencies.to_offset("2h"), 120),
])
def test_lengths_of_a_resolution(freq, wanted):
    assert minutes(freq) == wanted


@pytest.mark.parametrize("freq", ["soon", "MS", "", None, True, 0, -5, "0h", "1.2.3h", math.nan,
                                  timedelta(0), timedelta(hours=-1)])
def test_what_has_no_length_is_refused(freq):
    with pytest.raises(ValueError, match="fixed length"):
        minutes(freq)


def test_times_must_be_regular():
    days = pd.date_range("2024-02-01", periods=100, freq="D", tz="Europe/Berlin")
    assert time_step(days) == timedelta(days=1)  # the clock changes on 31 March
    assert time_step(days.to_series().resample("h").asfreq().index) == timedelta(hours=1)
    for index in (days[::-1], days[:1], days[[0, 1, 3]], days.append(days)):
        with pytest.raises(ValueError, match="increase in equal steps"):
            time_step(index)
    with pytest.raises(TypeError, match="DatetimeIndex"):
        windows_of(table().reset_index(drop=True))


# ------------------------------------------------------------------ splits and windows


@settings(max_examples=30, deadline=None)
@given(st.integers(60, 300), st.floats(0.3, 0.8), st.floats(0.05, 0.15), st.integers(1, 15))
def test_a_split_forecasts_every_row_once(n, first, second, context):
    "With a horizon of 1, the parts forecast all rows after the first context, in order."
    frame = pd.DataFrame({"y": np.arange(float(n))}, pd.date_range("2024", periods=n, freq="h"))
    parts = split_by_time(frame, (first, second, 1 - first - second), context)
    seen = [windows_of(p, context=context, horizon=1).fetch_batch(slice(None)) for p in parts]
    assert torch.cat([b["future_values"].flatten() for b in seen]).tolist() == [*range(context, n)]


@pytest.mark.parametrize("shares", [(0.7, 0.3), (0.7, 0.1, 0.1), (1.0, 0.0, 0.0),
                                    (1.2, -0.1, -0.1)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="add up to 1"):
        split_by_time(table(), shares, 48)


def test_a_first_part_shorter_than_the_context_is_refused():
    with pytest.raises(ValueError, match="20 rows to train on"):
        split_by_time(table(100), (0.2, 0.2, 0.6), 48)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 7), st.integers(0, 60))
def test_windows_are_the_rows_of_the_table(context, horizon, stride, extra):
    n = context + horizon + extra
    frame = pd.DataFrame({"y": np.arange(n)}, index=pd.date_range("2024", periods=n, freq="h"))
    ds = TableWindows(frame, ["y"], context=context, horizon=horizon, stride=stride)
    assert len(ds) == extra // stride + 1
    for i in range(len(ds)):
        row = ds[i]
        whole = torch.cat((row["past_values"], row["future_values"])).flatten()
        assert whole.tolist() == list(range(i * stride, i * stride + context + horizon))


def test_a_dataloader_takes_windows():
    ds = windows_of()
    ds.more["step"] = torch.full((len(ds),), 7)
    batch = next(iter(torch.utils.data.DataLoader(ds, batch_size=5)))
    assert batch["past_values"].shape == (5, 48, 1) and batch["step"].tolist() == [7] * 5


def test_what_is_said_of_a_window_goes_with_it():
    ds = windows_of()
    ds.more["number"] = torch.arange(len(ds))
    few = ds.part(torch.tensor([9, 4])).part(slice(1, None))
    assert few[0]["number"] == 4 and torch.equal(few[0]["past_values"], ds[4]["past_values"])
    assert ds.part(ds.more["number"] > 300).more["number"][0] == 301


def test_batches_are_cut_on_the_device():
    ds = windows_of()
    ds.more["number"] = torch.arange(len(ds))
    moved = ds.fetch_batch(torch.tensor([3, 1]), "meta")
    assert {v.device.type for v in moved.values()} == {"meta"} and "number" in moved
    assert list(ds._moved) == [torch.device("meta")]
    kept = ds._moved[torch.device("meta")]
    ds.fetch_batch(slice(0, 4), "meta")
    assert ds._moved == {torch.device("meta"): kept}  # values move once
    assert torch.equal(ds.fetch_batch([3, 1], "cpu")["past_values"][0], ds[3]["past_values"])


def test_windows_share_the_memory_of_the_table():
    ds = windows_of()
    ds.values[100] = 1000
    assert ds[60]["past_values"][40, 0] == 1000


@pytest.mark.parametrize("values, starts, lengths, words", [
    (torch.zeros(20), [0], (3, 2), r"x\[:, None\]"),
    (torch.zeros(20, 1), [0], (0, 2), "at least 1"),
    (torch.zeros(20, 1), [0], (3, 0), "at least 1"),
    (torch.zeros(20, 1), [-2], (3, 2), "leaves the 20 rows"),
    (torch.zeros(20, 1), [16], (3, 2), "leaves the 20 rows"),
    (torch.zeros(20, 1), [], (3, 2), "no window"),
])
def test_windows_outside_of_the_table_are_refused(values, starts, lengths, words):
    with pytest.raises(ValueError, match=words):
        Windows(values, torch.tensor(starts, dtype=torch.long), *lengths)


@pytest.mark.parametrize("targets, options, words", [
    ("y", {}, "lists of columns"),
    (["y"], {"known": "z"}, "lists of columns"),
    (["y"], {"stride": 0}, "stride"),
    ([], {}, "one target"),
    (["x"], {}, "there are"),
    (["y"], {"known": ["y"]}, "once"),
])
def test_columns_that_are_none_are_refused(targets, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        windows_of(targets=targets, **options)


def test_columns_come_in_the_order_that_was_asked_for():
    frame = table()
    values = windows_of(frame, targets=("z", "y")).values
    np.testing.assert_allclose(values.numpy(), frame[["z", "y"]].to_numpy(), rtol=1e-6)


def test_values_that_are_no_numbers_are_refused():
    frame = table()
    for wrong, words in (
        (frame.assign(y=frame["y"].where(frame.index != frame.index[7])), "NaN"),
        (frame.assign(y="sun"), "not numbers"),
        (pd.concat([frame, frame], axis=1), "name each once"),
        (frame[:20], "no window"),
    ):
        with pytest.raises(ValueError, match=words):
            windows_of(wrong)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 4))
def test_no_window_crosses_two_series(lengths, context, horizon):
    parts = [(np.full((n, 2), float(k)), {"series": k}) for k, n in enumerate(lengths)]
    counts = [max(0, n - context - horizon + 1) for n in lengths]
    if not any(counts):
        with pytest.raises(ValueError, match="no series has a window"):
            join_series(parts, context, horizon)
        return
    batch = join_series(parts, context, horizon).fetch_batch(slice(None))
    whole = torch.cat((batch["past_values"], batch["future_values"]), 1)
    assert torch.equal(whole, batch["series"][:, None, None].expand_as(whole).float())
    assert batch["series"].bincount(minlength=len(lengths)).tolist() == counts


def test_few_shots_of_etth():
    "5 % of 8,640 rows alone would not hold a window of 512 + 96."
    ds = Windows(torch.zeros(8640, 7), torch.arange(8640 - 607), 512, 96)
    assert len(few_shot_split(ds, 0.05)) == (8640 - 512) * 5 // 100 - 96 + 1
    for fraction in (0.0, 1.1, 0.005):
        with pytest.raises(ValueError, match="fraction"):
            few_shot_split(ds, fraction)


# ------------------------------------------------------------------ errors


def test_evaluation_by_hand_and_in_batches():
    torch.manual_seed(0)
    model, ds = Line().train(), windows_of()
    one, many = evaluate(model, ds, 7), evaluate(model, ds, 500)
    assert model.training and abs(one.mse - many.mse) < 1e-6
    model.eval()
    batch = ds.fetch_batch(slice(None))
    with torch.no_grad():
        error = model(**batch) - batch["future_values"]
    assert abs(one.mse - float(error.square().mean())) < 1e-5
    assert abs(one.mae - float(error.abs().mean())) < 1e-5
    torch.testing.assert_close(one.by_window, error.square().mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_errors_are_those_of_the_targets():
    ds = windows_of(targets=("y", "z"))
    model = Line()
    model.eval()
    both = evaluate(model, ds)
    first = evaluate(lambda past_values, **other: model(past_values)[..., :1], ds)
    model.targets = [1]
    model.forward = lambda past_values, **other: model.map(past_values[..., 1:].mT).mT
    second = evaluate(model, ds)
    assert abs(both.mse - (first.mse + second.mse) / 2) < 1e-5 and first.mse != second.mse


@pytest.mark.parametrize("shape", [(1, 1), (12, 3), (6, 1)])
def test_forecasts_of_another_shape_are_refused(shape):
    "Nothing is broadcast."
    with pytest.raises(ValueError, match="the model's horizon"):
        evaluate(lambda past_values, **other: torch.zeros(len(past_values), *shape), windows_of())


def test_the_season_comes_again():
    past = torch.arange(24.0)[None, :, None]
    assert seasonal_naive(24, 60)(past)[0, :, 0].tolist() == [t % 24 for t in range(60)]
    assert seasonal_naive(7, 9)(past_values=past)[0, :, 0].tolist() == [*range(17, 24), 17, 18]
    with pytest.raises(ValueError, match="no season of 25"):
        seasonal_naive(25, 3)(past)
