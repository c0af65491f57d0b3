# SPDX-License-Identifier: Apache-2.0
"""Where the fields of a dataset stand, and whether those of another stand there too."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ddo_modulus.data.source import is_cartesian
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import BoxGrid, Grid, LatLonGrid


def grid_of(dataset: xr.Dataset) -> Grid:
    """Grid of a dataset in canonical form; a box that starts at zero is a torus."""
    lat, lon = dataset["lat"].values, dataset["lon"].values
    if not is_cartesian(dataset):
        return LatLonGrid(lat, lon)
    lengths = [len(axis) * float(axis[1] - axis[0]) for axis in (lat, lon)]
    return BoxGrid((len(lat), len(lon)), lengths, periodic=abs(float(lat[0])) < 1e-9)


def nearest(have: np.ndarray, want: np.ndarray, period: float | None, label: str) -> np.ndarray:
    """Index of each wanted coordinate."""
    distance = np.abs(have - want[:, None])
    if period is not None:
        distance = np.minimum(distance % period, -distance % period)
    if distance.min(1).max() > 1e-3 * abs(want[1] - want[0]):
        raise InputError(
            f"{label} has {have.min():g} to {have.max():g} in steps of {abs(have[1] - have[0]):g}, "
            f"the analysis {want.min():g} to {want.max():g} in steps of "
            f"{abs(want[1] - want[0]):g}; interpolate the truth to the grid of the analysis"
        )
    return distance.argmin(1)


def same_domain(truth: xr.Dataset, samples: xr.Dataset, path: str) -> xr.Dataset:
    """The truth on the samples' domain: all of it, or its points at theirs.

    Args:
        truth: Dataset in canonical form, on the same domain (on any grid) or on a larger region
            at the samples' spacing.
        samples: Dataset in canonical form.
        path: Of the truth, for the message.

    Raises:
        InputError: If the two are of different domains.
    """
    if is_cartesian(truth) != is_cartesian(samples):
        raise InputError(f"{path} and the samples are not both on the globe, or both in a box")
    one, other = grid_of(truth), grid_of(samples)
    if isinstance(one, BoxGrid) and isinstance(other, BoxGrid):
        same = one.periodic == other.periodic and np.allclose(one.lengths, other.lengths, rtol=1e-3)
        if not same:
            raise InputError(
                f"{path} is a {_words(one)} and the samples are on a {_words(other)}; compare "
                "fields of one domain"
            )
        return truth
    assert isinstance(one, LatLonGrid) and isinstance(other, LatLonGrid)
    if one.is_global and other.is_global or _borders_agree(one, other):
        return truth
    chosen = {
        axis: nearest(truth[axis].values, samples[axis].values, period, f"{path}: {axis}")
        for axis, period in (("lat", None), ("lon", 360.0))
    }
    return truth.isel(chosen)


def _words(grid: BoxGrid) -> str:
    kind = "torus" if grid.periodic else "box without periodicity"
    return f"{kind} of {grid.lengths[0]:g} x {grid.lengths[1]:g}"


def _borders_agree(one: LatLonGrid, other: LatLonGrid) -> bool:
    """Whether the outer cell borders are the same, to a quarter of the wider spacing."""
    for first, second in ((one.lat, other.lat), (one.lon, other.lon)):
        steps = [abs(float(axis[1] - axis[0])) for axis in (first, second)]
        for end in (min, max):
            sign = -0.5 if end is min else 0.5
            borders = [end(a) + sign * d for a, d in zip((first, second), steps, strict=True)]
            gap = abs(borders[0] - borders[1])
            turned = min(gap % 360, -gap % 360) if first is one.lon else gap
            if turned > 0.25 * max(steps):
                return False
    return True
