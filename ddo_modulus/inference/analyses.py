# SPDX-License-Identifier: Apache-2.0
"""Preparation of analyses: checked reports as systems in the operator's units.

Axes: ``T`` analysis times, ``E`` members, ``C`` channel, ``H W`` grid, ``M`` observations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.package import Package
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField
from ddo_modulus.fields.grid import Grid, LatLonGrid
from ddo_modulus.inference.memory import check_memory
from ddo_modulus.inference.quality import (
    QualityControl,
    average_duplicates,
    gross_errors,
    normalized_innovations,
    superobservations,
    thinned,
)
from ddo_modulus.inference.reports import Reports, absurd, operators_at
from ddo_modulus.observations import LinearOperator, Observations, ReportOperators
from ddo_modulus.observations.table import ERROR_COLUMN
from ddo_modulus.posterior.system import AnalysisSystem

# Limits of memory, as numbers of values of HL: of analyses that are solved together (float32), and
# kept from quality control until the analysis (float64).
_MOST_TOGETHER, _MOST_KEPT = 2**27, 2**27
# Reports that quality control checks at once, so that no matrix is larger than this.
_MOST_CHECKED = 2048


@dataclass(frozen=True)
class GriddedPrior:
    """A package on some grid of its domain.

    Attributes:
        package: The package.
        grid: The grid.
        statistics: The package's statistics on this grid.
        noise: The operator's noise field on this grid.
    """

    package: Package
    grid: Grid
    statistics: Normalization
    noise: GaussianField

    @classmethod
    def of(cls, package: Package, shape: tuple[int, int]) -> GriddedPrior:
        """A package on the grid of its domain with this shape."""
        grid = package.grid.at(shape)
        return cls(package, grid, package.statistics_at(grid), package.operator.noise.at(shape))

    @cached_property
    def linear(self) -> GaussianDenoiser:
        """Gaussian part of the prior."""
        return self.package.operator.linear.at(self.noise.shape)

    def climatology(self, time: np.datetime64) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation at a time, ``(C, H, W)`` each, in float64 on the CPU."""
        statistics = self.statistics
        hour = int(self.package.hours(np.array([time]))[0]) if statistics.per_hour else 0
        shape = (len(self.package.channels), *self.grid.shape)
        mean, std = (
            t[hour].double().cpu().expand(shape) for t in (statistics.mean, statistics.std)
        )
        return mean, std


@dataclass(frozen=True)
class Analysis:
    """The observations of one analysis, ready to be assimilated.

    Attributes:
        time: UTC.
        system: System of the observations; None if there are none.
        variables: ``(M,)`` variable of each observation.
        dropped: Number of reports that are not used.
    """

    time: np.datetime64
    system: AnalysisSystem | None
    variables: np.ndarray
    dropped: int

    @property
    def is_linear(self) -> bool:
        """Whether the observations are linear in the state."""
        return self.system is not None and isinstance(
            self.system.observations.operator, LinearOperator
        )


@dataclass
class _Draft:
    """Reports of one analysis during quality control.

    Attributes:
        time: UTC.
        rows: Reports in the order of the system's observations.
        system: System of these reports.
        rejected: Rejected reports, with their reason.
    """

    time: np.datetime64
    rows: pd.DataFrame
    system: AnalysisSystem
    rejected: list[pd.DataFrame]

    def drop(self, bad: Bool[np.ndarray, " M"], reason: str) -> None:
        """Reject reports, for a reason."""
        if not bad.any():
            return
        left_out = self.rows[bad].assign(reason=reason, analysis_time=pd.Timestamp(self.time))
        self.rejected.append(left_out)
        self.keep(~bad)

    def keep(self, good: Bool[np.ndarray, " M"]) -> None:
        """Keep some of the reports; if none is left, the system stays unchanged."""
        self.rows = self.rows[good]
        if good.any() and not good.all():
            self.system = self.system.take(torch.from_numpy(np.flatnonzero(good)))


def prepare(
    prior: GriddedPrior,
    reports: Reports,
    times: np.ndarray,
    expected: Sequence[GaussianDenoiser],
    quality: QualityControl,
) -> tuple[list[Analysis], pd.DataFrame]:
    """Apply quality control to the reports of each time, and build their systems.

    Args:
        prior: The package on the grid of the analysis.
        reports: Usable reports of each time.
        times: ``(T,)`` analysis times.
        expected: Gaussian distribution that the reports of each time are checked against.
        quality: Options of quality control.

    Returns:
        The analyses, and the rejected reports with the columns ``reason`` and ``analysis_time``.

    Raises:
        InputError: If a report has no observation error and there is no default for it, or the
            system of an analysis does not fit into the memory.
    """
    operators = operators_at(reports.operators, prior.package.grid, prior.grid)
    modes = prior.noise.channels * prior.noise.basis.size
    device = prior.package.operator.device
    analyses, rejected, kept = [], [], 0
    for time, rows, unused, before in zip(
        times, reports.frames, reports.unused, expected, strict=True
    ):
        rows = rows.assign(**{ERROR_COLUMN: quality.errors(rows)})
        if not len(rows):
            analyses.append(Analysis(time, None, np.array([], str), unused))
            continue
        _check_defaults(prior.package, rows, quality)
        if not quality.reduces:
            check_memory(len(rows), modes, device, time)
        draft = _Draft(time, *_observe(prior, time, rows, operators), [])
        _check(draft, before, quality)
        if len(draft.rows):
            _reduce(draft, prior, operators, quality)
        check_memory(len(draft.rows), modes, device, time)
        rejected += draft.rejected
        unused += sum(len(part) for part in draft.rejected)
        if not len(draft.rows):
            analyses.append(Analysis(time, None, np.array([], str), unused))
            continue
        kept += len(draft.rows) * modes
        if kept > _MOST_KEPT:
            draft.system.forget()
        variables = draft.rows["variable"].to_numpy()
        analyses.append(Analysis(time, draft.system, variables, unused))
    return analyses, pd.concat(rejected, ignore_index=True) if rejected else pd.DataFrame()


