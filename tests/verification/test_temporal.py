# SPDX-License-Identifier: Apache-2.0
"""Statistics in time of autoregressive sequences of fields, which are known."""

import pytest
import torch
from tensors import autoregressive, generator

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import FourierBasis
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.verification import (
    seam_ratio,
    temporal_autocovariance,
    time_difference_energy,
)

PHI = 0.8


def sequences(runs, frames, seed=0, size=16):
    """AR(1) in time, Matérn in space, unit variance: C(tau) = PHI^tau."""
    field = GaussianField(FourierBasis((size, size)), Matern(0.1, 1.0))
    draw = field.sample(runs * frames, generator=generator(seed))
    return autoregressive(draw.view(runs, frames, size, size), PHI)


def test_autocovariance_is_a_power():
    x = sequences(100, 40)
    found = temporal_autocovariance(x, lags=6, mean=0.0)
    expected = PHI ** torch.arange(7, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.02)
    with pytest.raises(InputError, match="at least 41"):
        temporal_autocovariance(x, lags=40)


def test_energy_of_differences():
    """E |x_{t+1} - x_t|^2 = 2 (1 - PHI)."""
    x = sequences(100, 40)
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
    x = sequences(100, 21)
    assert float((seam_ratio(time_difference_energy(x)) - 1).abs().max()) < 0.1
    windows = torch.cat([x[:, :11], sequences(100, 10, seed=1)], 1)  # 10 -> 11 forgets
    ratio = seam_ratio(time_difference_energy(windows))
    assert int(ratio.argmax()) == 10
    mean = (19 * 2 * (1 - PHI) + 2) / 20
    assert float(ratio[10]) == pytest.approx(2 / mean, rel=0.05)
