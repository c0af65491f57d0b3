# SPDX-License-Identifier: Apache-2.0
"""Gridded fields as users have them: each is read as what it says it is, or refused in one line.

A table holds one case a line. `fields` makes a small file of t2m; a case changes it.
"""

import bz2
import gzip
import lzma
import zipfile

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from ddo_modulus.data.source import check_values, open_dataset, reading_notes
from ddo_modulus.errors import InputError

LAT, LON = np.arange(55.0, 52.9, -0.5), np.arange(0.0, 3.1, 0.5)
TIME = pd.date_range("2019-03-01", periods=4, freq="6h")
BASE = {"t2m": 280.0, "z500": 55000.0, "q700": 0.004, "r500": 50.0, "msl": 101000.0, "sp": 95000.0}


def fields(name="t2m", base=None, std=1.0, lat=LAT, lon=LON, time=TIME, **attributes):
    """A dataset of one variable on (time, latitude, longitude), float32."""
    base = BASE.get(name, 10.0) if base is None else base
    random = np.random.default_rng(0)
    values = base + std * random.standard_normal((len(time), len(lat), len(lon)))
    dims = ("time", "latitude", "longitude")
    coords = dict(zip(dims, (time, np.asarray(lat), np.asarray(lon)), strict=True))
    return xr.Dataset({name: (dims, values.astype(np.float32), attributes)}, coords)


def on_levels(levels, dim="level", name="t", base=250.0, variable=None, **attributes):
    """A variable on levels; `attributes` are those of the axis."""
    data = xr.concat([fields(name, base + i) for i in range(len(levels))], dim)
    data[name].attrs.update(variable or {})
    return data.assign_coords({dim: (dim, levels, attributes)})


def timed(values, **attributes):
    """A file whose time is numbers with attributes."""
    time = xr.DataArray(np.asarray(values), dims="time", attrs=attributes)
    return fields().drop_vars("time").isel(time=slice(0, len(time))).assign_coords(time=time)


def written(dataset, path, **encoding):
    for name in dataset.data_vars:
        encoding.setdefault(name, {"_FillValue": None})
    dataset.to_netcdf(path, encoding=encoding)
    return path


def read(path, variables=None):
    """Open and check a file as `ddo prepare` does."""
    dataset = open_dataset(path, variables)
    check_values(dataset, str(path))
    return dataset


def refused(path, *needed, variables=None):
    with pytest.raises(InputError) as error:
        read(path, variables)
    message = " ".join(str(error.value).split())
    for text in (str(path), *needed):
        assert text in message, message
    for advice in ("decode_times", "h5py", "cftime if", "pandas", "engine=", "manually"):
        assert advice not in message, message


# ---- declared units -----------------------------------------------------------------------------

