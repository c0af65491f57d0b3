# SPDX-License-Identifier: Apache-2.0
r"""Samplers: solvers that integrate the reverse ODE or SDE from noise to states.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.

The probability-flow ODE of the field noise is :math:`dx/d\sigma = (x - D(x, \sigma)) / \sigma`:
the covariance of the noise cancels. So deterministic solvers are the same as for white noise, and
only the noise that is drawn depends on the field. The denoiser may be a prior or a posterior.

Solvers follow PhysicsNeMo's ``Solver`` protocol: ours work in its samplers, and its solvers work in
:func:`sample`. Stochastic solvers are implemented here because PhysicsNeMo's draw white noise.
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
    """Euler's method, of first order.

    Args:
        denoise: Expected clean states from noisy states and noise levels.
        draw: Draws noise of level one; not used.
    """

    def __init__(self, denoise: Denoise, draw: Draw) -> None:
        self.denoise = denoise

    def step(self, x: Tensor, t_cur: Tensor, t_next: Tensor) -> Tensor:
        """States at the next noise level, with one denoiser call.

        Args:
            x: States at the current noise level.
            t_cur: Current noise level, ``(B,)``, all equal.
            t_next: Next noise level, likewise.
        """
        return torch.lerp(self.denoise(x, t_cur), x, float(t_next[0] / t_cur[0]))


class Heun:
    """Heun's method, of second order (Karras et al. 2022, algorithm 1).

    Args:
        denoise: Expected clean states from noisy states and noise levels.
        draw: Draws noise of level one; not used.
    """

    def __init__(self, denoise: Denoise, draw: Draw) -> None:
        self.denoise = denoise

    def step(self, x: Tensor, t_cur: Tensor, t_next: Tensor) -> Tensor:
        """As :meth:`Euler.step`, with two denoiser calls, or one for the step to zero."""
        sigma, sigma_next = t_cur[0], t_next[0]
        slope = (x - self.denoise(x, t_cur)) / sigma
        predicted = x + (sigma_next - sigma) * slope
        if sigma_next == 0:
            return predicted
        second = (predicted - self.denoise(predicted, t_next)) / sigma_next
        return x + (sigma_next - sigma) * (slope + second) / 2


class DPMSolver2M:
    r"""DPM-Solver++(2M), an exponential integrator of second order (Lu et al. 2022, algorithm 2).

    It integrates the linear term of the ODE exactly, and extrapolates the denoised state from the
    last two steps. With ``eta > 0`` it is the stochastic form, SDE-DPM-Solver++(2M), which adds new
    noise at each step. A solver stores its last step, so each run needs a new one.

    Args:
        denoise: Expected clean states from noisy states and noise levels.
        draw: Draws noise of level one.
        eta: Amount of new noise: 0 for the ODE, 1 for the reverse SDE.
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
    """Noise that is added before each step, which removes it (Karras et al. 2022, algorithm 2).

    Attributes:
        amount: Sum over all steps of the relative increase of the noise level, ``S_churn``; the
            increase of one step is at most sqrt(2) - 1.
        low: Smallest noise level at which noise is added, ``S_min``.
        high: Largest such level, ``S_max``.
        noise: Factor on the added noise, ``S_noise``.

    Raises:
        InputError: If a value is negative, ``noise`` is not positive, or the range is empty.
    """

    amount: float
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (self.amount, self.low, self.noise)))
        if not (finite and self.amount >= 0 and 0 <= self.low < self.high and self.noise > 0):
            raise InputError(
                f"churn={self.amount} from {self.low} to {self.high} with noise {self.noise}: "
                "finite numbers from 0 up and a range are needed"
            )

    def raised(self, sigma: Tensor, steps: int) -> Tensor:
        """Noise level at the start of a step, after noise was added."""
        share = min(self.amount / steps, math.sqrt(2) - 1)
        return sigma * (1 + share) if self.low <= float(sigma) <= self.high else sigma


class StepCounter:
    """Reports the progress of several calls of :func:`sample`, in steps times states.

    Args:
        total: Number of steps times states of all calls.
        report: Called with the number done and the total; None for no report.
    """

    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.report = 0, total, report

    def __call__(self, states: int, steps: Iterable[int]) -> Iterator[int]:
        """Iterate over the steps of a batch of states, and report each."""
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
    """Draw states from the distribution of a denoiser.

    Args:
        denoiser: Prior or posterior.
        scheduler: Noise field and noise levels.
        batch: Number of states.
        steps: Number of noise levels, at least one.
        solver: One of :data:`SOLVERS`, or a class of PhysicsNeMo's protocol that is constructed
            from the right-hand side of the ODE, such as
            ``physicsnemo.diffusion.samplers.HeunSolver``.
        churn: Noise added before each step; only for single-step solvers.
        generator: Source of all noise; a sequence of generators divides the batch
            (:meth:`FieldNoiseScheduler.draw`).
        shape: Grid of the states; that of the noise field if None.
        condition: Passed on to the denoiser, ``(B, ...)``.
        device: Device to compute on; if None, that of the condition or of the generator.
        dtype: Precision of the states.
        progress: Wraps the iteration over steps, for a progress bar.

    Raises:
        InputError: If the solver is unknown, ``steps`` or ``batch`` is below one, or churn is used
            with a multistep solver.
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
    # Levels in float64 on the CPU, so that branches on them do not wait for the device.
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
        # Expanded, so that the denoiser can see from the strides that it is one level.
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
    """The step function of a solver, for noise levels in float64 on the CPU."""
    if isinstance(solver, str):
        return SOLVERS[solver](denoise, draw).step

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - denoise(x, sigma)) / sigma[0]

    foreign = solver(slope)
    return lambda x, sigma, sigma_next: foreign.step(x, sigma.to(like), sigma_next.to(like))
