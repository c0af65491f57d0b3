# SPDX-License-Identifier: Apache-2.0
"""The task of an operator: the frames that it draws, and the condition that it takes.

Axes: ``N`` states of a record, ``B`` batch, ``P`` frames of a sample, ``C`` variables, ``D``
channels of a condition, ``H W`` grid, ``h w`` coarse grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.grid import overlaps
from ddo_modulus.nn.spectral import odd_band

_KINDS = ("none", "hour_of_day", "coarse")


@dataclass(frozen=True)
class CoarseWindow:
    """A coarse view of some frames of a field: means over the cells of a coarse grid.

    Attributes:
        factor: Ratio of the numbers of points of the fine and the coarse grid along each axis; any
            number from 1 up.
        reach: Number of further frames in the view, both before and after the frame itself.

    Raises:
        InputError: If a number is out of range.
    """

    factor: float
    reach: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise InputError(f"coarse.factor={self.factor} must be a number from 1 up")
        if isinstance(self.reach, bool) or not isinstance(self.reach, int) or self.reach < 0:
            raise InputError(f"coarse.reach={self.reach} must be a whole number from 0 up")

    def shape(self, fine: tuple[int, int]) -> tuple[int, int]:
        """Grid ``(h, w)`` of the coarse view.

        Raises:
            InputError: If it has a single row or column.
        """
        height, width = (round(n / self.factor) for n in fine)
        if min(height, width) < 2:
            raise InputError(
                f"coarse.factor={self.factor:g} leaves {height}x{width} of {fine[0]}x{fine[1]} "
                "points; choose a smaller one"
            )
        return height, width

    def view(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        """Means over the cells of the coarse grid."""
        rows, columns = (s / s.sum(1, keepdim=True) for s in self._shares(x, x.shape[-2:]))
        return rows @ x @ columns.mT

    def on_grid(self, y: Float[Tensor, "B C h w"], basis: Basis) -> Float[Tensor, "B C H W"]:
        """A coarse view on the grid of a basis.

        The field is constant in each coarse cell, then truncated to the functions that the coarse
        grid resolves. Unlike interpolation between points, that does not shift the field.
        """
        rows, columns = self._shares(y, basis.shape)
        cells = rows.mT @ y @ columns
        band = _band(basis, odd_band((y.shape[-2], y.shape[-1])))
        return band.synthesize(band.analyze(cells), basis.shape)

    def _shares(self, like: Tensor, fine: Sequence[int]) -> list[Tensor]:
        """Share of each fine row in each coarse row, ``(h, H)``, and likewise of columns."""
        sizes = (fine[0], fine[1])
        return [
            _shares(many, few, like.dtype, str(like.device))
            for many, few in zip(sizes, self.shape(sizes), strict=True)
        ]


# Cached: both are needed for every batch, and cost far more to compute than to apply.
@lru_cache(maxsize=16)
def _band(basis: Basis, modes: tuple[int, int]) -> Basis:
    return basis.truncate(modes)


@lru_cache(maxsize=16)
def _shares(many: int, few: int, dtype: torch.dtype, device: str) -> Float[Tensor, "h H"]:
    edge = np.arange(few + 1) * many / few
    share = overlaps(edge[:-1], edge[1:], np.arange(many + 1))
    with lasting():
        return torch.from_numpy(share).to(device, dtype)


@dataclass(frozen=True)
class Task:
    """What an operator draws: consecutive frames, and the condition that it takes.

    Attributes:
        frames: Number of states that are drawn together. They are stacked as channels, with the
            variables of the first frame first.
        condition: ``"none"``; ``"hour_of_day"`` for sine and cosine of the UTC hour of the middle
            frame; ``"coarse"`` for a coarse view of the frames and their neighbours in time.
        coarse: The coarse view, if it is the condition.

    Raises:
        InputError: If a value is not one of these, or ``coarse`` does not match the condition.
    """

    frames: int = 1
    condition: str = "none"
    coarse: CoarseWindow | None = None

    def __post_init__(self) -> None:
        if isinstance(self.frames, bool) or not isinstance(self.frames, int) or self.frames < 1:
            raise InputError(f"frames={self.frames} must be a whole number from 1 up")
        if self.condition not in _KINDS:
            raise InputError(f"unknown condition {self.condition!r}; choose {', '.join(_KINDS)}")
        if (self.condition == "coarse") != (self.coarse is not None):
            raise InputError("coarse={factor: ..., reach: ...} belongs to condition=coarse")

    @property
    def span(self) -> int:
        """Number of frames ``P`` that a training sample needs."""
        return self.frames + (2 * self.coarse.reach if self.coarse is not None else 0)

    def channels(self, variables: int) -> int:
        """Number of channels ``D`` of the condition."""
        if self.coarse is not None:
            return self.span * variables
        return 2 if self.condition == "hour_of_day" else 0

    def at(self, times: np.ndarray) -> Float[Tensor, "B D"] | None:
        """Condition at times ``(B,)`` of the middle frames; None if times do not determine it."""
        if self.condition != "hour_of_day":
            return None
        seconds = np.asarray(times, "datetime64[s]").astype("int64") % 86_400
        angle = torch.from_numpy(seconds * (2 * np.pi / 86_400)).float()
        return torch.stack([angle.sin(), angle.cos()], 1)

    def split(
        self, x: Float[Tensor, "B PC H W"], condition: Tensor | None, basis: Basis
    ) -> tuple[Float[Tensor, "B C H W"], Tensor | None]:
        """Split the frames of samples into the states to draw and their condition.

        Args:
            x: Normalised frames, ``span`` per sample.
            condition: Result of :meth:`at`.
            basis: Basis of the operator.
        """
        if self.coarse is None:
            return x, condition
        view = self.coarse.on_grid(self.coarse.view(x), basis)
        variables, reach = x.shape[1] // self.span, self.coarse.reach
        state = x[:, reach * variables : (reach + self.frames) * variables]
        return state, view
