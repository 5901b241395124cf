"""sources: what the bundled datasets are, and that a damaged one is made again."""
import pytest

from adaptlab import data, sources


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
