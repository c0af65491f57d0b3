# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from priors import homogeneous
from tensors import randn

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, Matern, WhiteField
from ddo_modulus.fields.spherical_basis import SphericalBasis


def with_eofs():
    noise = GaussianField(CosineBasis((4, 5)), Matern(0.3, 0.5), 2)
    root = randn(6, 6, seed=3)
    index = torch.tensor([0, 1, 5, 20, 22, 39])
    remainder = 0.1 + randn(40, seed=4).abs()
    prior = EOFField.from_covariance(noise, root @ root.T, index, remainder)
    return GaussianDenoiser(randn(2, 4, 5, seed=5), prior, noise)


CASES = {
    "fourier": homogeneous(FourierBasis((6, 7), (1.0, 1.3)), 2),
    "cosine": homogeneous(CosineBasis((6, 5))),
    "sphere": homogeneous(SphericalBasis((7, 12)), 2),
    "white": GaussianDenoiser(
        0.3,
        GaussianField(FourierBasis((6, 6)), Matern(0.3, 1.0)),
        WhiteField(FourierBasis((6, 6))),
    ),
    "eofs": with_eofs(),
}
cases = pytest.mark.parametrize("denoiser", CASES.values(), ids=CASES.keys())


def covariances(denoiser, dense):
    """Dense covariances of the prior and the noise."""
    noise = denoiser.noise
    size = noise.channels * noise.basis.size
    root = dense(lambda a: denoiser.fields(a, mean=False), (size,))
    prior = root @ torch.diag(denoiser.variance[0]) @ root.T
    return prior, dense(noise.cov, (noise.channels, *noise.shape))


@cases
def test_prior_covariance_is_the_one_given(denoiser, dense):
    prior, _ = covariances(denoiser, dense)
    if isinstance(denoiser.prior, EOFField):
        x = denoiser.prior.sample(
            40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).flatten(1)
        deviation = ((prior**2 + prior.diagonal() * prior.diagonal()[:, None]) / len(x)).sqrt()
        assert float(((x.T @ x / len(x) - prior).abs() / deviation).max()) < 5.5
    else:
        size = (denoiser.noise.channels, *denoiser.noise.shape)
        torch.testing.assert_close(prior, dense(denoiser.prior.cov, size))


@cases
@pytest.mark.parametrize("level", [0.05, 0.7, 20.0])
def test_it_is_the_dense_wiener_filter(denoiser, level, dense):
    prior, noise = covariances(denoiser, dense)
    size = (denoiser.noise.channels, *denoiser.noise.shape)
    # A state of the band: the sphere has more points than functions.
    x = denoiser.fields(3 * randn(4, denoiser.variance.shape[-1]))
    total = torch.linalg.pinv(prior + level**2 * noise, rtol=1e-13, hermitian=True)
    mean = denoiser.mean.flatten()
    expected = mean + (x.flatten(1) - mean) @ (prior @ total).T
    clean = denoiser(x, torch.full((4,), level, dtype=torch.float64))
    torch.testing.assert_close(clean, expected.unflatten(1, size), rtol=1e-6, atol=1e-7)


@cases
@pytest.mark.parametrize("level", [0.05, 0.7, 20.0])
def test_tweedie_covariance_is_the_dense_posterior(denoiser, level, dense):
    """``sigma^2 J C`` from automatic differentiation, against ``P - P (P + sigma^2 C)^-1 P``."""
    prior, noise = covariances(denoiser, dense)
    size = (denoiser.noise.channels, *denoiser.noise.shape)
    points = len(prior)
    x = denoiser.fields(randn(1, denoiser.variance.shape[-1])).expand(points, *size)
    sigma = torch.full((points,), level, dtype=torch.float64)
    _, pullback = denoiser.value_and_pullback(x, sigma)
    tweedie = level**2 * dense(lambda v: denoiser.noise.cov(pullback(v)), size)
    total = torch.linalg.pinv(prior + level**2 * noise, rtol=1e-13, hermitian=True)
    posterior = prior - prior @ total @ prior
    torch.testing.assert_close(tweedie, posterior, rtol=1e-6, atol=1e-7)
    # ... and the closed form of its diagonal coordinates.
    root = dense(lambda a: denoiser.fields(a, mean=False), (denoiser.variance.shape[-1],))
    variance = denoiser.posterior_variance(sigma[:1])[0]
    torch.testing.assert_close(root @ torch.diag(variance) @ root.T, tweedie)


@cases
def test_coordinates_invert_fields(denoiser):
    a = randn(3, denoiser.variance.shape[-1])
    torch.testing.assert_close(denoiser.modes(denoiser.fields(a)), a, rtol=1e-8, atol=1e-8)
    plain = denoiser.fields(a, mean=False)
    torch.testing.assert_close(plain + denoiser.mean, denoiser.fields(a))


