# SPDX-License-Identifier: Apache-2.0
"""ERA5 as a `DataSource`: Earth2Studio's own sources by name, and local files.

`Era5Source` is a choice, no source of its own: `arco`, `wb2`, `cds` and `ncar` are Earth2Studio's
`ARCO_ERA5`, `WB2ERA5`, `CDS_ERA5` and `NCAR_ERA5`. Where one cannot serve a request (a variable or
a time that it has not got, no key, no connection) the next of `fallback` is asked, which has to be
on the same grid; if none can, one message says why not, store by store.

`FieldSource` reads what `ddo prepare` reads: GRIB, netCDF, zarr, training stores.
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

from ddo_modulus.data.source import is_cartesian, open_dataset
from ddo_modulus.earth2.sources.cds import check_cds_key
from ddo_modulus.earth2.sources.source import Times, needed
from ddo_modulus.errors import InputError
from ddo_modulus.lexicon import check_units


class _Store(NamedTuple):
    """A source of Earth2Studio, and the spacing of its grid in degrees."""

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
_BACKOFF = 2.0  # seconds before the second try, doubled before each further one
_LONGEST_REASON = 240  # characters


class FieldSource:
    """Fields of a local file or store, or of a zarr store at a URL.

    Longitudes are from 0 to 360, ascending; of a region across Greenwich they start below 0, since
    Earth2Studio interpolates only along an ascending axis.

    Args:
        path: As :func:`~ddo_modulus.data.source.open_dataset` takes it.
        member: Which member or trajectory, where the file has several.
    """

    def __init__(self, path: str | Path, member: int | None = None) -> None:
        self.path = str(path)
        dataset = open_dataset(path)
        if is_cartesian(dataset):
            raise InputError(f"{path}: fields in a box, not on the Earth; give latitudes")
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
        """The ids that can be asked for."""
        return tuple(map(str, self._dataset.data_vars))

    def __call__(self, time: Times, variable: str | list[str] | np.ndarray) -> xr.DataArray:
        """Get fields.

        Args:
            time: Times, UTC, all of which the file has to have.
            variable: Variable ids.

        Returns:
            Array on `(time, variable, lat, lon)`, latitude descending.

        Raises:
            InputError: If a time or variable is not there, or values cannot be read or cannot be
                right in their units.
        """
        host = needed("earth2studio.data.utils", "earth2")
        times, names = host.prep_data_inputs(time, variable)
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
        try:
            fields = chosen.to_dataarray("variable").transpose("time", "variable", "lat", "lon")
            fields = fields.load()
        except MemoryError:
            raise
        except Exception as error:  # each format has its own; all mean unreadable data
            raise InputError(
                f"{self.path}: cannot be read, damaged or cut short ({type(error).__name__}: "
                f"{error}); copy or download it again"
            ) from error
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
        store: Of `STORES`, or a path to a file or store.
        fallback: Stores to ask if the first cannot serve a request; on the same grid.
        cache: Keep what was downloaded, as Earth2Studio does.
        verbose: Show Earth2Studio's progress bars.
        retries: How often to try a store again after an error of the connection.
        async_timeout: Seconds after which a call is given up.
        member: Of a local file; see :class:`FieldSource`.

    Raises:
        InputError: If a store is not known, a file cannot be used, or grids differ.
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
                    f"{names[0]} is a file, whose grid need not be that of "
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
                told = ", ".join(f"{name} ({degrees:g} degrees)" for name, degrees in grids.items())
                raise InputError(f"ERA5: the grids of {told} differ; choose stores on the same")
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
            the store it is from.

        Raises:
            InputError: If no store can serve the request; tells why, for each.
        """
        host = needed("earth2studio.data.utils", "earth2")
        return host._sync_async(self.fetch, time, variable, timeout=self.async_timeout)

    async def fetch(self, time: Times, variable: str | list[str] | np.ndarray) -> xr.DataArray:
        """Get fields without blocking; see :meth:`__call__`."""
        if self._local is not None:
            fields = await self._local.fetch(time, variable)
            return fields.assign_attrs(store=self.stores[0])
        host = needed("earth2studio.data.utils", "earth2")
        times, names = host.prep_data_inputs(time, variable)
        reasons = []
        for store in self.stores:
            try:
                fields = await host.async_retry(
                    self._ask, store, times, names, retries=self._retries, backoff=_BACKOFF
                )
                return fields.assign_attrs(store=store)
            except MemoryError:
                raise
            except KeyError as error:
                reasons.append(f"{store} has no variable {error}")
            except Exception as error:  # each store has its own; all mean that it cannot serve
                reasons.append(f"{store}: {_short(error)}")
        raise InputError(
            f"ERA5: no store has {', '.join(names)} at {_span(times)}. {'. '.join(reasons)}"
        )

    async def _ask(self, store: str, times: list[datetime], names: list[str]) -> xr.DataArray:
        """Ask one store, in the way that it can be asked."""
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
    """One line of an error; some of the transport's run to pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."


def _span(times: Sequence[datetime]) -> str:
    first, last = pd.Timestamp(min(times)), pd.Timestamp(max(times))
    return str(first) if first == last else f"{first} to {last}"
