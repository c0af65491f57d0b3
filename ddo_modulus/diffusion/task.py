# SPDX-License-Identifier: Apache-2.0
"""What an operator is trained to draw, and given what.

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
    """What a coarse view of a field and of its neighbours in time shows: means over blocks.

    Attributes:
        factor: Points of the fine grid to one of the coarse, along each axis; any number from 1.
        reach: Frames before, and as many after, that are seen beside the frame itself.

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
            InputError: If it has a single row or column, which shows no field.
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

    def spread(self, y: Float[Tensor, "B C h w"], basis: Basis) -> Float[Tensor, "B C H W"]:
        """A coarse view on the grid of a basis, as smooth as its resolution.

        Cells of equal values, of which the functions are kept that the coarse grid resolves:
        unlike an interpolation between its points it is not shifted.
        """
        rows, columns = self._shares(y, basis.shape)
        cells = rows.mT @ y @ columns
        band = _band(basis, odd_band((y.shape[-2], y.shape[-1])))
        return band.synthesize(band.analyze(cells), basis.shape)

    def _shares(self, like: Tensor, fine: Sequence[int]) -> list[Tensor]:
        """Share ``(h, H)`` of each fine row that is in each coarse one, and of columns."""
        sizes = (fine[0], fine[1])
        return [
            _shares(many, few, like.dtype, str(like.device))
            for many, few in zip(sizes, self.shape(sizes), strict=True)
        ]


# Both are asked for with every batch, and cost far more to make than to apply.
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
    """A sample of the process: frames next to each other in time, and what they are given.

    Attributes:
        frames: States that are drawn together, as channels, the first one's variables first.
        condition: ``"none"``; ``"hour_of_day"``: sine and cosine of the UTC hour of the middle
            frame; ``"coarse"``: the frames, and their neighbours, as ``coarse`` shows them.
        coarse: The coarse view, if that is the condition.

    Raises:
        InputError: If a value is not one of these, or a coarse view is missing or not asked for.
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
        """Frames ``P`` that a sample is made from."""
        return self.frames + (2 * self.coarse.reach if self.coarse is not None else 0)

    def channels(self, variables: int) -> int:
        """Channels ``D`` of the condition."""
        if self.coarse is not None:
            return self.span * variables
        return 2 if self.condition == "hour_of_day" else 0

    def at(self, times: np.ndarray) -> Float[Tensor, "B D"] | None:
        """Condition at the times ``(B,)`` of the middle frames; None where fields make it."""
        if self.condition != "hour_of_day":
            return None
        seconds = np.asarray(times, "datetime64[s]").astype("int64") % 86_400
        angle = torch.from_numpy(seconds * (2 * np.pi / 86_400)).float()
        return torch.stack([angle.sin(), angle.cos()], 1)

    def split(
        self, x: Float[Tensor, "B PC H W"], condition: Tensor | None, basis: Basis
    ) -> tuple[Float[Tensor, "B C H W"], Tensor | None]:
        """The state that is drawn and its condition, of all frames of samples.

        Args:
            x: Normalised frames, ``span`` of them.
            condition: What :meth:`at` gave.
            basis: Of the operator.
        """
        if self.coarse is None:
            return x, condition
        view = self.coarse.spread(self.coarse.view(x), basis)
        variables, reach = x.shape[1] // self.span, self.coarse.reach
        state = x[:, reach * variables : (reach + self.frames) * variables]
        return state, view
