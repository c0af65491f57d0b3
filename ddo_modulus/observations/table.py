# SPDX-License-Identifier: Apache-2.0
"""Observation tables: read, checked, and sorted out by analysis time.

A table has Earth2Studio's core columns `time, lat, lon, observation, variable` and, if available,
`observation_error` (standard deviation in physical units). Further columns of its schema are kept
where they are there (`NUMBERS`, `LABELS`); an impossible value counts as missing.
What is done about flaws:

- A mistake that spoils the whole table (a column, the units) is an `InputError`.
- A flawed row is left out, counted in `ObservationTable.dropped` and kept in `.rejected`.
- Reports that differ, from the same place and time, are separate observations and stay; an exact
  repetition adds nothing and is dropped.
- An unknown observation error stays NaN, for the caller's default; one of zero or less is a
  mistake.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from ddo_modulus.errors import InputError
from ddo_modulus.lexicon import check_units, reported_range

CORE_COLUMNS = ("time", "lat", "lon", "observation", "variable")
ERROR_COLUMN = "observation_error"

#: Further columns of numbers, and what their values can be: height of the station above sea level
#: (m; in either of two columns), pressure (Pa), marker of quality, number of the satellite's
#: channel, angles (degrees).
NUMBERS = {
    "elev": (-500.0, 1e5),
    "station_elev": (-500.0, 9e3),
    "pres": (1.0, 1.1e5),
    "quality": (0.0, 1e5),
    "sensor_index": (0.0, 1e5),
    "scan_angle": (-360.0, 360.0),
    "satellite_za": (-180.0, 180.0),
    "satellite_aza": (-360.0, 360.0),
    "solza": (-180.0, 180.0),
    "solaza": (-360.0, 360.0),
}
#: Further columns of text: who observed, and how.
LABELS = ("station", "satellite", "type", "class", "source")

_HECTOPASCAL = 1100.0  # half of the pressures below it: no radiosonde is there, all of them in hPa

NO_TOLERANCE = np.timedelta64(0, "ns")

#: A duration: of NumPy, of Python, or as text (``"10min"``).
Duration = np.timedelta64 | timedelta | str
#: Distance in time of an observation, either way, or its first and last offset.
Tolerance = Duration | Sequence[Duration]


@dataclass(frozen=True)
class ObservationTable:
    """Observations that passed the checks.

    Attributes:
        frame: Sorted by time; columns `CORE_COLUMNS` and `observation_error`: time as naive UTC,
            lat and lon in degrees, observation and its error in the lexicon's units (error NaN
            where unknown). Those of `NUMBERS` (NaN where unknown) and `LABELS` (None) that the
            source has.
        dropped: Number of rows left out, by reason.
        rejected: These rows, with a column `reason`.
    """

    frame: pd.DataFrame
    dropped: dict[str, int] = field(default_factory=dict)
    rejected: pd.DataFrame = field(default_factory=pd.DataFrame)

    def without(self, reason: "pd.Series[str]") -> "ObservationTable":
        """Leave out rows, and remember them.

        Args:
            reason: Why, for each row of the frame; empty text for those that stay.
        """
        bad = reason != ""
        if not bad.any():
            return self
        dropped = dict(self.dropped)
        for text, count in reason[bad].value_counts().items():
            dropped[str(text)] = dropped.get(str(text), 0) + int(count)
        rows = self.frame[bad].assign(reason=reason[bad].astype(str))
        rejected = rows if self.rejected.empty else pd.concat([self.rejected, rows])
        return ObservationTable(self.frame[~bad], dropped, rejected.reset_index(drop=True))

    def at(
        self,
        times: Sequence[np.datetime64] | np.ndarray,
        tolerance: Tolerance = NO_TOLERANCE,
        *,
        required: bool = True,
    ) -> list[pd.DataFrame]:
        """Select the observations for each of a list of analysis times.

        Args:
            times: Analysis times, UTC.
            tolerance: Largest distance in time, either way, or the first (negative: before) and
                last offset from the analysis. An observation near enough to
                several analysis times serves each.
            required: Whether there must be one for each time.

        Returns:
            One frame for each time.

        Raises:
            InputError: If there is no observation for some of the times, and ``required``.
        """
        seen = self.frame["time"].to_numpy()
        first, last = offsets(tolerance)
        windows = [
            slice(
                int(np.searchsorted(seen, time + first, side="left")),
                int(np.searchsorted(seen, time + last, side="right")),
            )
            for time in np.asarray(times, dtype="datetime64[ns]")
        ]
        empty = [
            str(pd.Timestamp(t)) for t, w in zip(times, windows, strict=True) if w.start == w.stop
        ]
        if empty and required:
            shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            raise InputError(
                f"no observations within {_span(first, last)} of {len(empty)} of "
                f"{len(windows)} analysis times: {shown}; the table runs from "
                f"{pd.Timestamp(seen[0])} to {pd.Timestamp(seen[-1])} UTC. Choose times within, "
                "or a larger tolerance"
            )
        return [self.frame.iloc[window] for window in windows]


def offsets(tolerance: Tolerance) -> tuple[np.timedelta64, np.timedelta64]:
    """First and last offset in time of an observation from the analysis.

    Raises:
        InputError: If a duration cannot be understood, or the first offset is after the last.
    """
    if isinstance(tolerance, (str, timedelta, np.timedelta64)):
        last = _duration(tolerance, tolerance)
        first = -last
    elif len(tolerance) == 2:
        first, last = (_duration(value, tolerance) for value in tolerance)
    else:
        raise InputError(f"tolerance={tolerance!r} must be a duration, or the first and last")
    if first > last:
        raise InputError(f"tolerance={tolerance!r}: the first offset is after the last")
    return first, last


def _duration(value: Duration, tolerance: Tolerance) -> np.timedelta64:
    try:
        duration = pd.Timedelta(value).to_timedelta64()
    except (ValueError, TypeError) as error:
        raise InputError(
            f"tolerance={tolerance!r}: {value!r} is no duration; write it as '10min'"
        ) from error
    if np.isnat(duration):
        raise InputError(f"tolerance={tolerance!r} holds no duration")
    return duration.astype("timedelta64[ns]")


def _span(first: np.timedelta64, last: np.timedelta64) -> str:
    span = f"{pd.Timedelta(first)} to {pd.Timedelta(last)}"
    return str(pd.Timedelta(last)) if first == -last else span


def read_table(
    source: str | Path | pd.DataFrame,
    variables: Sequence[str] | None = None,
    *,
    required: bool = True,
) -> ObservationTable:
    """Read and check an observation table.

    Args:
        source: A parquet or CSV file, or a frame, which is left as it is.
        variables: Ids that can be used; rows of others are left out. None takes any.
        required: Whether there must be a usable row.

    Returns:
        The table.

    Raises:
        InputError: If the file cannot be read, a column is missing, times cannot be understood,
            an observation error is not positive, the values of a variable or the pressures are in
            wrong units, or no usable row is left.
    """
    where = "observation table" if isinstance(source, pd.DataFrame) else str(source)
    frame = source if isinstance(source, pd.DataFrame) else _read_file(Path(source))
    missing = [c for c in CORE_COLUMNS if c not in frame.columns]
    if missing:
        raise InputError(
            f"{where}: no column {', '.join(missing)}; has {', '.join(map(str, frame.columns))}, "
            f"needs {', '.join(CORE_COLUMNS)}"
        )
    if frame.empty and required:
        raise InputError(f"{where}: no rows; check how it was made")
    frame = _typed(frame, where)
    table = ObservationTable(frame)

    def drop(reason: str, bad: pd.Series) -> None:
        nonlocal table, frame
        table = table.without(bad.map({True: reason, False: ""}))
        frame = table.frame

    present = sorted(frame["variable"].unique())
    if variables is not None:
        drop("unknown variable", ~frame["variable"].isin(list(variables)))
        if frame.empty and required:
            raise InputError(
                f"{where}: no observations of {', '.join(variables)}; the table has "
                f"{', '.join(present)}"
            )
    numbers = frame[["lat", "lon", "observation"]].to_numpy()
    drop(
        "missing value",
        pd.Series(~np.isfinite(numbers).all(axis=1), frame.index) | frame["time"].isna(),
    )
    drop("off the globe", (frame["lat"].abs() > 90) | ~frame["lon"].between(-180, 360))
    drop("implausible value", _implausible(frame, where))
    compared = [column for column in frame if column not in LABELS]
    drop("repeated row", frame.duplicated(compared))
    if frame.empty and required:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in table.dropped.items())
        raise InputError(f"{where}: no usable row is left ({reasons}); mend the table")
    _check_errors(frame, where)
    return replace(table, frame=frame.sort_values("time", kind="stable", ignore_index=True))


def _read_file(path: Path) -> pd.DataFrame:
    if path.suffix not in (".parquet", ".csv"):
        raise InputError(f"{path}: not a .parquet or .csv table; convert it to one")
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    try:
        return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path}: the file is empty; check how it was made") from error
    except (OSError, ValueError) as error:  # pyarrow's and pandas' own errors derive from these
        raise InputError(
            f"{path}: cannot be read, damaged or cut short ({error}); copy or download it again"
        ) from error


def _typed(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Copy the columns in use with one type each; text that is no number becomes NaN."""
    if pd.api.types.is_numeric_dtype(frame["time"]):
        raise InputError(f"{where}: time holds numbers; write dates, e.g. 2019-03-27T06:00")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a mixed format, which is no harm
            time = pd.to_datetime(frame["time"], utc=True)  # without a zone, it is UTC already
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{where}: time cannot be understood ({error}); write dates, e.g. 2019-03-27T06:00"
        ) from error
    columns: dict[str, pd.Series] = {"time": time.dt.tz_localize(None).astype("datetime64[ns]")}
    for name in ("lat", "lon", "observation"):
        columns[name] = pd.to_numeric(frame[name], errors="coerce").astype(np.float64)
    columns["variable"] = frame["variable"].astype(str)
    error_column = frame.get(ERROR_COLUMN, pd.Series(np.nan, frame.index))
    columns[ERROR_COLUMN] = pd.to_numeric(error_column, errors="coerce").astype(np.float64)
    for name, (low, high) in NUMBERS.items():
        if name in frame:
            values = pd.to_numeric(frame[name], errors="coerce").astype(np.float64)
            if name == "pres":
                _check_pressure(values, where)
            columns[name] = values.where(values.between(low, high))
    for name in LABELS:
        if name in frame:
            columns[name] = frame[name].astype(object).where(frame[name].notna(), None)
    # Without the attributes of the source: arrays among them would break pandas' concat.
    return pd.DataFrame(columns).reset_index(drop=True)


