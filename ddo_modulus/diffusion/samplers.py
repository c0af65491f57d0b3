# SPDX-License-Identifier: Apache-2.0
r"""Samplers: from noise to states, along the reverse ODE or SDE.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.

The probability-flow ODE of the field noise is :math:`dx/d\sigma = (x - D(x, \sigma)) / \sigma`:
the covariance of the noise cancels, so deterministic solvers are those of EDM, and only the noise
that is drawn knows the field. Any denoiser goes in, conditioned on observations or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.prior import Denoiser, Scheduled
from ddo_modulus.errors import InputError

Denoise = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[], Tensor]


class Solver(Protocol):
    """One step of a solver; keeps what a multistep method remembers."""

    def __call__(self, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """State at the next noise level."""
        ...


class Euler:
    """First order: a straight line towards the denoised state."""

    def __init__(self, denoise: Denoise, draw: Draw) -> None:
        self.denoise = denoise

    def __call__(self, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """One denoiser call."""
        return torch.lerp(self.denoise(x, sigma), x, float(sigma_next / sigma))


class Heun:
    """Second order (Karras et al. 2022, algorithm 1): Euler, then the mean of both slopes."""

    def __init__(self, denoise: Denoise, draw: Draw) -> None:
        self.denoise = denoise

    def __call__(self, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Two denoiser calls, one on the step to zero."""
        slope = (x - self.denoise(x, sigma)) / sigma
        predicted = x + (sigma_next - sigma) * slope
        if sigma_next == 0:
            return predicted
        second = (predicted - self.denoise(predicted, sigma_next)) / sigma_next
        return x + (sigma_next - sigma) * (slope + second) / 2


class DPMSolver2M:
    r"""DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): exponential integrator, second order.

    Exact in the linear part; extrapolates the denoised state from the last two. With ``eta > 0``
    its stochastic form (SDE-DPM-Solver++(2M)): noise is renewed while it is removed.

    Args:
        denoise: The denoiser at a scalar noise level.
        draw: Noise of unit level.
        eta: Share of the noise renewed: 0 the ODE, 1 the reverse SDE.
    """

    def __init__(self, denoise: Denoise, draw: Draw, eta: float = 0.0) -> None:
        self.denoise, self.draw, self.eta = denoise, draw, eta
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """One denoiser call."""
        clean = self.denoise(x, sigma)
        if sigma_next == 0:
            return clean
        h = (sigma / sigma_next).log()  # step in lambda = -log sigma
        target = clean
        if self._last is not None:
            previous, h_previous = self._last
            target = clean + (clean - previous) * h / (2 * h_previous)
        self._last = clean, h
        keep = torch.exp(-(1 + self.eta) * h)
        x = keep * x + (1 - keep) * target
        if self.eta:
            x = x + sigma_next * (1 - torch.exp(-2 * self.eta * h)).sqrt() * self.draw()
        return x


class StochasticDPMSolver2M(DPMSolver2M):
    """SDE-DPM-Solver++(2M): :class:`DPMSolver2M` on the reverse SDE."""

    def __init__(self, denoise: Denoise, draw: Draw) -> None:
        super().__init__(denoise, draw, eta=1.0)


#: Solvers by name.
SOLVERS: dict[str, Callable[[Denoise, Draw], Solver]] = {
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": DPMSolver2M,
    "dpmpp_2m_sde": StochasticDPMSolver2M,
}


