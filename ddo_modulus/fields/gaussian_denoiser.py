# SPDX-License-Identifier: Apache-2.0
r"""The denoiser of a Gaussian prior, in closed form: optimal interpolation.

Axes: ``T`` analyses, ``B`` batch, ``C`` channel, ``H W`` grid, ``K`` spectral coefficients,
``N = C K``.

It is the linear part of every :class:`.DiffusionOperator`. Posteriors precondition their systems
with it, and the other methods are tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.derivative import Differentiable
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField
from ddo_modulus.fields.linalg import per_member
from ddo_modulus.fields.product import ProductField
from ddo_modulus.fields.rotation import Rotation

#: Prior covariances that have a closed form together with the noise.
PriorCovariance = GaussianField | EOFField | CoupledField | ProductField


class GaussianDenoiser(Differentiable):
    r"""The exact denoiser of a Gaussian prior: a Wiener filter, or optimal interpolation.

    In coordinates in which prior and noise are both diagonal, :math:`a = E^T L^{-1} (x - m)` with
    noise covariance :math:`C = L L^T` and prior covariance :math:`L E\,\mathrm{diag}(s) E^T L^T`,

    .. math:: D = m + L E\,\frac{s}{s + \sigma^2}\,a, \qquad
        Cov[x_0 | x_\sigma] = L E\,\frac{\sigma^2 s}{s + \sigma^2}\,E^T L^T .

    Args:
        mean: Prior mean, ``(C, H, W)`` or broadcastable to it; ``(T, C, H, W)`` for one mean per
            analysis, or one per member.
        prior: Prior covariance.
        noise: Noise field, on the basis of the prior.
        inflation: Factor on the prior covariance; ``(T,)`` for one factor per analysis.

    Raises:
        InputError: If prior and noise cannot be diagonalised together.
    """

    def __init__(
        self,
        mean: Tensor | float,
        prior: PriorCovariance,
        noise: GaussianField,
        inflation: float | Float[Tensor, " T"] = 1.0,
    ) -> None:
        self.prior, self.noise = prior, noise
        self.inflation = torch.as_tensor(inflation, dtype=torch.float64).reshape(-1)
        size = (noise.channels, *noise.shape)
        centre = torch.as_tensor(mean, dtype=torch.float64)
        self.mean = centre if centre.ndim == 4 else centre.expand(size)
        self.rotation: Rotation | None
        variance, self.rotation = prior.relative_to(noise)
        self.variance = self.inflation[:, None].to(variance.device) * variance  # (T, N)
        self._constants: dict[tuple, tuple[Tensor, Tensor, Rotation | None]] = {}
        self._grids: dict[tuple[int, int], GaussianDenoiser] = {}

    @property
    def linear(self) -> Self:
        """The denoiser itself, which is its own Gaussian part."""
        return self

    def at(self, shape: Sequence[int]) -> GaussianDenoiser:
        """The same prior on another grid; the mean is interpolated in the basis."""
        key = (shape[0], shape[1])
        if key == self.noise.shape:
            return self
        if key not in self._grids:
            with lasting():
                basis = self.noise.basis
                shared = basis.truncate(basis.at(key).modes)
                mean = shared.synthesize(shared.analyze(self.mean), key)
                self._grids[key] = GaussianDenoiser(
                    mean, self.prior.at(key), self.noise.at(key), self.inflation
                )
        return self._grids[key]

    def inflated(self, factor: float | Float[Tensor, " T"]) -> GaussianDenoiser:
        """The same prior with its covariance multiplied by a factor.

        Args:
            factor: One number, or ``(T,)`` for one factor per analysis.
        """
        more = torch.as_tensor(factor, dtype=torch.float64).reshape(-1)
        number = max(len(more), len(self.variance))
        more = per_member(more, number)
        other = copy(self)  # keeps the coordinates, which may be expensive to compute
        other.inflation = more * per_member(self.inflation, number)
        other.variance = more[:, None].to(self.variance.device) * per_member(self.variance, number)
        other._constants, other._grids = {}, {}
        return other

    def centred(self, mean: Float[Tensor, "*T C H W"]) -> GaussianDenoiser:
        """The same covariance about another mean."""
        other = copy(self)
        other.mean, other._constants, other._grids = mean, {}, {}
        return other

    @property
    def analyses(self) -> int:
        """Number of analyses that have a covariance of their own; 1 if all share one."""
        rotated = 1 if self.rotation is None else self.rotation.analyses
        return max(len(self.variance), rotated)

    def centre(self, like: Float[Tensor, "B C H W"]) -> Tensor:
        """Prior mean in the dtype and on the device of ``like``: one per state, or one for all."""
        mean = self._on(like)[0]
        return mean if mean.ndim == 3 else per_member(mean, len(like))

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states: the Wiener filter, mode by mode.

        Args:
            x: Noisy states.
            sigma: Noise levels.
            condition: Ignored; a Gaussian prior has no condition.
        """
        a = self.modes(x)
        return self.fields(a * self.wiener_weight(sigma))

    def modes(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
        """Coordinates ``a`` of states."""
        return self.rotate(self.noise.whiten(x - self.centre(x)).flatten(1))

    def fields(self, a: Float[Tensor, "B N"], *, mean: bool = True) -> Float[Tensor, "B C H W"]:
        """States from coordinates; perturbations, without the prior mean, if ``mean`` is False."""
        z = self.rotate(a, back=True).unflatten(1, (self.noise.channels, -1))
        x = self.noise.color(z)
        return x + self.centre(x) if mean else x

    def rotate(self, z: Float[Tensor, "B N"], *, back: bool = False) -> Float[Tensor, "B N"]:
        """Coordinates ``E^T z`` of whitened coefficients ``z``; the inverse if ``back`` is True."""
        rotation = self._on(z)[2]
        return z if rotation is None else rotation(z, back=back)

    def wiener_weight(self, sigma: Float[Tensor, " B"]) -> Float[Tensor, "B N"]:
        """Wiener weight of each coordinate, ``s / (s + sigma^2)``."""
        s = per_member(self._on(sigma)[1], sigma.shape[0])
        return s / (s + sigma[:, None] ** 2)

    def whitening(self, sigma: Float[Tensor, " B"]) -> Float[Tensor, "B N"]:
        """Factor that brings each coordinate of the noisy state to unit variance, ``c_in``.

        It is not computed from the Wiener weight ``w``, since ``1 - w`` is lost to round-off where
        the noise is small.
        """
        s = per_member(self._on(sigma)[1], sigma.shape[0])
        return 1 / (s + sigma[:, None] ** 2).sqrt()

    def posterior_variance(self, sigma: Float[Tensor, " B"]) -> Float[Tensor, "B N"]:
        """Variance of each coordinate of the clean state, given the noisy state."""
        return sigma[:, None] ** 2 * self.wiener_weight(sigma)

    def posterior_covariance(
        self, v: Float[Tensor, "B C H W"], sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C H W"]:
        """Covariance of the clean state, given the noisy state, applied to fields."""
        a = self.rotate(self.noise.color_adjoint(v).flatten(1))
        return self.fields(a * self.posterior_variance(sigma), mean=False)

    def uncovered(
        self, x: Float[Tensor, "B C H W"], sigma: float, kept: Basis
    ) -> Float[Tensor, "B C H W"]:
        """Restore the variance that modes below the last noise level have lost.

        A mode of variance ``s`` has the variance ``s^2 / (s + sigma^2)`` in the denoised state, so
        hardly any where ``s`` is far below ``sigma^2``. For modes that only the linear part
        describes, the ODE from there to zero noise has a closed form: multiplication by
        ``sqrt((s + sigma^2) / s)``.

        Args:
            x: Denoised states.
            sigma: Noise level that they were denoised at.
            kept: Functions to leave unchanged: those that the network acts on.
        """
        _, there = kept.shared(self.noise.basis)
        weight = self.wiener_weight(x.new_full((1,), sigma)).clamp_min(1e-8)
        factor = weight.rsqrt().unflatten(1, (self.noise.channels, -1))
        factor[..., there.to(x.device)] = 1.0
        return self.fields(self.modes(x) * factor.flatten(1))

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor, Rotation | None]:
        """Mean, variances and rotation in the dtype and on the device of ``like``."""
        key = (like.dtype, str(like.device))
        if key not in self._constants:
            with lasting():
                self._constants[key] = (
                    self.mean.to(like.device, like.dtype),
                    self.variance.to(like.device, like.dtype),
                    None if self.rotation is None else self.rotation.to(like),
                )
        return self._constants[key]
