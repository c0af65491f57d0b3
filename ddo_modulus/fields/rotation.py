# SPDX-License-Identifier: Apache-2.0
r"""Rotations of whitened coefficients to coordinates in which a covariance is diagonal.

Axes: ``B`` batch, ``T`` analyses (a divisor of ``B``), ``C`` channel, ``K`` spectral coefficients,
``N = C K`` (channel-major).

With a covariance :math:`E\,\mathrm{diag}(s)\,E^T` of the coefficients :math:`z`, the coordinates
are :math:`a = E^T z`. A rotation :math:`E` that mixes everything would be a matrix of ``N^2``
numbers; those here mix some coefficients, or the channels of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.errors import InputError


class Rotation(Protocol):
    """An orthogonal matrix ``E``, or one for each analysis."""

    @property
    def analyses(self) -> int:
        """How many matrices there are; the members of an analysis stand next to each other."""
        ...

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
            ``(T, n, n)`` if analyses differ.
    """

    index: Int[Tensor, " n"]
    vectors: Float[Tensor, "*T n n"]

    @property
    def analyses(self) -> int:
        """See :class:`Rotation`."""
        return 1 if self.vectors.ndim == 2 else len(self.vectors)

    def __call__(self, z: Float[Tensor, "B N"], *, back: bool = False) -> Float[Tensor, "B N"]:
        """See :class:`Rotation`."""
        vectors = self.vectors.mT if back else self.vectors
        mixed = z[:, self.index]
        if vectors.ndim == 3:
            mixed = (_by_analysis(mixed, len(vectors)) @ vectors).flatten(0, 1)
        else:
            mixed = mixed @ vectors
        return z.index_copy(1, self.index, mixed)

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
            axis of coordinate ``j K + k``. ``(T, K, C, C)`` if analyses differ.
    """

    vectors: Float[Tensor, "*T K C C"]

    @property
    def analyses(self) -> int:
        """See :class:`Rotation`."""
        return 1 if self.vectors.ndim == 3 else len(self.vectors)

    def __call__(self, z: Float[Tensor, "B N"], *, back: bool = False) -> Float[Tensor, "B N"]:
        """See :class:`Rotation`."""
        vectors = self.vectors.mT if back else self.vectors
        by_mode = z.unflatten(1, (vectors.shape[-1], -1))  # B C K
        if vectors.ndim == 4:
            by_mode = _by_analysis(by_mode, len(vectors)).permute(0, 3, 1, 2)  # T K b C
            return (by_mode @ vectors).permute(0, 2, 3, 1).flatten(0, 1).flatten(1)
        return (by_mode.permute(2, 0, 1) @ vectors).permute(1, 2, 0).flatten(1)

    def marginal(self, variance: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """See :class:`Rotation`."""
        by_mode = variance.unflatten(0, (self.vectors.shape[1], -1)).mT[..., None]  # K C 1
        return (self.vectors.to(variance).square() @ by_mode)[..., 0].mT.flatten()

    def to(self, like: Tensor) -> ChannelRotation:
        """See :class:`Rotation`."""
        return ChannelRotation(self.vectors.to(like))


def _by_analysis(z: Float[Tensor, "B ..."], analyses: int) -> Float[Tensor, "T b ..."]:
    if len(z) % analyses:
        raise InputError(f"{len(z)} states cannot be shared out to {analyses} analyses")
    return z.unflatten(0, (analyses, -1))
