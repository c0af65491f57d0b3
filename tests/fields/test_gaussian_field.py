# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from tensors import randn

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.gaussian_field import (
    EOFField,
    GaussianField,
    Matern,
    MeasuredSpectrum,
    Scaled,
    WhiteField,
    check_same_basis,
)
from ddo_modulus.fields.spherical_basis import SphericalBasis

FIELDS = {
    "fourier-even": GaussianField(FourierBasis((8, 8)), Matern(0.25, 1.0)),
    "fourier-mixed": GaussianField(FourierBasis((7, 10), (1.0, 1.6)), Matern(0.2, 0.5), 2),
    "cosine": GaussianField(CosineBasis((7, 8), (1.0, 1.2)), Matern(0.3, 1.5)),
    "sphere-centres": GaussianField(SphericalBasis((8, 16)), Matern(0.5, 1.0)),
    "sphere-poles": GaussianField(SphericalBasis((9, 16)), Matern(0.4, 0.5), 2),
}
fields = pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS.keys())


def covariance(field, dense):
    return dense(field.cov, (field.channels, *field.shape))


# ---- the covariance -----------------------------------------------------------------------------


@fields
def test_covariance_is_l_times_its_adjoint(field, dense):
    root = dense(field.color, (field.channels, field.basis.size))
    torch.testing.assert_close(covariance(field, dense), root @ root.T)
    v = randn(3, field.channels, *field.shape)
    torch.testing.assert_close(field.cov(v), field.color(field.color_adjoint(v)))


@fields
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_adjoint_identity(field, dtype, tolerance):
    z = randn(field.channels, field.basis.size, dtype=dtype)
    for shape in (field.shape, (12, 20)):  # the field's own grid and any other
        v = randn(field.channels, *shape, seed=1, dtype=dtype)
        on = field.at(shape)
        z = randn(on.channels, on.basis.size, dtype=dtype)
        left = (on.color(z).double() * v.double()).sum()
        right = (z.double() * on.color_adjoint(v).double()).sum()
        assert abs(left - right) < tolerance * float(z.norm() * v.norm())


@fields
def test_whitening_inverts_coloring(field):
    z = randn(4, field.channels, field.basis.size)
    torch.testing.assert_close(field.whiten(field.color(z)), z, rtol=1e-8, atol=1e-8)


@fields
def test_samples_have_the_covariance(field, dense):
    x = field.sample(20_000, generator=torch.Generator().manual_seed(0)).double().flatten(1)
    expected = covariance(field, dense)
    error = x.T @ x / len(x) - expected
    deviation = ((expected**2 + expected.diagonal() * expected.diagonal()[:, None]) / len(x)).sqrt()
    assert float((error.abs() / deviation).max()) < 6
    assert float((error / deviation).square().mean()) == pytest.approx(1, abs=0.5)
    assert float((x.mean(0).abs() / (expected.diagonal() / len(x)).sqrt()).max()) < 5


@pytest.mark.parametrize(
    "basis",
    [FourierBasis((8, 8)), FourierBasis((7, 10), (1, 2)), FourierBasis((9, 8), modes=5)],
    ids=repr,
)
@pytest.mark.parametrize("smoothness", [0.5, 2.0])
def test_unit_variance_at_every_point_of_the_torus(basis, smoothness, dense):
    variance = covariance(GaussianField(basis, Matern(0.2, smoothness)), dense).diagonal()
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(8, 16), (9, 16), (24, 48), (25, 48)])
def test_unit_variance_at_every_point_of_the_sphere(shape, dense):
    """Poles and equator alike: no direction is preferred."""
    field = GaussianField(SphericalBasis(shape), Matern(0.5, 1.0))
    unit = torch.eye(field.basis.size, dtype=torch.float64)[:, None]
    variance = field.color(unit).square().sum(0)[0]
    torch.testing.assert_close(variance, variance[0, 0].expand(shape), rtol=1e-10, atol=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=2e-2, atol=0)


