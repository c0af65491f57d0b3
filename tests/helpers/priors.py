# SPDX-License-Identifier: Apache-2.0
"""Small Gaussian priors."""

import torch
from tensors import randn

from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, Matern


def homogeneous(basis, channels=1):
    """The denoiser of a homogeneous field with a mean; a rougher field is its noise."""
    noise = GaussianField(basis, Matern(0.25, 0.5), channels)
    prior = GaussianField(basis, Matern(0.4, 1.5), channels)
    mean = noise.color(randn(channels, basis.size, seed=9))
    return GaussianDenoiser(mean, prior, noise)


def with_eofs(basis):
    """The denoiser of a field that is not homogeneous: four by four functions are correlated."""
    noise = GaussianField(basis, Matern(0.25, 0.5))
    index = torch.arange(basis.size)[(basis.indices < 4).all(1)]
    root = randn(16, 16, seed=2)
    falloff = 1 / (1 + basis.eigenvalues / 30)
    scale = falloff[index].sqrt()
    covariance = (root @ root.T / 16) * scale[:, None] * scale
    prior = EOFField.from_covariance(noise, covariance, index, falloff)
    return GaussianDenoiser(0.2, prior, noise)
