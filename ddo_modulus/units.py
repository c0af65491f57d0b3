# SPDX-License-Identifier: Apache-2.0
"""Units that a file declares, and the factor and offset to those that are wanted.

Pint reads the units. Added here are spellings of CF, GRIB and NetCDF files that it does not know,
and two equivalences of meteorology: a geopotential height of 1 m is a geopotential of 9.80665 m2/s2
(WMO), and a depth of water of 1 m is 1000 kg/m2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ddo_modulus.constants import GRAVITY
from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    import pint

_WATER_DENSITY = 1000.0  # kg/m3
_GEOPOTENTIAL = "m2/s2"
_LONGEST = 60  # characters; longer text is a description, not units

_UNDECLARED = {"", "~", "-", "unknown", "undefined", "none", "n/a", "null"}
_SPELLINGS = [
    (r"deg(ree)?s?[ _]*c(elsius)?|c(elsius)?", "degC"),
    (r"deg(ree)?s?[ _]*f(ahrenheit)?|f(ahrenheit)?", "degF"),
    (r"deg(ree)?s?[ _]*k(elvin)?|kelvins?", "K"),
    (r"\(?0 ?(-|to) ?1\)?|fraction|proportion|numeric", "1"),
    (r"mbs?", "mbar"),
    (r"degrees?[ _]true", "degree"),
]
# The exponent of `m s-1` or `m2`, which pint would take for a difference or a name.
_EXPONENT = re.compile(r"(?<=[A-Za-z])(?=-?\d)")
_SCALED = re.compile(r"(\d*\.?\d+(?:e-?\d+)?)[ *]+(?=[a-z])(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Conversion:
    """``value * factor + offset`` converts a value."""

    factor: float = 1.0
    offset: float = 0.0

    @property
    def is_identity(self) -> bool:
        """Whether it changes no value."""
        return self == Conversion()


def is_declared(units: object) -> bool:
    """Whether the attribute ``units`` says anything; GRIB files write `unknown` or `~`."""
    return units is not None and str(units).strip().lower() not in _UNDECLARED


@cache
def conversion(declared: str, wanted: str) -> Conversion:
    """The conversion of values from some units to others.

    Args:
        declared: Units of the values, as a file spells them: `m s**-1`, `degC`, `(0 - 1)`.
        wanted: Units to convert to.

    Raises:
        InputError: If `declared` is not understood or is of another quantity. The message is to
            follow the name of the variable.
    """
    if declared == wanted:
        return Conversion()
    units = _registry()
    scale, unit = _parsed(declared)
    target = _parsed(wanted)[1]
    context = "geopotential" if wanted == _GEOPOTENTIAL else "water"
    try:
        if _is_angle(unit) != _is_angle(target):
            raise ValueError("one is an angle")
        with units.context(context):
            zero, one = (units.Quantity(x * scale, unit).to(target).magnitude for x in (0.0, 1.0))
    except Exception as error:  # pint has several, for dimensions, offsets and contexts
        raise InputError(
            f"units are declared as {declared!r}, which cannot be converted to {wanted}; convert "
            "the values, or correct the attribute units"
        ) from error
    # Twelve digits: round-off must not make 1 m s**-1 another number of m/s.
    return Conversion(float(f"{one - zero:.12g}"), float(f"{zero:.12g}"))


def _parsed(text: str) -> tuple[float, pint.Unit]:
    """The factor and the unit of a text such as `0.01 m` or `kg m**-2`.

    Raises:
        InputError: If it is not understood.
    """
    scaled = _SCALED.fullmatch(text.strip())
    scale, name = (float(scaled[1]), scaled[2]) if scaled else (1.0, text.strip())
    for pattern, spelling in _SPELLINGS:
        if re.fullmatch(pattern, name, re.IGNORECASE):
            name = spelling
    # A power of a power is no unit, and pint would compute it.
    if len(name) <= _LONGEST and not re.search(r"(\*\*|\^)[^A-Za-z]*(\*\*|\^)", name):
        for spelling in (name, name.lower()):
            try:
                return scale, _registry().parse_units(_EXPONENT.sub("**", spelling))
            except Exception:  # noqa: S112 - pint has no common error for what it cannot parse
                continue
    raise InputError(
        f"units are declared as {text[:_LONGEST]!r}, which are not understood; correct the "
        "attribute units"
    )


def _is_angle(unit: pint.Unit) -> bool:
    return "radian" in str(_registry().Quantity(1.0, unit).to_root_units().units)


@cache
def _registry() -> Any:  # noqa: ANN401 - pint is imported late, and its registries are generic
    import pint

    units: Any = pint.UnitRegistry()
    units.define(f"gpm = {GRAVITY} m**2/s**2 = geopotential_meter = geopotential_metre")
    units.define("gpdam = 10 gpm = gpdm")
    length, area_density = "[length]", "[mass]/[length]**2"
    heights: Any = pint.Context("geopotential")
    heights.add_transformation(length, "[length]**2/[time]**2", lambda u, x: x * u("gpm/m"))
    water: Any = pint.Context("water")
    density = f"{_WATER_DENSITY} kg/m**3"
    water.add_transformation(length, area_density, lambda u, x: x * u(density))
    water.add_transformation(area_density, length, lambda u, x: x / u(density))
    units.add_context(heights)
    units.add_context(water)
    return units
