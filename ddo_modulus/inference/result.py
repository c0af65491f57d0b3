# SPDX-License-Identifier: Apache-2.0
"""Results: labelled datasets in physical units, with diagnostics and rejected reports.

Axes: ``T`` times, ``E`` members, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.diffusion.accuracy import spread_note
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import Grid, LatLonGrid
from ddo_modulus.lexicon import CELL_MEANS, long_name, reported_range

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnalysisResult:
    """Result of :func:`~ddo_modulus.inference.assimilate.assimilate`.

    Attributes:
        dataset: Every channel on ``(ensemble, time, lat, lon)``, float32 in physical units, and the
            diagnostics on ``time``.
        rejected: Reports that are not used, with their columns, the ``reason`` and, if the quality
            control of an analysis rejected them, its ``analysis_time``.
        dropped: Number of reports that are not used, by reason.
        notes: Number of reports that are used with a reservation, by reservation.
        diagnostics: One row for each time, with the columns ``time``; ``inflation``; the numbers of
            ``observations`` used and of reports ``dropped``; ``chi2``, the mean squared innovation
            over its expectation (one if prior and errors are calibrated); and for each observed
            variable, in its unit, ``<variable>_omb``, the RMS of observation minus background (the
            prior mean if there is no background), and ``<variable>_oma``, the RMS of observation
            minus analysis mean.
    """

    dataset: xr.Dataset
    rejected: pd.DataFrame = field(default_factory=pd.DataFrame)
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    diagnostics: pd.DataFrame = field(default_factory=pd.DataFrame)


def check_finite(fields: Float[Tensor, "*B C H W"], channels: Sequence[str], what: str) -> None:
    """Refuse a result with values that are not finite, before it is returned or written.

    Args:
        fields: Fields in physical units.
        channels: Names of the channels.
        what: What messages call the result.

    Raises:
        InputError: If a value is NaN or infinite.
    """
    if bool(fields.isfinite().all()):
        return
    for i, channel in enumerate(channels):
        bad = int((~fields[..., i, :, :].isfinite()).sum())
        if bad:
            raise InputError(
                f"{what} of {channel} would hold {bad} values that are NaN or infinite, and is not "
                "written: check the values and errors of the observations, take more steps or a "
                "smaller sigma_max, or precision=fp32 and engine=torch"
            )


def sampling_note(package: Package, config: PosteriorConfig) -> dict[str, str]:
    """A note, and a warning in the log, if a schedule draws too little or too much spread.

    Args:
        package: The package.
        config: Resolved options of sampling.

    Returns:
        The note by the name ``sampling``; empty if there is none.
    """
    note = spread_note(package.operator.linear, config)
    if note is None:
        return {}
    _LOG.warning("%s", note)
    return {"sampling": note}


def labelled(
    package: Package,
    times: np.ndarray,
    fields: Float[Tensor, "E T C H W"],
    axes: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> xr.Dataset:
    """Dataset of a package's channels, from fields in physical units.

    Args:
        package: The package, for names and units of the channels.
        times: ``(T,)`` UTC.
        fields: Fields in physical units.
        axes: Coordinates of the grid (:func:`coordinates`).
        attributes: Attributes of the dataset.

    Raises:
        InputError: If a value is not finite.
    """
    check_finite(fields, package.channels, "the result")
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
    """Coordinates of a grid for a dataset: latitude and longitude, or the axes of a box."""
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
    """Diagnostics as variables of a dataset on ``time``, from one row for each time."""
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
