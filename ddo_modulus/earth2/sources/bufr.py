# SPDX-License-Identifier: Apache-2.0
"""Station reports and radiosondes in BUFR files, decoded by pdbufr.

The name of a value depends on the template: the 2 m temperature is `airTemperatureAt2M` in older
SYNOP messages and `airTemperature` at a height in newer ones. pdbufr's readers `synop` and `temp`
handle both. This module adds to them:

- It skips messages without any of the required elements, by their list of descriptors. Half of the
  messages in ECMWF's files only supplement another report.
- It reads ECMWF's quality marks.
- It reads the relative humidity of older templates, which has no height, so that pdbufr ignores it.

A file is decoded once; its reports are cached as parquet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import eccodes
import numpy as np
import pandas as pd

from ddo_modulus.constants import GRAVITY
from ddo_modulus.data.formats import said, silent_library
from ddo_modulus.earth2.sources.messages import Message, check_messages, messages
from ddo_modulus.earth2.sources.reports import SCHEMA, observations, parse_variable
from ddo_modulus.earth2.sources.source import (
    FileSource,
    Keep,
    Window,
    file_key,
    needed,
    with_description,
)
from ddo_modulus.errors import InputError

_SURFACE_CATEGORIES = (0, 1)  # data categories: surface on land, at sea
_SOUNDING_CATEGORY = 2

# Descriptors of temperature, dew point, humidity, wind and pressure, in all templates.
_SURFACE_ELEMENTS = frozenset(
    (12001, 12004, 12101, 12104, 12003, 12006, 12103, 12106, 13003)
    + (11001, 11002, 11011, 11012, 10004, 10051)
)
# Quantity -> the elements that may hold it and its quality mark.
_MARKED = {
    "t": ("airTemperatureAt2M", "airTemperature"),
    "td": ("dewpointTemperatureAt2M", "dewpointTemperature"),
    "rh": ("relativeHumidity",),
    "speed": ("windSpeedAt10M", "windSpeed"),
    "direction": ("windDirectionAt10M", "windDirection"),
    "p": ("nonCoordinatePressure",),
    "msl": ("pressureReducedToMeanSeaLevel",),
}
_WHOLE_REPORT = "qualityControl"  # in ECMWF's section of the header: confidence in the report

# pdbufr's name -> ours.
_SYNOP_NAMES = {
    "stnid": "station",
    "elevation": "elev",
    "t2m": "t",
    "td2m": "td",
    "rh2m": "rh",
    "wind10m_speed": "speed",
    "wind10m_dir": "direction",
    "mslp": "msl",
    "pressure": "p",
}
_SYNOP_COLUMNS = "stnid latlon elevation time t2m td2m rh2m wind10m mslp pressure".split()
_TEMP_NAMES = {
    "stnid": "station",
    "pressure": "pres",
    "wind_speed": "speed",
    "wind_dir": "direction",
}
_DECODER = 1  # increase it when the decoded reports change, so that cached ones are not used


class BufrSource(FileSource):
    """Observations in a local BUFR file: SYNOP (on land and at sea) and radiosondes.

    Args:
        path: The file.
        time_tolerance: See :class:`~ddo_modulus.earth2.sources.source.ObservationSource`.
        cache: Keep the decoded reports.
    """

    SOURCE_ID = "ddo_modulus.earth2.sources.BufrSource"
    SCHEMA = with_description(
        SCHEMA,
        quality="ECMWF's confidence in % (100 is best), in the value or in the whole sounding",
    )

    def _load(self, windows: Sequence[Window], variables: list[str]) -> pd.DataFrame:
        return decode_bufr(self.path, variables, self._kept_frame)


def decode_bufr(path: Path, variables: Sequence[str], keep: Keep) -> pd.DataFrame:
    """All observations of some variables in a file.

    Surface reports and radiosondes are decoded only if a variable needs them.

    Args:
        path: The file.
        variables: Variable ids.
        keep: Called with a cache key and a function that decodes; returns the cached frame.

    Raises:
        InputError: If the file is not BUFR, is incomplete or cannot be decoded.
    """
    check_messages(path)
    parsed = [p for p in map(parse_variable, variables) if p is not None]
    at_surface = [level is not None and np.isnan(level) for _, level in parsed]
    parts = []
    if any(at_surface):
        parts.append(keep(file_key(path, "synop", _DECODER), lambda: read_synop(path)))
    if not all(at_surface):
        parts.append(keep(file_key(path, "temp", _DECODER), lambda: read_soundings(path)))
    rows = [observations(part, variables, worst="min") for part in parts if len(part)]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def read_synop(path: Path) -> pd.DataFrame:
    """The surface reports of a BUFR file.

    Args:
        path: A file that passed :func:`~ddo_modulus.earth2.sources.messages.check_messages`.

    Returns:
        A frame of reports (see :mod:`~ddo_modulus.earth2.sources.reports`); empty if the file has
        no surface reports.

    Raises:
        InputError: If a message cannot be decoded.
    """
    extras: list[dict[str, float]] = []

    def useful() -> Iterator[Message]:
        for message in messages(path):
            of_interest = message["dataCategory"] in _SURFACE_CATEGORIES
            if of_interest and message.descriptors & _SURFACE_ELEMENTS:
                message.at_end = lambda ended: extras.extend(_extras(ended))
                yield message
            else:
                message.close()

    frame = _read(path, useful(), "synop", columns=_SYNOP_COLUMNS)
    if frame.empty:
        return frame
    frame = frame.rename(columns=_SYNOP_NAMES)
    if len(extras) == len(frame):  # pdbufr returned a row for each subset
        frame = frame.join(pd.DataFrame(extras, frame.index))
        frame["rh"] = _number(frame, "rh").fillna(frame.pop("plain_rh"))
    return frame.assign(**{"class": "synop", "type": "BUFR"})


def _extras(message: Message) -> list[dict[str, float]]:
    """What pdbufr does not read, for each subset: quality marks, and humidity without a height."""
    whole = message.get(_WHOLE_REPORT, np.nan)
    extra = {f"{quantity}_quality": float(whole) for quantity in _MARKED}
    extra["plain_rh"] = np.nan
    subsets = int(message["numberOfSubsets"])
    if subsets > 1:
        return subsets * [extra]
    there = set(message)
    for quantity, elements in _MARKED.items():
        for key in (f"#1#{element}" for element in elements):
            if key in there:
                mark = message.get(f"{key}->percentConfidence")
                extra[f"{quantity}_quality"] = whole if mark is None else float(mark)
    humidity = message.get("#1#relativeHumidity") if "#1#relativeHumidity" in there else None
    if humidity is not None and humidity != eccodes.CODES_MISSING_LONG:
        extra["plain_rh"] = float(humidity)
    return [extra]


def read_soundings(path: Path) -> pd.DataFrame:
    """The radiosondes of a BUFR file, one row for each level; see :func:`read_synop`."""
    soundings = []
    for message in messages(path):
        if message["dataCategory"] != _SOUNDING_CATEGORY:
            message.close()
            continue
        mark = message.get(_WHOLE_REPORT, np.nan)
        soundings.append(_read(path, [message], "temp").assign(mark=mark))
    frame = pd.concat(soundings, ignore_index=True) if soundings else pd.DataFrame()
    if frame.empty or "pressure" not in frame:
        return pd.DataFrame()
    frame = frame.rename(columns=_TEMP_NAMES).dropna(subset="pres")
    for quantity in ("t", "td", "speed", "direction", "z"):
        frame[f"{quantity}_quality"] = frame["mark"]
    frame["elev"] = _number(frame, "z") / GRAVITY
    frame = frame.drop(columns=["mark", "elevation"], errors="ignore")
    return frame.assign(**{"class": "radiosonde", "type": "BUFR"})


def _read(path: Path, stream: Iterable[Message], reader: str, **options: object) -> pd.DataFrame:
    """Read messages with pdbufr; turn its errors into one `InputError`."""
    pdbufr = needed("pdbufr")
    try:
        with silent_library():
            frame = pdbufr.read_bufr(stream, reader=reader, **options)
    except MemoryError:
        raise
    except Exception as error:  # ecCodes and pdbufr have many; all mean unreadable data
        raise InputError(
            f"{path}: a message cannot be decoded ({said(error)}); copy or download the file "
            "again if it may be damaged, or leave that message out, e.g. with bufr_copy"
        ) from error
    if "stnid" in frame:  # WMO numbers have five digits; newer templates drop leading zeros
        station = frame["stnid"].astype(str).str.strip()
        frame["stnid"] = station.where(~station.str.isdigit(), station.str.zfill(5))
    return frame


def _number(frame: pd.DataFrame, name: str) -> pd.Series:
    """A numeric column; all missing if pdbufr returned no such column."""
    return pd.to_numeric(frame.get(name, pd.Series(np.nan, frame.index)), errors="coerce")
