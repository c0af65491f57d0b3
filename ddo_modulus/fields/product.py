# SPDX-License-Identifier: Apache-2.0
r"""Covariance of a state with a Gaussian prior and an independent estimate of it.

Axes: ``T`` analyses, ``C`` channel, ``H W`` grid, ``K`` spectral coefficients, ``N = C K``, ``n``
coefficients that EOFs mix.

Let the prior have the covariance :math:`S`, and let :math:`x_b = x_0 + e` with
:math:`e \sim N(0, B)` be the estimate. The product of both densities has the precision

.. math:: P^{-1} = S^{-1} + B^{-1} .

The whitened coefficients of the estimate have independent errors, of precision
:math:`q_k = C_k / B_k` in units of the noise covariance :math:`C`. The prior may correlate
coefficients. The product correlates the same ones, and is diagonal after a rotation of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField
from ddo_modulus.fields.rotation import ChannelRotation, Rotation, SubsetRotation


class ProductField:
    """Covariance of a state with a Gaussian prior and an estimate with homogeneous errors.

    Args:
        prior: Prior covariance.
        error: Error covariance of the estimate, on the basis of the prior.
        inflation: Factor on the prior covariance; ``(T,)`` for one factor per analysis.
    """

    def __init__(
        self,
        prior: GaussianField | EOFField | CoupledField | ProductField,
        error: GaussianField,
        inflation: Float[Tensor, " T"] | float = 1.0,
    ) -> None:
        self.prior, self.error = prior, error
        self.inflation = torch.as_tensor(inflation, dtype=torch.float64).reshape(-1)

    def at(self, shape: Sequence[int]) -> ProductField:
        """The same product on another grid."""
        return ProductField(self.prior.at(shape), self.error.at(shape), self.inflation)

    def relative_to(
        self, reference: GaussianField
    ) -> tuple[Float[Tensor, "*T N"], Rotation | None]:
        """Covariance in the whitened coefficients of a field, as variances and a rotation.

        Raises:
            InputError: If prior, error and reference do not share their basis and channels.
        """
        variance, rotation = self.prior.relative_to(reference)
        of_prior = 1 / (self.inflation[:, None] * variance.double())  # (T, N)
        q = 1 / self.error.relative_to(reference)[0].double()
        if rotation is None:
            return 1 / (of_prior + q), None
        if isinstance(rotation, SubsetRotation):
            index, vectors = rotation.index, rotation.vectors.double()
            mixed = q[index]
            if not torch.allclose(mixed, mixed[:1], rtol=1e-9, atol=0):
                precision = (vectors * of_prior[:, None, index]) @ vectors.mT + torch.diag(mixed)
                values, vectors = torch.linalg.eigh(precision)
                total = of_prior + q
                total[:, index] = values
                return 1 / total, SubsetRotation(index, vectors[0] if len(total) == 1 else vectors)
            return 1 / (of_prior + q), rotation  # equal precisions are diagonal in every rotation
        assert isinstance(rotation, ChannelRotation)
        channels = reference.channels
        vectors = rotation.vectors.double()
        by_mode = of_prior.unflatten(1, (channels, -1)).mT  # T K C
        precision = (vectors * by_mode[:, :, None]) @ vectors.mT
        precision = precision + torch.diag_embed(q.unflatten(0, (channels, -1)).mT)
        values, vectors = torch.linalg.eigh(precision)
        variance = (1 / values).mT.flatten(1)
        return variance, ChannelRotation(vectors[0] if len(values) == 1 else vectors)
