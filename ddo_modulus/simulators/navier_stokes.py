# SPDX-License-Identifier: Apache-2.0
r"""Decaying and forced Navier-Stokes flow of the operator-learning benchmarks.

Vorticity on the unit torus with the forcing :math:`a (\sin 2\pi(x+y) + \cos 2\pi(x+y))` from a
Gaussian random field: Li et al., "Fourier Neural Operator" (2021, arXiv:2010.08895, section 5.3);
with the viscosity :math:`10^{-3}` and the time 1 also Huang et al., "DiffusionPDE" (2024,
arXiv:2406.17763), and Yao et al., "Guided Diffusion Sampling on Function Spaces" (2025,
arXiv:2505.17004). Two frames are the pairs of initial and final vorticity used there.

The initial law is the one of the data sets, with coefficients in :math:`\sum_k c_k e^{2\pi i k x}`
of the variance :math:`2 \tau^{2(\alpha-1)} (4\pi^2|k|^2 + \tau^2)^{-\alpha}` and no mean: a Matern
field. Their code draws independent real and imaginary parts and keeps the real part of the field:
hence the 2, which the papers' :math:`\mathcal N(0, 7^{3/2}(-\Delta + 49 I)^{-5/2})` lacks.

Axes: ``N`` solver's points a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddo_modulus.simulators.torus import Terms, TorusFlow, kept_waves, wavenumbers


@dataclass(frozen=True)
class NavierStokes(TorusFlow):
    """Vorticity from a Gaussian random field under a fixed force; see `TorusFlow`.

    Values stand at the points ``j / H`` of the unit torus, as the coordinates say (block means
    around them if the output is coarser than the solver).

    Attributes:
        viscosity: Kinematic viscosity.
        forcing_amplitude: Amplitude ``a`` of the force on the vorticity.
        alpha: Smoothness of the initial law.
        tau: Inverse length scale of the initial law.
        resolution: Solver's points a side; even.
        output_resolution: Points a side of the output, a mean over blocks; divides ``resolution``.
        interval: Model time between frames.
        spin_up: Model time before the first frame; 0 keeps the initial field as the first one.
        dt: Longest time step; the step used divides ``interval``. With the other defaults
            |u| + |v| peaks at 0.05 to 0.15, and 0.01 is stable up to 1.07.

    Raises:
        InputError: If a parameter is out of range.
    """

    name: ClassVar[str] = "navier_stokes"
    length: ClassVar[float] = 1.0  # type: ignore[misc]  # fixed here, a parameter elsewhere

    viscosity: float = 1e-3
    forcing_amplitude: float = 0.1
    alpha: float = 2.5
    tau: float = 7.0
    resolution: int = 128
    output_resolution: int = 128
    interval: float = 1.0
    spin_up: float = 0.0
    dt: float = 0.01

    def __post_init__(self) -> None:
        """Check the parameters' ranges."""
        self._check(
            positive=("viscosity", "tau", "interval", "dt"),
            not_negative=("forcing_amplitude", "alpha", "spin_up"),
        )
        self._check_resolution()

    def terms(self, device: torch.device) -> Terms:
        """Viscosity and the diagonal wave of the forcing; see `TorusFlow.terms`."""
        block = self.resolution // self.output_resolution
        # A block's mean stands where its first one is labelled, at 0: half a block to the left.
        point = torch.arange(self.resolution, dtype=torch.float64, device=device)
        x = (point - 0.5 * (block - 1)) / self.resolution
        phase = 2.0 * math.pi * (x[:, None] + x)
        forcing = self.forcing_amplitude * (torch.sin(phase) + torch.cos(phase))
        return Terms(self.viscosity, 0.0, forcing)

    def amplitudes(self, device: torch.device) -> Tensor:
        """Matern spectrum without the mean; see the module and `TorusFlow.amplitudes`."""
        n = self.resolution
        square = wavenumbers(n, self.length, device).square().sum(0)
        scale = math.sqrt(2.0) * self.tau ** (self.alpha - 1.0)
        amplitude = scale * (square + self.tau**2) ** (-0.5 * self.alpha)
        return amplitude * (kept_waves(n, device) & (square > 0))
