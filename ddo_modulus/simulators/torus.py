# SPDX-License-Identifier: Apache-2.0
r"""Two-dimensional incompressible flow on a torus, in vorticity form.

.. math::
    \partial_t \omega + u \cdot \nabla \omega = \nu \nabla^2 \omega - \mu \omega + f,
    \qquad \omega = \partial_x v - \partial_y u .

Space is pseudo-spectral with the 2/3 rule (Orszag, J. Atmos. Sci. 28, 1971). The advection
follows Basdevant (J. Comput. Phys. 50, 1983): with the velocity products :math:`uv` and
:math:`v^2 - u^2` it takes four real transforms, not five. Time is the classical fourth-order
Runge-Kutta scheme behind an integrating factor, so viscosity and drag are exact and set no limit
on the step.

Axes: ``B`` trajectories of a batch, ``N`` solver's points a side, ``H`` (= y) and ``W`` (= x).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.lexicon import CELL_MEANS
from ddo_modulus.simulators.simulator import (
    Integrator,
    Simulator,
    Variable,
    check_precision,
    check_step,
    steps_of,
)


class Terms(NamedTuple):
    """What distinguishes one flow's equation from another's.

    Attributes:
        viscosity: ``nu``.
        drag: ``mu``, linear friction per unit of time.
        forcing: ``f``, the curl of the body force at the solver's points, ``(N, N)``.
    """

    viscosity: float
    drag: float
    forcing: Tensor


class TorusFlow(Simulator):
    """Vorticity on a torus; a flow adds its forcing, its friction and its initial law.

    Fields are vorticity, shape ``(..., H, W)`` with ``H`` along y and ``W`` along x. All
    quantities are non-dimensional.

    Attributes:
        length: Side of the domain.
        resolution: Solver's points a side; even.
        output_resolution: Points a side of the output, a mean over blocks; divides ``resolution``.
    """

    length: float
    resolution: int
    output_resolution: int

    @abstractmethod
    def terms(self, device: torch.device) -> Terms:
        """Terms of the equation, the forcing in float64."""

    @abstractmethod
    def amplitudes(self, device: torch.device) -> Tensor:
        """Root-mean-square moduli of the initial Fourier coefficients, ``(N, N/2+1)``, float64.

        The coefficients are those of the half spectrum in ``sum_k c_k exp(i k x)``.
        """

    def initial(
        self,
        count: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw Gaussian vorticity, homogeneous and of zero mean; see `Simulator.initial`.

        Returns:
            Vorticity, ``(B, N, N)``.
        """
        n, source = self.resolution, generator.device
        amplitudes = self.amplitudes(source)
        fields = []
        for _ in range(count):
            white = torch.randn(n, n, generator=generator, device=source, dtype=torch.float64)
            spectrum = torch.fft.rfft2(white, norm="ortho") * amplitudes
            field = torch.fft.irfft2(spectrum, s=(n, n), norm="forward")
            fields.append(field.to(device=device, dtype=dtype))
        return torch.stack(fields) if fields else torch.empty(0, n, n, device=device, dtype=dtype)

    def integrator(self, duration: float, device: torch.device, dtype: torch.dtype) -> Integrator:
        """Build the solver; see `Simulator.integrator`."""
        return _Solver(self, duration, device, dtype)

    def pool(self, vorticity: Tensor) -> Tensor:
        """Average ``(..., N, N)`` over blocks, to the output's resolution ``(..., H, W)``."""
        m = self.output_resolution
        block = self.resolution // m
        return vorticity.unflatten(-1, (m, block)).unflatten(-3, (m, block)).mean((-3, -1))

    def variables_of(self, frames: Tensor) -> Mapping[str, Variable]:
        """Vorticity; see `Simulator.variables_of`."""
        m = self.output_resolution
        if frames.ndim != 4 or tuple(frames.shape[2:]) != (m, m):
            raise InputError(
                f"vorticity has shape {tuple(frames.shape)}; "
                f"expected (trajectories, frames, {m}, {m})"
            )
        methods = CELL_MEANS if m < self.resolution else ""
        return {"vorticity": Variable(frames, "1", "vorticity", methods)}

    def coordinates(self) -> Mapping[str, tuple[str, Any, dict[str, str]]]:
        """Places on a torus of unit length.

        The torus is addressed as everything else is, by ``lat`` (y) and ``lon`` (x): row ``j``
        stands at ``j / H``, as in :class:`.BoxGrid`, and rows ascend. A value is
        the mean over the ``j``-th block.
        """
        import numpy as np

        nodes = np.arange(self.output_resolution) / self.output_resolution
        return {
            "lat": ("lat", nodes, {"units": "1", "long_name": "y"}),
            "lon": ("lon", nodes, {"units": "1", "long_name": "x"}),
        }

    def _check_resolution(self) -> None:
        """Raise unless solver's and output's resolutions fit."""
        self._check(whole=("resolution", "output_resolution"))
        if self.resolution < 8 or self.resolution % 2:
            raise InputError(f"resolution={self.resolution} must be even and at least 8")
        if self.output_resolution < 1 or self.resolution % self.output_resolution:
            raise InputError(
                f"output_resolution={self.output_resolution} must divide "
                f"resolution={self.resolution}"
            )


