# SPDX-License-Identifier: Apache-2.0
r"""The system of an analysis: innovations and their covariance.

Axes: ``B`` batch, ``T`` analyses (the members of each are consecutive in the batch),
``G`` groups of states that share a system, ``C`` channel, ``H W`` grid, ``K`` coefficients of the
noise of one channel, ``M`` observations, ``N = C K`` coordinates, ``S`` noise levels.

For observations :math:`y = H(x) + \epsilon` with :math:`\epsilon \sim N(0, R)`, and a Gaussian
part of the prior with the covariance :math:`V = L E\,\mathrm{diag}(v)\,E^T L^T`, the innovations
have the covariance

.. math:: S = (H L E)\,\mathrm{diag}(v)\,(H L E)^T + R .

:math:`H L` is the *observation-space square root* of the noise covariance. It depends neither on
the prior nor on the noise level. It is computed once, with one adjoint of the operator per
observation, and used for quality control, inflation, guidance and diagnostics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.fields.linalg import inverse_factor, one_level, per_member
from ddo_modulus.observations import LinearOperator, Observations, Tangent

# Limits of memory, as numbers of values: factors kept for all noise levels (1 GiB in float32),
# factors computed at once (in float64), and square roots kept for a nonlinear operator.
_MOST_FACTORS, _MOST_AT_ONCE, _MOST_ROOTS = 2**28, 2**26, 2**28
# Smallest and largest error of an observation, in the units of the states. States are in single
# precision: there, a smaller error changes no analysis, and a larger one takes all weight away.
_LEAST_ERROR, _LARGEST_ERROR = 1e-6, 1e8
# Observed values beyond this, in the units of the states, overflow when they are squared.
_LARGEST_VALUE = 1e9
# With smaller error variances than the first, or than the second for each observation, rounding of
# H V H^T to single precision matters beside R: the system is then built and solved in double.
_PRECISE, _PRECISE_EACH = 2.5e-5, 3e-7
# Linear operators whose square roots are kept; some operators make new parts at each call.
_MOST_PARTS = 64


class AnalysisSystem:
    """The observations of one or several analyses, with their square roots ``HL``.

    Args:
        observations: Observations, in the units of the states.
        noise: Noise field of the prior, on the grid of the analysis.

    Attributes:
        precise: Whether errors are so small that single precision cannot hold the solution of the
            system, which is then computed in double.

    Raises:
        InputError: If an observed value is too large for single precision.
    """

    def __init__(self, observations: Observations, noise: GaussianField) -> None:
        self.observations, self.noise = observations, noise
        largest = float(observations.values.abs().max())
        if largest > _LARGEST_VALUE:
            raise InputError(
                f"an observation is {largest:.3g} in the units of the states, and the largest "
                f"possible is {_LARGEST_VALUE:g}: correct it, or leave it out (gross_error)"
            )
        least = float(_error_variance(observations).min())
        self.precise = least < max(_PRECISE, _PRECISE_EACH * observations.operator.size)
        self._constants: dict[tuple, tuple[Tensor, Tensor]] = {}
        # Square roots by the id of a linear operator. The operator is stored too, so that the id
        # is not used again.
        self._roots: dict[int, tuple[Tangent | LinearOperator, dict[tuple, Tensor]]] = {}
        self._rotated: dict[tuple, tuple[object, Tensor]] = {}

    @staticmethod
    def batch(parts: Sequence[AnalysisSystem]) -> AnalysisSystem:
        """Join the systems of several analyses; square roots that all of them have are kept.

        Raises:
            InputError: As for :meth:`.Observations.batch`.
        """
        if len(parts) == 1:
            return parts[0]
        whole = AnalysisSystem(Observations.batch([p.observations for p in parts]), parts[0].noise)
        size = whole.observations.operator.size
        roots = [next(iter(p._roots.values()), (None, {}))[1] for p in parts]
        for key in set.intersection(*(set(root) for root in roots)):
            padded = [
                torch.nn.functional.pad(root[key], (0, 0, 0, size - root[key].shape[1]))
                for root in roots
            ]
            whole._keep(whole.observations.operator, key, torch.cat(padded))
        return whole

    def take(self, rows: Int[Tensor, " R"]) -> AnalysisSystem:
        """The system of some of the observations; existing square roots are kept.

        Args:
            rows: Indices of these observations, ascending.
        """
        fewer = AnalysisSystem(self.observations.take(rows), self.noise)
        before, after = self._parts(self.observations), self._parts(fewer.observations)
        if len(before) == len(after):  # otherwise a part of the operator has no observation left
            for old, new in zip(before, after, strict=True):
                for key, root in self._roots.get(id(old), (old, {}))[1].items():
                    fewer._keep(new, key, root[:, rows])
        return fewer

    def with_values(self, values: Tensor, variance: Tensor) -> AnalysisSystem:
        """The system of the same operator with other observed values and error variances."""
        operator = self.observations.operator
        other = AnalysisSystem(Observations(operator, values, variance), self.noise)
        other._roots, other._rotated = self._roots, self._rotated
        return other

    def forget(self) -> None:
        """Free the memory of the square roots; they are computed again when needed."""
        self._roots.clear()
        self._rotated.clear()

    @property
    def analyses(self) -> int:
        """Number of analyses ``T``: sets of observed values."""
        return self.observations.values.numel() // self.observations.operator.size

    def at(self, x: Float[Tensor, "B C H W"], linear: GaussianDenoiser) -> LinearizedSystem:
        """The system linearised at states, in their precision and on their device.

        Args:
            x: States; their number is a multiple of the number of analyses.
            linear: Gaussian part of the prior, on the grid of the states.
        """
        operator = self.observations.operator
        tangent = operator.linearize(x)
        # Rounded to single precision, innovations differ by more than a small error.
        exact = x.double() if self.precise else x
        values, error = self._on(exact)
        return LinearizedSystem(
            tangent,
            self._coordinates(tangent, linear, x),
            error,
            per_member(values, len(x)) - operator(exact),
            linear,
        )

    def at_mean(self, linear: GaussianDenoiser) -> LinearizedSystem:
        """The system linearised at the prior mean of each analysis, in float64 on the CPU.

        If members have means of their own, their average is used. Quality control, inflation and
        diagnostics use this system.
        """
        linear = linear.at(self.noise.shape)
        mean = linear.mean.double().cpu().reshape(-1, *linear.mean.shape[-3:])
        if len(mean) > self.analyses:
            mean = mean.unflatten(0, (self.analyses, -1)).mean(1)
        return self.at(per_member(mean, self.analyses), linear)

    def factors(
        self,
        levels: Float[Tensor, " S"],
        linear: GaussianDenoiser,
        like: Float[Tensor, "B C H W"],
    ) -> LevelFactors | None:
        """Precompute the factors of the innovation covariance at the noise levels of a sampler.

        Args:
            levels: Noise levels, ascending.
            linear: Gaussian part of the prior, on the grid of the states.
            like: Tensor with the shape, dtype and device of the states.

        Returns:
            The factors; None if they depend on the states, because the operator is nonlinear, or
            if they would take too much memory.
        """
        tangent = self.observations.operator.linearize(like)
        if not tangent.linear:
            return None
        rows = self._coordinates(tangent, linear, like)
        error = self._on(like.double() if self.precise else like)[1]
        groups = max(len(rows), len(error), linear.analyses)
        size = groups * rows.shape[1] ** 2
        if len(levels) * size > _MOST_FACTORS:
            return None
        parts = []
        for some in levels.to(like).split(max(1, _MOST_AT_ONCE // size)):
            variances = [linear.posterior_variance(level.expand(groups)) for level in some]
            matrices = [innovation_covariance(rows, v, error) for v in variances]
            parts.append(inverse_factor(torch.cat(matrices)))
        return LevelFactors(levels.to(like), torch.cat(parts).unflatten(0, (len(levels), groups)))

    def _on(self, like: Tensor) -> tuple[Float[Tensor, "T M"], Float[Tensor, "T M M"]]:
        """Observed values and ``R`` in the dtype and on the device of ``like``; cached."""
        key = like.dtype, str(like.device)
        if key not in self._constants:
            with lasting():
                values = self.observations.values.reshape(-1, self.observations.operator.size)
                self._constants[key] = values.to(like), _bounded_errors(self.observations, like)
        return self._constants[key]

    def _coordinates(
        self, tangent: Tangent, linear: GaussianDenoiser, like: Tensor
    ) -> Float[Tensor, "G M N"]:
        """``H L E``; for a nonlinear operator one per state, from the roots of its linear parts."""
        if tangent.linear:
            return self._rotate(self.observations.operator, tangent, linear, like)
        size = tangent.terms[0][1].size * linear.variance.shape[-1]
        if len(tangent.terms) * size > _MOST_ROOTS:
            return _rotated(self._compute(tangent, like), linear)
        total: Tensor | float = 0.0
        for a, part in tangent.terms:
            rows = self._rotate(part, part.linearize(like), linear, like)
            rows = per_member(rows, len(like))
            total = total + (rows if a is None else a[..., None] * rows)
        assert isinstance(total, Tensor)
        return total

    def _rotate(
        self, part: object, tangent: Tangent, linear: GaussianDenoiser, like: Tensor
    ) -> Float[Tensor, "T M N"]:
        """``H L E`` of a linear operator; cached for each rotation."""
        root = self._root(part, tangent, like)
        if linear.rotation is None:
            return root
        key = id(root), id(linear.rotation)
        if key not in self._rotated:
            with lasting():
                self._rotated[key] = linear.rotation, _rotated(root, linear)
        return self._rotated[key][1]

    def _root(self, part: object, tangent: Tangent, like: Tensor) -> Float[Tensor, "T M N"]:
        """``H L`` of a linear operator; computed once, then converted to other dtypes, devices."""
        key = tuple(like.shape[1:]), like.dtype, str(like.device)
        found = self._roots.get(id(part), (part, {}))[1]
        if key in found:
            return found[key]
        finer = [root for (shape, *_), root in found.items() if shape == key[0]]
        finer = [root for root in finer if _at_least(root.dtype, like.dtype)]
        with lasting():
            root = finer[0].to(like) if finer else self._compute(tangent, like)
        self._keep(part, key, root)
        return root

    def _compute(self, tangent: Tangent, like: Tensor) -> Float[Tensor, "T M N"]:
        return observation_root(tangent, self.noise.at((like.shape[-2], like.shape[-1])), like)

    def _keep(self, part: object, key: tuple, root: Tensor) -> None:
        if id(part) not in self._roots and len(self._roots) >= _MOST_PARTS:
            self.forget()
        self._roots.setdefault(id(part), (part, {}))[1][key] = root  # type: ignore[arg-type]

    def _parts(self, observations: Observations) -> list[object]:
        """The linear operators whose square roots are kept: the operator itself, or its parts."""
        size = self.noise.channels, *self.noise.shape
        state = torch.zeros(1, *size, dtype=torch.float64)
        tangent = observations.operator.linearize(state)
        return [observations.operator] if tangent.linear else [part for _, part in tangent.terms]


@dataclass(frozen=True)
class LinearizedSystem:
    r"""An analysis system linearised at states.

    Attributes:
        tangent: The linearised operator :math:`H`.
        rows: :math:`H L E`, ``(G, M, N)``.
        error: :math:`R`, ``(T, M, M)``.
        innovation: :math:`y - H(x)`, ``(B, M)``.
        linear: Gaussian part of the prior.
    """

    tangent: Tangent
    rows: Float[Tensor, "G M N"]
    error: Float[Tensor, "T M M"]
    innovation: Float[Tensor, "B M"]
    linear: GaussianDenoiser

    def expected_variance(self) -> Float[Tensor, "B M"]:
        """Variance of each innovation under the prior: the diagonal of ``H V H^T + R``."""
        rows = per_member(self.rows, len(self.innovation))
        prior = (rows.square() * self.linear.variance.to(rows)[:, None]).sum(-1)
        return prior + self.error.diagonal(dim1=1, dim2=2)

    def factor(self, sigma: Float[Tensor, " B"]) -> Float[Tensor, "G M M"]:
        r""":math:`P^{-1}` with :math:`P P^T = S` at noise levels, for each group of states.

        All members of an analysis form one group if they share their noise level; otherwise each
        state is a group of its own.
        """
        groups = len(sigma)
        if one_level(sigma):
            groups = max(len(self.rows), len(self.error), self.linear.analyses)
        variance = self.linear.posterior_variance(sigma[:: len(sigma) // groups])
        return inverse_factor(innovation_covariance(self.rows, variance, self.error))

    def adjoint(self, u: Float[Tensor, "B M"]) -> Float[Tensor, "B C H W"]:
        """``H^T u``, in the precision of the states."""
        noise = self.linear.noise
        return self.tangent.adjoint(u.to(self.rows.dtype), (noise.channels, *noise.shape))

    def increment(
        self, u: Float[Tensor, "B M"], sigma: Float[Tensor, " B"], groups: int
    ) -> Float[Tensor, "B C H W"]:
        r""":math:`V H^T u` with the posterior covariance of the Gaussian part at noise levels.

        Args:
            u: Vectors in observation space.
            sigma: Noise levels.
            groups: Number of groups of states that share a system.
        """
        rows = per_member(self.rows, groups).to(u.dtype)
        a = (u.unflatten(0, (groups, -1)) @ rows).flatten(0, 1).to(self.rows.dtype)
        return self.linear.fields(a * self.linear.posterior_variance(sigma), mean=False)


@dataclass(frozen=True)
class LevelFactors:
    """Factors of the innovation covariance at the noise levels of a sampler.

    Attributes:
        levels: ``(S,)`` ascending.
        factors: ``(S, G, M, M)``.
    """

    levels: Float[Tensor, " S"]
    factors: Float[Tensor, "S G M M"]

    def __call__(self, sigma: Float[Tensor, " B"]) -> Float[Tensor, "G M M"]:
        """The factors at the noise level of a batch; NaN if it is none of the levels.

        The look-up happens on the device, so that the CPU does not wait for the GPU.
        """
        place = torch.searchsorted(self.levels, sigma[:1]).clamp_max(len(self.levels) - 1)
        found = self.levels[place] == sigma[:1]
        return torch.where(found, self.factors.index_select(0, place)[0], math.nan)


def observation_root(
    tangent: Tangent, noise: GaussianField, like: Float[Tensor, "B C H W"]
) -> Float[Tensor, "T M N"]:
    """``H L``: the observations of each coefficient of the noise.

    It is computed by the adjoint, ``(L^T H^T)^T``, which takes one field per observation instead of
    one per coefficient.

    Args:
        tangent: Linearised operator.
        noise: Noise field, on the grid of the states.
        like: Tensor with the shape, dtype and device of the states.
    """
    analyses = max(
        max(len(operator.index), 1 if a is None else len(a)) for a, operator in tangent.terms
    )
    unit = torch.eye(tangent.terms[0][1].size, dtype=like.dtype, device=like.device)
    parts = []
    for part in unit.split(max(1, 512 // analyses)):  # in parts, to bound the memory
        batch = analyses * len(part)
        terms = [(None if a is None else per_member(a, batch), o) for a, o in tangent.terms]
        fields = Tangent(terms, tangent.linear).adjoint(part.repeat(analyses, 1), like.shape[1:])
        parts.append(noise.color_adjoint(fields).flatten(1).unflatten(0, (analyses, -1)))
    return torch.cat(parts, 1)


def innovation_covariance(
    rows: Float[Tensor, "T M N"], variance: Float[Tensor, "G N"], error: Float[Tensor, "T M M"]
) -> Float[Tensor, "G M M"]:
    """``H V H^T + R`` of each group of states, in the precision of ``R``."""
    rows, error = per_member(rows, len(variance)).to(error), per_member(error, len(variance))
    return (rows * variance[:, None]) @ rows.mT + error


def by_analysis(matrix: Float[Tensor, "G M M"], u: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Apply the matrix of each group to the vectors of its states."""
    return (u.unflatten(0, (len(matrix), -1)) @ matrix.mT).flatten(0, 1)


