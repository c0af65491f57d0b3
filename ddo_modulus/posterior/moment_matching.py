# SPDX-License-Identifier: Apache-2.0
r"""Moment matching posterior sampling in function space (MMPS; Rozet et al., arXiv 2405.13712).

Axes: ``B`` batch, ``T`` analyses, ``G`` groups of states that share a system, ``C`` channel,
``H W`` grid, ``M`` observations.

For observations :math:`y = H(x_0) + \epsilon` with :math:`\epsilon \sim N(0, R)`, and a Gaussian
with the first two moments of :math:`x_0 | x_\sigma`, the conditional mean is

.. math:: D_y = D + V H^T (H V H^T + R)^{-1} (y - H(D)), \qquad V = \sigma^2 J C .

:math:`V v = \sigma^2 C J^T v` costs one vector-Jacobian product. The noise covariance :math:`C` is
missing from formulas for white noise. Nonlinear operators are linearised at :math:`D`, which is one
Gauss-Newton step at every noise level.

The system is solved by GMRES, since the covariance of a learned prior is neither symmetric nor
positive definite. The preconditioner is the innovation covariance of the Gaussian part of the
prior, :math:`S_{lin} = P P^T` (:mod:`.system`). After a few iterations part of the innovation is
left. The Gaussian part, which needs no derivative, takes care of it:

.. math:: D_y = D + V H^T u + V_{lin} H^T S_{lin}^{-1} \bigl(y - H(D) - (H V H^T + R) u\bigr) .

After :math:`k` iterations the error is of order :math:`k + 1` in :math:`V - V_{lin}`. With no
iteration, the update is optimal interpolation with :math:`V_{lin}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from ddo_modulus.diffusion.noise import level_range, within
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.prior import NoGaussianPart, Prior, gaussian_part, grid_of
from ddo_modulus.errors import InputError
from ddo_modulus.fields.derivative import Pullback
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.fields.linalg import gmres, per_member
from ddo_modulus.observations import Observations
from ddo_modulus.posterior.system import (
    AnalysisSystem,
    LevelFactors,
    LinearizedSystem,
    by_analysis,
)

Covariance = Literal["jacobian", "linear"]


class MomentMatching:
    r"""A prior conditioned on observations; it is a prior itself.

    Args:
        prior: The prior.
        observations: Observations, or their system. With several analyses ``T``, the members of
            each are consecutive in the batch.
        covariance: ``"jacobian"`` uses :math:`V` from the derivative of the prior. ``"linear"``
            uses :math:`V_{lin}`: no derivative, no iteration, and exact for a Gaussian prior.
        iterations: GMRES iterations, one vector-Jacobian product each.
        guidance_interval: Smallest and largest noise level at which the derivative is taken;
            :math:`V_{lin}` is used at other levels. At high noise the posterior hardly depends on
            more than the Gaussian part of the prior; at low noise the states fit the observations
            already. None: at all levels.

    Raises:
        InputError: If ``covariance`` is unknown, ``iterations`` is below one, or
            ``guidance_interval`` is not an interval.
    """

    def __init__(
        self,
        prior: Prior,
        observations: Observations | AnalysisSystem,
        *,
        covariance: Covariance = "jacobian",
        iterations: int = 2,
        guidance_interval: Sequence[float] | None = None,
    ) -> None:
        if covariance not in ("jacobian", "linear"):
            raise InputError(f"covariance must be 'jacobian' or 'linear', got {covariance!r}")
        if iterations < 1:
            raise InputError(f"iterations must be at least 1, got {iterations}")
        if isinstance(observations, Observations):
            observations = AnalysisSystem(observations, prior.noise)
        self.prior, self.system = prior, observations
        self.covariance, self.iterations = covariance, iterations
        interval = level_range(guidance_interval, "guidance_interval")
        # An interval of all levels: levels need not be compared with it.
        self.guidance_interval = None if interval == (0.0, math.inf) else interval
        self._gaussian = gaussian_part(prior)
        self._factors: LevelFactors | None = None
        self._schedule: tuple[tuple, Mapping[float, Prior]] | None = None

    @classmethod
    def configured(
        cls, prior: Prior, observations: Observations | AnalysisSystem, config: PosteriorConfig
    ) -> MomentMatching:
        """The posterior with the options of a resolved configuration."""
        return cls(
            prior,
            observations,
            covariance=config.covariance,
            iterations=config.iterations,
            guidance_interval=config.guidance_interval,
        )

    @property
    def noise(self) -> GaussianField:
        """Noise field of the prior."""
        return self.prior.noise

    @property
    def linear(self) -> GaussianDenoiser:
        """A posterior has no Gaussian part in closed form.

        Raises:
            NoGaussianPart: Always.
        """
        raise NoGaussianPart(
            "a posterior has no Gaussian part in closed form: inflate the prior, and condition on "
            "the background first, on observations after"
        )

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states, given the noisy states and the observations.

        Args:
            x: Noisy states.
            sigma: Noise levels. An expanded tensor counts as one level, and its value is not read,
                since that would wait for the GPU. Only a ``guidance_interval`` needs the value;
                samplers avoid that by :meth:`scheduled`.
            condition: Passed on to the prior.
        """
        if self._takes_derivative(sigma):
            clean, pullback = self.prior.value_and_pullback(x, sigma, condition)
        else:
            clean, pullback = self.prior(x, sigma, condition), None
        return self._update(clean, sigma, pullback)

    def value_and_pullback(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Pullback]:
        r"""Expected clean states, and ``v -> J_y^T v`` with the covariance held constant.

        :math:`J_y = (I - K H) J` with the Kalman gain :math:`K = V H^T (H V H^T + R)^{-1}`. This
        is exact for a Gaussian prior and linear observations.
        """
        clean, pullback = self.prior.value_and_pullback(x, sigma, condition)
        at, factor = self._linearized(clean, sigma)
        derived = self._takes_derivative(sigma)
        product = self._product(at, factor, sigma, pullback)

        def solve(w: Float[Tensor, "B M"]) -> tuple[Tensor, Tensor]:
            return product(w)[0], by_analysis(factor.mT, w)

        def through(v: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
            u: Tensor | float = 0.0
            if derived:
                observed = at.tangent(self._covariance(v, sigma, pullback))
                rest = by_analysis(factor, observed.to(factor.dtype))
                u, rest = gmres(solve, rest, self.iterations)
            else:
                observed = at.tangent(at.linear.posterior_covariance(v, sigma))
                rest = by_analysis(factor, observed.to(factor.dtype))
            return pullback(v - at.adjoint(u + by_analysis(factor.mT, rest)))

        return self._update(clean, sigma, pullback if derived else None), through

    def scheduled(
        self, levels: Float[Tensor, " S"], like: Float[Tensor, "B C H W"]
    ) -> Mapping[float, Prior]:
        """One prior for the levels at which the derivative is taken, and one for the others.

        Both share factors of the innovation covariance that are computed here for all levels,
        unless these depend on the states. Calls with the same levels and the same kind of states
        return the same priors, so that recorded graphs can be reused.
        """
        levels = levels.unique()
        key = tuple(levels.tolist()), tuple(like.shape[1:]), like.dtype, str(like.device)
        if self._schedule is not None and self._schedule[0] == key:
            return self._schedule[1]
        factors = self.system.factors(levels, self._gaussian.at(grid_of(like)), like)
        with_derivative, without = copy(self), copy(self)
        without.covariance = "linear"
        for one in (with_derivative, without):
            one.guidance_interval, one._factors, one._schedule = None, factors, None
        prepared: dict[float, Prior] = {
            float(level): with_derivative if self._takes_derivative(level) else without
            for level in levels
        }
        self._schedule = key, prepared
        return prepared

    def _takes_derivative(self, sigma: Float[Tensor, "*B"]) -> bool:
        """Whether the derivative is taken at any of these levels."""
        if self.covariance == "linear":
            return False
        return self.guidance_interval is None or bool(within(sigma, self.guidance_interval).any())

    def _update(
        self,
        clean: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        pullback: Pullback | None,
    ) -> Float[Tensor, "B C H W"]:
        """``D_y`` from ``D``; with the derivative if there is a pullback."""
        at, factor = self._linearized(clean, sigma)
        rest = by_analysis(factor, at.innovation)
        if pullback is not None:
            product = self._product(at, factor, sigma, pullback)
            increment, rest = gmres(product, rest, self.iterations)
            clean = clean + increment.to(clean.dtype)
        return clean + at.increment(by_analysis(factor.mT, rest), sigma, len(factor))

    def _linearized(
        self, clean: Float[Tensor, "B C H W"], sigma: Float[Tensor, " B"]
    ) -> tuple[LinearizedSystem, Float[Tensor, "G M M"]]:
        """The system linearised at the prior's estimate, and the inverse factor ``P^-1``."""
        at = self.system.at(clean, self._gaussian.at(grid_of(clean)))
        return at, at.factor(sigma) if self._factors is None else self._factors(sigma)

    def _covariance(
        self, v: Float[Tensor, "B C H W"], sigma: Float[Tensor, " B"], pullback: Pullback
    ) -> Float[Tensor, "B C H W"]:
        r""":math:`V v = \sigma^2 C J^T v`."""
        return sigma.view(-1, 1, 1, 1) ** 2 * self.noise.at(grid_of(v)).cov(pullback(v))

    def _product(
        self,
        at: LinearizedSystem,
        factor: Float[Tensor, "G M M"],
        sigma: Float[Tensor, " B"],
        pullback: Pullback,
    ) -> Callable[[Float[Tensor, "B M"]], tuple[Tensor, Tensor]]:
        """The map from ``w`` to ``P^-1 (H V H^T + R) P^-T w`` and to ``V H^T P^-T w``."""

        def apply(w: Float[Tensor, "B M"]) -> tuple[Tensor, Tensor]:
            u = by_analysis(factor.mT, w)
            increment = self._covariance(at.adjoint(u), sigma, pullback)
            noisy = by_analysis(per_member(at.error, len(factor)), u)
            return by_analysis(factor, at.tangent(increment).to(u.dtype) + noisy), increment

        return apply
