# SPDX-License-Identifier: Apache-2.0
"""Spectra, structure functions and autocovariances of fields whose law is known."""

import math

import numpy as np
import pytest
import torch

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis, SphericalBasis
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.fields.grid import BoxGrid, LatLonGrid
from ddo_modulus.verification import (
    autocovariance,
    basis_of,
    log_spectrum_distance,
    shell_power,
    structure_functions,
)
from ddo_modulus.verification.structure import spectral_distance


def gaussian(basis, count, seed=0, length=0.15, smoothness=1.5):
    field = GaussianField(basis, Matern(length, smoothness))
    generator = torch.Generator().manual_seed(seed)
    return field, field.sample(count, generator=generator, dtype=torch.float64)[:, 0]


def test_power_is_the_fields_own_spectrum():
    field, x = gaussian(FourierBasis((32, 48), (1.0, 1.5)), 2000)
    wavenumber, power = shell_power(x, field.basis)
    _, shell = field.basis.shells()
    expected = torch.zeros(int(shell.max()) + 1, dtype=torch.float64)
    expected.index_add_(0, shell, field.variance[0])
    torch.testing.assert_close(
        power.mean(0), expected[1 : len(wavenumber) + 1], rtol=0.05, atol=0.0
    )
    assert float(wavenumber[-1]) <= 2 * math.pi * 15 + 1e-9  # waves to 15 on either axis


def test_only_filled_shells_are_compared():
    assert FourierBasis((64, 64)).complete_wavenumber() == pytest.approx(2 * math.pi * 31)
    assert FourierBasis((65, 63)).complete_wavenumber() == pytest.approx(2 * math.pi * 31)
    assert CosineBasis((8, 12), (1.0, 2.0)).complete_wavenumber() == pytest.approx(math.pi * 5.5)
    assert SphericalBasis((33, 64)).complete_wavenumber() == pytest.approx(math.sqrt(31 * 32))


def test_log_spectrum_distance_of_a_known_factor():
    _, x = gaussian(FourierBasis((32, 32)), 20)
    basis = FourierBasis((32, 32))
    assert log_spectrum_distance(x, x, basis) == 0.0
    assert log_spectrum_distance(1.1 * x, x, basis) == pytest.approx(2 * math.log(1.1), rel=1e-6)
    # Half of the band at twice the power: root-mean-square of ln 2 over half of the shells.
    coefficients = basis.analyze(x)
    _, shell = basis.shells()
    louder = basis.synthesize(torch.where(shell > 7, math.sqrt(2.0), 1.0) * coefficients)
    expected = math.log(2.0) * math.sqrt(8 / 15)
    assert log_spectrum_distance(louder, x, basis) == pytest.approx(expected, rel=1e-6)
    low = log_spectrum_distance(louder, x, basis, largest=2 * math.pi * 7)
    assert low == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(InputError, match="no shell"):
        log_spectrum_distance(x, x, basis, largest=1.0)


def test_spectra_of_two_grids_share_their_shells():
    """A field on a finer grid is the same field; scales that only one grid has do not count."""
    field, x = gaussian(FourierBasis((32, 32), modes=(31, 31)), 10)
    fine = field.basis.synthesize(field.basis.analyze(x), (64, 64))
    noise = gaussian(FourierBasis((64, 64)), 10)[1]
    whole = FourierBasis((64, 64))
    beyond = whole.synthesize(whole.analyze(noise) * (whole.eigenvalues.sqrt() > 2 * math.pi * 23))
    assert log_spectrum_distance(fine + beyond, x, whole, largest=2 * math.pi * 15) < 1e-9
    assert log_spectrum_distance(fine, x, FourierBasis((32, 32))) < 1e-9


def test_round_off_is_no_difference():
    """Scales that a simulator cut off hold rounding errors, which differ by any factor."""
    truth = torch.tensor([1.0, 0.1, 1e-14, 1e-15])
    assert float(spectral_distance(torch.tensor([1.0, 0.1, 1e-12, 3e-13]), truth)) == 0.0
    noisy = spectral_distance(torch.tensor([1.0, 0.1, 1e-4, 1e-4]), truth)
    assert float(noisy) == pytest.approx(math.log(1e6) / math.sqrt(2), rel=1e-4)


def variogram(field, direction, distances):
    """2 (C(0) - C(r)) of a homogeneous field on the torus, from its own variances."""
    waves = (field.basis.indices + 1) // 2 * 2 * math.pi
    wave = waves[:, direction] / field.basis.lengths[direction]
    return torch.stack(
        [2 * (field.variance[0] * (1 - torch.cos(wave * r))).sum() for r in distances]
    )


