# SPDX-License-Identifier: Apache-2.0
"""Land stations from Copernicus' Climate Data Store: `insitu-observations-surface-land`.

The store delivers a zip file of CSV tables with one row for each value, its units and a quality
flag (0 passed, 1 failed, 2 not checked). `CdsSource` retrieves them through `cdsapi`, one request
a day, or reads a file that was downloaded by hand.

The store renamed the columns in 2024; both sets of names are accepted.
"""

from __future__ import annotations

import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from ddo_modulus.earth2.sources.reports import SCHEMA, SURFACE_VARIABLES, observations
from ddo_modulus.earth2.sources.source import (
    HALF_HOUR,
    MENDS,
    ObservationSource,
    Tolerance,
    Window,
    check_file,
    days_of,
    needed,
    pick_columns,
    with_description,
)
from ddo_modulus.errors import InputError
from ddo_modulus.file_kinds import FileKind, described, head_of, kind_of

DATASET = "insitu-observations-surface-land"

# The store's name of a variable -> our quantity, and the variable ids that need it.
_QUANTITIES = {
    "air_temperature": ("t", ("t2m", "r2m")),
    "dew_point_temperature": ("td", ("d2m", "r2m", "q2m")),
    "wind_speed": ("speed", ("ws10m", "u10m", "v10m")),
    "wind_from_direction": ("direction", ("u10m", "v10m")),
    "air_pressure": ("p", ("sp", "q2m")),
    "air_pressure_at_sea_level": ("msl", ("msl",)),
    "relative_humidity": ("rh", ("r2m",)),
}
_NOT_OFFERED = ("relative_humidity",)  # not in the store's form; read if a file has it

# Units, in lower case and without spaces -> (factor, offset) of the conversion to SI.
_TEMPERATURE = {name: (1.0, 273.15) for name in ("degc", "c", "celsius")} | {"k": (1.0, 0.0)}
_PRESSURE = {"pa": (1.0, 0.0), "hpa": (100.0, 0.0), "mbar": (100.0, 0.0)}
_KNOT = (1852.0 / 3600.0, 0.0)
_SPEED = {"m/s": (1.0, 0.0), "ms-1": (1.0, 0.0), "kt": _KNOT, "knots": _KNOT}
_DEGREES = ("degrees", "degree", "degreesangle", "degreetrue", "deg")
_UNITS = {
    "t": _TEMPERATURE,
    "td": _TEMPERATURE,
    "p": _PRESSURE,
    "msl": _PRESSURE,
    "speed": _SPEED,
    "direction": {name: (1.0, 0.0) for name in _DEGREES},
    "rh": {"%": (1.0, 0.0)},
}
_FLAGS = {"passed": 0, "failed": 1, "not checked": 2, "missing": 3}

# Our name of a column -> the store's names, the newer first.
_COLUMNS = {
    "time": ("report_timestamp", "date_time"),
    "lat": ("latitude", "latitude|station_configuration"),
    "lon": ("longitude", "longitude|station_configuration"),
    "name": ("observed_variable",),
    "value": ("observation_value",),
    "units": ("units",),
    "station": ("primary_station_id",),
    "elev": ("height_of_station_above_sea_level",),
    "type": ("report_type",),
    "flag": ("quality_flag",),
}
_ESSENTIAL = ("time", "lat", "lon", "name", "value", "units")

_ENCRYPTED = 1  # bit of a zip file's member
# Name of a kind of file -> pandas' name of the compression.
_COMPRESSIONS: dict[str, Literal["gzip", "bz2", "xz"]] = {
    "gzip": "gzip",
    "bzip2": "bz2",
    "xz": "xz",
}
# The store has tables of its own: a workbook of one is saved as CSV, and given again.
_MENDS = {kind: mend for kind, mend in MENDS.items() if kind != "Excel"}

_KEY = (
    "write the two lines that https://cds.climate.copernicus.eu/how-to-api shows when you are "
    "logged in to ~/.cdsapirc, or set CDSAPI_URL and CDSAPI_KEY; accept the licence of the data "
    f"set {DATASET} there as well"
)


