# SPDX-License-Identifier: Apache-2.0
"""The Climate Data Store's tables, by hand and through cdsapi with its transfer replaced."""

import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest

from ddo_modulus.errors import InputError

pytest.importorskip("cdsapi")
pytest.importorskip("earth2studio")

from ddo_modulus.earth2.sources import CdsSource  # noqa: E402

NOON = np.array(["2018-11-02T12:00"], "datetime64[ns]")
OLD = {
    "report_timestamp": "date_time",
    "height_of_station_above_sea_level": "height",
}
NAMES = {
    "t": "air_temperature",
    "td": "dew_point_temperature",
    "speed": "wind_speed",
    "direction": "wind_from_direction",
    "p": "air_pressure",
    "msl": "air_pressure_at_sea_level",
}
UNITS = {"t": "K", "td": "K", "speed": "m s-1", "direction": "degree", "p": "Pa", "msl": "Pa"}


def table_of(reports):
    """Reports as the store's table: a row for each value."""
    parts = []
    for quantity, name in NAMES.items():
        part = pd.DataFrame(
            {
                "observation_id": [f"{i}-{name}" for i in range(len(reports))],
                "report_timestamp": reports["time"].dt.strftime("%Y-%m-%d %H:%M:%S+00:00"),
                "longitude": reports["lon"],
                "latitude": reports["lat"],
                "height_of_station_above_sea_level": reports["elev"],
                "observed_variable": name,
                "units": UNITS[quantity],
                "observation_value": reports[quantity],
                "primary_station_id": reports["station"],
                "quality_flag": 0,
                "report_type": "SYNOP",
            }
        )
        parts.append(part)
    return pd.concat(parts).dropna(subset="observation_value")


@pytest.fixture(scope="session")
def store_file(synop_reports, tmp_path_factory):
    """Real reports as a zip file of the store."""
    table = table_of(synop_reports.drop_duplicates(["station", "lat"]))
    folder = tmp_path_factory.mktemp("store")
    table.to_csv(folder / "data.csv", index=False)
    path = folder / "download.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "data.csv", "# a comment of the store\n" + (folder / "data.csv").read_text()
        )
    return path


@pytest.mark.shared_data
def test_real_reports_come_back(store_file, synop_file):
    from earth2studio.data.utils import fetch_dataframe

    from ddo_modulus.earth2.sources import BufrSource

    variables = ["t2m", "d2m", "r2m", "u10m", "v10m", "sp", "msl"]
    rows = fetch_dataframe(CdsSource(store_file), NOON, np.array(variables))
    by = ["station", "lat", "variable"]
    expected = BufrSource(synop_file)(NOON, variables).drop_duplicates(by)
    both = rows.merge(expected, on=by, suffixes=("", "_bufr"))
    reported = expected["variable"] != "r2m"  # some of these are in the BUFR file only
    assert len(both) >= reported.sum()
    np.testing.assert_allclose(both["observation"], both["observation_bufr"], rtol=1e-4, atol=1e-3)
    assert (rows["quality"].dropna() == 0).all() and rows["elev"].notna().mean() > 0.9


@pytest.mark.shared_data
def test_a_day_is_retrieved_once(store_file, monkeypatch):
    import cdsapi

    monkeypatch.setenv("CDSAPI_URL", "https://cds.climate.copernicus.eu/api")
    monkeypatch.setenv("CDSAPI_KEY", "1:2")
    requests = []

    def retrieve(self, name, request, target=None):
        assert name == "insitu-observations-surface-land"
        requests.append(request)
        shutil.copy(store_file, target)

    monkeypatch.setattr(cdsapi.Client, "retrieve", retrieve)
    source = CdsSource(area=(60, -10, 40, 10))
    rows = source(NOON, ["u10m", "t2m"])
    assert set(rows["variable"]) >= {"t2m", "u10m"}
    assert len(source(NOON, ["u10m", "t2m"])) == len(rows) and len(requests) == 1
    assert requests[0] == {
        "time_aggregation": "sub_daily",
        "variable": ["air_temperature", "wind_speed", "wind_from_direction"],
        "year": "2018",
        "month": "11",
        "day": "02",
        "data_format": "csv",
        "area": [60, -10, 40, 10],
    }


def made(tmp_path, **changes):
    """A small table of a file's own."""
    row = {
        "report_timestamp": ["2018-11-02 12:00:00+00:00"] * 2,
        "latitude": [50.0, 51.0],
        "longitude": [-1.0, 2.0],
        "observed_variable": ["air temperature"] * 2,
        "observation_value": [10.0, 11.0],
        "units": ["degC"] * 2,
        "quality_flag": ["Passed", "Failed"],
        "primary_station_id": ["a", "b"],
    } | changes
    path = tmp_path / "table.csv"
    pd.DataFrame({k: v for k, v in row.items() if v is not None}).to_csv(path, index=False)
    return path


def test_units_and_flags_are_understood(tmp_path):
    rows = CdsSource(made(tmp_path))(NOON, "t2m")
    assert rows["observation"].tolist() == pytest.approx([283.15, 284.15])
    assert rows["quality"].tolist() == [0, 1]
    assert rows["lon"].tolist() == [359.0, 2.0]
    path = made(tmp_path, observed_variable=["wind_speed"] * 2, units=["kt", "kt"])
    assert CdsSource(path)(NOON, "ws10m")["observation"].tolist() == pytest.approx(
        [5.1444, 5.6589], abs=1e-3
    )


def test_the_columns_of_before_the_renewal(tmp_path):
    path = made(tmp_path, report_timestamp=None, date_time=["2018-11-02 12:10:00+00:00"] * 2)
    rows = CdsSource(path)(NOON, "t2m")
    assert (rows["time"] == pd.Timestamp("2018-11-02T12:10")).all()


def test_two_instruments_at_a_station_are_two_observations(tmp_path):
    path = made(tmp_path, primary_station_id=["a", "a"], latitude=[50.0] * 2, longitude=[1.0] * 2)
    assert sorted(CdsSource(path)(NOON, "t2m")["observation"]) == pytest.approx([283.15, 284.15])


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="units 'f' of t; convert the table to one of degc"):
        CdsSource(made(tmp_path, units=["F", "F"]))(NOON, "t2m")
    with pytest.raises(InputError, match="no column units; it has report_timestamp"):
        CdsSource(made(tmp_path, units=None))(NOON, "t2m")
    with pytest.raises(InputError, match="unknown variable t850"):
        CdsSource(made(tmp_path))(NOON, "t850")
    with pytest.raises(InputError, match="no such file"):
        CdsSource(tmp_path / "none.zip")(NOON, "t2m")
    with pytest.raises(InputError, match="area is"):
        CdsSource(area=(40, -10, 60, 10))
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.csv", "a,b\n" * 1000)
    (tmp_path / "cut.zip").write_bytes(whole.read_bytes()[:60])
    with pytest.raises(InputError, match=r"cut\.zip"):
        CdsSource(tmp_path / "cut.zip")(NOON, "t2m")
    for name in ("CDSAPI_URL", "CDSAPI_KEY", "CDSAPI_RC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"no key for the Climate Data Store; write .*cdsapirc"):
        CdsSource()(NOON, "t2m")
