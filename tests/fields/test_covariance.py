# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.errors import InputError
from ddo_modulus.fields.covariance import HybridCovariance, distances_km
from ddo_modulus.fields.grid import LatLonGrid

GRID = LatLonGrid(np.arange(58.0, 49.0, -1), np.arange(-8.0, 2.0))


def hybrid_truth():
    """Two kinds of points, hence an inhomogeneous covariance; and daily amplitudes that differ."""
    distance = distances_km(GRID)
    land = (np.arange(90) % 10 >= 5).astype(float)
    covariance = 0.5 * np.exp(-distance / 900) + 2 * np.outer(land, land) * np.exp(-distance / 300)
    return covariance, 3.0 * land.reshape(9, 10)


def draws(count, seed=0):
    covariance, _ = hybrid_truth()
    root = np.linalg.cholesky(covariance)
    white = np.random.default_rng(seed).standard_normal((count, 90))
    return (white @ root.T).reshape(count, 9, 10)


def test_positive_definite_from_few_samples():
    x = draws(5)
    found = HybridCovariance().estimate(x, hybrid_truth()[1], GRID)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, found.T)
    assert np.linalg.eigvalsh(found).min() > 0
    sample = x.reshape(5, -1)
    np.testing.assert_allclose(found.diagonal(), (sample**2).mean(0))


def test_without_shrinkage_it_is_the_sample_covariance():
    x = draws(20)
    found = HybridCovariance(taper_km=1e9, weight=0.0).estimate(x, hybrid_truth()[1], GRID)
    sample = x.reshape(20, -1)
    np.testing.assert_allclose(found, sample.T @ sample / 20, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_closer_to_the_truth_than_the_sample(seed):
    truth, amplitude = hybrid_truth()
    x = draws(30, seed)
    sample = x.reshape(30, -1).T @ x.reshape(30, -1) / 30
    error = np.linalg.norm(sample - truth)
    assert np.linalg.norm(HybridCovariance().estimate(x, amplitude, GRID) - truth) < 0.95 * error


def test_the_parametric_model_tells_land_from_sea():
    truth, amplitude = hybrid_truth()
    found = HybridCovariance(weight=1.0).estimate(draws(3000), amplitude, GRID)
    assert np.linalg.norm(found - truth) < 0.15 * np.linalg.norm(truth)


def test_distances():
    grid = LatLonGrid(np.array([90.0, 0.0, -90.0]), np.array([0.0, 90.0, 180.0, 270.0]))
    distance = distances_km(grid)
    quarter = np.pi / 2 * EARTH_RADIUS_KM
    np.testing.assert_allclose(
        distance[4], [quarter] * 4 + [0, quarter, 2 * quarter, quarter] + [quarter] * 4, atol=0.1
    )
    np.testing.assert_allclose(distance[0, :4], 0, atol=0.1)


@pytest.mark.parametrize(
    "options",
    [{"weight": 1.1}, {"weight": -0.1}, {"taper_km": 0.0}, {"fit_km": -1.0}, {"scales_km": (0.0,)}],
)
def test_mistakes(options):
    with pytest.raises(InputError, match="a weight in 0..1 and positive lengths"):
        HybridCovariance(**options)
