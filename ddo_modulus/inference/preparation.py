# SPDX-License-Identifier: Apache-2.0
"""Which reports go into which analysis, in the units of a package's operator.

Axes: ``T`` analysis times, ``E`` members, ``C`` channel, ``H W`` grid, ``M`` observations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.prior import linear_part
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.fields.grid import Grid, LatLonGrid, resampled
from ddo_modulus.inference.quality import QualityControl, departures, gross_errors
from ddo_modulus.observations import LinearOperator, Observations, ReportOperators, typical_error
from ddo_modulus.observations.reports import UNKNOWN
from ddo_modulus.observations.table import ERROR_COLUMN, ObservationTable, Tolerance

# Largest number of values in the rows H L E of the analyses that are solved together (float32).
_MAX_ROWS = 2**27


@dataclass(frozen=True)
class Analysis:
    """What is assimilated at one time: ``variables`` ``(M,)`` tells the kind of each value."""

    time: np.datetime64
    observations: Observations | None  # None: there are none
    variables: np.ndarray
    dropped: int

    @property
    def linear(self) -> bool:
        """Whether its observations are linear in the state."""
        return self.observations is not None and isinstance(
            self.observations.operator, LinearOperator
        )


@dataclass(frozen=True)
class View:
    """A package on a grid of its domain."""

    package: Package
    grid: Grid
    statistics: Normalization
    noise: GaussianField

    @classmethod
    def of(cls, package: Package, shape: tuple[int, int]) -> View:
        """On a number of points."""
        grid = package.grid.at(shape)
        return cls(package, grid, package.statistics_at(grid), package.operator.noise.at(shape))

    @cached_property
    def prior(self) -> GaussianDenoiser:
        """Gaussian part of the prior."""
        return linear_part(self.package.operator, self.noise)


def usable(
    package: Package,
    table: ObservationTable,
    operators: ReportOperators | None = None,
    *,
    required: bool = True,
) -> ObservationTable:
    """Leave out, and remember, the rows that a package's prior says nothing about.

    Args:
        package: The prior.
        table: Checked observations.
        operators: How reports are read from the prior; :func:`report_operators` if None.
        required: Whether there must be such rows.

    Returns:
        The rows that follow from the package's channels (:mod:`.observations.reports`) and lie in
        its grid.

    Raises:
        InputError: If none is left.
    """
    if package.task.frames > 1:
        raise InputError(
            f"the package's states are windows of {package.task.frames} frames; take a package of "
            "single states (trajectories are assimilated in Python, by TrajectoryPrior)"
        )
    operators = report_operators(package) if operators is None else operators
    frame, grid = table.frame, package.grid
    refused = operators.refused(frame)
    known = refused != UNKNOWN
    if required and not known.any():
        raise InputError(
            f"no observations of {', '.join(package.channels)}, the package's variables; the "
            f"table has {', '.join(sorted(frame['variable'].unique()))}"
        )
    inside = grid.contains(frame["lat"], frame["lon"])
    if required and not (known & inside).any():
        raise InputError(
            f"none of the {int(known.sum())} observations is in the package's grid (lat "
            f"{grid.lat.min():g} to {grid.lat.max():g}, lon {grid.lon.min():g} to "
            f"{grid.lon.max():g}); the first is at lat={frame['lat'][known].iloc[0]:g}, "
            f"lon={frame['lon'][known].iloc[0]:g}. Choose another package or other stations"
        )
    refused = refused.where(inside | ~known, "outside the grid")
    reasons = {str(reason): int(n) for reason, n in refused.value_counts().items() if reason}
    if required and len(reasons) and (refused != "").all():
        listed = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        raise InputError(
            f"none of the {len(frame)} observations can be compared with the package's "
            f"{', '.join(package.channels)} ({listed})"
        )
    left = table.without(refused)
    return replace(left, frame=left.frame.reset_index(drop=True))


def report_operators(package: Package) -> ReportOperators:
    """How reports are read from a package's states; ``dataclasses.replace`` changes its options."""
    return ReportOperators(package.channels, package.grid, package.orography)


def operators_at(operators: ReportOperators, own: Grid, grid: Grid) -> ReportOperators:
    """The same on another grid of the domain."""
    if grid.shape == own.shape:
        return operators
    orography = operators.orography
    if orography is not None:
        orography = resampled(torch.from_numpy(orography), own, grid).numpy()
    return replace(operators, grid=grid, orography=orography)


def working_shape(own: Grid, wanted: LatLonGrid | None) -> tuple[int, int]:
    """Grid of the prior's domain to draw on so that a grid inside it can be read off.

    The prior's own, or one that is nowhere coarser than the grid wanted.

    Raises:
        InputError: If that is not wholly inside the domain.
    """
    if wanted is None:
        return own.shape
    if not isinstance(own, LatLonGrid):
        raise InputError("a grid in degrees is for a prior in degrees; this one lives on a box")
    steps = [
        (np.abs(np.diff(a)[0]), np.abs(np.diff(b)[0]), len(a))
        for a, b in ((own.lat, wanted.lat), (own.lon, wanted.lon))
    ]
    height, width = (
        count if fine > 0.999 * coarse else int(np.ceil(count * coarse / fine - 1e-6))
        for coarse, fine, count in steps
    )
    points = np.meshgrid(wanted.lat, wanted.lon, indexing="ij")
    if not own.at((height, width)).contains(*points).all():
        raise InputError(
            f"the grid wanted (lat {wanted.lat.min():g} to {wanted.lat.max():g}, lon "
            f"{wanted.lon.min():g} to {wanted.lon.max():g}) reaches beyond the prior's (lat "
            f"{own.lat.min():g} to {own.lat.max():g}, lon {own.lon.min():g} to {own.lon.max():g})"
        )
    return height, width


