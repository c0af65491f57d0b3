# SPDX-License-Identifier: Apache-2.0
"""ERA5 as a `DataSource`: Earth2Studio's own sources by name, and local files.

`Era5Source` selects among Earth2Studio's sources: `arco`, `wb2`, `cds` and `ncar` are `ARCO_ERA5`,
`WB2ERA5`, `CDS_ERA5` and `NCAR_ERA5`. If one cannot serve a request (it lacks a variable or time,
or there is no key or connection), the next store of `fallback` is tried; all must share one grid.
If none can serve it, the error gives the reason for each store.

`FieldSource` reads the formats of `ddo prepare`: GRIB, netCDF, zarr and training stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from ddo_modulus.data.formats import reading
from ddo_modulus.data.source import is_cartesian, open_dataset
from ddo_modulus.earth2.sources.cds import check_cds_key
from ddo_modulus.earth2.sources.source import Times, data_utils, needed, retried
from ddo_modulus.errors import InputError
from ddo_modulus.lexicon import check_units


class _Store(NamedTuple):
    """A source of Earth2Studio, and its grid spacing in degrees."""

    source: str
    degrees: float


STORES = {
    "arco": _Store("ARCO_ERA5", 0.25),
    "wb2": _Store("WB2ERA5", 0.25),
    "cds": _Store("CDS_ERA5", 0.25),
    "ncar": _Store("NCAR_ERA5", 0.25),
    "wb2_121x240": _Store("WB2ERA5_121x240", 1.5),
    "wb2_32x64": _Store("WB2ERA5_32x64", 5.625),
}
_LONGEST_REASON = 240  # characters


class FieldSource:
    """Fields of a local file or store, or of a zarr store at a URL.

    Longitudes ascend from 0 to 360. For a region across Greenwich they start below 0, because
    Earth2Studio interpolates only along an ascending axis.

    Args:
        path: A path or URL for :func:`~ddo_modulus.data.source.open_dataset`.
        member: Index of the ensemble member or trajectory, required if the file has several.

    Raises:
        InputError: If the file cannot be used, its fields are not on latitudes and longitudes, or
            `member` is missing or out of range.
    """

    def __init__(self, path: str | Path, member: int | None = None) -> None:
        self.path = str(path)
        dataset = open_dataset(path)
        if is_cartesian(dataset):
            raise InputError(f"{path}: fields in a box, not on the Earth; give fields on lat, lon")
        for dim in ("ensemble", "trajectory"):
            if dim in dataset.dims:
                size = dataset.sizes[dim]
                if member is None or not 0 <= member < size:
                    raise InputError(
                        f"{path}: has {size} along {dim}; choose one, member=0 to {size - 1}"
                    )
                dataset = dataset.isel({dim: member}, drop=True)
        lon = dataset["lon"].values
        if lon.max() < 0:  # a region west of Greenwich
            dataset = dataset.assign_coords(lon=lon + 360.0)
        self._dataset = dataset

    def variables(self) -> tuple[str, ...]:
        """The ids that can be requested."""
        return tuple(map(str, self._dataset.data_vars))

    def __call__(self, time: Times, variable: str | list[str] | np.ndarray) -> xr.DataArray:
        """Get fields.

        Args:
            time: Times, UTC; the file must have all of them.
            variable: Variable ids.

        Returns:
            Array on `(time, variable, lat, lon)`, latitude descending.

        Raises:
            InputError: If a time or variable is missing, or values cannot be read or are
                implausible in their units.
        """
        times, names = data_utils().prep_data_inputs(time, variable)
        missing = [name for name in names if name not in self._dataset]
        if missing:
            raise InputError(
                f"{self.path}: no variable {', '.join(missing)}; it has "
                f"{', '.join(self.variables())}"
            )
        wanted = np.asarray(times, "datetime64[ns]")
        there = self._dataset["time"].values
        absent = wanted[~np.isin(wanted, there)]
        if absent.size:
            raise InputError(
                f"{self.path}: no field at {absent[0]} and {absent.size - 1} more; it has "
                f"{len(there)} times from {there.min()} to {there.max()}"
            )
        chosen = self._dataset[list(names)].sel(time=wanted)
        with reading(self.path):
            fields = chosen.to_dataarray("variable").transpose("time", "variable", "lat", "lon")
            fields = fields.load()
        for name in names:
            values = fields.sel(variable=name).values
            if np.isfinite(values).any():
                check_units(name, np.nanmin(values), np.nanmax(values), self.path)
        return fields.reset_coords(drop=True).rename(None)

    async def fetch(self, time: Times, variable: str | list[str] | np.ndarray) -> xr.DataArray:
        """Get fields without blocking; see :meth:`__call__`."""
        return await asyncio.to_thread(self, time, variable)


class Era5Source:
    """ERA5 from one of Earth2Studio's stores or from a local file.

    Args:
        store: A key of `STORES`, or the path of a file or store.
        fallback: Further keys of `STORES`, tried in this order if the first cannot serve a
            request; all must be on the same grid.
        cache: Keep downloaded data in Earth2Studio's cache.
        verbose: Show Earth2Studio's progress bars.
        retries: How often to retry a store after an error of the connection.
        async_timeout: Time limit of a call, in seconds.
        member: For a local file; see :class:`FieldSource`.

    Raises:
        InputError: If a store is unknown, a file cannot be used, or the grids differ.
    """

    def __init__(
        self,
        store: str | Path = "arco",
        fallback: Sequence[str] = (),
        cache: bool = True,
        verbose: bool = False,
        retries: int = 2,
        async_timeout: float = 3600,
        member: int | None = None,
    ) -> None:
        names = [str(store), *fallback]
        self._local: FieldSource | None = None
        if names[0] not in STORES and (Path(names[0]).exists() or "://" in names[0]):
            if fallback:
                raise InputError(
                    f"{names[0]} is a file, whose grid may differ from that of "
                    f"{', '.join(fallback)}; leave fallback out"
                )
            self._local = FieldSource(store, member)
        else:
            unknown = [name for name in names if name not in STORES]
            if unknown:
                raise InputError(
                    f"ERA5: {', '.join(unknown)} is neither a file nor one of the stores "
                    f"{', '.join(STORES)}"
                )
            grids = {name: STORES[name].degrees for name in names}
            if len(set(grids.values())) > 1:
                listed = ", ".join(f"{name} ({step:g} degrees)" for name, step in grids.items())
                raise InputError(f"ERA5: the grids of {listed} differ; choose stores on one grid")
        self.stores = tuple(names)
        self._options = {"cache": cache, "verbose": verbose}
        self._retries = retries
        self.async_timeout = async_timeout
        self._sources: dict[str, Any] = {}

    def __call__(self, time: Times, variable: str | list[str] | np.ndarray) -> xr.DataArray:
        """Get fields.

        Args:
            time: Times, UTC.
            variable: Variable ids.

        Returns:
            Array on `(time, variable, lat, lon)`, latitude descending. Its attribute `store` names
            the store that served it.

        Raises:
            InputError: If no store can serve the request; the message gives each store's reason.
        """
        return data_utils()._sync_async(self.fetch, time, variable, timeout=self.async_timeout)

    async def fetch(self, time: Times, variable: str | list[str] | np.ndarray) -> xr.DataArray:
        """Get fields without blocking; see :meth:`__call__`."""
        if self._local is not None:
            fields = await self._local.fetch(time, variable)
            return fields.assign_attrs(store=self.stores[0])
        times, names = data_utils().prep_data_inputs(time, variable)
        reasons = []
        for store in self.stores:
            try:
                fields = await retried(self._ask, store, times, names, retries=self._retries)
                return fields.assign_attrs(store=store)
            except MemoryError:
                raise
            except KeyError as error:
                reasons.append(f"{store} has no variable {error}")
            except Exception as error:  # stores have many; all mean that this one cannot serve
                reasons.append(f"{store}: {_short(error)}")
        raise InputError(
            f"ERA5: no store has {', '.join(names)} at {_span(times)}. {'. '.join(reasons)}"
        )

    async def _ask(self, store: str, times: list[datetime], names: list[str]) -> xr.DataArray:
        """Get fields from one store; some sources have no asynchronous call."""
        source = self._source(store)
        if hasattr(source, "fetch"):
            return await source.fetch(times, names)
        return await asyncio.to_thread(source, times, names)

    def _source(self, store: str) -> Any:  # noqa: ANN401 - Earth2Studio is imported late
        if store == "cds":
            check_cds_key()
            needed("cdsapi")
        if store not in self._sources:
            data = needed("earth2studio.data", "earth2")
            self._sources[store] = getattr(data, STORES[store].source)(**self._options)
        return self._sources[store]


def _short(error: Exception) -> str:
    """The message of an error on one line, cut off where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."


def _span(times: Sequence[datetime]) -> str:
    first, last = pd.Timestamp(min(times)), pd.Timestamp(max(times))
    return str(first) if first == last else f"{first} to {last}"
