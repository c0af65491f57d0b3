# SPDX-License-Identifier: Apache-2.0
"""Analyses with precise, redundant and worthless observations, against the solution in double."""

import numpy as np
import pytest
import torch
from priors import homogeneous
from tensors import relative

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import FourierBasis
from ddo_modulus.fields.linalg import inverse_factor
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.observations import LinearOperator, Observations
from ddo_modulus.posterior import AnalysisSystem, MomentMatching

SIGMA = 1.5


def at_points(index):
    index = torch.as_tensor(index)[:, None]
    return LinearOperator(index, torch.ones(len(index), 1), torch.zeros(len(index)))


def exact(prior, index, values, variance, x):
    """``D_y`` by dense algebra in double, with the errors bounded as by single precision."""
    points = prior.noise.basis.shape[0] * prior.noise.basis.shape[1]
    unit = torch.eye(points, dtype=torch.float64).reshape(points, 1, *prior.noise.shape)
    level = torch.tensor([SIGMA], dtype=torch.float64)
    covariance = prior.posterior_covariance(unit, level.expand(points)).reshape(points, points)
    clean = prior(x, level.expand(len(x))).flatten(1)
    index = torch.as_tensor(index)
    error = variance.clamp(1e-12, 1e16)
    system = covariance[index][:, index] + torch.diag(error)
    innovation = values - clean[:, index]
    return clean + innovation @ torch.linalg.solve(system, covariance[index])


def states(prior):
    generator = torch.Generator().manual_seed(3)
    return SIGMA * prior.noise.sample(2, generator=generator, dtype=torch.float64)


TORUS, SPHERE = FourierBasis((6, 8)), SphericalBasis((7, 12))
EVERYWHERE = torch.arange(48)
WIDE = torch.logspace(-6, 6, 48, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("basis", "index", "error", "tolerance"),
    [
        (TORUS, [5, 5], 1e-4, 1e-5),
        (TORUS, [5] * 20, 1e-4, 1e-5),
        (TORUS, [5, 5, 6, 6, 7, 7], 1e-6, 1e-5),
        (TORUS, [5, 5, 40, 40, 41], 3e-3, 1e-5),
        (TORUS, EVERYWHERE, 0.1, 3e-5),
        (TORUS, EVERYWHERE, 1e-4, 1e-5),
        (TORUS, EVERYWHERE, WIDE, 1e-5),
        (TORUS, EVERYWHERE, 1e20, 1e-5),
        (SPHERE, torch.arange(12), 1e-3, 1e-4),
        (SPHERE, [0, 3, 6, 9, 80, 83], 1e-4, 1e-4),
    ],
    ids=["pair", "twenty", "three-pairs", "mixed", "all", "all-precise", "wide", "worthless"]
    + ["pole", "both-poles"],
)
def test_precise_and_redundant_observations(basis, index, error, tolerance, dtype):
    prior, x = homogeneous(basis), None
    index = torch.as_tensor(index)
    x = states(prior)
    # Consistent but for their errors: neighbours, and points of a pole, hold one value.
    generator = torch.Generator().manual_seed(1)
    error = torch.as_tensor(error, dtype=torch.float64).expand(len(index))
    truth = prior.noise.sample(1, generator=generator, dtype=torch.float64).flatten()
    noise = torch.randn(len(index), generator=generator, dtype=torch.float64)
    values = truth[index] + error.clamp(max=1.0) * noise
    expected = exact(prior, index, values, error**2, x)
    system = AnalysisSystem(Observations(at_points(index), values, error**2), prior.noise)
    level = torch.full((1,), SIGMA, dtype=dtype).expand(len(x))
    found = MomentMatching(prior, system, covariance="linear")(x.to(dtype), level)
    assert found.dtype == dtype and bool(found.isfinite().all())
    assert relative(found.flatten(1), expected) < tolerance
    prepared = MomentMatching(prior, system).scheduled(level[:1], x.to(dtype))
    for iterated in (MomentMatching(prior, system), prepared[float(SIGMA)]):
        assert relative(iterated(x.to(dtype), level).flatten(1), expected) < 10 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_observation_without_weight_changes_nothing(dtype):
    prior = homogeneous(TORUS)
    x, level = states(prior).to(dtype), torch.full((2,), SIGMA, dtype=dtype)
    values = torch.tensor([0.3, -0.8, 1.1, 4e3], dtype=torch.float64)
    error = torch.tensor([0.2, 0.1, 0.3, 1e20], dtype=torch.float64)
    analyses = [
        MomentMatching(prior, Observations(at_points([3, 9, 30, 31][:n]), values[:n], e**2))
        for n, e in ((3, error[:3]), (4, error))
    ]
    without, with_it = (analysis(x, level) for analysis in analyses)
    assert relative(with_it, without) < 1e-6


def test_correlated_errors_are_bounded_with_their_correlations():
    prior = homogeneous(TORUS)
    scale = torch.tensor([1e9, 1.0, 2.0], dtype=torch.float64)
    correlation = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.0]]).double()
    covariance = scale[:, None] * correlation * scale
    observations = Observations(at_points([1, 2, 3]), torch.ones(3).double(), covariance=covariance)
    error = AnalysisSystem(observations, prior.noise).at_mean(prior).error[0]
    bounded = torch.tensor([1e8, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(error, bounded[:, None] * correlation * bounded)


def test_a_value_beyond_single_precision_is_refused():
    prior = homogeneous(TORUS)
    values = torch.tensor([1.0, 1e30], dtype=torch.float64)
    with pytest.raises(InputError, match=r"an observation is 1e\+30 .* leave it out"):
        AnalysisSystem(Observations(at_points([1, 2]), values, 0.1), prior.noise)


def test_a_matrix_without_a_factor_is_named():
    singular = -torch.eye(3, dtype=torch.float64)[None]
    with pytest.raises(InputError, match="not positive definite: observation errors are too small"):
        inverse_factor(singular)
    with pytest.raises(InputError, match="a value is NaN"):
        inverse_factor(torch.full((1, 2, 2), np.nan))
