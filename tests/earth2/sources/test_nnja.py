# SPDX-License-Identifier: Apache-2.0
"""NNJA-AI's own client, on archives in the layout of the buckets."""

import numpy as np
import pandas as pd
import pytest

from ddo_modulus.errors import InputError

pytest.importorskip("nnja_ai")
pytest.importorskip("earth2studio")

from ddo_modulus.earth2.sources import NnjaSource  # noqa: E402
from ddo_modulus.earth2.sources.conversions import station_pressure, wind_components  # noqa: E402

NOON = np.array(["2018-11-02T12:00"], "datetime64[ns]")
DAY = pd.Timestamp("2021-01-01", tz="UTC")


@pytest.mark.shared_data
def test_real_reports_come_back_as_they_went_in(synop_archive):
    from earth2studio.data.base import DataFrameSource
    from earth2studio.data.utils import fetch_dataframe

    folder, table = synop_archive
    source = NnjaSource(base_path=folder)
    assert isinstance(source, DataFrameSource)
    rows = fetch_dataframe(source, NOON, np.array(["t2m", "u10m", "ws10m", "sp", "msl", "d2m"]))
    assert list(rows.columns) == source.SCHEMA.names
    assert (rows["time"] == NOON[0]).all()  # the table of the day has reports of 02 UTC as well
    by = rows.set_index(["station", "lat", "variable"])["observation"].sort_index()
    for column, variable in {
        "TMPSQ1.TMDB": "t2m",
        "TMPSQ1.TMDP": "d2m",
        "PRSSQ1.PRES": "sp",
        "PRSSQ1.PMSL": "msl",
        "WNDSQ1.WSPD": "ws10m",
    }.items():
        there = table[table[column] < 1e11]
        found = rows[rows["variable"] == variable].sort_values(["station", "lat", "observation"])
        there = there.assign(LAT=there["LAT"].astype(np.float32))
        there = there.drop_duplicates(["RPID", "LAT", column])
        expected = there.sort_values(["RPID", "LAT", column])
        assert found["station"].tolist() == expected["RPID"].tolist()
        np.testing.assert_allclose(found["observation"], expected[column], rtol=1e-6)
    assert by.max() > 1e5
    marks = rows[rows["variable"] == "t2m"]["quality"]
    assert set(marks) == {2, 3}
    assert rows["lon"].between(0, 360).all()


@pytest.mark.shared_data
def test_days_are_loaded_whole_and_selected_by_time(synop_archive):
    folder, table = synop_archive
    later = NOON + np.timedelta64(14, "h")
    source = NnjaSource(["synop"], base_path=folder)
    both = source(np.concatenate([NOON, later]), "t2m")
    assert sorted(both["time"].unique()) == [NOON[0], later[0]]
    assert len(both) == 2 * len(source(NOON, "t2m"))
    # Half past noon is within half an hour of noon, but the time window may also be one-sided.
    half_past = NOON + np.timedelta64(30, "m")
    assert len(source(half_past, "t2m")) == len(both) / 2
    early = NnjaSource(
        base_path=folder, time_tolerance=(np.timedelta64(0, "m"), np.timedelta64(1, "h"))
    )
    assert early(half_past, "t2m").empty
    assert list(early(half_past, "t2m").columns) == source.SCHEMA.names


def test_metar_gives_station_pressure_and_has_groups_of_its_own(archive):
    table = pd.DataFrame(
        {
            "OBS_TIMESTAMP": [DAY] * 3,
            "LAT": [40.0, 41.0, 42.0],
            "LON": [-105.0, -74.0, 0.5],
            "SELV": [1600.0, 5.0, 20.0],
            "MTRID.RPID": ["KDEN", "KJFK", "EGLL"],
            "MTRTMP.TMDB": [270.0, 275.0, 1e11],
            "MTRTMP.TMDP": [265.0, 270.0, 278.0],
            "MTRTMP.QMAT": [1.0, 2.0, 2.0],
            "MTRWND.WSPD": [5.0, 6.0, 7.0],
            "MTRWND.WDIR": [90.0, np.nan, 180.0],
            "MTRPRS.ALSE": [101_500.0, 100_900.0, np.nan],
            "MTRPKW.PKWDSP": [20.0, np.nan, np.nan],
        }
    )
    archive.add("conv-adpsfc-NC000007", table)
    rows = NnjaSource(base_path=archive.folder)(DAY.to_datetime64(), ["t2m", "sp", "u10m", "r2m"])
    found = rows.set_index(["station", "variable"])["observation"]
    height, setting = table["SELV"].to_numpy(), table["MTRPRS.ALSE"].to_numpy()
    expected = station_pressure(setting, height)
    np.testing.assert_allclose([found["KDEN", "sp"], found["KJFK", "sp"]], expected[:2], rtol=1e-6)
    assert found["KDEN", "u10m"] == pytest.approx(-5.0)
    assert found["KJFK"].keys().tolist().count("ws10m") == 1 and "u10m" not in found["KJFK"]
    assert "t2m" not in found["EGLL"] and "r2m" not in found["EGLL"] and "sp" not in found["EGLL"]
    assert rows.set_index("station")["lon"]["KDEN"].iloc[0] == pytest.approx(255.0)
    assert set(rows["class"]) == {"metar"} and set(rows["type"]) == {"NC000007"}


