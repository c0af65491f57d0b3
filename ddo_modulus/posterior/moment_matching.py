# SPDX-License-Identifier: Apache-2.0
r"""Moment matching posterior sampling in function space (MMPS; Rozet et al., arXiv 2405.13712).

Axes: ``B`` batch, ``T`` analyses, ``C`` channel, ``H W`` grid, ``M`` observations, ``N`` modes.

Given :math:`y = H(x_0) + \epsilon`, :math:`\epsilon \sim N(0, R)`, and the first two moments of
:math:`x_0 | x_\sigma`, the conditional mean is

.. math:: D_y = D + V H^T (H V H^T + R)^{-1} (y - H(D)), \qquad V = \sigma^2 J C .

:math:`V v = \sigma^2 C J^T v` costs one vector-Jacobian product; the noise covariance :math:`C` is
what methods written for white noise leave out. Nonlinear operators are linearised at :math:`D`
(one Gauss-Newton step at every noise level).

A few iterations with :math:`V` leave a part of the innovation unexplained. The covariance
:math:`V_{lin}` of the denoiser's Gaussian part, which costs nothing, takes that up:

.. math:: D_y = D + V H^T u + V_{lin} H^T S_{lin}^{-1} \bigl(y - H(D) - (H V H^T + R) u\bigr),
    \qquad S_{lin} = H V_{lin} H^T + R .

After :math:`k` iterations the error is of order :math:`k + 1` in :math:`V - V_{lin}`; with none at
all this is optimal interpolation of the innovation with :math:`V_{lin}`.

For linear operators all that the Gaussian part contributes is known before the states: ``sample``
tells its noise levels (:class:`.Scheduled`), the factors of all of them are
found at once, and a step is then nothing but products, which a GPU does without a word to the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.diffusion.noise import level_range, within
from ddo_modulus.diffusion.prior import Denoiser, linear_part, value_and_pullback
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.fields.linalg import gmres, inverse_factor, one_level, spread
from ddo_modulus.observations import LinearOperator, Observations, Tangent

Covariance = Literal["jacobian", "linear"]

# Largest number of values in the factors of all noise levels that are kept (1 GiB in float32), and
# in those that are found at once (in double).
_MOST_KEPT, _MOST_AT_ONCE = 2**28, 2**26
_MOST_PARTS = 64


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
        jacobian_range: Least and largest noise level at which the derivative is taken;
            :math:`V_{lin}` stands in at the others. At high noise little but the Gaussian part of
            the prior is seen, at low noise the observations have told what they can. None: at all
            levels.

    Raises:
        InputError: On unknown ``covariance``, ``iterations`` below one, or a ``jacobian_range``
            that is no range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        noise: GaussianField,
        observations: Observations,
        *,
        covariance: Covariance = "jacobian",
        iterations: int = 2,
        jacobian_range: Sequence[float] | None = None,
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
        self.jacobian_range = level_range(jacobian_range, "jacobian_range")
        self._rows: dict[tuple, tuple[LinearOperator | None, Tensor]] = {}
        self._constants: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._schedules: dict[tuple, dict[float, Denoiser]] = {}

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
        *,
        whitener: Float[Tensor, "T M M"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean state given the noisy one and the observations.

        Args:
            x: Noisy states.
            sigma: Noise levels. Where all are one, and plainly so (an expanded number), nothing
                waits for a GPU, unless a ``jacobian_range`` has them looked at: samplers ask
                :meth:`scheduled` beforehand.
            condition: Handed on to the denoiser.
            whitener: The preconditioner's inverse at these noise levels, if it is known already.
        """
        noise = self.noise.at(x.shape[-2:])
        linear = linear_part(self.denoiser, noise)
        derived = self._derived(sigma)
        if derived:
            clean, pullback = value_and_pullback(self.denoiser, x, sigma, condition)
        else:
            clean = self.denoiser(x, sigma, condition)
        operator = self.observations.operator
        tangent = operator.linearize(clean)
        values, error = self._on(x)
        innovation = spread(values, len(x)) - operator(clean)

        rows = self._spanned(tangent, linear, x)
        groups = len(x)
        if one_level(sigma):  # members of an analysis share their system
            groups = max(len(rows), len(error), linear.analyses)
        if whitener is None:
            variance = linear.posterior_variance(sigma[:: len(x) // groups])
            whitener = inverse_factor(_innovation_covariance(rows, variance, error))
        rest = _by_analysis(whitener, innovation)

        def apply(w: Float[Tensor, "B M"]) -> tuple[Tensor, Tensor]:
            """``P^-1 (H V H^T + R) P^-T w`` with ``P P^T`` the preconditioner; ``V H^T P^-T w``."""
            u = _by_analysis(whitener.mT, w)
            increment = pullback(tangent.adjoint(u, x.shape[1:]))
            increment = sigma.view(-1, 1, 1, 1) ** 2 * noise.cov(increment)
            noisy = _by_analysis(spread(error, groups), u)
            return _by_analysis(whitener, tangent(increment) + noisy), increment

        if derived:
            increment, rest = gmres(apply, rest, self.iterations)
            clean = clean + increment
        u = _by_analysis(whitener.mT, rest)
        a = (u.unflatten(0, (groups, -1)) @ spread(rows, groups)).flatten(0, 1)
        return clean + linear.fields(a * linear.posterior_variance(sigma), mean=False)

    def scheduled(
        self, levels: Float[Tensor, " S"], like: Float[Tensor, "B C H W"]
    ) -> Mapping[float, Denoiser]:
        """One denoiser for the levels at which the derivative is taken, one for the others.

        With the preconditioners of all levels found beforehand, unless the operator is not linear
        (its tangents are those of states to come) or there are too many values to keep.
        """
        levels = levels.unique()
        key = (tuple(levels.tolist()), tuple(like.shape[1:]), like.dtype, str(like.device))
        if key not in self._schedules:
            whiteners = self._whiteners(levels, like)
            kinds: dict[bool, Denoiser] = {d: self._settled(d) for d in (True, False)}
            if whiteners is not None:
                at = levels.to(like)
                kinds = {d: _Scheduled(self._settled(d), at, whiteners) for d in kinds}
            known = {float(level): kinds[self._derived(level)] for level in levels}
            self._schedules = {key: known}
        return self._schedules[key]

    def _derived(self, sigma: Float[Tensor, "*B"]) -> bool:
        """Whether the derivative is taken at some of these levels, which a range looks at."""
        if self.covariance == "linear":
            return False
        return self.jacobian_range is None or bool(within(sigma, self.jacobian_range).any())

    def _settled(self, derived: bool) -> MomentMatching:
        """Itself for levels at which the derivative is taken, or for those at which it is not.

        Without its schedules, which would otherwise hold each other and their memory.
        """
        other = copy(self)
        other.jacobian_range, other._schedules = None, {}
        other.covariance = "jacobian" if derived else "linear"
        return other

    def _whiteners(
        self, levels: Float[Tensor, " S"], like: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "S T M M"] | None:
        """Inverses of the preconditioners at all levels, if they can be found beforehand."""
        tangent = self.observations.operator.linearize(like)
        if not tangent.linear:
            return None
        noise = self.noise.at(like.shape[-2:])
        linear = linear_part(self.denoiser, noise)
        rows, error = self._spanned(tangent, linear, like), self._on(like)[1]
        groups = max(len(rows), len(error), linear.analyses)
        size = groups * rows.shape[1] ** 2
        if len(levels) * size > _MOST_KEPT:
            return None
        parts = []
        for several in levels.to(like).split(max(1, _MOST_AT_ONCE // size)):
            variances = [linear.posterior_variance(level.expand(groups)) for level in several]
            matrices = [_innovation_covariance(rows, v, error) for v in variances]
            parts.append(inverse_factor(torch.cat(matrices)))
        return torch.cat(parts).unflatten(0, (len(levels), groups))

    def _on(self, like: Tensor) -> tuple[Float[Tensor, "T M"], Float[Tensor, "T M M"]]:
        """Observed values and ``R`` in the dtype and on the device of ``like``; copied once."""
        key = (like.dtype, str(like.device))
        if key not in self._constants:
            with lasting():
                values = self.observations.values.reshape(-1, self.observations.operator.size)
                error = self.observations.error_covariance(like)
                self._constants[key] = (values.to(like), error)
        return self._constants[key]

    def _spanned(
        self, tangent: Tangent, linear: GaussianDenoiser, like: Tensor
    ) -> Float[Tensor, "T M N"]:
        """:func:`spanned`, of which all is remembered that does not depend on the states.

        That is everything for a linear operator. What a nonlinear one is made of is linear too, and
        is weighted anew for each state, unless there is too much of it to keep.
        """
        if tangent.linear:
            return self._kept(None, tangent, linear, like)
        size = tangent.terms[0][1].size * linear.variance.shape[-1]
        if len(tangent.terms) * size > _MOST_KEPT:
            return spanned(tangent, linear, like)
        total: Tensor | float = 0.0
        for a, operator in tangent.terms:
            rows = spread(self._kept(operator, operator.linearize(like), linear, like), len(like))
            total = total + (rows if a is None else a[..., None] * rows)
        assert isinstance(total, Tensor)
        return total

    def _kept(
        self, part: LinearOperator | None, tangent: Tangent, linear: GaussianDenoiser, like: Tensor
    ) -> Float[Tensor, "T M N"]:
        """:func:`spanned` of a linear operator; None stands for the only one."""
        key = (id(part), tuple(like.shape[1:]), like.dtype, str(like.device))
        if key not in self._rows:
            if len(self._rows) >= _MOST_PARTS:  # of an operator that makes new parts at each call
                self._rows.clear()
            self._rows[key] = part, spanned(tangent, linear, like)
        return self._rows[key][1]


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


class _Scheduled:
    """Moment matching at noise levels that are known, with their preconditioners at hand.

    Args:
        posterior: What it is the same as.
        levels: Ascending.
        whiteners: The preconditioners' inverses.
    """

    def __init__(
        self,
        posterior: MomentMatching,
        levels: Float[Tensor, " S"],
        whiteners: Float[Tensor, "S T M M"],
    ) -> None:
        self.posterior, self.levels, self.whiteners = posterior, levels, whiteners

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean state; the level is looked up on the device, NaN if it is not there."""
        place = torch.searchsorted(self.levels, sigma[:1]).clamp_max(len(self.levels) - 1)
        known = self.levels[place] == sigma[:1]
        whitener = self.whiteners.index_select(0, place)[0]
        whitener = torch.where(known, whitener, math.nan)
        return self.posterior(x, sigma, condition, whitener=whitener)


def _innovation_covariance(
    rows: Float[Tensor, "T M N"], variance: Float[Tensor, "G N"], error: Float[Tensor, "T M M"]
) -> Float[Tensor, "G M M"]:
    """``H V_lin H^T + R`` of each group of states that have a system in common."""
    rows, error = spread(rows, len(variance)), spread(error, len(variance))
    return (rows * variance[:, None]) @ rows.mT + error


def _by_analysis(matrix: Float[Tensor, "T M M"], u: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Apply a matrix of each analysis to its members."""
    return (u.unflatten(0, (len(matrix), -1)) @ matrix.mT).flatten(0, 1)