def _check(draft: _Draft, before: GaussianDenoiser, quality: QualityControl) -> None:
    """Reject gross errors."""
    if quality.gross_error is None:
        return
    innovation = _normalized_innovations(draft.system, before)
    draft.rows = draft.rows.assign(normalized_innovation=innovation.cpu().numpy())
    variables = draft.rows["variable"].to_numpy()
    draft.drop(gross_errors(innovation, variables, quality.gross_error), "gross error")
    draft.rows = draft.rows.drop(columns="normalized_innovation")


def _normalized_innovations(
    system: AnalysisSystem, before: GaussianDenoiser
) -> Float[Tensor, " M"]:
    """Normalised innovations, in parts that bound the memory.

    The square roots of a system that is checked whole are kept for the analysis.
    """
    size = system.observations.operator.size
    if size <= _MOST_CHECKED:
        return normalized_innovations(system.at_mean(before))[0]
    parts = torch.arange(size).split(_MOST_CHECKED)
    return torch.cat([normalized_innovations(system.take(p).at_mean(before))[0] for p in parts])


def _check_defaults(package: Package, rows: pd.DataFrame, quality: QualityControl) -> None:
    """Refuse default errors that no report can have; rows with such errors of their own are out."""
    bad = absurd(package, rows)[f"impossible {ERROR_COLUMN}"]
    if bad.any():
        error, variable = rows[ERROR_COLUMN][bad].iloc[0], rows["variable"][bad].iloc[0]
        raise InputError(
            f"default_error={quality.default_error}: an error of {error:g} cannot be that of "
            f"{variable}; give its standard deviation in physical units"
        )


def _reduce(
    draft: _Draft, prior: GriddedPrior, operators: ReportOperators, quality: QualityControl
) -> None:
    """Reduce the number of reports: thinning, averaging of duplicates, superobbing."""
    if quality.thinning_km is not None:
        rows = draft.rows.sort_index()  # of equal reports, the first in the table is kept
        bad = pd.Series(thinned(rows, draft.time, quality.thinning_km), rows.index)
        draft.drop(bad[draft.rows.index].to_numpy(), "thinned")
    if quality.duplicates == "average":
        averaged = average_duplicates(draft.rows.sort_index())
        draft.keep(draft.rows.index.isin(averaged.index))
        draft.rows = averaged.loc[draft.rows.index]
        draft.system = draft.system.with_values(*_values(draft.rows))
    if quality.superob_km is not None:
        rows = superobservations(
            draft.rows.sort_index(),
            quality.superob_km,
            representativeness=quality.representativeness,
        )
        # Superobservations are at new places, so they need a new operator.
        draft.rows, draft.system = _observe(prior, draft.time, rows, operators)


def _observe(
    prior: GriddedPrior, time: np.datetime64, rows: pd.DataFrame, operators: ReportOperators
) -> tuple[pd.DataFrame, AnalysisSystem]:
    """Reports in the order of their observation operator, and their system in normalised units."""
    operator, rows = operators.operator(rows)
    observations = Observations(operator, *_values(rows)).rescale(*prior.climatology(time))
    return rows, AnalysisSystem(observations, prior.noise)


def _values(rows: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """Observed values and their error variances."""
    values, error = (rows[c].to_numpy(float, copy=True) for c in ("observation", ERROR_COLUMN))
    return torch.from_numpy(values), torch.from_numpy(error) ** 2


def refuse_empty(analyses: Sequence[Analysis], quality: QualityControl) -> None:
    """Raise if quality control rejected all reports of an analysis.

    Raises:
        InputError: If an analysis has no observations.
    """
    empty = [str(pd.Timestamp(a.time)) for a in analyses if a.system is None]
    if empty:
        raise InputError(
            f"all observations of {', '.join(empty[:5])} are gross errors: more than "
            f"{quality.gross_error:g} standard deviations from the prior or background. Check "
            "their values and units, or raise gross_error"
        )


def working_shape(own: Grid, wanted: LatLonGrid | None) -> tuple[int, int]:
    """Shape of the grid to sample on, for a result that is interpolated to the grid wanted.

    It is the prior's own grid, or a finer one of the same domain if the grid wanted is finer.

    Raises:
        InputError: If the grid wanted is not inside the prior's domain.
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


def batches(
    analyses: Sequence[Analysis], ensemble: int, batch: int, prior: GriddedPrior
) -> Iterator[list[Analysis]]:
    """Group consecutive analyses that are solved together; nonlinear ones are solved alone.

    Args:
        analyses: All analyses.
        ensemble: Members of each analysis.
        batch: Largest number of states computed together.
        prior: The package on the grid of the analysis.
    """
    modes = prior.noise.channels * prior.noise.basis.size
    together: list[Analysis] = []
    for analysis in analyses:
        longer = [*together, analysis]
        rows = max(len(a.variables) for a in longer) * len(longer) * modes
        fits = len(longer) * ensemble <= batch and rows <= _MOST_TOGETHER
        if together and not (fits and all(a.is_linear for a in longer)):
            yield together
            longer = [analysis]
        together = longer
    yield together