@pytest.mark.parametrize(("unit", "scale"), [("Pa", 1), (None, 10), ("hPa", 100)])
def test_mandatory_levels_of_radiosondes(archive, unit, scale):
    pascals = [50_000, 85_000, 100_000]
    levels = [p // scale for p in pascals]
    columns = {
        "OBS_TIMESTAMP": [DAY, DAY + pd.Timedelta("5h")],
        "LAT": [50.0, 51.0],
        "LON": [5.0, 6.0],
        "WMOB": [6.0, 10.0],
        "WMOS": [447.0, 410.0],
    }
    for number, level in enumerate(levels):
        columns[f"TMDB_PRLC{level}"] = [250.0 + 10 * number, 251.0]
        columns[f"TMDP_PRLC{level}"] = [240.0 + 10 * number, 1e11]
        columns[f"WSPD_PRLC{level}"] = [20.0, 21.0]
        columns[f"WDIR_PRLC{level}"] = [250.0, 260.0]
        columns[f"GP10_PRLC{level}"] = [9.80665 * 5500, np.nan]
        columns[f"QMAT_PRLC{level}"] = [1.0, 1.0]
    names = ("TMDB", "TMDP", "WSPD", "WDIR", "GP10", "QMAT")
    archive.add(
        "conv-adpupa-NC002001",
        pd.DataFrame(columns),
        [{"pressure": {"units": unit, "values": levels, "format_str": "PRLC{:d}"}}],
        [
            *({"id": name} for name in ("OBS_TIMESTAMP", "LAT", "LON", "WMOB", "WMOS")),
            *({"id": name, "dimension": "pressure"} for name in names),
        ],
    )
    source = NnjaSource(base_path=archive.folder)
    one = source(DAY.to_datetime64(), ["t850", "u500", "v500"])
    assert one["station"].tolist() == ["06447"] * 3
    found = one.set_index("variable")
    assert found["observation"]["t850"] == 260.0 and found["pres"]["t850"] == 85_000
    assert found["quality"]["t850"] == 1
    u, v = wind_components(np.array([20.0]), np.array([250.0]))
    assert found["observation"][["u500", "v500"]].tolist() == pytest.approx([u[0], v[0]])
    everything = source(DAY.to_datetime64(), ["t", "q", "z"])
    assert sorted(everything[everything["variable"] == "t"]["pres"]) == pascals
    assert everything[everything["variable"] == "q"]["observation"].between(1e-5, 2e-2).all()
    assert everything["elev"].tolist() == pytest.approx([5500.0] * len(everything))


@pytest.mark.parametrize(
    ("dataset", "group"), [("amsua-1bamua-NC021023", "BRITCSTC"), ("atms-atms-NC021203", "ATMSCH")]
)
def test_brightness_temperatures(archive, dataset, group):
    table = pd.DataFrame(
        {
            "OBS_TIMESTAMP": [DAY, DAY],
            "LAT": [10.0, 11.0],
            "LON": [-20.0, 20.0],
            "SAID": [225, 999],
            "SAZA": [10.0, 20.0],
            "SOZA": [50.0, 60.0],
            f"{group}.TMBR_00001": [200.0, 1e11],
            f"{group}.TMBR_00015": [210.0, 220.0],
            f"{group}.TMANT_00001": [1.0, 2.0],
        }
    )
    archive.add(dataset, table)
    sensor = dataset.split("-")[0]
    source = NnjaSource(base_path=archive.folder)
    rows = source(DAY.to_datetime64(), sensor).sort_values(["sensor_index", "lat"])
    assert rows["observation"].tolist() == [200.0, 210.0, 220.0]
    assert rows["sensor_index"].tolist() == [1, 15, 15]
    assert rows["satellite"].tolist() == ["n20", "n20", "said-999"]
    assert rows["satellite_za"].tolist() == [10.0, 10.0, 20.0]
    assert set(rows["variable"]) == {sensor}


def test_satellites_are_named_as_earth2studio_names_them():
    from ddo_modulus.earth2.sources.nnja_tables import _SATELLITES

    theirs = getattr(
        pytest.importorskip("earth2studio.data.utils_ncep"), "_NCEP_SATELLITE_NAME_BY_SAID", None
    )
    if theirs is None:
        pytest.skip("Earth2Studio has moved its table")
    common = set(theirs) & set(_SATELLITES)
    assert len(common) > 5
    assert {k: theirs[k] for k in common} == {k: _SATELLITES[k] for k in common}


@pytest.mark.shared_data
def test_requests_that_cannot_be_met(synop_archive, tmp_path):
    folder, _ = synop_archive
    source = NnjaSource(base_path=folder)
    with pytest.raises(InputError, match="2020-01-01.*synop has 2018-11-02 to 2018-11-03"):
        source(np.datetime64("2020-01-01"), "t2m")
    with pytest.raises(InputError, match="catalogue has no table"):
        source(NOON, "t850")
    with pytest.raises(InputError, match="no table conv-adpsfc-NC000007.*NC000001"):
        NnjaSource(["metar"], base_path=folder)(NOON, "t2m")
    with pytest.raises(InputError, match="unknown variable t850"):
        NnjaSource(["synop"], base_path=folder)(NOON, "t850")
    with pytest.raises(InputError, match="networks: buoys; choose among synop"):
        NnjaSource(["buoys"])
    with pytest.raises(InputError, match="mirror is 'aws'; choose gcp_nodd or gcp_brightband"):
        NnjaSource(mirror="aws")
    with pytest.raises(InputError, match=r"catalog\.json: no such file"):
        NnjaSource(base_path=tmp_path)(NOON, "t2m")
    (tmp_path / "catalog.json").write_text("{}}")
    with pytest.raises(
        InputError, match=r"catalog\.json: not a complete catalogue of NNJA-AI .*copy it again"
    ):
        NnjaSource(base_path=tmp_path)(NOON, "t2m")


def test_damaged_table_is_refused(archive):
    table = pd.DataFrame(
        {"OBS_TIMESTAMP": [DAY], "LAT": [1.0], "LON": [2.0], "TMPSQ1.TMDB": [280.0]}
    )
    archive.add("conv-adpsfc-NC000001", table)
    (file,) = archive.folder.rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match="NC000001 on 2021-01-01 cannot be read"):
        NnjaSource(base_path=archive.folder)(DAY.to_datetime64(), "t2m")


