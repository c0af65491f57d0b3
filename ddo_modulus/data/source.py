# SPDX-License-Identifier: Apache-2.0
"""Fields from GRIB, netCDF, zarr or training stores, in one canonical form.

The canonical form is an xarray dataset on `(time, lat, lon)`, with `trajectory` or `ensemble` as
the first dimension if the data have one. Variables are named by `lexicon.variable_id`, one for each
level (`t850`). Time ascends and is in UTC, latitude descends, longitude ascends without a jump.
Values are read when they are used. `lat` and `lon` of units `1`, as a simulator writes them, are
Cartesian coordinates in a box; both ascend.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import xarray as xr

import ddo_modulus.data.grib_libraries  # noqa: F401 - must precede ecCodes
from ddo_modulus.errors import InputError
from ddo_modulus.lexicon import check_units, variable_id

_RENAMED = {
    "latitude": "lat",
    "longitude": "lon",
    "isobaricInhPa": "level",
    "pressure_level": "level",
    "plev": "level",
    "number": "ensemble",
    "member": "ensemble",
    "realization": "ensemble",
}
# The attribute `layout` of a training store (see `training_store`), and its array of fields.
LAYOUT = "ddo training store 1"
FIELDS = "fields"

_HORIZONTAL = ("lat", "lon")
_DIMS = ("trajectory", "ensemble", "time", *_HORIZONTAL)
_KEPT_ATTRIBUTES = ("units", "long_name", "standard_name", "cell_methods")

_REGRID = "interpolate to a regular latitude-longitude grid, e.g. with cdo remapbil"

_SLAB_BYTES = 2**28  # size of the pieces in which values are read

Data = TypeVar("Data", xr.Dataset, xr.DataArray)


def open_dataset(path: str | Path, variables: Sequence[str] | None = None) -> xr.Dataset:
    """Open a file or store in canonical form, without reading the values.

    Args:
        path: A GRIB or netCDF file, a zarr folder (format 2 or 3), or the URL of a zarr store.
        variables: Variable ids to keep, in this order; None keeps all fields that vary in time.

    Returns:
        Dataset in canonical form (see the module), with values as stored.

    Raises:
        InputError: If `path` is missing, damaged or of another format, if a variable is missing,
            if the grid is not evenly spaced, or if times are repeated or are not dates.
    """
    parts = [_canonical_coordinates(part, str(path)) for part in _open(path)]
    fields: dict[str, xr.DataArray] = {}
    for name, field in (item for part in parts for item in _flattened(part)):
        if name in fields:
            raise InputError(
                f"{path}: {name} is in it twice, at different steps or heights; select one "
                "first, e.g. with grib_copy or xarray"
            )
        fields[name] = field
    required = {"time", *_HORIZONTAL}
    usable = {n: f for n, f in fields.items() if required <= set(f.dims) <= set(_DIMS)}
    wanted = list(usable) if variables is None else list(variables)
    missing = [name for name in wanted if name not in usable]
    if missing or not wanted:
        others = ", ".join(f"{n} {f.dims}" for n, f in fields.items() if n not in usable)
        raise InputError(
            f"{path}: no field {', '.join(missing) or 'on (time, lat, lon)'}; available: "
            f"{', '.join(sorted(usable)) or 'none'}"
            + (f"; not usable because of their dimensions: {others}" if others else "")
        )
    dims = [d for d in _DIMS if any(d in usable[name].dims for name in wanted)]
    try:
        aligned = xr.align(*(usable[n].transpose(*dims) for n in wanted), join="exact", copy=False)
    except ValueError as error:
        raise InputError(
            f"{path}: the fields {', '.join(wanted)} do not share times, grid and dimensions; "
            "select variables that do"
        ) from error
    attributes = {
        k: v for k, v in parts[0].attrs.items() if not str(k).startswith("GRIB_") and v != LAYOUT
    }
    return xr.Dataset(dict(zip(wanted, aligned, strict=True)), attrs=attributes)


def is_cartesian(dataset: xr.Dataset) -> bool:
    """Whether `lat` and `lon` are Cartesian coordinates in a box (units `1`), not degrees."""
    return all(dataset[name].attrs.get("units") == "1" for name in _HORIZONTAL)


def check_values(
    dataset: xr.Dataset, where: str, progress: Callable[[int, int], None] | None = None
) -> None:
    """Read all values once; refuse missing values and implausible units.

    Args:
        dataset: Dataset in canonical form.
        where: Where the values come from, for the message; usually the path.
        progress: Called with the number of fields read and their total.

    Raises:
        InputError: If a value is NaN, infinite, implausible in its units, or cannot be read.
    """
    times = dataset.sizes["time"]
    for number, (name, field) in enumerate(dataset.data_vars.items()):
        done = number * times
        low, high, bad, first = np.inf, -np.inf, 0, ""
        for slab in slabs(field, where):
            finite = np.isfinite(slab.values)
            count = finite.size - int(finite.sum())
            if count and not bad:
                index = np.unravel_index(int(np.argmin(finite)), finite.shape)
                at = slab[index].coords
                first = ", ".join(f"{d}={at[d].values}" for d in slab.dims)
            bad += count
            low = min(low, slab.values.min(where=finite, initial=np.inf))
            high = max(high, slab.values.max(where=finite, initial=-np.inf))
            done += slab.sizes["time"]
            if progress is not None:
                progress(done, len(dataset.data_vars) * times)
        if bad:
            raise InputError(
                f"{where}: {name} has {bad} missing or infinite values of {field.size}, the first "
                f"at {first}. Fill them, or select times and a region without them. A zarr store "
                "with chunks lost in copying reads like this as well: copy it again."
            )
        check_units(str(name), low, high, where)


def slabs(data: Data, where: str) -> Iterator[Data]:
    """Read a field or dataset in pieces along time.

    Args:
        data: Field or dataset with a dimension `time`.
        where: Where the values come from, for the message.

    Yields:
        Consecutive pieces of about 256 MiB, loaded.

    Raises:
        InputError: If the values cannot be read.
    """
    times = data.sizes["time"]
    length = max(1, _SLAB_BYTES * times // max(data.nbytes, 1))
    for start in range(0, times, length):
        with reading(where):
            slab = data.isel(time=slice(start, start + length)).load()
        yield slab


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn the errors of format libraries into one `InputError`.

    Args:
        path: What is read, for the message.

    Raises:
        InputError: If the block raises anything but `MemoryError`.
    """
    try:
        yield
    except MemoryError:
        raise
    except ImportError as error:
        raise InputError(f"{path}: reading it needs a package ({error}); install it") from error
    except Exception as error:  # each library has its own; all mean unreadable data
        raise InputError(
            f"{path}: cannot be read, damaged or cut short ({type(error).__name__}: {error}); "
            "copy or download it again"
        ) from error


