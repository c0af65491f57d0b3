# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from ddo_modulus.constants import GAS_CONSTANT
from ddo_modulus.errors import InputError
from ddo_modulus.observations import LevelOperator, PointOperator
from ddo_modulus.observations.upper_air import between

CHANNELS = ("t500", "u500", "t850", "t250")
LEVELS = {85000.0: 2, 25000.0: 3, 50000.0: 0}  # in no order
LAT, LON = np.array([57.0, 55.25, 53.0, 53.4, 56.0]), np.array([-5.5, -2.25, 0.99, -6.0, -1.0])
PRESSURE = np.array([85000.0, 70000.0, 50000.0, 30000.0, 25000.0])


def test_operators_are_consistent(grid, atmosphere, consistent):
    consistent(LevelOperator(grid, LEVELS, LAT, LON, PRESSURE), *atmosphere(CHANNELS))


def test_profiles_linear_in_log_p_are_exact(grid):
    """Geopotential of isothermal air is one."""
    x = torch.zeros(1, 4, *grid.shape, dtype=torch.float64)
    tilt = torch.from_numpy(grid.lat[:, None] + 0.5 * grid.lon)
    for pressure, channel in LEVELS.items():
        x[0, channel] = GAS_CONSTANT * 250 * np.log(101325 / pressure) + tilt
    found = LevelOperator(grid, LEVELS, LAT, LON, PRESSURE)(x)[0]
    expected = GAS_CONSTANT * 250 * np.log(101325 / PRESSURE) + LAT + 0.5 * LON
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7)


def test_at_a_level_it_is_that_level(grid, atmosphere):
    x, _ = atmosphere(CHANNELS)
    found = LevelOperator(grid, LEVELS, LAT[[0, 2, 4]], LON[[0, 2, 4]], PRESSURE[[0, 2, 4]])(x)
    expected = PointOperator(grid, LAT[[0, 2, 4]], LON[[0, 2, 4]], [2, 0, 3])(x)
    torch.testing.assert_close(found, expected)


def test_between_two_levels_others_do_not_count(grid, atmosphere):
    x, _ = atmosphere(CHANNELS)
    operator = LevelOperator(grid, LEVELS, LAT[1:2], LON[1:2], [70000.0])
    changed = x.clone()
    changed[:, [1, 3]] += 5
    torch.testing.assert_close(operator(changed), operator(x))
    share = np.log(70 / 50) / np.log(85 / 50)  # of 850 hPa
    changed[:, 2] += 1
    torch.testing.assert_close(operator(changed), operator(x) + share)


def test_one_level_serves_reports_of_its_own(grid, atmosphere):
    x, _ = atmosphere(CHANNELS)
    one = LevelOperator(grid, {85000.0: 2}, [55.0], [-2.0], [np.float32(85000)])
    torch.testing.assert_close(one(x), PointOperator(grid, [55.0], [-2.0], 2)(x))


def test_nothing_is_extrapolated(grid):
    inside = between(list(LEVELS), [85001.0, 24000.0, np.nan, 25000.0, 85000.05])
    np.testing.assert_array_equal(inside, [False, False, False, True, True])
    assert not between([], [5e4]).any()
    with pytest.raises(InputError, match="1 of 2 pressures are outside the levels .* at 1000 Pa"):
        LevelOperator(grid, LEVELS, LAT[:2], LON[:2], [5e4, 1e3])
