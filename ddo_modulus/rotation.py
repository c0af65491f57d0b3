# SPDX-License-Identifier: Apache-2.0
r"""Rotations of whitened coefficients to coordinates in which a covariance is diagonal.

Axes: ``B`` batch, ``C`` channel, ``K`` spectral coefficients, ``N = C K`` (channel-major).

With a covariance :math:`E\,\mathrm{diag}(s)\,E^T` of the coefficients :math:`z`, the coordinates
are :math:`a = E^T z`. A rotation :math:`E` that mixes everything would be a matrix of ``N^2``
numbers; those here mix some coefficients, or the channels of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor


class Rotation(Protocol):
    """An orthogonal matrix ``E``."""

    def __call__(self, z: Float[Tensor, "B N"], *, back: bool = False) -> Float[Tensor, "B N"]:
        """Coefficients to coordinates, ``E^T z``; with ``back``, the reverse."""
        ...

    def marginal(self, variance: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Variances of the coefficients, from those of the coordinates."""
        ...

    def to(self, like: Tensor) -> Rotation:
        """The same in the dtype and on the device of ``like``."""
        ...


@dataclass(frozen=True, eq=False)
class SubsetRotation:
    """Mixes some of the coefficients.

    Attributes:
        index: ``(n,)`` which.
        vectors: ``(n, n)`` orthogonal; column ``i`` is the axis of coordinate ``index[i]``.
    """

    index: Int[Tensor, " n"]
    vectors: Float[Tensor, "n n"]

    def __call__(self, z: Float[Tensor, "B N"], *, back: bool = False) -> Float[Tensor, "B N"]:
        """See :class:`Rotation`."""
        vectors = self.vectors.mT if back else self.vectors
        return z.index_copy(1, self.index, z[:, self.index] @ vectors)

    def marginal(self, variance: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """See :class:`Rotation`."""
        mixed = self.vectors.to(variance).square() @ variance[self.index]
        return variance.index_copy(0, self.index, mixed)

    def to(self, like: Tensor) -> SubsetRotation:
        """See :class:`Rotation`."""
        return SubsetRotation(self.index.to(like.device), self.vectors.to(like))


@dataclass(frozen=True, eq=False)
class ChannelRotation:
    """Mixes the channels of each coefficient.

    Attributes:
        vectors: ``(K, C, C)`` orthogonal; column ``j`` of the matrix of coefficient ``k`` is the
            axis of coordinate ``j K + k``.
    """

    vectors: Float[Tensor, "K C C"]

    def __call__(self, z: Float[Tensor, "B N"], *, back: bool = False) -> Float[Tensor, "B N"]:
        """See :class:`Rotation`."""
        vectors = self.vectors.mT if back else self.vectors
        by_mode = z.unflatten(1, (vectors.shape[1], -1)).permute(2, 0, 1)  # K B C
        return (by_mode @ vectors).permute(1, 2, 0).flatten(1)

    def marginal(self, variance: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """See :class:`Rotation`."""
        by_mode = variance.unflatten(0, (self.vectors.shape[1], -1)).mT[..., None]  # K C 1
        return (self.vectors.to(variance).square() @ by_mode)[..., 0].mT.flatten()

    def to(self, like: Tensor) -> ChannelRotation:
        """See :class:`Rotation`."""
        return ChannelRotation(self.vectors.to(like))
