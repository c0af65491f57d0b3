# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import scipy.special
import torch
from tensors import randn

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.spherical_basis import SphericalBasis

GAUSS_NODES, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(8)
GAUSS_LATITUDES = np.rad2deg(np.arcsin(GAUSS_NODES[::-1]))

BASES = {
    "fourier-even": FourierBasis((8, 8)),
    "fourier-mixed": FourierBasis((9, 12), (1.0, 1.6)),
    "fourier-odd": FourierBasis((7, 11)),
    "fourier-truncated": FourierBasis((10, 9), (2.0, 1.0), (5, 7)),
    "cosine-even": CosineBasis((8, 8)),
    "cosine-mixed": CosineBasis((9, 14), (1.0, 1.4)),
    "cosine-truncated": CosineBasis((10, 9), (2.0, 1.0), (4, 6)),
    "sphere-centres": SphericalBasis((8, 16)),
    "sphere-poles": SphericalBasis((9, 18)),
    "sphere-few-columns": SphericalBasis((10, 15)),
    "sphere-latitudes": SphericalBasis((8, 17), None, GAUSS_LATITUDES),
    "sphere-truncated": SphericalBasis((11, 16), 4),
}
BOXES = {name: basis for name, basis in BASES.items() if not name.startswith("sphere")}
SPHERES = {name: basis for name, basis in BASES.items() if name.startswith("sphere")}


def bases(group=BASES):
    return pytest.mark.parametrize("basis", group.values(), ids=group.keys())


def functions(basis, shape=None):
    """Every function on a grid, ``(K, H, W)``."""
    return basis.synthesize(torch.eye(basis.size, dtype=torch.float64), shape)


def relative(error, of):
    return float(error.abs().max() / of.abs().max())


# ---- what the functions are ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fourier-even", "fourier-mixed", "fourier-odd", "cosine-mixed"])
def test_box_functions_are_orthonormal_on_their_grid(name):
    basis = BASES[name]
    phi = functions(basis)
    gram = torch.einsum("ahw,hw,bhw->ab", phi, basis.weights(), phi)
    torch.testing.assert_close(gram, torch.eye(basis.size, dtype=torch.float64), atol=1e-13, rtol=0)


