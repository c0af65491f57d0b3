# SPDX-License-Identifier: Apache-2.0
import shutil

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from ddo_modulus.data import source
from ddo_modulus.data.source import check_values, open_dataset, slabs
from ddo_modulus.errors import InputError

LAT = np.arange(50.0, 53.0, 0.5)
LON = np.arange(0.0, 4.0, 0.5)
TIME = pd.date_range("2019-03-01", periods=5, freq="6h")


def made(lat=LAT, lon=LON, time=TIME, names=("latitude", "longitude"), variable="2m_temperature"):
    """A field whose values encode their place: 280 + lat / 100 + lon / 10000 + time step."""
    value = (
        280
        + np.arange(len(time))[:, None, None]
        + np.asarray(lat)[:, None] / 100
        + np.mod(lon, 360) / 10000
    )
    dims = ("time", *names)
    coords = dict(zip(dims, (time, lat, lon), strict=True))
    return xr.Dataset({variable: (dims, value)}, coords=coords)


def write(dataset, tmp_path, kind="nc"):
    path = tmp_path / f"field.{kind}"
    if kind == "nc":
        dataset.to_netcdf(path)
    else:
        dataset.to_zarr(path, zarr_format=int(kind[-1]), consolidated=False)
    return path


def place_is_right(dataset):
    """Whether each value is at the place that it encodes."""
    lat, lon = dataset["lat"], np.mod(dataset["lon"], 360)
    step = xr.DataArray(np.arange(dataset.sizes["time"]), dims="time")
    expected = 280 + step + lat / 100 + lon / 10000
    return bool(np.allclose(dataset["t2m"], expected.transpose("time", "lat", "lon"), atol=1e-6))


@pytest.mark.parametrize("kind", ["nc", "zarr2", "zarr3"])
def test_every_format_gives_the_canonical_form(tmp_path, kind):
    dataset = open_dataset(write(made(), tmp_path, kind))
    assert dataset["t2m"].dims == ("time", "lat", "lon")
    np.testing.assert_array_equal(dataset["lat"], LAT[::-1])
    assert dataset["time"].dtype == "datetime64[ns]"
    assert place_is_right(dataset)


@pytest.mark.parametrize(
    ("lon", "expected"),
    [
        (np.arange(0, 360, 30.0), np.arange(0, 360, 30.0)),  # the globe
        (np.arange(-180, 180, 30.0), np.arange(0, 360, 30.0)),
        (np.arange(0, 361, 30.0), np.arange(0, 360, 30.0)),  # 360 repeats 0
        (np.arange(-10, 3, 1.0), np.arange(-10, 3, 1.0)),  # across Greenwich
        (np.mod(np.arange(-10, 3, 1.0), 360), np.arange(-10, 3, 1.0)),
        (np.sort(np.mod(np.arange(-10, 3, 1.0), 360)), np.arange(-10, 3, 1.0)),
        (np.arange(-100, -90, 1.0), np.arange(260, 270, 1.0)),
        (np.arange(170, 190, 1.0), np.arange(170, 190, 1.0)),  # across the date line
        (np.arange(10, 0, -1.0), np.arange(1, 11, 1.0)),
    ],
)
def test_longitudes_run_eastward_without_a_break(tmp_path, lon, expected):
    dataset = open_dataset(write(made(lon=lon), tmp_path))
    np.testing.assert_allclose(dataset["lon"], expected)
    assert place_is_right(dataset)


def test_times_are_sorted(tmp_path):
    shuffled = made().isel(time=[3, 0, 4, 1, 2])
    dataset = open_dataset(write(shuffled, tmp_path))
    np.testing.assert_array_equal(dataset["time"], TIME)
    assert place_is_right(dataset)


@pytest.mark.parametrize(
    ("dim", "units", "levels"),
    [("level", "millibars", [850, 500]), ("pressure_level", "Pa", [85000.0, 50000.0])],
)
def test_levels_become_variables(tmp_path, dim, units, levels):
    field = made(variable="t").rename(longitude="lon")
    stacked = xr.concat([field, field + 1], dim=pd.Index(levels, name=dim))
    stacked[dim].attrs["units"] = units
    dataset = open_dataset(write(stacked, tmp_path), ["t500", "t850"])
    assert list(dataset) == ["t500", "t850"]
    np.testing.assert_allclose(dataset["t500"], dataset["t850"] + 1)


def test_valid_time_is_the_time(tmp_path):
    """As in the netCDF of the Climate Data Store: a run's time may be there, but misleads."""
    forecast = made().rename(time="valid_time").assign_coords(time=np.datetime64("2000-01-01"))
    dataset = open_dataset(write(forecast, tmp_path))
    np.testing.assert_array_equal(dataset["time"], TIME)


def test_trajectories_and_members_come_first(tmp_path):
    members = xr.concat([made(), made() + 1], dim=pd.Index([0, 1], name="number"))
    dataset = open_dataset(write(members.transpose("time", ...), tmp_path))
    assert dataset["t2m"].dims == ("ensemble", "time", "lat", "lon")


def test_opening_reads_no_values(tmp_path):
    path = write(made().isel(time=[1, 0, 2, 3, 4]), tmp_path, "zarr3")
    for chunk in (path / "2m_temperature" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"damaged")
    dataset = open_dataset(path)
    with pytest.raises(InputError, match="field.zarr3: cannot be read.*again"):
        check_values(dataset, str(path))


