# SPDX-License-Identifier: Apache-2.0
"""Desroziers' estimates and chi-square for Gaussian errors with exact covariances."""

import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.verification.innovations import (
    desroziers,
    desroziers_covariances,
    reduced_chi_square,
)


@pytest.fixture
def system():
    """``H B H^T`` and ``R`` of five observations, and innovations of just these covariances."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    background = h @ root @ root.T @ h.T / 8
    error = torch.diag(0.5 + torch.rand(5, generator=generator, dtype=torch.float64))
    factor = torch.linalg.cholesky(background + error)
    # Ten innovations without mean whose sample covariance is the expected one.
    unit = torch.cat([torch.eye(5), -torch.eye(5)]).double() * (9 / 2) ** 0.5
    return background, error, unit @ factor.T


def analysed(innovations, background, error):
    """O-A of an analysis with these covariances, ``R (H B H^T + R)^-1 d``."""
    return innovations @ torch.linalg.solve(background + error, error)


def test_consistent_analysis_returns_its_own_errors(system):
    background, error, d = system
    observed, forecast = desroziers_covariances(d, analysed(d, background, error))
    torch.testing.assert_close(observed, error)
    torch.testing.assert_close(forecast, background)


def test_scalars_are_mean_variances(system):
    background, error, d = system
    estimate = desroziers(d, analysed(d, background, error))
    assert estimate.count == 50
    scale = 9 * 5 / 49  # degrees of freedom: one mean for all, not one for each place
    assert estimate.observation == pytest.approx(scale * float(error.diagonal().mean()))
    assert estimate.background == pytest.approx(scale * float(background.diagonal().mean()))
    assert estimate.innovation == pytest.approx(estimate.observation + estimate.background)
    a = background - background @ torch.linalg.solve(background + error, background)
    assert estimate.analysis == pytest.approx(scale * float(a.diagonal().mean()))


def test_wrong_assumptions_are_found_out_and_mended_by_repetition(system):
    background, error, d = system
    truth = float(error.diagonal().mean())
    factor, estimates = 4.0, []
    for _ in range(30):  # the background's error is right, the observations' is not
        assumed = factor * error
        estimate = float(
            desroziers_covariances(d, analysed(d, background, assumed))[0].diagonal().mean()
        )
        estimates.append(estimate)
        factor = estimate / truth
    assert truth < estimates[0] < 4 * truth  # between the truth and what was assumed
    assert estimates[-1] == pytest.approx(truth, rel=1e-3)


def test_monte_carlo_of_a_whole_analysis_converges():
    generator = torch.Generator().manual_seed(2)
    draw = torch.randn(2, 40000, 1, generator=generator, dtype=torch.float64)
    forecast_error, observation_error = 0.8 * draw[0], 0.5 * draw[1]
    d = observation_error - forecast_error + 0.3  # a bias is no variance
    gain = 0.64 / (0.64 + 0.25)  # Kalman's
    estimate = desroziers(d, (1 - gain) * d)
    assert estimate.observation == pytest.approx(0.25, rel=0.02)
    assert estimate.background == pytest.approx(0.64, rel=0.02)
    assert estimate.mean_innovation == pytest.approx(0.3, abs=0.02)


def test_chi_square_is_one_if_consistent_and_scales_with_the_error(system):
    background, error, d = system
    expected = background + error
    assert reduced_chi_square(d, expected, covariance=True) == pytest.approx(0.9)  # 9 of 10
    assert reduced_chi_square(d, expected / 4, covariance=True) == pytest.approx(3.6)
    assert reduced_chi_square(d, expected.diagonal()) == pytest.approx(0.9)
    assert reduced_chi_square(d[0], expected, covariance=True) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: desroziers(torch.zeros(3), torch.zeros(4)), "belong together"),
        (lambda: desroziers(torch.zeros(1), torch.zeros(1)), "at least two"),
        (lambda: desroziers(torch.tensor([0.0, torch.nan]), torch.zeros(2)), "finite"),
        (lambda: desroziers_covariances(torch.zeros(3), torch.zeros(3)), "analyses"),
        (lambda: reduced_chi_square(torch.zeros(2), torch.zeros(2)), "positive"),
        (lambda: reduced_chi_square(torch.zeros(2), torch.ones(3)), "do not fit"),
        (lambda: reduced_chi_square(torch.zeros(0), torch.ones(1)), "no innovations"),
        (lambda: reduced_chi_square(torch.zeros(2), torch.eye(3), covariance=True), "fit"),
        (
            lambda: reduced_chi_square(torch.zeros(2), -torch.eye(2), covariance=True),
            "positive definite",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()