def test_structure_functions_of_a_gaussian_field_on_the_torus():
    r"""S2 = 2 (C(0) - C(r)), and the higher ones as the moments of a normal increment."""
    grid = BoxGrid((21, 31), (1.0, 1.5))
    field, x = gaussian(FourierBasis(grid.shape, grid.lengths), 1500, length=0.1)
    distances, found = structure_functions(x.float(), grid)
    assert distances[0, 0] == pytest.approx(1 / 21) and distances[1, 0] == pytest.approx(1.5 / 31)
    for axis in (0, 1):
        second = variogram(field, axis, distances[axis])
        torch.testing.assert_close(found[axis, 0], second, rtol=0.04, atol=0.0)
        third = 2 * math.sqrt(2 / math.pi) * second**1.5
        torch.testing.assert_close(found[axis, 1], third, rtol=0.05, atol=0.0)
        torch.testing.assert_close(found[axis, 2], 3 * second**2, rtol=0.08, atol=0.0)
    _, covariance = autocovariance(x, grid, mean=0.0)
    torch.testing.assert_close(
        covariance[:, :1] - covariance[:, 1:], found[:, 0] / 2, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("poles", [True, False])
def test_distances_on_the_globe_are_great_circles(poles):
    """An isotropic field has one variogram along meridians and along parallels: Legendre's."""
    height = 33 if poles else 32
    edge = 90.0 if poles else 90.0 - 90.0 / height
    grid = LatLonGrid(np.linspace(edge, -edge, height), np.arange(64) * 360 / 64)
    basis = basis_of(grid)
    assert isinstance(basis, SphericalBasis)
    smooth = GaussianField(basis.truncate(13), Matern(0.6, 3.0))
    x = smooth.sample(500, generator=torch.Generator().manual_seed(1))[:, 0]
    distances, found = structure_functions(x, grid)
    degree = smooth.basis.indices[:, 0]
    variance = torch.zeros(13, dtype=torch.float64).index_add(0, degree, smooth.variance[0])
    for axis in (0, 1):
        assert float(distances[axis, -1]) > 6371 * (1.4 if axis == 0 else 0.7)
        cosine = np.cos(distances[axis].numpy() / EARTH_RADIUS_KM)
        legendre = np.stack([np.polynomial.legendre.legval(cosine, row) for row in np.eye(13)])
        expected = 2 * (variance[:, None] * (1 - torch.from_numpy(legendre))).sum(0)
        # Nearest pairs are interpolated linearly where S2 is parabolic.
        skip = 0 if axis == 0 else 2
        torch.testing.assert_close(found[axis, 0][skip:], expected[skip:], rtol=0.08, atol=0.0)


def test_pairs_of_a_region_do_not_wrap():
    """Of a plane x = a y + b, S2 is the square of the rise; wrapped pairs would break it."""
    grid = LatLonGrid(np.arange(50.0, 40.0, -1.0), np.arange(0.0, 12.0))
    rise = torch.from_numpy(grid.lat.copy())[:, None].expand(grid.shape)[None]
    distances, found = structure_functions(rise, grid)
    degrees = distances[0] / (EARTH_RADIUS_KM * math.pi / 180)
    torch.testing.assert_close(found[0, 0], degrees**2)
    torch.testing.assert_close(found[0, 2], degrees**4)
    assert float(found[1].abs().max()) == 0.0
    # Along a parallel the same degrees are fewer kilometres.
    across = torch.from_numpy(grid.lon.copy()).expand(grid.shape)[None]
    distances, found = structure_functions(across, grid)
    row = math.cos(math.radians(41.0))
    assert float(distances[1, 0]) == pytest.approx(
        EARTH_RADIUS_KM * math.radians(1) * row, rel=1e-4
    )
    # At a higher latitude they are more degrees: there S2 lies between those of one and of two.
    cosine = np.cos(np.deg2rad(grid.lat))
    expected = np.average(1 + 3 * (row / cosine - 1), weights=cosine)
    assert float(found[1, 0, 0]) == pytest.approx(expected, rel=1e-3)
    assert float(found[0].abs().max()) == 0.0


def test_box_is_not_periodic():
    grid = BoxGrid((8, 8), periodic=False)
    x = torch.arange(8.0).expand(1, 8, 8)
    _, found = structure_functions(x, grid)
    torch.testing.assert_close(found[1, 0], torch.tensor([1.0, 4, 9, 16]).double())