def test_static_fields_are_left_aside(tmp_path):
    data = made()
    data["land"] = data["2m_temperature"].isel(time=0, drop=True)
    path = write(data, tmp_path)
    assert list(open_dataset(path)) == ["t2m"]
    with pytest.raises(InputError, match=r"no field land; available: t2m; .*land \('lat', 'lon'\)"):
        open_dataset(path, ["land"])


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(InputError, match="nothing.nc: no such file"):
        open_dataset(tmp_path / "nothing.nc")
    text = tmp_path / "notes.grib"
    text.write_text("not a grid")
    with pytest.raises(InputError, match="notes.grib: not a GRIB or netCDF file"):
        open_dataset(text)
    with pytest.raises(InputError, match="not a zarr store"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_cut_short_is_named(tmp_path, share):
    path = write(made(), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="field.nc: cannot be read, damaged or cut short"):
        check_values(open_dataset(path), str(path))


@pytest.mark.filterwarnings("ignore:Object at latitude")
def test_a_store_cut_short_is_named(tmp_path):
    path = write(made(), tmp_path, "zarr3")
    shutil.rmtree(path / "2m_temperature" / "c")
    with pytest.raises(InputError, match="field.zarr3: t2m has .*chunks lost in copying"):
        check_values(open_dataset(path), str(path))
    (path / "latitude" / "zarr.json").unlink()
    with pytest.raises(InputError, match="field.zarr3"):
        open_dataset(path)


def test_unknown_variables_are_listed_with_the_available_ones(tmp_path):
    with pytest.raises(InputError, match="no field z500; available: t2m"):
        open_dataset(write(made(), tmp_path), ["t2m", "z500"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_missing_values_are_counted_and_placed(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(source, "_SLAB_BYTES", 1)  # one time a slab
    data = made()
    data["2m_temperature"][3, 1, 2] = bad
    data["2m_temperature"][4, 0, 0] = bad
    path = write(data, tmp_path)
    with pytest.raises(
        InputError, match=r"field.nc: t2m has 2 .*first at time=2019-03-01T18.*lat=50.5, lon=1.0"
    ):
        check_values(open_dataset(path), str(path))


def test_celsius_is_caught(tmp_path):
    path = write(made() - 273.15, tmp_path)
    with pytest.raises(InputError, match="t2m .*degrees Celsius: add 273.15"):
        check_values(open_dataset(path), str(path))


def test_good_values_pass(tmp_path):
    path = write(made(), tmp_path)
    check_values(open_dataset(path), str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (made(lat=np.array([50.0, 50.5, 51.2, 52.0])), "lat is not evenly spaced"),
        (made(lon=np.array([0.0, 1.0, 3.0])), "lon is not evenly spaced"),
        (made(lat=np.array([50.0])), "lat has one point"),
        (made(time=TIME[[0, 1, 1, 2]]), "1 times are repeated, the first 2019-03-01T06"),
        (made(time=np.arange(4.0)), "not all dates"),
        (made(names=("row", "column")), "no coordinate 'lat'"),
    ],
)
def test_irregular_axes_are_refused(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        open_dataset(write(data, tmp_path))


def test_slabs_cover_the_field_once(monkeypatch):
    monkeypatch.setattr(source, "_SLAB_BYTES", 2 * LAT.size * LON.size * 8)
    field = made()["2m_temperature"]
    pieces = list(slabs(field, "here"))
    assert [p.sizes["time"] for p in pieces] == [2, 2, 1]
    xr.testing.assert_identical(xr.concat(pieces, "time"), field)


@pytest.mark.shared_data
def test_era5_grib_of_the_united_kingdom(shared_data, tmp_path):
    path = tmp_path / "uk.grib"
    shutil.copy(shared_data / "era5-2mt-2019-03-uk.grib", path)
    dataset = open_dataset(path)
    assert dict(dataset.sizes) == {"time": 744, "lat": 33, "lon": 49}
    assert (dataset["lon"][0], dataset["lon"][-1]) == (-10.0, 2.0)
    assert (dataset["lat"][0], dataset["lat"][-1]) == (58.0, 50.0)
    check_values(dataset, str(path))
    assert list(tmp_path.iterdir()) == [path], "an index was written beside the user's file"


@pytest.mark.shared_data
def test_era5_grib_of_levels_and_members(shared_data, tmp_path):
    path = tmp_path / "levels.grib"
    shutil.copy(shared_data / "era5-levels-members.grib", path)
    dataset = open_dataset(path, ["z500", "t850"])
    assert list(dataset) == ["z500", "t850"]
    assert dataset["z500"].shape == (10, 4, 61, 120)
    assert dataset["z500"].dims == ("ensemble", "time", "lat", "lon")
    check_values(dataset, str(path))
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(InputError, match="levels.grib: cannot be read, damaged or cut short"):
        open_dataset(path)


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "first"), [("pl_u", "u100"), ("pl_q", "q100"), ("sp", "sp")])
def test_era5_netcdf(shared_data, name, first):
    path = shared_data / f"wam2_ERA5_2020-01-01_{name}.nc"
    dataset = open_dataset(path)
    assert next(iter(dataset)) == first
    assert dataset[first].shape == (24, 41, 41)
    check_values(dataset, str(path))
