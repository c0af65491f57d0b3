# SPDX-License-Identifier: Apache-2.0
r"""Formulae of the atmosphere that observation operators are made of.

Everything is elementwise and differentiable, in SI units.

**Heights.** The ICAO standard atmosphere (Doc 7488/3, 1993): 288.15 K and 1013.25 hPa at sea level,
:math:`\gamma` = 6.5 K/km up to 11 km, isothermal above. In air of lapse rate :math:`\gamma`, with
temperature :math:`T` at a place, hydrostatic pressure changes over a rise :math:`\Delta z` by

.. math:: p(z + \Delta z) / p(z) = (1 - \gamma \Delta z / T)^{g / (R \gamma)} .

Humidity is left out of it: the virtual temperature of warm, moist air is some 3 K higher, which
changes the ratio by .1 hPa for 100 m.

**Humidity.** Saturation over water, as in ECMWF's IFS (Documentation, Part IV, "Clouds and
large-scale precipitation", with the constants of Buck 1981):

.. math:: e_s(T) = 611.21\,\mathrm{Pa}\;\exp\left(17.502\,\frac{T - 273.16}{T - 32.19}\right),

whose inverse is the dew point, and :math:`q = \varepsilon e / (p - (1 - \varepsilon) e)` with
:math:`\varepsilon = R_d / R_v`. WMO defines reported dew points and relative humidities over water,
below freezing too (WMO-No. 8, Annex 4.B).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddo_modulus.constants import (
    EPSILON,
    GAS_CONSTANT,
    GRAVITY,
    LAPSE_RATE,
    SATURATION,
    STANDARD_PRESSURE,
    STANDARD_TEMPERATURE,
)

_TROPOPAUSE = 11e3  # m
_E0, _A, _T0, _T1 = SATURATION
_LEAST_VAPOR = 1e-3  # Pa, less than the driest stratosphere: logarithms stay finite


def standard_temperature(height: Tensor) -> Tensor:
    """Temperature of the standard atmosphere up to 20 km, K.

    Args:
        height: Metres above sea level.
    """
    return STANDARD_TEMPERATURE - LAPSE_RATE * height.clamp_max(_TROPOPAUSE)


def standard_pressure(height: Tensor) -> Tensor:
    """Pressure of the standard atmosphere up to 20 km, Pa.

    Args:
        height: Metres above sea level.
    """
    low = height.clamp_max(_TROPOPAUSE)
    troposphere = STANDARD_PRESSURE * pressure_ratio(
        torch.full_like(low, STANDARD_TEMPERATURE), low
    )
    above = (height - _TROPOPAUSE).clamp_min(0)
    return troposphere * pressure_ratio(standard_temperature(height), above, 0.0)


def standard_height(pressure: Tensor) -> Tensor:
    """Height at which the standard atmosphere has a pressure, m; inverse of `standard_pressure`.

    Args:
        pressure: Pa.
    """
    exponent = GAS_CONSTANT * LAPSE_RATE / GRAVITY
    low = STANDARD_TEMPERATURE / LAPSE_RATE * (1 - (pressure / STANDARD_PRESSURE) ** exponent)
    edge = standard_pressure(torch.full_like(pressure, _TROPOPAUSE))
    scale = GAS_CONSTANT * (STANDARD_TEMPERATURE - LAPSE_RATE * _TROPOPAUSE) / GRAVITY
    return torch.where(low < _TROPOPAUSE, low, _TROPOPAUSE + scale * (edge / pressure).log())


def pressure_ratio(temperature: Tensor, rise: Tensor, lapse_rate: float = LAPSE_RATE) -> Tensor:
    """Hydrostatic pressure after a rise over the pressure before it.

    Args:
        temperature: Before the rise, K.
        rise: Metres upwards; negative downwards.
        lapse_rate: K/m, by which temperature falls on the way.
    """
    if lapse_rate == 0:
        return (-GRAVITY / GAS_CONSTANT * rise / temperature).exp()
    return (1 - lapse_rate * rise / temperature) ** (GRAVITY / (GAS_CONSTANT * lapse_rate))


def saturation_pressure(temperature: Tensor) -> Tensor:
    """Pressure of water vapour at saturation over water, Pa; at the dew point it is the actual one.

    Args:
        temperature: K.
    """
    return _E0 * (_A * (temperature - _T0) / (temperature - _T1)).exp()


def dew_point(vapor: Tensor) -> Tensor:
    """Temperature at which a vapour pressure saturates, K; inverse of `saturation_pressure`.

    Args:
        vapor: Pa.
    """
    ratio = (vapor.clamp_min(_LEAST_VAPOR) / _E0).log() / _A
    return (_T0 - _T1 * ratio) / (1 - ratio)


def specific_humidity(vapor: Tensor, pressure: Tensor) -> Tensor:
    """Specific humidity of air with a vapour pressure, kg/kg.

    Args:
        vapor: Pa.
        pressure: Of the moist air, Pa.
    """
    return EPSILON * vapor / (pressure - (1 - EPSILON) * vapor)


def vapor_pressure(humidity: Tensor, pressure: Tensor) -> Tensor:
    """Vapour pressure of air, Pa; inverse of `specific_humidity`.

    Args:
        humidity: Specific humidity, kg/kg.
        pressure: Of the moist air, Pa.
    """
    return humidity * pressure / (EPSILON + (1 - EPSILON) * humidity)
