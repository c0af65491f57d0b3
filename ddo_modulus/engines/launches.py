# SPDX-License-Identifier: Apache-2.0
"""How the kernels are launched, and what they take: padded weights and sizes in registers.

The kernels themselves are in :mod:`.kernels`.
"""

# Contexts of automatic differentiation and Triton's kernels have no types.
# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from ddo_modulus.nn.spectral import Transform

# Channels of a level above which its blocks are left as they are: their weights are more than the
# kernels can keep at hand, and their arithmetic is enough to keep a GPU busy.
WIDEST = 128


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut into programs: what was quickest on an H200.

    Attributes:
        points: Points, or lines, of a tile.
        warps: Of a program.
        stages: Loads under way at once.
    """

    points: int = 64
    warps: int = 4
    stages: int = 3

    def run(
        self, kernel: Any, grid: tuple[int, ...], number: int, *inputs: object, **sizes: object
    ) -> None:
        """Launch programs of ``number`` points, or lines, each of which takes them part by part."""
        parts = min(self.points, register_size(number))
        kernel[grid](*inputs, **sizes, M=parts, num_warps=self.warps, num_stages=self.stages)

    def flat(self, kernel: Any, points: int, batch: int, *inputs: object, **sizes: object) -> None:
        """Launch a program for each tile of the points of all states."""
        grid = (triton.cdiv(points, self.points), batch)
        self.run(kernel, grid, self.points, *inputs, **sizes)

    def tiled(
        self, kernel: Any, batch: int, points: int, lines: int, *inputs: object, **sizes: object
    ) -> None:
        """As :meth:`flat`, for kernels that work line by line; a tile is no larger than the grid.

        Work on a part of a line costs as much as on all of it, so that large tiles are for long
        lines.
        """
        tile = min(self.points, register_size(points * lines), 128 if points >= 128 else 64)
        if points % tile == 0 or tile % points == 0:
            touched = max(tile // points, 1)
        else:
            touched = (tile - 2) // points + 2
        sizes |= {"points": points, "lines": lines, "LINES": touched}
        grid = (triton.cdiv(points * lines, tile), batch)
        self.run(kernel, grid, tile, *inputs, **sizes)


def channel_sizes(front: int, behind: int) -> dict[str, int]:
    """Numbers of channels, first and last, by the names that the kernels use."""
    return {"D": front, "D_": register_size(front), "C": behind, "C_": register_size(behind)}


def last_product(modes: int) -> dict[str, int]:
    """Modes of the last product of a synthesis, and how many are taken at once."""
    return {"K": modes, "K_": 32 if -modes % 32 < 16 else 16}


def register_size(size: int) -> int:
    """Size of an array in registers: a power of two, from 16 up."""
    return max(16, triton.next_power_of_2(size))


def padded_weight(
    weight: Tensor, dtype: torch.dtype, rows: int | None = None, columns: int | None = None
) -> Tensor:
    """A matrix with zeros behind, up to ``rows x columns``; by default, sizes in registers."""
    height, width = weight.shape
    rows = register_size(height) if rows is None else rows
    columns = register_size(width) if columns is None else columns
    return pad(weight, (0, columns - width, 0, rows - height)).to(dtype).contiguous()


def turned(matrix: Tensor) -> Tensor:
    """The transpose, laid out row by row."""
    return matrix.mT.contiguous()


def transform_matrices(transform: Transform, grid: str) -> list[Tensor]:
    """Rows and columns of analysis, then of synthesis; rows in pages, of each mode or of all."""
    names = [f"{grid}_{way}_{axis}" for way in ("analysis", "synthesis") for axis in _AXES]
    found = [transform.get_buffer(name) for name in names]
    return [
        m[None] if axis == "rows" and m.ndim == 2 else m
        for m, axis in zip(found, 2 * _AXES, strict=True)
    ]


_AXES = ("rows", "columns")


def first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Make a backward pass refuse second derivatives, for which nothing is kept."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError("fused kernels have first derivatives only: leave create_graph out")
        return backward(ctx, *gradients)

    return checked
