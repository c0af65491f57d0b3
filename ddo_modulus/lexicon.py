# SPDX-License-Identifier: Apache-2.0
"""Names and units of atmospheric variables: Earth2Studio's lexicon.

A variable id is a name (`t2m`, `msl`), or a letter and a pressure level in hPa (`t850`, `z500`).
Units are K, m/s, Pa, Pa/s, kg/kg, kg/m2, %, m2/s2, m of precipitation, and degrees for a
direction; cover and soil moisture are fractions (`units_of`). In a table of observations an
upper-air report has the letter alone, with the pressure in another column, and a satellite sounding
has the name of its sensor.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ddo_modulus.errors import InputError

# Lexicon id -> the names in GRIB (short name, cfgrib's name), ARCO and WeatherBench2.
_SURFACE_ALIASES = {
    "t2m": ("2t", "2m_temperature"),
    "d2m": ("2d", "2m_dewpoint_temperature"),
    "u10m": ("u10", "10u", "10m_u_component_of_wind"),
    "v10m": ("v10", "10v", "10m_v_component_of_wind"),
    "u100m": ("u100", "100u", "100m_u_component_of_wind"),
    "v100m": ("v100", "100v", "100m_v_component_of_wind"),
    "msl": ("mean_sea_level_pressure", "prmsl"),
    "sp": ("surface_pressure",),
    "sst": ("sea_surface_temperature",),
    "skt": ("skin_temperature",),
    "tcwv": ("total_column_water_vapour",),
    "tcw": ("total_column_water",),
    "tcc": ("total_cloud_cover",),
    "stl1": ("soil_temperature_level_1",),
    "stl2": ("soil_temperature_level_2",),
    "swvl1": ("volumetric_soil_water_layer_1",),
    "swvl2": ("volumetric_soil_water_layer_2",),
    "lsm": ("land_sea_mask",),
    "z": ("geopotential_at_surface",),
    "ws10m": ("ws10", "si10", "10si", "10m_wind_speed"),
    "tp": ("total_precipitation",),
    "tp06": ("total_precipitation_6hr",),
    "tp12": ("total_precipitation_12hr",),
    "tp24": ("total_precipitation_24hr",),
}
_LEVEL_ALIASES = {
    "z": ("geopotential", "gh", "hgt", "geopotential_height"),
    "t": ("temperature", "air_temperature"),
    "u": ("u_component_of_wind",),
    "v": ("v_component_of_wind",),
    "w": ("vertical_velocity",),
    "q": ("specific_humidity",),
    "r": ("relative_humidity",),
    "ws": ("wind_speed",),
}
#: CF attribute ``cell_methods`` of fields whose values are means over grid cells.
CELL_MEANS = "lat: lon: mean"
_HORIZONTAL_MEAN = re.compile(
    r"\b(?:area:|(?:lat|latitude|y): ?(?:lon|longitude|x):"
    r"|(?:lon|longitude|x): ?(?:lat|latitude|y):)"
    r"\s+mean\b"
)
_LEVEL = re.compile(r"([a-z]+?)(\d+(?:\.\d+)?)")
_HEIGHT = re.compile(r"^\d+[uv]$|\b\d+ ?-?m(et(er|re)s?)?\b", re.IGNORECASE)
_SURFACE_ID = {alias: name for name, aliases in _SURFACE_ALIASES.items() for alias in aliases}
_LEVEL_ID = {alias: name for name, aliases in _LEVEL_ALIASES.items() for alias in aliases}


def variable_id(
    name: str, level: float | None = None, attributes: Mapping[str, object] | None = None
) -> str:
    """The lexicon id of a variable.

    `u100` is an id, the wind at 100 hPa, but also the name of the wind at 100 m in a file from the
    Climate Data Store. It is left as it is unless the attributes speak of a height.

    Args:
        name: A GRIB, ARCO or WeatherBench2 name; any other is returned unchanged, an id among them.
        level: Pressure in hPa, for a variable on pressure levels.
        attributes: The variable's attributes in the file.

    Returns:
        The id, e.g. `t2m` or `t850`.
    """
    if level is not None:
        return f"{_LEVEL_ID.get(name, name)}{level:g}"
    if _is_level_id(name) and not _is_at_a_height(attributes or {}):
        return name
    return _SURFACE_ID.get(name, name)


def is_on_levels(name: str) -> bool:
    """Whether a name, without a level, is that of a variable on levels: `t`, `geopotential`."""
    return name in _LEVEL_ALIASES or name in _LEVEL_ID


def is_read_as_level(name: str, variable: str) -> bool:
    """Whether a name means a height in some files, but is read as an id with a pressure."""
    return name == variable and _is_level_id(name) and name in _SURFACE_ID


def _is_level_id(name: str) -> bool:
    level = _LEVEL.fullmatch(name)
    return level is not None and level[1] in (*_LEVEL_ALIASES, "wd")


def _is_at_a_height(attributes: Mapping[str, object]) -> bool:
    """Whether attributes say that a field lies at a height in metres, not on a pressure level."""
    if attributes.get("GRIB_typeOfLevel") == "heightAboveGround":
        return True
    names = (attributes.get(key) for key in ("GRIB_shortName", "GRIB_name", "long_name"))
    return any(_HEIGHT.search(str(text)) is not None for text in names)


def are_cell_means(cell_methods: str) -> bool:
    """Whether a field's ``cell_methods`` say that its values are means over horizontal cells."""
    return _HORIZONTAL_MEAN.search(cell_methods) is not None


def long_name(variable: str) -> str:
    """Spell out a lexicon id, e.g. `2m temperature` or `temperature at 850 hPa`."""
    if variable in _SURFACE_ALIASES:
        longest = max(_SURFACE_ALIASES[variable], key=len)
        return longest.replace("_", " ")
    level = _LEVEL.fullmatch(variable)
    if level and level[1] in _LEVEL_ALIASES:
        return f"{_LEVEL_ALIASES[level[1]][0].replace('_', ' ')} at {level[2]} hPa"
    return variable