CONVERTED = [
    # variable, units, value in the file, value in the lexicon's units
    ("t2m", "degC", 10.0, 283.15),
    ("t2m", "C", 10.0, 283.15),
    ("t2m", "Celsius", 10.0, 283.15),
    ("t2m", "degrees_C", 10.0, 283.15),
    ("t2m", "°C", 10.0, 283.15),
    ("t2m", "degF", 50.0, 283.15),
    ("t2m", "mK", 283150.0, 283.15),
    ("d2m", "degC", 3.0, 276.15),
    ("sst", "degree_Celsius", 12.0, 285.15),
    ("skt", "deg_C", 12.0, 285.15),
    ("stl1", "degC", 12.0, 285.15),
    ("t850", "degC", -5.0, 268.15),
    ("u10m", "knots", 20.0, 10.28889),
    ("v10m", "kt", 20.0, 10.28889),
    ("ws10m", "km/h", 36.0, 10.0),
    ("u100m", "mph", 20.0, 8.9408),
    ("u850", "cm s-1", 1200.0, 12.0),
    ("msl", "hPa", 1010.0, 101000.0),
    ("msl", "mb", 1010.0, 101000.0),
    ("msl", "millibars", 1010.0, 101000.0),
    ("sp", "kPa", 95.0, 95000.0),
    ("z500", "m", 5600.0, 54917.24),
    ("z500", "gpm", 5600.0, 54917.24),
    ("z500", "dam", 560.0, 54917.24),
    ("z500", "gpdam", 560.0, 54917.24),
    ("z", "m", 100.0, 980.665),
    ("q700", "g/kg", 4.0, 0.004),
    ("q700", "g kg-1", 4.0, 0.004),
    ("r500", "1", 0.5, 50.0),
    ("r500", "(0 - 1)", 0.5, 50.0),
    ("r2m", "fraction", 0.5, 50.0),
    ("tcc", "%", 40.0, 0.4),
    ("lsm", "percent", 40.0, 0.4),
    ("tp", "mm", 3.0, 0.003),
    ("tp06", "kg m**-2", 3.0, 0.003),
    ("tp24", "cm", 3.0, 0.03),
    ("tcwv", "mm", 20.0, 20.0),
    ("w500", "hPa s**-1", 0.01, 1.0),
    ("wd10m", "radians", 1.0, 57.29578),
    ("swvl1", "%", 30.0, 0.3),
]


@pytest.mark.parametrize(("name", "units", "given", "expected"), CONVERTED)
def test_declared_units_are_converted(tmp_path, name, units, given, expected):
    data = fields(name, given, std=0.001 * given, units=units)
    dataset = read(written(data, tmp_path / "x.nc"))
    np.testing.assert_allclose(dataset[name].mean(), expected, rtol=2e-3)
    wanted = dataset[name].attrs["units"]
    said = f"{tmp_path / 'x.nc'}: {name} is converted from {units} to {wanted}"
    assert reading_notes(dataset) == (() if given == expected else (said,))


SAME = [
    ("t2m", "K"),
    ("t2m", "kelvin"),
    ("t2m", "degK"),
    ("u10m", "m s**-1"),
    ("u10m", "m s-1"),
    ("u10m", "m/s"),
    ("z500", "m**2 s**-2"),
    ("z500", "m2 s-2"),
    ("z500", "J kg-1"),
    ("q700", "kg kg**-1"),
    ("q700", "1"),
    ("r500", "%"),
    ("msl", "Pa"),
    ("t2m", ""),
    ("t2m", "unknown"),
    ("tcc", "(0 - 1)"),
    ("vorticity", "furlongs per fortnight"),
]


@pytest.mark.parametrize(("name", "units"), SAME)
def test_the_lexicons_units_change_no_value(tmp_path, name, units):
    base = 0.5 if name == "tcc" else None
    data = fields(name, base, std=1e-4, units=units)
    dataset = read(written(data, tmp_path / "x.nc"))
    expected = data[name].rename(latitude="lat", longitude="lon")
    np.testing.assert_array_equal(dataset[name], expected)
    assert dataset[name].dtype == np.float32 and not reading_notes(dataset)


INCOMPATIBLE = [
    ("t2m", "m/s", "cannot be converted to K"),
    ("u10m", "K", "cannot be converted to m/s"),
    ("u10m", "1", "cannot be converted to m/s"),
    ("w500", "m s**-1", "cannot be converted to Pa/s"),
    ("tp", "mm/h", "cannot be converted to m"),
    ("tp", "kg m-2 s-1", "cannot be converted to m"),
    ("msl", "m", "cannot be converted to Pa"),
    ("q700", "K", "cannot be converted to kg/kg"),
    ("wd10m", "1", "cannot be converted to degrees"),
    ("tcwv", "Pa", "cannot be converted to kg/m2"),
    ("t2m", "temperature of the air", "are not understood"),
    ("z500", "m**9**9**9**9", "are not understood"),
]


@pytest.mark.parametrize(("name", "units", "words"), INCOMPATIBLE)
def test_units_of_another_quantity_are_refused(tmp_path, name, units, words):
    path = written(fields(name, units=units), tmp_path / "x.nc")
    refused(path, name, repr(units), words, "attribute units")