def windows(
    table: ObservationTable,
    chosen: ObservationTable,
    times: np.ndarray,
    tolerance: Tolerance,
    *,
    required: bool = True,
) -> list[tuple[pd.DataFrame, int]]:
    """The usable rows for each time, and how many others there are.

    Raises:
        InputError: If there are none for a time, and ``required``.
    """
    try:
        rows = chosen.at(times, tolerance, required=required)
    except InputError as error:
        outside = chosen.dropped.get("outside the grid", 0)
        hint = f" ({outside} observations outside the grid do not count)" if outside else ""
        raise InputError(f"{error}{hint}") from None
    given = [len(window) for window in table.at(times, tolerance, required=required)]
    return [(own, count - len(own)) for own, count in zip(rows, given, strict=True)]


def prepare(
    view: View,
    given: Sequence[tuple[pd.DataFrame, int]],
    times: np.ndarray,
    known: Sequence[GaussianDenoiser],
    control: QualityControl,
    default_error: float | Mapping[str, float] | None,
    operators: ReportOperators,
) -> tuple[list[Analysis], pd.DataFrame]:
    """Check the reports of each time, and express them in the operator's units.

    Args:
        view: The prior on the grid of the analysis.
        given: As :func:`windows` gives them.
        times: ``(T,)`` of the analyses.
        known: What the reports of each time are checked against.
        control: What is done to them.
        default_error: Of those that have none.
        operators: How they are read from the prior, on the grid of the analysis.

    Returns:
        The analyses, and the reports left out with the columns ``reason`` and ``analysis_time``.

    Raises:
        InputError: If an observation error is unknown.
    """
    analyses, rejected = [], []
    for time, (rows, others), before in zip(times, given, known, strict=True):
        rows = rows.assign(**{ERROR_COLUMN: _errors(rows, default_error)})

        if control.gross_error is not None and len(rows):
            checked, ordered = _observed(view, time, rows, operators)
            departure = departures(before, view.noise, checked)[0]
            variables = ordered["variable"].to_numpy()
            bad = gross_errors(departure, variables, control.gross_error)
            ordered = ordered.assign(departure=departure.cpu().numpy())
            rejected.append(_left_out(ordered[bad], "gross error", time))
            others += int(bad.sum())
            rows = rows.drop(index=ordered.index[bad])
        if len(rows):
            fewer, bad = control.reduce(rows, time)
            rejected.append(_left_out(rows[bad], "thinned", time))
            others += int(bad.sum())
            rows = fewer
        if not len(rows):
            analyses.append(Analysis(time, None, np.array([], str), others))
            continue
        observations, ordered = _observed(view, time, rows, operators)
        analyses.append(Analysis(time, observations, ordered["variable"].to_numpy(), others))
    some = [part for part in rejected if len(part)]
    return analyses, pd.concat(some, ignore_index=True) if some else pd.DataFrame()


def _left_out(rows: pd.DataFrame, reason: str, time: np.datetime64) -> pd.DataFrame:
    return rows.assign(reason=reason, analysis_time=pd.Timestamp(time))


def refuse_empty(analyses: Sequence[Analysis], control: QualityControl) -> None:
    """Raise if quality control left an analysis nothing.

    Raises:
        InputError: If it did.
    """
    empty = [str(pd.Timestamp(a.time)) for a in analyses if a.observations is None]
    if empty:
        raise InputError(
            f"all observations of {', '.join(empty[:5])} are gross errors: more than "
            f"{control.gross_error:g} standard deviations from what is known before them. Look at "
            "their values and units, or raise gross_error"
        )


def _observed(
    view: View, time: np.datetime64, rows: pd.DataFrame, operators: ReportOperators
) -> tuple[Observations, pd.DataFrame]:
    """Observations of one time, and their rows in the order of the operator."""
    operator, rows = operators.operator(rows)
    observations = Observations(
        operator,
        torch.from_numpy(rows["observation"].to_numpy(copy=True)),
        torch.from_numpy(rows[ERROR_COLUMN].to_numpy(copy=True)) ** 2,
    )
    statistics = view.statistics
    hour = int(view.package.hours(np.array([time]))[0]) if statistics.per_hour else 0
    shape = (len(view.package.channels), *view.grid.shape)
    mean, std = (t[hour].double().cpu().expand(shape) for t in (statistics.mean, statistics.std))
    return observations.rescale(mean, std), rows


def _errors(rows: pd.DataFrame, default: float | Mapping[str, float] | None) -> pd.Series:
    """Error standard deviations, with defaults where there is none."""
    error = rows[ERROR_COLUMN]
    if isinstance(default, (int, float)):
        return error.fillna(float(default))
    if default:
        error = error.fillna(rows["variable"].map(dict(default)))
    error = error.fillna(typical_error(rows))
    if error.isna().any():
        variables = sorted(rows["variable"][error.isna()].unique())
        raise InputError(
            f"observations of {', '.join(variables)} have no {ERROR_COLUMN}, and there is no "
            f"default for them: add the column, or give default_error={{{variables[0]}:...}}, the "
            "standard deviation in physical units"
        )
    return error.astype(float)


def chunks(
    analyses: Sequence[Analysis], ensemble: int, batch: int, view: View
) -> Iterator[list[Analysis]]:
    """Consecutive analyses that are solved together; those that are not linear by themselves."""
    modes = view.noise.channels * view.noise.basis.size
    chunk: list[Analysis] = []
    for analysis in analyses:
        longer = [*chunk, analysis]
        rows = max(len(a.variables) for a in longer) * len(longer) * modes
        fits = len(longer) * ensemble <= batch and rows <= _MAX_ROWS
        if chunk and not (fits and all(a.linear for a in longer)):
            yield chunk
            longer = [analysis]
        chunk = longer
    yield chunk
