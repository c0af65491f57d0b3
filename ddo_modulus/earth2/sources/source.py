# SPDX-License-Identifier: Apache-2.0
"""Base classes of the observation sources: calls, selection by time, retries, the cache.

A source is a `DataFrameSource` of Earth2Studio: it has a `SCHEMA` and is called with times,
variable ids and, optionally, the columns to return. Earth2Studio's own sources log an error and
return an empty frame; these raise an `InputError` when a variable is unknown, a time lies outside
the data or credentials are missing.

Importing Earth2Studio takes several seconds, so it is imported on the first call.
"""

import asyncio
import hashlib
import json
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa

from ddo_modulus.earth2.sources.reports import (
    SCHEMA,
    SURFACE_VARIABLES,
    UPPER_AIR_VARIABLES,
    parse_variable,
)
from ddo_modulus.errors import InputError
from ddo_modulus.file_kinds import described, head_of, kind_of
from ddo_modulus.lexicon import check_units

Times = datetime | list[datetime] | np.ndarray
Tolerance = Any  # a timedelta, or a pair of timedeltas (before, after)
Window = tuple[np.datetime64, np.datetime64]
Keep = Callable[[str, Callable[[], pd.DataFrame]], pd.DataFrame]

HALF_HOUR = np.timedelta64(30, "m")

_BACKOFF = 2.0  # seconds before the second try, doubled before each further one
_MOST_LISTED = 30  # columns in a message
_ENOUGH_TO_JUDGE = 20  # rows of a variable; among fewer, gross errors could move the quartiles


def needed(module: str, extra: str = "observations") -> ModuleType:
    """Import a package that only some sources need.

    Args:
        module: Name of the module.
        extra: The extra of this project that installs it, for the message.

    Raises:
        InputError: If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f"this source needs {module.split('.')[0]}, which cannot be imported ({error}); "
            f"pip install 'ddo-modulus[{extra}]'"
        ) from error


def data_utils() -> Any:  # noqa: ANN401 - imported late
    """Import `earth2studio.data.utils`.

    Raises:
        InputError: If Earth2Studio is not installed.
    """
    return needed("earth2studio.data.utils", "earth2")


async def retried(
    call: Callable[..., Awaitable[Any]],
    *arguments: Any,  # noqa: ANN401 - passed on to `call`
    retries: int,
) -> Any:  # noqa: ANN401 - what `call` returns
    """Await `call(*arguments)`, and try again after errors of the connection."""
    return await data_utils().async_retry(call, *arguments, retries=retries, backoff=_BACKOFF)


def check_file(path: Path) -> None:
    """Refuse a path that is not a file.

    Raises:
        InputError: If there is no such file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")


#: What to do about files of other kinds that are given to a source of observations, by kind.
MENDS: Mapping[str, str] = {
    "GRIB": "fields are read by `ddo prepare`; give {wanted}",
    "netCDF": "fields are read by `ddo prepare`; give {wanted}",
    "BUFR": "read it with BufrSource",
    "ODB": "read it with OdbSource",
    "parquet": "give it as a table of observations",
    "Excel": "save the sheet as CSV, and give it as a table of observations",
}


def check_kind(path: Path, kind: str, wanted: str) -> None:
    """Refuse a path that is not a file, and a file that is known to be of another kind.

    Args:
        path: The file.
        kind: Name of the kind that is expected; see :mod:`ddo_modulus.file_kinds`.
        wanted: What is expected, with its article: "an ODB-2 file".

    Raises:
        InputError: If there is no such file, it is empty or of another kind.
    """
    check_file(path)
    found = kind_of(head_of(path), path.suffix)
    if found is not None and found.name != kind:
        raise InputError(f"{path}: not {wanted} but {described(found, wanted, MENDS)}")


def days_of(windows: Sequence[Window]) -> set[pd.Timestamp]:
    """The days, UTC, that the time windows touch."""
    return {
        day
        for start, end in windows
        for day in pd.date_range(pd.Timestamp(start).normalize(), end, freq="D")
    }


