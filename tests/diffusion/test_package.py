# SPDX-License-Identifier: Apache-2.0
"""Packages on disk, and on other grids than their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from packages import conditional

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.package import Package
from ddo_modulus.fields.grid import BoxGrid


@pytest.mark.parametrize("periodic", [True, False])
def test_a_box_is_saved_with_whether_it_is_periodic(periodic, tmp_path):
    package = replace(conditional([0.5]), grid=BoxGrid((8, 8), (1.0, 1.0), periodic=periodic))
    package.save(tmp_path / "package")
    assert Package.load(tmp_path / "package").grid.periodic is periodic


def test_statistics_that_vary_by_point_are_interpolated(untrained):
    package = untrained()
    south = torch.from_numpy(np.repeat(package.grid.lat[:, None], len(package.grid.lon), 1))
    own = Normalization(("t2m",), south[None, None].float(), (100 + south)[None, None].float())
    package = replace(package, normalization=own)
    finer = package.grid.at((11, 15))
    found = package.statistics_at(finer)
    expected = np.repeat(finer.lat[:, None], 15, 1)
    inside = (expected <= package.grid.lat.max()) & (expected >= package.grid.lat.min())
    np.testing.assert_allclose(found.mean[0, 0].numpy()[inside], expected[inside], rtol=1e-5)
    np.testing.assert_allclose(found.std[0, 0].numpy()[inside], 100 + expected[inside], rtol=1e-5)
    assert package.statistics_at(package.grid) is own


@pytest.mark.parametrize("shape", [(16, 16), (6, 6)])
def test_the_mean_given_a_condition_is_one_function_on_every_grid(shape):
    """The condition is of a few waves that both grids resolve; the regression is their sum."""
    operator = conditional([0.25, 0.5, -0.1]).operator
    waves = operator.basis.truncate(3)
    c = torch.randn(1, 3, waves.size, generator=torch.Generator().manual_seed(0))
    like = torch.zeros(1, 1, *shape)
    found = operator.conditional_mean(waves.synthesize(c), like)
    total = (c * torch.tensor([0.25, 0.5, -0.1])[:, None]).sum(1, keepdim=True)
    expected = waves.synthesize(total, shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