def test_spherical_functions_are_orthonormal_under_gauss_legendre_quadrature():
    # Degree 2 * 7 = 14 is below the 2 * 8 that eight nodes integrate exactly.
    basis = BASES["sphere-latitudes"]
    assert basis.lmax == 7
    weights = torch.from_numpy(GAUSS_WEIGHTS[::-1].copy() / 2)[:, None] / basis.shape[1]
    phi = functions(basis)
    gram = torch.einsum("ahw,hw,bhw->ab", phi, weights.expand(basis.shape), phi)
    torch.testing.assert_close(gram, torch.eye(basis.size, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("height", [64, 65])
def test_spherical_functions_are_orthonormal_in_the_area_weights(height):
    basis = SphericalBasis((height, 24), 5)
    phi = functions(basis)
    gram = torch.einsum("ahw,hw,bhw->ab", phi, basis.weights(), phi)
    torch.testing.assert_close(gram, torch.eye(basis.size, dtype=torch.float64), atol=1e-2, rtol=0)


@bases()
def test_weights_are_positive_shares_of_the_domain(basis):
    weights = basis.weights()
    assert weights.shape == basis.shape
    assert bool((weights > 0).all())
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-14)
    torch.testing.assert_close(
        basis.mean_square().sum(), torch.einsum("khw,hw->", functions(basis).square(), weights)
    )


def test_fourier_functions_are_the_textbook_ones():
    basis = FourierBasis((5, 6))
    y, x = np.meshgrid(np.arange(5) / 5, np.arange(6) / 6, indexing="ij")
    for k, (row, column) in enumerate(basis.indices.tolist()):
        value = np.ones((5, 6))
        for number, coordinate in ((row, y), (column, x)):
            trig = np.cos if number % 2 else np.sin
            if number:
                value = value * np.sqrt(2) * trig(2 * np.pi * ((number + 1) // 2) * coordinate)
        if column == 5:  # the Nyquist wavenumber of six points
            value = value / np.sqrt(2)
        np.testing.assert_allclose(functions(basis)[k].numpy(), value, atol=1e-14)


def test_cosine_functions_are_the_textbook_ones():
    basis = CosineBasis((4, 5))
    y, x = np.meshgrid((np.arange(4) + 0.5) / 4, (np.arange(5) + 0.5) / 5, indexing="ij")
    for k, (row, column) in enumerate(basis.indices.tolist()):
        norm = (np.sqrt(2) if row else 1) * (np.sqrt(2) if column else 1)
        value = norm * np.cos(np.pi * row * y) * np.cos(np.pi * column * x)
        np.testing.assert_allclose(functions(basis)[k].numpy(), value, atol=1e-14)


@bases(SPHERES)
def test_spherical_functions_agree_with_scipy(basis):
    latitude = np.deg2rad(basis.latitudes(basis.shape[0]))[:, None]
    longitude = 2 * np.pi * np.arange(basis.shape[1]) / basis.shape[1]
    for k, (degree, column) in enumerate(basis.indices.tolist()):
        order = (column + 1) // 2
        norm = math.sqrt(
            (2 * degree + 1)
            * (2 if order else 1)
            * math.factorial(degree - order)
            / math.factorial(degree + order)
        )
        # SciPy's functions carry the Condon-Shortley phase.
        legendre = (-1) ** order * scipy.special.lpmv(order, degree, np.sin(latitude))
        trig = np.cos if column % 2 or not order else np.sin
        value = norm * legendre * trig(order * longitude)
        np.testing.assert_allclose(functions(basis)[k].numpy(), value, atol=1e-11)


@bases(SPHERES)
def test_addition_theorem(basis):
    """The harmonics of one degree have a constant sum of squares: no direction is preferred."""
    phi = functions(basis)
    for degree in range(basis.lmax + 1):
        total = phi[basis.indices[:, 0] == degree].square().sum(0)
        torch.testing.assert_close(total, torch.full_like(total, 2 * degree + 1))


def test_high_degrees_stay_normal():
    basis = SphericalBasis((181, 360))
    sectoral = basis.indices[:, 0] == basis.lmax
    c = torch.zeros(basis.size, dtype=torch.float64)
    c[sectoral] = randn(int(sectoral.sum()))
    x = basis.synthesize(c)
    assert bool(x.isfinite().all())
    mean_square = float((x.square() * basis.weights()).sum())
    assert mean_square == pytest.approx(float(c.square().sum()), rel=2e-2)


# ---- eigenvalues --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "basis", [FourierBasis((5, 7), (1.0, 1.6)), FourierBasis((4, 6)), CosineBasis((4, 5), (1.0, 2))]
)
def test_box_eigenvalues_are_those_of_the_finite_difference_laplacian(basis):
    shape = (240, 320)
    phi = functions(basis, shape)
    steps = basis.lengths[0] / shape[0], basis.lengths[1] / shape[1]
    minus_laplacian = sum(
        (2 * phi - phi.roll(1, axis) - phi.roll(-1, axis)) / step**2
        for axis, step in zip((-2, -1), steps, strict=True)
    )
    inside = (..., slice(1, -1), slice(1, -1))  # the cosine basis does not wrap
    expected = basis.eigenvalues[:, None, None] * phi
    error = (minus_laplacian - expected)[inside].abs().amax((1, 2))
    scale = (basis.eigenvalues + 1) * phi.abs().amax((1, 2))
    assert float((error / scale).max()) < 2e-3


def test_spherical_eigenvalues_are_those_of_the_finite_difference_laplacian():
    basis = SphericalBasis((8, 16), 4)
    shape = (360, 720)
    phi = functions(basis, shape).numpy()
    latitude = np.deg2rad(basis.latitudes(shape[0]))[:, None]
    step = np.pi / shape[0]
    half = np.cos((latitude[1:] + latitude[:-1]) / 2)
    flux = half * (phi[:, :-1] - phi[:, 1:]) / step
    meridional = (flux[:, :-1] - flux[:, 1:]) / step / np.cos(latitude[1:-1])
    zonal = (np.roll(phi, 1, 2) + np.roll(phi, -1, 2) - 2 * phi)[:, 1:-1] / (
        2 * np.pi / shape[1]
    ) ** 2
    laplacian = meridional + zonal / np.cos(latitude[1:-1]) ** 2
    rows = slice(40, -40)  # the finite differences degrade towards the poles
    error = np.abs(laplacian + basis.eigenvalues.numpy()[:, None, None] * phi[:, 1:-1])[:, rows]
    assert error.max() < 2e-2
    # ... which tells neighbouring degrees apart: their eigenvalues differ by at least 2.


# ---- transforms ---------------------------------------------------------------------------------


@bases()
@pytest.mark.parametrize("factor", [1, 1.5, 2])
def test_analysis_inverts_synthesis_on_every_grid(basis, factor):
    if basis is BASES["sphere-latitudes"] and factor != 1:
        pytest.skip("latitudes given by hand belong to one grid")
    shape = tuple(math.ceil(factor * n) for n in basis.shape)
    c = randn(3, 2, basis.size)
    back = basis.analyze(basis.synthesize(c, shape))
    assert relative(back - c, c) < 1e-11
    single = basis.analyze(basis.synthesize(c.float(), shape))
    assert relative(single - c, c) < 1e-5


@pytest.mark.parametrize("name", ["fourier-even", "fourier-mixed", "cosine-even", "cosine-mixed"])
def test_full_box_bases_invert_on_the_grid_too(name):
    basis = BASES[name]
    x = randn(2, *basis.shape)
    torch.testing.assert_close(basis.synthesize(basis.analyze(x)), x, atol=1e-12, rtol=0)


@bases()
def test_transforms_are_their_dense_matrices(basis, dense):
    phi = functions(basis).reshape(basis.size, -1)
    c, x = randn(2, 3, basis.size), randn(2, 3, *basis.shape)
    torch.testing.assert_close(basis.synthesize(c).flatten(-2), c @ phi)
    torch.testing.assert_close(basis.synthesize_adjoint(x), x.flatten(-2) @ phi.T)
    # Least squares in the weights of the domain.
    root = basis.weights().reshape(-1).sqrt()
    fit = torch.linalg.lstsq((phi * root).T, (x.flatten(-2) * root).reshape(6, -1).T).solution.T
    torch.testing.assert_close(basis.analyze(x), fit.reshape(2, 3, -1), atol=1e-10, rtol=1e-9)


@bases()
def test_rounded_products_have_their_own_adjoints(basis, monkeypatch):
    """Rounded on a GPU; which product and which transpose is the same everywhere."""
    c, x = randn(3, basis.size).requires_grad_(), randn(3, *basis.shape).requires_grad_()
    expected = basis.synthesize(c), basis.analyze(x)
    v, w = (torch.cos(t.detach() + 1) for t in expected)
    gradients = torch.autograd.grad(expected, (c, x), (v, w))
    used = []
    monkeypatch.setattr(
        "ddo_modulus.fields.basis._rounding_gains", lambda x: used.append(x) or True
    )
    found = basis.synthesize(c, rounded=True), basis.analyze(x, rounded=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (c, x), (v, w)), gradients)
    assert len(used) == 2


@bases()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_adjoint_identity(basis, dtype, tolerance):
    for shape in (basis.shape, (13, 19)):
        c, v = randn(basis.size, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
        left = basis.synthesize(c, shape).double().flatten() @ v.double().flatten()
        right = c.double() @ basis.synthesize_adjoint(v).double()
        assert abs(left - right) < tolerance * float(c.norm() * v.norm())


def test_a_torus_grid_twice_as_fine_holds_the_points_of_the_coarse_one():
    basis = FourierBasis((8, 9))
    c = randn(basis.size)
    fine = basis.synthesize(c, (16, 27))
    torch.testing.assert_close(fine[::2, ::3], basis.synthesize(c))


# ---- spectra ------------------------------------------------------------------------------------


def test_a_sine_puts_its_energy_in_its_own_mode():
    basis = FourierBasis((10, 12), (1.0, 2.0))
    x = torch.arange(12, dtype=torch.float64) / 12
    wave = torch.sin(2 * torch.pi * 3 * x).expand(10, 12)
    c = basis.analyze(wave)
    [mode] = [k for k, pair in enumerate(basis.indices.tolist()) if pair == [0, 6]]
    expected = torch.zeros(basis.size, dtype=torch.float64)
    expected[mode] = math.sqrt(0.5)
    torch.testing.assert_close(c, expected, atol=1e-14, rtol=0)
    wavenumber, _ = basis.shells()
    power = basis.power(wave)
    shell = int(power.argmax())
    assert float(power[shell]) == pytest.approx(0.5)
    assert float(wavenumber[shell]) == pytest.approx(2 * math.pi * 3 / 2.0)


def test_a_tilted_dipole_has_degree_one():
    basis = SphericalBasis((9, 18))
    latitude = torch.deg2rad(torch.from_numpy(basis.latitudes(9)))[:, None]
    longitude = 2 * torch.pi * torch.arange(18, dtype=torch.float64) / 18
    dipole = torch.cos(latitude) * torch.cos(longitude - 0.7) + torch.sin(latitude)
    c = basis.analyze(dipole)
    outside = basis.indices[:, 0] != 1
    assert float(c[outside].abs().max()) < 1e-12
    assert float(c.square().sum()) == pytest.approx(2 / 3)  # mean of x^2 + z^2 on the sphere


@bases()
def test_power_sums_to_the_mean_square(basis):
    c = randn(2, basis.size)
    if "Fourier" in repr(basis) and basis.modes == basis.shape or "Cosine" in repr(basis):
        expected = (basis.synthesize(c).square() * basis.weights()).sum((-2, -1))
    else:
        expected = c.square().sum(-1)
    power = basis.power(basis.synthesize(c))
    torch.testing.assert_close(power.sum(-1), expected, rtol=1e-9, atol=0)
    wavenumber, shell = basis.shells()
    width = wavenumber[1]
    assert power.shape[-1] == len(wavenumber)
    assert bool(((basis.eigenvalues.sqrt() - wavenumber[shell]).abs() <= width / 2 + 1e-9).all())


def test_symmetry_labels():
    torus = FourierBasis((5, 6))
    label = torus.symmetry()
    for k, j in ((0, 0), (1, 2), (3, 4)):  # columns of the first row: 1 | cos sin 1 | cos sin 2
        assert label[k] == label[j]
    assert label[1] != label[3]
    torch.testing.assert_close(torus.eigenvalues[label == label[1]], torus.eigenvalues[1].expand(2))
    sphere = SphericalBasis((8, 16))
    assert torch.equal(torch.bincount(sphere.symmetry()), 2 * torch.arange(8) + 1)
    box = CosineBasis((3, 4))
    assert len(box.symmetry().unique()) == 12


# ---- grids and truncation -----------------------------------------------------------------------


def test_full_bands_stay_full_and_truncated_ones_keep_their_modes():
    assert FourierBasis((8, 8)).at((16, 12)).modes == (16, 12)
    assert FourierBasis((8, 8), modes=5).at((16, 12)).modes == (5, 5)
    assert FourierBasis((8, 8), modes=5).at((4, 12)).modes == (4, 5)
    assert CosineBasis((8, 8), (1.0, 3.0)).at((5, 6)).lengths == (1.0, 3.0)
    assert SphericalBasis((8, 16)).at((16, 32)).lmax == SphericalBasis((16, 32)).lmax
    assert SphericalBasis((8, 16), 3).at((16, 32)).lmax == 3
    assert SphericalBasis((8, 16), 6).at((5, 32)).lmax == 4
    assert SphericalBasis((9, 16), 6).at((5, 32)).lmax == 3  # its pole rows see one function


@bases()
def test_truncation_keeps_the_slowest_functions(basis):
    few = basis.truncate(3)
    assert few.size < basis.size
    assert bool((few.indices <= (2 if "Spherical" not in repr(basis) else 4)).all())
    position = {tuple(p): k for k, p in enumerate(basis.indices.tolist())}
    same = torch.tensor([position[tuple(p)] for p in few.indices.tolist()])
    torch.testing.assert_close(few.eigenvalues, basis.eigenvalues[same])
    torch.testing.assert_close(functions(few), functions(basis)[same])
    assert basis.truncate(1000).size == basis.size


def test_full_band_of_the_sphere():
    assert SphericalBasis((8, 16)).lmax == 7
    assert SphericalBasis((9, 18)).lmax == 7  # two pole rows see one function between them
    assert SphericalBasis((10, 15)).lmax == 7  # limited by the columns
    assert SphericalBasis((721, 1440), 3).lmax == 3


@bases()
def test_resolves(basis):
    assert basis.resolves(basis.shape)
    assert basis.resolves((2 * basis.shape[0], 3 * basis.shape[1]))
    assert not basis.resolves((3, 40))
    assert not basis.resolves((40, 3))
    with pytest.raises(InputError, match="3x40 grid cannot resolve.*truncate"):
        basis.analyze(torch.zeros(3, 40))


def test_pole_rows_hold_one_value():
    basis = SphericalBasis((9, 18))
    x = basis.synthesize(randn(4, basis.size))
    for row in (0, -1):
        pole = x[:, row]
        torch.testing.assert_close(pole, pole[:, :1].expand_as(pole))


def test_errors():
    with pytest.raises(InputError, match="shape must be two positive integers"):
        FourierBasis((0, 4))
    with pytest.raises(InputError, match="lengths must be positive"):
        CosineBasis((4, 4), (1.0, 0.0))
    with pytest.raises(InputError, match=r"modes \(5, 2\) exceed the band"):
        FourierBasis((4, 4), modes=(5, 2))
    with pytest.raises(InputError, match="lmax=8 is outside 0..7"):
        SphericalBasis((8, 16), 8)
    with pytest.raises(InputError, match="3 latitudes do not fit"):
        SphericalBasis((4, 8), latitudes=[60, 0, -60])
