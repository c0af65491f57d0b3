# SPDX-License-Identifier: Apache-2.0
"""Analyses: a package and observations in, ensembles of states in physical units out.

Axes: ``T`` analysis times, ``E`` members, ``B = T E`` states (members of an analysis next to each
other), ``C`` channel, ``H W`` grid, ``M`` observations.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ddo_modulus import __version__
from ddo_modulus.diffusion.noise import level_range
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.prior import Denoiser, Engine, Recorder
from ddo_modulus.diffusion.samplers import StepCounter, sample
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.fields.grid import Grid, LatLonGrid, resampled
from ddo_modulus.fields.linalg import spread
from ddo_modulus.inference.backgrounds import LENGTH_KM, background_error_field, background_states
from ddo_modulus.inference.preparation import (
    Analysis,
    View,
    chunks,
    operators_at,
    prepare,
    refuse_empty,
    windows,
    working_shape,
)
from ddo_modulus.inference.preparation import report_operators as report_operators
from ddo_modulus.inference.preparation import usable as usable
from ddo_modulus.inference.quality import GROSS_ERROR, QualityControl
from ddo_modulus.lexicon import CELL_MEANS, long_name, reported_range
from ddo_modulus.observations import Observations, ReportOperators
from ddo_modulus.observations.table import NO_TOLERANCE, ObservationTable, Tolerance
from ddo_modulus.posterior import Background, Inflated, Innovations, MomentMatching
from ddo_modulus.random import generator

_LOG = logging.getLogger(__name__)

Inflation = Literal["none", "adaptive"] | float


def assimilate(
    package: Package,
    table: ObservationTable,
    times: Sequence[np.datetime64] | np.ndarray,
    *,
    ensemble: int = 32,
    seed: int = 0,
    inflation: Inflation = "adaptive",
    tolerance: Tolerance = NO_TOLERANCE,
    default_error: float | Mapping[str, float] | None = None,
    operators: ReportOperators | None = None,
    gross_error: float | None = GROSS_ERROR,
    duplicates: str = "keep",
    thinning_km: float | None = None,
    superob_km: float | None = None,
    background: xr.Dataset | None = None,
    background_error: float | Mapping[str, float] | GaussianField | None = None,
    background_length: float = LENGTH_KM,
    grid: LatLonGrid | None = None,
    missing: Literal["error", "prior"] = "error",
    rejected: Callable[[pd.DataFrame], None] | None = None,
    steps: int | None = None,
    solver: str | None = None,
    covariance: str | None = None,
    iterations: int | None = None,
    jacobian_range: Sequence[float] | None = None,
    batch: int = 256,
    engine: Engine | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Condition a package's prior on observations, at each of a list of times by itself.

    A member depends on its time, its number, the seed and the observations within ``tolerance`` of
    its time, and on nothing else (up to round-off): not on the other times of the call, the size
    of the ensemble or ``batch``. It computes where the package's operator is.

    Args:
        package: The prior.
        table: Checked observations; rows that the package cannot use are left out.
        times: Analysis times, UTC; sorted, and repetitions dropped.
        ensemble: Members ``E``.
        seed: Of all noise.
        inflation: Factor on the prior's covariance: a number, ``"none"``, or ``"adaptive"``, the
            most probable one given the innovations of each analysis (:mod:`.inflation`).
        tolerance: Largest distance in time of an observation, either way; or its first and last
            offset.
        default_error: Error standard deviation, in physical units, where the table has none: one
            for all, or by variable; :data:`~ddo_modulus.observations.TYPICAL_ERROR` for the others.
        operators: How reports are read from the prior; :func:`report_operators` if None.
        gross_error: Largest innovation, in the standard deviations that prior (with a background,
            its errors) and observation error let expect (:mod:`.quality`); None for any.
        duplicates: ``"average"`` makes one report of those of a kind, place and time; ``"keep"``
            takes them as independent.
        thinning_km: Keep one report of a kind in each cell of this height, the nearest in time.
        superob_km: Or average them, with the error that is left.
        background: Forecast for each time, in physical units (:func:`.background_states`): what
            prior and observations are combined with. Of several members each is that of a
            posterior member, in turn.
        background_error: Standard deviation of its errors, in physical units, one for all channels
            or by channel; or their law in the operator's units. Of an ensemble, the errors that
            its members do not show (:mod:`.posterior.background`).
        background_length: Their correlation length, km (a box's own units).
        grid: Where the analysis is wanted, inside the prior's domain; the prior's own grid if None.
            On a finer one, the prior is sampled at a resolution as fine.
        missing: What to do at a time without usable observations: ``"error"``, or ``"prior"``,
            draw what is known without them.
        rejected: Called once, before anything is drawn, with the reports left out: their columns,
            the ``reason`` and, where it was of an analysis, its ``analysis_time``.
        steps: Noise levels; the package's own if None, and so below.
        solver: One of :data:`~ddo_modulus.diffusion.samplers.SOLVERS`.
        covariance: See :class:`~ddo_modulus.posterior.MomentMatching`.
        iterations: See :class:`~ddo_modulus.posterior.MomentMatching`.
        jacobian_range: See :class:`~ddo_modulus.posterior.MomentMatching`; ``[0, inf]`` is all
            levels.
        batch: States computed together; bounds the memory.
        engine: What computes the package's denoiser (:mod:`ddo_modulus.engines`); the operator
            itself if None.
        progress: Called with the number of steps of states done and their total.

    Returns:
        Every channel on ``(ensemble, time, lat, lon)``, float32 in physical units, and on ``time``:
        ``inflation``; ``observations`` used and rows ``dropped``; ``chi2``, the squared
        innovations over their expectation (one if prior and errors are calibrated); for every
        variable observed, ``<variable>_omb`` and ``<variable>_oma``, the RMS of observation minus
        background (without one, the prior's mean) and minus analysis mean. Attributes record the
        options, the rows ``dropped`` by reason, and ``notes``: reports that are used with a
        reservation.

    Raises:
        InputError: If an option is out of range, no time is given, there is no usable observation
            for one of them, or an observation error is unknown.
    """
    times = np.unique(np.asarray(times, "datetime64[ns]"))
    if ensemble < 1 or batch < 1 or seed < 0 or not len(times):
        raise InputError(
            f"ensemble={ensemble}, batch={batch} and the number of times ({len(times)}) must be "
            f"at least 1, seed={seed} not negative"
        )
    if isinstance(inflation, str) and inflation not in ("none", "adaptive"):
        raise InputError(f"inflation={inflation!r} must be 'none', 'adaptive' or a number")
    own = package.sampling
    chosen_levels = level_range(
        own.jacobian_range if jacobian_range is None else jacobian_range, "jacobian_range"
    )
    if missing not in ("error", "prior"):
        raise InputError(f"missing={missing!r} must be 'error' or 'prior'")
    control = QualityControl(gross_error, duplicates, thinning_km, superob_km)
    operators = report_operators(package) if operators is None else operators
    view = View.of(package, working_shape(package.grid, grid))
    forecast, error = _forecast(view, background, background_error, background_length, times)
    chosen = usable(package, table, operators, required=missing == "error")
    notes = operators.notes(chosen.frame)
    for note, count in notes.items():
        _LOG.info("%s: %d reports", note, count)
    known = [view.prior] * len(times)
    if forecast is not None and error is not None:  # the forecast is the better judge of the two
        known = [_judge(view, one, error.at(view.grid.shape)) for one in forecast]
    elif not isinstance(inflation, str):
        known = [view.prior.inflated(inflation)] * len(times)
    analyses, left_out = prepare(
        view,
        windows(table, chosen, times, tolerance, required=missing == "error"),
        times,
        known,
        control,
        default_error,
        operators_at(operators, package.grid, view.grid),
    )
    if missing == "error":
        refuse_empty(analyses, control)
    dropped = dict(chosen.dropped)
    for reason, count in left_out.get("reason", pd.Series(dtype=str)).value_counts().items():
        dropped[str(reason)] = dropped.get(str(reason), 0) + int(count)
    if rejected is not None:
        tables = [table for table in (chosen.rejected, left_out) if len(table)]
        rejected(pd.concat(tables, ignore_index=True) if tables else left_out)
    options: dict[str, Any] = {
        "ensemble": ensemble,
        "seed": seed,
        "inflation": str(inflation),
        "tolerance_seconds": (
            [offset / np.timedelta64(1, "s") for offset in tolerance]
            if isinstance(tolerance, tuple)
            else tolerance / np.timedelta64(1, "s")
        ),
        "steps": own.steps if steps is None else steps,
        "solver": own.solver if solver is None else solver,
        "covariance": own.covariance if covariance is None else covariance,
        "iterations": own.iterations if iterations is None else iterations,
        "jacobian_range": chosen_levels,
    }
    denoiser = package.operator if engine is None else engine
    counted = StepCounter(len(times) * ensemble * options["steps"], progress)
    fields: list[Tensor] = []
    diagnostics: list[dict[str, float]] = []
    at, axes = 0, view.grid if grid is None else grid
    for chunk in chunks(analyses, ensemble, batch, view):
        guess = None if forecast is None else forecast[at : at + len(chunk)]
        at += len(chunk)
        parts_observed = [a.observations for a in chunk if a.observations is not None]
        observations = None
        if parts_observed:
            many = len(chunk) > 1
            observations = Observations.batch(parts_observed) if many else parts_observed[0]
        factor = torch.ones(len(chunk), dtype=torch.float64)
        if inflation == "adaptive" and observations is not None:
            factor = Innovations.of(package.operator, view.noise, observations).inflation()
        elif inflation not in ("none", "adaptive"):
            factor = factor * float(inflation)
        prior: Denoiser = denoiser if inflation == "none" else Inflated(denoiser, factor)
        clock = np.array([analysis.time for analysis in chunk])
        fits, parts = None, []
        for first in range(0, ensemble, batch):  # in one go, unless there is but one analysis
            members = range(first, min(first + batch, ensemble))
            posterior = _with_forecast(prior, view, guess, error, members)
            if observations is not None:
                if fits is None:
                    fits = Innovations.of(posterior, view.noise, observations)
                posterior = MomentMatching(
                    posterior,
                    view.noise,
                    observations,
                    covariance=options["covariance"],
                    iterations=options["iterations"],
                    jacobian_range=options["jacobian_range"],
                )
            if isinstance(engine, Recorder):
                posterior = engine.captured(posterior)
            generators = [member_generator(seed, t, member) for t in clock for member in members]
            condition = package.conditions(clock.repeat(len(members)))
            device = package.operator.device
            states = sample(
                posterior,
                package.scheduler(),
                len(generators),
                steps=options["steps"],
                solver=options["solver"],
                generator=generators,
                shape=view.grid.shape,
                condition=None if condition is None else condition.to(device),
                device=device,
                progress=partial(counted, len(generators)),
            )
            parts.append(states.unflatten(0, (len(chunk), -1)))
        states = torch.cat(parts, 1)
        hours = package.hours(clock.repeat(ensemble))
        physical = view.statistics.denormalize(states.flatten(0, 1), hours)
        fields.append(
            resampled(physical, view.grid, axes).unflatten(0, (len(chunk), -1)).float().cpu()
        )
        rows = [
            {"inflation": float(factor[i]), "observations": len(a.variables), "dropped": a.dropped}
            for i, a in enumerate(chunk)
        ]
        if observations is not None and fits is not None:
            _tell(rows, chunk, observations, fits, states.double().cpu(), guess)
        diagnostics += rows
    attributes = {
        "provenance": json.dumps(package.provenance),
        **{name: value for name, value in options.items() if value is not None},
        "dropped": json.dumps(dropped),
        "notes": json.dumps(notes),
        "software": f"ddo_modulus {__version__}",
    }
    found = torch.cat(fields).transpose(0, 1)
    dataset = labelled(package, times, found, coordinates(axes), attributes)
    return dataset.assign(_diagnostics(package, pd.DataFrame(diagnostics)))


