# SPDX-License-Identifier: Apache-2.0
"""Local differential information: differences of a field over a fixed physical distance.

Axes: ``B`` batch, ``H W`` grid, ``C`` channel.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddo_modulus.fields.basis import Basis, FourierBasis
from ddo_modulus.fields.spherical_basis import SphericalBasis


def neighbours(y: Float[Tensor, "B H W C"], basis: Basis) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The field seen one cell to the east, west, south and north.

    The distance is a cell of the grid of ``basis``, also when ``y`` comes on another grid (values
    in between are interpolated linearly), so they are the same operators on all grids.
    """
    shape = (y.shape[1], y.shape[2])
    rows, columns = (now / then for now, then in zip(shape, basis.shape, strict=True))
    if isinstance(basis, SphericalBasis):
        if basis.poles:  # one row less between the poles than there are rows
            rows = (shape[0] - 1) / (basis.shape[0] - 1)
        south, north = (_across_poles(y, step, int(basis.poles)) for step in (rows, -rows))
        return _roll(y, 2, columns), _roll(y, 2, -columns), south, north
    move = _roll if isinstance(basis, FourierBasis) else _mirror
    return move(y, 2, columns), move(y, 2, -columns), move(y, 1, rows), move(y, 1, -rows)


class LocalLinear(nn.Linear):
    """Pointwise linear map of a field and the first and second differences of some of its channels.

    The parameters belong to ``[y, dx y', dy y', dxx y', dyy y']`` with ``y'`` the channels that are
    differentiated: differences are what has a meaning on every grid. They are applied to the values
    at the five points themselves, whose combinations they are.

    Args:
        width: Channels of the field.
        out: Channels of the output.
        local: Channels that are differentiated, the first ones.
    """

    def __init__(self, width: int, out: int, local: int) -> None:
        super().__init__(width + 4 * local, out)
        self.split = [local, width - local, local, local, local, local]

    def forward(  # type: ignore[override]
        self, y: Float[Tensor, "B H W C"], basis: Basis
    ) -> Float[Tensor, "B H W D"]:
        """Apply the map on the grid of ``y``; ``basis`` as in :func:`neighbours`."""
        values = torch.cat([y, *neighbours(y[..., : self.split[0]], basis)], -1)
        return nn.functional.linear(values, self.stencil(), self.bias)

    def stencil(self) -> Float[Tensor, "D S"]:
        """Weights of the values at a point, and of those at its four :func:`neighbours`."""
        w, rest, x, v, xx, vv = self.weight.split(self.split, 1)
        return torch.cat(
            [w - 2 * (xx + vv), rest, xx + x / 2, xx - x / 2, vv + v / 2, vv - v / 2], 1
        )


def _roll(y: Tensor, dim: int, distance: float) -> Tensor:
    """``y`` seen ``distance`` points ahead on a periodic axis."""
    whole = math.floor(distance)
    near = torch.roll(y, -whole, dim)
    if distance == whole:
        return near
    return torch.lerp(near, torch.roll(y, -whole - 1, dim), distance - whole)


def _mirror(y: Tensor, dim: int, distance: float) -> Tensor:
    """``y`` seen ``distance`` points ahead on an axis mirrored at its borders (cell faces)."""
    whole = math.floor(distance)
    near = _mirror_whole(y, dim, whole)
    if distance == whole:
        return near
    return torch.lerp(near, _mirror_whole(y, dim, whole + 1), distance - whole)


def _mirror_whole(y: Tensor, dim: int, step: int) -> Tensor:
    if step == 0:
        return y
    size, far = y.shape[dim], abs(step)
    if step > 0:
        kept, edge = y.narrow(dim, far, size - far), y.narrow(dim, size - far, far)
        return torch.cat([kept, edge.flip(dim)], dim)
    kept, edge = y.narrow(dim, 0, size - far), y.narrow(dim, 0, far)
    return torch.cat([edge.flip(dim), kept], dim)


def _across_poles(y: Tensor, distance: float, skip: int) -> Tensor:
    """``y`` seen ``distance`` rows ahead on a sphere: past a pole, on the meridian beyond it.

    A pole row is its own mirror image (``skip`` 1); cell centres are mirrored between two rows (0).
    """
    beyond = torch.roll(y, y.shape[2] // 2, 2)
    size, reach = y.shape[1], math.ceil(abs(distance))
    above = beyond.narrow(1, skip, reach).flip(1)
    below = beyond.narrow(1, size - skip - reach, reach).flip(1)
    padded = torch.cat([above, y, below], 1)
    whole = math.floor(distance)
    near = padded.narrow(1, reach + whole, size)
    if distance == whole:
        return near
    return torch.lerp(near, padded.narrow(1, reach + whole + 1, size), distance - whole)
