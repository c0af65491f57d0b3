# SPDX-License-Identifier: Apache-2.0
"""Analyses: a package and observations in, ensembles of states in physical units out.

Axes: ``T`` analysis times, ``E`` members, ``B = T E`` states (members of an analysis next to each
other), ``C`` channel, ``H W`` grid, ``M`` observations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ddo_modulus import __version__
from ddo_modulus.data.table import ERROR_COLUMN, NO_TOLERANCE, ObservationTable
from ddo_modulus.data.variables import CELL_MEANS, long_name
from ddo_modulus.errors import InputError
from ddo_modulus.grid import Grid, LatLonGrid
from ddo_modulus.linalg import spread
from ddo_modulus.observations import (
    LinearOperator,
    ObservationOperator,
    Observations,
    PointOperator,
    StackedOperator,
    wind_speed,
)
from ddo_modulus.package import Package
from ddo_modulus.posterior import Inflated, Innovations, MomentMatching
from ddo_modulus.sampling import StepCounter, sample

#: Error standard deviations of station reports, what a grid cell cannot represent included, in
#: the lexicon's units: for observations that come without one.
TYPICAL_ERROR: Mapping[str, float] = {
    "t2m": 1.0,
    "d2m": 1.5,
    "u10m": 1.5,
    "v10m": 1.5,
    "ws10m": 1.5,
    "msl": 100.0,
    "sp": 100.0,
}

Inflation = Literal["none", "adaptive"] | float

# Largest number of values in the rows H L E of the analyses that are solved together (float32).
_MAX_ROWS = 2**27


@dataclass(frozen=True)
class _Analysis:
    """What is assimilated at one time: ``variables`` ``(M,)`` tells the kind of each value."""

    time: np.datetime64
    observations: Observations
    variables: np.ndarray
    dropped: int

    @property
    def linear(self) -> bool:
        return isinstance(self.observations.operator, LinearOperator)


def usable(package: Package, table: ObservationTable) -> ObservationTable:
    """Leave out, and count, the rows that a package's prior says nothing about.

    Args:
        package: The prior.
        table: Checked observations.

    Returns:
        The rows of the package's channels, or of a wind speed that follows from them, which lie in
        its grid.

    Raises:
        InputError: If none is left.
    """
    if package.task.frames > 1:
        raise InputError(
            f"the package's states are windows of {package.task.frames} frames; take a package of "
            "single states (trajectories are assimilated in Python, by TrajectoryDenoiser)"
        )
    frame, dropped, grid = table.frame, dict(table.dropped), package.grid
    known = frame["variable"].isin(observable(package, frame["variable"].unique()))
    if not known.any():
        raise InputError(
            f"no observations of {', '.join(package.channels)}, the package's variables; the "
            f"table has {', '.join(sorted(frame['variable'].unique()))}"
        )
    inside = grid.contains(frame["lat"], frame["lon"])
    if not (known & inside).any():
        raise InputError(
            f"none of the {int(known.sum())} observations is in the package's grid (lat "
            f"{grid.lat.min():g} to {grid.lat.max():g}, lon {grid.lon.min():g} to "
            f"{grid.lon.max():g}); the first is at lat={frame['lat'][known].iloc[0]:g}, "
            f"lon={frame['lon'][known].iloc[0]:g}. Choose another package or other stations"
        )
    for reason, bad in (("unknown variable", ~known), ("outside the grid", known & ~inside)):
        if bad.any():
            dropped[reason] = dropped.get(reason, 0) + int(bad.sum())
    return ObservationTable(frame[known & inside].reset_index(drop=True), dropped)


def observable(package: Package, variables: Iterable[str]) -> list[str]:
    """Those of some variables that are channels of a package or a wind speed from two of them."""
    return [v for v in variables if v in package.channels or _components(package, v)]


def assimilate(
    package: Package,
    table: ObservationTable,
    times: Sequence[np.datetime64] | np.ndarray,
    *,
    ensemble: int = 32,
    seed: int = 0,
    inflation: Inflation = "adaptive",
    tolerance: np.timedelta64 = NO_TOLERANCE,
    default_error: float | Mapping[str, float] | None = None,
    steps: int | None = None,
    solver: str | None = None,
    covariance: str | None = None,
    iterations: int | None = None,
    batch: int = 256,
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
        tolerance: Largest distance in time of an observation, either way.
        default_error: Error standard deviation, in physical units, where the table has none: one
            for all, or by variable; :data:`TYPICAL_ERROR` for the others.
        steps: Noise levels; the package's own if None, and so below.
        solver: One of :data:`~ddo_modulus.sampling.SOLVERS`.
        covariance: See :class:`~ddo_modulus.posterior.MomentMatching`.
        iterations: See :class:`~ddo_modulus.posterior.MomentMatching`.
        batch: States computed together; bounds the memory.
        progress: Called with the number of steps of states done and their total.

    Returns:
        Every channel on ``(ensemble, time, lat, lon)``, float32 in physical units, and on ``time``:
        ``inflation``; ``observations`` used and rows ``dropped``; ``chi2``, the squared
        innovations over their expectation (one if prior and errors are calibrated); for every
        variable observed, ``<variable>_omb`` and ``<variable>_oma``, the RMS of observation minus
        background (the prior's mean) and minus analysis mean. Attributes record the options.

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
    chosen = usable(package, table)
    analyses = _prepare(package, table, chosen, times, tolerance, default_error)
    own = package.sampling
    options: dict[str, Any] = {
        "ensemble": ensemble,
        "seed": seed,
        "inflation": str(inflation),
        "tolerance_seconds": tolerance / np.timedelta64(1, "s"),
        "steps": own.steps if steps is None else steps,
        "solver": own.solver if solver is None else solver,
        "covariance": own.covariance if covariance is None else covariance,
        "iterations": own.iterations if iterations is None else iterations,
    }
    counted = StepCounter(len(times) * ensemble * options["steps"], progress)
    fields, diagnostics = [], []
    for chunk in _chunks(analyses, ensemble, batch, package):
        observations = chunk[0].observations
        if len(chunk) > 1:
            observations = Observations.batch([analysis.observations for analysis in chunk])
        innovations = Innovations.of(package.operator, package.operator.noise, observations)
        factor = torch.ones(len(chunk), dtype=torch.float64)
        if inflation == "adaptive":
            factor = innovations.inflation()
        elif inflation != "none":
            factor = factor * float(inflation)
        posterior = MomentMatching(
            package.operator if inflation == "none" else Inflated(package.operator, factor),
            package.operator.noise,
            observations,
            covariance=options["covariance"],
            iterations=options["iterations"],
        )
        clock = np.array([analysis.time for analysis in chunk])
        parts = []
        for first in range(0, ensemble, batch):  # in one go, unless there is but one analysis
            members = range(first, min(first + batch, ensemble))
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
                condition=None if condition is None else condition.to(device),
                device=device,
                progress=partial(counted, len(generators)),
            )
            parts.append(states.unflatten(0, (len(chunk), -1)))
        states = torch.cat(parts, 1)
        hours = package.hours(clock.repeat(ensemble))
        physical = package.normalization.denormalize(states.flatten(0, 1), hours)
        fields.append(physical.unflatten(0, (len(chunk), -1)).float().cpu())
        chi2 = innovations.chi_square(factor)
        misfits = _misfits(observations, states.double().cpu())
        for i, analysis in enumerate(chunk):
            used = len(analysis.variables)
            row = {
                "inflation": float(factor[i]),
                "observations": used,
                "dropped": analysis.dropped,
                "chi2": float(chi2[i]) / used,
            }
            for variable in np.unique(analysis.variables):
                kind = np.flatnonzero(analysis.variables == variable)
                for name, misfit in misfits.items():
                    row[f"{variable}_{name}"] = float(misfit[i, kind].square().mean().sqrt())
            diagnostics.append(row)
    attributes = {
        "provenance": json.dumps(package.provenance),
        **options,
        "dropped": json.dumps(chosen.dropped),
        "software": f"ddo_modulus {__version__}",
    }
    axes = coordinates(package.grid)
    dataset = labelled(package, times, torch.cat(fields).transpose(0, 1), axes, attributes)
    return dataset.assign(_diagnostics(package, pd.DataFrame(diagnostics)))


def member_generator(seed: int, time: np.datetime64, member: int) -> torch.Generator:
    """Source of the noise of one member at one time, on the CPU: the same on every machine."""
    nanoseconds = int(time.astype("datetime64[ns]").astype("int64")) % 2**64
    state = np.random.SeedSequence([seed, nanoseconds, member]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _prepare(
    package: Package,
    table: ObservationTable,
    chosen: ObservationTable,
    times: np.ndarray,
    tolerance: np.timedelta64,
    default_error: float | Mapping[str, float] | None,
) -> list[_Analysis]:
    """Sort the usable rows out by time, and express them in the operator's units."""
    try:
        windows = chosen.at(times, tolerance)
    except InputError as error:
        outside = chosen.dropped.get("outside the grid", 0)
        hint = f" ({outside} observations outside the grid do not count)" if outside else ""
        raise InputError(f"{error}{hint}") from None
    given = [len(window) for window in table.at(times, tolerance)]
    analyses = []
    for time, rows, count in zip(times, windows, given, strict=True):
        rows = rows.assign(**{ERROR_COLUMN: _errors(rows, default_error)})
        analyses.append(_analysis(package, time, rows, count - len(rows)))
    return analyses


