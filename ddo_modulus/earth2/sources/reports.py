# SPDX-License-Identifier: Apache-2.0
"""Reports, one row for all quantities, split into observations, one row for each quantity.

A *report* holds what one station measured at one time, at the surface or on one upper-air level. A
frame of reports has these columns, of which a provider may leave out those that it does not have:

- `time` (naive UTC), `lat`, `lon` (degrees), `elev` (m), `station`, `class`, `type`, and `pres`
  (Pa): the pressure of an upper-air level, NaN at the surface;
- the measured values `QUANTITIES`, in SI units, NaN where missing;
- for each of them `<quantity>_quality`, the provider's mark, and `<quantity>_error`, the standard
  deviation of the observation error.

`observations` converts reports to rows of `SCHEMA`. It derives wind components and humidity where
they are requested but not reported.

Variable ids are Earth2Studio's. At the surface: `t2m`, `d2m`, `r2m`, `q2m`, `u10m`, `v10m`,
`ws10m`, `sp`, `msl`. Upper air: `t`, `u`, `v`, `ws`, `q`, `r`, `z` for all levels (the level is in
`pres`), or a single level, e.g. `t850`.
"""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from ddo_modulus.earth2.sources.conversions import (
    relative_humidity,
    specific_humidity,
    wind_components,
)

# Temperature and dew point (K), relative humidity (%), specific humidity (kg/kg), wind (m/s and
# degrees), geopotential (m2/s2), pressure at the station and at mean sea level (Pa).
QUANTITIES = ("t", "td", "rh", "q", "u", "v", "speed", "direction", "z", "p", "msl")

_SURFACE = {
    "t2m": "t",
    "d2m": "td",
    "r2m": "rh",
    "q2m": "q",
    "u10m": "u",
    "v10m": "v",
    "ws10m": "speed",
    "sp": "p",
    "msl": "msl",
}
_ALOFT = {"t": "t", "u": "u", "v": "v", "ws": "speed", "q": "q", "r": "rh", "z": "z"}
_LEVEL_TOLERANCE = 5.0  # Pa; levels are reported to the nearest 10 Pa

SURFACE_VARIABLES = tuple(_SURFACE)
UPPER_AIR_VARIABLES = tuple(_ALOFT)

_NUMBER = pa.float32()


def _field(name: str, kind: pa.DataType, description: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable, {"description": description})


# Names and types are Earth2Studio's (`earth2studio.lexicon.base.E2STUDIO_SCHEMA`), which has no
# `observation_error`.
SCHEMA = pa.schema(
    [
        _field("time", pa.timestamp("ns"), "Time of the observation, UTC", False),
        _field("lat", _NUMBER, "Latitude, degrees", False),
        _field("lon", _NUMBER, "Longitude, degrees, 0 to 360", False),
        _field("observation", _NUMBER, "Value in the units of Earth2Studio's lexicon", False),
        _field("variable", pa.string(), "Earth2Studio variable id", False),
        _field(
            "observation_error",
            _NUMBER,
            "Standard deviation of the observation error, in the units of the value",
        ),
        _field("quality", pa.uint16(), "The provider's quality mark"),
        _field("elev", _NUMBER, "Elevation (m) of the station, or of the upper-air level"),
        _field("station", pa.string(), "Station identifier"),
        _field("pres", _NUMBER, "Pressure of an upper-air level (Pa)"),
        _field("class", pa.string(), "Kind of report, e.g. synop or radiosonde"),
        _field("type", pa.string(), "The provider's name for the kind of report"),
    ]
)


def parse_variable(variable: str) -> tuple[str, float | None] | None:
    """Split a variable id into quantity and level.

    Returns:
        The quantity, of `QUANTITIES`, and the level in Pa: NaN for the surface, None for all
        levels. None in place of the pair if reports have no such variable.
    """
    if variable in _SURFACE:
        return _SURFACE[variable], np.nan
    if variable in _ALOFT:
        return _ALOFT[variable], None
    level = re.fullmatch(r"([a-z]+)([1-9]\d{0,3})", variable)
    if level and level[1] in _ALOFT:
        return _ALOFT[level[1]], 100.0 * float(level[2])
    return None


