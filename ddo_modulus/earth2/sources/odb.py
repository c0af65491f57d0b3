# SPDX-License-Identifier: Apache-2.0
"""ECMWF's ODB-2 files: observations with what the assimilation made of them, read by pyodc.

A row is one datum. Its kind is a number, `varno` (the list is IFS's); `vertco_reference_1` is the
level, whose kind is `vertco_type`. Peculiarities that are undone here:

- Relative humidity is a fraction.
- A pressure (`varno` 110) is given at a height, as a geopotential: at the station's it is the
  surface pressure; at zero, of a station well above the sea, it is the mean sea level pressure.
- Wind may be reported as speed and direction (`varno` 112, 111), paired by report and level.

`quality` is `datum_status`, whose bits tell what the assimilation did with the datum (1 active,
2 passive, 4 rejected, 8 blacklisted); `observation_error` is the error that it used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ddo_modulus.constants import GRAVITY
from ddo_modulus.earth2.sources.reports import SCHEMA, observations
from ddo_modulus.earth2.sources.source import (
    FileSource,
    Keep,
    Window,
    file_key,
    needed,
    with_description,
)
from ddo_modulus.errors import InputError

MAGIC = b"\xff\xffODA"


class _Datum(NamedTuple):
    """What a `varno` stands for."""

    quantity: str
    aloft: bool = False
    factor: float = 1.0  # to the units of reports


_DATA = {
    1: _Datum("z", aloft=True),
    2: _Datum("t", aloft=True),
    3: _Datum("u", aloft=True),
    4: _Datum("v", aloft=True),
    7: _Datum("q", aloft=True),
    29: _Datum("rh", aloft=True, factor=100.0),
    59: _Datum("td", aloft=True),
    39: _Datum("t"),
    40: _Datum("td"),
    41: _Datum("u"),
    42: _Datum("v"),
    58: _Datum("rh", factor=100.0),
    281: _Datum("q"),
    107: _Datum("p"),
    108: _Datum("msl"),
    110: _Datum("p"),
    111: _Datum("direction"),
    112: _Datum("speed"),
}
_WIND = (111, 112)
_PRESSURE_AT_HEIGHT = 110
_ON_PRESSURE, _ON_GEOPOTENTIAL = 1, 2  # vertco_type
_MISSING = -2147483647
_SEA_LEVEL = 1.0  # m; nearer to zero than this is mean sea level

# Column -> what it may be called, in the order of preference; `@table` may be left off.
_COLUMNS = {
    "varno": ("varno@body",),
    "value": ("obsvalue@body",),
    "date": ("date@hdr",),
    "clock": ("time@hdr",),
    "lat": ("lat@hdr",),
    "lon": ("lon@hdr",),
    "station": ("statid@hdr",),
    "stalt": ("stalt@hdr",),
    "report": ("seqno@hdr",),
    "type": ("reportype", "codetype@hdr", "obstype@hdr"),
    "vertco": ("vertco_reference_1@body",),
    "vertco_type": ("vertco_type@body",),
    "quality": ("datum_status@body",),
    "error": ("final_obs_error@errstat", "obs_error@errstat"),
}
_ESSENTIAL = ("varno", "value", "date", "clock", "lat", "lon")
_DECODER = 1  # version of what is kept in the cache


class OdbSource(FileSource):
    """Observations in a local ODB-2 file, as MARS gives for `type=ofb`.

    Args:
        path: The file.
        time_tolerance: See :class:`~ddo_modulus.earth2.sources.source.ObservationSource`.
        cache: Keep the decoded reports.
    """

    SOURCE_ID = "ddo_modulus.earth2.sources.OdbSource"
    SCHEMA = with_description(
        SCHEMA,
        quality="ODB's datum_status, bits: 1 active, 2 passive, 4 rejected, 8 blacklisted",
        elev="Elevation (m): of the station, of a pressure the height that it is valid at",
    )

    def _load(self, windows: Sequence[Window], variables: list[str]) -> pd.DataFrame:
        return decode_odb(self.path, variables, self._kept_frame)


def decode_odb(path: Path, variables: Sequence[str], keep: Keep) -> pd.DataFrame:
    """All observations of some variables in a file.

    Args:
        path: The file.
        variables: Ids.
        keep: Gives the frame of a key, from a cache or from the function that makes it.

    Raises:
        InputError: As :func:`read_odb`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    return observations(keep(file_key(path, "odb", _DECODER), lambda: read_odb(path)), variables)


