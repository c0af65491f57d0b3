# SPDX-License-Identifier: Apache-2.0
"""Spectral transforms and filters with channels last.

Axes: ``B`` batch, ``H W`` grid, ``C`` channel, ``K1 K2`` row and column modes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddo_modulus.basis import Basis


class Transform(nn.Module):
    """Analysis on one grid and synthesis on another, as products with real matrices.

    Matrices of the grids it was built for are buffers, so that compilers and exporters see
    constants; those of any other grid come from the basis.

    Args:
        basis: Truncated basis; its grid is the fine one.
        coarse: Second grid, for :meth:`resample`; the basis' own if None.
    """

    def __init__(self, basis: Basis, coarse: Sequence[int] | None = None) -> None:
        super().__init__()
        self.basis = basis
        self.fine = basis.shape
        self.coarse = basis.shape if coarse is None else (coarse[0], coarse[1])
        for name, shape in (("fine", self.fine), ("coarse", self.coarse)):
            for direction in ("analysis", "synthesis"):
                inverse = direction == "analysis"
                rows, columns = basis.matrices(shape, torch.float32, inverse=inverse)
                self.register_buffer(f"{name}_{direction}_rows", rows, persistent=False)
                self.register_buffer(f"{name}_{direction}_columns", columns, persistent=False)

    def analyze(self, y: Float[Tensor, "B H W C"]) -> Float[Tensor, "B K1 K2 C"]:
        """Coefficients of a field on any grid that resolves the basis."""
        rows, columns = self._matrices("analysis", (y.shape[1], y.shape[2]), y)
        return _rows(rows, torch.matmul(columns, y))

    def synthesize(
        self, c: Float[Tensor, "B K1 K2 C"], shape: Sequence[int]
    ) -> Float[Tensor, "B H W C"]:
        """Values on a grid."""
        rows, columns = self._matrices("synthesis", (shape[0], shape[1]), c)
        return torch.matmul(columns, _rows(rows, c))

    def resample(
        self, y: Float[Tensor, "B H W C"], *, down: bool, like: Tensor | None = None
    ) -> Float[Tensor, "B h w C"]:
        """Band-limited field to the coarse grid, or back to the grid of ``like``."""
        shape = self.coarse if down or like is None else (like.shape[1], like.shape[2])
        return self.synthesize(self.analyze(y), shape)

    def _matrices(
        self, direction: str, shape: tuple[int, int], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        for name, known in (("fine", self.fine), ("coarse", self.coarse)):
            if shape == known:
                rows = getattr(self, f"{name}_{direction}_rows")
                columns = getattr(self, f"{name}_{direction}_columns")
                return rows.to(like.dtype), columns.to(like.dtype)
        inverse = direction == "analysis"
        return self.basis.matrices(shape, like.dtype, like.device, inverse=inverse)


class SpectralFilter(nn.Module):
    """Multiplies every mode of every channel by a learned number; a low-pass before training.

    Channels are mixed elsewhere, pointwise, so a mode costs ``C`` weights and not ``C^2``.
    """

    def __init__(self, transform: Transform, width: int) -> None:
        super().__init__()
        self.transform = transform
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(*transform.basis.modes, width))

    def forward(self, y: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """Filtered field on the same grid."""
        c = self.transform.analyze(y)
        return self.transform.synthesize(c * self.weight.to(c.dtype), (y.shape[1], y.shape[2]))


def odd_band(shape: Sequence[int], most: int | None = None) -> tuple[int, int]:
    """Largest odd numbers of modes within a grid: sines and cosines in pairs, none at Nyquist."""
    height, width = (n if most is None else min(n, most) for n in shape)
    return height - (height + 1) % 2, width - (width + 1) % 2


def _rows(matrix: Tensor, y: Float[Tensor, "B H J C"]) -> Float[Tensor, "B K J C"]:
    """Product along the rows; a three-dimensional matrix has one page for each column mode."""
    if matrix.ndim == 3:
        return torch.einsum("jkh,bhjc->bkjc", matrix, y)
    return torch.matmul(matrix, y.flatten(2)).unflatten(2, y.shape[2:])
