# SPDX-License-Identifier: Apache-2.0
"""The functional F2ID: one functional on all grids, a metric that sees what it should."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.simulators import KolmogorovFlow
from ddo_modulus.verification import Scattering, f2id, frechet_distance
from ddo_modulus.verification.scattering import resolved_octaves

BASIS = FourierBasis((32, 32))


def draws(count, seed, smoothness=1.5, basis=BASIS):
    generator = torch.Generator().manual_seed(seed)
    return GaussianField(basis, Matern(0.2, smoothness)).sample(count, generator=generator)[:, 0]


@pytest.fixture(scope="module")
def flow():
    """Trajectories of turbulence, four states each, well apart in time."""
    simulator = KolmogorovFlow(
        reynolds=100.0, resolution=32, output_resolution=32, spin_up=9.0, interval=3.0, dt=0.03
    )
    return torch.cat(list(simulator.simulate(64, 4, generator=torch.Generator().manual_seed(0))))


def randomised(x, seed):
    """Fields of the same power in every wave, with random phases."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.fft.rfft2(torch.randn(x.shape, generator=generator))
    return torch.fft.irfft2(torch.fft.rfft2(x).abs() * phase / phase.abs(), s=x.shape[-2:])


@pytest.mark.parametrize(
    ("basis", "band", "shapes"),
    [
        (FourierBasis((32, 32), (1.0, 1.5)), (31, 31), [(32, 32), (64, 64), (128, 128), (33, 47)]),
        (CosineBasis((32, 40), (0.8, 1.0)), (30, 36), [(32, 40), (64, 80), (96, 50)]),
        (SphericalBasis((33, 64)), 24, [(33, 64), (65, 128), (32, 64), (64, 100)]),
    ],
    ids=["torus", "box", "sphere"],
)
def test_features_do_not_depend_on_the_grid(basis, band, shapes):
    """Band-limited functions, evaluated on one grid or another, have the same features."""
    known = GaussianField(basis.truncate(band), Matern(0.3, 1.0))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, known.basis.size, generator=generator, dtype=torch.float64)
    coefficients = known.variance[0].sqrt() * z
    octaves = resolved_octaves(basis)
    assert octaves >= 4
    found = []
    for shape in shapes:
        if isinstance(basis, SphericalBasis):  # with and without rows at the poles
            functions = SphericalBasis(shape, known.basis.lmax)
            scattering = Scattering(SphericalBasis(shape), octaves)
        else:
            functions, scattering = known.basis, Scattering(basis, octaves)
        found.append(scattering(functions.synthesize(coefficients, shape).float()))
    assert found[0].shape == (5, len(scattering.names))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_energies_of_the_bands_add_up():
    """The band-passes are a tight frame: energies sum to the band's, away from its ends."""
    x = draws(3, 0, basis=FourierBasis((64, 64)))
    scattering = Scattering(FourierBasis((64, 64)), 5)
    energy = scattering(x)[:, 1:6].square().sum(1)
    basis = FourierBasis((64, 64))
    place = torch.log2((basis.eigenvalues.sqrt() / (2 * math.pi)).clamp_min(1e-9))
    share = torch.where(place > 4, torch.cos(0.5 * math.pi * (place - 4)).square(), 1.0)
    share = torch.where((place < 0) | (place >= 5), 0.0, share)
    expected = (basis.analyze(x.double()).square() * share).sum(1)
    torch.testing.assert_close(energy, expected)


def test_features_are_of_degree_one_and_know_the_sign():
    x = draws(4, 0).double()
    scattering = Scattering(BASIS, 4)
    names = list(scattering.names)
    one, three, minus = scattering(x), scattering(3 * x), scattering(-x)
    torch.testing.assert_close(three, 3 * one)
    odd = torch.tensor([n == "mean" or n.startswith("asymmetry") for n in names])
    torch.testing.assert_close(minus, torch.where(odd, -one, one))
    still = scattering(torch.full((1, 32, 32), 7.0))[0]
    assert float(still[0]) == pytest.approx(7.0)
    torch.testing.assert_close(still[1:], torch.zeros_like(still[1:]), rtol=0, atol=1e-9)


