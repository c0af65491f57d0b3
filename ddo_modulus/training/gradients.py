# SPDX-License-Identifier: Apache-2.0
"""Gradients at fixed addresses, where a CUDA graph of the loss can add to them (:class:`.Replay`).

The optimiser is not part of the graph; its few fused kernels are launched while the graph runs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


class FlatGradients:
    """Gradients of parameters as views of one tensor: fixed addresses, and one message to sum them.

    Args:
        parameters: What to give gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        real = [torch.view_as_real(p) if p.is_complex() else p for p in self.parameters]
        sizes = [p.numel() for p in real]
        self.values = torch.zeros(sum(sizes), device=self.parameters[0].device)
        pieces = self.values.split(sizes)
        for parameter, part, piece in zip(self.parameters, real, pieces, strict=True):
            piece = piece.view_as(part)
            parameter.grad = torch.view_as_complex(piece) if parameter.is_complex() else piece

    def zero(self) -> None:
        """Set all gradients to zero."""
        self.values.zero_()

    def average(self, ranks: int) -> None:
        """Average over the ranks, on each of them."""
        if ranks > 1:
            dist.all_reduce(self.values)
            self.values.div_(ranks)