def test_covariance_on_the_sphere_depends_on_the_angle_only():
    """Along the equator, along a meridian and across the pole."""
    field = GaussianField(SphericalBasis((37, 72)), Matern(0.4, 1.0))  # every 5 degrees
    delta = torch.zeros(3, 1, 37, 72, dtype=torch.float64)
    delta[0, 0, 18, 0] = delta[1, 0, 0, 0] = delta[2, 0, 2, 0] = 1.0  # equator, pole, 80 N
    equator, pole, high = field.cov(delta)[:, 0]
    along_equator = equator[18, :7]
    torch.testing.assert_close(equator[18 : 18 + 7, 0], along_equator)
    torch.testing.assert_close(pole[:7, 50], along_equator)
    over_the_pole = torch.cat([high[:3, 0].flip(0), high[1:5, 36]])
    torch.testing.assert_close(over_the_pole, along_equator)


def test_white_field_on_a_full_box_is_white(dense):
    for basis in (FourierBasis((6, 7)), FourierBasis((4, 8)), CosineBasis((5, 6), (1.0, 2.0))):
        cov = covariance(WhiteField(basis), dense)
        torch.testing.assert_close(cov, torch.eye(len(cov), dtype=torch.float64))


# ---- Matern -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("smoothness", "closed_form", "tolerance"),
    [
        # The exponential has a long spectral tail, of which the grid misses one percent or two.
        (0.5, lambda r: math.exp(-r), 0.02),
        (1.5, lambda r: (1 + math.sqrt(3) * r) * math.exp(-math.sqrt(3) * r), 1e-3),
        (200.0, lambda r: math.exp(-(r**2) / 2), 2e-3),
    ],
)
def test_matern_covariance_is_the_closed_form(smoothness, closed_form, tolerance):
    scale, n = 0.08, 256
    field = GaussianField(FourierBasis((n, n)), Matern(scale, smoothness))
    delta = torch.zeros(1, n, n, dtype=torch.float64)
    delta[0, 0, 0] = 1.0
    cov = field.cov(delta)[0]
    for i, j in [(0, 0), (10, 0), (0, 20), (12, 16), (30, 30), (60, 5)]:
        expected = closed_form(math.hypot(i, j) / n / scale)
        assert float(cov[i, j]) == pytest.approx(expected, abs=tolerance)


def test_matern_variances_follow_the_spectral_density():
    field = GaussianField(FourierBasis((9, 9)), Matern(0.3, 1.0))
    ratio = field.variance[0] / field.variance[0, 0]
    expected = (1 + field.basis.eigenvalues * 0.3**2 / 2) ** -2.0
    torch.testing.assert_close(ratio, expected)


@pytest.mark.parametrize("bad", [(0.0, 1.0), (0.1, -1.0), (math.nan, 1.0), (0.1, math.inf)])
def test_matern_parameters_are_checked(bad):
    with pytest.raises(InputError, match="must be positive and finite"):
        Matern(*bad)


# ---- resolution ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "fine"),
    [
        (GaussianField(FourierBasis((8, 8), modes=7), Matern(0.25, 1.0)), (16, 24)),
        (GaussianField(SphericalBasis((9, 16), 5), Matern(0.5, 1.0)), (17, 48)),
    ],
    ids=["torus", "sphere"],
)
def test_a_band_limited_field_has_one_covariance_on_all_grids(field, fine, dense):
    coarse = covariance(field, dense)
    rows, columns = (fine[0] - 1) // (field.shape[0] - 1), fine[1] // field.shape[1]
    number = torch.arange(fine[0] * fine[1]).reshape(fine)[::rows, ::columns]
    shared = number[: field.shape[0], : field.shape[1]].flatten()
    refined = covariance(field.at(fine), dense)[shared][:, shared]
    torch.testing.assert_close(refined, coarse, rtol=1e-9, atol=1e-9)


@fields
def test_shared_modes_keep_their_variance_and_finer_grids_only_add(field):
    fine = field.at(tuple(2 * n for n in field.shape))
    position = {tuple(p): k for k, p in enumerate(fine.basis.indices.tolist())}
    shared = torch.tensor([position[tuple(p)] for p in field.basis.indices.tolist()])
    torch.testing.assert_close(fine.variance[:, shared], field.variance)
    back = fine.at(field.shape)
    torch.testing.assert_close(back.variance, field.variance)
    assert field.at(field.shape) is field


