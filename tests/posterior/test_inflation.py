# SPDX-License-Identifier: Apache-2.0
"""Inflation against closed forms, and derivatives that automatic differentiation cannot see."""

import math

import pytest
import torch
from priors import homogeneous, with_eofs
from scipy.optimize import minimize_scalar

from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.derivative import Differentiable
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.observations import LinearOperator, Observations
from ddo_modulus.posterior import AnalysisSystem, Inflated, Innovations, innovation_inflation


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


# ---- the scaled prior -------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [[0.3], [2.5], [0.4, 3.0]])
def test_an_inflated_gaussian_is_the_gaussian_of_inflated_covariance(factor, arguments):
    prior = with_eofs(CosineBasis((5, 6)))
    x, sigma, _, _ = arguments
    scaled = Inflated(prior, torch.tensor(factor))
    expected = torch.cat(
        [
            GaussianDenoiser(prior.mean, prior.prior, prior.noise, f)(part, level)
            for f, part, level in zip(
                factor, x.chunk(len(factor)), sigma.chunk(len(factor)), strict=True
            )
        ]
    )
    torch.testing.assert_close(scaled(x, sigma), expected)
    torch.testing.assert_close(scaled.linear(x, sigma), expected)
    one = sigma[:1].expand(len(x))  # one level for all, as samplers pass it
    torch.testing.assert_close(scaled(x, one), scaled(x, one.clone()))


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, [1.0, 0.0]])
def test_a_factor_that_cannot_be_is_refused(factor):
    with pytest.raises(InputError, match="must be positive and finite"):
        Inflated(Opaque(), torch.tensor(factor))


# ---- innovations ------------------------------------------------------------------------------


def observed(prior, analyses=2, correlated=True):
    """Observations of six places with correlated errors, and dense ``H P H^T``, ``R``, ``d``."""
    index = torch.tensor([0, 3, 8, 9, 20, 29])[:, None]
    operator = LinearOperator(index, torch.ones(6, 1), torch.zeros(6))
    generator = torch.Generator().manual_seed(4)
    values = 2 * torch.randn(analyses, 6, generator=generator, dtype=torch.float64)
    scale = torch.tensor([0.3, 0.5, 0.2, 1.0, 0.4, 0.6], dtype=torch.float64)
    error = torch.full((6, 6), 0.4 if correlated else 0.0, dtype=torch.float64)
    error = scale[:, None] * error.fill_diagonal_(1.0) * scale
    observations = Observations(operator, values, covariance=error)
    unit = torch.eye(30, dtype=torch.float64).reshape(30, 1, 5, 6)
    everything = torch.full((30,), 1e7, dtype=torch.float64)
    covariance = prior.posterior_covariance(unit, everything).reshape(30, 30)
    places = index[:, 0]
    mean = prior.mean.expand(1, 5, 6).flatten()[places]
    return observations, covariance[places][:, places], error, values - mean


@pytest.mark.parametrize("build", [homogeneous, with_eofs])
def test_innovations_are_diagonal_in_their_coordinates(build):
    prior = build(CosineBasis((5, 6)))
    observations, covariance, error, d = observed(prior)
    at = AnalysisSystem(observations, prior.noise).at_mean(prior)
    found = Innovations.of(at)
    root = torch.linalg.inv(torch.linalg.cholesky(error))
    expected = torch.linalg.eigvalsh(root @ covariance @ root.mT)
    torch.testing.assert_close(found.signal, expected.expand(2, 6), rtol=1e-6, atol=1e-9)
    assert bool((found.signal >= 0).all())
    for factor in (1.0, 0.5, 4.0):
        total = factor * covariance + error
        squares = (d @ torch.linalg.inv(total) * d).sum(1)
        torch.testing.assert_close(found.chi_square(factor), squares, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.chi_square(), found.chi_square(1.0))
    both = found.chi_square(torch.tensor([0.5, 4.0]))
    torch.testing.assert_close(both[0], found.chi_square(0.5)[0])
    torch.testing.assert_close(both[1], found.chi_square(4.0)[1])