def observations(
    reports: pd.DataFrame, variables: Sequence[str], worst: Literal["max", "min"] = "max"
) -> pd.DataFrame:
    """Convert a frame of reports to observations of some variables.

    Where a wind component is requested and the report has no direction, the wind speed is returned
    in its place: `ws10m` for `u10m`, `ws` for `u`, `ws850` for `u850`.

    Args:
        reports: Frame as described in the module; it is not changed.
        variables: Variable ids that :func:`parse_variable` accepts.
        worst: Which quality mark is the worse one, the largest or the smallest. A derived quantity
            gets the worst mark of those it is derived from.

    Returns:
        Rows with the columns of `SCHEMA`, without missing values; unsorted, types unconverted.

    Raises:
        ValueError: If a variable is not one of reports.
    """
    reports = _derived(reports, worst)
    aloft = reports["pres"].notna()
    rows = []
    for variable in dict.fromkeys(variables):
        parsed = parse_variable(variable)
        if parsed is None:
            raise ValueError(f"{variable} is not a variable of reports")
        quantity, level = parsed
        if level is None:
            there = aloft
        elif np.isnan(level):
            there = ~aloft
        else:
            there = (reports["pres"] - level).abs() < _LEVEL_TOLERANCE
        chosen = reports[there]
        rows.append(_rows(chosen, quantity, variable))
        speed = _speed_of(variable)
        if speed and speed not in variables:
            rows.append(_rows(chosen[chosen["u"].isna()], "speed", speed))
    # A speed that stands in for both components is there twice.
    return pd.concat(rows).drop_duplicates(ignore_index=True) if rows else _no_rows()


def _speed_of(variable: str) -> str | None:
    """The id of the wind speed if `variable` is a wind component, else None."""
    component = re.fullmatch(r"[uv](10m|[1-9]\d*)?", variable)
    return f"ws{component[1] or ''}" if component else None


def _rows(reports: pd.DataFrame, quantity: str, variable: str) -> pd.DataFrame:
    """The observations of one quantity."""
    kept = reports[reports[quantity].notna()]
    return pd.DataFrame(
        {
            "time": kept["time"],
            "lat": kept["lat"],
            "lon": kept["lon"],
            "observation": kept[quantity],
            "variable": variable,
            "observation_error": kept[f"{quantity}_error"],
            "quality": kept[f"{quantity}_quality"],
            **{name: kept[name] for name in ("elev", "station", "pres", "class", "type")},
        }
    )


def _no_rows() -> pd.DataFrame:
    return pd.DataFrame({name: [] for name in SCHEMA.names})


def _derived(reports: pd.DataFrame, worst: Literal["max", "min"]) -> pd.DataFrame:
    """All columns of a frame of reports, with missing quantities derived from the others."""
    columns: dict[str, pd.Series] = {
        name: reports[name]
        if name in reports
        else pd.Series(np.nan, reports.index, dtype=np.float64)
        for name in ("time", "lat", "lon", "elev", "pres")
    }
    for name in ("station", "class", "type"):
        columns[name] = reports[name] if name in reports else pd.Series(None, reports.index, object)
    for quantity in QUANTITIES:
        for name in (quantity, f"{quantity}_quality", f"{quantity}_error"):
            values = reports[name] if name in reports else pd.Series(np.nan, reports.index)
            columns[name] = pd.to_numeric(values, errors="coerce").astype(np.float64)
    full = pd.DataFrame(columns)

    def derive(quantity: str, values: np.ndarray, *parents: str) -> None:
        """Fill in where not reported, with the worst quality mark of the parents."""
        new = full[quantity].isna() & np.isfinite(values)
        full.loc[new, quantity] = values[new]
        marks = full[[f"{parent}_quality" for parent in parents]]
        full.loc[new, f"{quantity}_quality"] = getattr(marks[new], worst)(axis=1)

    value = {name: full[name].to_numpy() for name in QUANTITIES}
    u, v = wind_components(value["speed"], value["direction"])
    derive("u", u, "speed", "direction")
    derive("v", v, "speed", "direction")
    derive("speed", np.hypot(value["u"], value["v"]), "u", "v")
    derive("rh", relative_humidity(value["t"], value["td"]), "t", "td")
    pressure = full["pres"].fillna(full["p"]).to_numpy()
    derive("q", specific_humidity(value["td"], pressure), "td", "p")
    return full
