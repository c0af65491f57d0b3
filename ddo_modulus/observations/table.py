# SPDX-License-Identifier: Apache-2.0
"""Observation tables: read, checked, and sorted out by analysis time.

A table has Earth2Studio's core columns `time, lat, lon, observation, variable` and, if available,
`observation_error` (standard deviation) and `units` (of both); without units, values are in those
of the lexicon. On a box, `y, x` may stand for `lat, lon`. Further columns of Earth2Studio's schema
are kept where they are there (`NUMBERS`, `LABELS`). What is done about flaws:

- A mistake that spoils the whole table (a column, the units, the way times are written) is an
  `InputError`.
- A flawed cell costs its row: the row is left out, counted in `ObservationTable.dropped` and kept
  in `.rejected`. Text that is no number is a flaw, and so is a number that cannot be: an
  observation error of zero or less, a height above all mountains.
- A cell that is empty, or holds a code for an unknown value (-9999), is no flaw in a further
  column, where it stays NaN. An observation error that is empty stays NaN, for the caller's
  default.
- Reports that differ, from the same place and time, are separate observations and stay; an exact
  repetition adds nothing and is dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from ddo_modulus.errors import InputError
from ddo_modulus.lexicon import check_units, reported_range, units_of
from ddo_modulus.observations.table_columns import is_code, pick_columns, read_numbers
from ddo_modulus.observations.table_files import RawTable, read_file
from ddo_modulus.observations.timestamps import MISSING, read_times
from ddo_modulus.observations.typical import ALOFT
from ddo_modulus.units import conversion, is_declared

CORE_COLUMNS = ("time", "lat", "lon", "observation", "variable")
ERROR_COLUMN = "observation_error"
UNITS_COLUMN = "units"

#: Further columns of numbers, and what their values can be: height of the station above sea level
#: (m; in either of two columns), pressure (Pa), marker of quality, number of the satellite's
#: channel, angles (degrees).
NUMBERS = {
    "elev": (-500.0, 1e5),
    "station_elev": (-500.0, 9e3),
    "pres": (1.0, 1.1e5),
    "quality": (-1e5, 1e5),
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
_MOUNTAIN = 9e3  # m; no station is higher, but a level aloft may be
_HEIGHTS = ("elev", "station_elev")
# Beyond these, squares of values and of errors are beyond single precision.
_SMALLEST, _LARGEST = 1e-15, 1e15
_LEAST_HUMIDITY = 2.0  # %; a table whose humidities near the ground are all below holds fractions

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
        rejected: These rows, with a column `reason` and, if a cell could not be read, its text in a
            column `cell`.
        notes: Number of rows that are used with a reservation, by reservation.
        cartesian: Whether places are `y, x` on a box, under the names `lat, lon`.
    """

    frame: pd.DataFrame
    dropped: dict[str, int] = field(default_factory=dict)
    rejected: pd.DataFrame = field(default_factory=pd.DataFrame)
    notes: dict[str, int] = field(default_factory=dict)
    cartesian: bool = False

    def without(
        self, reason: "pd.Series[str]", cell: "pd.Series[str] | None" = None
    ) -> "ObservationTable":
        """Leave out rows, and remember them.

        Args:
            reason: Why, for each row of the frame; empty text for those that stay.
            cell: Text of the cell that is the reason, by the frame's index.
        """
        bad = reason != ""
        if not bad.any():
            return self
        dropped = dict(self.dropped)
        for text, count in reason[bad].value_counts().items():
            dropped[str(text)] = dropped.get(str(text), 0) + int(count)
        rows = self.frame[bad].assign(reason=reason[bad].astype(str))
        if cell is not None:
            rows["cell"] = cell[rows.index]
        rejected = rows if self.rejected.empty else pd.concat([self.rejected, rows])
        rejected = rejected.reset_index(drop=True)
        return replace(self, frame=self.frame[~bad], dropped=dropped, rejected=rejected)

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
    columns: Mapping[str, str] | None = None,
    required: bool = True,
) -> ObservationTable:
    """Read and check an observation table.

    Args:
        source: A parquet or text file (:mod:`.table_files`), or a frame, which is left as it is.
        variables: Ids that can be used; rows of others are left out. None takes any.
        columns: Names of the table's columns by ours, where they differ:
            ``{"time": "valid_time"}``.
        required: Whether there must be a usable row.

    Returns:
        The table.

    Raises:
        InputError: If the file cannot be read, a column is missing, the way that times or numbers
            are written has several readings, the values of a variable or the pressures are in
            wrong units, or no usable row is left.
    """
    where = "observation table" if isinstance(source, pd.DataFrame) else str(source)
    raw = RawTable.of(source) if isinstance(source, pd.DataFrame) else read_file(Path(source))
    wanted = (*CORE_COLUMNS, ERROR_COLUMN, UNITS_COLUMN, *NUMBERS, *LABELS)
    cells = pick_columns(raw.frame, wanted, CORE_COLUMNS, where, columns)
    if cells.empty and required:
        raise InputError(f"{where}: no rows; check how it was made")
    cartesian = "y" in cells
    cells = cells.rename(columns={"y": "lat", "x": "lon"}) if cartesian else cells
    frame, flaw, cell = _typed(cells, raw, where)
    table = _usable_variables(ObservationTable(frame, cartesian=cartesian), variables, where)
    if table.frame.empty and required and variables is not None:
        present = sorted(frame["variable"].unique())
        raise InputError(
            f"{where}: no observations of {', '.join(variables)}; the table has "
            f"{', '.join(present)}"
        )
    table = table.without(flaw[table.frame.index], cell)
    table = _in_lexicon_units(table, where)
    for reason, check in _CHECKS.items():
        bad = check(table, where)
        table = table.without(bad.map({True: reason, False: ""}).astype(object))
    if table.frame.empty and required:
        raise InputError(f"{where}: no usable row is left ({_reasons(table)}); mend the table")
    ordered = table.frame.sort_values("time", kind="stable", ignore_index=True)
    return replace(table, frame=ordered)