def _open(path: str | Path) -> list[xr.Dataset]:
    """Open with the library for the format, which the first bytes identify, not the file name."""
    if "://" in str(path):
        with reading(path):
            return [_unstacked(xr.open_zarr(str(path), chunks=None, decode_timedelta=False))]
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    if path.is_dir():
        return [_open_zarr(path)]
    with path.open("rb") as file:
        magic = file.read(4)
    with reading(path):
        if magic == b"GRIB":
            return _open_grib(path)
        if magic == b"\x89HDF" or magic[:3] == b"CDF":
            return [xr.open_dataset(path, engine="netcdf4", decode_timedelta=False)]
    raise InputError(f"{path}: not a GRIB or netCDF file, nor a zarr folder; convert it to one")


def _open_zarr(path: Path) -> xr.Dataset:
    if not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
        raise InputError(
            f"{path}: a folder, but not a zarr store (no zarr.json or .zgroup in it); give the "
            "store's own folder, and copy it again if it should be one"
        )
    with reading(path):
        dataset = xr.open_zarr(path, chunks=None, consolidated=False, decode_timedelta=False)
        return _unstacked(dataset)


def _unstacked(dataset: xr.Dataset) -> xr.Dataset:
    """Split the array of a training store into variables; return any other dataset unchanged."""
    if dataset.attrs.get("layout") != LAYOUT:
        return dataset
    fields = dataset[FIELDS]
    variables = {
        name: fields.isel(channel=i, drop=True)
        for i, name in enumerate(dataset["channel"].values.tolist())
    }
    for name, field in variables.items():
        field.attrs = dict(fields.attrs["variables"][name])
    return xr.Dataset(variables, attrs=dataset.attrs)


def _open_grib(path: Path) -> list[xr.Dataset]:
    """Open a GRIB file as the fewest datasets that hold all of its messages."""
    # cfgrib skips a truncated message without an error, so check the end of the file.
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        if not file.read().rstrip(b"\0").endswith(b"7777"):
            raise EOFError("the last message has no end")
    import cfgrib

    with warnings.catch_warnings(), xr.set_options(use_new_combine_kwarg_defaults=True):
        warnings.simplefilter("ignore")  # cfgrib's own calls to xarray warn
        # No index file: cfgrib would write it beside the user's data, and unpickle one it finds.
        return list(cfgrib.open_datasets(str(path), backend_kwargs={"indexpath": ""}))


def _canonical_coordinates(dataset: xr.Dataset, where: str) -> xr.Dataset:
    """Rename, sort and check the coordinates."""
    dataset = _by_valid_time(dataset, where)
    dataset = dataset.rename({k: v for k, v in _RENAMED.items() if k in dataset.variables})
    for name in ("time", *_HORIZONTAL):
        if name not in dataset.variables:
            raise InputError(f"{where}: no coordinate {name!r}; expected fields on time, lat, lon")
    if not dataset["time"].dims:
        dataset = dataset.expand_dims("time")
    for name in _HORIZONTAL:
        if dataset[name].dims != (name,):
            raise InputError(
                f"{where}: {name} lies on {dataset[name].dims}, not on its own axis; {_REGRID}"
            )
        dataset = dataset.assign_coords({name: dataset[name].astype(np.float64)})
    dataset = _time_ascending(dataset, where)
    if is_cartesian(dataset):
        for name in _HORIZONTAL:
            dataset = _reordered(dataset, name, np.argsort(dataset[name].values))
    else:
        dataset = _reordered(dataset, "lat", np.argsort(-dataset["lat"].values))
        dataset = _longitude_unbroken(dataset)
    for name in _HORIZONTAL:
        _check_uniform(dataset[name].values, name, where)
    return dataset


