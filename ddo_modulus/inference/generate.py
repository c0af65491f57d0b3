# SPDX-License-Identifier: Apache-2.0
"""Generation: draws of states, of trajectories, or of states conditioned on a coarse view.

Axes: ``E`` members, ``T`` times, ``B`` states drawn together, ``P`` frames of a state, ``C``
variables, ``H W`` grid, ``h w`` coarse grid.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ddo_modulus import __version__
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.diffusion.samplers import StepCounter, sample
from ddo_modulus.diffusion.trajectory import TrajectoryPrior
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.inference.assimilate import member_generator
from ddo_modulus.inference.result import coordinates, labelled, sampling_note


def generate(
    package: Package,
    times: Sequence[np.datetime64] | np.ndarray,
    *,
    ensemble: int = 8,
    coarse: Float[Tensor, "T P C h w"] | None = None,
    resolution: tuple[int, int] | None = None,
    seed: int = 0,
    frozen: bool = False,
    posterior: PosteriorConfig | Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Draw fields from a package.

    What is drawn depends on the package:

    - single states: independent states, one for each member and time;
    - windows in time: one trajectory over all times for each member. It is drawn with further
      frames at both ends, which are cut off, since frames near an end have no centred window;
    - a coarse view as condition: states that agree with the view of each time.

    A draw depends only on the seed, its member and its time (the first time of a trajectory), not
    on other draws or the batch. It is computed on the device of the package's operator.

    Args:
        package: The package to draw from.
        times: UTC. For a package without condition they are only labels; for trajectories their
            step is the package's interval.
        ensemble: Number of members ``E``.
        coarse: Coarse views in physical units, of the ``P`` frames around each time.
        resolution: Grid of the draws; the package's own if None. A finer grid shows finer scales
            of the same functions. If values are means over the cells of the package's grid, draws
            are means over the cells of this grid.
        seed: Seed of all noise.
        frozen: Whether all times of a member start from the same noise. Each draw is still correct
            by itself, and an animation flickers less.
        posterior: Options of sampling; None for those of the package.
        progress: Called with the number of steps times states done, and their total.

    Returns:
        Every variable on ``(ensemble, time, lat, lon)``, float32 in physical units. Attributes
        record the options.

    Raises:
        InputError: If an argument does not fit the package.
    """
    times = np.asarray(times, "datetime64[ns]")
    task, config = package.task, PosteriorConfig.of(posterior).resolve(package)
    shape = package.grid.shape if resolution is None else resolution
    if ensemble < 1 or seed < 0 or not len(times):
        raise InputError(
            f"ensemble={ensemble} and the number of times ({len(times)}) must be at least 1, "
            f"seed={seed} not negative"
        )
    if (coarse is None) != (task.coarse is None):
        wanted = "a coarse view of each time" if coarse is None else "no coarse view"
        raise InputError(f"the package's condition is {task.condition!r}: it takes {wanted}")
    if package.normalization.mean.shape[-1] > 1 and shape != package.grid.shape:
        raise InputError("the package's climatology is by point: it draws on its own grid only")
    prior: DiffusionOperator | TrajectoryPrior = package.operator
    starts, length, margin = times, 1, 0
    if task.frames > 1 and task.coarse is None:
        _check_steps(times, package.interval)
        margin = task.frames - 1
        longer = _prolonged(times, margin, package.interval)
        starts, length = times[:1], len(longer)
        prior = TrajectoryPrior(package.operator, task.frames, length, balance=1.0)
        middle = longer[prior.members[:, task.frames // 2].numpy()]
        conditions = package.conditions(middle)
        conditions = None if conditions is None else conditions[None]  # one for each window
    else:
        conditions = conditions_of(package, times, coarse)
    places = [(member, t) for member in range(ensemble) for t in range(len(starts))]
    drawn = draw(
        prior,
        config,
        [member_generator(seed, starts[0 if frozen else t], member) for member, t in places],
        shape=shape,
        conditions=conditions,
        rows=[t for _, t in places],
        batch=max(1, config.batch // length),
        progress=StepCounter(config.steps * len(places), progress),
        device=package.operator.device,
    )
    fields = finished(package, drawn, prior.linear, config)  # E*T P C H W
    shown = fields[:, margin:-margin] if margin else fields[:, task.frames // 2][:, None]
    states = shown.unflatten(0, (ensemble, -1)).flatten(1, 2)  # E T C H W
    hours = package.hours(np.tile(times, ensemble))
    statistics = package.normalization.to("cpu")
    physical = statistics.denormalize(states.flatten(0, 1), hours).unflatten(0, (ensemble, -1))
    attributes = _attributes(package, config, seed) | {
        "trajectory": str(margin > 0 and len(times) > 1).lower()
    }
    return labelled(
        package, times, physical.float(), coordinates(package.grid.at(shape)), attributes
    )


def _attributes(package: Package, config: PosteriorConfig, seed: int) -> dict[str, object]:
    """Options, as attributes of the dataset."""
    attributes: dict[str, object] = {
        "seed": seed,
        "steps": config.steps,
        "solver": config.solver,
        "sigma_min": config.sigma_min,
        "sigma_max": config.sigma_max,
        "rho": config.rho,
        "discretization": config.discretization,
        "software": f"ddo_modulus {__version__}",
    }
    if note := sampling_note(package, config):
        attributes["notes"] = json.dumps(note)
    simulator = package.provenance.get("data")
    if isinstance(simulator, dict) and "simulator" in simulator:
        attributes["simulator"] = simulator["simulator"]
    if config.churn is not None:
        attributes |= {f"churn_{k}": v for k, v in asdict(config.churn).items()}
    return attributes


def draw(
    prior: Prior,
    config: PosteriorConfig,
    generators: Sequence[torch.Generator],
    *,
    shape: tuple[int, int],
    conditions: Tensor | None,
    rows: Sequence[int],
    batch: int,
    progress: StepCounter,
    device: torch.device,
) -> Float[Tensor, "B PC H W"]:
    """Draw states from a prior or posterior, in batches.

    Args:
        prior: Prior or posterior.
        config: Resolved options of sampling.
        generators: One for each state.
        shape: Grid of the states.
        conditions: ``(T, ...)``; None if the prior takes none.
        rows: Index into ``conditions`` for each state.
        batch: Number of states drawn together.
        progress: Counter of the steps.
        device: Device to compute on.

    Returns:
        Normalised states, on the CPU.
    """
    parts = []
    for first in range(0, len(generators), batch):
        some = slice(first, first + batch)
        count, index = len(generators[some]), torch.tensor(rows[some])
        drawn = sample(
            prior,
            config.scheduler(prior.noise),
            count,
            steps=config.steps,
            solver=config.solver,
            churn=config.churn,
            generator=generators[some],
            shape=shape,
            condition=None if conditions is None else conditions[index].to(device),
            device=device,
            progress=partial(progress, count),
        )
        parts.append(drawn.cpu())
    return torch.cat(parts)


def _prolonged(times: np.ndarray, margin: int, interval: float | None) -> np.ndarray:
    """Times of a trajectory, extended by ``margin`` times at both ends."""
    step = np.timedelta64(round((1.0 if interval is None else interval) * 1e9), "ns")
    if len(times) > 1:
        step = times[1] - times[0]
    more = step * np.arange(1, margin + 1)
    return np.concatenate([times[0] - more[::-1], times, times[-1] + more])


def _check_steps(times: np.ndarray, interval: float | None) -> None:
    """Raise an InputError unless times are one interval apart."""
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
    config: PosteriorConfig,
) -> Float[Tensor, "B P C H W"]:
    """Give draws on another grid the form of data on that grid; others are unchanged.

    Scales below the last noise level get their variance back, and values become means over the
    cells of the grid if the package's are.

    Args:
        package: Package that the states were drawn from.
        drawn: Normalised states.
        linear: Gaussian part of the prior that they were drawn from, on any grid.
        config: Resolved options of sampling.
    """
    if tuple(drawn.shape[-2:]) != package.grid.shape:
        levels = config.scheduler(linear.noise).timesteps(config.steps, dtype=torch.float64)
        last = float(levels[-2])  # the smallest above zero
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
    return task.coarse.on_grid(y, package.operator.basis)
