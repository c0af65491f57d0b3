# SPDX-License-Identifier: Apache-2.0
"""How far two sets of one law are apart: the truth, resampled.

Any finite set of generated fields differs from any finite set of true ones, even of the same law.
How far is measured on the truth: a pair of independent bootstrap resamplings of it, one as large
as the set of samples and one as large as the truth, is at the distance that perfect samples would
have.

What is drawn is what may be taken as independent. The second of a pair is made of whole
trajectories (of twenty blocks of frames, anywhere in it, if there is one long record). The first
imitates the samples: stretches of trajectories as long as theirs, single frames if each sample
stands for itself.

Axes: ``R`` resamplings, ``N`` true fields, trajectory by trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

#: Blocks that one long record is resampled in.
BLOCKS = 20


@dataclass(frozen=True)
class Resampling:
    """Weights of the true fields in pairs of resamplings; each row sums to one.

    Attributes:
        samples: ``(R, N)``, of sets that stand for the samples.
        truth: ``(R, N)``, of sets that stand for the truth.
    """

    samples: Float[Tensor, "R N"]
    truth: Float[Tensor, "R N"]


def resample(
    truth: tuple[int, int],
    samples: tuple[int, int],
    resamples: int,
    generator: torch.Generator,
) -> Resampling:
    """Draw pairs of resamplings.

    Args:
        truth: Number of true trajectories and of frames in each; single fields have one frame.
        samples: The same of the samples.
        resamples: Number of pairs ``R``.
        generator: Source of randomness.
    """
    runs, frames = truth
    block = frames if runs > 1 else max(1, frames // BLOCKS)
    length = min(frames, samples[1])
    sizes = ((samples[0] * samples[1], length), (runs * frames, block))
    sets = [
        torch.stack(
            [_stretches(runs, frames, size, part, generator).flatten() for _ in range(resamples)]
        )
        for size, part in sizes
    ]
    weights = [
        torch.zeros(resamples, runs * frames, dtype=torch.float64).scatter_add_(
            1, index, torch.full(index.shape, 1.0 / index.shape[1], dtype=torch.float64)
        )
        for index in sets
    ]
    return Resampling(*weights)


def resample_in_order(
    frames: Float[Tensor, "M T"],
    samples: tuple[int, int],
    resamples: int,
    generator: torch.Generator,
) -> Float[Tensor, "R M2 T2"]:
    """Trajectories of a number of each frame, strung together from the truth's.

    Each piece is a true trajectory turned to begin at any of its frames: the law is taken to be
    stationary, so that no frame's index means anything.

    Args:
        frames: The number of each frame of the true trajectories.
        samples: Number of trajectories to make, and their frames.
        resamples: How many times.
        generator: Source of randomness.
    """
    runs, length = frames.shape
    count, wanted = samples
    pieces = -(-wanted // length)
    size = (resamples, count, pieces)
    run = torch.randint(runs, size, generator=generator)
    start = torch.randint(length, size, generator=generator)
    place = (start[..., None] + torch.arange(length)) % length
    return frames[run[..., None], place].flatten(2)[..., :wanted]


def _stretches(
    runs: int, frames: int, size: int, length: int, generator: torch.Generator
) -> Tensor:
    """Flat indices of stretches drawn from trajectories, about ``size`` of them in all."""
    count = max(1, round(size / length))
    run = torch.randint(runs, (count,), generator=generator)
    start = torch.randint(frames - length + 1, (count,), generator=generator)
    return (run * frames + start)[:, None] + torch.arange(length)
