# SPDX-License-Identifier: Apache-2.0
"""Time integration of the shallow-water equations with torch-harmonics' operators.

Axes: ``B`` trajectories of a batch, ``L M`` degrees and orders, ``N`` Gaussian latitudes, ``H W``
output's latitudes and longitudes. The first axis of a state holds geopotential, vorticity and
divergence, of a wind its eastward and northward component.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.simulators.simulator import (
    Integrator,
    check_precision,
    check_step,
    steps_of,
)

try:
    from torch_harmonics import InverseRealSHT, InverseRealVectorSHT
    from torch_harmonics.examples.shallow_water_equations import ShallowWaterSolver
except ImportError as error:  # also where it was built for another torch
    raise InputError(
        "shallow water needs torch-harmonics, built for the torch that is installed "
        f"({error}): pip install 'ddo-modulus[sphere]'"
    ) from error

if TYPE_CHECKING:
    from ddo_modulus.simulators.shallow_water import ShallowWater


class _BatchedSolver(ShallowWaterSolver):
    """The library's solver for states ``(3, B, L, M)``: its vector transforms want ``(B, 2, ...)``.

    Everything else in it works component by component.
    """

    def vrtdivspec(self, ugrid: Tensor) -> Tensor:
        """Coefficients ``(2, B, L, M)`` of a vector field's vorticity and divergence."""
        return super().vrtdivspec(ugrid.transpose(0, 1)).transpose(0, 1)

    def getuv(self, vrtdivspec: Tensor) -> Tensor:
        """Wind ``(2, B, N, 2N)`` of the coefficients of vorticity and divergence."""
        return super().getuv(vrtdivspec.transpose(0, 1)).transpose(0, 1)


class ShallowWaterIntegrator(Integrator):
    """The equations for one stretch of time; the state is ``(3, B, L, M)``, complex."""

    def __init__(
        self, flow: ShallowWater, duration: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        check_precision(dtype)
        self.flow = flow
        self.steps = steps_of(duration, flow.dt)
        self.dt = duration / self.steps
        self.size = flow.truncation + 1
        # A product of two fields has twice their degree; its projection takes degree 3 truncation.
        rows = 2 * math.ceil((3 * flow.truncation + 1) / 4)
        self.solver = _BatchedSolver(
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

    def run(self, state: Tensor) -> Tensor:
        """Take all steps; check stability before the first and after the last."""
        self._check(state)
        for _ in range(self.steps):
            state = self._step(state)
        self._check(state)
        return state

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