CONTRADICTED = [
    ("t2m", "degC", 283.0, "units declared as 'degC', converted): t2m runs from"),
    ("t2m", None, 10.0, "add 273.15"),
    ("msl", None, 1010.0, "multiply by 100"),
    ("q700", None, 4.0, "divide by 1000"),
    ("r500", None, 0.5, "multiply by 100"),
    ("r500", "%", 0.5, "multiply by 100"),
    ("r500", "1", 50.0, "units declared as '1', converted): r500 runs from"),
    ("z500", None, 5600.0, "multiply by 9.80665"),
    ("z500", "m", 55000.0, "units declared as 'm', converted): z500 runs from"),
    ("t2.5", None, -40.0, "add 273.15"),
]


@pytest.mark.parametrize(("name", "units", "base", "words"), CONTRADICTED)
def test_values_that_contradict_their_units_are_refused(tmp_path, name, units, base, words):
    attributes = {} if units is None else {"units": units}
    path = written(fields(name, base, std=1e-3 * base, **attributes), tmp_path / "x.nc")
    refused(path, name, words)


# ---- fill values and types ----------------------------------------------------------------------

FILLS = [
    ("tp", 9.96921e36),
    ("tcwv", -9999.0),
    ("vorticity", -9999.0),
    ("vorticity", 1e20),
    ("vorticity", 9.999e20),
    ("vorticity", -32767.0),
    ("vorticity", 3.4028235e38),
    ("vorticity", -1e30),
    ("cape", -999.0),
    ("cape", 99999.0),
    ("t2m", -9999.0),
    ("u10m", -99.9),
    ("z", 1e15),
    ("lsm", -999.9),
    ("w500", -32768.0),
]


@pytest.mark.parametrize(("name", "fill"), FILLS)
def test_undeclared_fill_values_are_counted(tmp_path, name, fill):
    data = fields(name)
    data[name][1, 2, 3] = data[name][2, 0, 0] = fill
    path = written(data, tmp_path / "x.nc")
    refused(path, f"{name} holds {fill:.6g} in 2 of 140 places", "_FillValue")


def test_an_undeclared_fill_value_in_other_units(tmp_path):
    data = fields("u10m", units="knots")
    data["u10m"][0, 0, 0] = -9999.0
    refused(written(data, tmp_path / "x.nc"), "u10m holds -9999 in 1 of 140 places")


@pytest.mark.parametrize("value", [-9999.0, 9999.0])
def test_nines_among_their_like_are_values(tmp_path, value):
    data = fields("vorticity", value, std=3000.0)
    data["vorticity"][0, 0, 0] = value
    read(written(data, tmp_path / "x.nc"))


@pytest.mark.parametrize("fill", [-9999.0, 1e20, 9.96921e36])
def test_declared_fill_values_are_missing_values(tmp_path, fill):
    data = fields("tcwv")
    data["tcwv"][1, 2, 3] = np.nan
    path = written(data, tmp_path / "x.nc", tcwv={"_FillValue": np.float32(fill)})
    refused(path, "tcwv has 1 missing or infinite values of 140")


PACKED = [
    {"dtype": "i2", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -32767},
    {"dtype": "i4", "scale_factor": 1e-5, "add_offset": 280.0, "_FillValue": -1},
    {"dtype": "u1", "scale_factor": 0.05, "add_offset": 274.0, "_FillValue": 255},
]


@pytest.mark.parametrize("packing", PACKED, ids=lambda packing: packing["dtype"])
def test_packed_values_are_unpacked(tmp_path, packing):
    data = fields(units="K")
    dataset = read(written(data, tmp_path / "x.nc", t2m=dict(packing)))
    np.testing.assert_allclose(dataset["t2m"], data["t2m"], atol=packing["scale_factor"])


