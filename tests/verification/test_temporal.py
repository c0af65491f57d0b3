# SPDX-License-Identifier: Apache-2.0
"""Statistics in time of autoregressive sequences of fields, which are known."""

import math

import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import FourierBasis
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.verification import (
    seam_ratio,
    temporal_autocovariance,
    time_difference_energy,
)

PHI = 0.8


def autoregressive(runs, frames, seed=0, size=16):
    """Stationary AR(1) in time, Matérn in space, unit variance: C(tau) = PHI^tau."""
    field = GaussianField(FourierBasis((size, size)), Matern(0.1, 1.0))
    generator = torch.Generator().manual_seed(seed)
    draw = field.sample(runs * frames, generator=generator).view(runs, frames, size, size)
    x = [draw[:, 0]]
    for t in range(1, frames):
        x.append(PHI * x[-1] + math.sqrt(1 - PHI**2) * draw[:, t])
    return torch.stack(x, 1)


def test_autocovariance_is_a_power():
    x = autoregressive(100, 40)
    found = temporal_autocovariance(x, lags=6, mean=0.0)
    expected = PHI ** torch.arange(7, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.02)
    with pytest.raises(InputError, match="at least 41"):
        temporal_autocovariance(x, lags=40)


def test_energy_of_differences():
    """E |x_{t+1} - x_t|^2 = 2 (1 - PHI)."""
    x = autoregressive(100, 40)
    energy = time_difference_energy(x)
    assert energy.shape == (100, 39)
    assert float(energy.mean()) == pytest.approx(2 * (1 - PHI), rel=0.02)
    weights = torch.zeros(16, 16)
    weights[3, 5] = 2.0
    one = time_difference_energy(x, weights)
    torch.testing.assert_close(one, (x[:, 1:, 3, 5] - x[:, :-1, 3, 5]).double().square())
    with pytest.raises(InputError, match="at least 2"):
        time_difference_energy(x[:, :1])


def test_a_seam_shows_where_it_is():
    x = autoregressive(100, 21)
    assert float((seam_ratio(time_difference_energy(x)) - 1).abs().max()) < 0.1
    windows = torch.cat([x[:, :11], autoregressive(100, 10, seed=1)], 1)  # 10 -> 11 forgets
    ratio = seam_ratio(time_difference_energy(windows))
    assert int(ratio.argmax()) == 10
    mean = (19 * 2 * (1 - PHI) + 2) / 20
    assert float(ratio[10]) == pytest.approx(2 / mean, rel=0.05)
