# SPDX-License-Identifier: Apache-2.0
"""Spectral transforms and filters with channels last.

Axes: ``B`` batch, ``H W`` grid, ``C`` channel, ``K1 K2`` row and column modes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from ddo_modulus.fields.basis import Basis


class Transform(nn.Module):
    """Analysis on one grid and synthesis on another, as products with real matrices.

    The product along rows comes first in analysis and last in synthesis: it is one large matrix
    product over all columns and channels, and leaves little for the other. Modes are padded with
    zeros to a multiple of eight, which the fast matrix units ask of every leading dimension.
    Matrices of the grids it was built for are buffers, so that compilers and exporters see
    constants; those of any other grid come from the basis.

    Args:
        basis: Truncated basis; its grid is the fine one.
        coarse: Second grid, for :meth:`resample`; the basis' own if None.

    Attributes:
        modes: Row and column modes ``(K1, K2)``, padding included.
    """

    def __init__(self, basis: Basis, coarse: Sequence[int] | None = None) -> None:
        super().__init__()
        self.basis = basis
        self.modes = (_padded(basis.modes[0]), _padded(basis.modes[1]))
        self.fine = basis.shape
        self.coarse = basis.shape if coarse is None else (coarse[0], coarse[1])
        for name, shape in (("fine", self.fine), ("coarse", self.coarse)):
            for direction in ("analysis", "synthesis"):
                rows, columns = self._pad(shape, direction, torch.float32)
                self.register_buffer(f"{name}_{direction}_rows", rows, persistent=False)
                self.register_buffer(f"{name}_{direction}_columns", columns, persistent=False)

    def analyze(self, y: Float[Tensor, "B H W C"]) -> Float[Tensor, "B K1 K2 C"]:
        """Coefficients of a field on any grid that resolves the basis; zero in the padding."""
        rows, columns = self._matrices("analysis", (y.shape[1], y.shape[2]), y)
        if rows.ndim == 3:  # one page for each column mode
            return torch.einsum("jkh,bhjc->bkjc", rows, torch.matmul(columns, y))
        return torch.matmul(columns, _along_rows(rows, y))

    def synthesize(
        self, c: Float[Tensor, "B K1 K2 C"], shape: Sequence[int]
    ) -> Float[Tensor, "B H W C"]:
        """Values on a grid."""
        rows, columns = self._matrices("synthesis", (shape[0], shape[1]), c)
        if rows.ndim == 3:
            return torch.matmul(columns, torch.einsum("jhk,bkjc->bhjc", rows, c))
        return _along_rows(rows, torch.matmul(columns, c))

    def resample(
        self, y: Float[Tensor, "B H W C"], *, down: bool, like: Tensor | None = None
    ) -> Float[Tensor, "B h w C"]:
        """Band-limited field to the coarse grid, or back to the grid of ``like``."""
        shape = self.coarse if down or like is None else (like.shape[1], like.shape[2])
        return self.synthesize(self.analyze(y), shape)

    def _matrices(
        self, direction: str, shape: tuple[int, int], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        for name, own in (("fine", self.fine), ("coarse", self.coarse)):
            if shape == own:
                rows = getattr(self, f"{name}_{direction}_rows")
                columns = getattr(self, f"{name}_{direction}_columns")
                return rows.to(like.dtype), columns.to(like.dtype)
        return self._pad(shape, direction, like.dtype, like.device)

    def _pad(
        self,
        shape: Sequence[int],
        direction: str,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        inverse = direction == "analysis"
        rows, columns = self.basis.matrices(shape, dtype, device, inverse=inverse)
        more = [k - n for k, n in zip(self.modes, self.basis.modes, strict=True)]
        pages = (0, more[1]) if rows.ndim == 3 else ()
        if inverse:
            return pad(rows, (0, 0, 0, more[0], *pages)), pad(columns, (0, 0, 0, more[1]))
        return pad(rows, (0, more[0], 0, 0, *pages)), pad(columns, (0, more[1]))


class SpectralLinear(nn.Module):
    """A filter on every channel, then a linear map of the channels.

    A filter multiplies each mode by a learned number; it is a low-pass before training. Functions
    that a shift (on the sphere, a rotation) turns into each other share their number, so the filter
    commutes with the symmetries of the domain. The map of the channels commutes with the
    synthesis and is applied to the few coefficients, not to the many points.

    Args:
        transform: Gives the modes.
        width: Channels of the input.
        out: Channels of the output.
    """

    index: Tensor

    def __init__(self, transform: Transform, width: int, out: int) -> None:
        super().__init__()
        self.transform = transform
        label = transform.basis.symmetry()
        rectangle = transform.basis._scatter(label)
        more = [k - n for k, n in zip(transform.modes, rectangle.shape, strict=True)]
        index = pad(rectangle, (0, more[1], 0, more[0])).flatten()
        self.register_buffer("index", index, persistent=False)
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(int(label.max()) + 1, width))
        self.mix = nn.Linear(width, out, bias=False)

    def forward(self, y: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W D"]:
        """Filtered and mapped field on the same grid."""
        c = self.transform.analyze(y)
        c = self.mix(c * self.filter().to(c.dtype))
        return self.transform.synthesize(c, (y.shape[1], y.shape[2]))

    def filter(self) -> Float[Tensor, "K1 K2 C"]:
        """The number of each mode and channel."""
        return self.weight.index_select(0, self.index).unflatten(0, self.transform.modes)


def odd_band(shape: Sequence[int], most: int | None = None) -> tuple[int, int]:
    """Largest odd numbers of modes within a grid: sines and cosines in pairs, none at Nyquist."""
    height, width = (n if most is None else min(n, most) for n in shape)
    return height - (height + 1) % 2, width - (width + 1) % 2


def _padded(modes: int) -> int:
    return -(-modes // 8) * 8


def _along_rows(
    matrix: Float[Tensor, "I H"], y: Float[Tensor, "B H J C"]
) -> Float[Tensor, "B I J C"]:
    return torch.matmul(matrix, y.flatten(2)).unflatten(2, y.shape[2:])
