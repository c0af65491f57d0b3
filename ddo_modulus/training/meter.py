# SPDX-License-Identifier: Apache-2.0
"""Training losses, and samples a second."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.training.distributed import total


class Meter:
    """Losses of the steps, and samples a second.

    Losses stay on the device until they are needed, and are then averaged over the ranks step by
    step. So a mean over steps does not depend on when losses were collected.

    Args:
        batch: Samples in a step, over all ranks.
        ranks: Number of processes.
        may_skip: Whether the optimiser skips steps without a finite loss (half precision with a
            scaled loss). Otherwise such a step has spoilt the weights.

    Attributes:
        losses: Of the steps since the last :meth:`mean`.
    """

    def __init__(self, batch: int, ranks: int, *, may_skip: bool) -> None:
        self.batch, self.ranks, self.may_skip = batch, ranks, may_skip
        self.losses: list[float] = []
        self._pending: list[Tensor] = []
        self._steps = 0
        self._since = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Add the loss of a step on this rank."""
        self._pending.append(loss)
        self._steps += 1

    def collect(self) -> list[float]:
        """Losses of the steps since the last call. All ranks call it at the same steps.

        Raises:
            InputError: If training has diverged.
        """
        if not self._pending:
            return []
        losses = (total(torch.stack(self._pending).double()) / self.ranks).tolist()
        self._pending = []
        self.losses += losses
        finite = [math.isfinite(loss) for loss in losses]
        if not (any(finite) if self.may_skip else all(finite)):
            raise InputError(
                f"training has diverged (the loss is {losses[-1]}): lower trainer.learning_rate, "
                "or try trainer.precision=fp32"
            )
        return losses

    def mean(self) -> float:
        """Mean loss since the last call."""
        self.collect()
        losses, self.losses = self.losses, []
        return mean(losses)

    def rate(self) -> float:
        """Samples a second since :meth:`restart`."""
        return self._steps * self.batch / max(time.perf_counter() - self._since, 1e-9)

    def restart(self) -> None:
        """Restart the clock, after something that was not training."""
        self._since, self._steps = time.perf_counter(), 0


def mean(losses: list[float]) -> float:
    """Mean, independent of the order."""
    return math.fsum(losses) / len(losses)