def pick_columns(
    table: pd.DataFrame,
    candidates: Mapping[str, Sequence[str]],
    required: Sequence[str],
    where: str,
    remedy: str,
) -> pd.DataFrame:
    """Select columns from a table in which they may have one of several names.

    Args:
        table: The table.
        candidates: Our name of a column -> its possible names, in order of preference.
        required: Our names of the columns that the table must have.
        where: Where the table comes from, for the message.
        remedy: What to do if a required column is missing, for the message.

    Returns:
        The columns under our names; an absent one is all missing.

    Raises:
        InputError: If a required column is missing.
    """
    picked = {}
    for name, options in candidates.items():
        found = next((option for option in options if option in table.columns), None)
        if found is None and name in required:
            present = ", ".join(map(str, table.columns[:_MOST_LISTED]))
            more = ", ..." if len(table.columns) > _MOST_LISTED else ""
            raise InputError(f"{where}: no column {options[0]}; it has {present}{more}. {remedy}")
        picked[name] = table[found] if found else pd.Series(None, table.index, object)
    return pd.DataFrame(picked)


def with_description(schema: pa.Schema, **descriptions: str) -> pa.Schema:
    """Replace the descriptions of some fields of a schema."""
    for name, text in descriptions.items():
        index = schema.get_field_index(name)
        schema = schema.set(index, schema.field(name).with_metadata({"description": text}))
    return schema


