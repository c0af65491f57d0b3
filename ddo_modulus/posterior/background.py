# SPDX-License-Identifier: Apache-2.0
r"""A forecast (background) combined with a learned prior.

Axes: ``B`` batch, ``T`` analyses, ``C`` channel, ``H W`` grid, ``K`` spectral coefficients,
``N = C K``.

A forecast (the background of an assimilation cycle) is an estimate of the whole state,
:math:`x_b = x_0 + e` with :math:`e \sim N(0, B)`. Let :math:`q_k = C_k / B_k` be its precision in
the whitened coefficients of the noise, of covariance :math:`C`.

*The exact part.* If :math:`B = C / q`, a noisy state and the forecast together hold the same
information as one noisy state at a lower level,

.. math:: x_* = \frac{x / \sigma^2 + q\,x_b}{1 / \sigma^2 + q}, \qquad
    \sigma_*^{-2} = \sigma^{-2} + q, \qquad E[x_0 | x_\sigma, x_b] = D(x_*, \sigma_*),

for every prior, Gaussian or not, since :math:`x_*` is a sufficient statistic.

*The linear part.* For any other :math:`B`, a precision :math:`q_0` common to all modes is treated
in this way, and the rest, :math:`r_k = q_k - q_0`, with the Gaussian part of the prior. With
:math:`P` the covariance of prior and forecast together (:mod:`ddo_modulus.fields.product`),

.. math:: D_b = D_* + (P^{-1} + \sigma^{-2})^{-1}\,r\,(x_b - D_*), \qquad D_* = D(x_*, \sigma_*),

which has a closed form along the axes of :math:`P` and is exact for a Gaussian prior. The common
precision is as large as it can be without using more information than the forecast has. An excess
of :data:`_EXCESS` nats is allowed, which goes to modes with a very small prior variance.

The error of the forecast is assumed to be independent of the prior. For a forecast that started
from an analysis with the same prior, use the errors of the initial state and of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.diffusion.prior import Prior, gaussian_part, grid_of
from ddo_modulus.errors import InputError
from ddo_modulus.fields.derivative import Pullback
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.fields.linalg import per_member
from ddo_modulus.fields.product import ProductField

# Information (nats) by which the exact part may exceed that of the forecast.
_EXCESS = 0.01


@dataclass(frozen=True)
class _Terms:
    """Constants of a call on one grid, in one precision and on one device.

    Attributes:
        background: ``(C, H, W)``, or with a leading axis ``T`` (or ``B``).
        share: Precision that is treated exactly, in units of the noise.
        rest: ``(N,)`` precision that is treated linearly; None if there is none.
        linear: Gaussian part of prior and background together.
    """

    background: Tensor
    share: float
    rest: Tensor | None
    linear: GaussianDenoiser

    def corrected(
        self, clean: Float[Tensor, "B C H W"], sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states given the whole background, from those given its exact part."""
        if self.rest is None:
            return clean
        background = self.background
        if background.ndim == 4:
            background = per_member(background, len(clean))
        z = self.linear.noise.whiten(background - clean).flatten(1)
        variance = self.linear.posterior_variance(sigma)
        return clean + self.linear.fields(variance * self.linear.rotate(self.rest * z), mean=False)


