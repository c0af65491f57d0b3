# SPDX-License-Identifier: Apache-2.0
"""The system of an analysis: against dense matrices, and against itself built anew."""

import numpy as np
import pytest
import torch

from ddo_modulus.fields.basis import CosineBasis
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, Matern
from ddo_modulus.fields.grid import BoxGrid
from ddo_modulus.observations import Observations, PointOperator, StackedOperator, wind_speed
from ddo_modulus.posterior import AnalysisSystem, MomentMatching
from ddo_modulus.posterior import system as module

GRID = BoxGrid((6, 7), periodic=False)
NOISE = GaussianField(CosineBasis((6, 7)), Matern(0.25, 0.5), 2)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def prior(seed=0):
    mean = 0.3 * randn(2, 6, 7, seed=seed)
    return GaussianDenoiser(mean, GaussianField(NOISE.basis, Matern(0.4, 1.5), 2), NOISE)


def eofs():
    root = randn(84, 84, seed=3)
    covariance = root @ root.T / 84 + 0.1 * torch.eye(84, dtype=torch.float64)
    index = torch.arange(84)
    field = EOFField.from_covariance(NOISE, covariance, index, torch.ones(84).double())
    return GaussianDenoiser(0.0, field, NOISE)


def points(count, seed, channel=0):
    random = np.random.default_rng(seed)
    return PointOperator(GRID, *random.uniform(0.1, 0.9, (2, count)), channel)


