# SPDX-License-Identifier: Apache-2.0
r"""The denoising loss, and the noise levels and noise that it is evaluated with.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid, ``N`` modes.

The loss is the squared error of the network's output in the coordinates of the linear part,

.. math:: \ell = \sum_k p_k \left(F_k - \frac{a^0_k - w_k a_k}{c_{out,k}}\right)^2, \qquad
    p_k \propto v_k^{1 - q}, \quad \sum_k p_k = 1,

with :math:`v` the posterior variance of the linear denoiser. The loss of the linear denoiser itself
is 1. With ``q = 1`` all modes have the same weight; with ``q = 0`` their weight is their variance,
as in the mean square error of the state.

Random numbers are functions of the seed, the step and the place in the global batch only. A run is
therefore the same on any number of ranks, with any number of micro-batches and after any number of
interruptions (up to the order of sums), and there is no random state to save.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.random import generator
from ddo_modulus.training.config import TrainerConfig

#: Places of a batch that share a generator. More would make each of many ranks draw numbers that
#: only others use; fewer would take more calls.
_BLOCK = 16


class DenoisingLoss(nn.Module):
    """Denoising loss of an operator, relative to its linear part.

    Args:
        operator: The operator.
        whitening: The ``q`` of the module's equation.
    """

    def __init__(self, operator: DiffusionOperator, whitening: float) -> None:
        super().__init__()
        self.operator, self.whitening = operator, whitening

    def forward(
        self,
        x0: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        z: Float[Tensor, "B N"],
        condition: Tensor | None = None,
        linear: GaussianDenoiser | None = None,
    ) -> Float[Tensor, " B"]:
        """Loss of each sample.

        Args:
            x0: Clean states.
            sigma: Noise levels.
            z: White noise, in the coordinates of the linear part.
            condition: As the operator takes it.
            linear: Linear part to use instead of the operator's own (cross-fitting).
        """
        linear = self.operator.linear if linear is None else linear
        with torch.autocast(x0.device.type, enabled=False):  # rounding would spoil the target
            a0 = linear.modes(x0 - self.operator.conditional_mean(condition, x0))
            a = a0 + sigma[:, None] * z
            variance = linear.posterior_variance(sigma)
            target = (a0 - a * linear.wiener_weight(sigma)) / variance.sqrt()
        shape = (x0.shape[-2], x0.shape[-1])
        output = self.operator.residual(a, sigma, shape, condition, linear)
        weight = variance ** (1 - self.whitening)
        return (weight * (output - target).square()).sum(1) / weight.sum(1)


def noise_levels(
    count: int, config: TrainerConfig, source: torch.Generator, device: torch.device
) -> Float[Tensor, " B"]:
    """Log-uniform noise levels, one in each of ``count`` equal strata, in ascending order."""
    share = torch.rand(count, generator=source, device=source.device)
    quantile = (torch.arange(count, device=share.device) + share) / count
    low, high = math.log(config.sigma_min), math.log(config.sigma_max)
    return (low + (high - low) * quantile).exp().to(device)


def white_noise(
    *key: int, batch: int, size: int, device: torch.device, rank: int = 0, ranks: int = 1
) -> Float[Tensor, "B N"]:
    """White noise of the places ``rank, rank + ranks, ...`` of a batch.

    The noise of a place does not depend on the number of ranks.

    Args:
        key: What the numbers follow from (:func:`ddo_modulus.random.generator`).
        batch: Places in the global batch.
        size: Numbers for each place.
        device: Where to draw.
        rank: First place.
        ranks: Distance between places.
    """
    parts = []
    for block in range(math.ceil(batch / _BLOCK)):
        low = block * _BLOCK
        first, end = (rank - low) % ranks, min(_BLOCK, batch - low)
        if first < end:
            source = generator(*key, block, device=device)
            rows = torch.randn(_BLOCK, size, generator=source, device=device)
            parts.append(rows[first:end:ranks])
    return torch.cat(parts)
