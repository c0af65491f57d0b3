# SPDX-License-Identifier: Apache-2.0
r"""Priors: the expected state given a noisy copy of it, and what posteriors need besides.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.

With :math:`x_\sigma = x_0 + \sigma L z` a *denoiser* is
:math:`D(x, \sigma) = E[x_0 | x_\sigma = x]` (PhysicsNeMo's *x0 predictor*). It gives the score,
:math:`C \nabla \log p = (D - x) / \sigma^2`, and by Tweedie's second formula the covariance
:math:`Cov[x_0 | x_\sigma] = \sigma^2 J C` with :math:`J = \partial D / \partial x`.

A *prior* is a denoiser with its noise, its Gaussian part and its derivative. The diffusion
operator, engines, trajectories, inflated priors and posteriors are all priors, so that each can be
sampled from and conditioned on observations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.fields.derivative import Differentiable, Pullback
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField


class Denoiser(Protocol):
    """Maps noisy states to the expected clean ones: all that a sampler needs."""

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states.

        Args:
            x: Noisy states.
            sigma: Noise levels.
            condition: Further input, ``(B, D, H, W)``.
        """
        ...


@runtime_checkable
class Prior(Denoiser, Protocol):
    """A denoiser with all that a posterior needs of it."""

    @property
    def noise(self) -> GaussianField:
        """Noise field, on the prior's own grid; :meth:`.GaussianField.at` gives other grids."""
        ...

    @property
    def linear(self) -> GaussianDenoiser:
        """Gaussian part of the prior: what it is approximated by where a closed form is needed."""
        ...

    def value_and_pullback(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Pullback]:
        """Expected clean states, and the map ``v -> J^T v`` with their Jacobian ``J``."""
        ...


@runtime_checkable
class Recorder(Prior, Protocol):
    """An engine that can record everything built on it at once, for example as a CUDA graph."""

    def captured(self, prior: Prior) -> Prior:
        """The same prior, one that calls this engine, recorded where that is faster."""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """A denoiser that prepares for the noise levels at which a sampler will call it."""

    def scheduled(
        self, levels: Float[Tensor, " S"], like: Float[Tensor, "B C H W"]
    ) -> Mapping[float, Prior]:
        """The prior to call at each of these levels.

        Args:
            levels: Noise levels on the CPU, in any order, with repetitions.
            like: States of the shape, dtype and device to come; their values do not matter.
        """
        ...


class FunctionPrior(Differentiable):
    """A prior made of a denoising function, such as a network of your own.

    Args:
        denoise: The function; torch must be able to differentiate it.
        noise: The noise that it removes.
        linear: Gaussian part of the prior. If None, a Gaussian prior with the covariance of the
            noise at level one and zero mean stands in.
    """

    def __init__(
        self, denoise: Denoiser, noise: GaussianField, linear: GaussianDenoiser | None = None
    ) -> None:
        self.denoise, self.noise = denoise, noise
        self.linear = GaussianDenoiser(0.0, noise, noise) if linear is None else linear

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states."""
        return self.denoise(x, sigma, condition)


class NoGaussianPart(InputError, AttributeError):  # noqa: N818 - says what is missing
    """The Gaussian part of a prior that has none in closed form was asked for."""


def gaussian_part(prior: Prior) -> GaussianDenoiser:
    """Gaussian part of a prior, to precondition with.

    For a prior that has none (:class:`NoGaussianPart`), a Gaussian prior with the covariance of the
    noise at level one and zero mean stands in.
    """
    try:
        return prior.linear
    except NoGaussianPart:
        return GaussianDenoiser(0.0, prior.noise, prior.noise)


def grid_of(x: Tensor) -> tuple[int, int]:
    """Numbers of rows and columns of states."""
    return x.shape[-2], x.shape[-1]