def test_packed_values_are_unpacked_before_their_units_are_converted(tmp_path):
    data = fields(base=7.0, units="degC")
    dataset = read(written(data, tmp_path / "x.nc", t2m=dict(PACKED[0], add_offset=7.0)))
    np.testing.assert_allclose(dataset["t2m"], data["t2m"] + 273.15, atol=0.01)


@pytest.mark.parametrize("dtype", ["i2", "i4", "i8", "u2", "f8"])
def test_whole_numbers_are_values(tmp_path, dtype):
    data = fields().round().astype(dtype)
    dataset = read(written(data, tmp_path / "x.nc", t2m={}))
    assert dataset["t2m"].dtype.kind == "f"
    np.testing.assert_array_equal(dataset["t2m"], data["t2m"])


def test_packed_values_that_lost_their_scale_are_refused(tmp_path):
    data = (100 * (fields() - 280)).round().astype("i2")
    refused(written(data, tmp_path / "x.nc", t2m={}), "t2m runs from", "150 to 350 K")


def test_categories_are_left_out_and_said(tmp_path):
    data = fields()
    kind = {"flag_values": [0, 1], "flag_meanings": "water land"}
    data["cover"] = (data["t2m"] > 280).astype("i1").assign_attrs(kind)
    path = written(data, tmp_path / "x.nc", cover={})
    assert list(read(path)) == ["t2m"]
    assert reading_notes(open_dataset(path)) == (f"{path}: left out: cover",)
    refused(path, "no field cover", "categories (flag_values)", variables=["cover"])


# ---- levels -------------------------------------------------------------------------------------

PRESSURES = [
    ("level", [850, 500], {"units": "hPa"}),
    ("level", [850, 500], {"units": "millibars"}),
    ("level", [850, 500], {"units": "mbar"}),
    ("level", [85000.0, 50000.0], {"units": "Pa"}),
    ("plev", [85000.0, 50000.0], {"units": "Pa", "standard_name": "air_pressure"}),
    ("pressure_level", [850.0, 500.0], {"units": "hPa", "stored_direction": "decreasing"}),
    ("isobaricInhPa", [850.0, 500.0], {}),
    ("pressure", [85.0, 50.0], {"units": "kPa"}),
]


@pytest.mark.parametrize(("dim", "levels", "attributes"), PRESSURES)
def test_levels_that_say_pressure_become_ids(tmp_path, dim, levels, attributes):
    dataset = read(written(on_levels(levels, dim, **attributes), tmp_path / "x.nc"))
    assert list(dataset) == ["t850", "t500"]
    assert dataset["t500"].mean() == pytest.approx(float(dataset["t850"].mean()) + 1, abs=1e-3)


def test_levels_are_taken_at_their_word(tmp_path):
    data = on_levels([850, 500], units="Pa")
    assert list(read(written(data, tmp_path / "x.nc"))) == ["t8.5", "t5"]


OTHER_LEVELS = [
    ("level", [1, 2], {}, "has no units"),
    ("level", [850, 500], {}, "set its attribute units to hPa"),
    ("plev", [850, 500], {}, "has no units"),
    ("lev", [1, 2], {"units": "1"}, "in units '1'"),
    ("level", [100, 137], {"long_name": "model_level_number"}, "model levels"),
    ("level", [100, 137], {"long_name": "model_level_number", "units": "hPa"}, "model levels"),
    ("lev", [0.2, 0.9], {"standard_name": "atmosphere_sigma_coordinate"}, "model levels"),
    ("hybrid", [100, 137], {"long_name": "hybrid level"}, "model levels"),
    ("model_level", [100, 137], {}, "model levels"),
    ("level", [10, 100], {"units": "m", "long_name": "height"}, "in units 'm' (height)"),
    ("height", [10, 100], {"units": "m"}, "heights in m"),
    ("heightAboveGround", [10, 100], {}, "heights in m"),
    ("depth", [1, 2], {"units": "m"}, "depths"),
    ("level", [85000, 50000], {"units": "hPa"}, "up to 1100 hPa"),
    ("level", [850, 500], {"units": "K", "long_name": "isentropic"}, "in units 'K'"),
]