class Background:
    """A prior conditioned on a forecast; it is a prior itself.

    Condition on the forecast first and on observations afterwards:
    ``MomentMatching(Background(...), ...)``. Inflate the prior before both
    (:class:`~ddo_modulus.posterior.Inflated`), so that the error of the forecast is not inflated.

    Args:
        prior: The prior.
        background: Forecast in the units of the states: ``(C, H, W)`` for all states;
            ``(T, C, H, W)``, one for each analysis, whose members are consecutive in the batch; or
            ``(B, C, H, W)``, one for each member (an ensemble of forecasts).
        covariance: Error covariance of the forecast, on the basis of the noise.

    Raises:
        InputError: If the background has another shape or values that are not finite, if the
            covariance is on another basis, or if a part of the forecast has to be treated linearly
            and the prior has no Gaussian part.
    """

    def __init__(
        self,
        prior: Prior,
        background: Float[Tensor, "*T C H W"],
        covariance: GaussianField,
    ) -> None:
        noise = prior.noise.at(grid_of(background))
        size = (noise.channels, *noise.shape)
        if background.ndim not in (3, 4) or tuple(background.shape[-3:]) != size:
            raise InputError(
                f"a background of shape {tuple(background.shape)} does not fit states {size}"
            )
        if not bool(background.isfinite().all()):
            raise InputError("the background holds values that are NaN or infinite; fill them")
        self.prior, self.noise, self.covariance = prior, noise, covariance
        self.background = noise.basis.synthesize(noise.basis.analyze(background.double().cpu()))
        self._grids: dict[tuple[int, int], _Terms] = {}  # in float64 on the CPU
        self._terms: dict[tuple, _Terms] = {}

        if self._at(noise.shape, self.background).rest is not None:
            _ = prior.linear  # needed for the rest: a prior that has none raises here

    @cached_property
    def linear(self) -> GaussianDenoiser:
        """Gaussian part of prior and background together."""
        return self._at(self.noise.shape, self.background).linear

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states, given the noisy states and the background."""
        terms, both, level, _ = self._joined(x, sigma)
        return terms.corrected(self.prior(both, level, condition), sigma)

    def value_and_pullback(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Pullback]:
        """Expected clean states, and the map ``v -> J^T v`` for their Jacobian ``J``."""
        terms, both, level, wide = self._joined(x, sigma)
        clean, pullback = self.prior.value_and_pullback(both, level, condition)
        with torch.enable_grad():
            leaf = clean.detach().requires_grad_()
            result = terms.corrected(leaf, sigma)

        def through(v: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
            return pullback(torch.autograd.grad(result, leaf, v, retain_graph=True)[0]) / (1 + wide)

        return result.detach(), through

    def _joined(
        self, x: Float[Tensor, "B C H W"], sigma: Float[Tensor, " B"]
    ) -> tuple[_Terms, Tensor, Tensor, Tensor]:
        """The noisy state and level that combine ``x`` with the exact part of the background.

        Returns:
            The terms, the combined state ``x_*``, its noise levels, and the ratio of the
            background's precision to that of ``x``, ``(B, 1, 1, 1)``.
        """
        terms = self._at((x.shape[-2], x.shape[-1]), x)
        background = terms.background
        if background.ndim == 4:
            background = per_member(background, len(x))
        odds = terms.share * sigma**2  # precision of the background over that of the noisy state
        wide = odds.view(-1, 1, 1, 1)
        return terms, (x + wide * background) / (1 + wide), sigma / (1 + odds).sqrt(), wide

    def _at(self, shape: tuple[int, int], like: Tensor) -> _Terms:
        """The terms on a grid, in the dtype and on the device of ``like``; cached."""
        key = (shape, like.dtype, str(like.device))
        if key not in self._terms:
            with lasting():
                if shape not in self._grids:
                    self._grids[shape] = self._build(shape)
                made = self._grids[shape]
                rest = None if made.rest is None else made.rest.to(like.device, like.dtype)
                background = made.background.to(like.device, like.dtype)
                self._terms[key] = replace(made, background=background, rest=rest)
        return self._terms[key]

    def _build(self, shape: tuple[int, int]) -> _Terms:
        basis, noise = self.noise.basis, self.noise.at(shape)
        shared = basis.truncate(basis.at(shape).modes)
        background = shared.synthesize(shared.analyze(self.background), shape)
        own, error = gaussian_part(self.prior).at(shape), self.covariance.at(shape)
        variance, _ = error.relative_to(noise)
        precision = 1 / variance.double()
        share = shared_precision(precision, own)
        rest = precision - share
        product = GaussianDenoiser(0.0, ProductField(own.prior, error, own.inflation), noise)
        # The mean: one linear step from the prior mean towards the background.
        start, end = (t.reshape(-1, *t.shape[-3:]) for t in (own.mean, background))
        batch = max(len(start), len(end), product.analyses)
        start = per_member(start, batch)
        z = noise.whiten(per_member(end, batch) - start).flatten(1)
        step = per_member(product.variance, batch) * product.rotate(precision * z)
        mean = start + product.fields(step, mean=False)
        exact = bool((rest.abs() <= 1e-9 * precision).all())
        return _Terms(
            background,
            share,
            None if exact else rest,
            product.centred(mean[0] if batch == 1 else mean),
        )


def shared_precision(precision: Float[Tensor, " N"], linear: GaussianDenoiser) -> float:
    r"""The precision that is treated exactly for all modes, in units of the noise.

    It is the largest :math:`q_0` for which the information in excess of that of the forecast,
    :math:`\frac12 \sum \log(1 + s_k (q_0 - q_k)_+)`, is at most :data:`_EXCESS`. It is never less
    than the smallest precision.

    Args:
        precision: Precision :math:`q_k` of each whitened coefficient of the forecast.
        linear: Gaussian part of the prior, with the variances :math:`s_k`.
    """
    variance = linear.variance.amax(0).double().cpu()
    if linear.rotation is not None and linear.rotation.analyses == 1:
        variance = linear.rotation.marginal(variance)
    elif linear.rotation is not None:
        variance = variance.max().expand_as(variance)
    low, high = float(precision.min()), float(precision.max())
    if high - low <= 1e-9 * high:
        return low
    for _ in range(60):
        middle = (low * high) ** 0.5
        excess = 0.5 * torch.log1p(variance * (middle - precision).clamp_min(0)).sum()
        low, high = (middle, high) if float(excess) <= _EXCESS else (low, middle)
    return low
