# SPDX-License-Identifier: Apache-2.0
"""Averages of the weights."""

from __future__ import annotations

import copy

import torch

from ddo_modulus.compat import move_towards
from ddo_modulus.diffusion.operator import DiffusionOperator


class PowerAverage:
    """Power-function average of an operator's parameters (Karras et al. 2024, arXiv 2312.02696).

    The weights of step ``t`` count by ``t^gamma``, with gamma such that the average is about
    ``width * t`` steps wide. torch's ``AveragedModel`` makes the CPU wait for the GPU at every
    step.

    Args:
        operator: What to average; copied.
        width: Width of the average, as a fraction of the steps so far.

    Attributes:
        module: The operator with averaged parameters.
        count: Updates so far.
    """

    def __init__(self, operator: DiffusionOperator, width: float) -> None:
        self.module = copy.deepcopy(operator).eval()
        self.width, self.count = width, 0
        self._averages = list(self.module.parameters())

    @torch.no_grad()
    def update_parameters(self, operator: DiffusionOperator) -> None:
        """Take in the present parameters."""
        share = min(1.0, 1.0 / (self.width * (self.count + 1))) if self.count else 1.0
        move_towards(self._averages, list(operator.parameters()), share)
        self.count += 1
