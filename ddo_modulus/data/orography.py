# SPDX-License-Identifier: Apache-2.0
"""Orography: the height of a model's surface, on a grid."""

from pathlib import Path

import numpy as np

from ddo_modulus.constants import GRAVITY
from ddo_modulus.data.source import is_cartesian, open_dataset
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import Grid, LatLonGrid, check_orography


def read_orography(path: str | Path, grid: Grid) -> np.ndarray:
    """Read the surface geopotential (`z`, m2/s2) as heights on a grid.

    Args:
        path: A file or store; its first time is read.
        grid: Grid to whose points the data are interpolated, bilinearly.

    Returns:
        ``(H, W)`` metres above sea level.

    Raises:
        InputError: If the file cannot be read, does not cover the grid or is not in m2/s2, or if
            the file or the grid is not on latitudes and longitudes.
    """
    dataset = open_dataset(path, ["z"])
    if is_cartesian(dataset) or not isinstance(grid, LatLonGrid):
        raise InputError(
            f"{path}: an orography needs latitudes and longitudes, not a box; leave it out"
        )
    first = dataset["z"].isel({d: 0 for d in dataset["z"].dims if d not in ("lat", "lon")})
    index, weight = LatLonGrid(dataset["lat"].values, dataset["lon"].values).bilinear(
        *np.meshgrid(grid.lat, grid.lon, indexing="ij")
    )
    heights = (first.values.astype(float).reshape(-1)[index] * weight).sum(-1) / GRAVITY
    return check_orography(heights, grid, str(path))