def _by_valid_time(dataset: xr.Dataset, where: str) -> xr.Dataset:
    """Make the valid time the coordinate `time`, if the file also has the time of the run."""
    if "valid_time" not in dataset.variables:
        return dataset
    valid = dataset["valid_time"]
    if valid.ndim > 1:
        raise InputError(
            f"{where}: runs and forecast steps both vary, {valid.dims}; select one run or one step"
        )
    dataset = dataset.drop_vars(("time", "step", "valid_time"), errors="ignore")
    if valid.ndim == 0:
        return dataset.assign_coords(time=valid.values)
    (axis,) = valid.dims
    if axis != "time":
        dataset = dataset.rename({axis: "time"})
    return dataset.assign_coords(time=valid.values)


def _time_ascending(dataset: xr.Dataset, where: str) -> xr.Dataset:
    time = dataset["time"].values
    if not np.issubdtype(time.dtype, np.datetime64) or np.isnat(time).any():
        raise InputError(
            f"{where}: times are not all dates of the standard calendar (first: {time[0]}); "
            "write them as CF time, e.g. 'hours since 1970-01-01'"
        )
    time = time.astype("datetime64[ns]")
    order = np.argsort(time, kind="stable")
    repeated = time[order][1:][np.diff(time[order]) == np.timedelta64(0)]
    if repeated.size:
        raise InputError(
            f"{where}: {repeated.size} times are repeated, the first {repeated[0]}; "
            "keep one of each, e.g. with xarray's drop_duplicates('time')"
        )
    return _reordered(dataset.assign_coords(time=time), "time", order)


def _longitude_unbroken(dataset: xr.Dataset) -> xr.Dataset:
    """Sort longitudes eastward from the region's western edge, or from 0 if they span the globe.

    A region across Greenwich starts at a negative longitude: -10 to 2, not 350 to 2.
    """
    lon, order = np.unique(np.mod(dataset["lon"].values, 360.0), return_index=True)
    gaps = np.diff(lon, append=lon[0] + 360.0)  # the last one closes the circle
    edge = int(np.argmax(gaps)) + 1
    is_global = np.ptp(gaps) < 1e-3 * gaps.max()
    if edge < len(lon) and not is_global:
        lon = np.concatenate((lon[edge:] - 360.0, lon[:edge]))
        order = np.roll(order, -edge)
    attributes = dataset["lon"].attrs
    return _reordered(dataset, "lon", order).assign_coords(lon=("lon", lon, attributes))


def _reordered(dataset: xr.Dataset, dim: str, order: np.ndarray) -> xr.Dataset:
    """Reorder along `dim`, by a slice where possible, which every format reads fast."""
    n = dataset.sizes[dim]
    if np.array_equal(order, np.arange(n)):
        return dataset
    if np.array_equal(order, np.arange(n)[::-1]):
        return dataset.isel({dim: slice(None, None, -1)})
    return dataset.isel({dim: order})


def _check_uniform(values: np.ndarray, name: str, where: str) -> None:
    """Refuse an axis of fewer than two points or of uneven spacing."""
    steps = np.abs(np.diff(values))
    if len(steps) == 0:
        raise InputError(f"{where}: {name} has one point only; expected a grid")
    # The spacing of a Gaussian grid varies by about 1 %, that of float32 coordinates by 0.05 %.
    if not np.ptp(steps) < 2e-3 * steps.max():
        raise InputError(
            f"{where}: {name} is not evenly spaced ({steps.min():.6g} to {steps.max():.6g} "
            f"degrees); {_REGRID}"
        )


def _flattened(dataset: xr.Dataset) -> Iterator[tuple[str, xr.DataArray]]:
    """Yield each floating-point field with its id, one for each level, without length-1 axes."""
    for name, field in dataset.data_vars.items():
        if field.dtype.kind != "f":
            continue
        field = field.squeeze([d for d, n in field.sizes.items() if n == 1 and d not in _DIMS])
        attributes = {k: field.attrs[k] for k in _KEPT_ATTRIBUTES if k in field.attrs}
        plain = field.reset_coords(drop=True)
        plain.attrs = attributes
        if "level" not in field.coords:
            yield variable_id(str(name)), plain
            continue
        in_pascal = field["level"].attrs.get("units") == "Pa"
        levels = np.atleast_1d(field["level"].values) / (100.0 if in_pascal else 1.0)
        for i, level in enumerate(levels.tolist()):
            at_level = plain.isel(level=i, drop=True) if "level" in plain.dims else plain
            yield variable_id(str(name), level), at_level
