# SPDX-License-Identifier: Apache-2.0
"""Tables of observations as they come: what is read, what costs a row, and what is refused.

Most cases call the reading function; each kind has a case that runs the command.
"""

import bz2
import gzip
import io
import lzma
import zipfile

import numpy as np
import pandas as pd
import pytest

from ddo_modulus.errors import InputError
from ddo_modulus.observations.table import read_table

HEADER = "time,lat,lon,observation,variable"
ROWS = (
    "2019-03-27T06:00,52.0,-1.0,280.5,t2m",
    "2019-03-27T06:00,53.0,-2.0,281.5,t2m",
    "2019-03-27T12:00,54.0,-3.0,282.5,t2m",
)
TEXT = "\n".join((HEADER, *ROWS)) + "\n"


def table_of(tmp_path, content, name="obs.csv", **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, **options)


def refused(tmp_path, content, *needed, name="obs.csv", **options):
    with pytest.raises(InputError) as caught:
        table_of(tmp_path, content, name, **options)
    message = str(caught.value)
    for text in (name, *needed):
        assert text in message
    assert "\n" not in message
    for library in ("pandas", "pyarrow", "engine=", "low_memory", "Parser", "encoding="):
        assert library not in message


def with_cell(column, cell, more=""):
    """The table with a cell of its first row replaced, and perhaps a further column."""
    header, rows = HEADER + (f",{more}" if more else ""), []
    for i, row in enumerate(ROWS):
        cells = dict(zip(header.split(","), (row + (",1" if more else "")).split(","), strict=True))
        rows.append(",".join((cells | ({column: cell} if i == 0 else {})).values()))
    return "\n".join((header, *rows)) + "\n"


def with_times(*times):
    rows = [f"{time},{52 + i},-1,{280 + i},t2m" for i, time in enumerate(times)]
    return "\n".join((HEADER, *rows)) + "\n"


# ---- times --------------------------------------------------------------------------------------

NOON = pd.Timestamp("2019-03-27T12:00")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2019-03-27T12:00", NOON),
        ("2019-03-27 12:00", NOON),
        ("2019-03-27T12:00:00", NOON),
        ("2019-03-27T12:00:00.000", NOON),
        ("2019-03-27T12", NOON),
        ("2019-03-27T12:00Z", NOON),
        ("2019-03-27t12:00z", NOON),
        ("2019-03-27 12:00:00 UTC", NOON),
        ("2019-03-27 12:00 GMT", NOON),
        ("2019-03-27T12:00+00:00", NOON),
        ("2019-03-27T14:00+02:00", NOON),
        ("2019-03-27T07:00-0500", NOON),
        ("2019-03-27T17:30+05:30", NOON),
        ("20190327T1200", NOON),
        ("20190327T120000Z", NOON),
        ("201903271200", NOON),
        ("20190327120000", NOON),
        ("2019/03/27 12:00", NOON),
        ("2019-03-27", NOON.normalize()),
        ("20190327", NOON.normalize()),
        ("2019-03-26T24:00", NOON.normalize()),
        ("2019-03-27T11:59:59.5", NOON - pd.Timedelta("500ms")),
        ('"2019-03-27T11:59:59,25"', NOON - pd.Timedelta("750ms")),
        ("2020-02-29T12:00", pd.Timestamp("2020-02-29T12:00")),
        ("1900-01-01T00:00", pd.Timestamp("1900-01-01")),
    ],
)
def test_times_that_are_read(tmp_path, written, meant):
    """Whatever form the other rows have."""
    table = table_of(tmp_path, with_times(written, "2019-03-28T06:00:00.5Z"))
    assert table.dropped == {}
    assert meant in set(table.frame["time"])


