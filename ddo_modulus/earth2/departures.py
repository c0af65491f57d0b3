# SPDX-License-Identifier: Apache-2.0
"""Departures of observations from analyses and backgrounds as Earth2Studio hands them on.

Axes: ``E`` members, ``V`` variables, ``H W`` grid, ``M`` observations.

Fields are read at the observations by bilinear interpolation, which is what observations of a
field's own variable, on a grid of parallels and meridians, need. Others (wind speed, radiances,
fields on projections) have no departures: their columns hold NaN.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
import xarray as xr

from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.observations import PointOperator
from ddo_modulus.observations.table import ERROR_COLUMN

#: What is kept of an observation, if its table has it.
KEPT = ("time", "lat", "lon", "observation", "variable", ERROR_COLUMN, "station", "type", "elev")

#: Names that an axis of members may have.
MEMBERS = ("ensemble", "sample")


def departures(
    frame: pd.DataFrame,
    time: np.datetime64,
    analysis: xr.DataArray,
    background: xr.DataArray | None = None,
) -> pd.DataFrame:
    """Observations with what was expected of them.

    Args:
        frame: Observations of one analysis: Earth2Studio's core columns.
        time: Of the analysis.
        analysis: On ``(variable, lat, lon)``, with members and axes of length one as they come; a
            mean over the members is taken.
        background: The same.

    Returns:
        The observations, with ``analysis_time``; ``omb`` and ``oma``, observation minus background
        and minus analysis (NaN where there is none); ``background_spread`` and
        ``analysis_spread``, the members' standard deviation there; and ``expected_variance`` of
        ``omb``, from spread (that of a mean of so many members) and observation error, NaN if one
        is unknown.
    """
    kept = [c for c in KEPT if c in frame]
    table = frame[kept].reset_index(drop=True).assign(analysis_time=pd.Timestamp(time))
    table.attrs = {}  # what Earth2Studio notes of the request is no JSON, which parquet wants
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
    """The grid of a field, if it is one of parallels and meridians that are evenly spaced."""
    if "lat" not in fields.dims or "lon" not in fields.dims:
        return None
    try:
        # Longitudes from 0 to 360 may step back on the way, as from 359.75 to 0.
        return LatLonGrid(fields["lat"].values, np.unwrap(fields["lon"].values, period=360.0))
    except InputError:
        return None


def as_tensor(fields: xr.DataArray) -> torch.Tensor:
    """The values of an array, NumPy's or CuPy's, where they are; shared, not copied."""
    data = fields.data
    return torch.as_tensor(data if hasattr(data, "__cuda_array_interface__") else np.asarray(data))
