# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from ddo_modulus.constants import LAPSE_RATE
from ddo_modulus.observations.atmosphere import (
    dew_point,
    pressure_ratio,
    saturation_pressure,
    specific_humidity,
    standard_height,
    standard_pressure,
    standard_temperature,
    vapor_pressure,
)

# ICAO standard atmosphere: geopotential height (m), temperature (K), pressure (Pa).
ICAO = np.array(
    [
        (-1000, 294.65, 113929.0),
        (0, 288.15, 101325.0),
        (1000, 281.65, 89874.6),
        (2000, 275.15, 79495.2),
        (5000, 255.65, 54019.9),
        (10000, 223.15, 26436.3),
        (11000, 216.65, 22632.1),
        (15000, 216.65, 12044.6),
        (20000, 216.65, 5474.9),
    ]
)


def test_standard_atmosphere_is_that_of_icao():
    height, temperature, pressure = torch.from_numpy(ICAO).T
    torch.testing.assert_close(standard_temperature(height), temperature)
    torch.testing.assert_close(standard_pressure(height), pressure, rtol=5e-6, atol=0)
    torch.testing.assert_close(standard_height(standard_pressure(height)), height)


def test_pressure_ratios_compose():
    """Up and down again, and in two steps as in one."""
    t, rise = torch.tensor([250.0, 288.0, 310.0]).double(), torch.tensor([900.0, -300.0, 50.0])
    ratio = pressure_ratio(t, rise)
    above = t - LAPSE_RATE * rise
    torch.testing.assert_close(ratio * pressure_ratio(above, -rise), torch.ones(3).double())
    half = pressure_ratio(t, rise / 2) * pressure_ratio(t - LAPSE_RATE * rise / 2, rise / 2)
    torch.testing.assert_close(half, ratio)
    isothermal = pressure_ratio(t, rise, 1e-7)
    torch.testing.assert_close(isothermal, pressure_ratio(t, rise, 0.0), rtol=1e-6, atol=0)


def test_saturation_pressure_over_water():
    """Goff-Gratch's values at 0, 20 and -20 degrees Celsius, to the half per cent of the fit."""
    t = torch.tensor([273.15, 293.15, 253.15]).double()
    expected = torch.tensor([610.78, 2337.3, 125.4]).double()
    torch.testing.assert_close(saturation_pressure(t), expected, rtol=5e-3, atol=0)


def test_formulae_of_humidity_are_inverse():
    t = torch.linspace(210, 315, 22, dtype=torch.float64)
    torch.testing.assert_close(dew_point(saturation_pressure(t)), t, rtol=1e-13, atol=0)
    p = torch.linspace(2e4, 1.05e5, 22, dtype=torch.float64)
    q = torch.logspace(-7, -1.5, 22, dtype=torch.float64)
    torch.testing.assert_close(specific_humidity(vapor_pressure(q, p), p), q, rtol=1e-13, atol=0)
    # Air of nothing but vapour.
    assert float(specific_humidity(p[:1], p[:1])) == pytest.approx(1.0)


def test_air_without_water_has_a_dew_point():
    vapor = torch.tensor([0.0, -1.0]).requires_grad_()
    coldest = dew_point(vapor)
    assert bool(coldest.isfinite().all()) and bool((coldest < 190).all())
    assert bool(torch.autograd.grad(coldest.sum(), vapor)[0].isfinite().all())