def _reasons(table: ObservationTable) -> str:
    """Why rows were left out, with an example of each kind of cell that cannot be read."""
    cells = table.rejected.get("cell", pd.Series("", table.rejected.index))
    first = cells.fillna("").groupby(table.rejected["reason"]).first()
    shown = {reason: f", such as {cell!r}" if cell else "" for reason, cell in first.items()}
    return ", ".join(f"{name}: {n}{shown.get(name, '')}" for name, n in table.dropped.items())


def _usable_variables(
    table: ObservationTable, variables: Sequence[str] | None, where: str
) -> ObservationTable:
    """Leave out rows that have no variable, or one that is not wanted."""
    variable = table.frame["variable"]
    reason = pd.Series("", variable.index, dtype=object)
    if variables is not None:
        reason[~variable.isin(list(variables))] = "unknown variable"
    reason[variable == ""] = "missing value"
    return table.without(reason)


def _typed(
    cells: pd.DataFrame, raw: RawTable, where: str
) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """One type for each column; and the flaw of each row, with the text of the flawed cell."""
    time, flaw = read_times(cells["time"], where)
    flaw = flaw.where(raw.flaw == "", raw.flaw)
    cell = pd.Series("", cells.index, dtype=object)
    cell[flaw != ""] = cells["time"][flaw != ""].astype(str)
    named = {name: cells[name] for name in (*CORE_COLUMNS[1:4], ERROR_COLUMN) if name in cells}
    named |= {name: cells[name] for name in NUMBERS if name in cells}
    numbers, unreadable = read_numbers(named, where, semicolons=raw.separator == ";")
    variable = cells["variable"].astype(object).where(cells["variable"].notna(), "")
    columns: dict[str, pd.Series] = {"time": time}
    columns |= {name: numbers[name] for name in ("lat", "lon", "observation")}
    columns["lon"] = columns["lon"].where(~is_code(columns["lon"]))
    variable = variable.astype(str).str.strip()
    columns["variable"] = variable.where(~variable.str.lower().isin(MISSING), "")
    columns[ERROR_COLUMN] = numbers.get(ERROR_COLUMN, pd.Series(np.nan, cells.index))
    if UNITS_COLUMN in cells:
        units = cells[UNITS_COLUMN].astype(object).where(cells[UNITS_COLUMN].notna(), "")
        columns[UNITS_COLUMN] = units.astype(str).str.strip()
    impossible = {}
    for name in (name for name in NUMBERS if name in cells):
        columns[name], impossible[name] = _possible(name, numbers[name], columns, where)
    for name in LABELS:
        if name in cells:
            columns[name] = cells[name].astype(object).where(cells[name].notna(), None)
    for word, bad in (("unreadable", unreadable), ("impossible", pd.DataFrame(impossible))):
        for name in map(str, bad):
            rows = bad[name] & (flaw == "")
            flaw[rows], cell[rows] = f"{word} {name}", cells[name][rows].astype(str)
    return pd.DataFrame(columns), flaw, cell


def _possible(
    name: str, values: pd.Series, columns: Mapping[str, pd.Series], where: str
) -> tuple[pd.Series, pd.Series]:
    """Values of a further column without the codes of unknown ones; and which are impossible."""
    if name == "pres":
        _check_pressure(values, where)
    low, high = NUMBERS[name]
    code = is_code(values) & (~values.between(low, high) | (name in _HEIGHTS))
    values = values.where(~code)
    bad = values.notna() & ~values.between(low, high)
    if name in _HEIGHTS and (values > _MOUNTAIN).any():
        aloft = columns["variable"].isin(
            [v for v in columns["variable"].unique() if ALOFT.fullmatch(v)]
        )
        bad |= (values > _MOUNTAIN) & ~aloft
    return values, bad


