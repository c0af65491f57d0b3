# SPDX-License-Identifier: Apache-2.0
"""Real BUFR files through pdbufr."""

import numpy as np
import pandas as pd
import pytest

from ddo_modulus.errors import InputError

pytest.importorskip("pdbufr")
pytest.importorskip("earth2studio")

from ddo_modulus.earth2.sources import BufrSource  # noqa: E402
from ddo_modulus.earth2.sources.bufr import read_soundings, read_synop  # noqa: E402

NOON = np.array(["2018-11-02T12:00"], "datetime64[ns]")
SOUNDINGS = np.datetime64("2008-12-08T12:00")
SURFACE = ["t2m", "d2m", "r2m", "q2m", "u10m", "v10m", "ws10m", "sp", "msl"]


@pytest.mark.slow
@pytest.mark.shared_data
def test_a_whole_hour_of_the_globe(shared_data):
    source = BufrSource(shared_data / "pdbufr_perf_synop.bufr")
    rows = source(NOON, SURFACE)
    counts = rows["variable"].value_counts()
    assert counts["t2m"] >= 7000 and counts["ws10m"] >= 7000 and counts["sp"] >= 6000
    value = rows.groupby("variable")["observation"]
    # Gross errors are there for quality control to find.
    assert value.max()["t2m"] == pytest.approx(372.2)
    assert value.max()["ws10m"] == pytest.approx(349.0)
    assert value.min()["sp"] < 15e3
    assert value.median()["t2m"] == pytest.approx(285, abs=2)
    assert rows["lon"].between(0, 360, inclusive="left").all() and (rows["lon"] > 180).any()
    assert rows["observation"].notna().all()
    assert rows["quality"].notna().mean() > 0.9
    assert rows["station"].nunique() > 7000


@pytest.mark.shared_data
def test_reports_are_pdbufrs_own(synop_file):
    """Skipping messages and caching keys do not change the reports."""
    import pdbufr

    columns = "stnid latlon elevation time t2m td2m wind10m mslp pressure".split()
    plain = pdbufr.read_bufr(str(synop_file), reader="synop", columns=columns)
    names = {"t2m": "t", "td2m": "td", "wind10m_speed": "speed", "wind10m_dir": "direction"}
    names |= {"mslp": "msl", "pressure": "p", "stnid": "station", "elevation": "elev"}
    plain = plain.rename(columns=names).dropna(subset=["t", "td", "speed", "msl", "p"], how="all")
    ours = read_synop(synop_file)[plain.columns]
    assert len(plain) == 150
    pd.testing.assert_frame_equal(ours, plain.reset_index(drop=True), check_dtype=False)


@pytest.mark.shared_data
def test_levels_are_pdbufrs_own(sounding_file):
    import pdbufr

    plain = pdbufr.read_bufr(str(sounding_file), reader="temp").dropna(subset="pressure")
    names = {"pressure": "pres", "wind_speed": "speed", "wind_dir": "direction"}
    plain = plain.rename(columns={"stnid": "station"} | names).drop(columns="elevation")
    ours = read_soundings(sounding_file)[plain.columns]
    assert len(plain) > 1000
    pd.testing.assert_frame_equal(
        ours.reset_index(drop=True), plain.reset_index(drop=True), check_dtype=False
    )


@pytest.fixture
def modern_file(tmp_path):
    """Four messages of the template 307080, with more and fewer cloud layers."""
    import eccodes

    height = "heightOfSensorAboveLocalGroundOrDeckOfMarinePlatform"
    path = tmp_path / "modern.bufr"
    with path.open("wb") as file:
        for number, layers in enumerate([1, 4, 1, 2]):
            message = eccodes.codes_bufr_new_from_samples("BUFR4")
            replications = "inputDelayedDescriptorReplicationFactor"
            eccodes.codes_set_array(message, replications, [layers, 1])
            values = {"masterTablesVersionNumber": 31, "unexpandedDescriptors": 307080}
            values |= {"dataCategory": 0, "blockNumber": 3, "stationNumber": 100 + number}
            values |= {"year": 2018, "month": 11, "day": 2, "hour": 12, "minute": 0}
            values |= {"latitude": 50.0 + number, "longitude": -3.0}
            values |= {"airTemperature": 280.0 + number, "relativeHumidity": 60 + number}
            values |= {f"#1#{height}": 2.0, f"#7#{height}": 10.0}
            values |= {"windSpeed": 5.0 + number, "windDirection": 270}
            values |= {"#1#nonCoordinatePressure": 1e5}
            for key, value in values.items():
                eccodes.codes_set(message, key, value)
            eccodes.codes_set(message, "pack", 1)
            eccodes.codes_write(message, file)
            eccodes.codes_release(message)
    return path


def _parts(path):
    """The messages of a file."""
    import eccodes

    content = path.read_bytes()
    extents = eccodes.codes_extract_offsets_sizes(str(path), eccodes.CODES_PRODUCT_BUFR)
    return [content[offset : offset + size] for offset, size in extents]


