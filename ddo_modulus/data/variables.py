# SPDX-License-Identifier: Apache-2.0
"""Variables of a file under the ids and in the units of the lexicon, one for each level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from ddo_modulus.data.coordinates import is_cartesian
from ddo_modulus.errors import InputError
from ddo_modulus.lexicon import is_on_levels, is_read_as_level, units_of, variable_id
from ddo_modulus.units import Conversion, conversion, is_declared

DIMS = ("trajectory", "ensemble", "time", "lat", "lon")

_KEPT_ATTRIBUTES = ("units", "long_name", "standard_name", "cell_methods")
# Names of axes that may be pressure. Only their attributes say whether they are.
_LEVELS = ("level", "isobaricInhPa", "isobaricInPa", "pressure_level", "plev", "pressure", "lev")
# Other vertical axes, and what they count.
_OTHER_LEVELS = {
    "hybrid": "model levels",
    "model_level": "model levels",
    "eta": "model levels",
    "sigma": "sigma levels",
    "generalVertical": "model levels",
    "heightAboveGround": "heights in m",
    "heightAboveSea": "heights in m",
    "height": "heights in m",
    "altitude": "heights in m",
    "theta": "potential temperatures",
    "isentropic": "potential temperatures",
    "potentialVorticity": "potential vorticities",
    "depth": "depths",
    "depthBelowLand": "depths",
    "depthBelowLandLayer": "depths",
    "isobaricLayer": "layers between pressures",
    "tropopause": "the tropopause",
    "maxWind": "the level of maximum wind",
}
_MODEL_WORDS = ("hybrid", "model", "sigma", "eta")
_TO_PRESSURE = (
    "interpolate to pressure levels. If they are pressures, set its attribute units to hPa, or "
    "level_units=hPa"
)


@dataclass
class Variables:
    """What a file's datasets hold.

    Attributes:
        level_units: Units of axes `level` that declare none.
        fields: Fields by id; not all of them need lie on time, lat and lon.
        refused: Why fields of these names in the file have no id, or their units no meaning.
        left_out: Why fields of these names in the file are no values of a variable.
        notes: What was done to fields, in a line each.
    """

    level_units: str | None = None
    fields: dict[str, xr.DataArray] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, dataset: xr.Dataset, where: str) -> None:
        """Add the numeric fields of a dataset with canonical coordinates.

        Raises:
            InputError: If an id is there twice.
        """
        physical = not is_cartesian(dataset)
        for name, stored in dataset.data_vars.items():
            if stored.dtype.kind not in "iuf" or "flag_values" in stored.attrs:
                self.left_out[str(name)] = f"{name} holds {_kind(stored)}, not measured values"
                continue
            try:
                for variable, level in _levels(str(name), stored, self.level_units):
                    self._add_one(variable, str(name), level, where, physical)
            except _Unusable as error:
                self.refused[str(name)] = str(error)

    def _add_one(
        self, variable: str, name: str, values: xr.DataArray, where: str, physical: bool
    ) -> None:
        if variable in self.fields:
            raise InputError(
                f"{where}: {variable} is in it twice, at different steps or heights; select one "
                "first, e.g. with grib_copy or xarray"
            )
        wanted = units_of(variable) if physical else None
        change, declared = Conversion(), values.attrs.get("units")
        if wanted is not None and is_declared(declared):
            try:
                change = conversion(str(declared), wanted)
            except InputError as error:
                raise _Unusable(f"{variable}: its {error}") from error
        converted = _converted(values, change)
        if not change.is_identity:
            converted.attrs |= {"units": wanted, "declared_units": str(declared)}
            self.notes[variable] = f"{variable} is converted from {declared} to {wanted}"
        elif is_read_as_level(name, variable):
            self.notes[variable] = (
                f"{variable} is read as at {variable.lstrip('uvws')} hPa; if it is at "
                f"{variable.lstrip('uvws')} m, call it {variable}m"
            )
        self.fields[variable] = converted


class _Unusable(Exception):  # noqa: N818 - becomes an InputError if the field is wanted
    """Why a field cannot be used."""


def _kind(stored: xr.DataArray) -> str:
    if "flag_values" in stored.attrs:
        return "categories (flag_values)"
    kinds = {"b": "true and false", "m": "durations", "M": "dates", "c": "complex numbers"}
    return kinds.get(stored.dtype.kind, "text")


def _levels(
    name: str, stored: xr.DataArray, level_units: str | None
) -> Iterator[tuple[str, xr.DataArray]]:
    """Yield a field with its id, one for each pressure level, without length-1 axes."""
    attributes = {k: stored.attrs[k] for k in _KEPT_ATTRIBUTES if k in stored.attrs}
    plain = stored.squeeze([d for d, n in stored.sizes.items() if n == 1 and d not in DIMS])
    plain = plain.reset_coords(drop=True)
    axis = next((n for n in _LEVELS if n in stored.coords or n in stored.dims), None)
    if axis is None:
        _refuse_other_levels(name, stored)
        plain.attrs = attributes
        yield variable_id(name, attributes=stored.attrs), plain
        return
    for number, level in enumerate(_pressures(name, stored, axis, level_units)):
        at_level = plain.isel({axis: number}, drop=True) if axis in plain.dims else plain
        at_level.attrs = dict(attributes)
        yield variable_id(name, level), at_level


def _pressures(name: str, stored: xr.DataArray, axis: str, level_units: str | None) -> list[float]:
    """Values of an axis in hPa, if its attributes say that they are pressures."""
    attributes = stored[axis].attrs if axis in stored.coords else {}
    values = np.atleast_1d(stored[axis].values).astype(float)
    words = " ".join(str(attributes.get(k, "")) for k in ("long_name", "standard_name")).strip()
    units = attributes.get("units")
    units = units if is_declared(units) else level_units
    if any(word in words.lower() for word in _MODEL_WORDS):
        raise _Unusable(
            f"{name} lies on {axis!r}, which are model levels ({words}), not pressures; "
            "interpolate to pressure levels"
        )
    if is_declared(units):
        try:
            change = conversion(str(units), "hPa")
        except InputError as error:
            raise _Unusable(
                f"{name} lies on {axis!r} in units {str(units)!r} ({words or 'no name'}), not on "
                f"pressures; {_TO_PRESSURE}"
            ) from error
        return _sound(name, axis, values * change.factor + change.offset)
    if axis == "isobaricInhPa" or stored.attrs.get("GRIB_typeOfLevel") == "isobaricInhPa":
        return _sound(name, axis, values)
    if axis == "isobaricInPa" or stored.attrs.get("GRIB_typeOfLevel") == "isobaricInPa":
        return _sound(name, axis, values / 100.0)
    raise _Unusable(
        f"{name} lies on {axis!r} ({words or 'nothing says what it counts'}), which has no units: "
        f"it may be pressures, model levels or heights; {_TO_PRESSURE}"
    )


def _sound(name: str, axis: str, pressures: np.ndarray) -> list[float]:
    """Pressures rounded to the digits that an id has."""
    rounded = [float(f"{p:.6g}") for p in pressures.tolist()]
    if not all(0.0 < p <= 1100.0 for p in rounded) or len(set(rounded)) < len(rounded):
        raise _Unusable(
            f"{name} lies on {axis!r} at {min(rounded):g} to {max(rounded):g} hPa by its units; "
            "pressures are above 0 and up to 1100 hPa, each once: correct the units or the values"
        )
    return rounded


def _refuse_other_levels(name: str, stored: xr.DataArray) -> None:
    """Refuse a variable of levels that are no pressures; its id would not say at which."""
    axes = [a for a in (*stored.dims, *stored.coords) if str(a) in _OTHER_LEVELS]
    several = [a for a in axes if stored.sizes.get(a, 1) > 1]
    if several or (axes and is_on_levels(name)):
        axis = str((several or axes)[0])
        raise _Unusable(
            f"{name} lies on {axis!r}, {_OTHER_LEVELS[axis]}, not on pressure levels; interpolate "
            "to pressure levels, or choose other variables"
        )


def _converted(values: xr.DataArray, change: Conversion) -> xr.DataArray:
    """Values in other units, and integers as floats, converted when they are read.

    CF's decoding of packed values does the same, so xarray's is used.
    """
    if change.is_identity and values.dtype.kind == "f":
        return values
    bare = values.variable.copy(deep=False)
    bare.encoding = {}
    bare.attrs = {"scale_factor": change.factor, "add_offset": change.offset}
    decoded = xr.decode_cf(xr.Dataset({"values": bare}), decode_times=False)
    result = decoded.assign_coords(values.coords)["values"]
    result.attrs = dict(values.attrs)
    return result
