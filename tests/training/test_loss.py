# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tensors import generator

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, Matern
from ddo_modulus.training import DenoisingLoss, TrainerConfig, noise_levels

CONFIG = TrainerConfig(sigma_min=0.05, sigma_max=20.0)


def build(eofs=0, width=8):
    torch.manual_seed(0)
    network = {"widths": [width], "depths": [1], "modes": [5], "embedding": 16}
    noise = {"length_scale": 0.2, "smoothness": 0.5}
    operator = DiffusionOperator([8, 8], 1, "box", [1.0, 1.0], noise, 0, eofs, network)
    prior = GaussianField(operator.basis, Matern(0.4, 1.5))
    if eofs:
        root = torch.randn(eofs, eofs, generator=generator(), dtype=torch.float64)
        variance = (prior.variance / operator.noise.variance).reshape(-1)
        block = root @ root.T / eofs
        prior = EOFField.from_covariance(operator.noise, block, torch.arange(eofs), variance)
    operator.set_prior(prior)
    return operator, prior


@pytest.mark.parametrize("eofs", [0, 20])
@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_the_loss_of_the_linear_denoiser_is_one(eofs, whitening):
    operator, prior = build(eofs)
    x = prior.sample(2000, generator=generator())
    z = torch.randn(2000, 64, generator=generator(1))
    sigma = noise_levels(2000, CONFIG, generator(2), torch.device("cpu"))
    with torch.no_grad():
        value = DenoisingLoss(operator, whitening)(x, sigma, z)
    error = float(value.std() / 2000**0.5)
    assert abs(float(value.mean()) - 1) < max(5 * error, 1e-3) and error < 0.05


def test_the_loss_asks_for_the_residual_of_the_clean_state():
    """A network that knows the clean state has no loss."""
    operator, prior = build()
    x = prior.sample(4, generator=generator())
    z = torch.randn(4, 64, generator=generator(1))
    sigma = torch.tensor([0.1, 0.5, 2.0, 10.0])
    linear = operator.linear
    noisy = linear.fields(linear.modes(x) + sigma[:, None] * z)

    def oracle(a, level, shape, condition, part):
        deviation = linear.posterior_variance(level).sqrt()
        return linear.modes(x - linear(noisy, level)) / deviation

    operator.residual = oracle
    assert DenoisingLoss(operator, 0.5)(x, sigma, z).max() < 1e-4


def test_noise_levels_are_stratified():
    sigma = noise_levels(1000, CONFIG, generator(), torch.device("cpu")).double()
    share = (sigma / CONFIG.sigma_min).log() / torch.tensor(400.0).double().log()
    stratum = (share * 1000).floor()
    assert (stratum - torch.arange(1000)).abs().max() <= 1  # single precision at the edges
    assert sigma.min() >= 0.0499 and sigma.max() <= 20.01