HEADER = b"\x01\r\r\n123 \r\r\nISMD01 EGRR 021200\r\r\n"
TRAILER = b"\r\r\n\x03"
WRAPPED = {
    "in bulletins": lambda parts: b"".join(HEADER + part + TRAILER for part in parts),
    "with headers": lambda parts: b"".join(HEADER + part for part in parts),
    "with trailers": lambda parts: b"".join(part + TRAILER for part in parts),
    "with lengths before the headers": lambda parts: b"".join(
        f"{len(HEADER + part + TRAILER):08d}00".encode() + HEADER + part + TRAILER for part in parts
    ),
    "one bulletin of all": lambda parts: HEADER + b"".join(parts) + TRAILER,
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_headers_and_trailers_of_the_gts_are_no_fault(modern_file, tmp_path, wrapped):
    path = tmp_path / "gts.bufr"
    path.write_bytes(wrapped(_parts(modern_file)))
    found = BufrSource(path)(NOON, SURFACE)
    assert len(found) > 4
    pd.testing.assert_frame_equal(found, BufrSource(modern_file)(NOON, SURFACE))


@pytest.mark.parametrize("left_over", [60, 12])
def test_a_bulletin_with_a_part_of_a_message_is_refused(modern_file, tmp_path, capfd, left_over):
    *whole, last = _parts(modern_file)
    path = tmp_path / "gts.bufr"
    path.write_bytes(b"".join(HEADER + part for part in [*whole, last[:left_over]]))
    with pytest.raises(InputError, match=r"gts\.bufr: .*cut short.*copy or download it again"):
        BufrSource(path)(NOON, "t2m")
    assert capfd.readouterr().err == "", "the library printed a line of its own"


def test_coordinates_are_pdbufrs_own(modern_file):
    """Heights, times and significances are coordinates; measured values are not."""
    from pdbufr.high_level_bufr.bufr import BufrFile

    from ddo_modulus.earth2.sources.messages import messages

    seen = set()
    with BufrFile(str(modern_file)) as theirs:
        for ours, other in zip(messages(modern_file), theirs, strict=True):
            with ours, other:
                ours["unpack"] = other["unpack"] = 1
                for key in ours:
                    assert ours.is_coord(key) == other.is_coord(key), key
                    seen.add(ours.is_coord(key))
    assert seen == {True, False}


def test_templates_with_heights_and_replications(modern_file):
    import pdbufr

    columns = "stnid latlon time t2m rh2m wind10m pressure".split()
    plain = pdbufr.read_bufr(str(modern_file), reader="synop", columns=columns)
    rows = BufrSource(modern_file)(NOON, ["t2m", "r2m", "u10m", "ws10m", "sp"])
    found = rows.pivot(index="station", columns="variable", values="observation")
    assert found.index.tolist() == ["03100", "03101", "03102", "03103"]
    assert found["t2m"].tolist() == plain["t2m"].tolist() == [280.0, 281.0, 282.0, 283.0]
    assert found["r2m"].tolist() == plain["rh2m"].tolist() == [60.0, 61.0, 62.0, 63.0]
    assert found["ws10m"].tolist() == plain["wind10m_speed"].tolist() == [5.0, 6.0, 7.0, 8.0]
    assert found["u10m"].tolist() == pytest.approx(found["ws10m"].tolist())
    assert found["sp"].tolist() == [1e5] * 4
    assert rows["quality"].isna().all()


@pytest.mark.shared_data
def test_marks_and_plain_humidity_are_those_of_the_messages(synop_file):
    """Against ecCodes itself, for two stations."""
    import eccodes

    seen = {}
    with synop_file.open("rb") as file:
        while (message := eccodes.codes_bufr_new_from_file(file)) is not None:
            eccodes.codes_set(message, "unpack", 1)
            if eccodes.codes_is_defined(message, "#1#airTemperatureAt2M"):
                mark = eccodes.codes_get(message, "#1#airTemperatureAt2M->percentConfidence")
                humidity = eccodes.codes_get(message, "#1#relativeHumidity")
                seen[eccodes.codes_get(message, "ident")] = (mark, humidity)
            eccodes.codes_release(message)
    reports = read_synop(synop_file).set_index("station")
    assert len({mark for mark, _ in seen.values()}) > 1
    for station, (mark, humidity) in seen.items():
        report = reports.loc[[station]].iloc[0]
        assert report["t_quality"] == mark
        if humidity != eccodes.CODES_MISSING_LONG:
            assert report["rh"] == humidity
    assert sum(h != eccodes.CODES_MISSING_LONG for _, h in seen.values()) > 5


@pytest.mark.shared_data
def test_earth2studio_fetches_it(synop_file):
    from earth2studio.data.base import DataFrameSource
    from earth2studio.data.utils import fetch_dataframe

    source = BufrSource(synop_file)
    assert isinstance(source, DataFrameSource)
    frame = fetch_dataframe(source, NOON, np.array(["t2m", "u10m"]))
    assert list(frame.columns) == source.SCHEMA.names
    assert frame.attrs["request_time"] == NOON
    types = {name: str(kind) for name, kind in frame.dtypes.items()}
    assert types["time"] == "datetime64[ns]" and types["observation"] == types["lat"] == "float32"
    assert types["quality"] == "UInt16"
    assert set(frame["variable"]) == {"t2m", "u10m"}
    fields = np.array(["time", "observation"])
    assert list(fetch_dataframe(source, NOON, np.array(["t2m"]), fields)) == fields.tolist()


@pytest.mark.shared_data
def test_the_table_is_one_that_the_project_assimilates(synop_file):
    from ddo_modulus.observations.table import read_table

    rows = BufrSource(synop_file)(NOON, SURFACE)
    table = read_table(rows)
    assert table.dropped["implausible value"] >= 2  # the components of 349 m/s
    assert len(table.frame) > 0.9 * len(rows)


@pytest.mark.slow
@pytest.mark.shared_data
def test_all_levels_of_all_soundings(shared_data):
    levels = read_soundings(shared_data / "pdbufr_temp.bufr")
    assert len(levels) >= 26_000
    assert levels["pres"].between(100, 107_000).all()
    assert levels["station"].nunique() > 400


@pytest.mark.shared_data
def test_levels_of_soundings(sounding_file):
    source = BufrSource(sounding_file)
    rows = source(SOUNDINGS, ["t", "q", "u", "v", "z", "t500", "z500"])
    assert rows["pres"].notna().all()
    t500 = rows[rows["variable"] == "t500"]
    assert len(t500) > 5 and (t500["pres"] == 50_000).all()
    assert t500["observation"].between(220, 275).all()
    at_500 = rows[(rows["variable"] == "t") & (rows["pres"] == 50_000)]
    assert sorted(at_500["observation"]) == sorted(t500["observation"])
    z500 = rows[rows["variable"] == "z500"]
    assert z500["observation"].between(45e3, 60e3).all()  # m2/s2, not m
    np.testing.assert_allclose(z500["elev"], z500["observation"] / 9.80665, rtol=1e-6)
    assert rows[rows["variable"] == "q"]["observation"].between(0, 0.03).all()
    assert (rows["class"] == "radiosonde").all()


@pytest.mark.shared_data
def test_decoding_is_done_once(synop_file, monkeypatch):
    import pdbufr

    source = BufrSource(synop_file)
    first = source(NOON, "t2m")
    monkeypatch.setattr(pdbufr, "read_bufr", lambda *a, **k: pytest.fail("decoded again"))
    pd.testing.assert_frame_equal(BufrSource(synop_file)(NOON, "t2m"), first)


@pytest.mark.shared_data
def test_without_a_cache_nothing_stays(synop_file, cache):
    before = set(cache.rglob("*"))
    BufrSource(synop_file, cache=False)(NOON, "t2m")
    assert set(cache.rglob("*")) - before <= {cache / "ddo_bufr"}


@pytest.mark.shared_data
def test_damaged_files_are_refused(synop_file, tmp_path):
    whole = synop_file.read_bytes()
    cut, dented = tmp_path / "cut.bufr", bytearray(whole)
    cut.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=r"cut\.bufr: damaged or cut short.*again"):
        BufrSource(cut)(NOON, "t2m")
    dented[3000:3400] = bytes(400)
    (tmp_path / "dented.bufr").write_bytes(dented)
    with pytest.raises(InputError, match=r"dented\.bufr: .*(damaged|decoded)"):
        BufrSource(tmp_path / "dented.bufr")(NOON, "t2m")