@pytest.mark.parametrize(("dim", "levels", "attributes", "words"), OTHER_LEVELS)
def test_other_levels_are_refused(tmp_path, dim, levels, attributes, words):
    path = written(on_levels(levels, dim, **attributes), tmp_path / "x.nc")
    refused(path, "t lies on", dim, words)


def test_a_single_model_level_is_no_surface(tmp_path):
    data = on_levels([137], "hybrid").isel(hybrid=0)
    refused(written(data, tmp_path / "x.nc"), "t lies on 'hybrid'", "model levels")


# ---- time ---------------------------------------------------------------------------------------

SIX = np.arange(4) * 6.0
TIMES = [
    # values, attributes, first and second time
    (SIX, {"units": "hours since 2019-03-01"}, "2019-03-01T00", "2019-03-01T06"),
    (SIX / 24, {"units": "days since 2019-03-01"}, "2019-03-01T00", "2019-03-01T06"),
    (SIX - 1e-6, {"units": "hours since 2019-03-01"}, "2019-03-01T00", "2019-03-01T06"),
    (SIX / 24 - 1e-9, {"units": "days since 2019-03-01"}, "2019-03-01T00", "2019-03-01T06"),
    (SIX - 0.01 / 3600, {"units": "hours since 2019-03-01"}, "2019-03-01T00", "2019-03-01T06"),
    (SIX * 60, {"units": "minutes since 2019-03-01 00:30"}, "2019-03-01T00:30", "2019-03-01T06:30"),
    (SIX, {"units": "hours since 2019-03-01 00:00 +02:00"}, "2019-02-28T22", "2019-03-01T04"),
    (SIX[::-1], {"units": "hours since 2019-03-01"}, "2019-03-01T00", "2019-03-01T06"),
    (
        SIX,
        {"units": "hours since 2019-03-01", "calendar": "noleap"},
        "2019-03-01T00",
        "2019-03-01T06",
    ),
    (
        SIX,
        {"units": "hours since 2019-03-01", "calendar": "proleptic_gregorian"},
        "2019-03-01T00",
        "2019-03-01T06",
    ),
]


@pytest.mark.parametrize(("values", "attributes", "first", "second"), TIMES)
def test_times_are_read(tmp_path, values, attributes, first, second):
    time = read(written(timed(values, **attributes), tmp_path / "x.nc"))["time"].values
    assert time[:2].tolist() == np.array([first, second], "datetime64[ns]").tolist()
    assert (np.diff(time) > np.timedelta64(0)).all()


NO_TIMES = [
    (SIX, {"units": "months since 2000-01-01"}, "months and years have no fixed length"),
    (SIX, {"units": "years since 2000-01-01"}, "months and years have no fixed length"),
    (20190301 + SIX / 24, {"units": "day as %Y%m%d.%f"}, "cdo -r copy"),
    (SIX, {"units": "hours"}, "not all dates"),
    (SIX, {}, "not all dates"),
    (SIX, {"units": "hours since then"}, "CF conventions"),
    (SIX, {"units": "hours since 2019-03-01", "calendar": "360_day"}, "'360_day'"),
    (SIX, {"units": "hours since 2019-03-01", "calendar": "julian"}, "'julian'"),
    (SIX, {"units": "hours since 2019-03-01", "calendar": "all_leap"}, "'all_leap'"),
    (SIX, {"units": "hours since 2019-03-01", "calendar": "martian"}, "CF conventions"),
    (SIX, {"units": "hours since 0001-01-01"}, "must lie in 1678 to 2261"),
    (SIX * 0, {"units": "hours since 2019-03-01"}, "3 times are repeated"),
    ([0, 6, np.nan, 18], {"units": "hours since 2019-03-01"}, "1 of 4 times are missing"),
]


