# SPDX-License-Identifier: Apache-2.0
r"""Kolmogorov flow: two-dimensional turbulence under a sinusoidal force and a linear drag.

The force :math:`A \sin(\kappa y)` along x, :math:`\kappa = 2 \pi k_f / L`, has the curl
:math:`-A \kappa \cos(\kappa y)`. The defaults are those of the Kolmogorov data of Rozet and
Louppe, "Score-based Data Assimilation" (2023, arXiv:2306.10574, section 4.2), except for the
solver's resolution.

Axes: ``N`` solver's points a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.simulators.torus import Terms, TorusFlow, kept_waves, wavenumbers

# Spectrum of the random initial state (waves a domain) and its root-mean-square velocity: the
# energy-carrying scales of the stationary flow, so that the spin-up is short.
INITIAL_PEAK = 3.0
INITIAL_SPEED = 1.5


@dataclass(frozen=True)
class KolmogorovFlow(TorusFlow):
    """Forced turbulence on a torus, many trajectories at once; see `TorusFlow`.

    The solver's points are cell centres; where on the torus ``j = 0`` lies is arbitrary.

    Attributes:
        reynolds: Inverse of the viscosity.
        forcing_wavenumber: Waves of the force over the domain.
        forcing_amplitude: Amplitude of the force; 0 for decaying turbulence.
        drag: Linear friction on the velocity, per unit of time.
        length: Side of the domain.
        resolution: Solver's points a side; even.
        output_resolution: Points a side of the output, a mean over blocks; divides ``resolution``.
        interval: Model time between frames.
        spin_up: Model time before the first frame, rounded up to whole intervals. With the other
            defaults, mean enstrophy falls from 20 to its stationary 10 within 10 units and mean
            energy stays near its stationary 1.0; 25 units are five decay times 1 / (2 drag).
        dt: Longest time step; the step used divides ``interval``. With the other defaults
            |u| + |v| peaks at 5 to 8, and 0.005 is stable up to 13.

    Raises:
        InputError: If a parameter is out of range.
    """

    name: ClassVar[str] = "kolmogorov"

    reynolds: float = 1000.0
    forcing_wavenumber: int = 4
    forcing_amplitude: float = 1.0
    drag: float = 0.1
    length: float = 2.0 * math.pi
    resolution: int = 128
    output_resolution: int = 64
    interval: float = 0.2
    spin_up: float = 25.0
    dt: float = 0.005

    def __post_init__(self) -> None:
        """Check the parameters' ranges."""
        self._check(
            positive=("reynolds", "length", "interval", "dt"),
            not_negative=("forcing_amplitude", "drag", "spin_up"),
            whole=("forcing_wavenumber",),
        )
        self._check_resolution()
        if not 1 <= self.forcing_wavenumber < self.resolution / 3:
            raise InputError(
                f"forcing_wavenumber={self.forcing_wavenumber} must lie in "
                f"[1, {self.resolution / 3:.1f}), the waves that resolution={self.resolution} keeps"
            )

    def terms(self, device: torch.device) -> Terms:
        """Friction and the curl of the sinusoidal force; see `TorusFlow.terms`."""
        n, wave = self.resolution, 2.0 * math.pi * self.forcing_wavenumber
        y = (torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n
        curl = -self.forcing_amplitude * wave / self.length * torch.cos(wave * y)
        return Terms(1.0 / self.reynolds, self.drag, curl[:, None].expand(n, n))

    def amplitudes(self, device: torch.device) -> Tensor:
        """Isotropic, most energetic at large scales; see `TorusFlow.amplitudes`."""
        n = self.resolution
        k = torch.sqrt(wavenumbers(n, 2.0 * math.pi, device).square().sum(0))
        # Energy of a mode ~ (k/p)^2 exp(-(k/p)^2); a ring holds ~ k modes, so E(k) peaks near p.
        energy = (k / INITIAL_PEAK).square() * torch.exp(-(k / INITIAL_PEAK).square())
        energy = energy * kept_waves(n, device)
        # Columns other than the first stand for two conjugate modes (the last one is never kept).
        modes = torch.full_like(energy, 2.0)
        modes[:, 0] = 1.0
        speed = math.sqrt(float((modes * energy).sum()))  # of white noise shaped by `energy`
        # Vorticity is |k| times speed, in the domain's own length.
        return torch.sqrt(energy) * k * (2.0 * math.pi / self.length) * INITIAL_SPEED / speed
