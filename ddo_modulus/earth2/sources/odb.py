# SPDX-License-Identifier: Apache-2.0
"""ECMWF's ODB-2 files: observations with feedback of an assimilation, read by pyodc.

A row is one datum. `varno` is its kind, a number of IFS's list; `vertco_reference_1` is its level
and `vertco_type` the kind of level. They differ from reports in three ways:

- Relative humidity is a fraction.
- A pressure (`varno` 110) may be valid at a geopotential. At the height of the station it is the
  surface pressure; at zero, if the station is not at sea level, the mean sea level pressure.
- Wind may be reported as speed and direction (`varno` 112, 111), in two rows of one report and
  level.

`quality` is `datum_status`, the bits of what the assimilation did with the datum (1 active,
2 passive, 4 rejected, 8 blacklisted); `observation_error` is the error that it used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ddo_modulus.constants import GRAVITY
from ddo_modulus.data.formats import said
from ddo_modulus.earth2.sources.reports import SCHEMA, observations
from ddo_modulus.earth2.sources.source import (
    FileSource,
    Keep,
    Window,
    check_kind,
    file_key,
    needed,
    pick_columns,
    with_description,
)
from ddo_modulus.errors import InputError

MAGIC = b"\xff\xffODA"


class _Datum(NamedTuple):
    """The quantity of a `varno`."""

    quantity: str
    aloft: bool = False
    factor: float = 1.0  # converts to the units of reports


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
_SEA_LEVEL = 1.0  # m; heights closer to zero than this are mean sea level

# Our name of a column -> ODB's names in order of preference; files may omit the `@table`.
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
_DECODER = 2  # increase it when the decoded reports change, so that cached ones are not used


class OdbSource(FileSource):
    """Observations in a local ODB-2 file, as MARS delivers for `type=ofb`.

    Args:
        path: The file.
        time_tolerance: See :class:`~ddo_modulus.earth2.sources.source.ObservationSource`.
        cache: Keep the decoded reports.
    """

    SOURCE_ID = "ddo_modulus.earth2.sources.OdbSource"
    SCHEMA = with_description(
        SCHEMA,
        quality="ODB's datum_status, bits: 1 active, 2 passive, 4 rejected, 8 blacklisted",
        elev="Elevation (m) of the station, or the height at which a pressure is valid",
    )

    def _load(self, windows: Sequence[Window], variables: list[str]) -> pd.DataFrame:
        return decode_odb(self.path, variables, self._kept_frame)


def decode_odb(path: Path, variables: Sequence[str], keep: Keep) -> pd.DataFrame:
    """All observations of some variables in a file.

    Args:
        path: The file.
        variables: Variable ids.
        keep: Called with a cache key and a function that decodes; returns the cached frame.

    Raises:
        InputError: If the file is missing, or as in :func:`read_odb`.
    """
    check_kind(path, "ODB", "an ODB-2 file")
    return observations(keep(file_key(path, "odb", _DECODER), lambda: read_odb(path)), variables)


def read_odb(path: Path) -> pd.DataFrame:
    """Read an ODB-2 file as reports, one for each datum, or for wind speed and direction together.

    Args:
        path: The file.

    Returns:
        A frame of reports; see :mod:`~ddo_modulus.earth2.sources.reports`.

    Raises:
        InputError: If it is not an ODB-2 file, is damaged, or lacks required columns.
    """
    check_kind(path, "ODB", "an ODB-2 file")
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise InputError(f"{path}: not an ODB-2 file (it starts with {start!r}); give one")
    pyodc = needed("pyodc")
    _check_length(path)
    try:
        parts = list(pyodc.read_odb(str(path)))
        raw = pd.concat([_named(part, path) for part in parts], ignore_index=True)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # pyodc raises many kinds
        raise InputError(
            f"{path}: cannot be decoded ({said(error)}); copy it again if it may be damaged, or "
            "look for the fault with `odc header`"
        ) from error
    raw = raw[raw["varno"].isin(list(_DATA)) & raw["value"].notna()]
    raw = raw[raw["date"].notna()].reset_index(drop=True)
    raw["aloft"] = raw["varno"].map({number: datum.aloft for number, datum in _DATA.items()})
    # Wind speed and direction have the same varno at the surface and aloft: only data aloft have a
    # pressure level. Other data aloft without a pressure level, e.g. at a height, are dropped.
    on_pressure = (raw["vertco_type"] == _ON_PRESSURE) & raw["vertco"].notna()
    is_wind = raw["varno"].isin(_WIND)
    raw["aloft"] |= is_wind & on_pressure
    raw = raw[on_pressure | ~raw["aloft"]]
    is_wind = is_wind[raw.index]
    reports = _reports(raw)
    wind = _paired(reports[is_wind], raw[is_wind])
    return pd.concat([reports[~is_wind], wind], ignore_index=True) if is_wind.any() else reports


def _check_length(path: Path) -> None:
    """Refuse a file that is cut short: pyodc finds the ends of frames without reading their data.

    Raises:
        InputError: If a frame ends after the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            needed("pyodc.reader").Reader(file, aggregated=False)
            is_cut = file.tell() > size
        except MemoryError:
            raise
        except Exception:  # in a header; that of a file cut short ends with the file
            is_cut = file.tell() >= size
    if is_cut:
        raise InputError(
            f"{path}: damaged or cut short (a frame of it ends after the file); copy "
            "or download it again"
        )


def _named(part: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The columns in use, under our names; as numbers, except for names of stations and types."""
    candidates = {
        name: [option for column in columns for option in (column, column.split("@")[0])]
        for name, columns in _COLUMNS.items()
    }
    remedy = "Retrieve the file with its hdr and body columns"
    picked = pick_columns(part, candidates, _ESSENTIAL, str(path), remedy)
    for name in picked.columns.difference(["station", "type"]):
        numbers = pd.to_numeric(picked[name], errors="coerce").astype(np.float64)
        picked[name] = numbers.where(numbers != _MISSING)
    return picked


def _reports(raw: pd.DataFrame) -> pd.DataFrame:
    """One report for each datum."""
    day = pd.to_datetime(raw["date"].astype("int64").astype(str), format="%Y%m%d")
    clock = raw["clock"].fillna(0).astype("int64")  # HHMMSS
    seconds = 3600 * (clock // 10000) + 60 * (clock // 100 % 100) + clock % 100
    reports = pd.DataFrame(
        {
            "time": day + pd.to_timedelta(seconds, unit="s"),
            "lat": raw["lat"],
            "lon": raw["lon"],
            "elev": raw["stalt"].mask(raw["aloft"]),
            "station": raw["station"].astype(str).str.strip().where(raw["station"].notna()),
            "type": raw["type"].astype(str).where(raw["type"].notna()),
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
    """Join speed and direction of the same report and level in one row."""
    same = [raw["report"], raw["vertco"], wind["station"], wind["time"], wind["lat"], wind["lon"]]
    return wind.groupby(same, dropna=False, sort=False).first().reset_index()