class CdsSource(ObservationSource):
    """Observations of land stations from the Climate Data Store.

    Args:
        path: A file downloaded from the store (zip or CSV), which is then the only one read; None
            to retrieve from the store.
        area: North, west, south and east of a region, degrees; None for the globe.
        time_tolerance: See :class:`~ddo_modulus.earth2.sources.source.ObservationSource`.
        cache: Keep the retrieved files.
        retries: How often to retry after an error of the connection.
        async_timeout: Time limit of a call, in seconds; a request may be queued for hours.
    """

    SOURCE_ID = "ddo_modulus.earth2.sources.CdsSource"
    SCHEMA = with_description(
        SCHEMA, quality="The store's flag: 0 passed, 1 failed, 2 not checked, 3 missing"
    )

    def __init__(
        self,
        path: str | Path | None = None,
        area: tuple[float, float, float, float] | None = None,
        time_tolerance: Tolerance = HALF_HOUR,
        cache: bool = True,
        retries: int = 3,
        async_timeout: float = 24 * 3600,
    ) -> None:
        super().__init__(time_tolerance, cache, retries, async_timeout)
        self.path = None if path is None else Path(path)
        if area is not None and not (len(area) == 4 and -90 <= area[2] < area[0] <= 90):
            raise InputError(f"area is {area}; give north, west, south, east in degrees")
        self.area = area

    @property
    def _where(self) -> str:
        return f"the data set {DATASET}" if self.path is None else str(self.path)

    @property
    def _is_whole(self) -> bool:
        return self.path is not None

    def variables(self) -> tuple[str, ...]:
        """The ids that can be requested."""
        return SURFACE_VARIABLES

    def _offers(self, variable: str) -> bool:
        return variable in SURFACE_VARIABLES

    def requests(self, windows: Sequence[Window], variables: Sequence[str]) -> list[dict[str, Any]]:
        """The requests to the store, one for each day.

        Args:
            windows: Pairs of times: start and end.
            variables: Variable ids.

        Returns:
            Keywords of each request, by day.
        """
        names = [
            name
            for name, (_, needed_by) in _QUANTITIES.items()
            if set(needed_by) & set(variables) and name not in _NOT_OFFERED
        ]
        where = {} if self.area is None else {"area": list(self.area)}
        return [
            {
                "time_aggregation": "sub_daily",
                "variable": names,
                "year": f"{day:%Y}",
                "month": f"{day:%m}",
                "day": f"{day:%d}",
                "data_format": "csv",
                **where,
            }
            for day in sorted(days_of(windows))
        ]

    def _load(self, windows: Sequence[Window], variables: list[str]) -> pd.DataFrame:
        if self.path is not None:
            return observations(read_csv(self.path), variables)
        files = [
            self._retrieved(request, ".zip", self._retrieve)
            for request in self.requests(windows, variables)
        ]
        reports = pd.concat([read_csv(file) for file in files], ignore_index=True)
        return observations(reports, variables)

    def _retrieve(self, request: dict[str, Any], target: Path) -> None:
        check_cds_key()
        cdsapi = needed("cdsapi")
        requests = needed("requests")
        try:
            cdsapi.Client(quiet=True, progress=False).retrieve(DATASET, request, str(target))
        except requests.HTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status in (401, 403):
                raise InputError(f"the store refuses access ({error}); {_KEY}") from error
            if 400 <= status < 500 and status != 429:
                raise InputError(f"the store refuses the request {request} ({error})") from error
            raise  # an OSError, which is retried
        if not target.is_file():
            raise InputError(f"the store has no data for the request {request}; change it")


def check_cds_key() -> None:
    """Check that there are credentials for the Climate Data Store.

    Raises:
        InputError: If there are none; the message says where to get them.
    """
    rc = Path(os.environ.get("CDSAPI_RC", "~/.cdsapirc")).expanduser()
    if not (os.environ.get("CDSAPI_URL") and os.environ.get("CDSAPI_KEY")) and not rc.is_file():
        raise InputError(f"no key for the Climate Data Store; {_KEY}")