def _implausible(frame: pd.DataFrame, where: str) -> pd.Series:
    """Mark impossible values; raise if they are so many that the units must be wrong."""
    bad = pd.Series(False, frame.index)
    for variable, values in frame.groupby("variable")["observation"]:
        plausible = reported_range(str(variable))
        if plausible is None:
            continue
        # Real reports hold gross errors. Half of them wrong is another matter: the units.
        middle = values.quantile([0.25, 0.5, 0.75])
        if not plausible.low <= middle[0.5] <= plausible.high:
            half = f"{where} (middle half)"
            check_units(str(variable), middle[0.25], middle[0.75], half, plausible)
        bad[values.index] = ~values.between(plausible.low, plausible.high)
    return bad


def _check_pressure(pressure: pd.Series, where: str) -> None:
    middle = pressure[pressure > 0].median()
    if middle <= _HECTOPASCAL:
        raise InputError(
            f"{where}: the median of pres is {middle:g}, but it has to be in Pa. It looks like "
            "hPa: multiply by 100."
        )


def _check_errors(frame: pd.DataFrame, where: str) -> None:
    error = frame[ERROR_COLUMN]
    bad = frame[error.notna() & ~((error > 0) & np.isfinite(error))]
    if len(bad):
        raise InputError(
            f"{where}: {len(bad)} rows have an {ERROR_COLUMN} that is not positive and finite, "
            f"the first of {bad['variable'].iloc[0]} ({bad[ERROR_COLUMN].iloc[0]:g}); give the "
            "standard deviation in physical units, or leave it empty"
        )
