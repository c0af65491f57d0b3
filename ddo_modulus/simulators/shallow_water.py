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
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.errors import InputError
from ddo_modulus.simulators.simulator import (
    Integrator,
    Simulator,
    Variable,
    check_precision,
    check_step,
    steps_of,
)

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


class ShallowWaterIntegrator(Integrator):
    """The equations for one stretch of time; the state is ``(3, B, L, M)``, complex."""

    def __init__(
        self, flow: ShallowWater, duration: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        from ddo_modulus.simulators.sphere import (
            BatchedSolver,
            InverseRealSHT,
            InverseRealVectorSHT,
        )

        check_precision(dtype)
        self.flow = flow
        self.steps = steps_of(duration, flow.dt)
        self.dt = duration / self.steps
        self.size = flow.truncation + 1
        # A product of two fields has twice their degree; its projection takes degree 3 truncation.
        rows = 2 * math.ceil((3 * flow.truncation + 1) / 4)
        self.solver = BatchedSolver(
            rows,
            2 * rows,
            self.dt,
            lmax=self.size,
            mmax=self.size,
            grid="legendre-gauss",
            radius=flow.radius,
            omega=flow.rotation,
            gravity=flow.gravity,
            havg=flow.depth,
        ).to(device=device, dtype=dtype)
        # Equiangular grids have rows at the poles; every second one of a finer grid has not.
        height, width = flow.shape
        fine = height if height % 2 else 2 * height + 1
        self.rows = slice(None) if height % 2 else slice(1, None, 2)
        self.scalar, self.vector = (
            transform(
                fine, width, lmax=self.size, mmax=self.size, grid="equiangular", csphase=False
            ).to(device=device, dtype=dtype)
            for transform in (InverseRealSHT, InverseRealVectorSHT)
        )

    def start(self, fields: Tensor) -> Tensor:
        """Put the variables first."""
        expected = (3, self.size, self.size)
        if fields.ndim != 4 or tuple(fields.shape[1:]) != expected:
            raise InputError(
                f"coefficients have shape {tuple(fields.shape)}; expected (B, 3, {self.size}, "
                f"{self.size})"
            )
        return fields.transpose(0, 1)

    def fields(self, state: Tensor) -> Tensor:
        """Put the trajectories first."""
        return state.transpose(0, 1)

    def balanced(self, vorticity: Tensor) -> Tensor:
        """Rotational flow with the geopotential that leaves the divergence as it is, zero.

        Args:
            vorticity: Coefficients, ``(B, L, M)``.

        Returns:
            Coefficients of all variables, ``(B, 3, L, M)``.
        """
        state = torch.zeros(3, *vorticity.shape, dtype=vorticity.dtype, device=vorticity.device)
        # The mean of a field is its first coefficient over sqrt(4 pi).
        state[0, :, 0, 0] = math.sqrt(4.0 * math.pi) * self.flow.gravity * self.flow.depth
        state[1] = vorticity
        # The divergence's tendency is linear in the geopotential: - laplacian(geopotential).
        state[0] += self.solver.invlap * self.solver.dudtspec(state)[2]
        return self.fields(state)

    def frame(self, state: Tensor) -> Tensor:
        """The variables of the flow on the output's grid, ``(B, C, H, W)``."""
        fields: dict[str, Tensor] = {}
        names = self.flow.variables
        if "height" in names:
            fields["height"] = self.scalar(state[0]) / self.flow.gravity
        if {"u", "v"} & set(names):
            potentials = (self.solver.invlap * state[1:] / self.flow.radius).transpose(0, 1)
            fields["u"], fields["v"] = self.vector(potentials).unbind(1)
        for i, name in ((1, "vorticity"), (2, "divergence")):
            if name in names:
                fields[name] = self.scalar(state[i])
        return torch.stack([fields[name][:, self.rows] for name in names], 1)

    def _step(self, state: Tensor) -> Tensor:
        """One Runge-Kutta step, then the hyperdiffusion of vorticity and divergence."""
        dt, tendency = self.dt, self.solver.dudtspec
        k1 = tendency(state)
        k2 = tendency(state + 0.5 * dt * k1)
        k3 = tendency(state + 0.5 * dt * k2)
        k4 = tendency(state + dt * k3)
        state = state + dt / 6.0 * (k1 + 2.0 * (k2 + k3) + k4)
        state[1:] *= self.solver.hyperdiff
        return state

    def _check(self, state: Tensor) -> None:
        """Raise if the layer runs dry, or the fastest gravity wave is too fast for the step."""
        geopotential = self.solver.spec2grid(state[0])
        least = float(geopotential.amin())
        if least <= 0.0:
            raise InputError(
                f"the height falls to {least / self.flow.gravity:.3g} m; use a larger depth or "
                "less wind"
            )
        wind = torch.linalg.vector_norm(self.solver.getuv(state[1:]), dim=0)
        speed = float(wind.amax() + geopotential.amax().sqrt())
        degree = math.sqrt(self.flow.truncation * (self.flow.truncation + 1.0))
        check_step(self.dt, speed, degree / self.flow.radius, "|u| + sqrt(g h)")