@pytest.mark.parametrize(
    ("written", "needed"),
    [
        ("03/04/2019 12:00", "3 April 2019 or 4 March 2019"),
        ("03.04.2019", "3 April 2019 or 4 March 2019"),
        ("03-04-2019", "3 April 2019 or 4 March 2019"),
        ("27/03/2019 12:00", "27 March 2019"),
        ("3/27/2019 1:00 PM", "27 March 2019"),
        ("03/04/19", "3 April 2019 or 4 March 2019"),
        ("12:00", "an hour without a date"),
        ("12:00:30", "an hour without a date"),
        ("1:00 PM", "an hour without a date"),
        ("1553688000", "s since 1970 (2019-03-27 12:00)"),
        ("1553688000000", "ms since 1970 (2019-03-27 12:00)"),
        ("1553688000.0", "s since 1970 (2019-03-27 12:00)"),
        ("43551.5", "a day of a spreadsheet (2019-03-27 12:00)"),
        ("2019032712", "year, month, day and hour"),
        ("2019", "a year"),
        ("17", "since some date"),
        ("2019-02-29T12:00", "no possible time"),
        ("9999-12-31T00:00", "no possible time"),
        ("2019-03-27T25:00", "no possible time"),
        ("2019-03-27 12:00 CET", "a zone by name"),
        ("27 March 2019 noon", "cannot be understood"),
        ("2019-03", "cannot be understood"),
        ("now", "cannot be understood"),
        ("today", "cannot be understood"),
    ],
)
def test_times_that_are_refused(tmp_path, written, needed):
    """Where all of a column are written so; one of many costs its row."""
    refused(tmp_path, with_times(written), f"time '{written}'", needed, "2019-03-27T06:00")
    table = table_of(tmp_path, with_times(written, "2019-03-28T06:00"))
    assert len(table.frame) == 1 and sum(table.dropped.values()) == 1
    assert table.rejected["cell"].tolist() == [written]
    assert "time" in table.rejected["reason"][0] or "date" in table.rejected["reason"][0]


@pytest.mark.parametrize("empty", ["", "NaT", "NA", "null", "  ", "-"])
def test_a_time_that_is_missing_costs_its_row(tmp_path, empty):
    table = table_of(tmp_path, with_cell("time", empty))
    assert table.dropped == {"missing value": 1} and len(table.frame) == 2


# ---- files --------------------------------------------------------------------------------------

