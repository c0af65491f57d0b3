# SPDX-License-Identifier: Apache-2.0
"""Batches of normalised states for training: their options, their order, their transformations.

Every loader gives the same batches for the same options (:class:`Order`). They differ in where the
states are kept: in memory (:class:`TensorLoader`), or in a store that is read during training
(:class:`~ddo_modulus.data.stream.StreamLoader`, :class:`~ddo_modulus.data.dali.DaliLoader`).

A sample is one state, or several that make up a window in time. The channels of a window are those
of its first state, then those of its second, and so on.

Axes: ``N`` samples, ``P`` states of a sample, ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.random import Purpose, generator


class Loader(Protocol):
    """An endless source of batches."""

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """States and conditions of this rank from optimiser step ``start`` on."""
        ...

    def close(self) -> None:
        """End the processes that read; no batches come after that."""
        ...


@dataclass(frozen=True)
class Symmetry:
    """Random transformations that leave the distribution of a periodic field unchanged.

    Attributes:
        roll: Shifts along rows and columns are multiples of these numbers of points; 0 for no
            shifts.
        rotate: Whether the field may be rotated by 180 degrees.
        glide: Rows by which the field may be shifted while its sign changes and its columns are
            mirrored; 0 for never. (Kolmogorov flow: half a period of the forcing.)
    """

    roll: tuple[int, int] = (0, 0)
    rotate: bool = False
    glide: int = 0

    def __call__(
        self, x: Float[Tensor, "B C H W"], generator: torch.Generator
    ) -> Float[Tensor, "B C H W"]:
        """Transform each state by a random move of its own."""
        return move(x, self.draw(len(x), x.shape[-2:], generator))

    def draw(
        self, count: int, shape: Sequence[int], generator: torch.Generator
    ) -> Int[Tensor, "B 5"]:
        """Random moves of ``count`` states on a grid ``(H, W)``, for :func:`move`."""

        def choice(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator, device=generator.device)

        one = torch.ones(count, dtype=torch.long, device=generator.device)
        # Index i of the moved state shows the point `step * i + offset` of the original.
        row_step, row, column_step, column, sign = one, 0 * one, one, 0 * one, one
        if self.roll[0]:
            row = row + self.roll[0] * choice(shape[0] // self.roll[0])
        if self.roll[1]:
            column = column + self.roll[1] * choice(shape[1] // self.roll[1])
        if self.rotate:
            turn = choice(2).bool()
            row_step, column_step = (torch.where(turn, -s, s) for s in (row_step, column_step))
            row, column = (torch.where(turn, -1 - o, o) for o in (row, column))
        if self.glide:
            mirror = choice(2).bool()
            row = torch.where(mirror, row + self.glide, row)
            column_step = torch.where(mirror, -column_step, column_step)
            column = torch.where(mirror, -1 - column, column)
            sign = torch.where(mirror, -sign, sign)
        return torch.stack([row_step, row, column_step, column, sign], 1)


def move(x: Float[Tensor, "B C H W"], moves: Int[Tensor, "B 5"]) -> Float[Tensor, "B C H W"]:
    """Shift, mirror and negate periodic states, each by its own move.

    Args:
        x: States.
        moves: For each state, step and offset of its rows, step and offset of its columns, and a
            sign: row ``i`` of the result shows row ``step * i + offset``.
    """
    row_step, row, column_step, column, sign = moves.to(x.device, non_blocking=True).T[..., None]
    height, width = x.shape[-2:]
    rows = (row_step * torch.arange(height, device=x.device) + row) % height
    columns = (column_step * torch.arange(width, device=x.device) + column) % width
    state = torch.arange(len(x), device=x.device)[:, None, None]
    moved = x[state, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return moved * sign[:, :, None, None].to(x.dtype)


@dataclass(frozen=True)
class BatchOptions:
    """How samples are put together to batches; the same for every loader.

    Attributes:
        batch: Samples in a batch, over all ranks.
        seed: Of the order of the samples, their crops and their symmetries.
        symmetry: Random transformations of the states (of the crops, if there are any).
        crop: Size ``(h, w)`` of the part of the grid that is cut out of each sample at a random
            place; None takes the whole grid.
        rank: This process.
        ranks: Number of processes; divides the batch.

    Raises:
        InputError: If the batch cannot be divided evenly.
    """

    batch: int
    seed: int = 0
    symmetry: Symmetry | None = None
    crop: Sequence[int] | None = None
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.ranks:
            raise InputError(f"a batch of {self.batch} cannot be shared out to {self.ranks} ranks")

    @property
    def share(self) -> int:
        """Samples of a batch that this rank takes."""
        return self.batch // self.ranks


@dataclass(frozen=True)
class Draw:
    """What one rank takes in one step.

    Attributes:
        samples: ``(B,)`` indices of the samples.
        corners: ``(B, 2)`` first row and column of each crop, or None.
        moves: ``(B, 5)`` for :func:`move`, or None.
    """

    samples: Int[Tensor, " B"]
    corners: Int[Tensor, "B 2"] | None
    moves: Int[Tensor, "B 5"] | None


class Order:
    """Which samples make up the batch of each step, and how each is cropped and transformed.

    The samples of all steps are an endless sequence of permutations, one for each epoch. A
    permutation follows from the seed and the epoch alone; crops and moves follow from the seed and
    the step, for the whole batch. Rank ``r`` of ``n`` then takes the places ``r, r + n, ...``. So
    the batch of a step does not depend on the number of ranks, and a run that starts at step ``n``
    sees what an uninterrupted one would have seen.

    Args:
        options: How batches are put together.
        samples: Number of samples.
        shape: Grid ``(H, W)`` of the samples.

    Raises:
        InputError: If there are no samples, or the crop does not fit into the grid.
    """

    def __init__(self, options: BatchOptions, samples: int, shape: Sequence[int]) -> None:
        if samples < 1:
            raise InputError("there are no samples to train on")
        (height, width), crop = shape, options.crop
        if crop is not None and not (0 < crop[0] <= height and 0 < crop[1] <= width):
            raise InputError(
                f"data.crop={list(crop)} does not fit into the grid of {height}x{width} points"
            )
        self.options, self.samples, self.shape = options, samples, (height, width)
        self._permutation: tuple[int, Tensor] | None = None
        self._drawn: tuple[int, Draw] | None = None

    @property
    def share(self) -> int:
        """Samples of a batch that this rank takes."""
        return self.options.share

    def __call__(self, step: int) -> Draw:
        """What this rank takes in a step."""
        if self._drawn is None or self._drawn[0] != step:
            self._drawn = step, self._draw(step)
        return self._drawn[1]

    def _draw(self, step: int) -> Draw:
        options = self.options
        source = generator(options.seed, Purpose.TRANSFORMATIONS, step)
        moves, corners = None, None
        if options.symmetry is not None:
            moves = options.symmetry.draw(options.batch, options.crop or self.shape, source)
        if options.crop is not None:
            room = [n - k + 1 for n, k in zip(self.shape, options.crop, strict=True)]
            places = [torch.randint(n, (options.batch,), generator=source) for n in room]
            corners = torch.stack(places, 1)
        mine = slice(options.rank, None, options.ranks)
        return Draw(
            self._samples(step)[mine],
            None if corners is None else corners[mine],
            None if moves is None else moves[mine],
        )

    def _samples(self, step: int) -> Int[Tensor, " B"]:
        batch = self.options.batch
        position = torch.arange(step * batch, (step + 1) * batch)
        epochs = position // self.samples
        chosen = torch.empty(batch, dtype=torch.long)
        for epoch in epochs.unique().tolist():
            inside = epochs == epoch
            chosen[inside] = self._epoch(epoch)[position[inside] % self.samples]
        return chosen

    def _epoch(self, epoch: int) -> Int[Tensor, " N"]:
        if self._permutation is None or self._permutation[0] != epoch:
            source = generator(self.options.seed, Purpose.ORDER, epoch)
            self._permutation = epoch, torch.randperm(self.samples, generator=source)
        return self._permutation[1]


def cut(
    x: Float[Tensor, "B C H W"], corners: Int[Tensor, "B 2"], crop: Sequence[int]
) -> Float[Tensor, "B C h w"]:
    """Cut a part of size ``crop`` out of each state, from its own corner on."""
    parts = [
        state[..., i : i + crop[0], j : j + crop[1]]
        for state, (i, j) in zip(x, corners.tolist(), strict=True)
    ]
    return torch.stack(parts)


class TensorLoader:
    """Endless shuffled batches of samples held in memory.

    Args:
        fields: ``(N, C, H, W)`` normalised states, on the device to train on.
        options: How batches are put together.
        condition: Of each sample ``(N, D)`` or ``(N, D, H, W)``, or None.
        frames: ``(N, P)`` indices of the states that make up each sample; None if each is one.

    Raises:
        InputError: As :class:`Order`.
    """

    def __init__(
        self,
        fields: Float[Tensor, "N C H W"],
        options: BatchOptions,
        condition: Tensor | None = None,
        frames: Int[Tensor, "N P"] | None = None,
    ) -> None:
        count = len(fields if frames is None else frames)
        self.order = Order(options, count, fields.shape[-2:])
        self.fields, self.condition = fields, condition
        self.frames = None if frames is None else frames.to(fields.device)

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """States and conditions of this rank, from step ``start`` on."""
        crop = self.order.options.crop
        for step in itertools.count(start):
            draw = self.order(step)
            chosen = draw.samples.to(self.fields.device, non_blocking=True)
            if self.frames is None:
                x = self.fields[chosen]
            else:
                x = self.fields[self.frames[chosen]].flatten(1, 2)
            if crop is not None and draw.corners is not None:
                x = cut(x, draw.corners, crop)
            if draw.moves is not None:
                x = move(x, draw.moves)
            yield x, None if self.condition is None else self.condition[chosen]

    def close(self) -> None:
        """Nothing to end."""