def read_csv(path: Path) -> pd.DataFrame:
    """Read the reports in a file of the store.

    Args:
        path: A CSV table, or a zip file of CSV tables.

    Returns:
        A frame of reports, one for each station and time; see
        :mod:`~ddo_modulus.earth2.sources.reports`.

    Raises:
        InputError: If the file is missing or damaged, or lacks the expected columns or units.
    """
    check_file(path)
    kind = kind_of(head_of(path), path.suffix)
    if kind is not None and kind.name not in ("zip", *_COMPRESSIONS):
        wanted = "a file of the store"
        raise InputError(f"{path}: not {wanted} but {described(kind, wanted, _MENDS)}")
    try:
        parts = [_named(table, path) for table in _tables(path, kind)]
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path}: damaged or cut short; copy or download it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text in UTF-8; save it as UTF-8") from error
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path}: the table is empty; download it again") from error
    except pd.errors.ParserError as error:
        raise InputError(
            f"{path}: not a CSV table: its rows have different numbers of cells, or a quotation "
            f"mark is never closed; give a table of {DATASET}"
        ) from error
    if not parts:
        raise InputError(f"{path}: no CSV table in it; download the data as CSV")
    return _reports(pd.concat(parts, ignore_index=True), path)


def _tables(path: Path, kind: FileKind | None) -> Iterator[pd.DataFrame]:
    """The tables of a CSV file, compressed or not, or of a zip file of CSV tables, as text."""
    if kind is None or kind.name != "zip":
        compression = None if kind is None else _COMPRESSIONS[kind.name]
        yield pd.read_csv(path, comment="#", dtype=str, compression=compression)
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".csv"):
                continue
            if member.flag_bits & _ENCRYPTED:
                raise InputError(f"{path}: is encrypted; unpack it, and give the table in it")
            with archive.open(member) as file:
                yield pd.read_csv(file, comment="#", dtype=str)


def _named(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The columns in use, under our names."""
    return pick_columns(table, _COLUMNS, _ESSENTIAL, str(path), f"Give a table of {DATASET}")


def _reports(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Gather the values of one station and time in one row."""
    name = table["name"].str.strip().str.lower().str.replace(" ", "_")
    table = table.assign(quantity=name.map(lambda n: _QUANTITIES.get(n, (None,))[0]))
    table = table[table["quantity"].notna()]
    time = pd.to_datetime(table["time"], utc=True, errors="coerce").dt.tz_localize(None)
    values = pd.to_numeric(table["value"], errors="coerce")
    flag = table["flag"].astype(str).str.strip().str.lower()
    table = table.assign(
        time=time,
        lat=pd.to_numeric(table["lat"], errors="coerce"),
        lon=pd.to_numeric(table["lon"], errors="coerce"),
        elev=pd.to_numeric(table["elev"], errors="coerce"),
        value=_in_si(values, table["units"], table["quantity"], path),
        flag=flag.map(_FLAGS).fillna(pd.to_numeric(flag, errors="coerce")),
    )
    table = table.dropna(subset=["time", "lat", "lon", "value"])
    # A station with two instruments has two values of one quantity: they make two reports.
    same = ["time", "lat", "lon", "station", "elev", "type"]
    number = table.groupby([*same, "quantity"], dropna=False).cumcount()
    table = table.assign(number=number)
    index = [*same, "number"]
    reports: list[pd.DataFrame] = []
    for quantity, rows in table.groupby("quantity"):
        columns = {"value": str(quantity), "flag": f"{quantity}_quality"}
        reports.append(rows[[*index, *columns]].rename(columns=columns))
    merged = reports[0] if reports else table[index]
    for part in reports[1:]:
        merged = merged.merge(part, how="outer", on=index)
    return merged.assign(**{"class": "land station"})


def _in_si(values: pd.Series, units: pd.Series, quantity: pd.Series, path: Path) -> pd.Series:
    """Convert to SI; refuse units that do not fit the quantity."""
    unit = units.astype(str).str.lower().str.replace(r"[\s°*]", "", regex=True)
    converted = pd.Series(np.nan, values.index)
    for (kind, name), rows in values.groupby([quantity, unit]):
        conversions = _UNITS[str(kind)]
        if name not in conversions:
            raise InputError(
                f"{path}: units {name!r} of {kind}; convert the table to one of "
                f"{', '.join(conversions)}"
            )
        factor, offset = conversions[str(name)]
        converted[rows.index] = factor * rows + offset
    return converted
