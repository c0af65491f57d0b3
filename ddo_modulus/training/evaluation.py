# SPDX-License-Identifier: Apache-2.0
"""How good an operator is: its loss on validation data, and samples to look at.

Axes: ``V`` validation states, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.plots import samples_figure
from ddo_modulus.random import Purpose, generator
from ddo_modulus.training.acceleration import autocast
from ddo_modulus.training.config import TrainerConfig
from ddo_modulus.training.distributed import total
from ddo_modulus.training.loss import DenoisingLoss, noise_levels, white_noise

Batch = tuple[Tensor, Tensor | None]

#: States validated at once. Fixed, so that the value does not depend on the ranks that share them.
_TOGETHER = 32

#: States in a figure, and noise levels of the sampler that draws them.
_DRAWN, _STEPS = 8, 16


@torch.no_grad()
def validation_loss(
    operator: DiffusionOperator,
    validation: Batch,
    config: TrainerConfig,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, float]:
    """Loss on validation data, mean and by decade of the noise level.

    Ranks share the work and all get the same numbers, which do not depend on the number of ranks.
    Each state has the same noise at every call, so that differences over time are the operator's.

    Args:
        operator: What to validate.
        validation: States ``(V, C, H, W)`` and their condition.
        config: Noise levels, precision and seed.
        rank: This process.
        ranks: Number of processes.
    """
    x0, condition = validation
    device, count = x0.device, len(x0)
    loss = DenoisingLoss(operator, config.whitening)
    source = generator(config.seed, Purpose.VALIDATION_ORDER)
    order = torch.randperm(count, generator=source).to(device)
    source = generator(config.seed, Purpose.VALIDATION_LEVELS, device=device)
    sigma = noise_levels(count, config, source, device)
    value = torch.zeros(count, dtype=torch.float64, device=device)
    for i in range(rank, math.ceil(count / _TOGETHER), ranks):
        inside = slice(i * _TOGETHER, min((i + 1) * _TOGETHER, count))
        chosen = order[inside]
        z = white_noise(
            *(config.seed, Purpose.VALIDATION_NOISE, i),
            batch=len(chosen),
            size=operator.prior_variance.numel(),
            device=device,
        )
        part = None if condition is None else condition[chosen]
        with autocast(config, device):
            value[inside] = loss(x0[chosen], sigma[inside], z, part).double()
    value, level = total(value).cpu(), sigma.log10().cpu()
    row = {"validation": float(value.mean())}
    for low in range(math.floor(math.log10(config.sigma_min)), 2):
        decade = (level >= low) & (level < low + 1)
        if decade.any():
            row[f"validation_1e{low}"] = float(value[decade].mean())
    return row


def draw_samples(
    operator: DiffusionOperator, validation: Batch, config: TrainerConfig, path: Path, title: str
) -> Path:
    """Draw unconditional samples beside true states, in normalised units.

    Args:
        operator: Where samples come from.
        validation: True states and, if the operator takes one, the condition of the samples.
        config: Noise levels, precision and seed.
        path: File to write.
        title: Heading.
    """
    truth = validation[0][:_DRAWN]
    condition = None if validation[1] is None else validation[1][:_DRAWN]
    with autocast(config, truth.device):
        drawn = sample(
            operator,
            FieldNoiseScheduler(operator.noise, config.sigma_min, config.sigma_max),
            len(truth),
            steps=_STEPS,
            generator=generator(config.seed, Purpose.FIGURE),
            condition=condition,
            device=truth.device,
        )
    basis = operator.basis
    fields = [x.double().cpu() for x in (truth, drawn)]
    powers = [basis.power(x).mean(0).numpy() for x in fields]
    return samples_figure(
        fields[0].numpy(),
        fields[1].numpy(),
        basis.shells()[0].numpy() / (2 * math.pi),
        (powers[0], powers[1]),
        title=title,
        path=path,
    )
