# SPDX-License-Identifier: Apache-2.0
r"""What the number of noise levels costs: the spread of draws beside that of the prior.

Axes: ``J`` sources of noise, ``K`` variances on a grid.

For the Gaussian part of a prior, a solver maps noise to a state mode by mode, and linearly. So the
variance that a sampler gives to a mode of variance :math:`s` is the sum of the squared responses to
the noise it starts from and to all noise it adds. No random number is needed.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.samplers import SOLVERS
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser

#: Errors of the spread up to this share are not worth a word.
TOLERANCE = 0.05

# Variances that responses are computed for; those between are interpolated.
_GRID = 96


def spread_ratio(linear: GaussianDenoiser, config: PosteriorConfig) -> float:
    """Spread of draws from the Gaussian part of a prior, over its true spread.

    Args:
        linear: Gaussian part, the same for all analyses.
        config: Resolved options of sampling.
    """
    true = linear.variance[0].double().cpu()
    grid = torch.logspace(
        float(true.min().log10()), float(true.max().log10()), _GRID, dtype=torch.float64
    )
    share = sampled_variance(grid, linear, config) / grid
    drawn = true * torch.from_numpy(np.interp(true.log(), grid.log(), share))
    weight = (linear.noise.basis.mean_square() * linear.noise.variance).flatten().double().cpu()
    if linear.rotation is not None:
        drawn, true = (linear.rotation.marginal(variance) for variance in (drawn, true))
    return float(((weight @ drawn) / (weight @ true)).sqrt())


def sampled_variance(
    variance: Float[Tensor, " K"], linear: GaussianDenoiser, config: PosteriorConfig
) -> Float[Tensor, " K"]:
    """Variances that a sampler gives to modes of a Gaussian prior.

    Args:
        variance: True variances, in units of the noise.
        linear: Gaussian part of a prior, for its noise.
        config: Resolved options of sampling.
    """
    scheduler = config.scheduler(linear.noise)
    levels = scheduler.timesteps(config.steps, dtype=torch.float64)
    sources = 1 + (config.solver == "dpmpp_2m_sde") * config.steps
    sources += (config.churn is not None) * config.steps
    used = 0

    def draw() -> Float[Tensor, "J K"]:
        """Noise of level one from a source that was not used before."""
        nonlocal used
        noise = torch.zeros(sources, len(variance), dtype=torch.float64)
        noise[used] = 1.0
        used += 1
        return noise

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return x * (variance / (variance + sigma[0] ** 2))

    x = levels[0] * draw()
    step = SOLVERS[config.solver](denoise, draw).step
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        start = now
        if config.churn is not None:
            start = config.churn.raised(now, config.steps)
            if start > now:
                x = x + (start**2 - now**2).sqrt() * config.churn.noise * draw()
        x = step(x, start.expand(sources), after.expand(sources))
    return x.square().sum(0)


def spread_note(linear: GaussianDenoiser, config: PosteriorConfig) -> str | None:
    """A line on what the schedule costs, with enough steps; None if it costs little.

    Args:
        linear: Gaussian part of a prior, the same for all analyses.
        config: Resolved options of sampling.
    """
    ratio = spread_ratio(linear, config)
    if abs(ratio - 1) <= TOLERANCE:
        return None
    line = f"steps={config.steps}: the spread of draws is {ratio:.2f} of the prior's"
    for steps in (8, 12, 16, 24, 32, 48, 64, 96, 128):
        more = PosteriorConfig(steps=steps).over(config)
        if steps > config.steps and abs(spread_ratio(linear, more) - 1) <= TOLERANCE:
            return f"{line}; take steps={steps} or more"
    return f"{line}; widen sigma_min and sigma_max, or take more steps"
