# SPDX-License-Identifier: Apache-2.0
r"""A forecast as prior information beside what a model has learned.

Axes: ``B`` batch, ``T`` analyses, ``C`` channel, ``H W`` grid, ``K`` spectral coefficients,
``N = C K``.

A forecast (the background of an assimilation cycle) is an estimate of the whole state,
:math:`x_b = x_0 + e` with :math:`e \sim N(0, B)`. Let :math:`q_k = C_k / B_k` be its precision in
the whitened coefficients of the noise, of covariance :math:`C`.

*What is exact.* Where :math:`B = C / q`, a noisy state and the forecast say as much together as one
noisy state of a lower level,

.. math:: x_* = \frac{x / \sigma^2 + q\,x_b}{1 / \sigma^2 + q}, \qquad
    \sigma_*^{-2} = \sigma^{-2} + q, \qquad E[x_0 | x_\sigma, x_b] = D(x_*, \sigma_*),

for every prior, Gaussian or not: :math:`x_*` is a sufficient statistic.

*What is linear.* For any other :math:`B` a share :math:`q_0 \le q_k` of the precision is taken so,
and the rest, :math:`r_k = q_k - q_0`, by the Gaussian part of the prior. With :math:`P` the
covariance of prior and forecast together (:mod:`ddo_modulus.fields.product`),

.. math:: D_b = D_* + (P^{-1} + \sigma^{-2})^{-1}\,r\,(x_b - D_*), \qquad D_* = D(x_*, \sigma_*),

in closed form along the axes of :math:`P`, and exact for a Gaussian prior. The share is as large as
it can be without telling of modes more than the forecast knows, up to :data:`_EXCESS` nats in those
which the prior hardly lets vary.

The error of the forecast is taken to be independent of the prior: of a forecast that was itself
made from the prior, give the error of its model and start.
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

# Information that the exact share may hold too much of; in modes that are known anyway.
_EXCESS = 0.01


@dataclass(frozen=True)
class _Terms:
    """What a call needs on one grid, in one precision and on one device.

    Attributes:
        background: ``(C, H, W)``, or with a leading axis ``T`` (or ``B``).
        share: Precision that is taken exactly.
        rest: ``(N,)`` precision that is taken linearly, or None if there is none.
        linear: Gaussian part of prior and background together.
    """

    background: Tensor
    share: float
    rest: Tensor | None
    linear: GaussianDenoiser

    def corrected(
        self, clean: Float[Tensor, "B C H W"], sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B C H W"]:
        """Clean states given what was taken exactly, and then the rest."""
        if self.rest is None:
            return clean
        background = self.background
        if background.ndim == 4:
            background = per_member(background, len(clean))
        z = self.linear.noise.whiten(background - clean).flatten(1)
        gain = self.linear.posterior_variance(sigma)
        return clean + self.linear.fields(gain * self.linear.rotate(self.rest * z), mean=False)


class Background:
    """Conditions a prior on a forecast; the result is a prior.

    Observations come after it: ``MomentMatching(Background(...), ...)``. A prior may be inflated
    before (:class:`~ddo_modulus.posterior.Inflated`): the forecast keeps its error.

    Args:
        prior: The prior.
        background: Forecast in the units of the states: ``(C, H, W)``; ``(T, C, H, W)``, one for
            each analysis, whose members stand next to each other in the batch; or
            ``(B, C, H, W)``, one for each member (an ensemble of forecasts).
        covariance: Covariance of its error, on the basis of the noise.

    Raises:
        InputError: If the background is not finite or of another shape, the fields do not share a
            basis, or only a part of the forecast can be exact and the prior has no Gaussian part.
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
        self._grids: dict[tuple[int, int], _Terms] = {}  # in double, on the CPU
        self._terms: dict[tuple, _Terms] = {}

        if self._at(noise.shape, self.background).rest is not None:
            _ = prior.linear  # the rest is weighed by it: a prior without one says so now

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
        """Expected clean state given the noisy one and the background."""
        terms, both, level, _ = self._joined(x, sigma)
        return terms.corrected(self.prior(both, level, condition), sigma)

    def value_and_pullback(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Pullback]:
        """Expected clean state and ``v -> J^T v``."""
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
        """Terms, the state and level that say as much as both, and their ratio of precisions."""
        terms = self._at((x.shape[-2], x.shape[-1]), x)
        background = terms.background
        if background.ndim == 4:
            background = per_member(background, len(x))
        odds = terms.share * sigma**2  # precision of the background over that of the noisy state
        wide = odds.view(-1, 1, 1, 1)
        return terms, (x + wide * background) / (1 + wide), sigma / (1 + odds).sqrt(), wide

    def _at(self, shape: tuple[int, int], like: Tensor) -> _Terms:
        """The terms on a grid, in the dtype and on the device of ``like``."""
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
        # The mean: one step from the prior's towards the background.
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
    r"""Precision in units of the noise that can be taken from every mode at once.

    The largest :math:`q_0` for which :math:`\frac12 \sum \log(1 + s_k (q_0 - q_k)_+)`, the
    information in excess of what the modes have, stays below :data:`_EXCESS`; at least the
    smallest precision of all.

    Args:
        precision: Precision :math:`q_k` of each whitened coefficient.
        linear: Tells the variances :math:`s_k`.
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
