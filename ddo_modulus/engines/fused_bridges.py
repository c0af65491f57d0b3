# SPDX-License-Identifier: Apache-2.0
"""The ways between levels of the fused operator: resampling and its adjoint.

Axes: ``B`` batch, ``H W`` grid, ``h w`` the other grid, ``C`` channels of a level, ``K`` modes.
"""

# Contexts of automatic differentiation and Triton's kernels have no types.
# ruff: noqa: ANN401

from __future__ import annotations

from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from ddo_modulus.engines import kernels
from ddo_modulus.engines.launches import (
    WIDEST,
    Launch,
    first_order,
    last_product,
    register_size,
    transform_matrices,
)
from ddo_modulus.nn.operator import Bridge


class _Resampling:
    """A separable linear map between two grids: along lines to modes, across them, and back.

    Args:
        inward: ``(K, W)``, along the lines of the one grid.
        across: ``(P, h, H)``, a page for each mode or one for all.
        outward: ``(w, K)``, along the lines of the other.
    """

    def __init__(self, inward: Tensor, across: Tensor, outward: Tensor) -> None:
        self.inward, self.across, self.outward = (
            matrix.contiguous() for matrix in (inward, across, outward)
        )

    @property
    def transpose(self) -> _Resampling:
        """The adjoint map."""
        return _Resampling(self.outward.mT, self.across.mT, self.inward.mT)

    def __call__(
        self, y: Float[Tensor, "B H W C"], onto: Float[Tensor, "B h w C"] | None = None
    ) -> Float[Tensor, "B h w C"]:
        """The field on the other grid, added to ``onto`` there if that is not None."""
        with torch.autocast(y.device.type, enabled=False):  # derivatives are taken anywhere
            return self._resample(y, onto)

    def _resample(self, y: Tensor, onto: Tensor | None) -> Tensor:
        modes = _along_lines(self.inward, y)  # (B, H, K, C)
        if len(self.across) == 1:
            modes = torch.bmm(self.across.expand(len(y), -1, -1), modes.flatten(2))
            modes = modes.unflatten(2, (-1, y.shape[-1]))
        else:
            modes = torch.einsum("khj,bjkc->bhkc", self.across, modes).contiguous()
        return _along_lines(self.outward, modes, onto)


def _along_lines(
    matrix: Float[Tensor, "W K"],
    x: Float[Tensor, "B H K C"],
    onto: Float[Tensor, "B H W C"] | None = None,
) -> Float[Tensor, "B H W C"]:
    """A matrix times each line, added to ``onto`` if that is not None."""
    batch, lines, number, channels = x.shape
    if channels > WIDEST:
        out = torch.matmul(matrix, x)
        return out if onto is None else onto + out
    points, wide = len(matrix), register_size(channels)
    out = x.new_empty(batch, lines, points, channels)
    together = max(1, 128 // wide)
    pieces = {"K": number, "K_": 64} if number % 64 == 0 else last_product(number)
    tile = min(_ALONG.points, register_size(points))
    _ALONG.run(
        kernels.along_lines, (triton.cdiv(points, tile) * triton.cdiv(lines, together), batch),
        tile, x.contiguous(), matrix, out if onto is None else onto.contiguous(), out, points,
        lines, C=channels, C_=wide, **pieces, G=together, ADD=onto is not None,
    )  # fmt: skip
    return out


class FusedBridge:
    """Constants of a way to the next coarser level and back."""

    def __init__(self, bridge: Bridge, dtype: torch.dtype) -> None:
        down_rows, columns, rows, columns_back = transform_matrices(bridge.transform, "fine")
        up_rows, coarse, coarse_rows, coarse_back = transform_matrices(bridge.transform, "coarse")
        down, up = (
            (columns, coarse_rows @ down_rows, coarse_back),
            (coarse, rows @ up_rows, columns_back),
        )
        self.down = _Resampling(*(matrix.to(dtype) for matrix in down))
        self.up = _Resampling(*(matrix.to(dtype) for matrix in up))
        self.down_back, self.up_back = self.down.transpose, self.up.transpose
        self._shrink = bridge.shrink.weight.to(dtype), bridge.shrink.bias.to(dtype)
        self._grow = bridge.grow.weight.to(dtype), bridge.grow.bias.to(dtype)

    def shrink(self, h: Float[Tensor, "B h w C"]) -> Tensor:
        """To the channels of the coarser level; after the resampling, which it commutes with."""
        return linear(h, *self._shrink)

    def grow(self, h: Float[Tensor, "B h w C"]) -> Tensor:
        """To the channels of the finer level."""
        return linear(h, *self._grow)


class Descend(torch.autograd.Function):
    """A field, and itself on the coarser grid."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bridge: FusedBridge) -> tuple[Tensor, Tensor]:
        """See the class."""
        ctx.bridge = bridge
        return h.view_as(h), bridge.down(h)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Gradient by the states."""
        fine, coarse = gradients
        return ctx.bridge.down_back(coarse, onto=fine), None


class Ascend(torch.autograd.Function):
    """A field with one of the coarser grid added."""

    @staticmethod
    def forward(ctx: Any, fine: Tensor, coarse: Tensor, bridge: FusedBridge) -> Tensor:
        """See the class."""
        ctx.bridge = bridge
        return bridge.up(coarse, onto=fine)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradient by the states."""
        (g,) = gradients
        return g, ctx.bridge.up_back(g), None


_ALONG = Launch()
