# SPDX-License-Identifier: Apache-2.0
r"""Cost of posterior ensembles, measured in twin experiments.

Axes: ``T`` analyses, ``E`` members, ``B = T E`` states (members of an analysis are consecutive),
``C`` channel, ``H W`` grid, ``M`` observations.

In a twin experiment the truth is a draw from the prior, observed with noise at random grid points.
It needs no data, and the ensemble is calibrated if the sampler is exact. Cost is also given as the
number of function evaluations of the network (NFE): 1 for a forward pass, 2 for a vector-Jacobian
product.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddo_modulus.compat import on_gpu
from ddo_modulus.diffusion.noise import FieldNoiseScheduler, within
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.prior import Denoiser, Prior
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.observations import LinearOperator, Observations
from ddo_modulus.posterior import MomentMatching


@dataclass(frozen=True)
class Twin:
    """A twin experiment: truths and their observations.

    Attributes:
        truth: ``(T, C, H, W)`` in the operator's units.
        observations: ``M`` observations of each truth.
        unobserved: True at grid values that were not observed.
        condition: ``(T, ...)`` condition of each analysis, if the operator takes one.
    """

    truth: Float[Tensor, "T C H W"]
    observations: Observations
    unobserved: Bool[Tensor, "T C H W"]
    condition: Tensor | None = None

    @classmethod
    def simulate(
        cls,
        prior: Denoiser,
        scheduler: FieldNoiseScheduler,
        analyses: int,
        observations: int,
        *,
        error: float = 0.1,
        steps: int = 32,
        seed: int = 0,
        condition: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Twin:
        """Draw truths from a prior and observe them.

        Args:
            prior: Denoiser of the prior.
            scheduler: Noise schedule of the prior.
            analyses: Number of truths ``T``.
            observations: Number of grid values ``M`` observed of each truth.
            error: Standard deviation of the observation errors, in the operator's units.
            steps: Number of noise levels of the draws.
            seed: Seed of truths, places and errors; they are the same on every machine, up to
                round-off.
            condition: ``(T, ...)``, passed on to the prior.
            device: Device to compute on.

        Raises:
            InputError: If there are more observations than grid values, or a number is out of
                range.
        """
        field = scheduler.field
        points = field.channels * math.prod(field.shape)
        if not 1 <= observations <= points or error <= 0:
            raise InputError(
                f"observations={observations} of {points} grid values with error={error}: from 1 "
                "up to all of them can be observed, with an error above zero"
            )
        generator = torch.Generator().manual_seed(seed)
        truth = sample(
            prior,
            scheduler,
            analyses,
            steps=steps,
            generator=generator,
            condition=condition,
            device=device,
        )
        index = torch.stack(
            [torch.randperm(points, generator=generator)[:observations] for _ in range(analyses)]
        )
        noise = error * torch.randn(analyses, observations, generator=generator)
        index, noise = index.to(device), noise.to(device)
        values = truth.flatten(1).gather(1, index) + noise
        operator = LinearOperator(
            index[..., None], torch.ones_like(values)[..., None], torch.zeros_like(values)
        )
        unobserved = torch.ones_like(truth, dtype=torch.bool).flatten(1).scatter(1, index, False)
        return cls(
            truth,
            Observations(operator, values, error**2),
            unobserved.view(truth.shape),
            condition,
        )

    def posterior(self, prior: Prior, config: PosteriorConfig) -> MomentMatching:
        """Condition a prior on the observations.

        Args:
            prior: The prior.
            config: Resolved options.
        """
        return MomentMatching.configured(prior, self.observations, config)

    def ensemble(
        self,
        posterior: Denoiser,
        config: PosteriorConfig,
        noise: GaussianField,
        members: int,
        seed: int = 1,
    ) -> Float[Tensor, "T E C H W"]:
        """Draw an ensemble for each analysis.

        Args:
            posterior: The posterior.
            config: Resolved options.
            noise: Noise field at level one.
            members: Number of members ``E`` of each ensemble.
            seed: Seed of the noise.
        """
        condition = self.condition
        if condition is not None:
            condition = condition.repeat_interleave(members, 0)
        states = sample(
            posterior,
            config.scheduler(noise),
            len(self.truth) * members,
            steps=config.steps,
            solver=config.solver,
            generator=torch.Generator(self.truth.device).manual_seed(seed),
            condition=condition,
        )
        return states.unflatten(0, (len(self.truth), members))


def evaluations(config: PosteriorConfig, scheduler: FieldNoiseScheduler) -> int:
    """Number of function evaluations of the network (NFE) per member.

    Args:
        config: Resolved options of sampling.
        scheduler: Noise schedule.
    """
    levels = scheduler.timesteps(config.steps, dtype=torch.float64)
    calls = levels[:-1]
    if config.solver == "heun":
        calls = torch.cat([calls, levels[1:-1]])
    if config.covariance == "linear":
        return len(calls)
    return len(calls) + 2 * config.iterations * int(within(calls, config.guidance_interval).sum())


@dataclass(frozen=True)
class Cost:
    """Cost of a run.

    Attributes:
        seconds: Median time of the runs after the first.
        first: Time of the first run in seconds, with everything that happens once: compilation,
            factors, recording.
        memory: Peak GPU memory in GiB; None on a CPU.
        result: Result of the last run.
    """

    seconds: float
    first: float
    memory: float | None
    result: Tensor


def measure(
    run: Callable[[], Tensor],
    device: torch.device,
    *,
    repeats: int = 3,
    patience: float = 5.0,
    warm_up: Callable[[], object] | None = None,
) -> Cost:
    """Time a function that computes on a device.

    Args:
        run: The function.
        device: Device that it computes on.
        repeats: Number of runs after the first.
        patience: Seconds after which no further run is started.
        warm_up: Function of the first run, if a shorter one is enough; ``run`` if None.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, _ = _clock(run if warm_up is None else warm_up, device)
    times: list[float] = []
    while len(times) < max(1, repeats) and sum(times) < patience:
        seconds, result = _clock(run, device)
        times.append(seconds)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return Cost(statistics.median(times), first, memory, result)


def idle_share(run: Callable[[], object]) -> float:
    """Share of the time between the first and the last kernel in which the GPU is idle.

    It is computed from a trace of the kernels and copies of one run; warm up before.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    events = trace.events() or []
    return _gaps([(e.time_range.start, e.time_range.end) for e in events if on_gpu(e)])


def difference(
    ensemble: Float[Tensor, "T E C H W"], reference: Float[Tensor, "T E C H W"]
) -> tuple[float, float]:
    """Relative differences of the ensemble mean and of the spread from a reference."""
    pair = [t.double() for t in (ensemble, reference)]
    mean, other = (t.mean(1) for t in pair)
    shift = float((mean - other).norm() / other.norm())
    if ensemble.shape[1] < 2:
        return shift, 0.0
    spread, reference_spread = (float(t.var(1).mean().sqrt()) for t in pair)
    return shift, spread / reference_spread - 1


def _gaps(spans: list[tuple[float, float]]) -> float:
    """Share of the whole time that no span covers."""
    if not spans:
        return math.nan
    spans = sorted(spans)
    begin = reached = spans[0][0]
    covered = 0.0
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - covered / (reached - begin)


def _clock(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Time of a run in seconds, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result