@dataclass(frozen=True)
class _Slip:
    """A common mistake of units: the range of its values, and the remedy."""

    low: float
    high: float
    mend: str


@dataclass(frozen=True)
class PlausibleRange:
    """The values a variable can have on Earth, with a margin.

    Attributes:
        low: Smallest plausible value.
        high: Largest plausible value.
        units: Units of both.
    """

    low: float
    high: float
    units: str
    slip: _Slip | None = None

    def mend(self, low: float, high: float) -> str:
        """The remedy for values from `low` to `high`, some of which lie outside the range."""
        if self.slip and self.slip.low <= low and high <= self.slip.high:
            return self.slip.mend
        return f"Convert the values to {self.units}, or leave out the wrong ones."


_CELSIUS = _Slip(-100.0, 70.0, "They look like degrees Celsius: add 273.15.")
_HECTOPASCAL = _Slip(300.0, 1100.0, "They look like hPa: multiply by 100.")
_GRAM = _Slip(-1.0, 50.0, "They look like g/kg: divide by 1000.")
_ALOFT = ("t", "u", "v", "q", "r", "ws", "wd")
_LEAST_HUMIDITY = 2.0  # %; the largest value of a field is never below it

_NUMBER = r"\d+(?:\.\d+)?"
_FAMILIES = [
    (rf"t2m|d2m|sst|skt|stl\d|t{_NUMBER}", PlausibleRange(150.0, 350.0, "K", _CELSIUS)),
    (rf"[uv]{_NUMBER}m?", PlausibleRange(-150.0, 150.0, "m/s")),
    (rf"ws{_NUMBER}m?", PlausibleRange(0.0, 150.0, "m/s")),
    (rf"wd{_NUMBER}m?", PlausibleRange(0.0, 360.0, "degrees")),
    (r"amsu[ab]|atms|mhs", PlausibleRange(50.0, 350.0, "K", _CELSIUS)),
    (r"msl", PlausibleRange(85e3, 110e3, "Pa", _HECTOPASCAL)),
    (r"sp", PlausibleRange(30e3, 110e3, "Pa", _HECTOPASCAL)),
    (rf"q2m|q{_NUMBER}", PlausibleRange(-1e-3, 0.05, "kg/kg", _GRAM)),
    (rf"r2m|r{_NUMBER}", PlausibleRange(-10.0, 180.0, "%")),
]
# Units of variables without a plausible range.
_UNITS = [
    (r"z", "m2/s2"),
    (rf"w{_NUMBER}", "Pa/s"),
    (r"tcwv?", "kg/m2"),
    (r"tcc|lsm|swvl\d", "1"),
    (r"tp(\d+)?", "m"),
]


def units_of(variable: str) -> str | None:
    """The units that a variable has in the lexicon, or None if it is not in it.

    Args:
        variable: Lexicon id.
    """
    plausible = plausible_range(variable)
    if plausible is not None:
        return plausible.units
    return next((units for name, units in _UNITS if re.fullmatch(name, variable)), None)


def plausible_range(variable: str) -> PlausibleRange | None:
    """The plausible range of a variable, or None if it has none in the lexicon.

    Args:
        variable: Lexicon id.
    """
    for pattern, plausible in _FAMILIES:
        if re.fullmatch(pattern, variable):
            return plausible
    geopotential = re.fullmatch(rf"z({_NUMBER})", variable)
    if geopotential and float(geopotential[1]) > 0:
        return _geopotential_range(float(geopotential[1]))
    return None


def reported_range(variable: str) -> PlausibleRange | None:
    """Like :func:`plausible_range`, for a variable of an observation table.

    There a letter alone is an upper-air report whose pressure is in another column. (In a dataset
    a letter alone may be anything.)
    """
    return plausible_range(f"{variable}500" if variable in _ALOFT else variable)


def _geopotential_range(level: float) -> PlausibleRange:
    """The range of geopotential at `level` hPa; at 850 hPa and above it excludes heights in m."""
    gravity, scale_height, surface = 9.81, 7400.0, 1013.25
    middle = gravity * scale_height * math.log(surface / level)
    margin = max(0.35 * middle, 8000.0)
    height = _Slip(
        (middle - margin) / gravity,
        (middle + margin) / gravity,
        "They look like geopotential heights in m: multiply by 9.80665.",
    )
    return PlausibleRange(middle - margin, middle + margin, "m2/s2", height)


def check_units(
    variable: str, low: float, high: float, where: str, plausible: PlausibleRange | None = None
) -> None:
    """Refuse values that are implausible in the lexicon's units.

    Args:
        variable: Lexicon id; one without a plausible range passes.
        low: Smallest value found.
        high: Largest value found.
        where: Where the values come from, for the message.
        plausible: The range, if it is not that of the variable.

    Raises:
        InputError: If a value is implausible.
    """
    plausible = plausible_range(variable) if plausible is None else plausible
    if plausible is not None and plausible.units == "%" and 0 < high < _LEAST_HUMIDITY:
        raise InputError(
            f"{where}: {variable} runs from {low:.6g} to {high:.6g}, but has to be in %. It looks "
            "like a fraction, as in WeatherBench2: multiply by 100."
        )
    if plausible is None or (plausible.low <= low and high <= plausible.high):
        return
    raise InputError(
        f"{where}: {variable} runs from {low:.6g} to {high:.6g}, but has to lie within "
        f"{plausible.low:.6g} to {plausible.high:.6g} {plausible.units}. "
        f"{plausible.mend(low, high)}"
    )
