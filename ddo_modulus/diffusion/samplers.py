# SPDX-License-Identifier: Apache-2.0
r"""Samplers: from noise to states, along the reverse ODE or SDE.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.

The probability-flow ODE of the field noise is :math:`dx/d\sigma = (x - D(x, \sigma)) / \sigma`:
the covariance of the noise cancels, so deterministic solvers are those of EDM, and only the noise
that is drawn depends on the field. Any denoiser goes in, conditioned on observations or not.

Solvers follow PhysicsNeMo's ``Solver`` protocol, so that ours step in its samplers and its own in
:func:`sample`. The stochastic ones here stay beside PhysicsNeMo's, which hard-code white noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.prior import Denoiser, Scheduled
from ddo_modulus.errors import InputError

if TYPE_CHECKING:  # takes seconds to import
    from physicsnemo.diffusion.samplers import Solver

Denoise = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[], Tensor]


class Euler:
    """First order: a straight line towards the denoised state.

    Args:
        denoise: The denoiser.
        draw: Noise of unit level.
    """

    def __init__(self, denoise: Denoise, draw: Draw) -> None:
        self.denoise = denoise

    def step(self, x: Tensor, t_cur: Tensor, t_next: Tensor) -> Tensor:
        """States at the next noise level, with one denoiser call; levels as ``(B,)``, all equal."""
        return torch.lerp(self.denoise(x, t_cur), x, float(t_next[0] / t_cur[0]))


class Heun:
    """Second order (Karras et al. 2022, algorithm 1): Euler, then the mean of both slopes.

    Args:
        denoise: The denoiser.
        draw: Noise of unit level.
    """

    def __init__(self, denoise: Denoise, draw: Draw) -> None:
        self.denoise = denoise

    def step(self, x: Tensor, t_cur: Tensor, t_next: Tensor) -> Tensor:
        """As :meth:`Euler.step`, with two denoiser calls, or one on the step to zero."""
        sigma, sigma_next = t_cur[0], t_next[0]
        slope = (x - self.denoise(x, t_cur)) / sigma
        predicted = x + (sigma_next - sigma) * slope
        if sigma_next == 0:
            return predicted
        second = (predicted - self.denoise(predicted, t_next)) / sigma_next
        return x + (sigma_next - sigma) * (slope + second) / 2


class DPMSolver2M:
    r"""DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): exponential integrator, second order.

    Exact in the linear part; extrapolates the denoised state from the last two. With ``eta > 0``
    its stochastic form (SDE-DPM-Solver++(2M)): noise is renewed while it is removed. It remembers
    the last step, so that each run of a sampler needs its own.

    Args:
        denoise: The denoiser.
        draw: Noise of unit level.
        eta: Share of the noise renewed: 0 the ODE, 1 the reverse SDE.
    """

    def __init__(self, denoise: Denoise, draw: Draw, eta: float = 0.0) -> None:
        self.denoise, self.draw, self.eta = denoise, draw, eta
        self._last: tuple[Tensor, Tensor] | None = None

    def step(self, x: Tensor, t_cur: Tensor, t_next: Tensor) -> Tensor:
        """As :meth:`Euler.step`, with one denoiser call."""
        sigma, sigma_next = t_cur[0], t_next[0]
        clean = self.denoise(x, t_cur)
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
    """Reports progress over several calls of :func:`sample`, in steps of single states.

    Args:
        total: Steps of states in all.
        report: Called with the number done and the total.
    """

    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.report = 0, total, report

    def __call__(self, states: int, steps: Iterable[int]) -> Iterator[int]:
        """The steps of a batch of states, counted."""
        for step in steps:
            yield step
            self.done += states
            if self.report is not None:
                self.report(self.done, self.total)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    scheduler: FieldNoiseScheduler,
    batch: int,
    *,
    steps: int,
    solver: str | Callable[[Denoise], Solver] = "dpmpp_2m",
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
        solver: One of :data:`SOLVERS`, or what makes a solver of PhysicsNeMo's protocol from the
            right-hand side of the ODE, as ``physicsnemo.diffusion.samplers.HeunSolver`` does.
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
    if isinstance(solver, str) and solver not in SOLVERS:
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
        value = float(sigma[0])
        level = torch.full((1,), value, device=device, dtype=dtype)
        # Expanded, so that the denoiser sees that it is one level.
        return at.get(value, denoiser)(x, level.expand(batch), condition)

    def draw() -> Tensor:
        return scheduler.draw(like, generator)

    x = float(sigmas[0]) * draw()
    step = _stepper(solver, denoise, draw, like)
    for i in progress(range(steps)):
        sigma = starts[i]
        if churn is not None:
            added = float((sigma**2 - sigmas[i] ** 2).sqrt())
            if added > 0:
                x = x + added * churn.noise * draw()
        x = step(x, sigma.expand(batch), sigmas[i + 1].expand(batch))
    return x


def _stepper(
    solver: str | Callable[[Denoise], Solver], denoise: Denoise, draw: Draw, like: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One step of a solver, from noise levels in double on the CPU."""
    if isinstance(solver, str):
        return SOLVERS[solver](denoise, draw).step

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - denoise(x, sigma)) / sigma[0]

    foreign = solver(slope)
    return lambda x, sigma, sigma_next: foreign.step(x, sigma.to(like), sigma_next.to(like))
