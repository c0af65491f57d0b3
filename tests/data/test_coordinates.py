# SPDX-License-Identifier: Apache-2.0
"""Any order and branch of coordinates means the same grid, or is refused."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import assume, given
from hypothesis import strategies as st

from ddo_modulus.data.coordinates import canonical_coordinates
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid

SPACINGS = st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.625])


def dataset(lat, lon):
    """A field whose values are 1000 lat + lon, longitude from 0 to 360."""
    lat, lon = np.asarray(lat), np.asarray(lon)
    value = 1000 * np.round(lat.astype(float), 3)[:, None] + np.round(lon.astype(float) % 360, 3)
    time = np.array(["2019-03-01"], "datetime64[ns]")
    axes = {"time": time, "lat": lat, "lon": lon}
    return xr.Dataset({"x": (tuple(axes), value[None])}, axes)


def canonical(lat, lon):
    return canonical_coordinates(dataset(lat, lon), "here")


@st.composite
def grids(draw):
    """Latitudes and longitudes of a region or the globe, and their spacing."""
    step = draw(SPACINGS)
    rows = draw(st.integers(2, 12))
    south = draw(st.floats(-90, 90 - step * (rows - 1)).map(lambda x: round(x, 2)))
    south = min(max(south, -90.0), 90 - step * (rows - 1))
    whole = draw(st.booleans())
    columns = round(360 / step) if whole else draw(st.integers(2, 40))
    west = round(draw(st.floats(-180, 360)), 2)
    return south + step * np.arange(rows), west + step * np.arange(columns), step


def same_axis(a, b, step):
    return a.shape == b.shape and np.abs(a - b).max() < 1e-2 * step


@given(grids(), st.randoms(use_true_random=False), st.sampled_from([-360, 0, 360]), st.booleans())
def test_any_order_and_branch_is_one_grid(grid, random, turn, single):
    lat, lon, step = grid
    reference = canonical(lat, lon)
    rows, columns = list(range(len(lat))), list(range(len(lon)))
    random.shuffle(rows)
    random.shuffle(columns)
    turns = np.array([random.choice([0, turn]) for _ in columns])
    kind = np.float32 if single else np.float64
    other = canonical(lat[rows].astype(kind), (lon[columns] + turns).astype(kind))
    assert same_axis(other["lat"].values, reference["lat"].values, step)
    west, start = other["lon"].values, reference["lon"].values
    assert len(west) == len(start) and (np.diff(west) > 0).all()
    shift = (west - start + 180) % 360 - 180
    if len(lon) * step < 359.9:
        assert np.abs(shift).max() < 1e-2 * step
    for result in (reference, other):
        made = LatLonGrid(result["lat"].values, result["lon"].values)
        assert made.is_global == (abs(len(lon) * step - 360) < 1e-6)
        assert (np.diff(result["lat"]) < 0).all()
        place = result["x"].isel(time=0)
        expected = 1000 * place["lat"] + place["lon"] % 360
        off = np.abs(place - expected)
        assert float(np.minimum(off, np.abs(off - 360)).max()) < 1.0


@given(grids(), st.data())
def test_an_axis_with_a_fault_is_refused(grid, data):
    lat, lon, step = grid
    assume(len(lat) > 3 and len(lon) > 3)
    axis, values = data.draw(st.sampled_from([("lat", lat), ("lon", lon)]))
    place = data.draw(st.integers(1, len(values) - 2))
    fault = data.draw(st.sampled_from(["moved", "repeated", "missing", "lost"]))
    values = values.copy()
    if fault == "moved":
        values[place] += 0.3 * step
    elif fault == "repeated":
        values[place] = values[place - 1]
    elif fault == "missing":
        values[place] = np.nan
    else:
        assume(axis == "lat" or len(lon) * step < 350)
        values = np.delete(values, place)
    changed = (values, lon) if axis == "lat" else (lat, values)
    with pytest.raises(InputError, match="here: .*(lat|lon)"):
        canonical(*changed)


@given(st.lists(st.floats(-400, 800), min_size=1, max_size=8))
def test_any_longitudes_are_a_grid_or_refused(lon):
    try:
        result = canonical([50.0, 51.0, 52.0], lon)
    except InputError as error:
        assert str(error).startswith("here: ")
        return
    steps = np.diff(result["lon"].values)
    assert (steps > 0).all() and np.ptp(steps) <= 3e-3 * steps.max()
    assert len(steps) + 1 in (len(lon), len(lon) - 1)


def test_the_seam_is_kept_once():
    for lon in (np.arange(0, 361, 30.0), np.arange(-180, 181, 30.0)):
        for kind in (np.float32, np.float64):
            result = canonical([50.0, 51.0], lon.astype(kind) + kind(1e-5) * (lon == 360))
            np.testing.assert_allclose(result["lon"], np.arange(0, 360, 30.0), atol=1e-4)


def test_round_off_about_greenwich_is_not_a_turn():
    result = canonical([50.0, 51.0], np.r_[-1e-7, np.arange(10, 360, 10.0)])
    np.testing.assert_allclose(result["lon"], np.arange(0, 360, 10.0), atol=1e-6)
