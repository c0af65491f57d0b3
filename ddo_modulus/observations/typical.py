# SPDX-License-Identifier: Apache-2.0
"""Errors of reports that come without one, and what their ids and columns say of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from ddo_modulus.observations.atmosphere import (
    saturation_pressure,
    specific_humidity,
    standard_height,
    standard_temperature,
)

#: How ids write a pressure level, hPa.
LEVEL = r"(\d+(?:\.\d+)?)"
#: Ids of reports aloft: a letter or two, and the level unless a column holds the pressure.
ALOFT = re.compile(rf"([tuvwzqr]|ws|wd){LEVEL}?")

#: Error standard deviations of reports, what a grid cell cannot represent included, in the
#: lexicon's units: for observations that come without one. Stations as in limited-area analyses,
#: radiosondes near the values of ECMWF's IFS (Documentation, Part I, observation errors); `q` aloft
#: is 10 % of saturation at the standard atmosphere's temperature; brightness temperatures are those
#: of weighting functions, far above the noise of the instrument (0.25 K).
TYPICAL_ERROR: Mapping[str, float] = {
    "t2m": 1.0,
    "d2m": 1.5,
    "r2m": 10.0,
    "q2m": 1e-3,
    "u10m": 1.5,
    "v10m": 1.5,
    "ws10m": 1.5,
    "wd10m": 20.0,
    "msl": 100.0,
    "sp": 100.0,
    "t": 1.0,
    "u": 2.0,
    "v": 2.0,
    "ws": 2.0,
    "wd": 15.0,
    "r": 10.0,
    "amsua": 1.5,
    "atms": 1.5,
}

_HUMIDITY = 0.1  # of saturation


def typical_error(rows: pd.DataFrame) -> pd.Series:
    """Error standard deviation of each row by :data:`TYPICAL_ERROR`; NaN where there is none."""
    error = rows["variable"].map(TYPICAL_ERROR)
    for variable in rows["variable"][error.isna()].unique():
        here = rows["variable"] == variable
        match = ALOFT.fullmatch(variable)
        if match is None:
            continue
        error[here] = TYPICAL_ERROR.get(match[1], np.nan)
        if match[1] == "q":
            pressure = torch.from_numpy(pressures(rows[here], match[2]))
            saturated = saturation_pressure(standard_temperature(standard_height(pressure)))
            error[here] = _HUMIDITY * specific_humidity(saturated, pressure).numpy()
    return error


def column(rows: pd.DataFrame, name: str) -> np.ndarray:
    """A column of numbers; NaN where the table does not have it."""
    values = rows.get(name)
    return np.full(len(rows), np.nan) if values is None else values.to_numpy(float, copy=True)


def station_heights(rows: pd.DataFrame) -> pd.Series:
    """Heights of the stations above sea level, m; NaN where unknown."""
    own = pd.Series(column(rows, "elev"), rows.index)
    return own.fillna(pd.Series(column(rows, "station_elev"), rows.index))


def pressures(rows: pd.DataFrame, level: str | None) -> np.ndarray:
    """Pressures of reports aloft, Pa: of the id, as in `t700`, or else of the column."""
    if level is not None:
        return np.full(len(rows), 100.0 * float(level))
    return column(rows, "pres")
