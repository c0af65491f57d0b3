# SPDX-License-Identifier: Apache-2.0
r"""The loss, and the random numbers that it takes.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid, ``N`` modes.

The loss is the squared error of the network's output in the coordinates of the linear part,

.. math:: \ell = \sum_k p_k \left(F_k - \frac{a^0_k - w_k a_k}{c_{out,k}}\right)^2, \qquad
    p_k \propto v_k^{1 - q}, \quad \sum_k p_k = 1,

with :math:`v` the posterior variance of the linear denoiser: 1 for the linear denoiser itself. With
``q = 1`` all modes count alike; with ``q = 0`` they count by their variance, as in the mean square
error of the state.

Every draw is a function of the seed, the step and the place in the global batch alone. A run is
therefore the same on any number of ranks, with any number of micro-batches and after any number of
interruptions (up to the order of sums), and has no random state to save.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.training.config import TrainerConfig

#: What draws are for; a part of their keys.
LEVELS, NOISE, VALIDATION, FIGURE = 1, 2, 3, 4

#: Places of a batch that one draw serves: few calls for one rank, and none of many ranks draws
#: more than this times its share.
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
            z: White noise; rotations leave its law alone, so it serves as coordinates directly.
            condition: As the operator takes it.
            linear: Linear part to use instead of the operator's own (cross-fitting).
        """
        linear = self.operator.linear if linear is None else linear
        with torch.autocast(
            x0.device.type, enabled=False
        ):  # states are exact, or the target is not
            a0 = linear.modes(x0 - self.operator.conditional_mean(condition, x0))
            a = a0 + sigma[:, None] * z
            variance = linear.posterior_variance(sigma)
            target = (a0 - a * linear.wiener_weight(sigma)) / variance.sqrt()
        shape = (x0.shape[-2], x0.shape[-1])
        output = self.operator.residual(a, sigma, shape, condition, linear)
        weight = variance ** (1 - self.whitening)
        return (weight * (output - target).square()).sum(1) / weight.sum(1)


def noise_levels(
    count: int, config: TrainerConfig, generator: torch.Generator, device: torch.device
) -> Float[Tensor, " B"]:
    """Log-uniform noise levels, one in each of ``count`` equal strata, in ascending order."""
    share = torch.rand(count, generator=generator, device=generator.device)
    quantile = (torch.arange(count, device=share.device) + share) / count
    low, high = math.log(config.sigma_min), math.log(config.sigma_max)
    return (low + (high - low) * quantile).exp().to(device)


def source(*key: int, device: torch.device) -> torch.Generator:
    """Random numbers that belong to a key, such as a seed, a purpose and a step."""
    # The hash of a tuple of integers does not change from process to process.
    return torch.Generator(device).manual_seed(hash(key) % 2**63)


def white_noise(
    *key: int, batch: int, size: int, device: torch.device, rank: int = 0, ranks: int = 1
) -> Float[Tensor, "B N"]:
    """White noise of the places ``rank, rank + ranks, ...`` of a batch, whoever else draws.

    Args:
        key: What the draw belongs to (:func:`source`).
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
            generator = source(*key, block, device=device)
            rows = torch.randn(_BLOCK, size, generator=generator, device=device)
            parts.append(rows[first:end:ranks])
    return torch.cat(parts)