def _errors(rows: pd.DataFrame, default: float | Mapping[str, float] | None) -> pd.Series:
    """Error standard deviations, with defaults where there is none."""
    error = rows[ERROR_COLUMN]
    if isinstance(default, (int, float)):
        return error.fillna(float(default))
    error = error.fillna(rows["variable"].map({**TYPICAL_ERROR, **(default or {})}))
    if error.isna().any():
        variables = sorted(rows["variable"][error.isna()].unique())
        raise InputError(
            f"observations of {', '.join(variables)} have no {ERROR_COLUMN}, and there is no "
            f"default for them: add the column, or give default_error={{{variables[0]}:...}}, the "
            "standard deviation in physical units"
        )
    return error.astype(float)


def _analysis(package: Package, time: np.datetime64, rows: pd.DataFrame, dropped: int) -> _Analysis:
    """Observations of one time; those of a channel first, wind speeds after."""

    def points(part: pd.DataFrame, variables: Iterable[str]) -> PointOperator:
        channels = [package.channels.index(v) for v in variables]
        return PointOperator(package.grid, part["lat"], part["lon"], channels)

    direct = rows["variable"].isin(package.channels)
    operators: list[ObservationOperator] = []
    parts = []
    if direct.any():
        parts.append(rows[direct])
        operators.append(points(parts[-1], parts[-1]["variable"]))
    for variable, part in rows[~direct].groupby("variable"):
        u, v = _components(package, str(variable)) or ("", "")
        parts.append(part)
        operators.append(wind_speed(points(part, [u] * len(part)), points(part, [v] * len(part))))
    rows = pd.concat(parts)
    observations = Observations(
        operators[0] if len(operators) == 1 else StackedOperator(*operators),
        torch.from_numpy(rows["observation"].to_numpy(copy=True)),
        torch.from_numpy(rows[ERROR_COLUMN].to_numpy(copy=True)) ** 2,
    )
    statistics = package.normalization
    hour = int(package.hours(np.array([time]))[0]) if statistics.per_hour else 0
    shape = (len(package.channels), *package.grid.shape)
    mean, std = (t[hour].double().cpu().expand(shape) for t in (statistics.mean, statistics.std))
    rescaled = observations.rescale(mean, std)
    return _Analysis(time, rescaled, rows["variable"].to_numpy(), dropped)


