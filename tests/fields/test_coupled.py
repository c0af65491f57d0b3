# SPDX-License-Identifier: Apache-2.0
"""Fields with a covariance between channels, against dense matrices and known processes."""

import pytest
import torch

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.fields.rotation import ChannelRotation

NETWORK = {"widths": [8], "depths": [1], "modes": [3]}


def noise(channels: int, shape=(4, 5)) -> GaussianField:
    return GaussianField(FourierBasis(shape), Matern(0.1, 0.5), channels)


def positive(modes: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(modes, size, size, generator=generator, dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(size)


def dense(field: CoupledField) -> torch.Tensor:
    """Covariance on the grid, coefficient by coefficient: ``L Sigma L^T``."""
    reference = field.reference
    channels, modes = reference.channels, reference.basis.size
    unit = torch.eye(channels * modes, dtype=torch.float64)
    root = reference.color(unit.unflatten(1, (channels, modes))).flatten(1).mT
    sigma = torch.zeros(channels, modes, channels, modes, dtype=torch.float64)
    for k in range(modes):
        sigma[:, k, :, k] = field.covariance[k]
    size = channels * modes
    return root @ sigma.reshape(size, size) @ root.mT


@pytest.mark.parametrize("homogeneous", [True, False])
def test_the_denoiser_is_the_dense_one(homogeneous):
    """Also where functions share their covariance, which is then decomposed once for all."""
    reference = noise(3)
    covariance = positive(20, 3)
    field = CoupledField(reference, covariance)
    if homogeneous:
        field = CoupledField(reference, covariance[reference.basis.symmetry()])
    prior = dense(field)
    white = dense(CoupledField(reference, torch.eye(3).double().expand(20, 3, 3)))
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    found = GaussianDenoiser(0.0, field, reference)(x, sigma)
    for one, state, level in zip(found, x, sigma, strict=True):
        solved = torch.linalg.solve(prior + level**2 * white, state.flatten())
        torch.testing.assert_close(one.flatten(), prior @ solved)


def test_samples_have_the_covariance():
    field = CoupledField(noise(2), positive(20, 2))
    n = 40_000
    x = field.sample(n, generator=torch.Generator().manual_seed(0)).double().flatten(1)
    expected = dense(field)
    deviation = ((expected**2 + expected.diagonal() * expected.diagonal()[:, None]) / n).sqrt()
    assert float(((x.T @ x / n - expected).abs() / deviation).max()) < 5.5


def test_fitting_finds_the_covariance_and_shares_it_within_a_symmetry():
    reference = noise(2)
    label = reference.basis.symmetry()
    truth = CoupledField(reference, positive(int(label.max()) + 1, 2)[label])
    generator = torch.Generator().manual_seed(1)
    pieces = [truth.sample(5000, generator=generator) for _ in range(2)]
    found = CoupledField.fit(reference, pieces).covariance
    for k, other in enumerate(label):
        torch.testing.assert_close(found[k], found[int((label == other).nonzero()[0])])
    scale = truth.covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert float(((found - truth.covariance).abs() / scale).max()) < 0.1


def test_marginal_variances():
    vectors = torch.linalg.eigh(positive(20, 3))[1]
    variance = torch.rand(60, dtype=torch.float64)
    rotation = ChannelRotation(vectors)
    unit = torch.eye(60, dtype=torch.float64)
    matrix = rotation(unit, back=True)  # rows: E e_i
    expected = (matrix.mT @ torch.diag(variance) @ matrix).diagonal()
    torch.testing.assert_close(rotation.marginal(variance), expected)
    torch.testing.assert_close(rotation(rotation(unit), back=True), unit)


def test_a_finer_grid_keeps_the_law_of_the_coarse():
    field = CoupledField(noise(2, (7, 7)), positive(49, 2))
    fine = field.at((14, 14))
    coarse = fine.at((7, 7))
    torch.testing.assert_close(coarse.covariance, field.covariance)
    assert bool((torch.linalg.eigvalsh(fine.covariance) > 0).all())


def test_new_scales_are_correlated_as_the_smallest_measured_ones():
    """Between channels; a correlation that all modes share is that of every mode beyond."""
    share = torch.tensor([[1.0, 0.6], [0.6, 1.0]]).double()
    deviation = torch.tensor([2.0, 0.5]).double()
    falloff = 1 / (1 + noise(2, (7, 7)).basis.eigenvalues / 50)
    covariance = share * deviation[:, None] * deviation * falloff[:, None, None]
    fine = CoupledField(noise(2, (7, 7)), covariance).at((14, 14)).covariance
    root = fine.diagonal(dim1=1, dim2=2).sqrt()
    correlation = fine / (root[:, :, None] * root[:, None])
    torch.testing.assert_close(correlation, share.expand_as(correlation))


def autoregression(modes: int, variables: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stable steps ``A`` and stationary covariances ``R_0 = A R_0 A^T + Q`` of each mode."""
    generator = torch.Generator().manual_seed(3)
    size = (modes, variables, variables)
    step = torch.randn(size, generator=generator, dtype=torch.float64)
    step = 0.8 * step / torch.linalg.matrix_norm(step, 2)[:, None, None]
    noise_covariance = positive(modes, variables, 4)
    stationary = noise_covariance.clone()
    for _ in range(500):
        stationary = step @ stationary @ step.mT + noise_covariance
    return step, stationary


def of_process(step, stationary, frames: int) -> torch.Tensor:
    """Covariance of consecutive frames of ``x_{t+1} = A x_t + q``."""
    modes, variables, _ = step.shape
    blocks = torch.zeros(modes, frames, variables, frames, variables, dtype=torch.float64)
    for s in range(frames):
        for t in range(frames):
            lag = torch.linalg.matrix_power(step, abs(s - t)) @ stationary
            blocks[:, s, :, t] = lag if s >= t else lag.mT
    return blocks.reshape(modes, frames * variables, -1)


@pytest.mark.parametrize("variables", [1, 2])
def test_a_window_is_extended_to_the_process_it_belongs_to(variables):
    step, stationary = autoregression(20, variables)
    window = CoupledField(noise(3 * variables), of_process(step, stationary, 3))
    long = window.extended(3, 9)
    assert long.reference.channels == 9 * variables
    torch.testing.assert_close(long.covariance, of_process(step, stationary, 9))
    torch.testing.assert_close(window.extended(3, 3).covariance, window.covariance)
    torch.testing.assert_close(window.extended(3, 2).covariance, of_process(step, stationary, 2))


@pytest.mark.parametrize("variables", [1, 2])
def test_an_estimate_from_few_samples_is_extended_to_a_process(variables):
    """Smooth in time, where errors of sampling outweigh the differences between frames."""
    t = torch.linspace(0, 0.4, 5, dtype=torch.float64)
    lag = (-((t[:, None] - t) ** 2) / 2).exp() + 1e-9 * torch.eye(5)
    truth = torch.kron(lag, torch.eye(variables).double()).expand(20, -1, -1)
    field = CoupledField(noise(5 * variables), truth)
    x = field.sample(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = CoupledField.fit(field.reference, [x])
    raw = estimate.covariance
    window = estimate.stationary(5)
    torch.testing.assert_close(
        window.covariance.diagonal(dim1=1, dim2=2).mean(1), raw.diagonal(dim1=1, dim2=2).mean(1)
    )
    torch.testing.assert_close(window.stationary(5).covariance, window.covariance)
    long = window.extended(5, 40).covariance
    assert float(torch.linalg.eigvalsh(long).min()) > -1e-8
    scale = long.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    assert bool((long.abs() <= scale * (1 + 1e-9)).all())
    # Differences between frames are the samples' own, not the difference of larger numbers.
    e = torch.tensor([-1.0, 1.0, 0, 0, 0]).repeat_interleave(variables).double()
    own = torch.stack([(e.roll(variables * i) @ raw @ e.roll(variables * i)) for i in range(4)])
    step = e @ window.covariance @ e
    torch.testing.assert_close(step, own.mean(0), rtol=0.05, atol=0)


def test_an_operator_keeps_a_coupled_prior(tmp_path):
    operator = DiffusionOperator(
        [4, 5], 3, noise={"length_scale": 0.1, "smoothness": 0.5}, network=NETWORK, coupled=True
    )
    field = CoupledField(operator.noise, positive(20, 3))
    operator.set_prior(field)
    path = tmp_path / "operator.mdlus"
    operator.save(str(path))
    again = DiffusionOperator.from_checkpoint(str(path))
    x, sigma = torch.randn(2, 3, 4, 5), torch.tensor([0.3, 2.0])
    expected = GaussianDenoiser(0.0, field, operator.noise)(x, sigma)
    for one in (operator, again):
        torch.testing.assert_close(one(x, sigma), expected, atol=1e-4, rtol=1e-4)
    uncoupled = DiffusionOperator([4, 5], 3, network=NETWORK)
    with pytest.raises(InputError, match="coupled=True"):
        uncoupled.set_prior(CoupledField(uncoupled.noise, positive(20, 3)))
    with pytest.raises(InputError, match="coupled=True"):
        operator.set_prior(GaussianField(operator.basis, Matern(0.3, 1.0), 3))


@pytest.mark.parametrize("basis", [FourierBasis((4, 5)), CosineBasis((4, 5))])
def test_with_a_regression_the_untrained_operator_is_the_conditional_mean(basis):
    """``x = B y + r`` with independent Gaussian ``y``, ``r``: the exact mean given both."""
    domain = "torus" if isinstance(basis, FourierBasis) else "box"
    operator = DiffusionOperator(
        [4, 5],
        1,
        domain,
        noise={"length_scale": 0.1, "smoothness": 0.5},
        condition_channels=2,
        network=NETWORK,
        regression=True,
    )
    weights = torch.randn(1, 2, 20, generator=torch.Generator().manual_seed(0))
    residual = GaussianField(operator.basis, Matern(0.3, 1.0))
    operator.set_regression(weights)
    operator.set_prior(residual)
    condition, x = torch.randn(3, 2, 4, 5), torch.randn(3, 1, 4, 5)
    sigma = torch.tensor([0.1, 1.0, 10.0])
    c = operator.basis.analyze(condition)
    mean = operator.basis.synthesize(torch.einsum("dk,bdk->bk", weights[0], c))[:, None]
    around = GaussianDenoiser(0.0, residual, operator.noise)
    expected = mean + around(x - mean, sigma)
    torch.testing.assert_close(operator(x, sigma, condition), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="takes a regression"):
        operator.set_regression(weights[:, :1])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="a coupled field needs"):
        CoupledField(noise(2), positive(20, 3))
    with pytest.raises(InputError, match="no window of 2 frames"):
        CoupledField(noise(3), positive(20, 3)).extended(2, 5)
