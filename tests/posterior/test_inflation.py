# SPDX-License-Identifier: Apache-2.0
"""Derivatives of priors that automatic differentiation cannot look into, scaled or not."""

import pytest
import torch

from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.fields.basis import FourierBasis
from ddo_modulus.fields.derivative import Differentiable
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.posterior import Inflated


class Curved(Differentiable):
    """A denoiser that is not linear, nor is its derivative symmetric."""

    def __init__(self):
        basis = FourierBasis((5, 6))
        self.noise = GaussianField(basis, Matern(0.2, 1.0))
        self.linear = GaussianDenoiser(0.3, GaussianField(basis, Matern(0.4, 2.0)), self.noise)

    def __call__(self, x, sigma, condition=None):
        shift = 0.0 if condition is None else condition[:, :1, None, None]
        return self.linear(x, sigma) + torch.sin(x * torch.roll(x, 1, -1) + shift) / (
            1 + sigma.view(-1, 1, 1, 1)
        )


class Opaque(Curved):
    """The same with a derivative of its own; not to be differentiated."""

    def __call__(self, x, sigma, condition=None):
        with torch.no_grad():
            return super().__call__(x.detach(), sigma, condition)

    def value_and_pullback(self, x, sigma, condition=None):
        return Curved().value_and_pullback(x, sigma, condition)


@pytest.fixture
def arguments():
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 4, 1, 5, 6, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0.1, 0.5, 2.0, 9.0]).double(), v, torch.rand(4, 2).double()


def differentiated(denoiser, x, sigma, v, condition):
    x = x.clone().requires_grad_()
    clean = denoiser(x, sigma, condition)
    return clean.detach(), torch.autograd.grad(clean, x, v)[0]


@pytest.mark.parametrize("inner", [Curved, Opaque])
@pytest.mark.parametrize("factor", [None, 2.5, [0.4, 3.0]])
def test_derivatives_equal_automatic_ones(inner, factor, arguments):
    x, sigma, v, condition = arguments
    scale = (lambda d: d) if factor is None else (lambda d: Inflated(d, torch.tensor(factor)))
    expected = differentiated(scale(Curved()), *arguments)
    denoiser = scale(inner())
    clean, pullback = denoiser.value_and_pullback(x, sigma, condition)
    assert not clean.requires_grad
    for _ in range(2):  # it may be called again
        torch.testing.assert_close((clean, pullback(v)), expected)


def test_a_prior_is_recognised_by_its_parts():
    assert isinstance(Inflated(Opaque(), 2.0), Prior)
    assert not isinstance(lambda x, sigma, condition=None: x, Prior)
