# SPDX-License-Identifier: Apache-2.0
"""The tables of NNJA-AI, and the observations in them.

A table holds one network on one day. Columns have the names of NCEP's BUFR tables, joined by dots:
`TMPSQ1.TMDB` is a dry-bulb temperature in the group `TMPSQ1`. Networks group elements differently,
so an element is found by the last part of the name. Units are SI; a missing value is NaN or 1e11.

The column of an upper-air level has the pressure in its name, `TMDB_PRLC85000`; the catalogue lists
the levels and their units. Each satellite channel is a column too, `BRITCSTC.TMBR_00005`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from ddo_modulus.constants import GRAVITY
from ddo_modulus.earth2.sources.conversions import station_pressure
from ddo_modulus.earth2.sources.reports import observations, parse_variable
from ddo_modulus.errors import InputError


class Column(Protocol):
    """The part of `nnja_ai.NNJAVariable` that is used here."""

    id: str
    base_id: str
    dim_val: float | None
    dimension: str | None


class Table(Protocol):
    """The part of `nnja_ai.NNJADataset` that is used here: a network's table, of one day or all."""

    name: str
    parquet_root_path: str
    manifest: pd.DataFrame
    variables: Mapping[str, Column]
    dimensions: Mapping[str, Mapping[str, Any]]

    def sel(self, **selection: Any) -> Table:  # noqa: ANN401 - the package's signature
        """Select days and columns."""

    def load_dataset(self, backend: str) -> pd.DataFrame:
        """Load the table into memory."""


class _Network(NamedTuple):
    """A table of the archive: its name in the catalogue, and the kind of its rows."""

    dataset: str
    kind: str  # surface, levels or channels


NETWORKS = {
    "synop": _Network("conv-adpsfc-NC000001", "surface"),
    "synop_mobile": _Network("conv-adpsfc-NC000002", "surface"),
    "synop_bufr": _Network("conv-adpsfc-NC000101", "surface"),
    "metar": _Network("conv-adpsfc-NC000007", "surface"),
    "radiosonde": _Network("conv-adpupa-NC002001", "levels"),
    "amsua": _Network("amsua-1bamua-NC021023", "channels"),
    "atms": _Network("atms-atms-NC021203", "channels"),
}

_MISSING = 1e11
PLACE = {"time": "OBS_TIMESTAMP", "lat": "LAT", "lon": "LON"}
_IDENTITY = ("RPID", "WMOB", "WMOS", "SELV", "HSMSL")  # of a station: identifiers, elevation

# Element -> NCEP's mnemonics of its value and of its quality mark.
_ELEMENTS = {
    "t": ("TMDB", "QMAT"),
    "td": ("TMDP", "QMDD"),
    "rh": ("REHU", "QMDD"),
    "speed": ("WSPD", "QMWN"),
    "direction": ("WDIR", "QMWN"),
    "p": ("PRES", "QMPR"),
    "msl": ("PMSL", "QMPR"),
    "altimeter": ("ALSE", "QMPR"),
    "z": ("GP10", "QMGP"),
    "z07": ("GP07", "QMGP"),
}
# Quantity -> the elements it may be derived from.
_PARENTS = {
    "rh": ("rh", "t", "td"),
    "q": ("td", "p", "altimeter"),
    "u": ("speed", "direction"),
    "v": ("speed", "direction"),
    "p": ("p", "altimeter"),
    "z": ("z", "z07"),
}
# The main groups of a report, preferred where several groups have an element.
_MAIN_GROUPS = (
    *("TMPSQ1", "WNDSQ1", "PRSSQ1"),
    *("MTRTMP", "MTRWND", "MTRPRS"),
    *("TEMHUMDA", "BSYWND1", "PRESDATA"),
)

_PASCALS = {"pa": 1.0, "hpa": 100.0, "mb": 100.0, "mbar": 100.0}
_TENS_OF_PASCAL = 11_000  # levels in tens of pascals are all below this

# Number in WMO's common code table C-5 -> Earth2Studio's name of the satellite.
_SATELLITES = {
    3: "metop-b",
    4: "metop-a",
    5: "metop-c",
    206: "n15",
    207: "n16",
    208: "n17",
    209: "n18",
    223: "n19",
    224: "npp",
    225: "n20",
    226: "n21",
    784: "aqua",
}


def serves(network: str, variable: str) -> bool:
    """Whether a network may have a variable."""
    parsed = parse_variable(variable)
    if parsed is None:
        return variable == network
    aloft = parsed[1] is None or not np.isnan(parsed[1])
    return NETWORKS[network].kind == ("levels" if aloft else "surface")


