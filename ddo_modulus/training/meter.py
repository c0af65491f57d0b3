# SPDX-License-Identifier: Apache-2.0
"""How the loss falls, and how fast."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.training.distributed import total


class Meter:
    """Losses of the steps, and samples a second.

    Losses stay on the device until they are asked for, and are then averaged over the ranks step by
    step: sums over them do not depend on when that was.

    Args:
        batch: Samples in a step, over all ranks.
        ranks: Number of processes.
        may_skip: Whether a step without a finite loss does no harm (half precision with a scaled
            loss); elsewhere it has spoilt the weights.

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
        """Note the loss of a step on this rank."""
        self._pending.append(loss)
        self._steps += 1

    def collect(self) -> list[float]:
        """Losses of the steps since the last call; all ranks call it at the same steps.

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
        """Start the clock anew, after something that is no training."""
        self._since, self._steps = time.perf_counter(), 0


def mean(losses: list[float]) -> float:
    """Mean, whatever the order."""
    return math.fsum(losses) / len(losses)
