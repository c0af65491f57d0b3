# SPDX-License-Identifier: Apache-2.0
"""Spherical harmonics: the basis of the sphere.

Axes: ``H W`` grid (rows, columns), ``K`` spectral coefficients, ``K1 K2`` row and column modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Array, Basis, FourierBasis
from ddo_modulus.fields.grid import as_pair


class SphericalBasis(Basis):
    r"""Real orthonormal spherical harmonics on a global latitude-longitude grid (unit sphere).

    Rows run from north to south: with the poles if ``H`` is odd (721 rows of ERA5), on cell
    centres if it is even, or at ``latitudes``. Columns start at longitude 0. Triangular
    truncation at degree ``lmax``: by default the full band of the grid, which least-squares
    analysis inverts stably (quadrature rules, as in other packages, lose half of it).

    Args:
        shape: Grid ``(H, W)``.
        lmax: Largest degree; the largest that the grid resolves if None.
        latitudes: ``(H,)`` degrees north, descending; the layout above if None.

    Attributes:
        poles: Whether the first and the last row are the poles, here and on every grid of ``at``.
    """

    def __init__(
        self,
        shape: Sequence[int],
        lmax: int | None = None,
        latitudes: Sequence[float] | Array | None = None,
    ) -> None:
        shape = as_pair(shape, "shape")
        self._latitudes = None if latitudes is None else np.asarray(latitudes, dtype=np.float64)
        if self._latitudes is not None and self._latitudes.shape != (shape[0],):
            raise InputError(f"{len(self._latitudes)} latitudes do not fit the grid {shape}")
        self.poles = shape[0] % 2 == 1
        if self._latitudes is not None:
            self.poles = bool((np.abs(self._latitudes[[0, -1]]) > 90 - 1e-9).all())
        self._bands: dict[tuple[int, int], int] = {}
        full = self._full_band(shape)
        self.lmax = full if lmax is None else int(lmax)
        self._fills_grid = self.lmax == full
        if not 0 <= self.lmax <= full:
            raise InputError(f"lmax={lmax} is outside 0..{full}, the band of the grid {shape}")
        self._valid = {torch.device("cpu"): torch.from_numpy(self._indices_flat())}
        super().__init__(shape, (self.lmax + 1, 2 * self.lmax + 1))

    def __getstate__(self) -> dict[str, Any]:
        """See :class:`Basis`."""
        cpu = torch.device("cpu")
        return super().__getstate__() | {"_valid": {cpu: self._valid[cpu]}}

    def latitudes(self, height: int) -> Array:
        """Latitudes of the rows in degrees north, ``(height,)``.

        A grid with pole rows keeps them at every height, as
        :meth:`~ddo_modulus.fields.grid.LatLonGrid.at` does; one without stays on cell centres.
        """
        if self._latitudes is not None and height == len(self._latitudes):
            return self._latitudes
        if self.poles and height > 1:
            return np.linspace(90.0, -90.0, height)
        return 90.0 - (np.arange(height) + 0.5) * 180.0 / height

    def _full_band(self, shape: tuple[int, int]) -> int:
        if shape not in self._bands:  # kept, since compilers cannot follow NumPy to a number
            # A row at a pole sees zonal order 0 only, so the two of them count as one.
            poles = int(np.sum(np.abs(self.latitudes(shape[0])) > 90 - 1e-9))
            self._bands[shape] = min(shape[0] - max(poles, 1), (shape[1] - 1) // 2)
        return self._bands[shape]

    def _order(self) -> Array:
        """Zonal order of each column function: 0, 1 (cos), 1 (sin), 2, 2, ..."""
        return (np.arange(2 * self.lmax + 1) + 1) // 2

    def _indices_flat(self) -> Array:
        degree = np.arange(self.lmax + 1)[:, None]
        return np.flatnonzero((degree >= self._order()).reshape(-1))

    def _spectrum(self) -> tuple[Array, Array]:
        flat = self._indices_flat()
        degree, column = flat // self.modes[1], flat % self.modes[1]
        return np.stack([degree, column], -1), (degree * (degree + 1.0)).astype(np.float64)

    def _columns(self, width: int) -> Array:
        return FourierBasis._functions(width, 2 * self.lmax + 1)

    def _rows(self, height: int) -> Array:
        legendre = _legendre(self.lmax, np.sin(np.deg2rad(self.latitudes(height))))
        return np.ascontiguousarray(legendre[self._order()])

    def weights(self, shape: Sequence[int] | None = None) -> Float[Tensor, "H W"]:
        """Area of the zone between the mid-latitudes of a row and its neighbours, over all."""
        shape = self.shape if shape is None else as_pair(shape, "shape")
        latitude = self.latitudes(shape[0])
        edges = np.concatenate([[90.0], (latitude[1:] + latitude[:-1]) / 2, [-90.0]])
        zone = -np.diff(np.sin(np.deg2rad(edges))) / 2
        return torch.from_numpy(np.repeat(zone[:, None] / shape[1], shape[1], 1))

    def at(self, shape: Sequence[int]) -> Self:
        """The same sphere on another grid (see :class:`Basis`)."""
        shape = as_pair(shape, "shape")
        other = type(self)(shape, None, self.latitudes(shape[0]))
        return other if self._fills_grid else other.truncate(self.lmax + 1)

    def truncate(self, modes: int | Sequence[int]) -> Self:
        """Keep degrees below ``modes`` (the smaller one of a pair)."""
        lmax = min(min(as_pair(modes, "modes")) - 1, self.lmax)
        return type(self)(self.shape, lmax, self._latitudes)

    def resolves(self, shape: Sequence[int]) -> bool:
        """Whether the grid's full band reaches ``lmax``."""
        return self._full_band(as_pair(shape, "shape")) >= self.lmax

    def symmetry(self) -> Tensor:
        """Harmonics of one degree."""
        return self.indices[:, 0]

    def _gather(self, rectangle: Tensor) -> Tensor:
        return rectangle.flatten(-2)[..., self._valid_on(rectangle.device)]

    def _scatter(self, coefficients: Tensor) -> Tensor:
        rectangle = coefficients.new_zeros(*coefficients.shape[:-1], math.prod(self.modes))
        index = self._valid_on(coefficients.device)
        return rectangle.index_copy(-1, index, coefficients).unflatten(-1, self.modes)

    def _valid_on(self, device: torch.device) -> Tensor:
        """Places of the coefficients in their rectangle; copied to a device once."""
        if device not in self._valid:
            with lasting():
                self._valid[device] = self._valid[torch.device("cpu")].to(device)
        return self._valid[device]


