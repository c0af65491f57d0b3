# SPDX-License-Identifier: Apache-2.0
"""Derivatives of functions of a noisy state, as products with the transposed Jacobian.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

#: The map ``v -> J^T v``; it may be called any number of times.
Pullback = Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B C H W"]]


class Differentiable(ABC):
    """Base class of denoisers that are differentiated automatically."""

    @abstractmethod
    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states, given noisy ones."""

    def value_and_pullback(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Pullback]:
        """Expected clean states, and the map ``v -> J^T v`` for their Jacobian ``J``.

        Args:
            x: Noisy states.
            sigma: Noise levels.
            condition: Further input, ``(B, D, H, W)``.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            clean = self(x, sigma, condition)

        def pullback(v: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
            return torch.autograd.grad(clean, x, v, retain_graph=True)[0]

        return clean.detach(), pullback
