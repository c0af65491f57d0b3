# SPDX-License-Identifier: Apache-2.0
"""Wasserstein distances, quantiles and densities against closed forms."""

import math

import pytest
import scipy.stats
import torch
from tensors import randn

from ddo_modulus.errors import InputError
from ddo_modulus.verification import wasserstein_distance
from ddo_modulus.verification.distribution import PointValues


def test_shifted_and_scaled_normals():
    """W1 of a shift is the shift; of a scale, its change times E|X|."""
    x = randn(200_000)
    assert wasserstein_distance(x + 0.3, x) == pytest.approx(0.3, rel=1e-9)
    expected = 0.5 * math.sqrt(2 / math.pi)
    assert wasserstein_distance(1.5 * x, randn(100_001, seed=1)) == pytest.approx(
        expected, rel=0.03
    )


def area_between(x, y, v, w):
    """Integral of the difference of the distribution functions, interval by interval."""
    places = torch.cat([x, y]).sort().values.tolist()
    total = 0.0
    for low, high in zip(places[:-1], places[1:], strict=True):
        gap = v[x <= low].sum() / v.sum() - w[y <= low].sum() / w.sum()
        total += abs(float(gap)) * (high - low)
    return total


def test_it_is_the_area_between_the_distribution_functions():
    x, y = randn(57), 0.4 + 1.3 * randn(31, seed=1)
    equal = torch.ones(57).double(), torch.ones(31).double()
    assert wasserstein_distance(x, y) == pytest.approx(area_between(x, y, *equal), rel=1e-12)
    v, w = randn(57, seed=2).abs(), randn(31, seed=3).abs()
    expected = area_between(x, y, v, w)
    assert wasserstein_distance(x, y, (v, w)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match="values on both sides"):
        wasserstein_distance(x, y[:0])


def test_weights_of_fields_are_copies_of_fields():
    """A field of weight two counts as two fields, with its points' areas."""
    fields = randn(5 * 12).reshape(5, 12)
    area = torch.rand(12, generator=torch.Generator().manual_seed(4)).double()
    points = PointValues.of(fields, area)
    once = torch.tensor([2.0, 0, 1, 0, 0]).double() / 3
    other = torch.tensor([0, 1.0, 0, 1, 0]).double() / 2
    twice = fields[[0, 0, 2]].flatten(), fields[[1, 3]].flatten()
    expected = wasserstein_distance(*twice, (area.repeat(3), area.repeat(2)))
    assert float(points.wasserstein(once - other)) == pytest.approx(expected, rel=1e-9)
    median = points.quantiles(torch.tensor([0.5]), once)
    order = twice[0].sort()
    below = area.repeat(3)[order.indices].cumsum(0) / (3 * area.sum())
    assert float(median) == float(order.values[torch.searchsorted(below, 0.5)])


def test_quantiles_and_density_of_a_normal():
    points = PointValues.of(randn(400_000).reshape(100, 4000), torch.ones(4000))
    equal = torch.full((100,), 0.01)
    levels = torch.tensor([0.01, 0.5, 0.99])
    expected = torch.from_numpy(scipy.stats.norm.ppf(levels.numpy()))
    torch.testing.assert_close(points.quantiles(levels, equal), expected, rtol=0, atol=0.02)
    edges = torch.linspace(-3, 3, 25).double()
    density = points.density(edges, equal[None])[0]
    middle = (edges[1:] + edges[:-1]) / 2
    expected = torch.from_numpy(scipy.stats.norm.pdf(middle.numpy()))
    torch.testing.assert_close(density[1:-1], expected[1:-1], rtol=0, atol=0.005)
    assert float((density * edges.diff()).sum()) == pytest.approx(1.0)  # outer bins are open
