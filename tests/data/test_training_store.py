# SPDX-License-Identifier: Apache-2.0
import tracemalloc
import warnings

import dask.array
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from ddo_modulus.data import source, statistics
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.source import open_dataset
from ddo_modulus.data.training_store import write_training_store
from ddo_modulus.errors import InputError


def test_what_is_written_comes_back_in_canonical_form(fields, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_SLAB_BYTES", 30_000)  # several pieces
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of parts of the format that zarr does not promise
        path = write_training_store(fields, tmp_path / "x.zarr", "here")
        xr.testing.assert_identical(open_dataset(path).load(), fields)
        xr.testing.assert_identical(
            open_dataset(path, ["u10m", "t2m"]).load(), fields[["u10m", "t2m"]]
        )


def test_members_come_first(fields, tmp_path):
    members = xr.concat([fields, fields + 1], dim=pd.Index([0, 1], name="ensemble"))
    members = members.assign_attrs(fields.attrs)
    path = write_training_store(members, tmp_path / "x.zarr", "here")
    array = zarr.open_array(path, path="fields")
    assert array.shape == (2, 60, 3, 10, 12) and array.chunks == (1, 1, 3, 10, 12)
    xr.testing.assert_equal(open_dataset(path).load(), members)


@pytest.mark.parametrize("compress", [True, False])
def test_a_chunk_is_one_time_of_all_variables(fields, tmp_path, compress):
    path = write_training_store(fields, tmp_path / "x.zarr", "here", compress=compress)
    array = zarr.open_array(path, path="fields")
    assert array.metadata.zarr_format == 3 and array.dtype == np.float32
    assert array.chunks == (1, 3, 10, 12)
    assert bool(array.compressors) == compress
    expected = {"units": "m2/s2", "cell_methods": "area: mean"}
    assert array.attrs["variables"]["z500"] == expected
    assert array.metadata.dimension_names == ("time", "channel", "lat", "lon")
    with xr.open_zarr(path, consolidated=False) as opened:
        assert opened["channel"].values.tolist() == ["t2m", "z500", "u10m"]


@pytest.mark.parametrize("fault", ["missing", "celsius", "interrupted", "statistics"])
def test_a_store_is_written_whole_or_not_at_all(fields, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(source, "_SLAB_BYTES", 30_000)
    path = write_training_store(fields, tmp_path / "x.zarr", "here")
    bad, error, options = fields.copy(deep=True), InputError, {}
    if fault == "missing":
        bad["z500"][50, 3, 3] = np.nan
    elif fault == "celsius":
        bad["t2m"] = bad["t2m"] - 273.15
    else:
        error = KeyboardInterrupt

        def interrupt(*_):
            raise KeyboardInterrupt

        options = {"progress" if fault == "interrupted" else "finish": interrupt}
    with pytest.raises(error):
        write_training_store(bad, path, "here", overwrite=True, **options)
    xr.testing.assert_identical(open_dataset(path).load(), fields)
    assert list(tmp_path.iterdir()) == [path]


def test_the_memory_does_not_grow_with_the_store(tmp_path, monkeypatch):
    """24 MiB are written, and reduced, in a quarter of that."""
    monkeypatch.setattr(source, "_SLAB_BYTES", 2**20)
    monkeypatch.setattr(statistics, "_BLOCK_BYTES", 2**17)
    times, shape = 384, (64, 128)
    values = dask.array.zeros((times, *shape), chunks=(16, *shape), dtype=np.float32)
    values = values + dask.array.arange(times, chunks=16)[:, None, None].astype(np.float32)
    axes = {
        "time": pd.date_range("2020-01-01", periods=times, freq="1h"),
        "lat": np.linspace(60, 30, shape[0]),
        "lon": np.linspace(0, 60, shape[1]),
    }
    dataset = xr.Dataset({name: (tuple(axes), values) for name in "ab"}, axes)
    quarter = dataset.nbytes / 4

    def peak(work):
        tracemalloc.start()
        work()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    path = tmp_path / "x.zarr"
    assert peak(lambda: write_training_store(dataset, path, "here")) < quarter
    reader = StateReader(path)
    next(statistics.hourly_moments(reader))  # imports
    hours = []

    def reduce():
        for hour, count, mean, variance in statistics.hourly_moments(reader):
            hours.append(hour)
            assert count == 16
            np.testing.assert_allclose(mean, hour + 24 * 7.5)
            np.testing.assert_allclose(variance, 24**2 * (16**2 - 1) / 12)

    assert peak(reduce) < quarter
    assert hours == list(range(24))


def test_arco_and_weatherbench_names(tmp_path):
    """Their dimensions, orders and names, as ERA5 is published in them."""
    time = pd.date_range("2020-01-01", periods=3, freq="6h")
    axes = {"time": time, "level": [500, 850]}
    random = np.random.default_rng(0)

    def made(lat, lon, order):
        names = {"latitude": lat, "longitude": lon}
        t = 250 + random.random((3, 2, len(lat), len(lon))).astype(np.float32)
        data = xr.Dataset(
            {
                "temperature": (("time", "level", *names), t),
                "2m_temperature": (("time", *names), 30 + t[:, 0]),
                "geopotential_at_surface": (tuple(names), t[0, 0]),
            },
            axes | names,
        )
        return data.transpose(*order)

    arco = made(np.arange(60, 50, -2.5), np.arange(0, 360, 45.0), ("time", "level", ...))
    wb2 = made(
        np.arange(-75, 76, 50.0),
        np.arange(0, 360, 45.0),
        ("time", "level", "longitude", "latitude"),
    )
    for name, data, version in (("arco", arco, 2), ("wb2", wb2, 2), ("v3", arco, 3)):
        raw = tmp_path / f"{name}.zarr"
        data.to_zarr(raw, zarr_format=version, consolidated=version == 2)
        with pytest.raises(InputError, match=r"temperature lies on 'level' .*level_units=hPa"):
            open_dataset(raw)
        canonical = open_dataset(raw, level_units="hPa")
        assert set(canonical) == {"t500", "t850", "t2m"}
        path = write_training_store(canonical, tmp_path / f"{name}.store", name)
        stored = open_dataset(path)
        xr.testing.assert_equal(stored.load(), canonical.load())
        assert (np.diff(stored["lat"]) < 0).all()
        expected = data["temperature"].sel(level=850).isel(time=2)
        expected = expected.sel(latitude=stored["lat"].values).transpose("latitude", "longitude")
        np.testing.assert_array_equal(stored["t850"].isel(time=2), expected)


@pytest.mark.shared_data
def test_era5_grib_to_store_and_back(shared_data, tmp_path):
    grib = open_dataset(shared_data / "era5-levels-members.grib")
    path = write_training_store(grib, tmp_path / "x.zarr", "grib")
    xr.testing.assert_identical(open_dataset(path).load(), grib.load())
    reader = StateReader(path, ["t500", "z850"])
    state = reader.read(4 * 7 + 2)  # the third time of the eighth member
    member = grib[["t500", "z850"]].isel(ensemble=7, time=2).to_array().values
    np.testing.assert_array_equal(state, member)
