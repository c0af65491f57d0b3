# SPDX-License-Identifier: Apache-2.0
"""A grid with states of the atmosphere on it, and what every operator has to satisfy."""

import math

import numpy as np
import pytest
import torch

from ddo_modulus.fields.grid import LatLonGrid

_GRID = LatLonGrid(np.arange(58.0, 52.0, -1), np.arange(-6.0, 2.0))
# By the beginning of a channel's name: typical value and standard deviation.
_TYPICAL = {
    "t2m": (285.0, 5.0),
    "skt": (286.0, 5.0),
    "d2m": (279.0, 4.0),
    "q2m": (6e-3, 1e-3),
    "r2m": (70.0, 8.0),
    "sp": (99e3, 1e3),
    "msl": (1.01e5, 1e3),
    "u": (6.0, 4.0),
    "v": (-4.0, 4.0),
    "q": (2e-3, 3e-4),
    "r": (50.0, 8.0),
    "t": (260.0, 5.0),
    "z": (3e4, 500.0),
}


@pytest.fixture(scope="session")
def grid():
    return _GRID


@pytest.fixture(scope="session")
def typical():
    """Typical value and standard deviation of a channel."""
    return lambda name: next(v for key, v in _TYPICAL.items() if name.startswith(key))


@pytest.fixture(scope="session")
def atmosphere(typical):
    """States ``(B, C, H, W)`` of ``channels``, and perturbations of them, float64."""

    def make(channels, batch=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (2, batch, len(channels), *_GRID.shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        value, deviation = torch.tensor([typical(name) for name in channels]).double().T
        deviation = deviation[:, None, None]
        return value[:, None, None] + deviation * noise[0].clamp(-2, 2), deviation * noise[1]

    return make


@pytest.fixture(scope="session")
def consistent():
    """Check an operator at states: tangent, adjoint, rows, gradient, precision, rescaling."""

    def check(operator, x, v, *, rtol=1e-6):
        shape = x.shape[1:]
        tangent = operator.linearize(x)
        change, step = tangent(v), 1e-4
        difference = (operator(x + step * v) - operator(x - step * v)) / (2 * step)
        torch.testing.assert_close(change, difference, rtol=rtol, atol=rtol * float(change.std()))
        u = torch.cos(torch.arange(change.numel(), dtype=torch.float64)).view_as(change)
        adjoint = tangent.adjoint(u, shape)
        left, right = (change * u).sum(), (v * adjoint).sum()
        assert abs(left - right) < 1e-11 * float(change.norm() * u.norm())
        size = math.prod(shape)
        unit = torch.eye(size, dtype=torch.float64).unflatten(1, shape)
        rows = tangent.rows(unit).expand(len(x), -1, -1)
        torch.testing.assert_close(torch.einsum("bmn,bn->bm", rows, v.flatten(1)), change)
        state = x.clone().requires_grad_()
        [gradient] = torch.autograd.grad((operator(state) * u).sum(), state)
        torch.testing.assert_close(gradient, adjoint)
        torch.testing.assert_close(operator(x.float()).double(), operator(x), rtol=1e-4, atol=1e-4)
        mean, std = x.mean(0) + 1, x.std(0) + 0.5
        again = operator.rescale(mean, std)((x - mean) / std)
        torch.testing.assert_close(again, operator(x), rtol=1e-9, atol=1e-9)

    return check