def _rotated(root: Float[Tensor, "T M N"], linear: GaussianDenoiser) -> Float[Tensor, "T M N"]:
    """``H L E`` from ``H L``."""
    if linear.rotation is None:
        return root
    root = per_member(root, max(len(root), linear.rotation.analyses))
    return linear.rotate(root.flatten(0, 1)).unflatten(0, (len(root), -1))


def _error_variance(observations: Observations) -> Float[Tensor, "*T M"]:
    """Error variances of observations."""
    if observations.covariance is not None:
        return observations.covariance.diagonal()
    assert isinstance(observations.variance, Tensor)
    return observations.variance


def _bounded_errors(observations: Observations, like: Tensor) -> Float[Tensor, "T M M"]:
    """``R`` with error variances within the bounds of single precision; correlations are kept."""
    own = _error_variance(observations).double()
    if torch.equal(own.clamp(_LEAST_ERROR**2, _LARGEST_ERROR**2), own):
        return observations.error_covariance(like)
    error = observations.error_covariance(like.new_empty(0, dtype=torch.float64))
    variance = error.diagonal(dim1=1, dim2=2)
    scale = (variance.clamp(_LEAST_ERROR**2, _LARGEST_ERROR**2) / variance).sqrt()
    return (scale[:, :, None] * error * scale[:, None]).to(like.dtype)


def _at_least(have: torch.dtype, want: torch.dtype) -> bool:
    return torch.finfo(have).bits >= torch.finfo(want).bits