def _components(package: Package, variable: str) -> tuple[str, str] | None:
    """The channels whose wind speed a variable is, if there are."""
    speed = re.fullmatch(r"ws(\d+m?)", variable)
    pair = (f"u{speed[1]}", f"v{speed[1]}") if speed else ("", "")
    return pair if set(pair) <= set(package.channels) else None


def _chunks(
    analyses: Sequence[_Analysis], ensemble: int, batch: int, package: Package
) -> Iterator[list[_Analysis]]:
    """Consecutive analyses that are solved together; those that are not linear by themselves."""
    modes = len(package.channels) * package.operator.noise.basis.size
    chunk: list[_Analysis] = []
    for analysis in analyses:
        longer = [*chunk, analysis]
        rows = max(len(a.variables) for a in longer) * len(longer) * modes
        fits = len(longer) * ensemble <= batch and rows <= _MAX_ROWS
        if chunk and not (fits and all(a.linear for a in longer)):
            yield chunk
            longer = [analysis]
        chunk = longer
    yield chunk


def _misfits(observations: Observations, states: Tensor) -> dict[str, Tensor]:
    """Observation minus background and minus analysis mean ``(T, M)``, of states (T E C H W)."""
    operator = observations.operator
    values = observations.values.reshape(-1, operator.size)
    background = torch.zeros_like(states[:, 0])
    analysis = operator(states.flatten(0, 1)).unflatten(0, states.shape[:2]).mean(1)
    return {
        "omb": spread(values, len(states)) - operator(background),
        "oma": spread(values, len(states)) - analysis,
    }


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
        unit = units.get(variable, units.get(variable.replace("ws", "u", 1), "1"))
        label = {"units": unit if variable else "1", "long_name": names[kind]}
        data[str(column)] = ("time", rows[column].to_numpy(), label)
    return data
