# SPDX-License-Identifier: Apache-2.0
"""Small packages."""

import torch

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.task import CoarseWindow, Task
from ddo_modulus.fields.grid import BoxGrid


def conditional(weights, *, mean=0.0, std=1.0, interval=3600.0):
    """An untrained package with a coarse view of several frames, on the torus.

    The mean of a state is the sum of the frames times ``weights``; the state is the middle one.
    """
    operator = DiffusionOperator(
        [8, 8],
        noise={"length_scale": 0.1, "smoothness": 0.5},
        condition_channels=len(weights),
        regression=True,
        network={"widths": [8], "depths": [1], "modes": [4]},
    )
    operator.set_regression(torch.tensor(weights)[None, :, None].expand_as(operator.regression))
    size = (1, 1, 1, 1)
    return Package(
        operator.eval().requires_grad_(False),
        BoxGrid((8, 8)),
        Normalization(("vorticity",), torch.full(size, mean), torch.full(size, std)),
        ("1/s",),
        PosteriorConfig(steps=6),
        Task(condition="coarse", coarse=CoarseWindow(2, len(weights) // 2)),
        interval=interval,
    )
