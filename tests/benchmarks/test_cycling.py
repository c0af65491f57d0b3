# SPDX-License-Identifier: Apache-2.0
"""The cycling benchmark's parts: the model's grid, and ours where the Kalman filter is known."""

import argparse
import math

import pytest
import torch

from ddo_modulus.diffusion.package import Package


@pytest.fixture(scope="module")
def code(imported):
    return imported("cycling")


def wave(points: int) -> torch.Tensor:
    """The same two waves at the centres of any number of cells."""
    s = 2 * math.pi * (torch.arange(points, dtype=torch.float64) + 0.5) / points
    y, x = s[:, None], s[None]
    return (torch.cos(5 * y + 7 * x + 0.3) + torch.sin(3 * x - 11 * y)).float()


def test_model_sees_the_field_that_block_means_are_of(code):
    forecast = code.Forecast(0.2, 2.0, "cpu")
    states = wave(128).unflatten(-1, (64, 2)).unflatten(-3, (64, 2)).mean((-3, -1)) / 2
    fine = forecast.lift(states)
    torch.testing.assert_close(fine, wave(96), atol=1e-4, rtol=0)
    torch.testing.assert_close(forecast.lower(fine), states, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_gaussian_prior_gives_the_kalman_filter_of_the_forecasts_spectrum(code, share):
    package = Package.load("kolmogorov64")
    options = argparse.Namespace(device="cpu", iterations=0, steps=24)
    method = code.LearnedPrior(package, options, share=share, network=False)
    noise, linear = method.noise, method.linear
    generator = torch.Generator().manual_seed(0)

    # Members about a common mean, with a quarter of the climate's variance.
    z = torch.randn(9, 4096, generator=generator)
    fields = linear.fields(z * linear.variance.sqrt().float())
    forecast = (fields[:1] + 0.5 * fields[1:])[None]
    index = torch.randperm(4096, generator=generator)[None, :40]
    method._inflated = lambda forecast, index, values: forecast  # noqa: ARG005
    values = torch.randn(1, 40, generator=generator)
    analysis = method(forecast, index, values)

    mean = forecast[0].mean(0)
    anomalies = noise.whiten(forecast[0] - mean)[None, :, 0]
    variance = (method._share(anomalies) * (1 + 1 / 8)).clamp_max(0.95) * method.climate

    def apply(v):  # P v for fields (N, 1, H, W)
        return noise.color((noise.color_adjoint(v) * variance[:, None].T).float())

    unit = torch.zeros(40, 4096).scatter(1, index.T, 1.0).view(40, 1, 64, 64)
    columns = apply(unit).flatten(1)  # P H^T
    matrix = columns[:, index[0]] + 0.01 * torch.eye(40)
    weight = torch.linalg.solve(matrix, values[0] - mean.flatten()[index[0]])
    expected = mean.flatten() + weight @ columns
    error = analysis[0].mean(0).flatten() - expected
    assert float(error.square().mean().sqrt()) < 0.02 * float((expected - mean.flatten()).std())
    at_points = analysis[0].flatten(1)[:, index[0]].var(0).mean()
    theory = matrix.diagonal() - 0.01
    theory = (
        theory
        - (columns[:, index[0]] @ torch.linalg.solve(matrix, columns[:, index[0]])).diagonal()
    ).mean()
    assert 0.5 < float(at_points / theory) < 2.0


def test_bridge_shares_the_likelihood_out(code, monkeypatch):
    package = Package.load("kolmogorov64")
    options = argparse.Namespace(device="cpu", iterations=0, steps=2)
    method = code.LearnedPrior(package, options, bridge=0.3, network=False)
    variances = []
    given, filtered = code.Observations, code.TransformFilter

    def observations(operator, values, variance):
        variances.append(variance)
        return given(operator, values, variance)

    def transform(radius, inflation, error):
        variances.append(error**2)
        return filtered(radius, inflation, error)

    monkeypatch.setattr(code, "Observations", observations)
    monkeypatch.setattr(code, "TransformFilter", transform)
    forecast = torch.randn(1, 4, 1, 64, 64)
    method(forecast, torch.arange(20)[None], torch.zeros(1, 20))
    assert len(variances) == 2
    assert sum(1 / v for v in variances) == pytest.approx(1 / code.ERROR**2)


def test_divergence_is_counted_against_climatology(code):
    truth = torch.randn(5, 2, 1, 64, 64)
    index = torch.zeros(5, 2, 1, dtype=torch.long)
    start = torch.randn(2, 4, 1, 64, 64)
    world = code.World(truth, index, truth.flatten(2)[..., :1], start)
    far = code.run(world, None, lambda forecast, index, values: forecast + 3)
    free = code.run(world, None, None)
    assert code.row("far", far, free, free.last(), 4).split("|")[-3].strip() == "2 of 2"
    assert code.row("free", free, free, free.last(), 4).split("|")[-3].strip() == "0 of 2"
