# SPDX-License-Identifier: Apache-2.0
"""Selection of the reports of a table that each analysis can use.

Axes: ``T`` analysis times, ``H W`` grid, ``M`` observations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from ddo_modulus.diffusion.package import Package
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import Grid, LatLonGrid, resampled
from ddo_modulus.inference.quality import QualityControl
from ddo_modulus.lexicon import reported_range
from ddo_modulus.observations import ReportOperators
from ddo_modulus.observations.reports import UNKNOWN
from ddo_modulus.observations.table import ERROR_COLUMN, ObservationTable

#: Values and errors beyond this number of the prior's standard deviations are mistakes.
FARTHEST = 1e4
#: Errors smaller than a standard deviation of the prior by this factor are mistakes.
SMALLEST_ERROR = 1e7


@dataclass(frozen=True)
class Reports:
    """Usable reports by analysis time.

    Attributes:
        operators: Observation operators of the reports.
        frames: Usable rows of each time.
        unused: Number of unusable rows of each time.
        dropped: Number of unusable rows of the whole table, by reason.
        rejected: These rows, with a column ``reason``.
        notes: Number of rows that are used with a reservation, by reservation.
    """

    operators: ReportOperators
    frames: list[pd.DataFrame]
    unused: list[int]
    dropped: dict[str, int]
    rejected: pd.DataFrame
    notes: dict[str, int]

    @classmethod
    def select(
        cls,
        package: Package,
        table: ObservationTable,
        times: np.ndarray,
        quality: QualityControl,
    ) -> Reports:
        """Select the usable rows of a table for each analysis time.

        Args:
            package: The prior.
            table: Checked observations.
            times: ``(T,)`` UTC.
            quality: Options of quality control: accepted marks, tolerance in time, and whether
                each time must have observations.

        Raises:
            InputError: If there are no usable rows, or none for a time that must have some.
        """
        operators = quality.operators or report_operators(package)
        required = quality.missing == "error"
        whole = table
        unaccepted = quality.unaccepted(table.frame)
        table = table.without(unaccepted.map({True: "quality", False: ""}))
        table = replace(table, frame=table.frame.reset_index(drop=True))
        usable_rows = usable(package, table, operators, required=required)
        try:
            frames = usable_rows.at(times, quality.offsets, required=required)
        except InputError as error:
            outside = usable_rows.dropped.get("outside the grid", 0)
            hint = f" ({outside} observations outside the grid do not count)" if outside else ""
            raise InputError(f"{error}{hint}") from None
        used = usable_rows.frame
        everything = whole.at(times, quality.offsets, required=required)
        return cls(
            operators,
            frames,
            [len(rows) - len(own) for rows, own in zip(everything, frames, strict=True)],
            dict(usable_rows.dropped),
            usable_rows.rejected,
            usable_rows.notes | operators.notes(used) | quality.notes(used),
        )


def usable(
    package: Package,
    table: ObservationTable,
    operators: ReportOperators | None = None,
    *,
    required: bool = True,
) -> ObservationTable:
    """Drop the rows that cannot be compared with the states of a package, and record why.

    Args:
        package: The prior.
        table: Checked observations.
        operators: Observation operators of the reports; :func:`report_operators` if None.
        required: Whether the table must have usable rows.

    Returns:
        The rows within the package's grid that have an observation operator on its channels
        (:mod:`.observations.reports`).

    Raises:
        InputError: If usable rows are required and there are none, or the package's states are
            windows of several frames.
    """
    if package.task.frames > 1:
        raise InputError(
            f"the package's states are windows of {package.task.frames} frames; take a package of "
            "single states (trajectories are assimilated in Python, by TrajectoryPrior)"
        )
    operators = report_operators(package) if operators is None else operators
    frame, grid = table.frame, package.grid
    if table.cartesian and isinstance(grid, LatLonGrid):
        raise InputError(
            "the table has places y, x on a box, but the package lives on the globe; give lat and "
            "lon in degrees"
        )
    refused = operators.refused(frame)
    of_package = refused != UNKNOWN
    if required and not of_package.any():
        raise InputError(
            f"no observations of {', '.join(package.channels)}, the package's variables; the "
            f"table has {', '.join(sorted(frame['variable'].unique()))}"
        )
    inside = grid.contains(frame["lat"], frame["lon"])
    if required and not (of_package & inside).any():
        raise InputError(
            f"none of the {int(of_package.sum())} observations is in the package's grid (lat "
            f"{grid.lat.min():g} to {grid.lat.max():g}, lon {grid.lon.min():g} to "
            f"{grid.lon.max():g}); the first is at lat={frame['lat'][of_package].iloc[0]:g}, "
            f"lon={frame['lon'][of_package].iloc[0]:g}. Choose another package or other stations"
        )
    refused = refused.where(inside | ~of_package, "outside the grid")
    for reason, bad in absurd(package, frame).items():
        refused = refused.where((refused != "") | ~bad, reason)
    reasons = {str(reason): int(n) for reason, n in refused.value_counts().items() if reason}
    if required and len(reasons) and (refused != "").all():
        listed = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        raise InputError(
            f"none of the {len(frame)} observations can be compared with the package's "
            f"{', '.join(package.channels)} ({listed})"
        )
    left = table.without(refused)
    return replace(left, frame=left.frame.reset_index(drop=True))


def absurd(package: Package, rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Rows that single precision cannot combine with the prior, by what is wrong with them.

    Args:
        package: The prior.
        rows: Reports; an error that is NaN passes.

    Returns:
        Which values are more than :data:`FARTHEST` of the prior's standard deviations from its
        mean; and which errors are larger than that, or as much smaller.
    """
    far, error = (pd.Series(False, rows.index) for _ in range(2))
    statistics = package.normalization
    for i, channel in enumerate(package.channels):
        part = rows[rows["variable"] == channel]
        if part.empty:
            continue
        mean, std = (float(t[:, i].double().mean()) for t in (statistics.mean, statistics.std))
        own = part[ERROR_COLUMN]
        if reported_range(channel) is None:  # others are within their range already
            far[part.index] = (part["observation"] - mean).abs() > FARTHEST * std
        error[part.index] = own.notna() & ~own.between(std / SMALLEST_ERROR, FARTHEST * std)
    return {"implausible value": far, f"impossible {ERROR_COLUMN}": error}


def report_operators(package: Package) -> ReportOperators:
    """Observation operators of reports on a package's states, with default options."""
    return ReportOperators(package.channels, package.grid, package.orography)


def operators_at(operators: ReportOperators, own: Grid, grid: Grid) -> ReportOperators:
    """The observation operators on another grid of the domain."""
    if grid.shape == own.shape:
        return operators
    orography = operators.orography
    if orography is not None:
        orography = resampled(torch.from_numpy(orography), own, grid).numpy()
    return replace(operators, grid=grid, orography=orography)