@pytest.mark.parametrize(("values", "attributes", "words"), NO_TIMES)
def test_what_are_no_times_is_named(tmp_path, values, attributes, words):
    refused(written(timed(values, **attributes), tmp_path / "x.nc"), "time", words)


# ---- axes ---------------------------------------------------------------------------------------

AXES = [
    ({"lat": [55.0, 54.5, 54.5, 54.0]}, "lat has repeated points"),
    ({"lat": [55.0, 54.5, 53.0]}, "lat is not evenly spaced"),
    ({"lat": [95.0, 94.0, 93.0]}, "latitudes reach 95 degrees"),
    ({"lat": [55.0, np.nan, 54.0]}, "lat has missing values"),
    ({"lat": [55.0]}, "lat has one point only"),
    ({"lon": [0.0, 1.0, 1.0, 2.0]}, "1 longitudes are repeated"),
    ({"lon": [0.0, 1.0, 3.0]}, "lon is not evenly spaced"),
    ({"lon": [0.0]}, "lon has one point only"),
    ({"lon": np.arange(0.0, 720.0, 7.0)}, "lon is not evenly spaced"),
]


@pytest.mark.parametrize(("axes", "words"), AXES)
def test_axes_that_are_no_grid_are_refused(tmp_path, axes, words):
    refused(written(fields(**axes), tmp_path / "x.nc"), words)


@pytest.mark.parametrize("units", ["radians", "m", "km"])
def test_axes_that_are_not_degrees_are_refused(tmp_path, units):
    data = fields()
    data["latitude"].attrs["units"] = units
    refused(written(data, tmp_path / "x.nc"), f"lat is in '{units}', not in degrees")


# ---- names --------------------------------------------------------------------------------------

NAMES = [
    # name in the file, attributes, id
    ("u100", {}, "u100"),
    ("u10", {}, "u10"),
    ("u100", {"long_name": "u component of wind at 100 hPa"}, "u100"),
    ("u100", {"long_name": "100 metre U wind component"}, "u100m"),
    ("v10", {"long_name": "10 metre V wind component"}, "v10m"),
    ("u10", {"GRIB_shortName": "10u"}, "u10m"),
    ("u10", {"GRIB_typeOfLevel": "heightAboveGround"}, "u10m"),
    ("ws10", {"long_name": "10m wind speed"}, "ws10m"),
    ("2t", {}, "t2m"),
    ("prmsl", {}, "msl"),
    ("t2m", {}, "t2m"),
]


@pytest.mark.parametrize(("name", "attributes", "expected"), NAMES)
def test_a_name_is_an_id_unless_its_attributes_say_more(tmp_path, name, attributes, expected):
    base = {"t2m": 280.0, "msl": 1e5}.get(expected, 10.0)
    path = written(fields(name, base, **attributes), tmp_path / "x.nc")
    assert list(read(path)) == [expected]
    assert bool(reading_notes(open_dataset(path))) == (expected in ("u100", "u10"))


# ---- formats ------------------------------------------------------------------------------------


