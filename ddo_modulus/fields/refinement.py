# SPDX-License-Identifier: Apache-2.0
r"""The spectrum of a field beyond the grid that it was measured on.

Axes: ``C`` channel, ``K`` spectral coefficients, ``A`` aliases of one function on a grid.

**Spectrum.** Beyond the measured band the variance of a coefficient at wavenumber
:math:`\kappa = \sqrt\lambda` follows

.. math:: \log s(\kappa) = c - a \log\kappa - b\,\kappa, \qquad b \ge 0,

a power law with the exponential cut-off of a dissipation range (Kraichnan, "The structure of
isotropic turbulence at very high Reynolds numbers", J. Fluid Mech. 5, 1959). It has since been
measured in two and in three dimensions.

**Cells.** Values on a grid are often means over its cells (``cell_methods`` of the CF convention).
Such means damp a function by a response :math:`r < 1`; its aliases, the functions that have the
same values on the grid, are damped by responses of their own. If the field has the variance
:math:`s_k`, its means have :math:`R_k^2 s_k` with :math:`R_k^2 = \sum_{q \sim k} r_q^2 s_q / s_k`.
On a finer grid the factor is another, :math:`R'`, so coefficients of the coarse grid are multiplied
by :math:`R' / R` there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis

# The fit leaves out the largest scales: this share of the band, in wavenumber.
_LARGE = 1 / 3
# Least slope of the variance where the band ends, so that the smaller scales have finite energy.
_LEAST = 3.0
# The fitted law gives the variance of the aliases, and is then fitted again without them.
_ROUNDS = 8


@dataclass(frozen=True)
class Tail:
    """Variance of coefficients over wavenumber: a power law with an exponential cut-off.

    Attributes:
        level: ``(C,)`` float64, ``c``.
        exponent: ``a``.
        decay: ``b``, not negative.
    """

    level: Float[Tensor, " C"]
    exponent: Float[Tensor, " C"]
    decay: Float[Tensor, " C"]

    def __call__(self, eigenvalues: Float[Tensor, "*A K"]) -> Float[Tensor, "C *A K"]:
        """Variances at eigenvalues of the Laplacian, which must be positive."""
        wavenumber = eigenvalues.sqrt()
        c, a, b = (
            v.reshape(-1, *[1] * wavenumber.ndim) for v in (self.level, self.exponent, self.decay)
        )
        return (c - a * wavenumber.log() - b * wavenumber).exp()

    @property
    def rows(self) -> tuple[tuple[float, float, float], ...]:
        """``(c, a, b)`` of each channel, as :class:`Refinement` takes them."""
        return tuple(
            (float(c), float(a), float(b))
            for c, a, b in zip(self.level, self.exponent, self.decay, strict=True)
        )

    @classmethod
    def fit(cls, basis: Basis, variance: Float[Tensor, "C K"], *, smallest: Tensor) -> Tail:
        """Fit by least squares over the shells in the upper two thirds of a band.

        All shells have the same weight. Incomplete shells, in the corners of the band, are left
        out, since the cut-off of a solver shows there.

        Args:
            basis: Basis of the coefficients.
            variance: Measured variances.
            smallest: ``(C, K)`` or ``(C, 1)``; variances up to this value count as not measured.
        """
        wavenumber = basis.eigenvalues.sqrt()
        end = basis.complete_wavenumber()
        _, shell = basis.shells()
        share = 1.0 / torch.bincount(shell).double()[shell]
        small = (wavenumber > _LARGE * end) & (wavenumber < end * (1 + 1e-9))
        used = small & (variance > smallest)
        used |= small & ~used.any(1, keepdim=True)
        weight = used * share
        weight = weight / weight.sum(1, keepdim=True)
        floor = float(wavenumber[wavenumber > 0].min())
        x = torch.stack([-wavenumber.clamp_min(floor).log(), -wavenumber])  # of a and of b
        y = variance.log()
        mean_x, mean_y = torch.einsum("ck,ik->ci", weight, x), (weight * y).sum(1)
        dx, dy = x - mean_x[:, :, None], y - mean_y[:, None]  # C 2 K, C K
        gram = torch.einsum("ck,cik,cjk->cij", weight, dx, dx)
        right = torch.einsum("ck,cik,ck->ci", weight, dx, dy)
        (aa, ab), bb = (gram[:, 0, 0], gram[:, 0, 1]), gram[:, 1, 1]
        determinant = aa * bb - ab**2
        # A few neighbouring wavenumbers cannot separate a power law from an exponential.
        separable = determinant > 1e-6 * aa * bb
        decay = (aa * right[:, 1] - ab * right[:, 0]) / torch.where(separable, determinant, 1.0)
        decay = torch.where(separable, decay, 0.0).clamp_min(0.0)
        exponent = (right[:, 0] - ab * decay) / aa.clamp_min(1e-12)
        exponent = torch.maximum(exponent, _LEAST - decay * end)
        return cls(mean_y - exponent * mean_x[:, 0] - decay * mean_x[:, 1], exponent, decay)


@dataclass(frozen=True)
class Refinement:
    """Assumptions about a field beyond its values on one grid.

    Attributes:
        cell_means: Whether values are means over the cells of a grid, on every grid; otherwise they
            are values at the points.
        tail: ``(c, a, b)`` of the spectrum beyond the band for each channel, over angular
            wavenumbers in the units of the basis. For means over cells it is the spectrum of the
            field, not of the means. If there are more channels, as with the frames of a window,
            the list is repeated. None to fit it to the band.

    Raises:
        InputError: If a tail does not have three finite numbers for each channel, or its variance
            has no limit.
    """

    cell_means: bool = False
    tail: tuple[tuple[float, float, float], ...] | None = None

    def __post_init__(self) -> None:
        if self.tail is None:
            return
        rows = torch.tensor(self.tail, dtype=torch.float64)
        if rows.ndim != 2 or rows.shape[1] != 3 or not bool(rows.isfinite().all()):
            raise InputError(f"tail={self.tail}: three numbers are needed for each channel")
        if bool((rows[:, 2] < 0).any() or ((rows[:, 2] == 0) & (rows[:, 1] <= 2)).any()):
            raise InputError(
                f"tail={self.tail}: the variance of the scales beyond the grid has no limit; the "
                "last number of a channel must be positive, or zero with a second one above 2"
            )

    def fit(self, basis: Basis, variance: Float[Tensor, "C K"], *, smallest: Tensor) -> Tail:
        """The spectrum of the field (not of its means over cells) beyond the band of a grid.

        Args:
            basis: Basis of the grid.
            variance: Variances of the coefficients of values on the grid.
            smallest: As in :meth:`Tail.fit`.

        Raises:
            InputError: If the values are means over cells on a domain where these mix functions, or
                ``tail`` is for another number of channels.
        """
        if self.tail is not None:
            if len(variance) % len(self.tail):
                raise InputError(
                    f"a tail of {len(self.tail)} channels does not fit {len(variance)} channels"
                )
            rows = torch.tensor(self.tail, dtype=torch.float64)
            return Tail(*rows.repeat(len(variance) // len(rows), 1).T)
        if not self.cell_means:
            return Tail.fit(basis, variance, smallest=smallest)
        response = basis.cell_mean_response().square().expand_as(variance)
        for _ in range(_ROUNDS):
            tail = Tail.fit(basis, variance / response, smallest=smallest / response)
            response = self.response(basis, tail)
        return Tail.fit(basis, variance / response, smallest=smallest / response)

    def response(self, basis: Basis, tail: Tail) -> Float[Tensor, "C K"]:
        """Ratio ``R^2`` of the variance of each coefficient on a grid to that of the field.

        Raises:
            InputError: If the values are means over cells on a domain where these mix functions.
        """
        if not self.cell_means:
            return torch.ones(len(tail.level), basis.size, dtype=torch.float64)
        eigenvalues, response = basis.cell_means()
        least = float(basis.eigenvalues[basis.eigenvalues > 0].min())
        variance = tail(eigenvalues.clamp_min(least))
        return (response.square() * variance).sum(1) / variance[:, 0]