def member_generator(seed: int, time: np.datetime64, member: int) -> torch.Generator:
    """Source of the noise of one member at one time, on the CPU: the same on every machine."""
    nanoseconds = int(time.astype("datetime64[ns]").astype("int64")) % 2**64
    return generator(seed, nanoseconds, member)


def _tell(
    rows: list[dict[str, float]],
    chunk: Sequence[Analysis],
    observations: Observations,
    fits: Innovations,
    states: Float[Tensor, "T E C H W"],
    guess: Float[Tensor, "T E C H W"] | None,
) -> None:
    """Add the statistics of the innovations to the diagnostics of each analysis."""
    operator = observations.operator
    values = spread(observations.values.reshape(-1, operator.size), len(chunk))
    background = torch.zeros_like(states[:, 0]) if guess is None else guess.mean(1)
    analysis = operator(states.flatten(0, 1)).unflatten(0, states.shape[:2]).mean(1)
    misfits = {"omb": values - operator(background), "oma": values - analysis}
    chi2 = fits.chi_square(torch.ones(len(chunk), dtype=torch.float64))
    for i, (row, one) in enumerate(zip(rows, chunk, strict=True)):
        row["chi2"] = float(chi2[i]) / len(one.variables)
        for variable in np.unique(one.variables):
            kind = np.flatnonzero(one.variables == variable)
            for name, misfit in misfits.items():
                row[f"{variable}_{name}"] = float(misfit[i, kind].square().mean().sqrt())


