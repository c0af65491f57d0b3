# SPDX-License-Identifier: Apache-2.0
r"""Shallow water on a rotating sphere.

.. math::
    \partial_t \zeta + \nabla \cdot ((\zeta + f) u) = 0, \quad
    \partial_t \delta - k \cdot \nabla \times ((\zeta + f) u)
        = -\nabla^2 (\Phi + \tfrac12 |u|^2), \quad
    \partial_t \Phi + \nabla \cdot (\Phi u) = 0

with vorticity :math:`\zeta`, divergence :math:`\delta`, geopotential :math:`\Phi = g h` and the
Coriolis parameter :math:`f = 2 \Omega \sin\varphi`. Transforms, tendencies and the weak
hyperdiffusion of vorticity and divergence (order 8, two hours at the smallest scale) are
`torch_harmonics.examples`' solver's (Bonev et al. 2023, arXiv:2306.03838), on a Gaussian
grid large enough that quadratic products are not aliased. Time is the classical fourth-order
Runge-Kutta scheme, which needs no start-up steps: the solver's Adams-Bashforth scheme takes two of
lower order at each call.

Axes: ``B`` trajectories of a batch, ``L M`` degrees and orders, ``H W`` output's latitudes and
longitudes. Fields are complex coefficients of geopotential, vorticity and divergence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.errors import InputError
from ddo_modulus.simulators.simulator import Simulator, Variable

if TYPE_CHECKING:
    from ddo_modulus.simulators.sphere import ShallowWaterIntegrator

# Units and names of what frames may hold.
_VARIABLES = {
    "height": ("m", "height of the fluid"),
    "u": ("m/s", "eastward wind"),
    "v": ("m/s", "northward wind"),
    "vorticity": ("1/s", "relative vorticity"),
    "divergence": ("1/s", "divergence"),
}


@dataclass(frozen=True)
class ShallowWater(Simulator):
    """Freely evolving flow on an Earth-like sphere, many trajectories at once; SI units.

    Initial winds are a random rotational flow, isotropic, most energetic near one degree; the
    height balances them so that the divergence does not change at first (the nonlinear balance
    equation), which keeps gravity waves small.

    Attributes:
        variables: What frames hold, in this order: of height (m), u, v (m/s), vorticity and
            divergence (1/s).
        shape: Latitudes and longitudes of the output: with the poles if the former are odd, at
            cell centres if even, from north to south.
        truncation: Largest degree of the spherical harmonics.
        wind: Root-mean-square initial wind, m/s.
        peak: Degree at which the initial winds are most energetic.
        depth: Mean height of the fluid, m.
        radius: Radius of the sphere, m.
        rotation: Angular velocity of the sphere, rad/s.
        gravity: Acceleration of gravity, m/s2.
        interval: Model time between frames, s.
        spin_up: Model time before the first frame, s, rounded up to whole intervals. In four days
            the smooth random start has drawn out filaments down to the truncation.
        dt: Longest time step, s; the step used divides ``interval``. With the other defaults
            gravity waves and wind reach 400 m/s, and 450 s is stable up to 630.

    Raises:
        InputError: If a parameter is out of range.
    """

    name: ClassVar[str] = "shallow_water"

    variables: Sequence[str] = ("height", "u", "v")
    shape: Sequence[int] = (64, 128)
    truncation: int = 63
    wind: float = 20.0
    peak: float = 8.0
    depth: float = 10000.0
    radius: float = 1e3 * EARTH_RADIUS_KM
    rotation: float = 7.292e-5
    gravity: float = 9.80616
    interval: float = 21600.0
    spin_up: float = 345600.0
    dt: float = 450.0

    def __post_init__(self) -> None:
        """Check the parameters' ranges."""
        object.__setattr__(self, "variables", list(self.variables))  # as stored attributes are
        object.__setattr__(self, "shape", list(self.shape))
        self._check(
            positive=("peak", "depth", "radius", "gravity", "interval", "dt"),
            not_negative=("wind", "rotation", "spin_up"),
            whole=("truncation",),
        )
        if self.truncation < 4:
            raise InputError(f"truncation={self.truncation} must be at least 4")
        unknown = [name for name in self.variables if name not in _VARIABLES]
        if unknown or not self.variables or len(set(self.variables)) < len(self.variables):
            raise InputError(
                f"variables={self.variables}: choose from {', '.join(_VARIABLES)}, each once"
            )
        sizes = [n for n in self.shape if isinstance(n, int) and not isinstance(n, bool)]
        least = (self.truncation + 1, 2 * self.truncation + 1)
        if len(sizes) != 2 or len(self.shape) != 2 or any(map(int.__lt__, sizes, least)):
            raise InputError(
                f"shape={self.shape} must be [latitudes, longitudes], at least {list(least)} for "
                f"truncation={self.truncation}"
            )

    def initial(
        self,
        count: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw balanced rotational flow; see the class and `Simulator.initial`.

        Returns:
            Coefficients of geopotential, vorticity and divergence, ``(B, 3, L, M)``, complex.
        """
        source, size = generator.device, self.truncation + 1
        vorticity = torch.zeros(count, size, size, dtype=torch.complex128)
        deviation = self._vorticity_deviation()
        for field in vorticity:
            white = torch.randn(
                2, size, size, generator=generator, device=source, dtype=torch.float64
            ).cpu()
            # Orders other than 0 stand for two conjugate ones: half the variance in each part.
            field.copy_(torch.complex(white[0], white[1]).mul_(math.sqrt(0.5)))
            field[:, 0] = white[0, :, 0]
            field.mul_(deviation[:, None]).tril_()
        integrator = self.integrator(self.dt, torch.device("cpu"), torch.float64)
        complex_type = torch.complex64 if dtype == torch.float32 else torch.complex128
        return integrator.balanced(vorticity).to(device=device, dtype=complex_type)

    def _vorticity_deviation(self) -> Tensor:
        """Standard deviation of the initial vorticity's coefficients by degree, ``(L,)``."""
        degree = torch.arange(self.truncation + 1, dtype=torch.float64)
        ratio = (degree / self.peak).square()
        # Energy of a mode ~ (l/p)^2 exp(-(l/p)^2); a degree holds ~ l modes.
        energy = ratio * torch.exp(-ratio)
        mean_square = float(((2.0 * degree + 1.0) / (4.0 * math.pi) * energy).sum())
        speed = torch.sqrt(energy / mean_square) * self.wind
        return speed * torch.sqrt(degree * (degree + 1.0)) / self.radius

    def integrator(
        self, duration: float, device: torch.device, dtype: torch.dtype
    ) -> ShallowWaterIntegrator:
        """Build the solver; see `Simulator.integrator`."""
        from ddo_modulus.simulators.sphere import ShallowWaterIntegrator

        return ShallowWaterIntegrator(self, duration, device, dtype)

    def variables_of(self, frames: Tensor) -> Mapping[str, Variable]:
        """The variables, in their order; see `Simulator.variables_of`."""
        expected = (len(self.variables), *self.shape)
        if frames.ndim != 5 or tuple(frames.shape[2:]) != expected:
            raise InputError(
                f"frames have shape {tuple(frames.shape)}; expected (trajectories, frames, "
                f"{', '.join(map(str, expected))})"
            )
        return {
            name: Variable(frames[:, :, i], *_VARIABLES[name])
            for i, name in enumerate(self.variables)
        }

    def coordinates(self) -> Mapping[str, tuple[str, Any, dict[str, str]]]:
        """Degrees north, descending, and east, from 0."""
        import numpy as np

        rows, columns = self.shape
        if rows % 2:
            lat = np.linspace(90.0, -90.0, rows)
        else:
            lat = 90.0 - (np.arange(rows) + 0.5) * 180.0 / rows
        lon = np.arange(columns) * 360.0 / columns
        return {
            "lat": ("lat", lat, {"units": "degrees_north", "long_name": "latitude"}),
            "lon": ("lon", lon, {"units": "degrees_east", "long_name": "longitude"}),
        }
