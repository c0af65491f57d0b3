# SPDX-License-Identifier: Apache-2.0
r"""Moment matching posterior sampling in function space (MMPS; Rozet et al., arXiv 2405.13712).

Axes: ``B`` batch, ``T`` analyses, ``C`` channel, ``H W`` grid, ``M`` observations, ``N`` modes.

Given :math:`y = H(x_0) + \epsilon`, :math:`\epsilon \sim N(0, R)`, and the first two moments of
:math:`x_0 | x_\sigma`, the conditional mean is

.. math:: D_y = D + V H^T (H V H^T + R)^{-1} (y - H(D)), \qquad V = \sigma^2 J C .

:math:`V v = \sigma^2 C J^T v` costs one vector-Jacobian product; the noise covariance :math:`C` is
what methods written for white noise leave out. Nonlinear operators are linearised at :math:`D`
(one Gauss-Newton step at every noise level).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.denoiser import Denoiser, GaussianDenoiser, linear_part, value_and_pullback
from ddo_modulus.errors import InputError
from ddo_modulus.field import GaussianField
from ddo_modulus.linalg import gmres, spread
from ddo_modulus.observations import Observations, Tangent

Covariance = Literal["jacobian", "linear"]


class MomentMatching:
    r"""Conditions a denoiser on observations; the result is a denoiser.

    The system is solved by GMRES (the covariance of a learned denoiser is neither symmetric nor
    positive), preconditioned by the Cholesky factor of :math:`H V_{lin} H^T + R`, where
    :math:`V_{lin}` is the posterior covariance of the denoiser's Gaussian part.

    Args:
        denoiser: The prior.
        noise: Noise field of the prior, on any grid of its domain.
        observations: What to condition on. With several analyses ``T`` the members of each stand
            next to each other in the batch.
        covariance: ``"jacobian"`` takes :math:`V` from the derivative of the denoiser;
            ``"linear"`` takes :math:`V_{lin}` itself: no derivative, no iteration, exact where the
            prior is Gaussian.
        iterations: GMRES iterations, one vector-Jacobian product each.

    Raises:
        InputError: On unknown ``covariance`` or ``iterations`` below one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        noise: GaussianField,
        observations: Observations,
        *,
        covariance: Covariance = "jacobian",
        iterations: int = 2,
    ) -> None:
        if covariance not in ("jacobian", "linear"):
            raise InputError(f"covariance must be 'jacobian' or 'linear', got {covariance!r}")
        if iterations < 1:
            raise InputError(f"iterations must be at least 1, got {iterations}")
        self.denoiser = denoiser
        self.noise = noise
        self.observations = observations
        self.covariance = covariance
        self.iterations = iterations
        self._rows: dict[tuple, Tensor] = {}

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean state given the noisy one and the observations."""
        noise = self.noise.at(x.shape[-2:])
        linear = linear_part(self.denoiser, noise)
        if self.covariance == "jacobian":
            clean, pullback = value_and_pullback(self.denoiser, x, sigma, condition)
        else:
            clean = self.denoiser(x, sigma, condition)
        operator = self.observations.operator
        tangent = operator.linearize(clean)
        values = self.observations.values.to(clean).reshape(-1, operator.size)
        innovation = spread(values, len(x)) - operator(clean)

        rows = self._spanned(tangent, linear, x)
        error = self.observations.error_covariance(x)
        variance = linear.posterior_variance(sigma)
        groups = len(x)
        if bool((sigma == sigma[0]).all()):  # members of an analysis share their system
            groups = max(len(rows), len(error), linear.analyses)
        rows, error = spread(rows, groups), spread(error, groups)
        scaled = rows * variance[:: len(x) // groups, None]
        factor = torch.linalg.cholesky((scaled @ rows.mT + error).double()).to(x.dtype)
        whitened = _solve(factor, innovation)

        if self.covariance == "linear":
            u = _solve(factor, whitened, transpose=True)
            a = (u.unflatten(0, (groups, -1)) @ scaled).flatten(0, 1)
            return clean + linear.fields(a, mean=False)

        def apply(w: Float[Tensor, "B M"]) -> tuple[Tensor, Tensor]:
            """``P^-1 (H V H^T + R) P^-T w`` with ``P P^T`` the preconditioner; ``V H^T P^-T w``."""
            u = _solve(factor, w, transpose=True)
            increment = pullback(tangent.adjoint(u, x.shape[1:]))
            increment = sigma.view(-1, 1, 1, 1) ** 2 * noise.cov(increment)
            noisy = (u.unflatten(0, (groups, -1)) @ error).flatten(0, 1)
            return _solve(factor, tangent(increment) + noisy), increment

        return clean + gmres(apply, whitened, self.iterations)

    def _spanned(
        self, tangent: Tangent, linear: GaussianDenoiser, like: Tensor
    ) -> Float[Tensor, "T M N"]:
        """:func:`spanned`, remembered where it does not depend on the states."""
        if not tangent.linear:
            return spanned(tangent, linear, like)
        key = (tuple(like.shape[1:]), like.dtype, str(like.device))
        if key not in self._rows:
            self._rows = {key: spanned(tangent, linear, like)}
        return self._rows[key]


def spanned(tangent: Tangent, linear: GaussianDenoiser, like: Tensor) -> Float[Tensor, "T M N"]:
    """A tangent applied to every coordinate direction of a Gaussian prior, ``H L E``.

    With it ``H V H^T`` is a product of small matrices for every diagonal ``V``. Taken by the
    adjoint, one field for each observation instead of one for each coordinate.
    """
    analyses = max(
        max(len(operator.index), 1 if a is None else len(a)) for a, operator in tangent.terms
    )
    if linear.rotation is not None:
        analyses = max(analyses, linear.rotation.analyses)
    operator_size = tangent.terms[0][1].size
    unit = torch.eye(operator_size, dtype=like.dtype, device=like.device)
    parts = []
    for part in unit.split(max(1, 512 // analyses)):  # chunks: all fields at once are large
        batch = analyses * len(part)
        terms = [(None if a is None else spread(a, batch), o) for a, o in tangent.terms]
        spread_tangent = Tangent(terms, tangent.linear)
        fields = spread_tangent.adjoint(part.repeat(analyses, 1), like.shape[1:])
        rows = linear.rotate(linear.noise.color_adjoint(fields).flatten(1))
        parts.append(rows.unflatten(0, (analyses, -1)))
    return torch.cat(parts, 1)


def _solve(
    factor: Float[Tensor, "T M M"], u: Float[Tensor, "B M"], *, transpose: bool = False
) -> Float[Tensor, "B M"]:
    """Apply the inverse of a lower factor, or of its transpose, to the members of each analysis."""
    matrix = factor.mT if transpose else factor
    columns = u.unflatten(0, (len(factor), -1)).mT
    return torch.linalg.solve_triangular(matrix, columns, upper=transpose).mT.flatten(0, 1)