def _legendre(lmax: int, x: Array) -> Array:
    r"""Normalised associated Legendre functions :math:`\bar P_l^m`, axes ``m``, ``H``, ``l``.

    Normalised to mean square one over the sphere once multiplied by :math:`1` or
    :math:`\sqrt2\cos m\lambda, \sqrt2\sin m\lambda`. Standard forward column recursion (Holmes &
    Featherstone 2002, eqs. 11-13), stable in double precision up to degree about 1900.
    """
    values = np.zeros((lmax + 1, len(x), lmax + 1))
    sine = np.sqrt(np.maximum(1 - x**2, 0.0))
    values[0, :, 0] = 1.0
    for m in range(1, lmax + 1):
        values[m, :, m] = math.sqrt((2 * m + 1) / (2 * m)) * sine * values[m - 1, :, m - 1]
    for m in range(lmax):
        values[m, :, m + 1] = math.sqrt(2 * m + 3) * x * values[m, :, m]
    for degree in range(2, lmax + 1):
        order = np.arange(degree - 1)
        a = np.sqrt((4 * degree**2 - 1) / (degree**2 - order**2))
        b = np.sqrt(((degree - 1) ** 2 - order**2) / (4 * (degree - 1) ** 2 - 1))
        values[order, :, degree] = a[:, None] * (
            x * values[order, :, degree - 1] - b[:, None] * values[order, :, degree - 2]
        )
    return values
