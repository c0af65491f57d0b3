# SPDX-License-Identifier: Apache-2.0
r"""Priors: denoisers with a noise field, a Gaussian part and a derivative.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.

With :math:`x_\sigma = x_0 + \sigma L z`, a *denoiser* is
:math:`D(x, \sigma) = E[x_0 | x_\sigma = x]` (PhysicsNeMo's *x0 predictor*). It gives the score,
:math:`C \nabla \log p = (D - x) / \sigma^2`. By Tweedie's second-order formula its Jacobian
:math:`J = \partial D / \partial x` gives the covariance
:math:`Cov[x_0 | x_\sigma] = \sigma^2 J C`.

A *prior* is a denoiser with its noise field, its Gaussian part and its derivative. The diffusion
operator, engines, trajectories, inflated priors and posteriors are all priors: each can be sampled
from, and conditioned on observations.
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
    """Maps noisy states to the expected clean states. A sampler needs no more than that."""

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
    """A denoiser with its noise field, Gaussian part and derivative, which posteriors need."""

    @property
    def noise(self) -> GaussianField:
        """Noise field on the prior's own grid; use :meth:`.GaussianField.at` for other grids."""
        ...

    @property
    def linear(self) -> GaussianDenoiser:
        """Gaussian part: the approximation of the prior that has a closed form.

        Raises:
            NoGaussianPart: If the prior has none.
        """
        ...

    def value_and_pullback(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Pullback]:
        """Expected clean states, and the map ``v -> J^T v`` for their Jacobian ``J``."""
        ...


@runtime_checkable
class Recorder(Prior, Protocol):
    """An engine that can record a prior or posterior built on it, for example as a CUDA graph."""

    def captured(self, prior: Prior) -> Prior:
        """A recorded version of a prior that calls this engine, or the prior itself."""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """A denoiser that can prepare for the noise levels of a sampler."""

    def scheduled(
        self, levels: Float[Tensor, " S"], like: Float[Tensor, "B C H W"]
    ) -> Mapping[float, Prior]:
        """The prior to call at each of these levels.

        Args:
            levels: Noise levels on the CPU, in any order; they may repeat.
            like: Tensor with the shape, dtype and device of the states; its values are not used.
        """
        ...


class FunctionPrior(Differentiable):
    """A prior from a denoising function, such as a network of your own.

    Args:
        denoise: The function; torch must be able to differentiate it.
        noise: Field of the noise that it removes.
        linear: Gaussian part of the prior. If None, a Gaussian with zero mean and the covariance of
            the noise at level one is used.
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
    """Raised by ``linear`` of a prior that has no Gaussian part in closed form."""


def gaussian_part(prior: Prior) -> GaussianDenoiser:
    """Gaussian part of a prior, for a preconditioner.

    For a prior that has none (:class:`NoGaussianPart`), it is a Gaussian with zero mean and the
    covariance of the noise at level one.
    """
    try:
        return prior.linear
    except NoGaussianPart:
        return GaussianDenoiser(0.0, prior.noise, prior.noise)


def grid_of(x: Tensor) -> tuple[int, int]:
    """Grid of states: number of rows and columns."""
    return x.shape[-2], x.shape[-1]
