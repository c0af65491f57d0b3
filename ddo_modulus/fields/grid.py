# SPDX-License-Identifier: Apache-2.0
"""Grids: the points of a field, and the points around a location.

Axes: ``H W`` grid, ``M`` locations. The coordinates of a location are always called ``lat`` and
``lon``, as in an observation table; on a box they are the coordinates along rows and columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from ddo_modulus.errors import InputError

Array = np.ndarray


class Grid(ABC):
    """A rectangular grid of points.

    Attributes:
        lat: ``(H,)`` row coordinates.
        lon: ``(W,)`` column coordinates.
    """

    lat: Array
    lon: Array

    @property
    def shape(self) -> tuple[int, int]:
        """``(H, W)``."""
        return len(self.lat), len(self.lon)

    @abstractmethod
    def contains(self, lat: ArrayLike, lon: ArrayLike) -> Array:
        """Whether values can be interpolated to locations; False for coordinates not finite."""

    @abstractmethod
    def area(self) -> Array:
        """``(H, W)`` relative area of the cells around the points, with mean one."""

    @abstractmethod
    def at(self, shape: Sequence[int]) -> Grid:
        """The grid of the same domain with another number of points."""

    @abstractmethod
    def _rows(self, lat: Array) -> tuple[Array, Array, Array]:
        """The two rows around each latitude, ``(2, ...)``.

        Returns:
            The rows, the weight of the second one, and whether each is across a pole.
        """

    @abstractmethod
    def _columns(self, lon: Array) -> tuple[Array, Array]:
        """The two columns around each longitude, ``(2, ...)``, and the weight of the second."""

    def bilinear(self, lat: ArrayLike, lon: ArrayLike) -> tuple[Array, Array]:
        """Grid points around locations and their bilinear weights.

        Args:
            lat: Row coordinates, any shape.
            lon: Column coordinates, same shape.

        Returns:
            Flat indices and weights, each with the shape of the locations and a last axis of
            four points.

        Raises:
            InputError: If a location is outside the domain or not finite.
        """
        lat, lon = np.broadcast_arrays(np.asarray(lat, np.float64), np.asarray(lon, np.float64))
        inside = self.contains(lat, lon)
        if not inside.all():
            where = np.argwhere(~inside)[0]
            raise InputError(
                f"{int((~inside).sum())} of {inside.size} locations are outside the grid "
                f"(lat {self.lat.min():g}..{self.lat.max():g}, "
                f"lon {self.lon.min():g}..{self.lon.max():g}); the first is "
                f"lat={lat[tuple(where)]:g}, lon={lon[tuple(where)]:g}. Drop them "
                "(grid.contains marks those inside)"
            )
        rows, second, across = self._rows(lat)
        index, weight = [], []
        for row, row_weight, crossed in zip(rows, (1 - second, second), across, strict=True):
            columns, share = self._columns(np.where(crossed, lon + 180.0, lon))
            for column, column_weight in zip(columns, (1 - share, share), strict=True):
                index.append(row * self.shape[1] + column)
                weight.append(row_weight * column_weight)
        return np.stack(index, -1), np.stack(weight, -1)


class LatLonGrid(Grid):
    """Points on parallels and meridians, regional or global.

    A global grid wraps in longitude. If it has no rows at the poles, interpolation between its
    outermost row and the pole uses the same row on the other side of the pole. That is right for
    scalars; components of vectors need a grid with rows at the poles.

    Args:
        lat: ``(H,)`` degrees north, strictly monotonic, evenly spaced.
        lon: ``(W,)`` degrees east, strictly ascending, evenly spaced; they may start anywhere.

    Raises:
        InputError: If a coordinate is not as described.
    """

    def __init__(self, lat: ArrayLike, lon: ArrayLike) -> None:
        self.lat = evenly_spaced(lat, "lat")
        self.lon = evenly_spaced(lon, "lon")
        if np.abs(self.lat).max() > 90 + 1e-6:
            raise InputError(f"latitudes reach {np.abs(self.lat).max():g} degrees")
        if self.lon[1] < self.lon[0]:
            raise InputError("longitudes must ascend; sort the data by longitude first")
        # Means: the first step may be off by the round-off of float32.
        self._dlat = abs(self.lat[-1] - self.lat[0]) / (len(self.lat) - 1)
        self._dlon = (self.lon[-1] - self.lon[0]) / (len(self.lon) - 1)
        span = self._dlon * len(self.lon)
        if span > 360 + 1e-3 * self._dlon:
            raise InputError(f"longitudes span {span:g} degrees, more than the globe")
        self.is_global = bool(abs(span - 360) < 1e-3 * self._dlon)
        reach = np.array([90 - self.lat.max(), self.lat.min() + 90])
        self._over_poles = self.is_global & (reach <= self._dlat / 2 + 1e-6)  # south, north below
        self._over_poles = self._over_poles[::-1]

    def contains(self, lat: ArrayLike, lon: ArrayLike) -> Array:
        """Whether locations are within the outermost points.

        A global grid contains all longitudes, and the poles if its rows come within half a step.
        """
        lat, lon = np.asarray(lat, np.float64), np.asarray(lon, np.float64)
        low = -90.0 if self._over_poles[0] else self.lat.min()
        high = 90.0 if self._over_poles[1] else self.lat.max()
        inside = (lat >= low - 1e-6) & (lat <= high + 1e-6) & np.isfinite(lon)
        if not self.is_global:
            inside &= self._offset(lon) <= len(self.lon) - 1 + 1e-6
        return inside

    def area(self) -> Array:
        """Cosine of the latitude, normalised to mean one."""
        cosine = np.maximum(np.cos(np.deg2rad(self.lat)), 1e-6)
        return np.repeat((cosine / cosine.mean())[:, None], len(self.lon), 1)

    def at(self, shape: Sequence[int]) -> LatLonGrid:
        """The same domain with another number of points: the outer borders of the cells are kept.

        If the first and last row are at the poles, they stay there.
        """
        if tuple(shape) == self.shape:
            return self
        height, width = shape
        if abs(abs(self.lat[0]) - 90) < 1e-6 and abs(abs(self.lat[-1]) - 90) < 1e-6:
            lat = np.linspace(self.lat[0], self.lat[-1], height)
        else:
            lat = _recell(self.lat, height)
        step = (self.lon[-1] - self.lon[0] + self._dlon) / width
        start = self.lon[0] if self.is_global else self.lon[0] - self._dlon / 2 + step / 2
        return LatLonGrid(lat, start + step * np.arange(width))

    def _offset(self, lon: Array) -> Array:
        """Distance east of the first column, in columns; round-off west of it counts as zero."""
        turns = (lon - self.lon[0]) / 360.0
        fraction = turns - np.floor(turns)
        fraction = np.where(fraction > 1 - 1e-9, 0.0, fraction)
        return fraction * 360.0 / self._dlon

    def _columns(self, lon: Array) -> tuple[Array, Array]:
        offset = self._offset(lon)
        last = len(self.lon) - (1 if self.is_global else 2)
        first = np.clip(np.floor(offset).astype(int), 0, last)
        second = np.clip(offset - first, 0.0, 1.0)
        return np.stack([first, (first + 1) % len(self.lon)]), second

    def _rows(self, lat: Array) -> tuple[Array, Array, Array]:
        height = len(self.lat)
        step = (self.lat[-1] - self.lat[0]) / (height - 1)
        offset = (lat - self.lat[0]) / step
        beyond = (offset < 0) | (offset > height - 1)
        first = np.clip(np.floor(offset).astype(int), 0, height - 2)
        second = np.clip(offset - first, 0.0, 1.0)
        rows, across = np.stack([first, first + 1]), np.zeros((2, *lat.shape), bool)
        # Beyond the outermost row: that row, and the same row on the other side of the pole.
        edge = np.where(offset < 0, 0, height - 1)
        gap = 90 - np.abs(self.lat[edge])
        share = (np.abs(lat) - np.abs(self.lat[edge])) / np.maximum(2 * gap, 1e-12)
        rows = np.where(beyond, edge, rows)
        second = np.where(beyond, np.clip(share, 0.0, 0.5), second)
        across[1] = beyond
        return rows, second, across


class BoxGrid(Grid):
    """A rectangle ``[0, lengths[0]] x [0, lengths[1]]``, periodic (a torus) or not.

    The points are those of :class:`~ddo_modulus.fields.basis.FourierBasis` if it is periodic, else
    those of :class:`~ddo_modulus.fields.basis.CosineBasis`, the centres of cells.

    Args:
        shape: ``(H, W)``.
        lengths: Extent along rows and along columns.
        periodic: Whether both axes wrap.
    """

    def __init__(
        self,
        shape: Sequence[int],
        lengths: Sequence[float] = (1.0, 1.0),
        *,
        periodic: bool = True,
    ) -> None:
        self.lengths = (float(lengths[0]), float(lengths[1]))
        self.periodic = periodic
        shift = 0.0 if periodic else 0.5
        self.lat, self.lon = (
            (np.arange(n) + shift) * length / n
            for n, length in zip(shape, self.lengths, strict=True)
        )

    def contains(self, lat: ArrayLike, lon: ArrayLike) -> Array:
        """Whether locations are in the rectangle, borders included."""
        inside = [
            (np.asarray(value, np.float64) >= -1e-9)
            & (np.asarray(value, np.float64) <= length * (1 + 1e-9))
            for value, length in zip((lat, lon), self.lengths, strict=True)
        ]
        return inside[0] & inside[1]

    def area(self) -> Array:
        """Ones: all cells have the same area."""
        return np.ones(self.shape)

    def at(self, shape: Sequence[int]) -> BoxGrid:
        """The same rectangle with another number of points."""
        return BoxGrid(shape, self.lengths, periodic=self.periodic)

    def _axis_neighbours(self, value: Array, axis: int) -> tuple[Array, Array]:
        points, length = self.shape[axis], self.lengths[axis]
        offset = value / length * points
        if self.periodic:
            first = np.floor(offset).astype(int)
            return np.stack([first, first + 1]) % points, offset - first
        # Constant over the outer half cell: no gradient at the border, as in the cosine basis.
        offset = np.clip(offset - 0.5, 0, points - 1)
        first = np.clip(np.floor(offset).astype(int), 0, points - 2)
        return np.stack([first, first + 1]), offset - first

    def _columns(self, lon: Array) -> tuple[Array, Array]:
        return self._axis_neighbours(lon, 1)

    def _rows(self, lat: Array) -> tuple[Array, Array, Array]:
        rows, second = self._axis_neighbours(lat, 0)
        return rows, second, np.zeros((2, *lat.shape), bool)


def resampled(values: Float[Tensor, "*B h w"], own: Grid, other: Grid) -> Float[Tensor, "*B H W"]:
    """Interpolate values to the points of another grid, bilinearly.

    A finer grid of the same domain has points outside the outermost ones of a regional grid. Up to
    half a cell away, they take the values at the edge.

    Raises:
        InputError: If a point of the other grid is farther outside.
    """
    if own.shape == other.shape and all(
        np.allclose(a, b, atol=1e-5) for a, b in ((own.lat, other.lat), (own.lon, other.lon))
    ):
        return values
    lat, lon = np.meshgrid(other.lat, other.lon, indexing="ij")
    if isinstance(own, LatLonGrid) and not own.is_global:
        west = own.lon[0] - 0.5 * (360 - (own.lon[-1] - own.lon[0]))
        lat, lon = _drawn_in(lat, own.lat), _drawn_in((lon - west) % 360 + west, own.lon)
    index, weight = (torch.from_numpy(t).to(values.device) for t in own.bilinear(lat, lon))
    return (values.flatten(-2)[..., index] * weight).sum(-1).to(values.dtype)


def _drawn_in(points: Array, axis: Array) -> Array:
    """Move points that are up to half a cell outside an axis to its end."""
    reach = 0.5 * abs(axis[1] - axis[0]) + 1e-6
    near = (points > axis.min() - reach) & (points < axis.max() + reach)
    return np.where(near, points.clip(axis.min(), axis.max()), points)


def evenly_spaced(values: ArrayLike, name: str) -> Array:
    """Check the coordinates of one axis; float64.

    Raises:
        InputError: If there are fewer than two, or they are not finite or not evenly spaced.
    """
    axis = np.asarray(values, np.float64)
    if axis.ndim != 1 or len(axis) < 2 or not np.isfinite(axis).all():
        raise InputError(f"{name} must be at least two finite coordinates along one axis")
    step = np.diff(axis)
    if np.abs(step - step.mean()).max() > 1e-3 * abs(step.mean()):
        raise InputError(f"{name} is not evenly spaced: regrid the data first")
    return axis


def overlaps(low: Array, high: Array, edges: Array) -> Array:
    """Length of the overlap of each interval with each of a row of adjacent cells.

    Args:
        low: ``(m,)`` lower ends of the intervals.
        high: ``(m,)`` upper ends.
        edges: ``(n + 1,)`` ascending edges of the cells.

    Returns:
        ``(m, n)``; zero where an interval and a cell do not overlap.
    """
    shared = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    return np.maximum(shared, 0.0)


def _recell(axis: Array, count: int) -> Array:
    """Centres of ``count`` equal cells over the extent of the cells of ``axis``."""
    step = axis[1] - axis[0]
    low, high = axis[0] - step / 2, axis[-1] + step / 2
    return low + (np.arange(count) + 0.5) * (high - low) / count


def check_orography(heights: ArrayLike, grid: Grid, where: str) -> np.ndarray:
    """Check the heights of a model's surface; float64, in metres.

    Args:
        heights: ``(H, W)``.
        grid: Grid of the heights.
        where: Source of the heights, for the message.

    Raises:
        InputError: If the heights are not on the grid, or not plausible in metres.
    """
    heights = np.asarray(heights, float)
    if heights.shape != grid.shape:
        raise InputError(f"{where} on {heights.shape} does not fit a grid {grid.shape}")
    if not np.isfinite(heights).all() or heights.min() < -500 or heights.max() > 9000:
        raise InputError(
            f"{where}: heights from {heights.min():.4g} to {heights.max():.4g} m cannot be right; "
            "heights are metres above sea level, geopotentials (z) m2/s2"
        )
    return heights


def as_pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """Two positive integers, for rows and columns; a single number is used for both.

    Args:
        value: One or two numbers.
        name: Name of the argument, for the message.

    Raises:
        InputError: If there are not one or two numbers, or one is not positive.
    """
    pair = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
    if len(pair) != 2 or min(pair) < 1:
        raise InputError(f"{name} must be two positive integers, got {value!r}")
    return pair[0], pair[1]