def test_what_is_no_bufr_file_is_refused(tmp_path):
    other = tmp_path / "x.bufr"
    other.write_bytes(b"GRIB and so on")
    with pytest.raises(InputError, match=r"x\.bufr: not a BUFR file .*GRIB"):
        BufrSource(other)(NOON, "t2m")
    with pytest.raises(InputError, match="no such file"):
        BufrSource(tmp_path / "none.bufr")(NOON, "t2m")


@pytest.mark.shared_data
def test_requests_that_cannot_be_met(synop_file):
    source = BufrSource(synop_file)
    with pytest.raises(InputError, match="unknown variable tcw2; choose among t2m.*t850"):
        source(NOON, ["t2m", "tcw2"])
    with pytest.raises(InputError, match="holds 2018-11-02 12:00:00 to .*nothing from 2018-11-03"):
        source(np.datetime64("2018-11-03T12:00"), "t2m")
    with pytest.raises(InputError, match="no observations of t850"):
        source(NOON, "t850")
    with pytest.raises(InputError, match="no field pressure; it has time"):
        source(NOON, "t2m", fields=["pressure"])
    with pytest.raises(InputError, match="time_tolerance"):
        BufrSource(synop_file, time_tolerance="soon")(NOON, "t2m")


@pytest.mark.shared_data
def test_a_missing_package_is_named_with_its_extra(synop_file, monkeypatch, tmp_path):
    import sys

    copy = tmp_path / "copy.bufr"
    copy.write_bytes(synop_file.read_bytes())
    monkeypatch.setitem(sys.modules, "pdbufr", None)
    with pytest.raises(InputError, match=r"pip install 'ddo-modulus\[observations\]'"):
        BufrSource(copy)(NOON, "t2m")