def _in_lexicon_units(table: ObservationTable, where: str) -> ObservationTable:
    """Convert values and errors from the units that the table declares for its rows."""
    if UNITS_COLUMN not in table.frame:
        return table
    frame = table.frame.drop(columns=UNITS_COLUMN)
    declared, notes = table.frame[UNITS_COLUMN], dict(table.notes)
    reason, refusal = pd.Series("", frame.index, dtype=object), {}
    for (variable, units), rows in frame.groupby(["variable", declared], sort=False):
        if not is_declared(units):
            continue
        # A letter alone is an upper-air report whose pressure is in another column.
        ours = units_of(str(variable)) or units_of(f"{variable}500")
        if ours is None:
            notes[f"{variable}, whose units {units!r} are not compared"] = len(rows)
            continue
        try:
            change = conversion(str(units), ours)
        except InputError as error:
            reason[rows.index], refusal[variable] = "wrong units", str(error)
            continue
        if not change.is_identity:
            notes[f"{variable} converted from {units} to {ours}"] = len(rows)
            frame.loc[rows.index, "observation"] *= change.factor
            frame.loc[rows.index, "observation"] += change.offset
            frame.loc[rows.index, ERROR_COLUMN] *= abs(change.factor)
    for variable, words in refusal.items():
        if (reason[frame["variable"] == variable] != "").all():
            raise InputError(f"{where}: {variable}: {words}")
    return replace(table, frame=frame, notes=notes).without(reason)


def _missing(table: ObservationTable, where: str) -> pd.Series:
    frame = table.frame
    finite = np.isfinite(frame[["lat", "lon", "observation"]].to_numpy()).all(axis=1)
    return pd.Series(~finite, frame.index) | frame["time"].isna()


def _off_the_globe(table: ObservationTable, where: str) -> pd.Series:
    """Longitudes may be of any branch."""
    return (table.frame["lat"].abs() > 90) & (not table.cartesian)


def _implausible(table: ObservationTable, where: str) -> pd.Series:
    """Mark impossible values; raise if they are so many that the units must be wrong."""
    frame = table.frame
    bad = pd.Series(False, frame.index)
    for variable, values in frame.groupby("variable")["observation"]:
        plausible = reported_range(str(variable))
        if plausible is None:
            code = is_code(values) & ~values.between(0, _MOUNTAIN * 10)
            bad[values.index] = code | (values.abs() > _LARGEST)
            continue
        half = f"{where} (middle half)"
        # Real reports hold gross errors. Half of them wrong is another matter: the units.
        middle = values.quantile([0.25, 0.5, 0.75])
        if not plausible.low <= middle[0.5] <= plausible.high:
            check_units(str(variable), middle[0.25], middle[0.75], half, plausible)
        bad[values.index] = ~values.between(plausible.low, plausible.high)
        if plausible.units == "%" and str(variable) != "r" and values.max() < _LEAST_HUMIDITY:
            check_units(str(variable), values.min(), values.max(), where, plausible)
    return bad


def _impossible_error(table: ObservationTable, where: str) -> pd.Series:
    """Mark errors that are not positive, or larger than all the values that are plausible."""
    error, variable = table.frame[ERROR_COLUMN], table.frame["variable"]
    ranges = {name: reported_range(name) for name in variable.unique()}
    widest = {name: r.high - r.low if r else _LARGEST for name, r in ranges.items()}
    return error.notna() & ~error.between(_SMALLEST, variable.map(widest).astype(float))


def _repeated(table: ObservationTable, where: str) -> pd.Series:
    frame = table.frame
    compared = frame[[column for column in frame if column not in LABELS]]
    if not table.cartesian:
        compared = compared.assign(lon=np.round(compared["lon"] % 360, 9) % 360)
    return compared.duplicated()


#: What is wrong with rows of a table whose cells can be read, in this order.
_CHECKS = {
    "missing value": _missing,
    "off the globe": _off_the_globe,
    "implausible value": _implausible,
    f"impossible {ERROR_COLUMN}": _impossible_error,
    "repeated row": _repeated,
}


def _check_pressure(pressure: pd.Series, where: str) -> None:
    middle = pressure[pressure > 0].median()
    if middle <= _HECTOPASCAL:
        raise InputError(
            f"{where}: the median of pres is {middle:g}, but it has to be in Pa. It looks like "
            "hPa: multiply by 100."
        )
