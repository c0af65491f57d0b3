# SPDX-License-Identifier: Apache-2.0
"""Feedback of observations: innovations (O-B) and residuals (O-A), and their statistics.

Axes: ``E`` members, ``V`` variables, ``H W`` grid, ``M`` observations.

Analyses and backgrounds are arrays on Earth2Studio's axes. They are read at the observations by
bilinear interpolation, which is right for observations of an analysed variable on a grid of
parallels and meridians. For all others (wind speed, radiances, fields on map projections) the
columns hold NaN.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
import xarray as xr

from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.observations import PointOperator
from ddo_modulus.observations.table import ERROR_COLUMN
from ddo_modulus.verification import desroziers, reduced_chi_square

#: Columns of a table of observations that are copied, where the table has them.
COPIED = ("time", "lat", "lon", "observation", "variable", ERROR_COLUMN, "station", "type", "elev")

#: Names that the axis of members may have.
MEMBERS = ("ensemble", "sample")


def feedback(
    frame: pd.DataFrame,
    time: np.datetime64,
    analysis: xr.DataArray,
    background: xr.DataArray | None = None,
) -> pd.DataFrame:
    """Compare the observations of one analysis with background and analysis.

    Args:
        frame: The observations, with Earth2Studio's core columns.
        time: Of the analysis, UTC.
        analysis: On ``(variable, lat, lon)``, in physical units. It may also have an axis of
            members, whose mean is compared, and axes of length one.
        background: The forecast that the analysis started from, on the same kind of axes.

    Returns:
        A row for each observation, with ``analysis_time``; the innovation ``omb`` (observation
        minus background) and the residual ``oma`` (observation minus analysis), NaN where there is
        none; ``background_spread`` and ``analysis_spread``, the standard deviations of the members
        there; and ``expected_variance`` of ``omb``, the sum of the squared observation error and
        of :math:`(1 + 1/E)` times the squared background spread, NaN if either is missing.
    """
    copied = [c for c in COPIED if c in frame]
    table = frame[copied].reset_index(drop=True).assign(analysis_time=pd.Timestamp(time))
    table.attrs = {}  # Earth2Studio's attributes are not JSON, which parquet needs
    observed = table["observation"].to_numpy(float)
    mean, spread, _ = _at(table, analysis)
    table["oma"], table["analysis_spread"] = observed - mean, spread
    members = 1
    if background is None:
        mean, spread = np.full(len(table), np.nan), np.full(len(table), np.nan)
    else:
        mean, spread, members = _at(table, background)
    table["omb"], table["background_spread"] = observed - mean, spread
    error = np.full(len(table), np.nan)
    if ERROR_COLUMN in table:
        error = table[ERROR_COLUMN].to_numpy(float)
    table["expected_variance"] = (1 + 1 / members) * spread**2 + error**2
    return table


def _at(table: pd.DataFrame, fields: xr.DataArray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and standard deviation of the members at the observations, and their number."""
    mean, spread = np.full(len(table), np.nan), np.full(len(table), np.nan)
    axis = members_of(fields)
    sizes = {d: n for d, n in fields.sizes.items() if d not in ("variable", "lat", "lon", axis)}
    members = 1 if axis is None else fields.sizes[axis]
    grid = _grid(fields)
    if grid is None or any(n != 1 for n in sizes.values()):
        return mean, spread, members
    fields = fields.squeeze(list(sizes), drop=True)
    if axis is None:
        axis, fields = MEMBERS[0], fields.expand_dims(MEMBERS[0])
    x = as_tensor(fields.transpose(axis, "variable", "lat", "lon")).double().cpu()
    names = [str(v) for v in fields["variable"].values]
    lat, lon = (table[c].to_numpy(float) for c in ("lat", "lon"))
    usable = table["variable"].astype(str).isin(names).to_numpy() & grid.contains(lat, lon)
    if not usable.any():
        return mean, spread, members
    channels = [names.index(v) for v in table["variable"].astype(str)[usable]]
    values = PointOperator(grid, lat[usable], lon[usable], channels)(x)
    mean[usable] = values.mean(0).numpy()
    if members > 1:
        spread[usable] = values.std(0).numpy()
    return mean, spread, members


def members_of(fields: xr.DataArray) -> str | None:
    """Name of the axis of members, if there is one."""
    return next((name for name in MEMBERS if name in fields.dims), None)


def _grid(fields: xr.DataArray) -> LatLonGrid | None:
    """The grid of a field, if its parallels and meridians are evenly spaced."""
    if "lat" not in fields.dims or "lon" not in fields.dims:
        return None
    try:
        # Longitudes from 0 to 360 may jump back within a region, as from 359.75 to 0.
        return LatLonGrid(fields["lat"].values, np.unwrap(fields["lon"].values, period=360.0))
    except InputError:
        return None


def as_tensor(fields: xr.DataArray) -> torch.Tensor:
    """The values of an array of NumPy's or CuPy's as a tensor that shares their memory."""
    data = fields.data
    return torch.as_tensor(data if hasattr(data, "__cuda_array_interface__") else np.asarray(data))


def statistics(rows: pd.DataFrame) -> pd.DataFrame:
    """Statistics of innovations and residuals, by time and variable, and by variable over all.

    Args:
        rows: Columns ``analysis_time, variable, omb, oma, expected_variance`` (:func:`feedback`).
            Values that are not finite are left out.

    Returns:
        One row for each variable and time; then one, with ``time`` NaT, for each variable over all
        times. Columns: ``count``; ``omb_mean``, ``omb_rms``, ``oma_mean``, ``oma_rms``;
        Desroziers' estimates ``observation_error`` and ``background_error``, standard deviations
        in the unit of the variable (NaN if the estimated variance is negative, or there are fewer
        than two observations); ``chi2``, the reduced chi-square of the innovations.
    """
    found = []
    if len(rows):
        by_time = rows.groupby(["analysis_time", "variable"], sort=True)
        found += [_row(time, variable, part) for (time, variable), part in by_time]
        by_variable = rows.groupby("variable", sort=True)
        found += [_row(pd.NaT, variable, part) for variable, part in by_variable]
    columns = ["time", "variable", "count", "omb_mean", "omb_rms", "oma_mean", "oma_rms"]
    columns += ["observation_error", "background_error", "chi2"]
    return pd.DataFrame(found, columns=columns)


def _row(time: object, variable: object, part: pd.DataFrame) -> dict[str, object]:
    """Statistics of one variable."""
    residual, innovation = (torch.tensor(part[name].to_numpy(float)) for name in ("oma", "omb"))
    row: dict[str, object] = {"time": time, "variable": variable}
    for name, values in (("omb", innovation), ("oma", residual)):
        finite = values[values.isfinite()]
        row[f"{name}_mean"] = float(finite.mean())  # NaN if there are none
        row[f"{name}_rms"] = float(finite.square().mean().sqrt())
        row["count"] = len(finite)
    both = innovation.isfinite() & residual.isfinite()
    row["observation_error"] = row["background_error"] = row["chi2"] = math.nan
    if int(both.sum()) > 1:
        estimate = desroziers(innovation[both], residual[both])
        for name, value in (
            ("observation_error", estimate.observation),
            ("background_error", estimate.background),
        ):
            row[name] = math.sqrt(value) if value >= 0 else math.nan
    expected = torch.tensor(part["expected_variance"].to_numpy(float))
    usable = innovation.isfinite() & expected.isfinite()
    if bool(usable.any()):
        row["chi2"] = reduced_chi_square(innovation[usable], expected[usable])
    return row
