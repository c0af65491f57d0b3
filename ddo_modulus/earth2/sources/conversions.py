# SPDX-License-Identifier: Apache-2.0
r"""Conversion of what stations report to the quantities of models.

The direction :math:`\theta` of wind is where it blows *from*, clockwise from north:
:math:`u = -s \sin\theta,\; v = -s \cos\theta`.

Vapour pressure is the saturation value at the dew point. Saturation is over water and follows
Tetens' formula with the constants of ECMWF's model (IFS documentation, part IV, section 7.2.1), so
that derived humidity agrees with ERA5's:

.. math:: e_s(T) = 611.21 \exp\left(17.502\,\frac{T - 273.16}{T - 32.19}\right)

Specific humidity is :math:`q = \epsilon e / (p - (1 - \epsilon) e)`, with
:math:`\epsilon = R_d / R_v`.

An altimeter setting (QNH) is the pressure at the station, reduced to mean sea level in ICAO's
standard atmosphere; :func:`station_pressure` inverts the reduction.

Arrays may have any shape; NaN stands for a missing value and is passed through.
"""

import numpy as np

from ddo_modulus.constants import (
    EPSILON,
    GAS_CONSTANT,
    GRAVITY,
    LAPSE_RATE,
    SATURATION,
    STANDARD_PRESSURE,
    STANDARD_TEMPERATURE,
)

Array = np.ndarray

_EXPONENT = GAS_CONSTANT * LAPSE_RATE / GRAVITY


def wind_components(speed: Array, direction: Array) -> tuple[Array, Array]:
    """Eastward and northward wind from speed and the direction it comes from.

    Args:
        speed: m/s.
        direction: Degrees, clockwise from north. A value outside 0 to 360 is invalid and gives
            NaN. At zero speed the direction is ignored.

    Returns:
        `u` and `v`, m/s.
    """
    calm = speed == 0
    valid = (direction >= 0) & (direction <= 360)
    angle = np.deg2rad(np.where(valid, direction, np.nan))
    u = np.where(calm, 0.0, -speed * np.sin(angle))
    v = np.where(calm, 0.0, -speed * np.cos(angle))
    return u, v


def vapour_pressure(dew_point: Array) -> Array:
    """Vapour pressure in Pa from the dew point in K; from temperature, its saturation value."""
    e0, a, t0, t1 = SATURATION
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return e0 * np.exp(a * (dew_point - t0) / (dew_point - t1))


def relative_humidity(temperature: Array, dew_point: Array) -> Array:
    """Relative humidity over water in %, from temperature and dew point in K."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return 100.0 * vapour_pressure(dew_point) / vapour_pressure(temperature)


def specific_humidity(dew_point: Array, pressure: Array) -> Array:
    """Specific humidity in kg/kg, from the dew point in K and the pressure in Pa."""
    vapour = vapour_pressure(dew_point)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return EPSILON * vapour / (pressure - (1 - EPSILON) * vapour)


def station_pressure(altimeter_setting: Array, elevation: Array) -> Array:
    """Pressure at a station in Pa, from its altimeter setting in Pa and its elevation in m."""
    reduced = (altimeter_setting / STANDARD_PRESSURE) ** _EXPONENT
    with np.errstate(invalid="ignore"):
        lowered = reduced - LAPSE_RATE * elevation / STANDARD_TEMPERATURE
        return STANDARD_PRESSURE * lowered ** (1 / _EXPONENT)