def columns(network: str, table: Table, variables: Sequence[str]) -> list[str]:
    """The columns that some variables of a network need, including time and location.

    Raises:
        InputError: If the table has no time or location, or lacks the levels or channels of its
            kind of network.
    """
    missing = [name for name in PLACE.values() if name not in table.variables]
    if missing:
        raise InputError(
            f"NNJA-AI: {table.name} has no column {', '.join(missing)}; copy the archive again, "
            "or leave this network out"
        )
    by_kind = {"surface": _surface_columns, "levels": _level_columns, "channels": _channel_columns}
    found = by_kind[NETWORKS[network].kind](table, variables)
    return sorted({*PLACE.values(), *_identity_columns(table), *found})


def rows(
    network: str, table: Table, values: pd.DataFrame, variables: Sequence[str]
) -> pd.DataFrame:
    """The observations of some variables in a table.

    Args:
        network: A key of `NETWORKS`.
        table: Description of the table.
        values: Its columns.
        variables: Variable ids.

    Returns:
        Rows with the columns of the source's `SCHEMA`.
    """
    numbers = values.select_dtypes("number").columns
    values = values.assign(**values[numbers].mask(values[numbers].abs() >= _MISSING))
    by_kind = {"surface": _surface, "levels": _levels, "channels": _channels}
    return by_kind[NETWORKS[network].kind](network, table, values, variables)


def _column(table: Table, mnemonic: str) -> str | None:
    """The column of an element: in a main group, else without a group, else the only one."""
    found = [c for c in table.variables if c.rpartition(".")[2] == mnemonic]
    ranked = [c for group in _MAIN_GROUPS for c in found if c.split(".")[0] == group]
    plain = [c for c in found if c == mnemonic]
    return next(iter([*ranked, *plain, *(found if len(found) == 1 else ())]), None)


def _elements(variables: Sequence[str]) -> list[str]:
    """The elements from which the variables are computed."""
    quantities = [parsed[0] for parsed in map(parse_variable, variables) if parsed]
    return list(dict.fromkeys(e for q in quantities for e in _PARENTS.get(q, (q,))))


def _identity_columns(table: Table) -> list[str]:
    """Columns that say which station it is, and how high; as far as they are there."""
    names = [_column(table, mnemonic) for mnemonic in _IDENTITY]
    return [name for name in names if name is not None]


def _surface_columns(table: Table, variables: Sequence[str]) -> list[str]:
    found = [_column(table, m) for e in _elements(variables) for m in _ELEMENTS[e]]
    return [name for name in found if name is not None]


def _surface(
    network: str, table: Table, values: pd.DataFrame, variables: Sequence[str]
) -> pd.DataFrame:
    reports = _place(network, table, values)
    for element in _elements(variables):
        value, mark = (_column(table, mnemonic) for mnemonic in _ELEMENTS[element])
        if value is not None:
            reports[element] = values[value]
            reports[f"{element}_quality"] = np.nan if mark is None else values[mark]
    if "altimeter" in reports:
        altimeter, elevation = (reports[name].to_numpy() for name in ("altimeter", "elev"))
        pressure = pd.Series(station_pressure(altimeter, elevation), reports.index)
        _fill(reports, "p", pressure, reports["altimeter_quality"])
    return observations(reports, variables)


def _levels_in_pascal(table: Table) -> dict[float, float]:
    """Level, as in the names of columns -> its pressure in Pa."""
    for dimension in table.dimensions.values():
        if "PRLC" in dimension.get("format_str", ""):
            levels = dimension["values"]
            units = str(dimension.get("units") or "pa").strip().lower()
            factor = _PASCALS.get(units, 1.0)
            # 1000 hPa is a mandatory level, so the largest level determines the unit.
            if factor == 1.0 and max(levels) < _TENS_OF_PASCAL:
                factor = 10.0
            return {level: factor * level for level in levels}
    raise InputError(
        f"NNJA-AI: {table.name} has no dimension of pressure levels (PRLC); copy its dataset.json "
        "again, or leave this network out"
    )


def _at_levels(table: Table, variables: Sequence[str]) -> list[tuple[float, str, str, str | None]]:
    """Pressure, element, value column and mark column of all that the variables need."""
    wanted = [parsed[1] for parsed in map(parse_variable, variables) if parsed]
    column = {(c.base_id, c.dim_val): c.id for c in table.variables.values() if c.dimension}
    return [
        (pressure, element, column[value, level], column.get((mark, level)))
        for level, pressure in _levels_in_pascal(table).items()
        if any(w is None or abs(w - pressure) < 1 for w in wanted)
        for element in _elements(variables)
        for value, mark in [_ELEMENTS[element]]
        if (value, level) in column
    ]