def most_probable(covariance, error, d, width, bounds):
    """The maximum over the factor, by search, of the dense logarithm of the density."""

    def loss(logarithm):
        law = torch.distributions.MultivariateNormal(
            torch.zeros(len(d), dtype=torch.float64), math.exp(logarithm) * covariance + error
        )
        return 0.5 * (logarithm / width) ** 2 - float(law.log_prob(d))

    low, high = map(math.log, bounds)
    # From several starts: the search is local.
    ends = torch.linspace(low, high, 9).tolist()
    found = [
        minimize_scalar(loss, bounds=pair, method="bounded", options={"xatol": 1e-6})
        for pair in zip(ends[:-1], ends[1:], strict=True)
    ]
    return min(found, key=lambda result: result.fun).x


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0], ids=["calm", "usual", "wild"])
@pytest.mark.parametrize("width", [0.1, 0.5, 1.0, 3.0, math.inf])
def test_the_factor_is_the_most_probable_one(width, scale):
    prior = homogeneous(CosineBasis((5, 6)))
    observations, covariance, error, d = observed(prior)
    mean = observations.values - d
    values = mean + scale * d
    observations = Observations(observations.operator, values, covariance=error)
    bounds = (0.1, 40.0)
    step = math.log(bounds[1] / bounds[0]) / 432
    found = innovation_inflation(prior, observations, width=width, bounds=bounds).log()
    for value, innovation in zip(found.tolist(), scale * d, strict=True):
        expected = most_probable(covariance, error, innovation, width, bounds)
        assert value == pytest.approx(expected, abs=0.6 * step)
    system = AnalysisSystem(observations, prior.noise)
    torch.testing.assert_close(
        innovation_inflation(prior, system, width=width, bounds=bounds).log(), found
    )


def innovations(square, signal=4.0, number=6):
    """Innovations of one analysis with equal signals and squares."""
    shape = (1, number)
    return Innovations(torch.full(shape, signal).double(), torch.full(shape, square).double())


@pytest.mark.parametrize("square", [3.0, 9.0, 21.0])
def test_the_most_likely_factor_explains_the_mean_square(square):
    factor = innovations(square).inflation(math.inf)
    assert float(factor) == pytest.approx((square - 1) / 4, rel=0.01)


@pytest.mark.parametrize("number", [1, 4, 50])
@pytest.mark.parametrize("width", [0.2, 1.0, 2.0])
def test_the_prior_of_the_factor_weighs_by_its_width(width, number):
    """At the maximum, the slope of the likelihood is ``log(factor) / width^2``."""
    square, signal = 15.0, 4.0
    factor = float(innovations(square, signal, number).inflation(width, (0.05, 60.0)))
    total = 1 + factor * signal
    slope = 0.5 * number * factor * signal * (square - total) / total**2
    expected = math.log(factor) / width**2
    # The slopes cross within a step of the grid.
    curvature = 0.5 * number + 1 / width**2
    assert abs(slope - expected) <= curvature * math.log(60 / 0.05) / 432


def test_by_default_the_width_is_one_and_the_factor_bounded():
    some = innovations(15.0, number=2)
    assert float(some.inflation()) == float(some.inflation(1.0))
    assert float(some.inflation()) != float(some.inflation(1.3))
    assert float(innovations(1e6).inflation()) == pytest.approx(15.0)
    assert float(innovations(0.0, number=1000).inflation()) == pytest.approx(0.2)
    assert float(innovations(1e6).inflation(bounds=(0.5, 3.0))) == pytest.approx(3.0)
    assert float(innovations(0.0, number=1000).inflation(bounds=(0.5, 3.0))) == pytest.approx(0.5)
    prior = homogeneous(CosineBasis((5, 6)))
    observations = observed(prior)[0]
    torch.testing.assert_close(
        innovation_inflation(prior, observations),
        innovation_inflation(prior, observations, width=1.0, bounds=(0.2, 15.0)),
    )


def test_each_analysis_has_its_own_factor():
    calm, wild = innovations(0.5), innovations(20.0)
    both = Innovations(torch.cat([calm.signal, wild.signal]), torch.cat([calm.square, wild.square]))
    torch.testing.assert_close(both.inflation(), torch.cat([calm.inflation(), wild.inflation()]))
    assert both.inflation().dtype == torch.float64 and both.inflation()[0] < 1 < both.inflation()[1]
