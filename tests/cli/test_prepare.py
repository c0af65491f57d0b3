# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import xarray as xr

from ddo_modulus.cli.prepare import spectral_domain
from ddo_modulus.data.source import open_dataset
from ddo_modulus.data.statistics import StoredStatistics


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
    mistake("compress=2 must be true or false", compress=2)
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
