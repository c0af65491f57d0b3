# SPDX-License-Identifier: Apache-2.0
r"""Simulators that make training and test data: two-dimensional Kolmogorov flow.

The incompressible Navier-Stokes equation on a torus, driven by a sinusoidal body force and held
back by a linear drag, in vorticity form with :math:`\omega = \partial_x v - \partial_y u`:

.. math::
    \partial_t \omega + u \cdot \nabla \omega
        = \nu \nabla^2 \omega - \mu \omega - A \kappa \cos(\kappa y),
    \qquad \kappa = 2 \pi k_f / L .

The parameters' defaults are those of the Kolmogorov data of Rozet and Louppe, "Score-based Data
Assimilation" (2023, arXiv:2306.10574, section 4.2), except for the solver's resolution.

Space is pseudo-spectral with the 2/3 rule (Orszag, J. Atmos. Sci. 28, 1971). The advection
follows Basdevant (J. Comput. Phys. 50, 1983): with the velocity products :math:`uv` and
:math:`v^2 - u^2` it takes four real transforms, not five. Time is the classical fourth-order
Runge-Kutta scheme behind an integrating factor, so viscosity and drag are exact and set no limit
on the step.

Axes: ``B`` trajectories of a batch, ``N`` solver's points a side, ``H`` (= y) and ``W`` (= x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

# A linear mode exp(i w t) stays bounded under fourth-order Runge-Kutta while w dt <= 2 sqrt(2).
STABILITY_LIMIT = 2.0 * math.sqrt(2.0)

# Spectrum of the random initial state (waves a domain) and its root-mean-square velocity: the
# energy-carrying scales of the stationary flow, so that the spin-up is short.
INITIAL_PEAK = 3.0
INITIAL_SPEED = 1.5

_EPOCH = "2000-01-01"


@dataclass(frozen=True)
class KolmogorovFlow:
    """Two-dimensional forced turbulence on a torus, many trajectories at once.

    Fields are vorticity, shape ``(..., H, W)`` with ``H`` along y and ``W`` along x; points are
    cell centres. The force is ``forcing_amplitude * sin(2 pi forcing_wavenumber y / length)`` in
    the momentum along x. All quantities are non-dimensional.

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
        for name in ("reynolds", "length", "interval", "dt"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}={value} must be positive and finite")
        for name in ("forcing_amplitude", "drag", "spin_up"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value} must be finite and not negative")
        if self.resolution < 8 or self.resolution % 2:
            raise InputError(f"resolution={self.resolution} must be even and at least 8")
        if self.output_resolution < 1 or self.resolution % self.output_resolution:
            raise InputError(
                f"output_resolution={self.output_resolution} must divide "
                f"resolution={self.resolution}"
            )
        if not 1 <= self.forcing_wavenumber < self.resolution / 3:
            raise InputError(
                f"forcing_wavenumber={self.forcing_wavenumber} must lie in "
                f"[1, {self.resolution / 3:.1f}), the waves that resolution={self.resolution} keeps"
            )

    def initial(
        self,
        count: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw random isotropic vorticity with zero mean, most energetic at large scales.

        Args:
            count: Number of fields ``B``.
            generator: Source of randomness. The fields are drawn on its device, one after the
                other, in double precision: they depend neither on ``count`` nor on ``device``.
            device: Where to put the fields.
            dtype: Real floating-point type of the fields.

        Returns:
            Vorticity, ``(B, N, N)``.
        """
        n = self.resolution
        source = generator.device
        k = torch.sqrt(_wavenumbers(n, 2.0 * math.pi, source, torch.float64).square().sum(0))
        kept = _kept(n, source)
        # Energy of a mode ~ (k/p)^2 exp(-(k/p)^2); a ring holds ~ k modes, so E(k) peaks near p.
        energy = (k / INITIAL_PEAK).square() * torch.exp(-(k / INITIAL_PEAK).square()) * kept
        # Columns other than the first stand for two conjugate modes (the last one is never kept).
        modes = torch.full_like(energy, 2.0)
        modes[:, 0] = 1.0
        speed = math.sqrt(float((modes * energy).sum()))  # of white noise shaped by `energy`
        # Vorticity is |k| times speed, in the domain's own length.
        shape = torch.sqrt(energy) * k * (2.0 * math.pi / self.length) * INITIAL_SPEED / speed
        fields = []
        for _ in range(count):
            white = torch.randn(n, n, generator=generator, device=source, dtype=torch.float64)
            spectrum = torch.fft.rfft2(white, norm="ortho") * shape
            field = torch.fft.irfft2(spectrum, s=(n, n), norm="forward")
            fields.append(field.to(device=device, dtype=dtype))
        return torch.stack(fields) if fields else torch.empty(0, n, n, device=device, dtype=dtype)

    def advance(self, vorticity: Tensor, duration: float) -> Tensor:
        """Integrate fields over a time.

        Args:
            vorticity: Full-resolution vorticity, ``(B, N, N)``, float32 or float64. Its mean and
                the waves beyond the 2/3 rule are dropped.
            duration: Model time, positive.

        Returns:
            Vorticity after ``duration``, ``(B, N, N)``, on the same device in the same type.

        Raises:
            InputError: If the shape is wrong or the time step is unstable for these fields.
        """
        n = self.resolution
        if vorticity.ndim != 3 or tuple(vorticity.shape[1:]) != (n, n):
            raise InputError(
                f"vorticity has shape {tuple(vorticity.shape)}; expected (B, {n}, {n})"
            )
        if not duration > 0:
            raise InputError(f"duration={duration} must be positive")
        solver = _Solver(self, duration, vorticity.device, vorticity.dtype)
        return solver.to_grid(solver.run(solver.to_spectrum(vorticity)))

    def simulate(
        self,
        trajectories: int,
        frames: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """Simulate independent trajectories of the stationary flow.

        Args:
            trajectories: Number of trajectories.
            frames: Frames a trajectory, ``interval`` apart, the first after the spin-up.
            generator: Source of the initial states; see `initial`. The batch size changes the
                results only through round-off (which a chaotic flow amplifies).
            device: Where to compute.
            dtype: float32 or float64.
            batch: Trajectories computed together. At 128 x 128 and float32 one takes 0.6 MiB of
                working memory.
            progress: Called after each interval with the trajectory-intervals done and the total.

        Yields:
            Vorticity in main memory, ``(b, frames, output_resolution, output_resolution)``, with
            ``b <= batch``; ``trajectories`` in all.

        Raises:
            InputError: If a count is not positive, or the time step becomes unstable.
        """
        for name, value in (("trajectories", trajectories), ("frames", frames), ("batch", batch)):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        return self._batches(
            trajectories, frames, generator, torch.device(device), dtype, batch, progress
        )

    def _batches(
        self,
        trajectories: int,
        frames: int,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
        batch: int,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[Tensor]:
        """Body of `simulate`, apart from it so that bad arguments raise at the call."""
        solver = _Solver(self, self.interval, device, dtype)
        spin_up = math.ceil(self.spin_up / self.interval - 1e-9)
        intervals = spin_up + frames - 1
        m = self.output_resolution
        for start in range(0, trajectories, batch):
            count = min(batch, trajectories - start)
            fields = self.initial(count, generator=generator, device=device, dtype=dtype)
            spectrum = solver.to_spectrum(fields)
            output = torch.empty(count, frames, m, m, dtype=dtype)
            for index in range(intervals + 1):
                if index > 0:
                    spectrum = solver.run(spectrum)
                    if progress is not None:
                        progress(start * intervals + count * index, trajectories * intervals)
                if index >= spin_up:
                    output[:, index - spin_up] = self.pool(solver.to_grid(spectrum))
            yield output

    def pool(self, vorticity: Tensor) -> Tensor:
        """Average ``(..., N, N)`` over blocks, to the output's resolution ``(..., H, W)``."""
        m = self.output_resolution
        block = self.resolution // m
        return vorticity.unflatten(-1, (m, block)).unflatten(-3, (m, block)).mean((-3, -1))

    def to_dataset(self, vorticity: Tensor, *, seed: int | None = None) -> xr.Dataset:
        """Label simulated frames.

        The torus is addressed as everything else is, by ``lat`` (y) and ``lon`` (x), and has unit
        length: row ``j`` stands at ``j / H``, as in :class:`~ddo_modulus.grid.BoxGrid`, and rows
        ascend. A value is the mean over the ``j``-th block; where on the torus ``j = 0`` lies is
        arbitrary. One unit of model time is stored as one second from 2000-01-01.

        Args:
            vorticity: ``(trajectory, frame, H, W)``, as `simulate` yields them.
            seed: Seed of the generator, for the record.

        Returns:
            Dataset with float32 ``vorticity`` on ``(trajectory, time, lat, lon)``; its attributes
            hold the parameters.

        Raises:
            InputError: If the shape is wrong.
        """
        import numpy as np
        import xarray as xr

        m = self.output_resolution
        if vorticity.ndim != 4 or tuple(vorticity.shape[2:]) != (m, m):
            raise InputError(
                f"vorticity has shape {tuple(vorticity.shape)}; "
                f"expected (trajectories, frames, {m}, {m})"
            )
        trajectories, frames = vorticity.shape[:2]
        nanoseconds = np.round(np.arange(frames) * self.interval * 1e9).astype("timedelta64[ns]")
        nodes = np.arange(m) / m
        attrs: dict[str, object] = {"simulator": "kolmogorov", **asdict(self)}
        if seed is not None:
            attrs["seed"] = seed
        return xr.Dataset(
            {
                "vorticity": (
                    ("trajectory", "time", "lat", "lon"),
                    vorticity.detach().cpu().to(torch.float32).numpy(),
                    {"units": "1", "long_name": "vorticity"},
                )
            },
            coords={
                "trajectory": np.arange(trajectories),
                "time": (
                    "time",
                    np.datetime64(_EPOCH, "ns") + nanoseconds,
                    {"long_name": "model time, one unit as one second"},
                ),
                "lat": ("lat", nodes, {"units": "1", "long_name": "y"}),
                "lon": ("lon", nodes, {"units": "1", "long_name": "x"}),
            },
            attrs=attrs,
        )


class _Solver:
    """Operators of one flow for one device, type and duration; state is the half spectrum."""

    def __init__(
        self, flow: KolmogorovFlow, duration: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype={dtype} is not supported; use torch.float32 or torch.float64")
        self.n = flow.resolution
        self.steps = max(1, math.ceil(duration / flow.dt - 1e-9))
        self.dt = duration / self.steps
        self.dtype = dtype

        ky, kx = _wavenumbers(self.n, flow.length, device, torch.float64)
        kept = _kept(self.n, device)
        square = kx.square() + ky.square()
        self.k_max = float(kx[kept].max())
        # Stream function psi with u = psi_y, v = -psi_x and vorticity -laplacian(psi).
        psi = torch.where(kept & (square > 0), 1.0 / square, 0.0)
        complex_type = torch.complex64 if dtype == torch.float32 else torch.complex128
        self.kept = (kept & (square > 0)).to(dtype)
        self.velocity = torch.stack([1j * ky * psi, -1j * kx * psi])[:, None].to(complex_type)
        self.from_uv = ((kx.square() - ky.square()) * kept).to(dtype)
        self.from_squares = (kx * ky * kept).to(dtype)

        wave = 2.0 * math.pi * flow.forcing_wavenumber
        y = (torch.arange(self.n, dtype=torch.float64, device=device) + 0.5) / self.n
        curl = -flow.forcing_amplitude * wave / flow.length * torch.cos(wave * y)
        forcing = torch.fft.rfft2(curl[:, None].expand(self.n, self.n))
        self.forcing = (forcing * kept).to(complex_type)

        decay = -(square / flow.reynolds + flow.drag)
        self.half_decay = torch.exp(0.5 * self.dt * decay).to(dtype)

    def to_spectrum(self, vorticity: Tensor) -> Tensor:
        """Transform ``(B, N, N)`` to the half spectrum ``(B, N, N/2+1)``, dealiased."""
        return torch.fft.rfft2(vorticity) * self.kept

    def to_grid(self, spectrum: Tensor) -> Tensor:
        """Transform the half spectrum ``(B, N, N/2+1)`` to ``(B, N, N)``."""
        return torch.fft.irfft2(spectrum, s=(self.n, self.n))

    def run(self, w: Tensor) -> Tensor:
        """Take all steps of the duration; check stability before the first and after the last."""
        self._check(w)
        for _ in range(self.steps):
            w = self._step(w)
        self._check(w)
        return w

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
        speed = float((u.abs() + v.abs()).amax())
        limit = STABILITY_LIMIT / self.k_max
        if not speed * self.dt <= limit:  # also true for NaN
            advice = f"dt <= {limit / speed:.2g}" if math.isfinite(speed) else "a smaller dt"
            raise InputError(
                f"time step {self.dt:.3g} is unstable: |u| + |v| reaches {speed:.3g}, and "
                f"the scheme allows {limit / self.dt:.3g} at this step and resolution; use {advice}"
            )


def _wavenumbers(n: int, length: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Angular wavenumbers ``(2, n, n/2+1)`` of the half spectrum: along y, then along x."""
    ky = torch.fft.fftfreq(n, 1.0 / n, device=device, dtype=dtype)
    kx = torch.fft.rfftfreq(n, 1.0 / n, device=device, dtype=dtype)
    return torch.stack(torch.meshgrid(ky, kx, indexing="ij")) * (2.0 * math.pi / length)


def _kept(n: int, device: torch.device) -> Tensor:
    """Boolean mask ``(n, n/2+1)`` of the waves that quadratic products do not alias onto."""
    ky, kx = _wavenumbers(n, 2.0 * math.pi, device, torch.float64)
    return (kx.abs() < n / 3.0) & (ky.abs() < n / 3.0)