EXPECTED = pd.DataFrame(
    {
        "time": pd.to_datetime(["2019-03-27T06:00"] * 2 + ["2019-03-27T12:00"]),
        "lat": [52.0, 53.0, 54.0],
        "lon": [-1.0, -2.0, -3.0],
        "observation": [280.5, 281.5, 282.5],
        "variable": "t2m",
    }
)
COMMAS = TEXT.replace(",", ";").replace(".0", ",0").replace(".5", ",5")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", TEXT),
        ("windows.csv", TEXT.replace("\n", "\r\n")),
        ("macintosh.csv", TEXT.replace("\n", "\r")),
        ("no_newline.csv", TEXT.rstrip()),
        ("mark.csv", TEXT.encode("utf-8-sig")),
        ("utf16.csv", TEXT.encode("utf-16")),
        ("utf16le.csv", TEXT.encode("utf-16-le")),
        ("utf16be.csv", TEXT.encode("utf-16-be")),
        ("utf32.csv", TEXT.encode("utf-32")),
        (
            "latin.csv",
            TEXT.replace("\n", ",Züri\n").replace(",Züri", ",station", 1).encode("latin1"),
        ),
        ("semicolons.csv", TEXT.replace(",", ";")),
        ("decimal_commas.csv", COMMAS),
        ("decimal_tabs.tsv", COMMAS.replace(";", "\t")),
        ("three_decimals.csv", COMMAS.replace(",0;", ",000;").replace(",5;", ",500;")),
        ("tabs.tsv", TEXT.replace(",", "\t")),
        ("tabs.txt", TEXT.replace(",", "\t")),
        ("bars.csv", TEXT.replace(",", "|")),
        ("sep.csv", "sep=;\n" + TEXT.replace(",", ";")),
        ("comments.csv", "# by hand, 1, 2\n#\n" + TEXT.replace(ROWS[1], "# a, b\n" + ROWS[1])),
        ("savetxt.csv", "# " + TEXT),
        ("blank.csv", "\n\n" + TEXT.replace("\n", "\n\n") + "\n,,,,\n"),
        ("spaces.csv", TEXT.replace(",", ", ")),
        ("quoted.csv", '"' + TEXT.replace(",", '","').replace("\n", '"\n"')[:-1]),
        ("quoted_commas.csv", COMMAS.replace(";", '","').replace("\n", '"\n"').join('"\n')[:-2]),
        ("capitals.csv", TEXT.replace(HEADER, "Time,LAT, Lon ,Observation,VARIABLE")),
        ("trailing.csv", TEXT.replace("\n", ",,\n")),
        ("trailing_rows.csv", TEXT.replace("\n", ",,\n").replace(HEADER + ",,", HEADER)),
        ("index.csv", "\n".join(f"{i},{row}" for i, row in enumerate(TEXT.split()))),
        ("zipped.csv.gz", gzip.compress(TEXT.encode())),
        ("zipped.csv.bz2", bz2.compress(TEXT.encode())),
        ("zipped.csv.xz", lzma.compress(TEXT.encode())),
        ("upper.CSV", TEXT),
        ("short_rows.csv", TEXT.replace("t2m\n", "t2m\n").replace(HEADER, HEADER + ",elev")),
        ("minus.csv", TEXT.replace("-1.0", "\u22121.0")),
        ("exponents.csv", TEXT.replace("280.5", "2.805e2").replace("281.5", "+281.5")),
    ],
)
def test_one_table_in_many_forms(tmp_path, name, content):
    table = table_of(tmp_path, content, name)
    assert table.dropped == {}
    found = table.frame[list(EXPECTED)]
    pd.testing.assert_frame_equal(found, EXPECTED, check_dtype=False)


@pytest.mark.parametrize(
    ("written", "meant"),
    [('"101,325.5"', 101325.5), ('"1,01,325"', None), ('"1.013,25"', None), ("101 325", 101325.0)],
)
def test_separators_of_thousands(tmp_path, written, meant):
    content = TEXT.replace("t2m", "msl").replace("280.5", written)
    content = content.replace("281.5", "101000").replace("282.5", "100900")
    table = table_of(tmp_path, content)
    if meant is None:
        assert sum(table.dropped.values()) == 1
    else:
        assert table.frame["observation"][0] == meant


def excel():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("obs.csv", TEXT)
    return file.getvalue()


