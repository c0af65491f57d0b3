# SPDX-License-Identifier: Apache-2.0
"""The functions that the training grid shares with another grid.

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
    """The functions that the training basis shares with the basis of another grid.

    Args:
        training: Basis of the training grid.
        other: Basis of the other grid, which may be the same.

    Attributes:
        basis: The shared functions, on the coarser one of the two grids.
    """

    def __init__(self, training: Basis, other: Basis) -> None:
        same = other.shape == training.shape
        self.basis = training if training.resolves(other.shape) else other
        self._size = other.size
        self._index: dict[torch.device, Tensor] = {}
        if not same and self.basis is training:
            self._index[torch.device("cpu")] = training.shared(other)[1]

    def narrow(self, z: Float[Tensor, "B C N"]) -> Float[Tensor, "B C K"]:
        """Coefficients of the shared functions, out of those of the other grid's basis."""
        return z[..., self._index_on(z.device)] if self._index else z

    def widen(self, c: Float[Tensor, "B C K"]) -> Float[Tensor, "B C N"]:
        """The reverse; zero outside the band."""
        if not self._index:
            return c
        z = c.new_zeros(*c.shape[:2], self._size)
        return z.index_copy(2, self._index_on(c.device), c)

    def _index_on(self, device: torch.device) -> Tensor:
        """Places of the shared coefficients among the other grid's; copied to a device once."""
        if device not in self._index:
            with lasting():
                self._index[device] = self._index[torch.device("cpu")].to(device)
        return self._index[device]
