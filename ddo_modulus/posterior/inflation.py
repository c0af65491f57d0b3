# SPDX-License-Identifier: Apache-2.0
r"""Inflation: scaling the covariance of a prior, by a factor estimated from innovations.

Axes: ``B`` batch, ``T`` analyses, ``C`` channel, ``H W`` grid, ``M`` observations.

A prior learned in one month may be too narrow in the next. If :math:`x_0` is drawn from the prior
with mean :math:`m`, then :math:`m + \sqrt\lambda (x_0 - m)` is a draw from the prior inflated by
:math:`\lambda`. The denoiser of the inflated prior is the original one in scaled units:

.. math:: D_\lambda(x, \sigma) = m + \sqrt\lambda\,
    \left[D\left(m + \frac{x - m}{\sqrt\lambda}, \frac{\sigma}{\sqrt\lambda}\right) - m\right].

The factor of each analysis is the maximum a posteriori estimate from the innovations
:math:`d = y - H(m) \sim N(0, \lambda H P H^T + R)` (Dee 1995, Mon. Wea. Rev. 123, 1128), with the
prior :math:`\log\lambda \sim N(0, w^2)`, so that a few observations cannot move it far from one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.errors import InputError
from ddo_modulus.fields.derivative import Pullback
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.fields.linalg import per_member
from ddo_modulus.observations import Observations
from ddo_modulus.posterior.system import AnalysisSystem, LinearizedSystem


class Inflated:
    """A prior whose covariance is multiplied by a factor; it is a prior itself.

    Args:
        prior: The prior.
        factor: Factor on the covariance: one number, or ``(T,)``, one for each analysis.

    Raises:
        InputError: If a factor is not positive and finite.
    """

    def __init__(self, prior: Prior, factor: float | Float[Tensor, " T"]) -> None:
        self.prior = prior
        self.factor = torch.as_tensor(factor, dtype=torch.float64).reshape(-1)
        if not bool((self.factor.isfinite() & (self.factor > 0)).all()):
            raise InputError(f"inflation factors must be positive and finite, got {factor}")
        self._roots: dict[tuple, Tensor] = {}

    @property
    def noise(self) -> GaussianField:
        """Noise field of the prior."""
        return self.prior.noise

    @cached_property
    def linear(self) -> GaussianDenoiser:
        """Gaussian part of the prior, inflated by the same factor."""
        return self.prior.linear.inflated(self.factor)

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states under the inflated prior."""
        mean, root, wide = self._scaling(x)
        clean = self.prior(mean + (x - mean) / wide, _over(sigma, root), condition)
        return mean + wide * (clean - mean)

    def value_and_pullback(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Pullback]:
        """Expected clean states, and ``v -> J^T v``, which is that of the prior.

        The two scale factors of the chain rule cancel.
        """
        mean, root, wide = self._scaling(x)
        scaled = mean + (x - mean) / wide
        level = _over(sigma, root)
        clean, pullback = self.prior.value_and_pullback(scaled, level, condition)
        return mean + wide * (clean - mean), pullback

    def _scaling(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prior mean, and the square root of each factor as ``(B,)`` and as ``(B, 1, 1, 1)``."""
        key = (x.dtype, str(x.device))
        if key not in self._roots:
            with lasting():
                self._roots[key] = self.factor.sqrt().to(x)
        root = per_member(self._roots[key], len(x))
        mean = self.prior.linear.at(x.shape[-2:]).centre(x)
        return mean, root, root.view(-1, 1, 1, 1)


def _over(sigma: Float[Tensor, " B"], root: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """``sigma / root``, expanded if both arguments are, so that one level stays recognisable."""
    if sigma.stride(0) == root.stride(0) == 0:
        return (sigma[:1] / root[:1]).expand(len(sigma))
    return sigma / root


@dataclass(frozen=True)
class Innovations:
    r"""Innovations in coordinates in which their covariance is diagonal.

    The innovations are scaled by the observation errors and rotated to the eigenvectors of the
    scaled :math:`H P H^T`. With inflation :math:`\lambda` their squares :math:`q` have the
    expectation :math:`1 + \lambda w`.

    Attributes:
        signal: ``(T, M)`` eigenvalues :math:`w` of the scaled :math:`H P H^T`, float64.
        square: ``(T, M)`` squares :math:`q`, float64.
    """

    signal: Float[Tensor, "T M"]
    square: Float[Tensor, "T M"]

    @classmethod
    def of(cls, at: LinearizedSystem) -> Innovations:
        """Innovations relative to the mean of a prior, with the covariance of its Gaussian part.

        Args:
            at: The system at the prior mean of each analysis (:meth:`.AnalysisSystem.at_mean`).
        """
        rows = per_member(at.rows, len(at.innovation))
        error = torch.linalg.cholesky(at.error)
        root = rows * at.linear.variance.sqrt().to(rows)[:, None]
        signal = torch.linalg.solve_triangular(error, root, upper=False)
        innovation = at.innovation[..., None]
        innovation = torch.linalg.solve_triangular(error, innovation, upper=False)
        w, vectors = torch.linalg.eigh(signal @ signal.mT)
        return cls(w.clamp_min(0), (vectors.mT @ innovation)[..., 0].square())

    def inflation(
        self, width: float = 1.0, bounds: tuple[float, float] = (0.2, 15.0)
    ) -> Float[Tensor, " T"]:
        """Most probable factors; arguments as in :func:`innovation_inflation`."""
        low, high = math.log(bounds[0]), math.log(bounds[1])
        logarithm = torch.linspace(low, high, 433, dtype=torch.float64)
        total = 1 + logarithm.exp()[:, None, None] * self.signal
        fit = -0.5 * (total.log() + self.square / total).sum(-1)
        fit = fit - 0.5 * (logarithm[:, None] / width) ** 2
        return logarithm[fit.argmax(0)].exp()

    def chi_square(self, factor: float | Float[Tensor, " T"] = 1.0) -> Float[Tensor, " T"]:
        """Sum of squares over their expectations: about ``M`` if prior and errors are calibrated.

        Args:
            factor: Inflation of the prior.
        """
        factor = torch.as_tensor(factor, dtype=torch.float64).reshape(-1, 1)
        return (self.square / (1 + factor * self.signal)).sum(-1)


def innovation_inflation(
    prior: Prior,
    observations: Observations | AnalysisSystem,
    *,
    width: float = 1.0,
    bounds: tuple[float, float] = (0.2, 15.0),
) -> Float[Tensor, " T"]:
    """Most probable inflation of each analysis, given its innovations.

    Args:
        prior: The prior.
        observations: Observations of one or several analyses, or their system.
        width: Prior standard deviation of the logarithm of the factor; infinity gives the maximum
            likelihood estimate.
        bounds: Range of the factor.

    Returns:
        Factors, float64 on the CPU.
    """
    if isinstance(observations, Observations):
        observations = AnalysisSystem(observations, prior.noise)
    return Innovations.of(observations.at_mean(prior.linear)).inflation(width, bounds)