def parquet():
    file = io.BytesIO()
    EXPECTED.to_parquet(file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "needed"),
    [
        ("obs.xlsx", excel(), "a workbook of Excel; save the sheet as CSV"),
        ("obs.csv", excel(), "a workbook of Excel"),
        ("obs.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a workbook of Excel"),
        ("obs.csv", zipped(), "a zip archive; unpack it"),
        ("obs.zip", zipped(), "a zip archive; unpack it"),
        ("obs.csv", b"<!DOCTYPE html>\n<html>404</html>", "a web page"),
        ("obs.csv", b"\n <html><body>log in</body></html>", "a web page"),
        ("obs.csv", b"<?xml version='1.0'?><Error>NoSuchKey</Error>", "a web page"),
        ("obs.csv", b"HTTP/1.1 200 OK\r\n\r\ntime,lat", "headers included"),
        ("obs.csv", b'{"error": "not found"}', "JSON"),
        ("obs.csv", parquet(), "a parquet table; name it .parquet"),
        ("obs.parquet", TEXT, "is text: name it .csv"),
        ("obs.parquet", parquet()[:-30], "cut short; copy or download it again"),
        ("obs.parquet", b"PAR1" + b"x" * 50 + b"PAR1", "cannot be read as parquet"),
        ("obs.csv.gz", gzip.compress(TEXT.encode())[:-20], "cut short or damaged"),
        ("obs.csv", b"BUFR\0\0", "BufrSource"),
        ("obs.csv", b"\x01\r\r\n123", "is not separated"),
        ("obs.csv", b"\xff\xffODA", "OdbSource"),
        ("obs.csv", b"GRIB\0\0", "a GRIB file"),
        ("obs.csv", b"\x89HDF\r\n", "a netCDF or HDF5 file"),
        ("obs.csv", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("obs.csv", b"time,lat\n\0\0\0\0\0", "bytes of zero"),
        ("obs.csv", b"", "is empty"),
        ("obs.csv", b"\n\n", "is empty"),
        ("obs.csv", HEADER, "no rows"),
        ("obs.dat", TEXT, "not a .parquet or .csv table"),
        ("obs.csv", "\n".join(ROWS), "first line holds data"),
        ("obs.csv", TEXT.replace(",", "  "), "not separated by"),
        ("obs.csv", TEXT.replace("0,", ",0,").replace(".", ""), "more cells than the header"),
        ("obs.csv", TEXT.replace("280.5", '"280.5'), "quotation mark"),
        ("obs.csv", TEXT.replace("280.5", '"101,325"'), "101.325 or 101325"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, name, content, needed):
    needed = needed.replace("is not separated", "not separated by")
    refused(tmp_path, content, needed, name=name)


def test_places_of_files_that_cannot_be_read(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    for name, needed in {
        str(tmp_path / "folder.csv"): "is a folder",
        str(tmp_path / "nowhere.csv"): "no such file",
        "https://example.org/obs.csv": "is a web address; download the table",
        "s3://bucket/obs.parquet": "is a web address",
    }.items():
        with pytest.raises(InputError, match=needed):
            read_table(name)


# ---- columns ------------------------------------------------------------------------------------


def test_names_of_columns_are_mapped(tmp_path):
    content = TEXT.replace("time", "valid_time").replace("observation", "t2m obs")
    mapped = {"time": "valid_time", "observation": "T2M_obs"}
    table = table_of(tmp_path, content, columns=mapped)
    pd.testing.assert_frame_equal(table.frame[list(EXPECTED)], EXPECTED, check_dtype=False)
    # The name that is given has precedence.
    given = with_cell("elev", "1", "elev").replace(",1\n", ",290\n")
    table = table_of(tmp_path, given, columns={"observation": "elev"})
    assert table.frame["observation"].tolist() == [290.0] * 3


@pytest.mark.parametrize(
    ("header", "columns", "needed"),
    [
        ("valid_time,lat,lon,observation,variable", None, "columns={time:valid_time}"),
        ("time,latitude,longitude,observation,variable", None, "{lat:latitude,lon:longitude}"),
        ("time,lat,lon,obs_value,variable", None, "no column observation; has time"),
        ("time,lat,lon,observation,param", None, "no column variable"),
        ("time,lat,lat,observation,variable", None, "2 columns are called lat"),
        ("time,Lat,LAT,observation,variable", None, "2 columns are called lat"),
        (HEADER, {"tiem": "time"}, "did you mean time?"),
        (HEADER, {"time": "valid"}, "no column valid, which columns={time:valid} names"),
        (HEADER, "time", "must be names of columns"),
    ],
)
def test_columns_that_are_missing_or_there_twice(tmp_path, header, columns, needed):
    content = TEXT.replace(HEADER, header)
    with pytest.raises(InputError) as caught:
        table_of(tmp_path, content, columns=columns)
    assert needed in str(caught.value)


# ---- cells --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("observation", "warm", "unreadable observation"),
        ("observation", "280.5 K", "unreadable observation"),
        ("observation", "1e30", "implausible value"),
        ("observation", "-9999", "implausible value"),
        ("observation", "9.96921e36", "implausible value"),
        ("observation", "", "missing value"),
        ("observation", "nan", "missing value"),
        ("observation", "inf", "missing value"),
        ("observation", "True", "unreadable observation"),
        ("lat", "52N", "unreadable lat"),
        ("lat", "", "missing value"),
        ("lat", "90.5", "off the globe"),
        ("lat", "-999", "off the globe"),
        ("lon", "1 W", "unreadable lon"),
        ("lon", "-9999", "missing value"),
        ("lon", "nan", "missing value"),
        ("lon", "inf", "missing value"),
        ("variable", "", "missing value"),
        ("variable", "nan", "missing value"),
        ("variable", "T2M_", "unknown variable"),
        ("observation_error", "0.1 K", "unreadable observation_error"),
        ("observation_error", "0", "impossible observation_error"),
        ("observation_error", "-1", "impossible observation_error"),
        ("observation_error", "-999", "impossible observation_error"),
        ("observation_error", "inf", "impossible observation_error"),
        ("observation_error", "1e20", "impossible observation_error"),
        ("observation_error", "1e-30", "impossible observation_error"),
        ("observation_error", "201", "impossible observation_error"),
        ("elev", "high", "unreadable elev"),
        ("elev", "25 m", "unreadable elev"),
        ("elev", "12000", "impossible elev"),
        ("elev", "-700", "impossible elev"),
        ("pres", "low", "unreadable pres"),
        ("pres", "0", "impossible pres"),
        ("quality", "good", "unreadable quality"),
        ("sensor_index", "ch1", "unreadable sensor_index"),
    ],
)
def test_a_flawed_cell_costs_one_row(tmp_path, column, cell, reason):
    more = column if column not in HEADER.split(",") else ""
    content = with_cell(column, cell, more)
    content = content.replace(",1\n", ",100000\n") if more == "pres" else content
    table = table_of(tmp_path, content, variables=["t2m"])
    assert table.dropped == {reason: 1}
    assert table.frame["observation"].tolist() == [281.5, 282.5]
    assert table.rejected["reason"].tolist() == [reason]


@pytest.mark.parametrize("column", ["elev", "station_elev", "observation_error", "pres", "quality"])
@pytest.mark.parametrize("cell", ["", "NA", "-", "null"])
def test_an_empty_cell_is_unknown(tmp_path, column, cell):
    content = with_cell(column, cell, column)
    content = content.replace(",1\n", ",100000\n") if column == "pres" else content
    table = table_of(tmp_path, content)
    assert table.dropped == {}
    assert np.isnan(table.frame[column][0]) and table.frame[column].notna().sum() == 2


@pytest.mark.parametrize("code", ["9999", "9999.9", "-999", "-999.9", "-99.9", "-9999", "999.9"])
def test_codes_are_no_heights(tmp_path, code):
    table = table_of(tmp_path, with_cell("elev", code, "elev"))
    assert table.dropped == {} and np.isnan(table.frame["elev"][0])


@pytest.mark.parametrize("lon", ["-540", "540", "725", "-361", "359", "180", "-180", "0"])
def test_any_branch_of_longitude(tmp_path, lon):
    table = table_of(tmp_path, with_cell("lon", lon))
    assert table.dropped == {} and table.frame["lon"][0] == float(lon)


def test_a_repetition_on_another_branch_is_one(tmp_path):
    table = table_of(tmp_path, TEXT + ROWS[0].replace("-1.0", "359"))
    assert table.dropped == {"repeated row": 1}


def test_poles_are_on_the_globe(tmp_path):
    assert len(table_of(tmp_path, TEXT.replace("52.0", "90").replace("53.0", "-90")).frame) == 3


def test_rows_with_too_many_cells(tmp_path):
    table = table_of(tmp_path, TEXT + "2019-03-27T12:00,55,-4,283,5,t2m\n")
    assert table.dropped == {"too many cells": 1} and len(table.frame) == 3


# ---- units --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "units", "value", "meant"),
    [
        ("t2m", "K", 280.5, 280.5),
        ("t2m", "degC", 7.35, 280.5),
        ("t2m", "°C", 7.35, 280.5),
        ("t2m", "degF", 45.23, 280.5),
        ("msl", "hPa", 1013.25, 101325.0),
        ("msl", "mbar", 1013.25, 101325.0),
        ("u10m", "m s**-1", 5.0, 5.0),
        ("u10m", "knots", 10.0, 5.144444),
        ("u10m", "km/h", 36.0, 10.0),
        ("q2m", "g/kg", 5.0, 0.005),
        ("r2m", "1", 0.5, 50.0),
        ("t2m", "", 280.5, 280.5),
    ],
)
def test_units_are_converted_by_row(tmp_path, variable, units, value, meant):
    row = f"2019-03-27T06:00,52,-1,{value},{variable},0.01,{units}\n"
    table = table_of(tmp_path, f"{HEADER},observation_error,units\n{row}")
    assert table.frame["observation"][0] == pytest.approx(meant, rel=1e-6)
    factor = 1.0 if units in ("K", "degC", "°C", "") else meant / value
    factor = 5 / 9 if units == "degF" else factor
    assert table.frame["observation_error"][0] == pytest.approx(0.01 * factor, rel=1e-6)
    assert ("converted" in str(table.notes)) == (units not in ("K", "m s**-1", ""))
    assert "units" not in table.frame