def read_odb(path: Path) -> pd.DataFrame:
    """The data of an ODB-2 file as reports, one for each datum (two of wind make one).

    Args:
        path: The file.

    Returns:
        A frame of reports; see :mod:`~ddo_modulus.earth2.sources.reports`.

    Raises:
        InputError: If it is no ODB-2 file, is damaged, or has not the columns needed.
    """
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise InputError(f"{path}: no ODB-2 file (it starts with {start!r}); give one")
    pyodc = needed("pyodc")
    try:
        parts = list(pyodc.read_odb(str(path)))
        raw = pd.concat([_named(part, path) for part in parts], ignore_index=True)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # pyodc raises bare exceptions of many kinds
        raise InputError(
            f"{path}: damaged or cut short ({type(error).__name__}: {error}); copy or download "
            "it again"
        ) from error
    raw = raw[raw["varno"].isin(list(_DATA)) & raw["value"].notna()]
    raw = raw[raw["date"].notna()].reset_index(drop=True)
    raw["aloft"] = raw["varno"].map({number: datum.aloft for number, datum in _DATA.items()})
    # Wind speed and direction have one number aloft and at the surface; a level makes the
    # difference. What is aloft, but not on a pressure (on a height, say), has no level here.
    on_pressure = (raw["vertco_type"] == _ON_PRESSURE) & raw["vertco"].notna()
    is_wind = raw["varno"].isin(_WIND)
    raw["aloft"] |= is_wind & on_pressure
    raw = raw[on_pressure | ~raw["aloft"]]
    is_wind = is_wind[raw.index]
    reports = _reports(raw)
    wind = _paired(reports[is_wind], raw[is_wind])
    return pd.concat([reports[~is_wind], wind], ignore_index=True) if is_wind.any() else reports


def _named(part: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The columns in use under names of our own; those that are not there are missing."""
    columns = {}
    for name, candidates in _COLUMNS.items():
        options = (o for c in candidates for o in (c, c.split("@")[0]) if o in part.columns)
        found = next(options, None)
        if found is None and name in _ESSENTIAL:
            raise InputError(
                f"{path}: no column {candidates[0]}; retrieve the file with its hdr and body "
                f"columns (it has {', '.join(map(str, part.columns[:12]))} ...)"
            )
        values = part[found] if found else pd.Series(np.nan, part.index)
        if name not in ("station", "type"):
            numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
            values = numbers.where(numbers != _MISSING)
        columns[name] = values
    return pd.DataFrame(columns)


def _reports(raw: pd.DataFrame) -> pd.DataFrame:
    """A report for each datum."""
    day = pd.to_datetime(raw["date"].astype("int64").astype(str), format="%Y%m%d")
    clock = raw["clock"].fillna(0).astype("int64")  # HHMMSS
    seconds = 3600 * (clock // 10000) + 60 * (clock // 100 % 100) + clock % 100
    reports = pd.DataFrame(
        {
            "time": day + pd.to_timedelta(seconds, unit="s"),
            "lat": raw["lat"],
            "lon": raw["lon"],
            "elev": raw["stalt"].mask(raw["aloft"]),
            "station": raw["station"].astype(str).str.strip(),
            "type": raw["type"].astype(str),
            "class": np.where(raw["aloft"], "upper air", "surface"),
            "pres": raw["vertco"].where(raw["aloft"]),
        }
    )
    height = raw["vertco"] / GRAVITY
    at_height = (raw["varno"] == _PRESSURE_AT_HEIGHT) & (raw["vertco_type"] == _ON_GEOPOTENTIAL)
    at_sea_level = at_height & (height.abs() < _SEA_LEVEL) & (raw["stalt"].abs() > _SEA_LEVEL)
    reports["elev"] = reports["elev"].mask(at_height & ~at_sea_level, height)

    def put(quantity: str, factor: float, here: pd.Series) -> None:
        reports.loc[here, quantity] = factor * raw.loc[here, "value"]
        reports.loc[here, f"{quantity}_quality"] = raw.loc[here, "quality"]
        reports.loc[here, f"{quantity}_error"] = factor * raw.loc[here, "error"]

    for number in raw["varno"].unique():
        datum = _DATA[int(number)]
        put(datum.quantity, datum.factor, (raw["varno"] == number) & ~at_sea_level)
    put("msl", 1.0, at_sea_level)
    return reports


def _paired(wind: pd.DataFrame, raw: pd.DataFrame) -> pd.DataFrame:
    """Speed and direction of the same report and level in one row."""
    same = [raw["report"], raw["vertco"], wind["station"], wind["time"], wind["lat"], wind["lon"]]
    return wind.groupby(same, dropna=False, sort=False).first().reset_index()
