# SPDX-License-Identifier: Apache-2.0
"""Where the fields of a store are: their grid, its extent, and parts of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import xarray as xr

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.data.source import is_cartesian
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import BoxGrid, Grid, LatLonGrid
from ddo_modulus.lexicon import are_cell_means

log = logging.getLogger(__name__)

#: Rows and columns of a grid.
Part = tuple[slice, slice]
WHOLE: Part = (slice(None), slice(None))


def region(dataset: xr.Dataset, edges: Sequence[float] | None) -> Part:
    """Rows and columns inside ``[south, north, west, east]`` (degrees, or units of a box).

    Raises:
        InputError: If it holds fewer than two rows or columns.
    """
    if edges is None:
        return WHOLE
    south, north, west, east = (float(v) for v in edges)
    lat, lon = dataset["lat"].values, dataset["lon"].values
    if not is_cartesian(dataset):  # full turns, to where the longitudes of the store are
        turns = 360.0 * np.ceil((lon[0] - 1e-6 - west) / 360.0)
        west, east = west + turns, east + turns
    rows = np.flatnonzero((lat >= south - 1e-6) & (lat <= north + 1e-6))
    columns = np.flatnonzero((lon >= west - 1e-6) & (lon <= east + 1e-6))
    if len(rows) < 2 or len(columns) < 2:
        raise InputError(
            f"data.region={list(edges)} holds no grid; the data reach from {lat.min():g} to "
            f"{lat.max():g} and from {lon.min():g} to {lon.max():g}"
        )
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def centre(shape: Sequence[int], crop: Sequence[int] | None) -> Part:
    """The part of size ``crop`` in the middle of a grid ``(H, W)``; all of it without a crop.

    Raises:
        InputError: If the crop does not fit into the grid.
    """
    if crop is None:
        return WHOLE
    first = [(size - n) // 2 for size, n in zip(shape, crop, strict=True)]
    if min(first) < 0:
        raise InputError(
            f"data.crop={list(crop)} does not fit into the grid of {shape[0]}x{shape[1]} points"
        )
    rows, columns = (slice(i, i + n) for i, n in zip(first, crop, strict=True))
    return rows, columns


def build_grid(dataset: xr.Dataset, domain: str) -> Grid:
    """Grid of a dataset: geographical, or the unit square."""
    lat, lon = dataset["lat"].values, dataset["lon"].values
    if domain == "torus" or dataset["lat"].attrs.get("units") == "1":
        return BoxGrid((len(lat), len(lon)), periodic=domain == "torus")
    return LatLonGrid(lat, lon)


def domain_lengths(grid: Grid) -> tuple[float, float]:
    """Extent along rows and columns: 1000 km for a region of the globe, a box's own units."""
    if isinstance(grid, BoxGrid):
        return grid.lengths
    degree = math.radians(1) * EARTH_RADIUS_KM / 1e3
    height = abs(grid.lat[1] - grid.lat[0]) * len(grid.lat)
    width = (grid.lon[1] - grid.lon[0]) * len(grid.lon) * np.cos(np.deg2rad(grid.lat.mean()))
    return float(height * degree), float(width * degree)


def cell_means(dataset: xr.Dataset, domain: str) -> bool:
    """Whether the variables of a dataset are means over its grid cells, by their attributes.

    False on the sphere, where means over cells are taken for values at points, with a warning.
    """
    fields = dataset.data_vars.values()
    means = [are_cell_means(str(field.attrs.get("cell_methods", ""))) for field in fields]
    if all(means) and domain != "sphere":
        return True
    if any(means):
        reason = "not all variables are" if not all(means) else "they mix functions on the sphere"
        log.warning("means over cells are taken for values at points: %s", reason)
    return False