def test_units_that_do_not_fit(tmp_path):
    header = f"{HEADER},units\n"
    refused(tmp_path, header + f"{ROWS[0]},m/s\n", "t2m: units are declared as 'm/s'", "to K")
    table = table_of(tmp_path, header + f"{ROWS[0]},m/s\n{ROWS[1]},K\n")
    assert table.dropped == {"wrong units": 1} and len(table.frame) == 1


@pytest.mark.parametrize("values", [[0.5], [0.2, 0.9, 1.0]])
def test_humidity_as_a_fraction(tmp_path, values):
    rows = [f"2019-03-27T06:00,{50 + i},-1,{v},r2m" for i, v in enumerate(values)]
    refused(tmp_path, "\n".join((HEADER, *rows)), "r2m", "a fraction", "multiply by 100")


# ---- the command --------------------------------------------------------------------------------

FEW = {"ensemble": 1, "posterior__steps": 2}


@pytest.fixture
def written(files, tmp_path):
    """Write a table that fits the package, after a change; its path."""

    def write(change=lambda frame: frame, name="obs.csv"):
        path = tmp_path / name
        change(pd.read_parquet(files.table)).to_csv(path, index=False)
        return path

    return write


@pytest.mark.parametrize(
    ("change", "keys", "needed"),
    [
        (lambda f: f.assign(time="03/04/2019"), {}, ["3 April 2019 or 4 March 2019"]),
        (lambda f: f.assign(time="12:00"), {}, ["an hour without a date"]),
        (lambda f: f.assign(time=43551.5), {}, ["a day of a spreadsheet"]),
        (lambda f: f.assign(observation_error="0.1 K"), {}, ["observation_error: ", "'0.1 K'"]),
        (lambda f: f.assign(observation_error=1e20), {}, ["impossible observation_error"]),
        (lambda f: f.assign(observation="x"), {}, ["unreadable observation"]),
        (lambda f: f.assign(variable=np.nan), {}, ["missing value"]),
        (lambda f: f.drop(columns="lat"), {}, ["no column lat"]),
        (lambda f: f.assign(units="kg"), {}, ["t2m: units are declared as 'kg'"]),
        (lambda f: f, {"columns": "{time:valid}"}, ["no column valid"]),
        (lambda f: f, {"columns": "3"}, ["columns=3 must be names"]),
        (lambda f: f, {"quality__accept": "[1]"}, ["accept=[1.0]", "smallest and the largest"]),
        (lambda f: f, {"quality__accept": "[2,1]"}, ["smallest and the largest"]),
        (lambda f: f, {"quality__accept": "good"}, ["smallest and the largest"]),
        (lambda f: f.assign(quality=1), {"quality__accept": "[5,6]"}, ["no observations"]),
        (lambda f: f.drop(columns="observation_error"), {"default_error": 1e9}, ["default_error"]),
        (
            lambda f: f.rename(columns={"lat": "y", "lon": "x"}),
            {},
            ["y, x on a box", "lat and lon"],
        ),
    ],
)
def test_tables_that_the_command_refuses(refusal, files, written, change, keys, needed):
    path = written(change)
    line = refusal(
        "assimilate",
        *[n.replace("[1.0]", "[1]") for n in needed],
        package=files.package,
        observations=path,
        **FEW,
        **keys,
    )
    assert str(path) in line or "=" in line or "package" in line


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"observation_error": "0.1 K"}, "unreadable observation_error"),
        ({"observation_error": "1e20"}, "impossible observation_error"),
        ({"observation": "1e30"}, "implausible value"),
        ({"time": "9999-12-31T00:00"}, "impossible time"),
        ({"variable": ""}, "missing value"),
    ],
)
def test_a_flawed_cell_does_not_change_the_analysis(
    accepted, files, written, tmp_path, cells, reason
):
    keys = {"package": files.package, "start": "2019-03-27", "end": "2019-03-27", **FEW}
    plain, _ = accepted("assimilate", out=tmp_path / "a.zarr", observations=files.table, **keys)
    flawed = lambda f: pd.concat([f.astype(object), f.iloc[:1].astype(object).assign(**cells)])  # noqa: E731
    store, result = accepted(
        "assimilate", out=tmp_path / "b.zarr", observations=written(flawed), **keys
    )
    np.testing.assert_allclose(store["t2m"], plain["t2m"], rtol=1e-5)
    assert f"left out, {reason}: 1 rows" in result.out


