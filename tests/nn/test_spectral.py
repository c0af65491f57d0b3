# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.nn.spectral import SpectralLinear, Transform, odd_band

BASES = {
    "torus": FourierBasis((8, 9)),
    "box": CosineBasis((8, 9), (1.0, 2.0)),
    "sphere": SphericalBasis((8, 15)),
}
families = pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def last(x):
    return x.movedim(1, -1)


@families
@pytest.mark.parametrize("factor", [1, 2])
def test_transforms_are_those_of_the_basis(basis, factor):
    """Also on a grid that the transform was not built for."""
    truncated = basis.truncate(5)
    transform = Transform(truncated)
    shape = tuple(factor * n for n in basis.shape)
    x = randn(2, 3, *shape)
    c = transform.analyze(last(x))
    expected = truncated.analyze(x)
    assert c.shape[1:3] == transform.modes and not any(n % 8 for n in transform.modes)
    rows, columns = truncated.modes
    assert not c[:, rows:].any() and not c[:, :, columns:].any()
    coefficients = c[:, :rows, :columns].movedim(-1, 1)
    torch.testing.assert_close(truncated._gather(coefficients), expected)
    field = truncated.synthesize(expected, shape)
    torch.testing.assert_close(transform.synthesize(c, shape), last(field))


@families
def test_resampling_keeps_functions_of_the_band(basis):
    coarse = basis.at((5, 7))
    band = basis.truncate([min(*n) for n in zip(odd_band(coarse.shape), coarse.modes, strict=True)])
    transform = Transform(band, coarse.shape)
    c = randn(2, 3, band.size)
    fine, small = last(band.synthesize(c)), last(band.synthesize(c, coarse.shape))
    torch.testing.assert_close(transform.resample(fine, down=True), small, rtol=1e-4, atol=1e-5)
    back = transform.resample(small, down=False, like=fine)
    torch.testing.assert_close(back, fine, rtol=1e-4, atol=1e-5)
    finer = last(band.synthesize(c, (16, 30)))
    up = transform.resample(small, down=False, like=finer)
    torch.testing.assert_close(up, finer, rtol=1e-4, atol=1e-5)


@families
def test_it_multiplies_modes_and_maps_channels(basis):
    truncated = basis.truncate(5)
    layer = SpectralLinear(Transform(truncated), 3, 4)
    x = randn(2, 3, *basis.shape)
    weight = layer.weight[truncated.symmetry()].T
    filtered = truncated.synthesize(weight * truncated.analyze(x), basis.shape)
    expected = last(filtered) @ layer.mix.weight.T
    torch.testing.assert_close(layer(last(x)), expected)


def test_it_commutes_with_shifts_of_the_torus():
    basis = BASES["torus"]
    layer = SpectralLinear(Transform(basis.truncate(5)), 3, 4)
    y = last(randn(2, 3, *basis.shape))
    shifted = layer(y.roll((2, 5), (1, 2)))
    torch.testing.assert_close(shifted, layer(y).roll((2, 5), (1, 2)))


def test_odd_band():
    assert odd_band((8, 9)) == (7, 9)
    assert odd_band((8, 9), 6) == (5, 5)
    assert odd_band((4, 31), 23) == (3, 23)


def test_matrices_are_not_saved():
    assert not Transform(FourierBasis((8, 9))).state_dict()