def _with_forecast(
    prior: Denoiser,
    view: View,
    guess: Float[Tensor, "T E C H W"] | None,
    error: GaussianField | None,
    members: range,
) -> Denoiser:
    """A prior, and the forecasts of some members of each analysis."""
    if guess is None or error is None:
        return prior
    if guess.shape[1] > 1:
        guess = guess[:, [member % guess.shape[1] for member in members]]
    return Background(prior, view.noise, guess.flatten(0, 1), error)


def _judge(
    view: View, forecast: Float[Tensor, "E C H W"], error: GaussianField
) -> GaussianDenoiser:
    """What a forecast of one time lets expect: its mean, with errors and the members' spread."""
    factor = 1.0
    if len(forecast) > 1:
        stated = (error.basis.mean_square() * error.variance).sum(1).mean()
        factor += float(forecast.var(0).mean() / stated)
    return GaussianDenoiser(forecast.mean(0), error, view.noise, factor)


def _forecast(
    view: View,
    background: xr.Dataset | None,
    error: float | Mapping[str, float] | GaussianField | None,
    length: float,
    times: np.ndarray,
) -> tuple[Float[Tensor, "T E C H W"] | None, GaussianField | None]:
    """Background states of each time, and the law of their errors on the prior's basis."""
    if (background is None) != (error is None):
        raise InputError("a background needs background_error, its standard deviation by channel")
    if background is None or error is None:
        return None, None
    if not isinstance(error, GaussianField):
        error = background_error_field(view.package, error, length)
    return background_states(view.package, background, times, view.grid), error