def test_frechet_distance_is_the_closed_form():
    random = np.random.default_rng(0)
    x, y = (
        random.normal(size=(50, 6)),
        1.0 + random.normal(size=(70, 6)) @ random.normal(size=(6, 6)),
    )
    a, b = (np.cov(v.T, bias=True) for v in (x, y))
    root = np.real(scipy.linalg.sqrtm(a @ b))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)
    twice = torch.cat([torch.from_numpy(x), torch.from_numpy(x[:5])])
    weights = torch.ones(50)
    weights[:5] = 2
    other = torch.from_numpy(y)
    weighted = frechet_distance(torch.from_numpy(x), other, (weights, torch.ones(70)))
    assert weighted == pytest.approx(frechet_distance(twice, other))


def test_zero_for_the_same_fields_and_the_floor_for_the_same_law():
    x = draws(300, 0)
    assert f2id(x, x, BASIS, resamples=2).distance == pytest.approx(0.0, abs=1e-9)
    ratios = []
    for seed in range(1, 7):
        found = f2id(draws(200, seed), x, BASIS, resamples=40)
        ratios.append(found.distance / found.own_median)
        assert found.distance < 1.3 * found.own_high
    assert float(np.mean(ratios)) == pytest.approx(1.0, abs=0.2)


def test_correlated_truth_has_a_larger_floor():
    """Frames of a trajectory are no independent fields: trajectories are resampled, whole."""
    x = draws(30, 0)[:, None] + 0.1 * draws(300, 1).view(30, 10, 32, 32)
    samples = draws(300, 2)
    together = f2id(samples, x, BASIS, resamples=40)
    apart = f2id(samples, x.flatten(0, 1), BASIS, resamples=40)
    assert together.distance == apart.distance
    assert together.own_median > 3 * apart.own_median


def grows(values):
    return all(b > a for a, b in zip(values, values[1:], strict=False))


def test_it_grows_with_the_perturbation():
    truth, x = draws(200, 0), draws(200, 1)
    for factors in ((1.0, 1.05, 1.1, 1.2, 1.4), (1.0, 0.95, 0.9, 0.8, 0.6)):
        assert grows([f2id(f * x, truth, BASIS, resamples=2).distance for f in factors])
    rougher = [draws(200, 1, smoothness) for smoothness in (1.5, 1.4, 1.2, 1.0)]
    assert grows([f2id(r, truth, BASIS, resamples=2).distance for r in rougher])
    shifts = [f2id(x + shift, truth, BASIS, resamples=2).distance for shift in (0, 0.1, 0.3, 1.0)]
    assert grows(shifts)
    skewed = [x + a * (x.square() - 1) for a in (0.0, 0.05, 0.1, 0.2)]
    skewed = [s / (1 + 2 * a**2) ** 0.5 for s, a in zip(skewed, (0, 0.05, 0.1, 0.2), strict=True)]
    assert grows([f2id(s, truth, BASIS, resamples=2).distance for s in skewed])


def test_phases_are_seen(flow):
    """Turbulence and its phase-randomised copy share their spectra and not their law."""
    basis = BASIS
    truth, other = flow[:32], flow[32:]
    same = f2id(other, truth, basis, resamples=40)
    random = f2id(randomised(other, 1), truth, basis, resamples=40)
    assert same.distance < 2 * same.own_high
    assert random.distance > 5 * max(same.distance, random.own_high)
    half = torch.where(torch.arange(32)[:, None, None, None] < 16, randomised(other, 1), other)
    assert same.distance < f2id(half, truth, basis, resamples=2).distance < random.distance


def test_two_grids_and_mistakes():
    basis = FourierBasis((32, 32), modes=(31, 31))
    x = draws(60, 0, basis=basis)
    fine = basis.synthesize(basis.analyze(x.double()), (64, 64)).float()
    found = f2id(fine, x, FourierBasis((64, 64)), resamples=2)
    assert found.octaves == 4
    assert found.distance == pytest.approx(0.0, abs=1e-3)
    with pytest.raises(InputError, match="32x32 grid resolves 4 octaves, not octaves=5"):
        f2id(fine, x, BASIS, octaves=5)
    with pytest.raises(InputError, match="more true fields"):
        f2id(x, x[:1], BASIS)


def test_round_off_is_no_scale():
    """Where the truth conserves its mean, an error is judged by the size of the fields."""
    truth, x = (d - d.mean((-2, -1), keepdim=True) for d in (draws(200, 0), draws(200, 1)))
    assert float(truth.mean((-2, -1)).std()) < 1e-6
    found = [f2id(x + shift, truth, BASIS, resamples=2).distance for shift in (0, 1e-4, 0.1)]
    assert found[1] == pytest.approx(found[0], rel=0.01)
    assert found[2] > 2 * found[0]
