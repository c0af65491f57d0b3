# SPDX-License-Identifier: Apache-2.0
"""Coordinates of fields in canonical form: `time`, `lat` and `lon`, sorted and checked."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid, evenly_spaced

HORIZONTAL = ("lat", "lon")

_RENAMED = {
    "latitude": "lat",
    "longitude": "lon",
    "number": "ensemble",
    "member": "ensemble",
    "realization": "ensemble",
}
_REGRID = "interpolate to a regular latitude-longitude grid, e.g. with cdo remapbil"
# Times that miss a whole minute by less are one: round-off of decimal hours or days.
_TIME_ROUNDOFF = np.timedelta64(20, "ms")
_COINCIDENT = 1e-3  # of the distance of columns: nearer ones, a turn apart, are the same


def canonical_coordinates(dataset: xr.Dataset, where: str) -> xr.Dataset:
    """Rename, sort and check the coordinates.

    Args:
        dataset: As a file has it.
        where: Where it comes from, for messages.

    Raises:
        InputError: If a coordinate is missing or is not what a regular grid or a time needs.
    """
    dataset = _by_valid_time(dataset, where)
    dataset = dataset.rename({k: v for k, v in _RENAMED.items() if k in dataset.variables})
    for name in ("time", *HORIZONTAL):
        if name not in dataset.variables:
            raise InputError(f"{where}: no coordinate {name!r}; expected fields on time, lat, lon")
    if not dataset["time"].dims:
        dataset = dataset.expand_dims("time")
    for name in HORIZONTAL:
        dataset = dataset.assign_coords({name: _axis(dataset[name], where)})
    dataset = _time_ascending(dataset, where)
    if is_cartesian(dataset):
        for name in HORIZONTAL:
            dataset = _reordered(dataset, name, np.argsort(dataset[name].values))
            _check_uniform(dataset[name].values, name, where)
        return dataset
    dataset = _reordered(dataset, "lat", np.argsort(-dataset["lat"].values))
    dataset = _longitude_unbroken(dataset, where)
    _check_grid(dataset, where)
    return dataset


def is_cartesian(dataset: xr.Dataset) -> bool:
    """Whether `lat` and `lon` are Cartesian coordinates in a box (units `1`), not degrees."""
    return all(dataset[name].attrs.get("units") == "1" for name in HORIZONTAL)


def _axis(axis: xr.DataArray, where: str) -> xr.DataArray:
    """An axis of the grid in float64, the only one along its dimension and in degrees."""
    name = str(axis.name)
    if axis.dims != (name,):
        raise InputError(f"{where}: {name} lies on {axis.dims}, not on its own axis; {_REGRID}")
    units = str(axis.attrs.get("units", "")).strip().lower()
    if units not in ("", "1") and not units.startswith(("deg", "°")):
        raise InputError(
            f"{where}: {name} is in {units!r}, not in degrees; convert it, or {_REGRID}"
        )
    if axis.dtype.kind not in "iuf":
        raise InputError(f"{where}: {name} is {axis.dtype}, not numbers of degrees; convert it")
    values = axis.values.astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{where}: {name} has missing values; write all of its coordinates")
    return xr.DataArray(values, dims=name, attrs=axis.attrs)


def _by_valid_time(dataset: xr.Dataset, where: str) -> xr.Dataset:
    """Make the valid time the coordinate `time`, if the file also has the time of the run."""
    if "valid_time" not in dataset.variables:
        return dataset
    valid = dataset["valid_time"]
    if valid.ndim > 1:
        raise InputError(
            f"{where}: runs and forecast steps both vary, {valid.dims}; select one run or one "
            "step of each, e.g. with xarray's isel(step=0)"
        )
    dataset = dataset.drop_vars(("time", "step", "valid_time"), errors="ignore")
    if valid.ndim == 0:
        return dataset.assign_coords(time=valid.values)
    (axis,) = valid.dims
    if axis != "time":
        dataset = dataset.rename({axis: "time"})
    return dataset.assign_coords(time=valid.values)


def _time_ascending(dataset: xr.Dataset, where: str) -> xr.Dataset:
    time = _dates(dataset["time"].values, where)
    if not is_cartesian(dataset):
        time = _without_roundoff(time)
    order = np.argsort(time, kind="stable")
    repeated = time[order][1:][np.diff(time[order]) == np.timedelta64(0)]
    if repeated.size:
        raise InputError(
            f"{where}: {repeated.size} times are repeated, the first {repeated[0]}; "
            "keep one of each, e.g. with xarray's drop_duplicates('time')"
        )
    return _reordered(dataset.assign_coords(time=time), "time", order)


def _dates(time: np.ndarray, where: str) -> np.ndarray:
    """Times as datetime64[ns].

    A date of a calendar without leap days is a date of ours as well.

    Raises:
        InputError: If one is missing, or is no date from 1678 to 2261 of the standard calendar.
    """
    if time.size == 0:
        raise InputError(f"{where}: has no times; select some")
    calendar = getattr(time.flat[0], "calendar", None)
    if time.dtype == object and calendar in ("noleap", "365_day"):
        time = np.array([np.datetime64(t.isoformat(), "us") for t in time])
    elif calendar in ("standard", "gregorian", "proleptic_gregorian"):
        raise InputError(
            f"{where}: times reach {time.min()} and {time.max()}, but must lie in 1678 to 2261; "
            "shift them"
        )
    elif calendar is not None:
        raise InputError(
            f"{where}: times are of the calendar {calendar!r} (first: {time.flat[0]}), not the "
            "standard one; convert them with xarray's convert_calendar('standard')"
        )
    if not np.issubdtype(time.dtype, np.datetime64):
        raise InputError(
            f"{where}: times are not all dates of the standard calendar (first: {time.flat[0]}); "
            "write them as CF time, e.g. 'hours since 1970-01-01'"
        )
    missing = int(np.isnat(time).sum())
    if missing:
        raise InputError(
            f"{where}: {missing} of {time.size} times are missing; drop their fields, or write them"
        )
    years = time.astype("datetime64[Y]").astype(int) + 1970
    if years.min() < 1678 or years.max() > 2261:
        raise InputError(
            f"{where}: times reach {time.min()} and {time.max()}, but must lie in 1678 to 2261; "
            "shift them"
        )
    return time.astype("datetime64[ns]")


def _without_roundoff(time: np.ndarray) -> np.ndarray:
    """Times on whole minutes where all miss them by round-off only."""
    whole = (time + np.timedelta64(30, "s")).astype("datetime64[m]").astype(time.dtype)
    return whole if (np.abs(time - whole) < _TIME_ROUNDOFF).all() else time


def _longitude_unbroken(dataset: xr.Dataset, where: str) -> xr.Dataset:
    """Sort longitudes eastward from the region's western edge, or from 0 if they span the globe.

    A region across Greenwich starts at a negative longitude: -10 to 2, not 350 to 2. A column that
    repeats another a turn away, 360 beside 0, is left out.
    """
    values = dataset["lon"].values
    repeated = len(values) - len(np.unique(values))
    if repeated:
        raise InputError(
            f"{where}: {repeated} longitudes are repeated; keep one of each, e.g. with xarray's "
            "drop_duplicates('lon')"
        )
    lon, order = _once_round(values)
    gaps = np.diff(lon, append=lon[0] + 360.0)  # the last one closes the circle
    edge = int(np.argmax(gaps)) + 1
    is_global = np.ptp(gaps) < 1e-3 * gaps.max()
    if edge < len(lon) and not is_global:
        lon = np.concatenate((lon[edge:] - 360.0, lon[:edge]))
        order = np.roll(order, -edge)
    attributes = dataset["lon"].attrs
    return _reordered(dataset, "lon", order).assign_coords(lon=("lon", lon, attributes))


def _once_round(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes from about 0 to 360, ascending, each once, and their places.

    Round-off puts a column on either side of 0; it is taken to the near one.
    """
    lon = np.mod(values, 360.0)
    between = np.diff(np.sort(lon))
    near = _COINCIDENT * np.median(between) if between.size else 0.0
    lon = np.where(lon > 360.0 - near, lon - 360.0, lon)
    order = np.argsort(lon, kind="stable")
    again = np.diff(lon[order], prepend=-np.inf) <= near
    a_turn_apart = np.abs(np.diff(values[order], prepend=0.0)) > 180.0
    kept = order[~(again & a_turn_apart)]
    return lon[kept], kept


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
    if not steps.min() > 0:
        raise InputError(f"{where}: {name} has repeated points; keep one of each")
    try:
        # The spacing of a Gaussian grid varies by about 1 %, that of float32 by 0.05 %.
        evenly_spaced(values, name)
    except InputError as error:
        raise InputError(
            f"{where}: {name} is not evenly spaced ({steps.min():.6g} to {steps.max():.6g} "
            f"degrees); {_REGRID}"
        ) from error


def _check_grid(dataset: xr.Dataset, where: str) -> None:
    """Refuse latitudes and longitudes that are no regular grid on the globe."""
    for name in HORIZONTAL:
        _check_uniform(dataset[name].values, name, where)
    try:
        LatLonGrid(dataset["lat"].values, dataset["lon"].values)
    except InputError as error:
        raise InputError(f"{where}: {error}; correct the coordinates, or {_REGRID}") from error
