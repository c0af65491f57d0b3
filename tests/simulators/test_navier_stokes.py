# SPDX-License-Identifier: Apache-2.0
"""The Navier-Stokes flow of the operator-learning benchmarks against closed forms."""

import math

import numpy as np
import pytest
import torch
from tensors import generator

from ddo_modulus.errors import InputError
from ddo_modulus.simulators import SIMULATORS, NavierStokes


def test_initial_spectrum_is_the_matern_law():
    """Mean power of each wave: 2 tau^(2 alpha - 2) (4 pi^2 k^2 + tau^2)^(-alpha)."""
    flow = NavierStokes(resolution=24, output_resolution=24, alpha=2.0, tau=5.0)
    fields = flow.initial(3000, generator=generator(), dtype=torch.float64)
    power = torch.fft.fft2(fields, norm="forward").abs().square().mean(0)
    k = torch.fft.fftfreq(24, 1 / 24, dtype=torch.float64)
    square = k[:, None] ** 2 + k**2
    law = 2 * 5.0**2 * (4 * math.pi**2 * square + 25) ** -2.0
    kept = (k[:, None].abs() < 8) & (k.abs() < 8) & (square > 0)
    ratio = (power / law)[kept]
    # A mean of 3000 exponential variables: standard deviation .018; 224 of them.
    assert abs(ratio.mean() - 1) < 0.005
    assert (ratio - 1).abs().max() < 0.1
    assert power[~kept].max() < 1e-25


def test_forcing_alone_gives_the_exact_linear_response():
    """From rest the forced diagonal wave stays a parallel flow: advection vanishes."""
    flow = NavierStokes(viscosity=0.02, resolution=16, output_resolution=8, dt=0.05)
    end = flow.advance(torch.zeros(1, 16, 16, dtype=torch.float64), 1.5)[0]
    rate = 0.02 * 8 * math.pi**2
    # Blocks of two points: the first mean stands at x = 0, its points a quarter cell from there.
    x = (torch.arange(16, dtype=torch.float64) - 0.5) / 16
    phase = 2 * math.pi * (x[:, None] + x)
    response = 0.1 * (1 - math.exp(-rate * 1.5)) / rate
    exact = response * (torch.sin(phase) + torch.cos(phase))
    torch.testing.assert_close(end, exact, rtol=1e-5, atol=1e-8)


def test_without_pooling_the_forcing_is_that_of_the_coordinates():
    flow = NavierStokes(resolution=16, output_resolution=16)
    lat, lon = (flow.coordinates()[name][1] for name in ("lat", "lon"))
    phase = 2 * math.pi * (lat[:, None] + lon)
    found = flow.terms(torch.device("cpu")).forcing.numpy()
    np.testing.assert_allclose(found, 0.1 * (np.sin(phase) + np.cos(phase)), atol=1e-14)


def test_two_frames_are_the_pair_of_initial_and_final_vorticity():
    flow = NavierStokes(resolution=32, output_resolution=32)
    (frames,) = flow.simulate(2, 2, generator=generator(1), dtype=torch.float64)
    start = flow.initial(2, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(frames[:, 0], start, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(frames[:, 1], flow.advance(start, 1.0), rtol=1e-9, atol=1e-12)


def test_enstrophy_budget_closes():
    """d(enstrophy)/dt = mean of w f - nu |grad w|^2, from differences of simulated frames."""
    flow = NavierStokes(
        viscosity=2e-3, resolution=48, output_resolution=48, interval=0.02, forcing_amplitude=1.0
    )
    (frames,) = flow.simulate(2, 41, generator=generator(), dtype=torch.float64)
    k = torch.fft.fftfreq(48, 1 / 48, dtype=torch.float64) * 2 * math.pi
    square = k[:, None] ** 2 + k**2
    power = torch.fft.fft2(frames, norm="forward").abs().square()
    forcing = flow.terms(torch.device("cpu")).forcing
    injection = (frames * forcing).mean((-2, -1))
    dissipation = 2e-3 * (power * square).sum((-2, -1))
    enstrophy = 0.5 * frames.square().mean((-2, -1))
    change = enstrophy[:, -1] - enstrophy[:, 0]
    expected = torch.trapezoid(injection - dissipation, dx=0.02, dim=1)
    assert (change.abs() > 0.1 * dissipation[:, 0] * 0.8).all()  # it does change
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    "wrong", [{"viscosity": 0.0}, {"tau": -1.0}, {"resolution": 64.5}, {"alpha": math.inf}]
)
def test_parameters_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        NavierStokes(**wrong)


def test_every_simulator_is_found_by_its_name():
    assert sorted(SIMULATORS) == ["kolmogorov", "navier_stokes", "shallow_water"]
    assert SIMULATORS["navier_stokes"] is NavierStokes
