# SPDX-License-Identifier: Apache-2.0
"""Station reports and radiosondes in BUFR files, decoded by pdbufr.

BUFR names its values by template, and templates change: the 2 m temperature of older SYNOP
messages is `airTemperatureAt2M`, that of newer ones `airTemperature` at a height. pdbufr's readers
`synop` and `temp` know them. What is done here on top of them:

- Messages without any of the elements wanted are passed over by their list of descriptors: half
  of those that ECMWF keeps are supplements to a report.
- ECMWF's quality marks are read along.
- Relative humidity of older templates, which gives no height and is passed over by pdbufr.

A file is decoded once; its reports stay in the cache as parquet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import eccodes
import numpy as np
import pandas as pd

from ddo_modulus.constants import GRAVITY
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

_SURFACE_CATEGORIES = (0, 1)  # of data: at the surface of land, of the sea
_SOUNDING_CATEGORY = 2

# Descriptors of temperature, dew point, humidity, wind and pressure, in all templates.
_SURFACE_ELEMENTS = frozenset(
    (12001, 12004, 12101, 12104, 12003, 12006, 12103, 12106, 13003)
    + (11001, 11002, 11011, 11012, 10004, 10051)
)
# Quantity -> the elements that may carry it, with whose marks.
_MARKED = {
    "t": ("airTemperatureAt2M", "airTemperature"),
    "td": ("dewpointTemperatureAt2M", "dewpointTemperature"),
    "rh": ("relativeHumidity",),
    "speed": ("windSpeedAt10M", "windSpeed"),
    "direction": ("windDirectionAt10M", "windDirection"),
    "p": ("nonCoordinatePressure",),
    "msl": ("pressureReducedToMeanSeaLevel",),
}
_WHOLE_REPORT = "qualityControl"  # in ECMWF's header: the confidence in the report

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
_DECODER = 1  # version of what is kept in the cache


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
        quality="ECMWF's confidence in % (100 is best): in the value, aloft in the sounding",
    )

    def _load(self, windows: Sequence[Window], variables: list[str]) -> pd.DataFrame:
        return decode_bufr(self.path, variables, self._kept_frame)


def decode_bufr(path: Path, variables: Sequence[str], keep: Keep) -> pd.DataFrame:
    """All observations of some variables in a file; decodes only the parts that they are in.

    Args:
        path: The file.
        variables: Ids.
        keep: Gives the frame of a key, from a cache or from the function that makes it.

    Raises:
        InputError: If the file is no whole BUFR file, or cannot be decoded.
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
        path: Checked by :func:`~ddo_modulus.earth2.sources.messages.check_messages`.

    Returns:
        A frame of reports (see :mod:`~ddo_modulus.earth2.sources.reports`); empty if the file has
        none.

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
    if len(extras) == len(frame):  # pdbufr gives a row for each subset
        frame = frame.join(pd.DataFrame(extras, frame.index))
        frame["rh"] = _number(frame, "rh").fillna(frame.pop("plain_rh"))
    return frame.assign(**{"class": "synop", "type": "BUFR"})


def _extras(message: Message) -> list[dict[str, float]]:
    """What pdbufr passes over, for each subset of a message: marks, and plain humidity."""
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
    """The radiosondes of a BUFR file, a row for each level; otherwise as :func:`read_synop`."""
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
    """Let pdbufr read messages, with one clear error."""
    pdbufr = needed("pdbufr")
    try:
        frame = pdbufr.read_bufr(stream, reader=reader, **options)
    except MemoryError:
        raise
    except Exception as error:  # ecCodes and pdbufr raise their own; all mean unreadable data
        raise InputError(
            f"{path}: a message cannot be decoded ({type(error).__name__}: {error}); copy or "
            "download it again, or leave that message out, e.g. with bufr_copy"
        ) from error
    if "stnid" in frame:  # WMO's numbers have five digits; newer templates give 3772 for 03772
        station = frame["stnid"].astype(str).str.strip()
        frame["stnid"] = station.where(~station.str.isdigit(), station.str.zfill(5))
    return frame


def _number(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column of numbers; missing values where pdbufr gives no such column."""
    return pd.to_numeric(frame.get(name, pd.Series(np.nan, frame.index)), errors="coerce")
