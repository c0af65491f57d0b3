# SPDX-License-Identifier: Apache-2.0
"""What all observation sources share: the shape of a call, selection in time, the cache.

A source here is a `DataFrameSource` of Earth2Studio: it has a `SCHEMA`, and is called with times,
variable ids and, if not all columns are wanted, fields. It differs from the built-in ones in that
mistakes (an unknown variable, a time outside of the data, missing credentials) are an
`InputError` instead of a log entry and an empty frame.

Earth2Studio is imported when a source is first called: that takes several seconds.
"""

import asyncio
import hashlib
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
from ddo_modulus.lexicon import check_units

Times = datetime | list[datetime] | np.ndarray
Tolerance = Any  # a timedelta, or a pair of them: before and after
Window = tuple[np.datetime64, np.datetime64]
Keep = Callable[[str, Callable[[], pd.DataFrame]], pd.DataFrame]

HALF_HOUR = np.timedelta64(30, "m")

_BACKOFF = 2.0  # seconds before the second try, doubled before each further one
_ENOUGH_TO_JUDGE = 20  # rows of a variable; in fewer, a gross error could be the median


def needed(module: str, extra: str = "observations") -> ModuleType:
    """Import a package that only some sources need.

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


def with_description(schema: pa.Schema, **descriptions: str) -> pa.Schema:
    """The schema with other descriptions of some fields."""
    for name, text in descriptions.items():
        index = schema.get_field_index(name)
        schema = schema.set(index, schema.field(name).with_metadata({"description": text}))
    return schema


class ObservationSource(ABC):
    """A source of observations at stations, on levels or in pixels.

    Args:
        time_tolerance: How far from a requested time an observation may be: a timedelta, either
            way, or a pair `(before, after)`, of which the first is negative or zero.
        cache: Keep what was downloaded or decoded for the next call, in Earth2Studio's cache for
            data (`$EARTH2STUDIO_DATA_CACHE`).
        retries: How often to try again what failed on the way, after 2, 4, 8, ... seconds.
        async_timeout: Seconds after which a call is given up.

    Attributes:
        SOURCE_ID: Name of the source, kept in the attribute `source` of its frames.
        SCHEMA: Columns and their types; the description of `quality` tells what its marks mean.
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
        """Get the observations of `variables` in some windows of time, and maybe of other times.

        Runs in a thread of its own. An `OSError` or `TimeoutError` is tried again.

        Returns:
            Rows with columns of `SCHEMA`, of any types and in any order.
        """

    @property
    @abstractmethod
    def _where(self) -> str:
        """What holds the observations, for messages."""

    @property
    def _is_whole(self) -> bool:
        """Whether `_load` gives all that there is, so that other times are outside of the data."""
        return True

    def variables(self) -> tuple[str, ...]:
        """The ids that can be asked for; where they are `t` and the like, `t850` as well."""
        return (*SURFACE_VARIABLES, *UPPER_AIR_VARIABLES)

    def _knows(self, variable: str) -> bool:
        return variable in self.variables() or parse_variable(variable) is not None

    def __call__(
        self,
        time: Times,
        variable: str | list[str] | np.ndarray,
        fields: str | list[str] | pa.Schema | None = None,
    ) -> pd.DataFrame:
        """Get observations near some times.

        Args:
            time: Times, UTC.
            variable: Variable ids.
            fields: Columns wanted; None for all of `SCHEMA`.

        Returns:
            One row for each observation, sorted by time. No rows, if the data cover the times but
            hold nothing near enough to any.

        Raises:
            InputError: If a variable is not known or not there, the times lie outside of the
                data, or the data cannot be had or read; the message tells how to mend it.
        """
        host = needed("earth2studio.data.utils", "earth2")
        try:
            return host._sync_async(self.fetch, time, variable, fields, timeout=self.async_timeout)
        finally:
            self._forget()

    async def fetch(
        self,
        time: Times,
        variable: str | list[str] | np.ndarray,
        fields: str | list[str] | pa.Schema | None = None,
    ) -> pd.DataFrame:
        """Get observations near some times, without blocking; see :meth:`__call__`."""
        host = needed("earth2studio.data.utils", "earth2")
        times, variables = host.prep_data_inputs(time, variable)
        schema = self.resolve_fields(fields)
        self._check(times, variables)
        windows = self._windows(times)
        try:
            rows = await host.async_retry(
                asyncio.to_thread,
                self._load,
                windows,
                variables,
                retries=self._retries,
                backoff=_BACKOFF,
            )
        except (OSError, TimeoutError) as error:
            raise InputError(
                f"{self._where}: cannot be had ({type(error).__name__}: {error}), tried "
                f"{self._retries + 1} times; check the connection and try again"
            ) from error
        frame = self._selected(rows, windows, variables)
        frame = _typed(frame, self.SCHEMA)[schema.names]
        frame.attrs["source"] = self.SOURCE_ID
        return frame

    @classmethod
    def resolve_fields(cls, fields: str | list[str] | pa.Schema | None) -> pa.Schema:
        """Give the schema of the columns wanted.

        Raises:
            InputError: If the source has no such column, or one of another type.
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
        unknown = [name for name in variables if not self._knows(name)]
        if unknown:
            raise InputError(
                f"{type(self).__name__}: unknown variable {', '.join(unknown)}; known are "
                f"{', '.join(self.variables())}"
                + (", and levels in hPa as t850" if "t" in self.variables() else "")
            )

    def _windows(self, times: Sequence[datetime]) -> list[Window]:
        time_utils = needed("earth2studio.utils.time", "earth2")
        try:
            before, after = time_utils.normalize_time_tolerance(self._time_tolerance)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"time_tolerance is {self._time_tolerance!r} ({error}); give a timedelta, or a "
                "pair of them"
            ) from error
        before, after = pd.Timedelta(before), pd.Timedelta(after)
        instants = pd.DatetimeIndex(np.array(times, "datetime64[ns]")).unique().sort_values()
        return [((t + before).to_datetime64(), (t + after).to_datetime64()) for t in instants]

    def _selected(
        self, rows: pd.DataFrame, windows: Sequence[Window], variables: Sequence[str]
    ) -> pd.DataFrame:
        """The rows within the windows, in the order of time, of plausible units."""
        if rows.empty:
            raise InputError(
                f"{self._where}: no observations of {', '.join(variables)}; ask for what is there"
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
                f"{windows[-1][1]}; choose times within, or a larger time_tolerance"
            )
        near = np.zeros(len(rows), bool)
        for start, end in windows:
            near |= ((time >= start) & (time <= end)).to_numpy()
        return rows[near].sort_values("time", kind="stable", ignore_index=True)

    # -- cache ------------------------------------------------------------------------------------

    def _folder(self) -> Path:
        """Where to keep files; made if need be."""
        host = needed("earth2studio.data.utils", "earth2")
        name = "ddo_" + type(self).__name__.removesuffix("Source").lower()
        return Path(host.datasource_cache_dir(name, self._cached, self._temporary))

    def _forget(self) -> None:
        if not self._cached:
            shutil.rmtree(self._folder(), ignore_errors=True)

    def _kept(self, key: str, suffix: str, write: Callable[[Path], object]) -> Path:
        """The file of a key, which `write` makes if it is not in the cache yet.

        A file is there either whole or not at all: it is written under another name.
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

    def _kept_frame(self, key: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The frame of a key, from the cache or from `make`."""
        path = self._kept(key, ".parquet", lambda part: make().to_parquet(part))
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError):  # a damaged disk, or a cache of another program
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
    """A key for the cache that changes when the file does."""
    stat = path.stat()
    return "|".join(map(str, (path.resolve(), stat.st_size, stat.st_mtime_ns, *more)))


def _typed(frame: pd.DataFrame, schema: pa.Schema) -> pd.DataFrame:
    """The columns of a schema with its types; those that are not there are missing throughout."""
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