@dataclass(frozen=True)
class Churn:
    """Noise added before each step and removed by it (Karras et al. 2022, algorithm 2).

    Attributes:
        amount: Sum over all steps of the relative rise of the noise level, ``S_churn``; a step's
            share is at most sqrt(2) - 1.
        low: Least noise level at which it happens, ``S_min``.
        high: Largest, ``S_max``.
        noise: Factor on the noise added, ``S_noise``.

    Raises:
        InputError: If a value is negative, or the range empty.
    """

    amount: float
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        if not (self.amount >= 0 and 0 <= self.low < self.high and self.noise > 0):
            raise InputError(
                f"churn={self.amount} from {self.low} to {self.high} with noise {self.noise}: "
                "numbers from 0 up and a range are needed"
            )

    def raised(self, sigma: Tensor, steps: int) -> Tensor:
        """Noise level to start a step from."""
        share = min(self.amount / steps, math.sqrt(2) - 1)
        return sigma * (1 + share) if self.low <= float(sigma) <= self.high else sigma


class StepCounter:
    """Tells progress over several calls of :func:`sample`, in steps of single states.

    Args:
        total: Steps of states in all.
        tell: Called with the number done and the total.
    """

    def __init__(self, total: int, tell: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.tell = 0, total, tell

    def __call__(self, states: int, steps: Iterable[int]) -> Iterator[int]:
        """The steps of a batch of states, counted."""
        for step in steps:
            yield step
            self.done += states
            if self.tell is not None:
                self.tell(self.done, self.total)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    scheduler: FieldNoiseScheduler,
    batch: int,
    *,
    steps: int,
    solver: str = "dpmpp_2m",
    churn: Churn | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    shape: Sequence[int] | None = None,
    condition: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Float[Tensor, "B C H W"]:
    """Draw states from the law that a denoiser describes.

    Args:
        denoiser: Prior or posterior.
        scheduler: Noise field and levels.
        batch: Number of states.
        steps: Number of noise levels, at least one.
        solver: One of :data:`SOLVERS`.
        churn: Noise to renew on the way, with a solver of single steps.
        generator: Source of all noise; a sequence shares out the batch
            (:meth:`FieldNoiseScheduler.draw`).
        shape: Grid of the states; the field's own if None.
        condition: Handed on to the denoiser, ``(B, ...)``.
        device: Where to compute; where the condition or the generator is if None.
        dtype: Precision of the states.
        progress: Wraps the iteration over steps, for a progress bar.

    Raises:
        InputError: On an unknown solver, steps or batch below one, or churn with a solver that
            remembers earlier steps.
    """
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    if steps < 1 or batch < 1:
        raise InputError(f"steps and batch must be at least 1, got {steps} and {batch}")
    if churn is not None and solver not in ("euler", "heun"):
        raise InputError(f"churn is for solver=euler or heun, not for {solver}")
    if device is None:
        first = generator[0] if isinstance(generator, Sequence) else generator
        owner = condition if condition is not None else first
        device = "cpu" if owner is None else owner.device
    shape = scheduler.field.shape if shape is None else (shape[0], shape[1])
    like = torch.empty((batch, scheduler.field.channels, *shape), device=device, dtype=dtype)
    # Levels in double on the CPU: branching on them must not wait for the device.
    sigmas = scheduler.timesteps(steps, dtype=torch.float64)
    starts = sigmas[:-1]
    if churn is not None:
        starts = torch.stack([churn.raised(sigma, steps) for sigma in starts])
    at: Mapping[float, Denoiser] = {}
    if isinstance(denoiser, Scheduled):
        levels = torch.cat([starts, sigmas[1:-1]]) if solver == "heun" else starts
        at = denoiser.scheduled(levels, like)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        value = float(sigma)
        level = torch.full((1,), value, device=device, dtype=dtype)
        # Expanded: plainly one level.
        return at.get(value, denoiser)(x, level.expand(batch), condition)

    def draw() -> Tensor:
        return scheduler.draw(like, generator)

    x = float(sigmas[0]) * draw()
    step = SOLVERS[solver](denoise, draw)
    for i in progress(range(steps)):
        sigma = starts[i]
        if churn is not None:
            added = float((sigma**2 - sigmas[i] ** 2).sqrt())
            if added > 0:
                x = x + added * churn.noise * draw()
        x = step(x, sigma, sigmas[i + 1])
    return x
