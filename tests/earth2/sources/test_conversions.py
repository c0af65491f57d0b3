# SPDX-License-Identifier: Apache-2.0
"""Conversions against their inverses, tables and closed forms."""

import numpy as np
import pytest

from ddo_modulus.earth2.sources.conversions import (
    relative_humidity,
    specific_humidity,
    station_pressure,
    vapour_pressure,
    wind_components,
)


def test_wind_comes_from_where_it_is_said_to():
    u, v = wind_components(np.full(5, 10.0), np.array([0.0, 90.0, 180.0, 270.0, 360.0]))
    np.testing.assert_allclose(u, [0, -10, 0, 10, 0], atol=1e-12)
    np.testing.assert_allclose(v, [-10, 0, 10, 0, -10], atol=1e-12)


def test_speed_and_direction_come_back_from_components():
    random = np.random.default_rng(0)
    speed, direction = random.uniform(0.1, 60, 200), random.uniform(0, 360, 200)
    u, v = wind_components(speed, direction)
    np.testing.assert_allclose(np.hypot(u, v), speed)
    np.testing.assert_allclose(np.rad2deg(np.arctan2(-u, -v)) % 360, direction)


def test_a_direction_off_the_compass_is_none_and_calm_needs_none():
    u, v = wind_components(np.array([5.0, 5.0, 0.0]), np.array([990.0, np.nan, np.nan]))
    assert np.isnan(u[:2]).all() and np.isnan(v[:2]).all()
    assert u[2] == v[2] == 0


def test_vapour_pressure_of_tables():
    # Saturation over water, WMO's guide to instruments (annex 4.B), in hPa.
    celsius, table = np.array([-20.0, 0.0, 20.0, 40.0]), np.array([1.254, 6.112, 23.37, 73.8])
    found = vapour_pressure(celsius + 273.15) / 100
    np.testing.assert_allclose(found, table, rtol=5e-3)


def test_humidity_from_dew_point():
    temperature = np.array([250.0, 285.0, 305.0])
    np.testing.assert_allclose(relative_humidity(temperature, temperature), 100.0)
    dew_point, pressure = np.array([283.15]), np.array([1e5])
    vapour = vapour_pressure(dew_point)
    ratio = 0.621981 * vapour / (pressure - vapour)  # of vapour to dry air
    np.testing.assert_allclose(specific_humidity(dew_point, pressure), ratio / (1 + ratio), 1e-5)


def test_station_pressure_undoes_the_altimeter_setting():
    standard = {0: 101325.0, 1000: 89874.6, 3000: 70108.5}  # ICAO doc 7488
    heights = np.array(list(standard), float)
    found = station_pressure(np.full(3, 101325.0), heights)
    np.testing.assert_allclose(found, list(standard.values()), rtol=2e-5)
    setting = np.array([98000.0, 103000.0])
    np.testing.assert_allclose(station_pressure(setting, np.zeros(2)), setting)
    assert np.isnan(station_pressure(np.array([np.nan]), np.array([10.0])))


@pytest.mark.parametrize("elevation", [20.0, 500.0, 2500.0])
def test_altimeter_setting_by_its_definition(elevation):
    """A height in the standard atmosphere lies the elevation above that of the setting."""

    def height(pressure):
        return 288.15 / 0.0065 * (1 - (pressure / 101325.0) ** (287.05287 * 0.0065 / 9.80665))

    pressure = station_pressure(np.array([100500.0]), np.array([elevation]))
    np.testing.assert_allclose(height(pressure) - height(100500.0), elevation, rtol=1e-9)