class _Solver(Integrator):
    """Operators of one flow; the state is the half spectrum ``(B, N, N/2+1)``."""

    def __init__(
        self, flow: TorusFlow, duration: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        check_precision(dtype)
        self.n = flow.resolution
        self.pool = flow.pool
        self.steps = steps_of(duration, flow.dt)
        self.dt = duration / self.steps

        ky, kx = wavenumbers(self.n, flow.length, device)
        kept = kept_waves(self.n, device)
        square = kx.square() + ky.square()
        self.k_max = float(kx[kept].max())
        # Stream function psi with u = psi_y, v = -psi_x and vorticity -laplacian(psi).
        psi = torch.where(kept & (square > 0), 1.0 / square, 0.0)
        complex_type = torch.complex64 if dtype == torch.float32 else torch.complex128
        self.kept = (kept & (square > 0)).to(dtype)
        self.velocity = torch.stack([1j * ky * psi, -1j * kx * psi])[:, None].to(complex_type)
        self.from_uv = ((kx.square() - ky.square()) * kept).to(dtype)
        self.from_squares = (kx * ky * kept).to(dtype)

        terms = flow.terms(device)
        self.forcing = (torch.fft.rfft2(terms.forcing) * kept).to(complex_type)
        decay = -(square * terms.viscosity + terms.drag)
        self.half_decay = torch.exp(0.5 * self.dt * decay).to(dtype)

    def start(self, fields: Tensor) -> Tensor:
        """Transform vorticity ``(B, N, N)``; its mean and the waves beyond 2/3 are dropped."""
        if fields.ndim != 3 or tuple(fields.shape[1:]) != (self.n, self.n):
            raise InputError(
                f"vorticity has shape {tuple(fields.shape)}; expected (B, {self.n}, {self.n})"
            )
        return torch.fft.rfft2(fields) * self.kept

    def fields(self, state: Tensor) -> Tensor:
        """Transform the half spectrum to ``(B, N, N)``."""
        return torch.fft.irfft2(state, s=(self.n, self.n))

    def frame(self, state: Tensor) -> Tensor:
        """Block means of vorticity, ``(B, H, W)``."""
        return self.pool(self.fields(state))

    def _tendency(self, w: Tensor) -> Tensor:
        """Advection and forcing: two inverse and two forward transforms, in one call each."""
        u, v = torch.fft.irfft2(self.velocity * w, s=(self.n, self.n))
        flux = torch.fft.rfft2(torch.stack([u * v, (v - u) * (v + u)]))
        return torch.addcmul(self.forcing, flux[0], self.from_uv).addcmul_(
            flux[1], self.from_squares
        )

    def _step(self, w: Tensor) -> Tensor:
        """One Runge-Kutta step in the variable exp(-decay t) w (integrating factor)."""
        dt, half = self.dt, self.half_decay
        w_half = w * half
        k1 = self._tendency(w).mul_(half)
        k2 = self._tendency(torch.add(w_half, k1, alpha=0.5 * dt))
        k3 = self._tendency(torch.add(w_half, k2, alpha=0.5 * dt))
        k23 = k2.add_(k3)
        k4 = self._tendency(torch.add(w_half, k3, alpha=dt).mul_(half))
        # (k1 + 2 k2 + 2 k3) still lack a half-step's decay; k4 is at the end of the step.
        k1.add_(k23, alpha=2.0)
        return w_half.add_(k1, alpha=dt / 6.0).mul_(half).add_(k4, alpha=dt / 6.0)

    def _check(self, w: Tensor) -> None:
        """Raise if the fastest advected wave leaves the scheme's stability region."""
        u, v = torch.fft.irfft2(self.velocity * w, s=(self.n, self.n))
        check_step(self.dt, float((u.abs() + v.abs()).amax()), self.k_max, "|u| + |v|")


def wavenumbers(n: int, length: float, device: torch.device) -> Tensor:
    """Angular wavenumbers ``(2, n, n/2+1)`` of the half spectrum: along y, then along x."""
    ky = torch.fft.fftfreq(n, 1.0 / n, device=device, dtype=torch.float64)
    kx = torch.fft.rfftfreq(n, 1.0 / n, device=device, dtype=torch.float64)
    return torch.stack(torch.meshgrid(ky, kx, indexing="ij")) * (2.0 * math.pi / length)


def kept_waves(n: int, device: torch.device) -> Tensor:
    """Boolean mask ``(n, n/2+1)`` of the waves that quadratic products do not alias onto."""
    ky, kx = wavenumbers(n, 2.0 * math.pi, device)
    return (kx.abs() < n / 3.0) & (ky.abs() < n / 3.0)
