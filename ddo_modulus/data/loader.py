# SPDX-License-Identifier: Apache-2.0
"""Batches of normalised states for training: their order, their transformations, their loaders.

Every loader gives the same batches for the same seed (:class:`Order`); they differ in where the
states are meanwhile: in memory (:class:`TensorLoader`), or in a store that is read on the way
(:class:`~ddo_modulus.data.stream.StreamLoader`, :class:`~ddo_modulus.data.dali.DaliLoader`).

A sample is a state, or several that make up a window in time: their channels come one after the
other, the first frame's first.

Axes: ``N`` samples, ``P`` states of a sample, ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.errors import InputError


class Loader(Protocol):
    """An endless source of batches."""

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """States and conditions of this rank from optimiser step ``start`` on."""
        ...

    def close(self) -> None:
        """End the processes that read; the loader gives no batches after."""
        ...


@dataclass(frozen=True)
class Symmetry:
    """Transformations that leave the law of a periodic field unchanged, applied at random.

    Attributes:
        roll: Steps, in points along rows and columns, by which the field may be shifted any number
            of times; 0 for not at all.
        rotate: Whether it may be turned by 180 degrees.
        glide: Rows by which it may be shifted together with a change of sign and a mirroring of
            the columns; 0 for not at all. (Kolmogorov flow: half a period of the forcing.)
    """

    roll: tuple[int, int] = (0, 0)
    rotate: bool = False
    glide: int = 0

    def __call__(
        self, x: Float[Tensor, "B C H W"], generator: torch.Generator
    ) -> Float[Tensor, "B C H W"]:
        """Transform each state by its own draw."""
        return move(x, self.draw(len(x), x.shape[-2:], generator))

    def draw(
        self, count: int, shape: Sequence[int], generator: torch.Generator
    ) -> Int[Tensor, "B 5"]:
        """Moves of ``count`` states on a grid ``(H, W)``, as :func:`move` takes them."""

        def choice(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator, device=generator.device)

        one = torch.ones(count, dtype=torch.long, device=generator.device)
        # The point shown at index i is the state's own at step * i + offset.
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
        moves: Of each state: step and offset of the row that it shows, step and offset of the
            column, and a sign.
    """
    row_step, row, column_step, column, sign = moves.to(x.device, non_blocking=True).T[..., None]
    height, width = x.shape[-2:]
    rows = (row_step * torch.arange(height, device=x.device) + row) % height
    columns = (column_step * torch.arange(width, device=x.device) + column) % width
    state = torch.arange(len(x), device=x.device)[:, None, None]
    moved = x[state, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return moved * sign[:, :, None, None].to(x.dtype)


@dataclass(frozen=True)
class Draw:
    """What one rank takes in one step.

    Attributes:
        samples: ``(B,)`` numbers of the samples.
        corners: ``(B, 2)`` first row and column of each one's window, or None.
        moves: ``(B, 5)`` as :func:`move` takes them, or None.
    """

    samples: Int[Tensor, " B"]
    corners: Int[Tensor, "B 2"] | None
    moves: Int[Tensor, "B 5"] | None


class Order:
    """Which samples make up the batch of each step, and how each is cut out and transformed.

    The samples of all steps are an endless chain of permutations, one an epoch. Permutations
    follow from the seed and the epoch alone, and all else from the seed and the step, for the
    whole batch; then rank ``r`` of ``n`` takes the places ``r, r + n, ...``. Hence the batch of a
    step does not depend on the number of ranks, all ranks go on for ever, and a run that starts at
    step ``n`` sees what an uninterrupted one would have seen.

    Args:
        samples: How many there are.
        batch: Samples in a batch, over all ranks.
        shape: Grid ``(H, W)`` of the samples.
        seed: Of order, windows and moves.
        crop: Size ``(h, w)`` of a window drawn at random from each state; None takes it whole.
        symmetry: Random transformations of the states (of the windows, if there are any).
        rank: This process.
        ranks: Number of processes; divides the batch.

    Raises:
        InputError: If there are no samples, the batch cannot be shared out, or the window does not
            fit into the grid.
    """

    def __init__(
        self,
        samples: int,
        batch: int,
        shape: Sequence[int],
        *,
        seed: int = 0,
        crop: Sequence[int] | None = None,
        symmetry: Symmetry | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch % ranks:
            raise InputError(f"a batch of {batch} cannot be shared out to {ranks} ranks")
        if samples < 1:
            raise InputError("there are no samples to train on")
        height, width = shape
        if crop is not None and not (0 < crop[0] <= height and 0 < crop[1] <= width):
            raise InputError(
                f"data.crop={list(crop)} does not fit into the grid of {height}x{width} points"
            )
        self.samples, self.batch, self.seed = samples, batch, seed
        self.shape = (height, width)
        self.crop = None if crop is None else (int(crop[0]), int(crop[1]))
        self.symmetry, self.rank, self.ranks = symmetry, rank, ranks
        self._permutation: tuple[int, Tensor] | None = None
        self._drawn: tuple[int, Draw] | None = None

    @property
    def share(self) -> int:
        """Samples of a batch that this rank takes."""
        return self.batch // self.ranks

    def __call__(self, step: int) -> Draw:
        """What this rank takes in a step."""
        if self._drawn is None or self._drawn[0] != step:
            # A third number keeps this stream apart from the permutations'.
            generator = torch.Generator().manual_seed(hash((self.seed, step, 0)) % 2**63)
            moves, corners = None, None
            if self.symmetry is not None:
                moves = self.symmetry.draw(self.batch, self.crop or self.shape, generator)
            if self.crop is not None:
                room = [n - k + 1 for n, k in zip(self.shape, self.crop, strict=True)]
                corners = torch.stack(
                    [torch.randint(n, (self.batch,), generator=generator) for n in room], 1
                )
            mine = slice(self.rank, None, self.ranks)
            self._drawn = (
                step,
                Draw(
                    self._samples(step)[mine],
                    None if corners is None else corners[mine],
                    None if moves is None else moves[mine],
                ),
            )
        return self._drawn[1]

    def _samples(self, step: int) -> Int[Tensor, " B"]:
        position = torch.arange(step * self.batch, (step + 1) * self.batch)
        epochs = position // self.samples
        chosen = torch.empty(self.batch, dtype=torch.long)
        for epoch in epochs.unique().tolist():
            inside = epochs == epoch
            chosen[inside] = self._epoch(epoch)[position[inside] % self.samples]
        return chosen

    def _epoch(self, epoch: int) -> Int[Tensor, " N"]:
        if self._permutation is None or self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
            self._permutation = epoch, torch.randperm(self.samples, generator=generator)
        return self._permutation[1]


def window(
    x: Float[Tensor, "B C H W"], corners: Int[Tensor, "B 2"], crop: Sequence[int]
) -> Float[Tensor, "B C h w"]:
    """Cut a window of size ``crop`` out of each state, at its own corner."""
    parts = [
        state[..., i : i + crop[0], j : j + crop[1]]
        for state, (i, j) in zip(x, corners.tolist(), strict=True)
    ]
    return torch.stack(parts)


class TensorLoader:
    """Endless shuffled batches of samples held in memory.

    Args:
        fields: ``(N, C, H, W)`` normalised states, on the device to train on.
        condition: Of each sample ``(N, D)`` or ``(N, D, H, W)``, or None.
        frames: ``(N, P)`` numbers of the states that make up each sample; None if each is one.
        batch: Samples in a batch, over all ranks.
        seed: Of the order of samples and of their random transformations.
        symmetry: Random transformations of the states.
        crop: Size ``(h, w)`` of a window drawn at random from each state; None takes it whole.
        rank: This process.
        ranks: Number of processes; divides the batch.

    Raises:
        InputError: As :class:`Order`.
    """

    def __init__(
        self,
        fields: Float[Tensor, "N C H W"],
        condition: Tensor | None = None,
        *,
        frames: Int[Tensor, "N P"] | None = None,
        batch: int,
        seed: int = 0,
        symmetry: Symmetry | None = None,
        crop: Sequence[int] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.order = Order(
            len(fields if frames is None else frames),
            batch,
            fields.shape[-2:],
            seed=seed,
            crop=crop,
            symmetry=symmetry,
            rank=rank,
            ranks=ranks,
        )
        self.fields, self.condition = fields, condition
        self.frames = None if frames is None else frames.to(fields.device)

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """States and conditions of this rank, from step ``start`` on."""
        step = start
        while True:
            draw = self.order(step)
            chosen = draw.samples.to(self.fields.device, non_blocking=True)
            if self.frames is None:
                x = self.fields[chosen]
            else:
                x = self.fields[self.frames[chosen]].flatten(1, 2)
            if self.order.crop is not None and draw.corners is not None:
                x = window(x, draw.corners, self.order.crop)
            if draw.moves is not None:
                x = move(x, draw.moves)
            yield x, None if self.condition is None else self.condition[chosen]
            step += 1

    def close(self) -> None:
        """Nothing to end."""
