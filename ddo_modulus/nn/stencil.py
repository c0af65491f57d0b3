# SPDX-License-Identifier: Apache-2.0
"""Local differential information: differences of a field at a fixed physical distance.

Axes: ``B`` batch, ``H W`` grid, ``C`` channel.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.basis import Basis, FourierBasis, SphericalBasis


def differences(
    y: Float[Tensor, "B H W C"], basis: Basis
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second differences along columns and rows.

    The distance is one cell of the grid of ``basis``, also when ``y`` comes on another grid
    (neighbours in between are interpolated linearly), so they are the same operator on all grids.

    Returns:
        East minus west (halved), north minus south (halved), and the two second differences.
    """
    shape = (y.shape[1], y.shape[2])
    rows, columns = (now / then for now, then in zip(shape, basis.shape, strict=True))
    if isinstance(basis, SphericalBasis):
        south, north = _across_poles(y, rows), _across_poles(y, -rows)
        east, west = _roll(y, 2, columns), _roll(y, 2, -columns)
    else:
        move = _roll if isinstance(basis, FourierBasis) else _mirror
        south, north = move(y, 1, rows), move(y, 1, -rows)
        east, west = move(y, 2, columns), move(y, 2, -columns)
    return (east - west) / 2, (south - north) / 2, east + west - 2 * y, north + south - 2 * y


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


def _across_poles(y: Tensor, distance: float) -> Tensor:
    """``y`` seen ``distance`` rows ahead on a sphere: past a pole, on the meridian beyond it."""
    beyond = torch.roll(y, y.shape[2] // 2, 2)
    # A pole row is its own mirror image; cell centres are mirrored between two rows.
    skip = y.shape[1] % 2
    size, reach = y.shape[1], math.ceil(abs(distance))
    above = beyond.narrow(1, skip, reach).flip(1)
    below = beyond.narrow(1, size - skip - reach, reach).flip(1)
    padded = torch.cat([above, y, below], 1)
    whole = math.floor(distance)
    near = padded.narrow(1, reach + whole, size)
    if distance == whole:
        return near
    return torch.lerp(near, padded.narrow(1, reach + whole + 1, size), distance - whole)
