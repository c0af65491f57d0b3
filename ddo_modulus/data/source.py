# SPDX-License-Identifier: Apache-2.0
"""Fields from GRIB, netCDF, zarr or training stores, in one canonical form.

The canonical form is an xarray dataset on `(time, lat, lon)`, with `trajectory` or `ensemble` as
the first dimension if the data have one. Variables are named by `lexicon.variable_id`, one for each
level (`t850`). Time ascends and is in UTC, latitude descends, longitude ascends without a jump.
Values are in the units of the lexicon; they are read when they are used. `lat` and `lon` of units
`1`, as a simulator writes them, are Cartesian coordinates in a box; both ascend.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import xarray as xr

from ddo_modulus.data.coordinates import HORIZONTAL, canonical_coordinates, is_cartesian
from ddo_modulus.data.formats import LAYOUT, open_parts, reading
from ddo_modulus.data.variables import DIMS, Variables
from ddo_modulus.errors import InputError
from ddo_modulus.lexicon import check_units
from ddo_modulus.units import Conversion, conversion

__all__ = ["check_values", "is_cartesian", "open_dataset", "reading_notes", "slabs"]

_SLAB_BYTES = 2**28  # size of the pieces in which values are read
_NOTES = "ddo_modulus_notes"  # key of a dataset's encoding, which is not written

# Values that stand for "missing" where no attribute says so: of netCDF, GRIB, CMIP, packed
# integers, and the habit of writing nines. The largest of all fields in SI units is far below.
_HUGE = 9.9e14
_FILLS = np.array(
    [
        *(-99.0, -99.9, -99.99, -999.0, -999.9, -999.99, -9999.0, -9999.9, -99999.0, -999999.0),
        *(9999.0, 99999.0, 999999.0, -32767.0, -32768.0, 32767.0, -2147483647.0, -1e10, 1e10),
    ]
)
_FAR = 2.0  # ranges of the other values; a fill is farther from them

Data = TypeVar("Data", xr.Dataset, xr.DataArray)


def open_dataset(
    path: str | Path, variables: Sequence[str] | None = None, level_units: str | None = None
) -> xr.Dataset:
    """Open a file or store in canonical form, without reading the values.

    Args:
        path: A GRIB or netCDF file, a zarr folder (format 2 or 3), or the URL of a zarr store.
        variables: Variable ids to keep, in this order; None keeps all fields that vary in time.
        level_units: Units of an axis `level` that declares none, e.g. `hPa`; without them it is
            refused.

    Returns:
        Dataset in canonical form (see the module). A note says which units were converted
        (`reading_notes`).

    Raises:
        InputError: If `path` is missing, damaged or of another format, if a variable is missing, in
            units of another quantity or on levels that are no pressures, if the grid is not evenly
            spaced, or if times are repeated or are not dates.
    """
    opened = open_parts(path)
    try:
        return _canonical(opened, path, variables, level_units)
    except BaseException:
        for part in opened:  # the error would keep the file open
            part.close()
        raise


def _canonical(
    opened: list[xr.Dataset],
    path: str | Path,
    variables: Sequence[str] | None,
    level_units: str | None,
) -> xr.Dataset:
    """The fields of some datasets in canonical form."""
    parts = [canonical_coordinates(part, str(path)) for part in opened]
    found = Variables(level_units)
    for part in parts:
        found.add(part, str(path))
    required = {"time", *HORIZONTAL}
    usable = {n: f for n, f in found.fields.items() if required <= set(f.dims) <= set(DIMS)}
    if variables is None and found.refused:
        raise InputError(f"{path}: {next(iter(found.refused.values()))}")
    wanted = list(usable) if variables is None else list(variables)
    _check_wanted(wanted, usable, found, str(path))
    dims = [d for d in DIMS if any(d in usable[name].dims for name in wanted)]
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
    dataset = xr.Dataset(dict(zip(wanted, aligned, strict=True)), attrs=attributes)
    notes = [f"{path}: {found.notes[name]}" for name in wanted if name in found.notes]
    left = [name for name in found.fields if name not in usable]
    if variables is None and (left or found.left_out):
        notes.append(f"{path}: left out: {', '.join([*left, *found.left_out])}")
    dataset.encoding[_NOTES] = tuple(notes)
    return dataset


def reading_notes(dataset: xr.Dataset) -> tuple[str, ...]:
    """What `open_dataset` did to fields, such as converting their units; a line each."""
    return tuple(dataset.encoding.get(_NOTES, ()))


def _check_wanted(
    wanted: list[str], usable: dict[str, xr.DataArray], found: Variables, where: str
) -> None:
    """Refuse variables that are not there, with the reason why a field of the file is no help."""
    missing = [name for name in wanted if name not in usable]
    if not missing and wanted:
        return
    others = ", ".join(f"{n} {f.dims}" for n, f in found.fields.items() if n not in usable)
    raise InputError(
        f"{where}: no field {', '.join(missing) or 'on (time, lat, lon)'}; available: "
        f"{', '.join(sorted(usable)) or 'none'}"
        + (f"; not usable because of their dimensions: {others}" if others else "")
        + "".join(f"; {reason}" for reason in {**found.refused, **found.left_out}.values())
    )


def check_values(
    dataset: xr.Dataset, where: str, progress: Callable[[int, int], None] | None = None
) -> None:
    """Read all values once; refuse missing values, undeclared fill values and implausible units.

    Args:
        dataset: Dataset in canonical form.
        where: Where the values come from, for the message; usually the path.
        progress: Called with the number of fields read and their total.

    Raises:
        InputError: If a value is NaN, infinite, a fill value that no attribute declares,
            implausible in its units, or cannot be read.
    """
    times = dataset.sizes["time"]
    for number, (name, values) in enumerate(dataset.data_vars.items()):
        done = number * times
        change = _read_with(values)
        census = _Census(_FILLS * change.factor + change.offset)
        for slab in slabs(values, where):
            census.add(slab)
            done += slab.sizes["time"]
            if progress is not None:
                progress(done, len(dataset.data_vars) * times)
        if census.missing:
            raise InputError(
                f"{where}: {name} has {census.missing} missing or infinite values of "
                f"{values.size}, the first at {census.first}. Fill them, or select times and a "
                "region without them. A zarr store with chunks lost in copying reads like this as "
                "well: copy it again."
            )
        _refuse_fills(census, str(name), values.size, where, change)
        declared = values.attrs.get("declared_units")
        at = where if declared is None else f"{where} (units declared as {declared!r}, converted)"
        check_units(str(name), census.low, census.high, at)


def _read_with(values: xr.DataArray) -> Conversion:
    """The conversion that a field went through when it was read."""
    declared = values.attrs.get("declared_units")
    if declared is None:
        return Conversion()
    return conversion(str(declared), str(values.attrs["units"]))


@dataclass
class _Census:
    """Extremes of a field's values, and counts of those that are missing or may stand for it.

    Attributes:
        candidates: Values that may stand for missing ones, in the field's units.
        low: Smallest of the other finite values.
        high: Largest of them.
        missing: Number of values that are not finite.
        first: Place of the first of these.
        suspects: Number of values that equal a candidate, or are huge, by value.
    """

    candidates: np.ndarray
    low: float = np.inf
    high: float = -np.inf
    missing: int = 0
    first: str = ""
    suspects: dict[float, int] = field(default_factory=dict)

    def add(self, slab: xr.DataArray) -> None:
        """Count the values of a loaded piece of the field."""
        values = slab.values
        usual = np.isfinite(values)
        count = usual.size - int(usual.sum())
        if count and not self.missing:
            index = np.unravel_index(int(np.argmin(usual)), usual.shape)
            at = slab[index].coords
            self.first = ", ".join(f"{d}={at[d].values}" for d in slab.dims)
        self.missing += count
        low, high = _extremes(values, usual)
        if self._suspicious(low) or self._suspicious(high):
            usual &= ~self._set_aside(values, usual)
            low, high = _extremes(values, usual)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _suspicious(self, value: float) -> bool:
        return abs(value) >= _HUGE or bool(np.isclose(value, self.candidates, 1e-6, 0.0).any())

    def _set_aside(self, values: np.ndarray, usual: np.ndarray) -> np.ndarray:
        """Where values are suspects, which are counted."""
        suspects = usual & (np.abs(values) >= _HUGE)
        for candidate in self.candidates:
            suspects |= usual & np.isclose(values, candidate, 1e-6, 0.0)
        found, counts = np.unique(values[suspects], return_counts=True)
        for value, number in zip(found.tolist(), counts.tolist(), strict=True):
            self.suspects[value] = self.suspects.get(value, 0) + number
        return suspects


def _extremes(values: np.ndarray, where: np.ndarray) -> tuple[float, float]:
    low = values.min(where=where, initial=np.inf)
    return float(low), float(values.max(where=where, initial=-np.inf))


def _refuse_fills(census: _Census, name: str, size: int, where: str, change: Conversion) -> None:
    """Refuse suspects that are far from all other values; count the others as values."""
    span = max(census.high - census.low, 0.0)
    for value, count in census.suspects.items():
        distance = max(census.low - value, value - census.high)
        if abs(value) < _HUGE and not distance > _FAR * span:
            continue
        stored = (value - change.offset) / change.factor
        raise InputError(
            f"{where}: {name} holds {stored:.6g} in {count} of {size} places, which stands for "
            "missing values but is not declared: set the attribute _FillValue to it, e.g. with cdo "
            f"setmissval, and fill the gaps, or select times and a region without them"
        )
    for value in census.suspects:
        census.low, census.high = min(census.low, value), max(census.high, value)


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
