# SPDX-License-Identifier: Apache-2.0
"""Results: labelled datasets in physical units, and what was noticed on the way.

Axes: ``T`` times, ``E`` members, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.diffusion.package import Package
from ddo_modulus.fields.grid import Grid, LatLonGrid
from ddo_modulus.lexicon import CELL_MEANS, long_name, reported_range


@dataclass(frozen=True)
class AnalysisResult:
    """What :func:`~ddo_modulus.inference.assimilate.assimilate` gives.

    Attributes:
        dataset: Every channel on ``(ensemble, time, lat, lon)``, float32 in physical units, and the
            diagnostics on ``time``.
        rejected: Reports left out: their columns, the ``reason`` and, where it was of an analysis,
            its ``analysis_time``.
        dropped: Number of rows left out, by reason.
        notes: Number of rows that are used with a reservation, by the reservation.
        diagnostics: A row for each time: ``inflation``; ``observations`` used and rows ``dropped``;
            ``chi2``, the squared innovations over their expectation (one if prior and errors are
            calibrated); for every variable observed ``<variable>_omb`` and ``<variable>_oma``, the
            RMS of observation minus background (without one, the prior's mean) and of observation
            minus analysis mean, in the variable's unit.
    """

    dataset: xr.Dataset
    rejected: pd.DataFrame = field(default_factory=pd.DataFrame)
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    diagnostics: pd.DataFrame = field(default_factory=pd.DataFrame)


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


def diagnostic_variables(package: Package, rows: pd.DataFrame) -> dict[str, Any]:
    """Variables of a dataset on ``time``, of one row for each time."""
    units = dict(zip(package.channels, package.units, strict=True))
    others = {str(c).rpartition("_")[0] for c in rows} - units.keys()
    units |= {v: found.units for v in others if (found := reported_range(v)) is not None}
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
