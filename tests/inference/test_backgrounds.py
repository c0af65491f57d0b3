# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.inference.backgrounds import background_error_field, background_states

TIMES = np.array(["2019-03-27T06", "2019-03-27T13"], "datetime64[ns]")


@pytest.fixture(scope="module")
def package(untrained):
    return untrained(("t2m", "msl"), ("K", "Pa"))


def forecast(package, states, times=TIMES):
    """Dataset in physical units of states (T E C H W)."""
    flat = torch.from_numpy(states).flatten(0, 1)
    hours = package.hours(times.repeat(states.shape[1]))
    values = package.normalization.denormalize(flat, hours).numpy().reshape(states.shape)
    axes = {"time": times, "ensemble": np.arange(states.shape[1])}
    axes |= {"lat": package.grid.lat, "lon": package.grid.lon}
    dims = ("time", "ensemble", "lat", "lon")
    return xr.Dataset(
        {c: (dims, values[:, :, i]) for i, c in enumerate(package.channels)}, coords=axes
    )


@pytest.fixture
def states():
    return np.random.default_rng(0).normal(size=(2, 3, 1, 6, 8))


@pytest.fixture(scope="module")
def warm(untrained):
    return untrained()


def test_states_are_those_that_were_written(warm, states):
    dataset = forecast(warm, states)
    found = background_states(warm, dataset, TIMES, warm.grid)
    np.testing.assert_allclose(found, states, atol=1e-4)
    mixed = dataset.transpose("lon", "ensemble", "time", "lat").isel(
        time=[1, 0], lat=slice(None, None, -1)
    )
    found = background_states(warm, mixed, TIMES[1:], warm.grid)
    np.testing.assert_allclose(found, states[1:], atol=1e-4)
    single = dataset.isel(time=0, ensemble=1)
    found = background_states(warm, single, TIMES[:1], warm.grid)
    np.testing.assert_allclose(found, states[:1, 1:2], atol=1e-4)


def test_any_branch_of_longitude(warm, states):
    dataset = forecast(warm, states)
    turned = dataset.assign_coords(lon=dataset["lon"] % 360).sortby("lon")
    assert turned["lon"].values.max() > 300
    found = background_states(warm, turned, TIMES, warm.grid)
    np.testing.assert_allclose(found, states, atol=1e-4)


def test_from_another_grid_it_is_interpolated(warm):
    """A plane stays a plane, in physical units."""
    lat, lon = np.arange(60.0, 50.0, -0.7), np.arange(-8.0, 4.0, 0.9)
    plane = 280 + 0.5 * lat[:, None] + 0.2 * lon
    axes = {"time": TIMES[:1], "lat": lat, "lon": lon}
    dataset = xr.Dataset({"t2m": (tuple(axes), plane[None])}, coords=axes)
    found = background_states(warm, dataset, TIMES[:1], warm.grid)
    physical = warm.normalization.denormalize(found[:, 0], warm.hours(TIMES[:1]))[0, 0]
    expected = 280 + 0.5 * warm.grid.lat[:, None] + 0.2 * warm.grid.lon
    np.testing.assert_allclose(physical, expected, atol=1e-3)
    fine = warm.grid.at((12, 16))
    found = background_states(warm, dataset, TIMES[:1], fine)
    physical = warm.statistics_at(fine).denormalize(found[:, 0], warm.hours(TIMES[:1]))[0, 0]
    expected = 280 + 0.5 * fine.lat[:, None] + 0.2 * fine.lon
    np.testing.assert_allclose(physical, expected, atol=1e-3)


def test_mistakes(warm, states):
    good = forecast(warm, states)

    def mistake(match, dataset, times=TIMES):
        with pytest.raises(InputError, match=match):
            background_states(warm, dataset, times, warm.grid)

    mistake("no t2m; it has msl", good.rename(t2m="msl"))
    mistake("no 2019-03-28", good, TIMES + np.timedelta64(1, "D"))
    mistake("NaN or infinite", good.where(good["lat"] > 54))
    mistake("degrees Celsius", good - 273.15)
    mistake("does not cover", good.isel(lat=slice(0, 4)))
    mistake("no axis lon", good.isel(lon=0, drop=True))
    mistake("has further axes: level", good.expand_dims("level"))


def test_errors_have_the_standard_deviation_and_the_length_asked_for(package):
    field = background_error_field(package, {"t2m": 1.5, "msl": 80.0}, length=200.0)
    x = field.sample(20_000, generator=torch.Generator().manual_seed(0)).double()
    scale = package.normalization.std.double().square().mean((0, 2, 3)).sqrt()
    found = x.square().mean((0, 2, 3)).sqrt() * scale
    torch.testing.assert_close(found, torch.tensor([1.5, 80.0]).double(), rtol=0.02, atol=0)
    assert (x[:, 0] * x[:, 1]).mean().abs() < 0.02 * x[:, 0].std() * x[:, 1].std()


@pytest.mark.parametrize("smoothness", [0.5, 1.5])
def test_on_the_globe_the_correlation_is_known(smoothness):
    """A box has borders, a sphere has none: exp(-r/L); (1 + a) exp(-a) with a = sqrt(3) r / L."""
    grid = LatLonGrid(SphericalBasis((48, 96)).latitudes(48), np.arange(96) * 3.75)

    globe = SimpleNamespace(
        grid=grid,
        channels=("t2m",),
        operator=SimpleNamespace(noise=SimpleNamespace(basis=SphericalBasis((48, 96)))),
        normalization=SimpleNamespace(std=torch.full((1, 1, 1, 1), 2.0)),
    )
    field = background_error_field(globe, 1.0, 2000.0, smoothness)
    impulse = torch.zeros(1, 48, 96, dtype=torch.float64)
    impulse[0, 24, 0] = 1
    covariance = field.cov(impulse)[0, 24] * 4
    apart = (
        EARTH_RADIUS_KM * np.deg2rad(3.75) * np.arange(6) * np.cos(np.deg2rad(grid.lat[24])) / 2000
    )
    a = np.sqrt(3) * apart
    expected = np.exp(-apart) if smoothness == 0.5 else (1 + a) * np.exp(-a)
    # Of rough errors the finest scales, which the grid does not show, are missing.
    np.testing.assert_allclose(covariance[:6], expected, atol=0.08 if smoothness == 0.5 else 0.02)


def test_errors_that_cannot_be(package):
    for error, match in (
        ({"t2m": 1.0}, "has no msl"),
        ({"t2m": 1.0, "msl": 0.0}, "must be positive"),
        (float("nan"), "must be positive"),
    ):
        with pytest.raises(InputError, match=match):
            background_error_field(package, error)
    with pytest.raises(InputError, match="must be positive"):
        background_error_field(package, 1.0, length=0.0)
