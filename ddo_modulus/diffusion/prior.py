# SPDX-License-Identifier: Apache-2.0
r"""Denoisers: the posterior mean of a state given a noisy copy of it.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid, ``K`` spectral coefficients, ``N = C K``.

With :math:`x_\sigma = x_0 + \sigma L z` a *denoiser* is
:math:`D(x, \sigma) = E[x_0 | x_\sigma = x]` (PhysicsNeMo's *x0 predictor*). It gives the score,
:math:`C \nabla \log p = (D - x) / \sigma^2`, and by Tweedie's second formula the covariance
:math:`Cov[x_0 | x_\sigma] = \sigma^2 J C` with :math:`J = \partial D / \partial x`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField


class Denoiser(Protocol):
    """Anything that maps a noisy state to the mean of the clean one."""

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean state.

        Args:
            x: Noisy states.
            sigma: Noise levels.
            condition: Further input, ``(B, D, H, W)``.
        """
        ...


Pullback = Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B C H W"]]


@runtime_checkable
class Engine(Denoiser, Protocol):
    """A denoiser that brings its own derivative, whatever it computes with.

    Where automatic differentiation cannot look inside (an inference engine, a captured graph),
    guidance still needs :math:`J^T v`. A denoiser with :meth:`vjp` is asked for it
    (:func:`value_and_pullback`). One that can keep what the derivative needs offers, beside it, a
    method ``value_and_pullback(x, sigma, condition)`` with the result of that function, and is
    spared the second forward pass.

    Attributes:
        noise: Noise field, on the grid of the engine.
        linear: Gaussian part, that posteriors precondition with.
    """

    @property
    def noise(self) -> GaussianField:
        """Noise field, on the grid of the engine."""
        ...

    @property
    def linear(self) -> GaussianDenoiser:
        """Gaussian part of the denoiser, on the grid of the engine."""
        ...

    def vjp(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        v: Float[Tensor, "B C H W"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """Expected clean states, and ``J^T v`` with ``J`` their derivative by ``x``."""
        ...


@runtime_checkable
class Recorder(Engine, Protocol):
    """An engine that can make one thing of all that is built on it, such as a CUDA graph."""

    def captured(self, denoiser: Denoiser) -> Denoiser:
        """The same denoiser, one that calls this engine, quicker where it can be."""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """A denoiser that can prepare for the noise levels that it will be asked at."""

    def scheduled(
        self, levels: Float[Tensor, " S"], like: Float[Tensor, "B C H W"]
    ) -> Mapping[float, Denoiser]:
        """The same denoiser for each of these levels, quicker; members of a batch share theirs.

        Levels may have one in common, which then tells them apart by itself.

        Args:
            levels: Noise levels, on the CPU; in any order, repetitions do not matter.
            like: States of the shape, dtype and device to come; values do not matter.
        """
        ...


def value_and_pullback(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    sigma: Float[Tensor, " B"],
    condition: Tensor | None = None,
) -> tuple[Float[Tensor, "B C H W"], Pullback]:
    """Denoised states and the map ``v -> J^T v``, which may be called any number of times.

    By the denoiser's own ``value_and_pullback`` or ``vjp`` (:class:`Engine`) if it has one, else by
    automatic differentiation.
    """
    own = getattr(denoiser, "value_and_pullback", None)
    if own is not None:
        return own(x, sigma, condition)
    product = getattr(denoiser, "vjp", None)
    if product is not None:
        return denoiser(x, sigma, condition), lambda v: product(x, sigma, v, condition)[1]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        clean = denoiser(x, sigma, condition)

    def pullback(v: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return torch.autograd.grad(clean, x, v, retain_graph=True)[0]

    return clean.detach(), pullback


def vjp(
    denoiser: Denoiser,
    x: Float[Tensor, "B C H W"],
    sigma: Float[Tensor, " B"],
    v: Float[Tensor, "B C H W"],
    condition: Tensor | None = None,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Denoised states and ``J^T v`` of any denoiser, at once."""
    own = getattr(denoiser, "vjp", None)
    if own is not None:
        return own(x, sigma, v, condition)
    clean, pullback = value_and_pullback(denoiser, x, sigma, condition)
    return clean, pullback(v)


def linear_part(denoiser: Denoiser, noise: GaussianField) -> GaussianDenoiser:
    """Gaussian approximation of a denoiser: its own, or the unit-variance noise field as prior.

    Raises:
        InputError: If the denoiser's own approximation lives in another noise field.
    """
    own = getattr(denoiser, "linear", None)
    if own is None:
        return GaussianDenoiser(0.0, noise, noise)
    if own.noise.basis.dimension != noise.basis.dimension or own.noise.channels != noise.channels:
        raise InputError("the denoiser was built for another noise field than the one given")
    return own.at(noise.shape)
