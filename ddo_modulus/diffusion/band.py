# SPDX-License-Identifier: Apache-2.0
"""The functions that are resolved on the training grid and on another grid.

Axes: ``B`` batch, ``C`` channel, ``K`` coefficients of the shared functions, ``N`` coefficients of
the other grid's basis.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.fields.basis import Basis


class Band:
    """The functions that the bases of two grids have in common.

    Args:
        training: Basis of the training grid.
        other: Basis of the other grid, which may be the training grid.

    Attributes:
        basis: The shared functions, on the coarser of the two grids.
    """

    def __init__(self, training: Basis, other: Basis) -> None:
        same = other.shape == training.shape
        self.basis = training if training.resolves(other.shape) else other
        self._size = other.size
        self._index: dict[torch.device, Tensor] = {}
        if not same and self.basis is training:
            self._index[torch.device("cpu")] = training.shared(other)[1]

    def narrow(self, z: Float[Tensor, "B C N"]) -> Float[Tensor, "B C K"]:
        """Select the coefficients of the shared functions from those on the other grid."""
        return z[..., self._index_on(z.device)] if self._index else z

    def widen(self, c: Float[Tensor, "B C K"]) -> Float[Tensor, "B C N"]:
        """Coefficients on the other grid from those of the shared functions; zero elsewhere."""
        if not self._index:
            return c
        z = c.new_zeros(*c.shape[:2], self._size)
        return z.index_copy(2, self._index_on(c.device), c)

    def _index_on(self, device: torch.device) -> Tensor:
        """Indices of the shared functions on the other grid; copied to a device once."""
        if device not in self._index:
            with lasting():
                self._index[device] = self._index[torch.device("cpu")].to(device)
        return self._index[device]
