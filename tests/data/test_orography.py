# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from ddo_modulus.data.orography import read_orography
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import BoxGrid, LatLonGrid

LAT, LON = np.arange(60.0, 50.0, -0.5), np.arange(350.0, 366.0, 0.5) % 360


def written(path, heights=None, **attrs):
    """A slope from south to north and from west to east, as a geopotential."""
    east = (LON + 180) % 360 - 180
    heights = 100 * (LAT[:, None] - 50) + 10 * (east + 10) if heights is None else heights
    time = pd.date_range("2019-03-01", periods=2)
    both = np.stack([9.80665 * heights, np.zeros_like(heights)])
    coords = {"time": time, "latitude": LAT, "longitude": LON}
    xr.Dataset({"z": (tuple(coords), both)}, coords).to_netcdf(path)
    return path


def test_heights_on_another_grid(tmp_path):
    grid = LatLonGrid(np.arange(53.2, 58.0, 0.7), np.arange(-6.1, 2.0, 0.3))
    found = read_orography(written(tmp_path / "z.nc"), grid)
    expected = 100 * (grid.lat[:, None] - 50) + 10 * (grid.lon + 10)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_mistakes_are_named(tmp_path):
    grid = LatLonGrid(np.arange(53.0, 58.0), np.arange(-6.0, 2.0))
    path = written(tmp_path / "high.nc", np.full((20, 32), 9.9e3))
    with pytest.raises(InputError, match="high.nc: heights from 9900 to 9900 m cannot be"):
        read_orography(path, grid)
    path = written(tmp_path / "z.nc")
    with pytest.raises(InputError, match="locations are outside the grid"):
        read_orography(path, LatLonGrid(np.arange(40.0, 58.0), np.arange(-6.0, 2.0)))
    with pytest.raises(
        InputError, match="z.nc: an orography needs latitudes and longitudes.*leave it out"
    ):
        read_orography(path, BoxGrid((4, 4)))
    with xr.open_dataset(path) as dataset:
        dataset.rename(z="t2m").to_netcdf(tmp_path / "t2m.nc")
    with pytest.raises(InputError, match="t2m.nc: no field z"):
        read_orography(tmp_path / "t2m.nc", grid)