def archive(path, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.nc", content)


FOREIGN = [
    ("x.nc", lambda content: b"<!DOCTYPE html><html>log in</html>", "a web page"),
    ("x.grib", lambda content: b"\n <html><body>404</body></html>", "a web page"),
    ("x.nc", lambda content: b'<?xml version="1.0"?><Error/>', "a web page"),
    ("x.nc", lambda content: b'{"message": "not found"}', "JSON"),
    ("x.nc", lambda content: b"HTTP/1.1 200 OK\r\n\r\n" + content, "the answer of a web server"),
    ("x.nc", gzip.compress, "gunzip"),
    ("x.nc", bz2.compress, "bunzip2"),
    ("x.rda", bz2.compress, "a file of R"),
    ("x.nc", lzma.compress, "unxz"),
    ("x.nc", lambda content: b"", "is empty"),
    ("x.grib", lambda content: b"BUFR" + bytes(40), "a BUFR file of reports"),
    ("x.grib", lambda content: b"\r\r\nISMD01 EGRR\r\r\nBUFR" + bytes(40), "a BUFR file"),
    ("x.nc", lambda content: b"\xff\xffODA" + bytes(40), "an ODB file of reports"),
    ("x.nc", lambda content: b"PAR1" + bytes(40), "a parquet table"),
    ("x.nc", lambda content: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("x.nc", lambda content: b"\x93NUMPY" + bytes(40), "an array of numpy"),
    ("x.nc", lambda content: b"time,lat,lon\n", "not a GRIB or netCDF file"),
    ("x.nc", lambda content: content[: len(content) // 3], "damaged or cut short"),
    ("x.nc", lambda content: content[: len(content) - 400], "damaged or cut short"),
]


@pytest.mark.parametrize(("name", "made", "words"), FOREIGN)
def test_what_is_no_file_of_fields_is_named(tmp_path, name, made, words):
    path = tmp_path / name
    content = written(fields(), tmp_path / "good.nc").read_bytes()
    path.write_bytes(made(content))
    refused(path, words)


def test_a_zip_archive_is_named(tmp_path):
    archive(tmp_path / "x.nc", b"data")
    refused(tmp_path / "x.nc", "a zip archive; unpack it")


@pytest.mark.parametrize("share", [0.4, 0.95])
def test_a_classic_file_cut_short_is_refused(tmp_path, share):
    path = tmp_path / "x.nc"
    fields().to_netcdf(path, format="NETCDF3_64BIT")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, "damaged or cut short")


@pytest.mark.parametrize("url", ["https://example.org/x.nc", "http://example.org/a/x.grib2?y=1"])
def test_the_url_of_a_file_is_named(url):
    refused(url, "is the URL of a file; download it")


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (on_levels([850, 500]), "t lies on 'level'"),
        (fields("tcwv", units="K"), "cannot be converted to kg/m2"),
        (fields(base=283.0, units="degC"), "units declared as 'degC'"),
        (timed(SIX, units="months since 2000-01-01"), "months since"),
        (fields(lat=[95.0, 94.0, 93.0]), "latitudes reach 95"),
    ],
)
def test_prepare_refuses_in_one_line(refusal, tmp_path, data, words):
    source = tmp_path / "in" / "x.nc"
    source.parent.mkdir()
    written(data, source)
    refusal("prepare", str(source), words, source=source)


def test_prepare_refuses_a_fill_value_in_one_line(refusal, tmp_path):
    data = fields("tp", 0.001, std=1e-4)
    data["tp"][2, 3, 4] = 9.96921e36
    source = written(data, tmp_path / "x.nc")
    refusal("prepare", "x.nc: tp holds 9.96921e+36", source=source, out=tmp_path / "o.zarr")


def test_prepare_says_what_it_converts(accepted, tmp_path):
    source = written(fields("u10m", units="knots"), tmp_path / "x.nc")
    store, result = accepted("prepare", source=source)
    assert f"{source}: u10m is converted from knots to m/s" in result.out
    expected = 10.0 * 1852 / 3600
    np.testing.assert_allclose(store["fields"].mean(), expected, rtol=0.01)
    again = open_dataset(tmp_path / "out.zarr")
    assert again["u10m"].attrs["units"] == "m/s" and not reading_notes(again)


def test_hours_are_rounded(accepted, tmp_path):
    days = (SIX / 24 + 43523).astype("f4") - np.float32(2**-8)  # five minutes early
    source = written(timed(days, units="days since 1900-01-01"), tmp_path / "x.nc")
    accepted("prepare", source=source)
    statistics = xr.open_zarr(tmp_path / "out.zarr", group="statistics", consolidated=False)
    assert np.flatnonzero(statistics["hour_count"]).tolist() == [0, 6, 12, 18]