def _level_columns(table: Table, variables: Sequence[str]) -> list[str]:
    return [c for _, _, *names in _at_levels(table, variables) for c in names if c is not None]


def _levels(
    network: str, table: Table, values: pd.DataFrame, variables: Sequence[str]
) -> pd.DataFrame:
    place = _place(network, table, values).drop(columns="elev")
    levels: dict[float, pd.DataFrame] = {}
    for pressure, element, value, mark in _at_levels(table, variables):
        level = levels.setdefault(pressure, place.assign(pres=pressure))
        level[element] = values[value]
        level[f"{element}_quality"] = np.nan if mark is None else values[mark]
    if not levels:
        return observations(place.iloc[:0], variables)
    reports = pd.concat(levels.values(), ignore_index=True)
    if "z07" in reports:
        _fill(reports, "z", reports["z07"], reports["z07_quality"])
    if "z" in reports:
        reports["elev"] = reports["z"] / GRAVITY
    return observations(reports, variables)


def _fill(reports: pd.DataFrame, quantity: str, values: pd.Series, marks: pd.Series) -> None:
    """Fill in a quantity and its marks where it is not reported."""
    for name in (quantity, f"{quantity}_quality"):
        if name not in reports:
            reports[name] = np.nan
    missing = reports[quantity].isna()
    reports[quantity] = reports[quantity].mask(missing, values)
    reports[f"{quantity}_quality"] = reports[f"{quantity}_quality"].mask(missing, marks)


def _place(network: str, table: Table, values: pd.DataFrame) -> pd.DataFrame:
    """Time, location and station of the rows of a table."""
    names = {mnemonic: _column(table, mnemonic) for mnemonic in _IDENTITY}
    identity = {m: values[name] for m, name in names.items() if name is not None}
    nothing = pd.Series(np.nan, values.index)
    station = identity.get("RPID", pd.Series(None, values.index, object))
    if "WMOB" in identity and "WMOS" in identity:  # WMO block and station number
        number = 1000 * identity["WMOB"] + identity["WMOS"]
        text = number.astype("Int64").astype(str).str.zfill(5).where(number.notna(), None)
        station = station.where(station.notna(), text)
    place = pd.DataFrame(
        {
            "time": pd.to_datetime(values[PLACE["time"]], utc=True).dt.tz_localize(None),
            "lat": values[PLACE["lat"]],
            "lon": values[PLACE["lon"]],
            "elev": identity.get("HSMSL", nothing).fillna(identity.get("SELV", nothing)),
            "station": station,
            "class": network,
            "type": NETWORKS[network].dataset.rpartition("-")[2],
        }
    )
    return place.dropna(subset=["time", "lat", "lon"])


def _brightness(table: Table) -> dict[str, int]:
    """Column of a brightness temperature -> its channel."""
    channels = {}
    for name in table.variables:
        element, _, channel = name.rpartition(".")[2].rpartition("_")
        if element == "TMBR" and channel.isdigit():
            channels[name] = int(channel)
    if not channels:
        raise InputError(
            f"NNJA-AI: {table.name} has no column of brightness temperature (TMBR); copy its "
            "dataset.json again, or leave this network out"
        )
    return channels


def _channel_columns(table: Table, variables: Sequence[str]) -> list[str]:
    geometry = [name for name in ("SAID", "SAZA", "SOZA", "HOLS") if name in table.variables]
    return [*geometry, *_brightness(table)]


def _channels(
    network: str, table: Table, values: pd.DataFrame, variables: Sequence[str]
) -> pd.DataFrame:
    place = _place(network, table, values)
    nothing = pd.Series(np.nan, values.index)
    place["satellite"] = values.get("SAID", nothing).map(
        lambda number: _SATELLITES.get(int(number), f"said-{int(number)}"), na_action="ignore"
    )
    place["satellite_za"] = values.get("SAZA", nothing)
    place["solza"] = values.get("SOZA", nothing)
    place["elev"] = values.get("HOLS", nothing)
    pixels = [
        place.assign(observation=values[column], sensor_index=channel, variable=network)
        for column, channel in _brightness(table).items()
    ]
    return pd.concat(pixels, ignore_index=True).dropna(subset="observation")
