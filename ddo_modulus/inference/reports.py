# SPDX-License-Identifier: Apache-2.0
"""Which reports of a table belong to which analysis.

Axes: ``T`` analysis times, ``H W`` grid, ``M`` observations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from ddo_modulus.diffusion.package import Package
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import Grid, resampled
from ddo_modulus.inference.quality import QualityControl
from ddo_modulus.observations import ReportOperators
from ddo_modulus.observations.reports import UNKNOWN
from ddo_modulus.observations.table import ObservationTable


@dataclass(frozen=True)
class Reports:
    """Usable reports by analysis time.

    Attributes:
        operators: How they are read from the package's prior.
        frames: The rows for each time.
        unused: Number of rows of the table for each time that cannot be used.
        dropped: Rows of the whole table left out, by reason.
        rejected: These rows, with a column ``reason``.
        notes: Number of rows that are used with a reservation, by the reservation.
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
        """Share out the usable rows of a table to analysis times.

        Args:
            package: The prior.
            table: Checked observations.
            times: ``(T,)`` UTC.
            quality: Says which may be used, how near in time, and whether each time needs some.

        Raises:
            InputError: If there are none, or none for a time that needs them.
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
        everything = whole.at(times, quality.offsets, required=required)
        return cls(
            operators,
            frames,
            [len(rows) - len(own) for rows, own in zip(everything, frames, strict=True)],
            dict(usable_rows.dropped),
            usable_rows.rejected,
            operators.notes(usable_rows.frame),
        )


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
