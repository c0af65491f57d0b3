# SPDX-License-Identifier: Apache-2.0
"""What all simulators share: many trajectories at once, frame by frame, with labels.

A simulator is a frozen dataclass of its parameters. It draws initial states, gives an integrator
for a stretch of time, and says what the frames of a trajectory hold.

Axes: ``B`` trajectories of a batch, ``H W`` output's grid; ``...`` is of the simulator.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

# A linear mode exp(i w t) stays bounded under fourth-order Runge-Kutta while w dt <= 2 sqrt(2).
STABILITY_LIMIT = 2.0 * math.sqrt(2.0)

_EPOCH = "2000-01-01"


class Variable(NamedTuple):
    """One variable of simulated frames.

    Attributes:
        values: ``(trajectory, frame, H, W)``.
        units: Units; ``"1"`` for none.
        long_name: Name in words.
        cell_methods: How values stand for their cells, in words of the CF convention; empty for
            values at points.
    """

    values: Tensor
    units: str
    long_name: str
    cell_methods: str = ""


class Integrator(ABC):
    """An equation of motion for one stretch of time, device and type.

    It works on a state of its own kind (as spectral coefficients), which `start` makes.

    Attributes:
        steps: Time steps in the stretch.
    """

    steps: int

    @abstractmethod
    def start(self, fields: Tensor) -> Tensor:
        """Turn fields ``(B, ...)``, as `Simulator.initial` draws them, into a state."""

    def run(self, state: Tensor) -> Tensor:
        """Integrate a state over the stretch of time; stability is checked at both ends.

        Raises:
            InputError: If the time step is unstable for this state, or the state is not finite.
        """
        self._check(state)
        for _ in range(self.steps):
            state = self._step(state)
        self._check(state)
        return state

    @abstractmethod
    def _step(self, state: Tensor) -> Tensor:
        """The state one time step later."""

    @abstractmethod
    def _check(self, state: Tensor) -> None:
        """Raise unless the time step is stable for a state."""

    @abstractmethod
    def fields(self, state: Tensor) -> Tensor:
        """Turn a state back into fields ``(B, ...)``."""

    @abstractmethod
    def frame(self, state: Tensor) -> Tensor:
        """What of a state is kept: ``(B, ..., H, W)``."""


class Simulator(ABC):
    """A source of independent trajectories.

    Attributes:
        name: Name under which data are labelled.
        interval: Model time between frames.
        spin_up: Model time before the first frame, rounded up to whole intervals.
        dt: Longest time step; the step used divides ``interval``.
    """

    name: ClassVar[str]
    interval: float
    spin_up: float
    dt: float

    @abstractmethod
    def initial(
        self,
        count: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw random initial fields.

        Args:
            count: Number of trajectories ``B``.
            generator: Source of randomness. The fields are drawn on its device, one after the
                other, in double precision: they depend neither on ``count`` nor on ``device``.
            device: Where to put the fields.
            dtype: Real floating-point type of the fields.

        Returns:
            Fields ``(B, ...)``.
        """

    @abstractmethod
    def integrator(self, duration: float, device: torch.device, dtype: torch.dtype) -> Integrator:
        """Build what integrates over a time.

        Raises:
            InputError: If the type is neither float32 nor float64.
        """

    @abstractmethod
    def variables_of(self, frames: Tensor) -> Mapping[str, Variable]:
        """Name what simulated frames ``(trajectory, frame, ..., H, W)`` hold.

        Raises:
            InputError: If the shape is wrong.
        """

    @abstractmethod
    def coordinates(self) -> Mapping[str, tuple[str, Any, dict[str, str]]]:
        """``lat`` and ``lon`` of the frames, as xarray takes them."""

    def advance(self, fields: Tensor, duration: float) -> Tensor:
        """Integrate fields over a time.

        Args:
            fields: ``(B, ...)``, as `initial` draws them; float32 or float64, or the complex
                types of the same precision.
            duration: Model time, positive.

        Returns:
            Fields after ``duration``, of the same shape and type on the same device.

        Raises:
            InputError: If the shape is wrong or the time step is unstable for these fields.
        """
        if not duration > 0:
            raise InputError(f"duration={duration} must be positive")
        integrator = self.integrator(duration, fields.device, fields.real.dtype)
        return integrator.fields(integrator.run(integrator.start(fields)))

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
        """Simulate independent trajectories.

        Args:
            trajectories: Number of trajectories.
            frames: Frames a trajectory, ``interval`` apart, the first after the spin-up.
            generator: Source of the initial fields; see `initial`. The batch size changes the
                results only through round-off (which a chaotic flow amplifies).
            device: Where to compute.
            dtype: float32 or float64.
            batch: Trajectories computed together; memory grows with it, not with the number of
                trajectories.
            progress: Called after each interval with the trajectory-intervals done and the total.

        Yields:
            Frames in main memory, ``(b, frames, ..., H, W)``, with ``b <= batch``;
            ``trajectories`` in all.

        Raises:
            InputError: If a count is not positive, or the time step becomes unstable.
        """
        for name, value in (("trajectories", trajectories), ("frames", frames), ("batch", batch)):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        integrator = self.integrator(self.interval, torch.device(device), dtype)

        def batches() -> Iterator[Tensor]:  # bad arguments raise at the call, not in here
            spin_up = math.ceil(self.spin_up / self.interval - 1e-9)
            intervals = spin_up + frames - 1
            for start in range(0, trajectories, batch):
                count = min(batch, trajectories - start)
                fields = self.initial(count, generator=generator, device=device, dtype=dtype)
                state = integrator.start(fields)
                output = torch.empty(0)
                for index in range(intervals + 1):
                    if index > 0:
                        state = integrator.run(state)
                        if progress is not None:
                            progress(start * intervals + count * index, trajectories * intervals)
                    if index >= spin_up:
                        frame = integrator.frame(state)
                        if index == spin_up:
                            output = torch.empty(count, frames, *frame.shape[1:], dtype=dtype)
                        output[:, index - spin_up] = frame
                yield output

        return batches()

    def to_dataset(self, frames: Tensor, *, first: int = 0, seed: int | None = None) -> xr.Dataset:
        """Label simulated frames.

        One unit of model time is stored as one second from 2000-01-01.

        Args:
            frames: ``(trajectory, frame, ..., H, W)``, as `simulate` yields them.
            first: Number of the first of these trajectories.
            seed: Seed of the generator, for the record.

        Returns:
            Dataset of float32 variables on ``(trajectory, time, lat, lon)``; its attributes hold
            the parameters.

        Raises:
            InputError: If the shape is wrong.
        """
        import numpy as np
        import xarray as xr

        dims = ("trajectory", "time", "lat", "lon")
        variables = {
            name: (
                dims,
                variable.values.detach().cpu().to(torch.float32).numpy(),
                {"units": variable.units, "long_name": variable.long_name}
                | ({"cell_methods": variable.cell_methods} if variable.cell_methods else {}),
            )
            for name, variable in self.variables_of(frames).items()
        }
        elapsed = np.round(np.arange(frames.shape[1]) * self.interval * 1e9)
        times = np.datetime64(_EPOCH, "ns") + elapsed.astype("timedelta64[ns]")
        attrs: dict[str, object] = {"simulator": self.name, **asdict(self)}  # type: ignore[call-overload]
        if seed is not None:
            attrs["seed"] = seed
        return xr.Dataset(
            variables,
            coords={
                "trajectory": first + np.arange(frames.shape[0]),
                "time": ("time", times, {"long_name": "model time, one unit as one second"}),
                **self.coordinates(),
            },
            attrs=attrs,
        )

    def _check(
        self,
        *,
        positive: tuple[str, ...] = (),
        not_negative: tuple[str, ...] = (),
        whole: tuple[str, ...] = (),
    ) -> None:
        """Raise unless the parameters of these names are such numbers."""
        for name in whole:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name}={value} must be a whole number")
        for name in positive:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}={value} must be positive and finite")
        for name in not_negative:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value} must be finite and not negative")


def check_precision(dtype: torch.dtype) -> None:
    """Raise unless a type is one that simulators compute in.

    Raises:
        InputError: If the type is neither float32 nor float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"dtype={dtype} is not supported; use torch.float32 or torch.float64")


def steps_of(duration: float, dt: float) -> int:
    """Number of equal steps, none longer than ``dt``, that make up a duration."""
    return max(1, math.ceil(duration / dt - 1e-9))


def check_step(dt: float, speed: float, wavenumber: float, meaning: str) -> None:
    """Raise if the fastest wave leaves the stability region of the Runge-Kutta scheme.

    Args:
        dt: Time step.
        speed: Largest speed of a wave.
        wavenumber: Largest angular wavenumber.
        meaning: What the speed is, for the message.

    Raises:
        InputError: If the step is too long, or the speed is not a number.
    """
    limit = STABILITY_LIMIT / wavenumber
    if not speed * dt <= limit:  # also true for NaN
        advice = f"dt <= {limit / speed:.2g}" if math.isfinite(speed) else "a smaller dt"
        raise InputError(
            f"time step {dt:.3g} is unstable: {meaning} reaches {speed:.3g}, and "
            f"the scheme allows {limit / dt:.3g} at this step and resolution; use {advice}"
        )