def labelled(
    package: Package,
    times: np.ndarray,
    fields: Float[Tensor, "E T C H W"],
    axes: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> xr.Dataset:
    """Dataset of a package's channels, from fields in physical units.

    Args:
        package: Names the channels and their units.
        times: ``(T,)`` UTC.
        fields: In physical units.
        axes: The coordinates of a grid (:func:`coordinates`).
        attributes: Of the dataset.
    """
    means = package.operator.refinement.cell_means
    methods = {"cell_methods": CELL_MEANS} if means else {}
    data = {
        channel: (
            ("ensemble", "time", "lat", "lon"),
            fields[:, :, i].contiguous().numpy(),
            {"units": unit, "long_name": long_name(channel), **methods},
        )
        for i, (channel, unit) in enumerate(zip(package.channels, package.units, strict=True))
    }
    members = np.arange(len(fields))
    return xr.Dataset(data, {"ensemble": members, "time": times, **axes}, attrs=dict(attributes))


def coordinates(grid: Grid) -> dict[str, Any]:
    """Latitude and longitude of a grid, or the two axes of a box, for a dataset."""
    spherical = isinstance(grid, LatLonGrid)
    axes = (("lat", "degrees_north", "y"), ("lon", "degrees_east", "x"))
    return {
        name: (
            name,
            getattr(grid, name),
            {"units": degrees} if spherical else {"units": "1", "long_name": letter},
        )
        for name, degrees, letter in axes
    }


def _diagnostics(package: Package, rows: pd.DataFrame) -> dict[str, Any]:
    """Variables of a dataset on ``time``, of one row for each time."""
    units = dict(zip(package.channels, package.units, strict=True))
    known = {str(c).rpartition("_")[0] for c in rows} - units.keys()
    units |= {v: found.units for v in known if (found := reported_range(v)) is not None}
    names = {
        "inflation": "factor on the prior's covariance",
        "observations": "observations used",
        "dropped": "observations left out",
        "chi2": "squared innovations over their expectation",
        "omb": "RMS of observation minus background",
        "oma": "RMS of observation minus analysis mean",
    }
    data: dict[str, Any] = {}
    for column in rows:
        variable, _, kind = str(column).rpartition("_")
        label = {"units": units.get(variable, "1"), "long_name": names[kind]}
        data[str(column)] = ("time", rows[column].to_numpy(), label)
    return data
