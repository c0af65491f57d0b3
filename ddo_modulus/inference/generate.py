# SPDX-License-Identifier: Apache-2.0
"""Generated fields: draws of a package's prior, of trajectories, or of states given a coarse view.

Axes: ``E`` members, ``T`` times, ``B`` states drawn together, ``P`` frames of a state, ``C``
variables, ``H W`` grid, ``h w`` coarse grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ddo_modulus import __version__
from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.prior import Denoiser
from ddo_modulus.diffusion.samplers import Churn, StepCounter, sample
from ddo_modulus.diffusion.trajectory import TrajectoryPrior
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.inference.assimilate import coordinates, labelled, member_generator


@dataclass(frozen=True)
class Sampler:
    """How to draw; what is None is the package's own.

    Attributes:
        steps: Noise levels.
        solver: One of :data:`~ddo_modulus.diffusion.samplers.SOLVERS`.
        sigma_min: Least noise level.
        sigma_max: Largest noise level.
        rho: Exponent of the schedule.
        discretization: One of :data:`~ddo_modulus.diffusion.noise.DISCRETIZATIONS`.
        churn: Noise to renew on the way.
        frozen: Whether all times of a member start from the same noise: each remains a sound
            draw, and a film of them flickers less.
        batch: States drawn together; bounds the memory.
    """

    steps: int | None = None
    solver: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    discretization: str = "edm"
    churn: Churn | None = None
    frozen: bool = False
    batch: int = 64

    def scheduler(self, package: Package, noise: GaussianField) -> FieldNoiseScheduler:
        """Noise levels of a package, or those asked for.

        Raises:
            InputError: If they are out of range.
        """
        own = package.sampling
        low, high, rho = (
            getattr(own, name) if getattr(self, name) is None else float(getattr(self, name))
            for name in ("sigma_min", "sigma_max", "rho")
        )
        return FieldNoiseScheduler(noise, low, high, rho, discretization=self.discretization)


def generate(
    package: Package,
    times: Sequence[np.datetime64] | np.ndarray,
    *,
    ensemble: int = 8,
    coarse: Float[Tensor, "T P C h w"] | None = None,
    resolution: tuple[int, int] | None = None,
    seed: int = 0,
    sampler: Sampler | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Draw fields from a package.

    A package of single states gives independent states, one for each member and time; one of
    windows in time gives a trajectory over all times for each member (drawn with some frames more
    at both ends, where windows reach to one side only, which are cut off); one with a coarse view
    gives states that belong to the view of each time. A draw depends on the seed, its member and
    its time (a trajectory: its first time), not on the others or on ``sampler.batch``.

    Args:
        package: Where to draw from; it computes where its operator is.
        times: UTC. Labels only, for a package without condition; in steps of the package's
            interval for trajectories.
        ensemble: Members ``E``.
        coarse: Coarse views in physical units, of the ``P`` frames around each time.
        resolution: Grid of the draws, the package's own if None. Finer ones show finer scales of
            the same functions; values that are means over cells on the package's grid are means
            over the cells of this one.
        seed: Of all noise.
        sampler: How to draw.
        progress: Called with the number of steps of states done and their total.

    Returns:
        Every variable on ``(ensemble, time, lat, lon)``, float32 in physical units. Attributes
        record the options.

    Raises:
        InputError: If an argument does not fit the package.
    """
    sampler = Sampler() if sampler is None else sampler
    times = np.asarray(times, "datetime64[ns]")
    task, own = package.task, package.sampling
    shape = package.grid.shape if resolution is None else resolution
    if ensemble < 1 or sampler.batch < 1 or seed < 0 or not len(times):
        raise InputError(
            f"ensemble={ensemble}, batch={sampler.batch} and the number of times ({len(times)}) "
            f"must be at least 1, seed={seed} not negative"
        )
    if (coarse is None) != (task.coarse is None):
        wanted = "a coarse view of each time" if coarse is None else "no coarse view"
        raise InputError(f"the package's condition is {task.condition!r}: it takes {wanted}")
    if package.normalization.mean.shape[-1] > 1 and shape != package.grid.shape:
        raise InputError("the package's climatology is by point: it draws on its own grid only")
    denoiser: DiffusionOperator | TrajectoryPrior = package.operator
    noise, starts, length, margin = package.operator.noise, times, 1, 0
    if task.frames > 1 and task.coarse is None:
        _check_steps(times, package.interval)
        margin = task.frames - 1
        longer = _prolonged(times, margin, package.interval)
        length = len(longer)
        denoiser = TrajectoryPrior(package.operator, task.frames, length, balance=1.0)
        noise, starts = denoiser.noise, times[:1]
        middle = longer[denoiser.members[:, task.frames // 2].numpy()]
        conditions = package.conditions(middle)
        conditions = None if conditions is None else conditions[None]  # of each window
    else:
        conditions = conditions_of(package, times, coarse)
    steps = own.steps if sampler.steps is None else sampler.steps
    solver = own.solver if sampler.solver is None else sampler.solver
    scheduler = sampler.scheduler(package, noise)
    counted = StepCounter(steps * ensemble * len(starts), progress)
    places = [(member, t) for member in range(ensemble) for t in range(len(starts))]
    drawn = draw(
        package,
        denoiser,
        scheduler,
        [
            member_generator(seed, starts[0 if sampler.frozen else t], member)
            for member, t in places
        ],
        steps=steps,
        solver=solver,
        churn=sampler.churn,
        shape=shape,
        conditions=conditions,
        rows=[t for _, t in places],
        batch=max(1, sampler.batch // length),
        progress=counted,
    )
    fields = finished(package, drawn, denoiser.linear, scheduler, steps)  # E*T P C H W
    shown = fields[:, margin:-margin] if margin else fields[:, task.frames // 2][:, None]
    states = shown.unflatten(0, (ensemble, -1)).flatten(1, 2)  # E T C H W
    hours = package.hours(np.tile(times, ensemble))
    statistics = package.normalization.to("cpu")
    physical = statistics.denormalize(states.flatten(0, 1), hours).unflatten(0, (ensemble, -1))
    attributes: dict[str, object] = {
        "trajectory": str(margin > 0 and len(times) > 1).lower(),
        "seed": seed,
        "steps": steps,
        "solver": solver,
        **{
            name: getattr(scheduler, name)
            for name in ("sigma_min", "sigma_max", "rho", "discretization")
        },
        **(
            {}
            if sampler.churn is None
            else {f"churn_{k}": v for k, v in asdict(sampler.churn).items()}
        ),
        "software": f"ddo_modulus {__version__}",
    }
    simulator = package.provenance.get("data")
    if isinstance(simulator, dict) and "simulator" in simulator:
        attributes["simulator"] = simulator["simulator"]
    return labelled(
        package, times, physical.float(), coordinates(package.grid.at(shape)), attributes
    )


def draw(
    package: Package,
    denoiser: Denoiser,
    scheduler: FieldNoiseScheduler,
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    solver: str,
    shape: tuple[int, int],
    conditions: Tensor | None,
    rows: Sequence[int],
    batch: int,
    progress: StepCounter,
    churn: Churn | None = None,
) -> Float[Tensor, "B PC H W"]:
    """Draw from a denoiser where a package's operator is, some states at a time.

    Args:
        package: Tells the device.
        denoiser: Prior or posterior.
        scheduler: Its noise levels.
        generators: One for each state.
        steps: Noise levels.
        solver: One of :data:`~ddo_modulus.diffusion.samplers.SOLVERS`.
        shape: Grid of the states.
        conditions: ``(T, ...)`` for the denoiser, if it takes any.
        rows: Which of them each state has.
        batch: States drawn together.
        progress: Counts the steps.
        churn: Noise to renew on the way.

    Returns:
        Normalised states, on the CPU.
    """
    device, parts = package.operator.device, []
    for first in range(0, len(generators), batch):
        some = slice(first, first + batch)
        index = torch.tensor(rows[some])
        drawn = sample(
            denoiser,
            scheduler,
            len(index),
            steps=steps,
            solver=solver,
            churn=churn,
            generator=generators[some],
            shape=shape,
            condition=None if conditions is None else conditions[index].to(device),
            device=device,
            progress=partial(progress, len(index)),
        )
        parts.append(drawn.cpu())
    return torch.cat(parts)


def _prolonged(times: np.ndarray, margin: int, interval: float | None) -> np.ndarray:
    """Times of a trajectory with so many more at both ends."""
    step = np.timedelta64(round((1.0 if interval is None else interval) * 1e9), "ns")
    if len(times) > 1:
        step = times[1] - times[0]
    more = step * np.arange(1, margin + 1)
    return np.concatenate([times[0] - more[::-1], times, times[-1] + more])


def _check_steps(times: np.ndarray, interval: float | None) -> None:
    """Raise unless times are those of a trajectory's frames."""
    steps = np.diff(times) / np.timedelta64(1, "s")
    if interval is not None and not np.allclose(steps, interval, rtol=1e-3):
        raise InputError(
            f"the times of a trajectory follow each other every {interval:g} s, the package's "
            f"interval; got steps from {steps.min():g} to {steps.max():g} s"
        )


def finished(
    package: Package,
    drawn: Float[Tensor, "B PC H W"],
    linear: GaussianDenoiser,
    scheduler: FieldNoiseScheduler,
    steps: int,
) -> Float[Tensor, "B P C H W"]:
    """Draws of a package's own law as data on their grid would be: the same, on the package's own.

    Args:
        package: What they were drawn from.
        drawn: Normalised states; on another grid with scales that no network has a hand in.
        linear: Gaussian part of what they were drawn from, on any grid.
        scheduler: Noise levels that they were drawn with.
        steps: Number of them.
    """
    if tuple(drawn.shape[-2:]) != package.grid.shape:
        last = float(scheduler.timesteps(steps, dtype=torch.float64)[-2])  # the least but zero
        linear = linear.at(drawn.shape[-2:])
        drawn = linear.uncovered(drawn, last, package.operator.basis)
    frames = drawn.unflatten(1, (-1, len(package.channels)))
    return package.operator.cell_means(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


def conditions_of(
    package: Package, times: np.ndarray, coarse: Float[Tensor, "T P C h w"] | None
) -> Tensor | None:
    """Condition of each time, in the operator's units.

    Raises:
        InputError: If a coarse view has another shape, or does not fit the package's statistics.
    """
    task = package.task
    if task.coarse is None or coarse is None:
        return package.conditions(times)
    wanted = (len(times), task.span, len(package.channels), *task.coarse.shape(package.grid.shape))
    if tuple(coarse.shape) != wanted:
        raise InputError(f"the coarse view has shape {tuple(coarse.shape)}; expected {wanted}")
    statistics = package.normalization.to("cpu")
    if statistics.mean.shape[-1] > 1 or statistics.per_hour:
        raise InputError("a coarse view needs statistics that are the same at all points and hours")
    y = statistics.normalize(coarse.flatten(0, 1)).unflatten(0, coarse.shape[:2]).flatten(1, 2)
    return task.coarse.spread(y, package.operator.basis)