OPERATORS = {
    "points": points(7, 1),
    "stack of points": StackedOperator(points(4, 1), points(3, 2, 1)),
    "speed": StackedOperator(points(3, 1), wind_speed(points(5, 2, 0), points(5, 2, 1))),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def observed(operator, seed=5):
    size = operator.size
    return Observations(operator, randn(size, seed=seed), 0.1 + randn(size, seed=seed + 1).square())


@pytest.fixture
def computed(monkeypatch):
    """Sizes of the operators whose square roots are computed."""
    sizes, original = [], module.observation_root

    def counted(tangent, noise, like):
        sizes.append(tangent.terms[0][1].size)
        return original(tangent, noise, like)

    monkeypatch.setattr(module, "observation_root", counted)
    return sizes


@every_operator
@pytest.mark.parametrize("kind", [prior, eofs])
def test_rows_are_those_of_the_dense_jacobian(name, kind, dense):
    denoiser, observations = kind(), observed(OPERATORS[name])
    x = randn(2, 2, 6, 7, seed=8)
    at = AnalysisSystem(observations, NOISE).at(x, denoiser)
    root = dense(lambda a: denoiser.fields(a, mean=False), (84,))  # L E
    for i in range(2):
        h = torch.func.jacrev(lambda s: observations.operator(s)[0])(x[i : i + 1]).flatten(1)
        rows = at.rows[min(i, len(at.rows) - 1)]
        torch.testing.assert_close(rows, h @ root, rtol=1e-5, atol=1e-6)
        covariance = h @ root @ torch.diag(denoiser.variance[0]) @ root.T @ h.T
        expected = covariance.diagonal() + observations.variance
        torch.testing.assert_close(at.expected_variance()[i], expected, rtol=1e-5, atol=1e-6)


@every_operator
def test_some_of_the_observations_keep_their_square_roots(name, computed):
    denoiser, observations = prior(), observed(OPERATORS[name])
    rows = torch.tensor([0, 2, 4, 6])
    system = AnalysisSystem(observations, NOISE)
    before = system.at_mean(denoiser)
    computed.clear()
    fewer = system.take(rows).at_mean(denoiser)
    assert not computed
    torch.testing.assert_close(fewer.rows, before.rows[:, rows])
    torch.testing.assert_close(fewer.innovation, before.innovation[:, rows])
    anew = AnalysisSystem(observations.take(rows), NOISE).at_mean(denoiser)
    for found, expected in zip(
        (fewer.rows, fewer.innovation, fewer.expected_variance()),
        (anew.rows, anew.innovation, anew.expected_variance()),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_a_part_of_which_nothing_is_left_is_left_out(computed):
    denoiser, observations = prior(), observed(OPERATORS["speed"])
    system = AnalysisSystem(observations, NOISE)
    system.at_mean(denoiser)
    rows = torch.tensor([3, 5])  # of the speeds alone
    fewer = system.take(rows).at_mean(denoiser)
    anew = AnalysisSystem(observations.take(rows), NOISE).at_mean(denoiser)
    torch.testing.assert_close(fewer.rows, anew.rows)
    torch.testing.assert_close(fewer.innovation, anew.innovation)


def test_a_batch_is_its_parts_and_computes_nothing_anew(computed):
    denoiser = prior()
    systems = [AnalysisSystem(observed(points(n, n)), NOISE) for n in (7, 3, 5)]
    parts = [system.at_mean(denoiser) for system in systems]
    assert computed == [7, 3, 5]
    whole = AnalysisSystem.batch(systems).at_mean(denoiser)
    assert computed == [7, 3, 5]
    for i, (part, count) in enumerate(zip(parts, (7, 3, 5), strict=True)):
        torch.testing.assert_close(whole.rows[i, :count], part.rows[0])
        assert not whole.rows[i, count:].any()
        torch.testing.assert_close(whole.innovation[i, :count], part.innovation[0])


def test_single_precision_is_converted_and_other_values_share_the_places(computed):
    denoiser, system = prior(), AnalysisSystem(observed(points(6, 1)), NOISE)
    double = system.at_mean(denoiser)
    single = system.at(randn(2, 2, 6, 7).float(), denoiser)
    assert single.rows.dtype == torch.float32 and computed == [6]
    torch.testing.assert_close(single.rows.double(), double.rows, rtol=1e-5, atol=1e-6)
    other = system.with_values(torch.zeros(6).double(), torch.ones(6).double())
    assert computed == [6]
    torch.testing.assert_close(other.at_mean(denoiser).rows, double.rows)
    torch.testing.assert_close(other.at_mean(denoiser).error[0], torch.eye(6).double())
    system.forget()
    torch.testing.assert_close(system.at_mean(denoiser).rows, double.rows)
    assert computed == [6, 6]


# ---- a posterior is a prior ---------------------------------------------------------------------


@pytest.mark.parametrize("first", ["jacobian", "linear"])
@pytest.mark.parametrize("second", ["jacobian", "linear"])
def test_the_pullback_of_a_posterior_is_the_transposed_jacobian(first, second, dense):
    """Of a Gaussian prior, whose posterior is affine in the noisy state."""
    inner = MomentMatching(prior(), observed(points(5, 1)), covariance=first, iterations=8)
    posterior = inner
    if second == "jacobian":
        more = observed(points(4, 2), seed=9)
        posterior = MomentMatching(inner, more, covariance="jacobian", iterations=12)
    x, sigma = randn(2, 2, 6, 7, seed=4), torch.tensor([0.3, 1.5], dtype=torch.float64)
    clean, pullback = posterior.value_and_pullback(x, sigma)
    torch.testing.assert_close(clean, posterior(x, sigma), rtol=1e-6, atol=1e-6)
    v, w = randn(2, 2, 6, 7, seed=5), randn(2, 2, 6, 7, seed=6)
    change = posterior(x + w, sigma) - posterior(x, sigma)  # affine: no step too large
    torch.testing.assert_close((pullback(v) * w).sum(), (v * change).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", ["jacobian", "linear"])
def test_observing_in_turn_is_observing_at_once(first):
    one, two = observed(points(5, 1)), observed(points(4, 2), seed=9)
    both = Observations(
        StackedOperator(one.operator, two.operator),
        torch.cat([one.values, two.values]),
        torch.cat([one.variance, two.variance]),
    )
    x, sigma = randn(3, 2, 6, 7, seed=4), torch.full((3,), 0.7, dtype=torch.float64)
    inner = MomentMatching(prior(), one, covariance=first, iterations=6)
    in_turn = MomentMatching(inner, two, iterations=12)(x, sigma)
    at_once = MomentMatching(prior(), both)(x, sigma)
    torch.testing.assert_close(in_turn, at_once, rtol=1e-6, atol=1e-6)
