# SPDX-License-Identifier: Apache-2.0
r"""Reports between a prior's pressure levels.

Axes: ``L`` levels, ``M`` observations.

A report at pressure :math:`p` between two neighbouring levels is read by linear interpolation in
:math:`\ln p`, which is nearly height: exact for the geopotential of an isothermal layer, and for
temperature in a layer where it is linear in :math:`\ln p`. Nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike

from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import Grid
from ddo_modulus.observations.algebra import LinearOperator, PointOperator, combined

_ROUNDING = 1e-6  # of a pressure that came through single precision


def between(levels: ArrayLike, pressure: ArrayLike) -> np.ndarray:
    """Which pressures can be interpolated to; False where one is not finite.

    Args:
        levels: ``(L,)``, any order.
        pressure: ``(M,)`` in the unit of the levels.
    """
    levels, pressure = np.asarray(levels, float), np.asarray(pressure, float)
    if not levels.size:
        return np.zeros(pressure.shape, bool)
    low, high = levels.min() * (1 - _ROUNDING), levels.max() * (1 + _ROUNDING)
    return (pressure >= low) & (pressure <= high)


class LevelOperator(LinearOperator):
    """One variable at points and pressures: bilinear along the levels, linear in log p across.

    Args:
        grid: The grid.
        levels: Pressures (Pa) and the channels that hold them.
        lat: ``(M,)`` latitudes.
        lon: ``(M,)`` longitudes.
        pressure: ``(M,)`` Pa.

    Raises:
        InputError: If a pressure is outside the levels, or a point outside the grid.
    """

    def __init__(
        self,
        grid: Grid,
        levels: Mapping[float, int],
        lat: ArrayLike,
        lon: ArrayLike,
        pressure: ArrayLike,
    ) -> None:
        axis = np.array(sorted(levels))
        channel = np.array([levels[p] for p in sorted(levels)], int)
        at = np.atleast_1d(np.asarray(pressure, float))
        if not (inside := between(axis, at)).all():
            raise InputError(
                f"{int((~inside).sum())} of {at.size} pressures are outside the levels "
                f"{', '.join(f'{p:g}' for p in axis)} Pa, the first at {at[~inside][0]:g} Pa; "
                "drop them"
            )
        last = max(len(axis) - 2, 0)
        upper = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, last)
        lower = np.minimum(upper + 1, len(axis) - 1)
        thick = np.log(axis[lower] / axis[upper])
        share = np.log(at / axis[upper]) / np.where(thick > 0, thick, 1.0)
        share = torch.from_numpy(np.clip(share, 0.0, 1.0))
        parts = [PointOperator(grid, lat, lon, channel[i]) for i in (upper, lower)]
        whole = combined(parts, [1 - share, share])
        super().__init__(whole.index, whole.weight, whole.offset)