@cases
def test_limits_of_the_noise_level(denoiser):
    x = denoiser.fields(randn(2, denoiser.variance.shape[-1]))
    quiet = denoiser(x, torch.full((2,), 1e-9, dtype=torch.float64))
    torch.testing.assert_close(quiet, x, rtol=1e-6, atol=1e-6)
    loud = denoiser(x, torch.full((2,), 1e9, dtype=torch.float64))
    torch.testing.assert_close(loud, denoiser.mean.expand_as(x), rtol=1e-6, atol=1e-6)


def test_states_of_a_batch_have_their_own_noise_levels():
    denoiser = CASES["fourier"]
    x, sigma = randn(3, 2, 6, 7), torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    together = denoiser(x, sigma)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], denoiser(x[i : i + 1], sigma[i : i + 1]))


def test_inflation_multiplies_the_prior_covariance(dense):
    denoiser = CASES["fourier"]
    factors = torch.tensor([0.5, 1.0, 3.0])
    inflated = denoiser.inflated(factors)
    x, sigma = randn(6, 2, 6, 7), torch.full((6,), 0.7, dtype=torch.float64)
    together = inflated(x, sigma)
    prior, noise = covariances(denoiser, dense)
    for i, factor in enumerate(factors.tolist()):
        gain = factor * prior @ torch.linalg.inv(factor * prior + 0.49 * noise)
        for member in (2 * i, 2 * i + 1):
            expected = (x[member] - denoiser.mean).flatten() @ gain.T + denoiser.mean.flatten()
            torch.testing.assert_close(together[member].flatten(), expected)
    torch.testing.assert_close(denoiser.inflated(1.0)(x, sigma), denoiser(x, sigma))


def test_single_precision():
    denoiser = CASES["sphere"]
    x = denoiser.fields(randn(2, denoiser.variance.shape[-1]))
    sigma = torch.tensor([0.3, 3.0], dtype=torch.float64)
    single = denoiser(x.float(), sigma.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), denoiser(x, sigma), rtol=1e-4, atol=1e-5)


def test_whitening_is_exact_where_the_noise_is_far_below_the_signal():
    """One minus the Wiener weight would be round-off there, in single precision."""
    noise = GaussianField(FourierBasis((8, 8)), Matern(0.005, 0.5))
    denoiser = GaussianDenoiser(0.0, GaussianField(noise.basis, Matern(0.4, 3.0)), noise)
    sigma = torch.tensor([5e-5, 1e-2, 1.0, 80.0])
    assert bool((denoiser.wiener_weight(sigma) == 1).any())
    expected = (denoiser.variance + sigma.double()[:, None] ** 2).rsqrt()
    torch.testing.assert_close(denoiser.whitening(sigma), expected.float(), rtol=1e-6, atol=0)


def test_on_another_grid_shared_modes_are_denoised_alike():
    denoiser = homogeneous(FourierBasis((8, 9), modes=7))
    fine = denoiser.at((16, 27))
    assert denoiser.at((8, 9)) is denoiser
    torch.testing.assert_close(fine.mean[..., ::2, ::3], denoiser.mean)
    a = randn(2, denoiser.variance.shape[-1])
    sigma = torch.full((2,), 0.5, dtype=torch.float64)
    clean = denoiser(denoiser.fields(a), sigma)
    torch.testing.assert_close(fine(fine.fields(a), sigma)[..., ::2, ::3], clean)


@pytest.mark.parametrize("shape", [(4, 5), (16, 15), (4, 15)])
def test_means_move_to_coarser_and_finer_grids(shape):
    basis = CosineBasis((8, 9))
    smooth = basis.truncate(3).synthesize(randn(9))
    noise = GaussianField(basis, Matern(0.25, 0.5))
    denoiser = GaussianDenoiser(smooth, GaussianField(basis, Matern(0.4, 1.5)), noise)
    expected = basis.truncate(3).synthesize(randn(9), shape)
    torch.testing.assert_close(denoiser.at(shape).mean[0], expected)


def test_pullback_may_be_called_again_and_is_the_transposed_jacobian():
    denoiser = CASES["eofs"]
    x, sigma = randn(2, 2, 4, 5), torch.tensor([0.3, 2.0], dtype=torch.float64)
    clean, pullback = denoiser.value_and_pullback(x, sigma)
    assert not clean.requires_grad
    torch.testing.assert_close(clean, denoiser(x, sigma))
    v, w = randn(2, 2, 4, 5, seed=1), randn(2, 2, 4, 5, seed=2)
    _, forward = torch.func.jvp(lambda x: denoiser(x, sigma), (x,), (w,))
    for _ in range(2):
        torch.testing.assert_close((pullback(v) * w).sum(), (v * forward).sum())


def test_prior_and_noise_share_their_basis():
    noise = GaussianField(FourierBasis((6, 6)), Matern(0.3, 1.0))
    with pytest.raises(InputError, match="do not share a basis"):
        GaussianDenoiser(0.0, GaussianField(FourierBasis((6, 7)), Matern(0.3, 1.0)), noise)