def test_refinement_converges():
    """A trace-class field has a limit: the variance added by each doubling shrinks."""
    field = GaussianField(FourierBasis((8, 8)), Matern(0.25, 1.0))
    total = [float(field.at((n, n)).variance.sum()) for n in (16, 32, 64, 128)]
    added = [b - a for a, b in zip(total, total[1:], strict=False)]
    assert all(0 < b < a / 2 for a, b in zip(added, added[1:], strict=False))


def test_resampling_to_another_grid_keeps_the_realisation():
    field = GaussianField(FourierBasis((8, 8), modes=7), Matern(0.25, 1.0))
    z = randn(1, field.basis.size)
    torch.testing.assert_close(field.at((16, 16)).color(z)[..., ::2, ::2], field.color(z))


# ---- sampling -----------------------------------------------------------------------------------


def test_one_generator_state_gives_one_sample():
    field = FIELDS["fourier-mixed"]
    one, two = (field.sample(3, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5))
    assert one.shape == (3, 2, 7, 10)
    assert torch.equal(one, two)
    other = field.sample(3, generator=torch.Generator().manual_seed(6))
    assert not torch.equal(one, other)
    assert field.sample(1, dtype=torch.float64).dtype == torch.float64


# ---- measured spectra ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "basis", [FourierBasis((9, 8)), SphericalBasis((8, 16)), CosineBasis((6, 6))], ids=repr
)
def test_fit_recovers_a_known_spectrum(basis):
    truth = GaussianField(basis, Matern(0.5, 1.0), 2)
    n = 4000
    x = truth.sample(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted = GaussianField(basis, MeasuredSpectrum.fit(basis, x))
    assert fitted.channels == 2
    count = torch.bincount(basis.symmetry())[basis.symmetry()]
    error = (fitted.variance / truth.variance - 1) / (2 / (n * count)).sqrt()
    assert float(error.abs().max()) < 5
    label = basis.symmetry()
    first = torch.stack([fitted.variance[:, label == value][:, 0] for value in label], 1)
    assert torch.equal(fitted.variance, first)


def test_measured_spectra_extend_by_their_power_law():
    """Variances that are a power law continue as that power law; the band itself stays."""
    basis, fine = FourierBasis((9, 9)), FourierBasis((27, 27))

    def law(basis):
        return 0.7 * (basis.eigenvalues + 1e-12).clamp_min(30.0) ** -1.8

    spectrum = MeasuredSpectrum(basis, law(basis)[None])
    torch.testing.assert_close(spectrum(basis)[0], law(basis))
    torch.testing.assert_close(spectrum(fine)[0], law(fine), rtol=1e-6, atol=0)


def test_flat_measurements_do_not_pile_up_energy_beyond_the_band():
    basis = FourierBasis((9, 9))
    spectrum = MeasuredSpectrum(basis, torch.ones(1, basis.size, dtype=torch.float64))
    field = GaussianField(basis, spectrum)
    total = [float(field.at((n, n)).variance.sum()) for n in (27, 81, 243)]
    assert total[2] - total[1] < 0.5 * (total[1] - total[0])


def test_fit_floors_modes_without_variance():
    basis = CosineBasis((4, 4))
    x = basis.synthesize(torch.eye(basis.size, dtype=torch.float64)[:1])[:, None].repeat(5, 1, 1, 1)
    spectrum = MeasuredSpectrum.fit(basis, x, floor=1e-3)
    torch.testing.assert_close(
        spectrum.variance[0, 1:], torch.full((15,), 1e-3 / 16, dtype=torch.float64)
    )


def test_measured_spectra_are_checked():
    basis = FourierBasis((4, 4))
    with pytest.raises(InputError, match="needs 16 positive variances"):
        MeasuredSpectrum(basis, torch.ones(1, 15))
    with pytest.raises(InputError, match="minimum 0"):
        MeasuredSpectrum(basis, torch.zeros(1, 16))


# ---- fields that are not homogeneous ------------------------------------------------------------


def eof_field(channels=2):
    reference = GaussianField(CosineBasis((4, 5)), Matern(0.3, 0.5), channels)
    size = channels * reference.basis.size
    index = torch.tensor([0, 3, 7, 21, 30])
    root = randn(5, 5, seed=3)
    covariance = root @ root.T
    remainder = 0.1 + torch.rand(size, generator=torch.Generator().manual_seed(4)).double()
    field = EOFField.from_covariance(reference, covariance, index, remainder)
    full = torch.diag(remainder)
    full[index[:, None], index] = covariance
    return field, reference, full


def test_eof_field_has_the_covariance_it_was_built_from(dense):
    field, reference, whitened = eof_field()
    root = dense(reference.color, (2, 20))
    expected = root @ whitened @ root.T
    n = 40_000
    x = field.sample(n, generator=torch.Generator().manual_seed(0)).double().flatten(1)
    deviation = ((expected**2 + expected.diagonal() * expected.diagonal()[:, None]) / n).sqrt()
    assert float(((x.T @ x / n - expected).abs() / deviation).max()) < 5.5


def test_eof_rotation_diagonalises_the_covariance():
    field, reference, whitened = eof_field()
    variance, turn = field.relative_to(reference)
    rotation = turn(torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(rotation @ torch.diag(variance) @ rotation.T, whitened)


def test_eof_variances_have_a_floor():
    reference = GaussianField(CosineBasis((3, 3)), Matern(0.3, 0.5))
    rank_one = torch.ones(3, 3, dtype=torch.float64)
    field = EOFField.from_covariance(
        reference, rank_one, torch.arange(3), torch.ones(9), floor=1e-2
    )
    variance, _ = field.relative_to(reference)
    torch.testing.assert_close(variance[:3].sort().values, torch.tensor([0.03, 0.03, 3.0]).double())


def test_relative_variances_of_two_fields():
    basis = FourierBasis((5, 6))
    one, other = GaussianField(basis, Matern(0.3, 2.0), 2), GaussianField(basis, Matern(0.2, 1), 2)
    variance, rotation = one.relative_to(other)
    assert rotation is None
    torch.testing.assert_close(variance, (one.variance / other.variance).flatten())


def test_fields_that_do_not_share_a_basis_are_told_apart():
    field = GaussianField(FourierBasis((4, 4)), Matern(0.3, 1.0))
    for basis, channels in [
        (FourierBasis((4, 4)), 2),
        (FourierBasis((4, 4), (1.0, 2.0)), 1),
        (FourierBasis((4, 5)), 1),
        (CosineBasis((4, 4)), 1),
    ]:
        with pytest.raises(InputError, match="do not share a basis"):
            check_same_basis(field, GaussianField(basis, Matern(0.3, 1.0), channels))
    check_same_basis(field, GaussianField(FourierBasis((4, 4)), Matern(0.1, 2.0)))
    eofs, reference, _ = eof_field()
    other = GaussianField(reference.basis, Matern(0.2, 0.5), 2)
    with pytest.raises(InputError, match="only with respect to its own reference"):
        eofs.relative_to(other)
    with pytest.raises(InputError, match="one variance is needed"):
        EOFField(reference, torch.ones(39), torch.arange(2), torch.eye(2))
    with pytest.raises(InputError, match="3 channels asked of a spectrum with 2"):
        measured = MeasuredSpectrum(field.basis, torch.ones(2, 16))
        GaussianField(field.basis, measured, 3)


def test_channels_of_a_scaled_spectrum_have_the_variances_asked_for():
    basis = FourierBasis((6, 8), (1.0, 1.3))
    scaled = Scaled.with_variance(basis, Matern(0.2, 1.5), [0.25, 4.0])
    field = GaussianField(basis, scaled)
    unit = torch.eye(48, dtype=torch.float64).reshape(48, 1, 6, 8)
    pointwise = field.cov(unit.expand(-1, 2, -1, -1))
    found = pointwise.flatten(2).permute(1, 0, 2).diagonal(dim1=1, dim2=2)
    expected = torch.tensor([[0.25], [4.0]], dtype=torch.float64).expand(-1, 48)
    torch.testing.assert_close(found, expected)
