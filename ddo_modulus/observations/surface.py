# SPDX-License-Identifier: Apache-2.0
r"""What stations report: temperature, humidity, wind and pressure.

Axes: ``B`` batch, ``M`` observations.

A model's surface is smoother than the ground, so a station stands some rise :math:`\Delta z` above
it. Temperature falls by a fixed lapse rate on the way and pressure by the hydrostatic formula of
:mod:`.atmosphere`; dew point, humidity and wind are taken as they are at the model's surface.

**Wind direction.** Degrees wrap, so the difference of two directions is no innovation: 350 and 10
are near. Let :math:`a, c` be the components of the wind along and across the reported direction
:math:`\theta`. The direction turns from it by :math:`\mathrm{atan2}(c, a)`, between -180 and 180,
and

.. math:: H(u, v) = \theta + \mathrm{atan2}(c, a)\,\frac{u^2 + v^2}{u^2 + v^2 + s^2}

is the state's direction on the branch next to the report: ``y - H(x)`` is the wrapped innovation
wherever it is taken. The last factor says that calm air has no direction: it keeps ``H`` continuous
and its slope bounded there (:math:`s` = 0.5 m/s, about where vanes begin to turn). Observing only
the unit vector's component across the wind would be smooth everywhere, but an exactly opposite wind
would agree with the report, and winds beyond 90 degrees would be pulled the wrong way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.constants import LAPSE_RATE
from ddo_modulus.errors import InputError
from ddo_modulus.observations.algebra import DerivedOperator, LinearOperator, combined
from ddo_modulus.observations.atmosphere import (
    dew_point,
    pressure_ratio,
    saturation_pressure,
    specific_humidity,
    vapor_pressure,
)

#: Kinds of humidity: dew point (K), specific (kg/kg) and relative (%).
Humidity = Literal["d", "q", "r"]

_CALM = 0.5  # m/s


def temperature_at(
    temperature: LinearOperator, rise: Float[Tensor, " M"], lapse_rate: float = LAPSE_RATE
) -> LinearOperator:
    """Temperature at some rise above where an operator reads it.

    Args:
        temperature: K.
        rise: Metres; negative below.
        lapse_rate: Fall of temperature with height, K/m.
    """
    return combined([temperature], [1.0], -lapse_rate * rise)


def pressure_at(
    pressure: LinearOperator,
    rise: Float[Tensor, " M"],
    temperature: LinearOperator | Float[Tensor, " M"],
    lapse_rate: float = LAPSE_RATE,
) -> LinearOperator | DerivedOperator:
    """Pressure at some rise above where an operator reads it.

    Args:
        pressure: Pa.
        rise: Metres; negative below.
        temperature: There, K: read from the state (not linear then), or fixed values.
        lapse_rate: Fall of temperature with height, K/m.
    """
    if isinstance(temperature, Tensor):
        return combined([pressure], [pressure_ratio(temperature, rise, lapse_rate)])
    return DerivedOperator(
        lambda p, t, dz: p * pressure_ratio(t, dz, lapse_rate),
        pressure,
        temperature,
        constants=[rise],
    )


def humidity(
    report: Humidity,
    source: Humidity,
    moisture: LinearOperator,
    temperature: LinearOperator | None = None,
    pressure: LinearOperator | Float[Tensor, " M"] | None = None,
) -> DerivedOperator:
    """One kind of humidity from another, by way of the vapour pressure.

    Args:
        report: Kind observed.
        source: Kind that the state has.
        moisture: Reads that one.
        temperature: K; needed if one of the kinds is relative.
        pressure: Pa, read from the state or fixed values; needed if one is specific.

    Raises:
        InputError: If one that is needed is missing, or a kind is unknown.
    """
    if {report, source} - {"d", "q", "r"}:
        raise InputError(f"humidity is of kind d, q or r, not {report!r} or {source!r}")
    operators, constants, at = [moisture], [], {"t": -1, "p": -1}
    for name, kind, value in (("t", "r", temperature), ("p", "q", pressure)):
        if kind not in (report, source):
            continue
        if value is None:
            other = "temperature" if name == "t" else "pressure"
            raise InputError(f"humidity {report!r} from {source!r} needs {other}")
        if isinstance(value, LinearOperator):
            at[name] = len(operators)
            operators.append(value)
        else:
            constants.append(value)  # comes last

    def function(*values: Tensor) -> Tensor:
        t, p = values[at["t"]], values[at["p"]]
        to_vapor: dict[str, Callable[[Tensor], Tensor]] = {
            "d": saturation_pressure,
            "q": lambda q: vapor_pressure(q, p),
            "r": lambda r: r / 100 * saturation_pressure(t),
        }
        from_vapor: dict[str, Callable[[Tensor], Tensor]] = {
            "d": dew_point,
            "q": lambda e: specific_humidity(e, p),
            "r": lambda e: 100 * e / saturation_pressure(t),
        }
        return from_vapor[report](to_vapor[source](values[0]))

    return DerivedOperator(function, *operators, constants=constants)


def wind_speed(u: LinearOperator, v: LinearOperator) -> DerivedOperator:
    """Speed from two components, smooth at calm (the derivative has no limit there)."""
    return DerivedOperator(lambda u, v: (u.square() + v.square() + 1e-6).sqrt(), u, v)


def wind_direction(
    u: LinearOperator, v: LinearOperator, reported: Float[Tensor, " M"]
) -> DerivedOperator:
    """Direction from which the wind blows, on the branch next to the report (see the module).

    Args:
        u: Eastward wind, m/s.
        v: Northward wind.
        reported: Observed directions, degrees clockwise from north: the values that the operator
            is to be compared with.
    """
    reported = torch.as_tensor(reported, dtype=torch.float64)
    sine, cosine = torch.deg2rad(reported).sin(), torch.deg2rad(reported).cos()
    along = combined([u, v], [-sine, -cosine])
    across = combined([u, v], [-cosine, sine])
    return DerivedOperator(_direction, along, across, constants=[reported])


def _direction(along: Tensor, across: Tensor, reported: Tensor) -> Tensor:
    square = along.square() + across.square()
    # The angle of no wind at all has no derivative; any will do, since nothing remains of it.
    turn = torch.atan2(across, torch.where(square == 0, 1.0, along))
    return reported + 180 / math.pi * turn * square / (square + _CALM**2)
