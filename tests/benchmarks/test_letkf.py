# SPDX-License-Identifier: Apache-2.0
"""The benchmark's LETKF: the Kalman filter where nothing is local, DAPPER's where it is."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def code(imported):
    return imported("letkf")


@pytest.fixture
def case():
    """Two analyses on Lorenz-96's circle of 40 points, every other observed; 12 members."""
    generator = torch.Generator().manual_seed(0)
    ensemble = torch.randn(2, 12, 40, generator=generator, dtype=torch.float64).cumsum(-1) / 3
    index = torch.arange(0, 40, 2).repeat(2, 1)
    variance = 0.2 + torch.rand(2, 20, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    return ensemble, index, values, variance


def test_without_localization_it_is_the_kalman_filter_of_the_sample_covariance(code, case):
    ensemble, index, values, variance = case
    analysis = code.letkf(
        ensemble, ensemble[..., ::2], values, variance, torch.ones(2, 40, 20).double(), chunk=30
    )
    for t in range(2):
        p = torch.cov(ensemble[t].T)
        h = torch.eye(40, dtype=torch.float64)[index[t]]
        gain = p @ h.T @ torch.linalg.inv(h @ p @ h.T + torch.diag(variance[t]))
        mean = ensemble[t].mean(0)
        expected = mean + gain @ (values[t] - h @ mean)
        torch.testing.assert_close(analysis[t].mean(0), expected)
        torch.testing.assert_close(torch.cov(analysis[t].T), p - gain @ h @ p)


@pytest.mark.parametrize("radius", [1.5, 4.0])
def test_it_equals_dapper(code, case, radius):
    methods = pytest.importorskip("dapper.da_methods.ensemble", reason="DAPPER is not installed")
    from dapper.tools.localization import nd_Id_localization
    from dapper.tools.randvars import GaussRV

    ensemble, index, values, variance = case
    distance = code.torus_distance(index, (1, 40))
    analysis = code.letkf(
        ensemble, ensemble[..., ::2], values, variance, code.gaspari_cohn(distance, radius)
    )
    localizer = nd_Id_localization((40,), (1,), np.arange(0, 40, 2), periodic=True)
    for t in range(2):
        batches, taper = localizer(radius, "x2y", "GC")
        theirs, _ = methods.local_analyses(
            ensemble[t].numpy().copy(),
            ensemble[t, :, ::2].numpy(),
            GaussRV(C=variance[t].numpy()).C,
            values[t].numpy(),
            batches,
            taper,
        )
        np.testing.assert_allclose(analysis[t].numpy(), theirs, atol=1e-9)


def test_taper_and_distances_wrap_around(code):
    distance = code.torus_distance(torch.tensor([[0, 9]]), (4, 5))
    assert distance.shape == (1, 20, 2)
    assert distance[0, 19, 0] == pytest.approx(2**0.5)  # the opposite corner is a neighbour
    assert distance[0, 9, 1] == 0
    taper = code.gaspari_cohn(torch.tensor([0.0, 2.0, 7.2, 8.0]), 2.0)
    assert taper[0] == 1 and taper[3] == 0
    assert float(taper[1]) == pytest.approx(np.exp(-0.5), abs=0.03)
    assert 0 <= float(taper[2]) < 1e-3


def test_inflation_is_each_analysis_own(code, case):
    ensemble = case[0]
    wide = code.inflate(ensemble, torch.tensor([1.0, 1.5]))
    torch.testing.assert_close(wide[0], ensemble[0])
    torch.testing.assert_close(wide[1].std(0), 1.5 * ensemble[1].std(0))
    torch.testing.assert_close(wide[1].mean(0), ensemble[1].mean(0))
