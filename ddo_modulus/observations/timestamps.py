# SPDX-License-Identifier: Apache-2.0
"""Times of a table: dates of ISO 8601, row by row.

Each row may have a fraction of a second and a zone or neither; without a zone it is UTC. Other
ways to write a time have several readings, and none is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ddo_modulus.errors import InputError

#: Texts of a cell without a value, in lower case.
MISSING = frozenset(
    ("", "na", "n/a", "nan", "nat", "null", "none", "missing", "msng", "m")
    + ("-", "--", ".", "/", "//", "///", "////", "/////", "<na>")
)

_WRITE = "write dates of ISO 8601, e.g. 2019-03-27T06:00"

# A date with a day, and perhaps a clock; pandas reads fewer digits too, and words such as "now".
_DATED = r"(?:\d{8}|\d{4}-\d{1,2}-\d{1,2}|\d{4}/\d{1,2}/\d{1,2})(?:[T ].*)?"
_COMPACT = r"(\d{8})(\d{4}|\d{6})"  # without the letter T: 201903271200
_MIDNIGHT = r"(\d{4}-?\d\d-?\d\d)[T ]24(:?00)*(\.0*)?"  # at the end of the day
_ZONE = r"\s*(?:Z|UTC|GMT)$"

# What a time may be that is no date of ISO 8601, in this order.
_KINDS = {
    "time with a zone by name": rf"{_DATED[: _DATED.rindex('(')]}[T ].*\d ?[A-Za-z]{{2,5}}",
    "impossible time": _DATED,  # 29 February of a common year
    "time as a number": r"[+-]?\d+([.,]\d*)?([eE][+-]?\d+)?",
    "time without a date": r"\d{1,2}:\d\d(:\d\d([.,]\d*)?)?( ?[ap]\.?m\.?)?Z?",
    "ambiguous date": r"\d{1,2}[-/. ]\d{1,2}[-/. ]\d{2,4}(\D.*)?",
}
_EARLIEST, _LATEST = pd.Timestamp("1678-01-01"), pd.Timestamp("2262-01-01")


def read_times(values: pd.Series, where: str) -> tuple[pd.Series, pd.Series]:
    """Read the times of a table.

    Args:
        values: Times or text.
        where: Where they come from, for the message.

    Returns:
        The times, naive UTC in nanoseconds, NaT where there is none; and why each row has none:
        empty text where it has one, or where its cell is empty.

    Raises:
        InputError: If no row has a date of ISO 8601, and the way the times are written has several
            readings.
    """
    flaw = pd.Series("", values.index, dtype=object)
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(values.cat.categories.dtype)
    if pd.api.types.is_datetime64_any_dtype(values):
        return _within(_utc(values), flaw)
    text = values.astype(object).where(values.notna(), "").astype(str).str.strip()
    code, distinct = pd.factorize(text)  # times repeat: many reports share one
    texts = pd.Series(distinct, dtype=object)
    time = _parsed(texts)
    time, kind = _within(time, _kinds(texts.where(time.isna(), "")))
    if time.isna().all():
        _refuse(texts, kind, where)
    return (
        pd.Series(time.to_numpy()[code], values.index),
        pd.Series(kind.to_numpy(object)[code], values.index, dtype=object),
    )


def _utc(times: pd.Series) -> pd.Series:
    """Without the zone."""
    return times if times.dt.tz is None else times.dt.tz_convert("UTC").dt.tz_localize(None)


def _parsed(texts: pd.Series) -> pd.Series:
    """Naive UTC in microseconds or finer; NaT where a text is no date of ISO 8601."""
    plain = texts.str.replace(_ZONE, "Z", regex=True, flags=re.IGNORECASE)
    plain = plain.str.replace(r"(?<=\d)[tT ]+(?=\d)", "T", regex=True)
    plain = plain.str.replace(rf"^{_COMPACT}$", r"\1T\2", regex=True)
    plain = plain.str.replace(r"(?<=:\d\d),(?=\d)", ".", regex=True)
    late = plain.str.fullmatch(rf"{_MIDNIGHT}Z?")
    plain = plain.where(~late, plain.str.slice(0, 10).str.rstrip("T"))
    plain = plain.where(plain.str.fullmatch(_DATED))
    time = pd.to_datetime(plain, format="ISO8601", utc=True, errors="coerce")
    return _utc(time) + pd.to_timedelta(late.astype(int), unit="D")


def _kinds(texts: pd.Series) -> pd.Series:
    """What each text is that is no date of ISO 8601; empty where there is none."""
    kind = pd.Series("unreadable time", texts.index, dtype=object)
    for name, pattern in reversed(_KINDS.items()):
        kind[texts.str.fullmatch(pattern, flags=re.IGNORECASE)] = name
    return kind.where(~texts.str.lower().isin(MISSING), "")


def _within(time: pd.Series, kind: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Times in nanoseconds; others than those of some centuries are no times of observations."""
    beyond = (time < _EARLIEST) | (time >= _LATEST)
    time = time.where(~beyond).astype("datetime64[ns]")
    return time, kind.where(~beyond, "impossible time")


def _refuse(texts: pd.Series, kind: pd.Series, where: str) -> None:
    """Raise if none of the texts is a time and the first of some kind shows why."""
    for name in (*_KINDS, "unreadable time"):
        of_kind = texts[kind == name]
        if len(of_kind):
            text = of_kind.iloc[0]
            raise InputError(f"{where}: time {text!r} {_readings(name, text)}; {_WRITE}")


def _readings(kind: str, text: str) -> str:
    """What a time may mean."""
    if kind == "time as a number":
        return f"is a number, which may be {_of_number(float(text.replace(',', '.')))}"
    if kind == "time without a date":
        return "is an hour without a date"
    if kind == "ambiguous date":
        return f"is no date of ISO 8601: it may be {_of_date(text)}"
    if kind == "time with a zone by name":
        return "has a zone by name; write that as Z or +01:00"
    return "cannot be understood" if kind == "unreadable time" else "is no possible time"


def _of_number(number: float) -> str:
    readings = []
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)):
        if 3e8 <= abs(number) / scale < 5e9:
            instant = pd.Timestamp(int(number / scale), unit="s")
            readings.append(f"{unit} since 1970 ({instant:%Y-%m-%d %H:%M})")
    if 1e4 <= number < 1e5:
        day = pd.Timestamp("1899-12-30") + pd.Timedelta(number, "D")
        readings.append(f"a day of a spreadsheet ({day:%Y-%m-%d %H:%M})")
    if 1e9 <= number < 1e10 and 1 <= int(number) // 10**4 % 100 <= 12:
        readings.append("year, month, day and hour without separators")
    if 1900 <= number < 2200 and number == int(number):
        readings.append("a year")
    return " or ".join(readings) or "seconds, hours or days since some date"


def _of_date(text: str) -> str:
    a, b, year = (int(part) for part in re.findall(r"\d+", text)[:3])
    year += 2000 if year < 100 else 0
    readings = []
    for day, month in ((a, b), (b, a)):
        try:
            readings.append(f"{pd.Timestamp(year, month, day):%-d %B %Y}")
        except ValueError:
            continue
    return " or ".join(dict.fromkeys(readings)) or "no day at all"


def is_time(values: Sequence[str]) -> np.ndarray:
    """Whether each text is a date of ISO 8601; to recognise a table without a header."""
    return _parsed(pd.Series(values, dtype=object)).notna().to_numpy()
