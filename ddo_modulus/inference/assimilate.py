# SPDX-License-Identifier: Apache-2.0
"""Assimilation: analysis ensembles in physical units, from a package and observations.

Axes: ``T`` analysis times, ``E`` members, ``B = T E`` states (members of an analysis are
consecutive), ``C`` channel, ``H W`` grid, ``M`` observations.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus import __version__
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.prior import Prior, Recorder
from ddo_modulus.diffusion.samplers import StepCounter, sample
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid, resampled
from ddo_modulus.fields.linalg import per_member
from ddo_modulus.inference.analyses import (
    Analysis,
    GriddedPrior,
    batches,
    prepare,
    refuse_empty,
    working_shape,
)
from ddo_modulus.inference.backgrounds import BackgroundConfig, Forecast, background_states
from ddo_modulus.inference.quality import QualityControl
from ddo_modulus.inference.reports import Reports
from ddo_modulus.inference.result import (
    AnalysisResult,
    coordinates,
    diagnostic_variables,
    labelled,
    sampling_note,
)
from ddo_modulus.observations.table import ObservationTable, read_table
from ddo_modulus.posterior import AnalysisSystem, Inflated, Innovations, MomentMatching
from ddo_modulus.random import generator

_LOG = logging.getLogger(__name__)


def assimilate(
    package: Package,
    observations: ObservationTable | pd.DataFrame | str | Path,
    times: Sequence[np.datetime64] | np.ndarray,
    *,
    ensemble: int = 32,
    seed: int = 0,
    posterior: PosteriorConfig | Mapping[str, Any] | None = None,
    quality: QualityControl | Mapping[str, Any] | None = None,
    background: BackgroundConfig | Mapping[str, Any] | None = None,
    grid: LatLonGrid | None = None,
    engine: Prior | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AnalysisResult:
    """Condition a package's prior on observations, independently at each of several times.

    A member depends only on its time, its number, the seed and the observations of its time (up to
    round-off), not on the other times of the call, the size of the ensemble or the batch. It is
    computed on the device of the package's operator.

    Args:
        package: The prior.
        observations: Reports: a checked table, or an argument of :func:`.read_table`. Rows that
            the package cannot use are left out.
        times: Analysis times, UTC. They are sorted, and repeated times are dropped.
        ensemble: Number of members ``E``.
        seed: Seed of all noise.
        posterior: Options of sampling; None for those of the package.
        quality: Options of quality control: which reports are used, with which errors, and within
            which time of the analysis.
        background: Forecasts that are combined with prior and observations.
        grid: Grid of the result, inside the prior's domain; the prior's own grid if None. If it is
            finer, the prior is sampled at a resolution at least as fine.
        engine: Evaluates the package's prior (:mod:`ddo_modulus.engines`); the operator itself if
            None.
        progress: Called with the number of steps times states done, and their total.

    Returns:
        The analyses and their diagnostics. Attributes of the dataset record the options, the
        number of rows ``dropped`` by reason, and ``notes``, among them what too few steps cost.

    Raises:
        InputError: If an option is out of range, ``times`` is empty, a time has no usable
            observation, an observation has no error and no default error, or the analysis would not
            be finite.
    """
    times = np.unique(np.asarray(times, "datetime64[ns]"))
    if ensemble < 1 or seed < 0 or not len(times):
        raise InputError(
            f"ensemble={ensemble} and the number of times ({len(times)}) must be at least 1, "
            f"seed={seed} not negative"
        )
    config = PosteriorConfig.of(posterior).resolve(package)
    control = QualityControl.of(quality)
    prior = GriddedPrior.of(package, working_shape(package.grid, grid))
    forecast = _forecast(prior, BackgroundConfig.of(background), times)
    table = observations
    if not isinstance(table, ObservationTable):
        table = read_table(table, required=control.missing == "error")
    reports = Reports.select(package, table, times, control)
    for note, count in reports.notes.items():
        _LOG.info("%s: %d reports", note, count)
    analyses, rejected = prepare(
        prior, reports, times, _expected(prior, forecast, config, len(times)), control
    )
    if control.missing == "error":
        refuse_empty(analyses, control)
    run = _Run(
        prior,
        package.operator if engine is None else engine,
        config,
        ensemble,
        seed,
        prior.grid if grid is None else grid,
        StepCounter(len(times) * ensemble * config.steps, progress),
    )
    fields, rows, done = [], [], 0
    for some in batches(analyses, ensemble, config.batch, prior):
        part = None if forecast is None else forecast.select(slice(done, done + len(some)))
        done += len(some)
        states, diagnostics = run.analyse(some, part)
        fields.append(states)
        rows += diagnostics
    dropped = dict(reports.dropped)
    for reason, count in rejected.get("reason", pd.Series(dtype=str)).value_counts().items():
        dropped[str(reason)] = dropped.get(str(reason), 0) + int(count)
    notes = {**reports.notes, **sampling_note(package, config)}
    attributes = run.attributes(control) | {
        "dropped": json.dumps(dropped),
        "notes": json.dumps(notes),
    }
    states = torch.cat(fields).transpose(0, 1)
    dataset = labelled(package, times, states, coordinates(run.grid), attributes)
    table_of_rows = pd.DataFrame(rows)
    left_out = [part for part in (reports.rejected, rejected) if len(part)]
    return AnalysisResult(
        dataset.assign(diagnostic_variables(package, table_of_rows)),
        pd.concat(left_out, ignore_index=True) if left_out else rejected,
        dropped,
        reports.notes,
        table_of_rows.assign(time=times),
    )


@dataclass(frozen=True)
class _Run:
    """Options that the batches of a call share."""

    prior: GriddedPrior
    engine: Prior
    config: PosteriorConfig
    ensemble: int
    seed: int
    grid: LatLonGrid | Any
    counter: StepCounter

    def analyse(
        self, analyses: Sequence[Analysis], forecast: Forecast | None
    ) -> tuple[Float[Tensor, "T E C H W"], list[dict[str, float]]]:
        """Ensembles of some analyses in physical units, and the diagnostics of each analysis."""
        systems = [a.system for a in analyses if a.system is not None]
        system = AnalysisSystem.batch(systems) if systems else None
        factor = self._inflation(system, len(analyses))
        prior = self.engine if self.config.inflation == "none" else Inflated(self.engine, factor)
        parts, chi2 = [], None
        for first in range(0, self.ensemble, self.config.batch):
            members = range(first, min(first + self.config.batch, self.ensemble))
            posterior = prior if forecast is None else forecast.condition(prior, members)
            if system is not None:
                if chi2 is None:
                    chi2 = Innovations.of(system.at_mean(posterior.linear)).chi_square()
                posterior = MomentMatching.configured(posterior, system, self.config)
            parts.append(self._draw(posterior, analyses, members))
        states = torch.cat(parts, 1)
        rows = [
            {"inflation": float(f), "observations": len(a.variables), "dropped": a.dropped}
            for f, a in zip(factor, analyses, strict=True)
        ]
        if system is not None and chi2 is not None:
            background = None if forecast is None else forecast.states.mean(1)
            _add_statistics(rows, analyses, system, chi2, states.double().cpu(), background)
            system.forget()
        return self._physical(states, analyses), rows

    def attributes(self, control: QualityControl) -> dict[str, Any]:
        """Options, as attributes of the dataset."""
        config, (first, last) = (
            self.config,
            (offset / np.timedelta64(1, "s") for offset in control.offsets),
        )
        options = {
            "provenance": json.dumps(self.prior.package.provenance),
            "ensemble": self.ensemble,
            "seed": self.seed,
            "inflation": str(config.inflation),
            "tolerance_seconds": last if first == -last else [first, last],
            "software": f"ddo_modulus {__version__}",
        }
        chosen = config.to_json()
        if None in chosen["guidance_interval"]:  # without an upper end; attributes have no None
            del chosen["guidance_interval"]
        names = ("steps", "solver", "covariance", "iterations", "guidance_interval")
        return options | {name: chosen[name] for name in names if name in chosen}

    def _inflation(self, system: AnalysisSystem | None, analyses: int) -> Float[Tensor, " T"]:
        """Inflation of the prior covariance for each analysis."""
        factor = torch.ones(analyses, dtype=torch.float64)
        if self.config.inflation == "none":
            return factor
        if self.config.inflation != "adaptive":
            return factor * float(self.config.inflation)
        if system is None:
            return factor
        return Innovations.of(system.at_mean(self.prior.linear)).inflation()

    def _draw(
        self, posterior: Prior, analyses: Sequence[Analysis], members: range
    ) -> Float[Tensor, "T E C H W"]:
        """Normalised states of some members of each analysis."""
        if isinstance(self.engine, Recorder):
            posterior = self.engine.captured(posterior)
        package, clock = self.prior.package, np.array([a.time for a in analyses])
        generators = [member_generator(self.seed, t, member) for t in clock for member in members]
        condition = package.conditions(clock.repeat(len(members)))
        device = package.operator.device
        states = sample(
            posterior,
            self.config.scheduler(package.operator.noise),
            len(generators),
            steps=self.config.steps,
            solver=self.config.solver,
            churn=self.config.churn,
            generator=generators,
            shape=self.prior.grid.shape,
            condition=None if condition is None else condition.to(device),
            device=device,
            progress=partial(self.counter, len(generators)),
        )
        return states.unflatten(0, (len(analyses), -1))

    def _physical(
        self, states: Float[Tensor, "T E C H W"], analyses: Sequence[Analysis]
    ) -> Float[Tensor, "T E C H W"]:
        """Convert states to physical units on the grid of the result, float32 on the CPU."""
        clock = np.array([a.time for a in analyses])
        hours = self.prior.package.hours(clock.repeat(self.ensemble))
        physical = self.prior.statistics.denormalize(states.flatten(0, 1), hours)
        on_grid = resampled(physical, self.prior.grid, self.grid)
        return on_grid.unflatten(0, (len(analyses), -1)).float().cpu()


def member_generator(seed: int, time: np.datetime64, member: int) -> torch.Generator:
    """Generator of the noise of one member at one time; on the CPU, so independent of machines."""
    nanoseconds = int(time.astype("datetime64[ns]").astype("int64")) % 2**64
    return generator(seed, nanoseconds, member)


def _forecast(
    prior: GriddedPrior, background: BackgroundConfig | None, times: np.ndarray
) -> Forecast | None:
    """Background states of each time, on the grid of the analysis."""
    if background is None:
        return None
    if background.forecast is None:
        raise InputError("the background has no forecast: give one, valid at the analysis times")
    error = background.field(prior.package)
    states = background_states(prior.package, background.forecast, times, prior.grid)
    return Forecast(states, error)


def _expected(
    prior: GriddedPrior, forecast: Forecast | None, config: PosteriorConfig, analyses: int
) -> list[Any]:
    """Distribution that the reports of each analysis are checked against.

    It is that of the forecast if there is one, otherwise the Gaussian part of the prior.
    """
    if forecast is not None:
        return forecast.expected(prior.noise)
    linear = prior.linear
    if config.inflation not in ("none", "adaptive"):
        linear = linear.inflated(float(config.inflation))
    return [linear] * analyses


def _add_statistics(
    rows: list[dict[str, float]],
    analyses: Sequence[Analysis],
    system: AnalysisSystem,
    chi2: Float[Tensor, " T"],
    states: Float[Tensor, "T E C H W"],
    background: Float[Tensor, "T C H W"] | None,
) -> None:
    """Add statistics of innovations (O-B) and residuals (O-A) to the diagnostics."""
    operator = system.observations.operator
    values = per_member(system.observations.values.reshape(-1, operator.size), len(analyses))
    before = torch.zeros_like(states[:, 0]) if background is None else background
    after = operator(states.flatten(0, 1)).unflatten(0, states.shape[:2]).mean(1)
    differences = {"omb": values - operator(before), "oma": values - after}
    for i, (row, analysis) in enumerate(zip(rows, analyses, strict=True)):
        row["chi2"] = float(chi2[i]) / len(analysis.variables)
        for variable in np.unique(analysis.variables):
            kind = np.flatnonzero(analysis.variables == variable)
            for name, difference in differences.items():
                row[f"{variable}_{name}"] = float(difference[i, kind].square().mean().sqrt())
