# SPDX-License-Identifier: Apache-2.0
"""Batches of normalised states for training.

Axes: ``N`` samples, ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.errors import InputError


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
        batch, _, height, width = x.shape

        def draw(high: int) -> Tensor:
            return torch.randint(high, (batch,), generator=generator, device=generator.device)

        rows = torch.arange(height).to(x.device).expand(batch, -1)
        columns = torch.arange(width).to(x.device).expand(batch, -1)
        if self.roll[0]:
            rows = rows + self.roll[0] * draw(height // self.roll[0]).to(x.device)[:, None]
        if self.roll[1]:
            columns = columns + self.roll[1] * draw(width // self.roll[1]).to(x.device)[:, None]
        if self.rotate:
            turn = draw(2).bool().to(x.device)[:, None]
            rows, columns = (torch.where(turn, -1 - i, i) for i in (rows, columns))
        if self.glide:
            mirror = draw(2).bool().to(x.device)[:, None]
            rows = torch.where(mirror, rows + self.glide, rows)
            columns = torch.where(mirror, -1 - columns, columns)
            x = torch.where(mirror[:, :, None, None], -x, x)
        state = torch.arange(batch, device=x.device)[:, None, None]
        return x[state, :, rows[:, :, None] % height, columns[:, None] % width].movedim(-1, 1)


class TensorLoader:
    """Endless shuffled batches of samples held in memory; each rank takes its share.

    Every epoch is one permutation, drawn from the seed and the epoch alone, so a run that starts at
    step ``n`` sees what an uninterrupted one would have seen.

    Args:
        fields: ``(N, C, H, W)`` normalised states, on the device to train on.
        condition: ``(N, D)`` or ``(N, D, H, W)``, or None.
        batch: Samples in a batch, over all ranks.
        seed: Of the order of samples and the symmetries.
        symmetry: Random transformations of the states.
        rank: This process.
        ranks: Number of processes; divides the batch.

    Raises:
        InputError: If there are fewer samples than a batch takes, or it cannot be shared out.
    """

    def __init__(
        self,
        fields: Float[Tensor, "N C H W"],
        condition: Tensor | None = None,
        *,
        batch: int,
        seed: int = 0,
        symmetry: Symmetry | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch % ranks:
            raise InputError(f"a batch of {batch} cannot be shared out to {ranks} ranks")
        if len(fields) < 1:
            raise InputError("there are no samples to train on")
        self.fields, self.condition = fields, condition
        self.batch, self.seed, self.symmetry = batch, seed, symmetry
        self.rank, self.ranks = rank, ranks

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """States and conditions of this rank, from step ``start`` on."""
        share = self.batch // self.ranks
        step = start
        while True:
            chosen = self.indices(step)[self.rank * share : (self.rank + 1) * share]
            chosen = chosen.to(self.fields.device)
            x = self.fields[chosen]
            if self.symmetry is not None:
                generator = torch.Generator().manual_seed(
                    hash((self.seed, step, self.rank)) % 2**63
                )
                x = self.symmetry(x, generator)
            yield x, None if self.condition is None else self.condition[chosen]
            step += 1

    def indices(self, step: int) -> Int[Tensor, " B"]:
        """Samples in a batch: positions in an endless chain of permutations."""
        first, count = step * self.batch, len(self.fields)
        position = torch.arange(first, first + self.batch)
        epochs = position // count
        chosen = torch.empty(self.batch, dtype=torch.long)
        for epoch in epochs.unique().tolist():
            inside = epochs == epoch
            chosen[inside] = self._permutation(epoch)[position[inside] % count]
        return chosen

    def _permutation(self, epoch: int) -> Int[Tensor, " N"]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
            self._epoch = epoch
            self._order = torch.randperm(len(self.fields), generator=generator)
        return self._order