class ObservationSource(ABC):
    """A source of observations: of stations, of upper-air levels or of satellite pixels.

    Args:
        time_tolerance: How far an observation may be from a requested time: a timedelta, which
            holds in both directions, or a pair `(before, after)` whose first is negative or zero.
        cache: Keep downloaded and decoded data for later calls, in Earth2Studio's data cache
            (`$EARTH2STUDIO_DATA_CACHE`).
        retries: How often to retry after an error of the connection: after 2, 4, 8, ... seconds.
        async_timeout: Time limit of a call, in seconds.

    Attributes:
        SOURCE_ID: Name of the source; each frame has it as its attribute `source`.
        SCHEMA: Columns and their types. The description of `quality` explains the provider's
            marks.
    """

    SOURCE_ID: ClassVar[str]
    SCHEMA: ClassVar[pa.Schema] = SCHEMA

    def __init__(
        self,
        time_tolerance: Tolerance = HALF_HOUR,
        cache: bool = True,
        retries: int = 3,
        async_timeout: float = 3600,
    ) -> None:
        self._time_tolerance = time_tolerance
        self._cached = cache
        self._retries = retries
        self._temporary = None if cache else uuid.uuid4().hex[:8]
        self.async_timeout = async_timeout

    @abstractmethod
    def _load(self, windows: Sequence[Window], variables: list[str]) -> pd.DataFrame:
        """Load the observations of `variables` in some time windows.

        Runs in a thread. The call is retried after an `OSError` or `TimeoutError`.

        Returns:
            Rows with columns of `SCHEMA`, of any type and in any order. Rows at other times may be
            among them; the caller drops them.
        """

    @property
    @abstractmethod
    def _where(self) -> str:
        """Where the observations come from, for messages: a path or the name of a service."""

    @property
    def _is_whole(self) -> bool:
        """Whether `_load` returns all data, so that no other times can be requested."""
        return True

    def variables(self) -> tuple[str, ...]:
        """The ids that can be requested; an upper-air `t` stands for `t850` and so on as well."""
        return (*SURFACE_VARIABLES, *UPPER_AIR_VARIABLES)

    def _offers(self, variable: str) -> bool:
        return variable in self.variables() or parse_variable(variable) is not None

    def __call__(
        self,
        time: Times,
        variable: str | list[str] | np.ndarray,
        fields: str | list[str] | pa.Schema | None = None,
    ) -> pd.DataFrame:
        """Get the observations near some times.

        Args:
            time: Times, UTC.
            variable: Variable ids.
            fields: Columns to return; None for all of `SCHEMA`.

        Returns:
            One row for each observation, sorted by time. The frame is empty if the data cover the
            times but have no observation within `time_tolerance` of any.

        Raises:
            InputError: If a variable is unknown or not in the data, the times lie outside the
                data, or the data cannot be downloaded or read.
        """
        utils = data_utils()
        try:
            return utils._sync_async(self.fetch, time, variable, fields, timeout=self.async_timeout)
        finally:
            self._forget()

    async def fetch(
        self,
        time: Times,
        variable: str | list[str] | np.ndarray,
        fields: str | list[str] | pa.Schema | None = None,
    ) -> pd.DataFrame:
        """Get the observations near some times without blocking; see :meth:`__call__`."""
        times, variables = data_utils().prep_data_inputs(time, variable)
        schema = self.resolve_fields(fields)
        self._check(times, variables)
        windows = self._windows(times)
        try:
            rows = await retried(
                asyncio.to_thread, self._load, windows, variables, retries=self._retries
            )
        except (OSError, TimeoutError) as error:
            raise InputError(
                f"{self._where}: cannot be loaded ({type(error).__name__}: {error}), tried "
                f"{self._retries + 1} times; check the connection and try again"
            ) from error
        frame = self._selected(rows, windows, variables)
        frame = _typed(frame, self.SCHEMA)[schema.names]
        frame.attrs["source"] = self.SOURCE_ID
        return frame

    @classmethod
    def resolve_fields(cls, fields: str | list[str] | pa.Schema | None) -> pa.Schema:
        """Resolve the columns to return into a schema.

        Raises:
            InputError: If the source has no such column, or has it with another type.
        """
        if fields is None:
            return cls.SCHEMA
        names = [fields] if isinstance(fields, str) else list(getattr(fields, "names", fields))
        missing = [name for name in names if name not in cls.SCHEMA.names]
        if missing:
            raise InputError(
                f"{cls.__name__} has no field {', '.join(missing)}; it has "
                f"{', '.join(cls.SCHEMA.names)}"
            )
        if isinstance(fields, pa.Schema):
            for name in names:
                if fields.field(name).type != cls.SCHEMA.field(name).type:
                    raise InputError(
                        f"{cls.__name__}: the field {name} has the type "
                        f"{cls.SCHEMA.field(name).type}, not {fields.field(name).type}"
                    )
        return pa.schema([cls.SCHEMA.field(name) for name in names])

    def _check(self, times: Sequence[datetime], variables: Sequence[str]) -> None:
        if not times or not variables:
            raise InputError(f"{type(self).__name__}: give at least one time and one variable")
        unknown = [name for name in variables if not self._offers(name)]
        if unknown:
            raise InputError(
                f"{type(self).__name__}: unknown variable {', '.join(unknown)}; choose among "
                f"{', '.join(self.variables())}"
                + (", and levels in hPa, e.g. t850" if "t" in self.variables() else "")
            )

    def _windows(self, times: Sequence[datetime]) -> list[Window]:
        time_utils = needed("earth2studio.utils.time", "earth2")
        try:
            before, after = time_utils.normalize_time_tolerance(self._time_tolerance)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"time_tolerance is {self._time_tolerance!r} ({error}); give a timedelta, or a "
                "pair (before, after) of timedeltas"
            ) from error
        before, after = pd.Timedelta(before), pd.Timedelta(after)
        instants = pd.DatetimeIndex(np.array(times, "datetime64[ns]")).unique().sort_values()
        return [((t + before).to_datetime64(), (t + after).to_datetime64()) for t in instants]

    def _selected(
        self, rows: pd.DataFrame, windows: Sequence[Window], variables: Sequence[str]
    ) -> pd.DataFrame:
        """The rows within the time windows, sorted by time; refuse implausible units."""
        if rows.empty:
            raise InputError(
                f"{self._where}: no observations of {', '.join(variables)}; choose other variables"
            )
        time = pd.to_datetime(rows["time"]).astype("datetime64[ns]")
        lon = rows["lon"].to_numpy(np.float32) % np.float32(360)
        rows = rows.assign(time=time, lon=lon)
        for variable, values in rows.groupby("variable")["observation"]:
            if len(values) >= _ENOUGH_TO_JUDGE:
                low, high = values.quantile([0.25, 0.75])
                check_units(str(variable), low, high, f"{self._where} (middle half)")
        first, last = time.min(), time.max()
        if self._is_whole and all(end < first or start > last for start, end in windows):
            raise InputError(
                f"{self._where}: holds {first} to {last} UTC, nothing from {windows[0][0]} to "
                f"{windows[-1][1]}; choose times within these, or a larger time_tolerance"
            )
        near = np.zeros(len(rows), bool)
        for start, end in windows:
            near |= ((time >= start) & (time <= end)).to_numpy()
        return rows[near].sort_values("time", kind="stable", ignore_index=True)

    # -- cache ------------------------------------------------------------------------------------

    def _folder(self) -> Path:
        """The folder of the cache; created if it does not exist."""
        name = "ddo_" + type(self).__name__.removesuffix("Source").lower()
        return Path(data_utils().datasource_cache_dir(name, self._cached, self._temporary))

    def _forget(self) -> None:
        if not self._cached:
            shutil.rmtree(self._folder(), ignore_errors=True)

    def _kept(self, key: str, suffix: str, write: Callable[[Path], object]) -> Path:
        """The cached file of a key; `write` creates it if it is not in the cache yet.

        It is written under a temporary name and then renamed, so a file in the cache is complete.
        """
        path = self._folder() / (hashlib.sha256(key.encode()).hexdigest() + suffix)
        if not path.exists():
            part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
            try:
                write(part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        return path

    def _retrieved(
        self, request: dict[str, Any], suffix: str, retrieve: Callable[[dict[str, Any], Path], None]
    ) -> Path:
        """The file that answers a request to a service, from the cache or from `retrieve`."""
        key = json.dumps(request, sort_keys=True)
        return self._kept(key, suffix, lambda part: retrieve(request, part))

    def _kept_frame(self, key: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The cached frame of a key; `make` computes it if it is not in the cache yet."""
        path = self._kept(key, ".parquet", lambda part: make().to_parquet(part))
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError):  # damaged, or written by another program
            path.unlink()
            return pd.read_parquet(self._kept(key, ".parquet", lambda p: make().to_parquet(p)))


class FileSource(ObservationSource):
    """Observations in a local file.

    Args:
        path: The file.
        time_tolerance: See :class:`ObservationSource`.
        cache: Keep the decoded reports.
    """

    def __init__(
        self, path: str | Path, time_tolerance: Tolerance = HALF_HOUR, cache: bool = True
    ) -> None:
        super().__init__(time_tolerance, cache, retries=0)
        self.path = Path(path)

    @property
    def _where(self) -> str:
        return str(self.path)


def file_key(path: Path, *more: object) -> str:
    """A cache key of a file that changes whenever the file does."""
    stat = path.stat()
    return "|".join(map(str, (path.resolve(), stat.st_size, stat.st_mtime_ns, *more)))


def _typed(frame: pd.DataFrame, schema: pa.Schema) -> pd.DataFrame:
    """Convert to the columns and types of a schema; an absent column becomes all missing."""
    columns: dict[str, Any] = {}
    for field in schema:
        values = frame.get(field.name, pd.Series(None, frame.index, object))
        if pa.types.is_timestamp(field.type):
            columns[field.name] = values.astype("datetime64[ns]")
        elif pa.types.is_string(field.type):
            columns[field.name] = values.astype(object).where(values.notna(), None)
        elif pa.types.is_integer(field.type):
            numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
            limit = np.iinfo(field.type.to_pandas_dtype()).max
            whole = numbers.where(numbers.between(0, limit)).round()
            columns[field.name] = whole.astype(f"{field.type}".replace("ui", "UI"))
        else:
            columns[field.name] = pd.to_numeric(values, errors="coerce").astype(np.float32)
    return pd.DataFrame(columns, index=frame.index)