def test_wrong_units_are_not_hidden(archive):
    """A table in Celsius is a mistake that no check of single rows can distinguish from cold."""
    size = 40
    celsius = pd.DataFrame(
        {
            "OBS_TIMESTAMP": [DAY] * size,
            "LAT": np.linspace(0, 50, size),
            "LON": np.linspace(0, 50, size),
            "TMPSQ1.TMDB": np.linspace(5, 25, size),
        }
    )
    archive.add("conv-adpsfc-NC000001", celsius)
    with pytest.raises(InputError, match="t2m runs from .*look like degrees Celsius"):
        NnjaSource(base_path=archive.folder)(DAY.to_datetime64(), "t2m")


@pytest.mark.shared_data
def test_a_bucket_is_asked_once_and_again_after_an_error(synop_archive, monkeypatch):
    """The catalogue of a mirror, with the bucket's address replaced by the local archive."""
    import nnja_ai.catalog
    from nnja_ai import io

    folder, _ = synop_archive
    local = {"base_path": str(folder), "catalog_json": "catalog.json"}
    monkeypatch.setitem(nnja_ai.catalog.MIRRORS, "gcp_nodd", local)
    monkeypatch.setattr("ddo_modulus.earth2.sources.source._BACKOFF", 0.01)
    calls = []
    load = io.load_parquet

    def unsteady(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise ConnectionResetError("by peer")
        return load(*arguments, **options)

    monkeypatch.setattr(io, "load_parquet", unsteady)
    first = NnjaSource(["synop"], retries=1)(NOON, "t2m")
    assert len(calls) == 2
    pd.testing.assert_frame_equal(NnjaSource(["synop"])(NOON, "t2m"), first)
    assert len(calls) == 2  # from the cache
    calls.clear()
    with pytest.raises(InputError, match="by peer.*tried 1 times; check the connection"):
        NnjaSource(["synop"], retries=0)(NOON, "d2m")
