# SPDX-License-Identifier: Apache-2.0
"""A Gaussian prior as buffers of an operator, as stored in checkpoints.

Axes: ``C`` channel, ``K`` spectral coefficients, ``N = C K``, ``n`` coefficients that EOFs mix.

A covariance matrix tolerates rounding to half precision; its eigenvectors do not. So the lower
triangles of covariances are stored, and diagonalised when the prior is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.gaussian_denoiser import PriorCovariance
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, MeasuredSpectrum
from ddo_modulus.fields.refinement import Refinement
from ddo_modulus.fields.rotation import SubsetRotation


@dataclass(frozen=True, eq=False)
class StoredPrior:
    """Covariance of the whitened coefficients: diagonal, with EOFs, or between channels.

    Attributes:
        prior_variance: ``(N,)`` diagonal of the covariance.
        eof_index: ``(n,)`` int32, indices of the coefficients that EOFs mix; empty without EOFs.
        eof_covariance: Lower triangle of the covariance of these coefficients.
        coupling: ``(K, C (C + 1) / 2)`` lower triangles of the covariance between channels of each
            coefficient; None if channels are independent.
    """

    prior_variance: Float[Tensor, " N"]
    eof_index: Int[Tensor, " n"]
    eof_covariance: Float[Tensor, " t"]
    coupling: Float[Tensor, "K t"] | None

    @classmethod
    def identity(cls, channels: int, size: int, eof_modes: int, *, coupled: bool) -> Self:
        """A prior with the covariance of the noise, in float32.

        Args:
            channels: Number of channels ``C``.
            size: Number of coefficients ``K`` of a channel.
            eof_modes: Number of coefficients ``n`` that EOFs mix.
            coupled: Whether there are covariances between channels.
        """
        triangle = torch.eye(channels)[lower_triangle(channels)]
        return cls(
            torch.ones(channels * size),
            torch.arange(eof_modes, dtype=torch.int32),
            torch.eye(eof_modes)[lower_triangle(eof_modes)],
            triangle.expand(size, -1).clone() if coupled else None,
        )

    def write(self, prior: PriorCovariance, noise: GaussianField) -> None:
        """Write a prior to the buffers.

        Raises:
            InputError: If the prior does not fit the noise field, or the buffers are of another
                kind.
        """
        variance, rotation = prior.relative_to(noise)
        if isinstance(prior, CoupledField) != (self.coupling is not None):
            raise InputError("a coupled prior is for an operator that was built with coupled=True")
        if self.coupling is not None and isinstance(prior, CoupledField):
            covariance = prior.covariance
            self.coupling.copy_(covariance[:, *lower_triangle(noise.channels)])
            self.prior_variance.copy_(covariance.diagonal(dim1=1, dim2=2).mT.flatten())
            return
        mixed = len(rotation.index) if isinstance(rotation, SubsetRotation) else 0
        if mixed != len(self.eof_index):
            raise InputError(
                f"the prior mixes {mixed} coefficients, eof_modes={len(self.eof_index)}"
            )
        self.prior_variance.copy_(variance)
        if isinstance(rotation, SubsetRotation):
            index, vectors = rotation.index, rotation.vectors
            block = (vectors * variance[index]) @ vectors.mT
            self.eof_index.copy_(index)
            self.eof_covariance.copy_(block[lower_triangle(mixed)])

    def read(self, noise: GaussianField, refinement: Refinement) -> PriorCovariance:
        """Read the prior from the buffers, in float64 on the CPU.

        Args:
            noise: Noise field; the buffers describe its whitened coefficients.
            refinement: Assumptions beyond the grid of the noise field.
        """
        variance = _exact(self.prior_variance)
        if self.coupling is not None:
            covariance = _symmetric(_exact(self.coupling), noise.channels)
            return CoupledField(noise, covariance, refinement)
        if len(self.eof_index):
            block = _symmetric(_exact(self.eof_covariance), len(self.eof_index))
            index, unit = self.eof_index.long().cpu(), torch.eye(len(block), dtype=block.dtype)
            if torch.equal(block, unit):  # a new operator: no eigenvectors to compute
                return EOFField(noise, variance.index_fill(0, index, 1.0), index, unit, refinement)
            return EOFField.from_covariance(noise, block, index, variance, refinement=refinement)
        spectrum = variance.unflatten(0, (noise.channels, -1)) * noise.variance
        measured = MeasuredSpectrum(noise.basis, spectrum, refinement=refinement)
        return GaussianField(noise.basis, measured)


def check_state(state: Mapping[str, Tensor], what: str = "the operator") -> None:
    """Refuse the state of an operator with a number that cannot be used.

    Args:
        state: Parameters and buffers by name.
        what: What messages call it.

    Raises:
        InputError: If a value is NaN or infinite, or a variance is not positive.
    """
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(
                f"{what} holds values in {name} that are NaN or infinite; they are damaged, or "
                "training diverged: take another checkpoint or copy"
            )
        own = name.rpartition(".")[2]
        if own in _DIAGONALS and not bool((_DIAGONALS[own](value) > 0).all()):
            raise InputError(
                f"{what} holds a variance in {name} that is not positive; it is damaged"
            )


def _triangle_diagonal(triangle: Float[Tensor, "*K t"]) -> Float[Tensor, "*K n"]:
    """Diagonals of symmetric matrices from their lower triangles, row by row."""
    size = round(((8 * triangle.shape[-1] + 1) ** 0.5 - 1) / 2)
    row = torch.arange(size, device=triangle.device)
    return triangle[..., row * (row + 3) // 2]


#: Variances in the buffers of a prior, by the name of the buffer.
_DIAGONALS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "prior_variance": lambda variance: variance,
    "eof_covariance": _triangle_diagonal,
    "coupling": _triangle_diagonal,
}


def lower_triangle(size: int) -> tuple[Tensor, Tensor]:
    """Row and column of the entries of a lower triangle."""
    row, column = torch.tril_indices(size, size)
    return row, column


def _exact(buffer: Tensor) -> Tensor:
    return buffer.detach().double().cpu()


def _symmetric(triangle: Float[Tensor, "*K t"], size: int) -> Float[Tensor, "*K n n"]:
    """Symmetric matrices from their lower triangles."""
    matrix = triangle.new_zeros(*triangle.shape[:-1], size, size)
    matrix[..., *lower_triangle(size)] = triangle
    return matrix + matrix.tril(-1).mT
