# SPDX-License-Identifier: Apache-2.0
r"""Quality control of reports: those that cannot be right, and those that say the same.

Axes: ``T`` analyses, ``M`` observations, ``N`` coordinates of the prior.

*Gross errors.* If prior and errors are as told, an innovation :math:`d = y - H(m)` has the variance
:math:`v = H P H^T + R`. A report whose :math:`|d| / \sqrt v` exceeds a threshold is rejected (the
background check of operational centres: Lorenc and Hammon 1988, Q. J. R. Meteorol. Soc. 114, 515).
A prior may be too narrow for the day, and the good reports then lie far off together. So the scale
is widened to what their innovations show, by a measure that a few wrong ones do not move: the
median of :math:`d^2 / v`, which is .455 of a calibrated prior.

*Thinning* keeps, of the reports in a cell, the one nearest in time. *Superobservations* are means
over a cell. Part :math:`\rho` of an error's variance is what the cell's own size leaves out
(representativeness), which reports in it share and no averaging takes away: with weights
:math:`w_i \propto 1 / \sigma_i^2`, the mean has the error variance

.. math:: \rho \left(\sum_i w_i \sigma_i\right)^2 + (1 - \rho) \sum_i w_i^2 \sigma_i^2 .

Cells are of equal height, and of the same width at the latitude of their middle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.diffusion.posterior_config import checked_names
from ddo_modulus.errors import InputError
from ddo_modulus.observations import ReportOperators, typical_error
from ddo_modulus.observations.table import ERROR_COLUMN, NO_TOLERANCE, Tolerance, offsets
from ddo_modulus.posterior.system import LinearizedSystem

#: Innovations further off than that many of their expected standard deviations are gross errors.
GROSS_ERROR = 5.0

#: Share of an error's variance that reports of one cell have in common.
REPRESENTATIVENESS = 0.25

_KM_PER_DEGREE = math.radians(1) * EARTH_RADIUS_KM

# Median of a squared standard normal variable.
_MEDIAN = 0.4549364

# From as many reports of a kind on, the median of their innovations is trusted; and how far.
_ENOUGH, _WIDEST = 8, 15.0

# Reports of these have no mean: directions of the wind.
_CIRCULAR = re.compile(r"wd(\d+m?)?")

# What tells reports apart beside their place and variable; pressures in layers of a tenth.
_KINDS = ("pres", "sensor_index", "satellite")


@dataclass(frozen=True)
class QualityControl:
    """Which reports an analysis uses, and with which errors.

    Attributes:
        gross_error: Largest innovation, in the standard deviations that the prior (with a
            background, its errors) and the observation error make one expect
            (:func:`gross_errors`); None for no such check.
        duplicates: ``"average"`` makes one report of those of a kind, place and time
            (:func:`average_duplicates`); ``"keep"`` takes them as independent.
        thinning_km: Spacing of :func:`thinned`; None to keep all.
        superob_km: Spacing of :func:`superobservations`; None for none.
        representativeness: Of superobservations.
        tolerance: Largest distance in time of a report from the analysis, either way, or the first
            and last offset; as durations or text (``"10min"``).
        default_error: Error standard deviation, in physical units, of reports without one: one for
            all, or by variable; :data:`~ddo_modulus.observations.TYPICAL_ERROR` for the others.
        accept: Least and largest mark of the column ``quality`` to use; reports without a mark are
            used. None for all marks.
        missing: What to do at a time without usable reports: ``"error"``, or ``"prior"``, draw from
            what is known without them.
        operators: How reports are read from the prior; :func:`.report_operators` if None.

    Raises:
        InputError: If an option is out of range, or reports would be thinned and averaged.
    """

    gross_error: float | None = GROSS_ERROR
    duplicates: Literal["keep", "average"] = "keep"
    thinning_km: float | None = None
    superob_km: float | None = None
    representativeness: float = REPRESENTATIVENESS
    tolerance: Tolerance = NO_TOLERANCE
    default_error: float | Mapping[str, float] | None = None
    accept: tuple[float, float] | None = None
    missing: Literal["error", "prior"] = "error"
    operators: ReportOperators | None = None

    def __post_init__(self) -> None:
        for name in ("gross_error", "thinning_km", "superob_km"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise InputError(f"{name}={value} must be a positive number, or none")
        if self.duplicates not in ("keep", "average"):
            raise InputError(f"duplicates={self.duplicates!r} must be 'keep' or 'average'")
        if self.thinning_km is not None and self.superob_km is not None:
            raise InputError("reports are either thinned or averaged: give one of the two spacings")
        if not 0 <= self.representativeness <= 1:
            raise InputError(
                f"representativeness={self.representativeness} must be between 0 and 1"
            )
        if self.missing not in ("error", "prior"):
            raise InputError(f"missing={self.missing!r} must be 'error' or 'prior'")
        object.__setattr__(self, "tolerance", offsets(self.tolerance))
        if self.accept is not None:
            object.__setattr__(self, "accept", tuple(float(mark) for mark in self.accept))
            if len(self.accept) != 2 or not self.accept[0] <= self.accept[1]:
                raise InputError(
                    f"accept={list(self.accept)} must be two marks, the least and the largest"
                )

    @classmethod
    def of(cls, options: QualityControl | Mapping[str, Any] | None) -> QualityControl:
        """The options as one object, from itself, a mapping (JSON, YAML) or None for the defaults.

        Raises:
            InputError: If there is no such option, or a value is out of range.
        """
        if isinstance(options, QualityControl):
            return options
        return cls(**checked_names(cls, options, "quality"))

    @property
    def offsets(self) -> tuple[np.timedelta64, np.timedelta64]:
        """First and last offset of a report from the analysis."""
        assert isinstance(self.tolerance, tuple)
        return self.tolerance

    def to_json(self) -> dict[str, Any]:
        """The options for JSON.

        Raises:
            InputError: If they hold operators, which are code.
        """
        if self.operators is not None:
            raise InputError("quality.operators are code, and cannot be saved with the options")
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "operators"}
        options["tolerance"] = [str(pd.Timedelta(offset)) for offset in self.offsets]
        options["accept"] = None if self.accept is None else list(self.accept)
        if isinstance(self.default_error, Mapping):
            options["default_error"] = {str(k): float(v) for k, v in self.default_error.items()}
        return options

    def unaccepted(self, rows: pd.DataFrame) -> pd.Series:
        """Which reports have a quality mark that is not accepted."""
        if self.accept is None or "quality" not in rows:
            return pd.Series(False, rows.index)
        mark = rows["quality"]
        return mark.notna() & ~mark.between(*self.accept)

    def errors(self, rows: pd.DataFrame) -> pd.Series:
        """Error standard deviations of reports, with the defaults where there is none.

        Raises:
            InputError: If there is no default for a variable.
        """
        error, default = rows[ERROR_COLUMN], self.default_error
        if isinstance(default, (int, float)):
            return error.fillna(float(default))
        if default:
            error = error.fillna(rows["variable"].map(dict(default)))
        error = error.fillna(typical_error(rows))
        if error.isna().any():
            variables = sorted(rows["variable"][error.isna()].unique())
            raise InputError(
                f"observations of {', '.join(variables)} have no {ERROR_COLUMN}, and there is no "
                f"default for them: add the column, or give default_error={{{variables[0]}:...}}, "
                "the standard deviation in physical units"
            )
        return error.astype(float)


def normalized_innovations(at: LinearizedSystem) -> Float[Tensor, "T M"]:
    """Innovations over the standard deviations that prior and observation errors make one expect.

    Args:
        at: The system at the prior mean of each analysis (:meth:`.AnalysisSystem.at_mean`).
    """
    return at.innovation / at.expected_variance().sqrt()


def gross_errors(
    innovation: Float[Tensor, " M"], variables: np.ndarray, threshold: float = GROSS_ERROR
) -> Bool[np.ndarray, " M"]:
    """Which reports of one analysis cannot be right.

    Args:
        innovation: As :func:`normalized_innovations` gives them.
        variables: ``(M,)`` what each report is of; each kind is judged by its own scale.
        threshold: In standard deviations.

    Raises:
        InputError: If the threshold is not positive.
    """
    if not threshold > 0:
        raise InputError(f"the threshold of gross errors must be positive, got {threshold}")
    square = innovation.double().square().cpu().numpy()
    bad = np.zeros(len(square), bool)
    for variable in np.unique(variables):
        kind = variables == variable
        wide = 1.0
        if kind.sum() >= _ENOUGH:
            wide = float(np.clip(np.median(square[kind]) / _MEDIAN, 1.0, _WIDEST))
        bad[kind] = square[kind] > wide * threshold**2
    return bad


def average_duplicates(rows: pd.DataFrame) -> pd.DataFrame:
    """Make one report of those of one variable, place and time.

    Their mean has the error of the best: what is reported twice is hardly measured twice.

    Args:
        rows: Reports, with errors.

    Returns:
        Rows in their order, the first of each place with the mean. Directions stay as they are.
    """
    keys = [rows["time"], rows["lat"], rows["lon"] % 360, *_kinds(rows)]
    label = pd.Series(_label(keys), rows.index).where(~_circular(rows), -1)
    several = label.duplicated(keep=False) & (label >= 0)
    if not several.any():
        return rows
    groups = rows[several].groupby(label[several])
    merged = rows.copy()
    merged.loc[several, "observation"] = groups["observation"].transform("mean")
    merged.loc[several, ERROR_COLUMN] = groups[ERROR_COLUMN].transform("min")
    return merged[~(several & label.duplicated())]


def thinned(rows: pd.DataFrame, time: np.datetime64, spacing_km: float) -> Bool[np.ndarray, " M"]:
    """Which reports to leave out so that each cell has one of a kind.

    Kept is the nearest in time, of equal ones that of the smallest error, then the first.

    Args:
        rows: Reports of one analysis, with errors.
        time: Of the analysis.
        spacing_km: Height of a cell.

    Raises:
        InputError: If the spacing is not positive.
    """
    cell = _label([*_cells(rows, spacing_km), *_kinds(rows)])
    late = (rows["time"].to_numpy() - time).astype("timedelta64[ns]").astype(np.int64)
    order = np.lexsort((np.arange(len(rows)), rows[ERROR_COLUMN].to_numpy(), np.abs(late)))
    _, first = np.unique(cell[order], return_index=True)
    left_out = np.ones(len(rows), bool)
    left_out[order[first]] = False
    return left_out


def superobservations(
    rows: pd.DataFrame, spacing_km: float, *, representativeness: float = REPRESENTATIVENESS
) -> pd.DataFrame:
    """Means over cells of values, places and times; directions stay as they are.

    Args:
        rows: Reports of one analysis, with errors.
        spacing_km: Height of a cell.
        representativeness: Share of the errors' variance that reports of a cell have in common.

    Returns:
        A row for each cell and kind, of the first report's columns, its index included, but for
        what is averaged.

    Raises:
        InputError: If the spacing is not positive, or the share not between 0 and 1.
    """
    if not 0 <= representativeness <= 1:
        raise InputError(f"representativeness={representativeness} must be between 0 and 1")
    cell = _label([*_cells(rows, spacing_km), *_kinds(rows)])
    alone = _circular(rows).to_numpy()
    cell[alone] = -1 - np.flatnonzero(alone)  # a cell of its own
    _, first, label = np.unique(cell, return_index=True, return_inverse=True)
    variance = rows[ERROR_COLUMN].to_numpy(float) ** 2
    weight = 1 / variance
    weight = weight / np.bincount(label, weight)[label]

    def mean(values: np.ndarray, power: int = 1) -> np.ndarray:
        return np.bincount(label, weight**power * values)

    out = rows.iloc[first].copy()
    # About the first of each cell: longitudes have a seam, times are large numbers.
    for name, turn in (("lat", None), ("lon", 360.0), ("observation", None)):
        values = rows[name].to_numpy(float)
        start = values[first][label]
        step = values - start
        step = step if turn is None else (step + turn / 2) % turn - turn / 2
        out[name] = values[first] + mean(step)
    times = rows["time"].to_numpy("datetime64[ns]")
    step = (times - times[first][label]).astype("timedelta64[ns]").astype(float)
    out["time"] = times[first] + np.round(mean(step)).astype("timedelta64[ns]")
    shared = representativeness * mean(variance**0.5) ** 2
    out[ERROR_COLUMN] = np.sqrt(shared + (1 - representativeness) * mean(variance, 2))
    return out.sort_index()


def _cells(rows: pd.DataFrame, spacing_km: float) -> list[np.ndarray]:
    """Row and column of the cell that each report lies in."""
    if not (np.isfinite(spacing_km) and spacing_km > 0):
        raise InputError(f"a spacing of {spacing_km} km must be positive")
    height = spacing_km / _KM_PER_DEGREE
    row = np.floor((rows["lat"].to_numpy(float) + 90) / height).astype(np.int64)
    middle = np.clip((row + 0.5) * height - 90, -90, 90)
    around = np.maximum(1, np.round(360 * np.cos(np.deg2rad(middle)) / height))
    column = np.floor(rows["lon"].to_numpy(float) % 360 / 360 * around).astype(np.int64)
    return [row, column]


def _kinds(rows: pd.DataFrame) -> list[np.ndarray | pd.Series]:
    """What reports that are compared have in common, beside their place."""
    kinds: list[np.ndarray | pd.Series] = [rows["variable"]]
    for name in _KINDS:
        if name in rows:
            values = rows[name]
            kinds.append(np.floor(np.log(values) / np.log(1.1)) if name == "pres" else values)
    return kinds


def _label(keys: list[np.ndarray | pd.Series]) -> np.ndarray:
    """A number for each combination of keys; what is missing is a value too."""
    frame = pd.DataFrame({str(i): np.asarray(key) for i, key in enumerate(keys)})
    return frame.groupby(list(frame), dropna=False, sort=False).ngroup().to_numpy().copy()


def _circular(rows: pd.DataFrame) -> pd.Series:
    return rows["variable"].map(lambda v: _CIRCULAR.fullmatch(str(v)) is not None).astype(bool)