def test_marks_are_used_or_counted(accepted, files, written, tmp_path):
    marked = written(lambda f: f.assign(quality=np.arange(len(f)) % 2))
    keys = {"package": files.package, "observations": marked, **FEW}
    store, result = accepted("assimilate", out=tmp_path / "a.zarr", **keys)
    assert "quality marks 0 to 1 not used" in result.out and "quality.accept=" in result.out
    fewer, result = accepted("assimilate", out=tmp_path / "b.zarr", quality__accept="[0,0]", **keys)
    assert "left out, quality: " in result.out and "not used" not in result.out
    assert int(fewer["observations"].sum()) < int(store["observations"].sum())


def test_columns_are_mapped_by_the_command(accepted, files, written, tmp_path):
    keys = {"package": files.package, **FEW}
    renamed = written(lambda f: f.rename(columns={"time": "valid_time", "observation": "t2m_obs"}))
    names = "{time:valid_time,observation:t2m_obs}"
    one, _ = accepted("assimilate", out=tmp_path / "a.zarr", observations=files.table, **keys)
    two, _ = accepted(
        "assimilate", out=tmp_path / "b.zarr", observations=renamed, columns=names, **keys
    )
    np.testing.assert_allclose(one["t2m"], two["t2m"], rtol=1e-5)


def test_a_system_beyond_the_memory_is_refused_before_the_run(refusal, files, written, monkeypatch):
    monkeypatch.setattr("ddo_modulus.inference.memory.free_memory", lambda device: 2.0**31)
    count = 8000

    def many(frame):
        random = np.random.default_rng(0)
        rows = frame.iloc[np.zeros(count, int)].reset_index(drop=True)
        return rows.assign(observation=rows["observation"] + random.normal(0, 0.1, count))

    refusal(
        "assimilate",
        f"{count} observations at 2019-03-27",
        "superob.km=",
        "thinning.km=",
        package=files.package,
        observations=written(many),
        **FEW,
    )
