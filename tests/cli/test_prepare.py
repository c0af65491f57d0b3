# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import xarray as xr

from ddo_modulus.cli.prepare import spectral_domain
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.source import open_dataset
from ddo_modulus.data.statistics import StoredStatistics
from ddo_modulus.lexicon import plausible_range


def test_canonical_store(ddo, files, tmp_path):
    out = tmp_path / "x.zarr"
    result = ddo("prepare", source=files.truth, out=out, variables="t2m", start="2019-03-27T03")
    assert result.status == 0, result.err
    stored, source = open_dataset(out), open_dataset(files.truth)
    assert stored.sizes["time"] == 3
    np.testing.assert_array_equal(stored["t2m"], source["t2m"].isel(time=slice(1, None)))


def test_overwrite(ddo, files, tmp_path):
    out = tmp_path / "x.zarr"
    for end, times in (("2019-03-27T06", 2), ("2019-03-27", 4)):
        assert ddo("prepare", source=files.truth, out=out, end=end, overwrite="true").status == 0
        assert open_dataset(out).sizes["time"] == times


def test_statistics_of_a_period(ddo, files, tmp_path):
    """What is left out for validation must not have a part in them."""
    out = tmp_path / "x.zarr"
    keys = {"statistics__end": "2019-03-27T06", "compress": "false"}
    result = ddo("prepare", source=files.truth, out=out, **keys)
    assert result.status == 0, result.err
    assert "statistics of 2019-03-27T00:00 to 2019-03-27T06:00, spectrum on the box" in result.out
    stored = StoredStatistics.of(str(out))
    first = open_dataset(files.truth)["t2m"].isel(time=slice(0, 2)).values.astype(float)
    everywhere = stored.moments(("t2m",), slice(None), slice(None))
    assert everywhere.count.nonzero().flatten().tolist() == [0, 6]
    np.testing.assert_allclose(everywhere.mean[[0, 6], 0], first)
    with xr.open_zarr(out, group="statistics", consolidated=False) as group:
        np.testing.assert_allclose(group["point_mean"][0], first.mean(0))
        assert group["spectrum"].attrs["samples"] == 2
    assert open_dataset(out).sizes["time"] == 4


@pytest.mark.parametrize(
    ("lat", "lon", "units", "expected"),
    [
        (np.arange(9.0), np.arange(9.0), "1", "torus"),
        (np.linspace(80, -80, 9), np.arange(0, 360, 40.0), "degrees", "sphere"),
        (np.linspace(80, -80, 9), np.arange(0, 320, 40.0), "degrees", "box"),
        (np.linspace(90, -90, 721), np.arange(0, 360, 0.25), "degrees", None),
    ],
)
def test_the_domain_of_the_spectrum_is_what_the_grid_is(lat, lon, units, expected):
    axes = {"lat": ("lat", lat, {"units": units}), "lon": ("lon", lon, {"units": units})}
    assert spectral_domain(xr.Dataset(coords=axes), None) == expected


def test_mistakes(refused, files, tmp_path):
    out = tmp_path / "x.zarr"

    def mistake(match, **keys):
        refused(match, "prepare", **{"source": files.truth, "out": out, **keys})

    mistake("no field q", variables="[t2m,q]")
    mistake("start=soon", start="soon")
    mistake("no times in", start="2020-01-01")
    mistake("statistics: no times in", statistics__start="2020-01-01")
    mistake("statistics.spectrum=-1 must be", statistics__spectrum=-1)
    mistake("compress=2 must be one of false, true", compress=2)
    mistake("domain=disc: choose one of torus, box, sphere", domain="disc")
    mistake("does not go round the globe", domain="sphere")
    mistake("no such file", source=tmp_path / "none.nc")
    with xr.open_dataset(files.truth) as truth:
        truth.load()
    gap = tmp_path / "gap.nc"
    truth.where(truth["time"].dt.hour != 6).to_netcdf(gap)
    mistake("missing or infinite values", source=gap)
    store = tmp_path / "lost.zarr"
    truth.to_zarr(store, consolidated=False)
    (store / "zarr.json").unlink()
    mistake("not a zarr store", source=store)


LEVELS = [1, 2, 3, 5, 7, 10, 20, 30, 50, 70, *range(100, 251, 25), *range(300, 751, 50)]
LEVELS += [*range(775, 1001, 25)]
ON_LEVELS = {
    "z": "geopotential",
    "t": "temperature",
    "u": "u_component_of_wind",
    "v": "v_component_of_wind",
    "w": "vertical_velocity",
    "q": "specific_humidity",
    "r": "relative_humidity",
    "ws": "wind_speed",
}
SURFACE = {
    "t2m": "2m_temperature",
    "d2m": "2d",
    "u10m": "10u",
    "v10m": "10m_v_component_of_wind",
    "u100m": "100u",
    "v100m": "100m_v_component_of_wind",
    "msl": "mean_sea_level_pressure",
    "sp": "surface_pressure",
    "sst": "sea_surface_temperature",
    "tcwv": "total_column_water_vapour",
    "tcc": "total_cloud_cover",
    "swvl1": "volumetric_soil_water_layer_1",
    "tp06": "total_precipitation_6hr",
}


def plausible(variable):
    """A value that the variable can have."""
    found = plausible_range(variable)
    return 0.5 if found is None else 0.4 * found.low + 0.6 * found.high


@pytest.mark.slow
def test_every_variable_on_every_level_goes_through_and_back(ddo, tmp_path):
    """Names of a reanalysis become ids, and ids stay what they are however often they are read."""
    time = xr.date_range("2019-03-01", periods=2, freq="12h")
    axes = {"time": time, "lat": [52.0, 51.0, 50.0], "lon": [0.0, 1.0, 2.0]}
    noise = np.random.default_rng(0).random((2, 3, 3)).astype(np.float32)
    expected = {}
    source = xr.Dataset(coords=axes | {"level": ("level", LEVELS, {"units": "hPa"})})
    for letter, name in ON_LEVELS.items():
        ids = [f"{letter}{level}" for level in LEVELS]
        values = [plausible(v) * (1 + 1e-3 * noise) for v in ids]
        source[name] = (("level", "time", "lat", "lon"), np.stack(values).astype(np.float32))
        expected |= dict(zip(ids, source[name].values, strict=True))
    for variable, name in SURFACE.items():
        values = (plausible(variable) * (1 + 1e-3 * noise)).astype(np.float32)
        source[name] = (("time", "lat", "lon"), values)
        expected[variable] = values
    source.to_netcdf(tmp_path / "x.nc")
    keys = {"compress": "false", "statistics__spectrum": 0}
    first, second = tmp_path / "1.zarr", tmp_path / "2.zarr"
    assert ddo("prepare", source=tmp_path / "x.nc", out=first, **keys).status == 0
    plain = tmp_path / "plain.nc"  # ids without a layout or attributes, as Earth2Studio writes
    open_dataset(first).drop_attrs().to_netcdf(plain)
    assert ddo("prepare", source=plain, out=second, **keys).status == 0
    for store in (first, second):
        dataset = open_dataset(store)
        assert set(dataset) == set(expected)
        for variable, values in expected.items():
            np.testing.assert_array_equal(dataset[variable], values, err_msg=variable)
        state = StateReader(store).read(1)
        assert state.shape == (len(expected), 3, 3)
