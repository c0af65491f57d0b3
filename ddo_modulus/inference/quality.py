# SPDX-License-Identifier: Apache-2.0
r"""Quality control of reports: gross errors, duplicates, thinning and superobbing.

Axes: ``T`` analyses, ``M`` observations, ``N`` coordinates of the prior.

*Gross errors.* If prior and observation errors are calibrated, an innovation :math:`d = y - H(m)`
has the variance :math:`v = H P H^T + R`. A report is rejected if :math:`|d| / \sqrt v` exceeds a
threshold. This is the background check of operational centres (Lorenc and Hammon 1988, Q. J. R.
Meteorol. Soc. 114, 515). On a day for which the prior is too narrow, good reports have large
innovations too. So the expected variance is scaled up by a robust estimate from the innovations of
the day: the median of :math:`d^2 / v` over .455, its value for a calibrated prior.

*Thinning* keeps one report of each cell, the one nearest in time. *Superobservations* are means
over the reports of a cell. A share :math:`\rho` of the error variance is an error of
representativeness, which reports in a cell have in common and which averaging does not reduce. With
weights :math:`w_i \propto 1 / \sigma_i^2`, the mean has the error variance

.. math:: \rho \left(\sum_i w_i \sigma_i\right)^2 + (1 - \rho) \sum_i w_i^2 \sigma_i^2 .

All cells have the same height, and about the same width at the latitude of their middle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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

#: Innovations larger than this number of their expected standard deviations are gross errors.
GROSS_ERROR = 5.0

#: Share of the error variance that reports of one cell have in common.
REPRESENTATIVENESS = 0.25

_KM_PER_DEGREE = math.radians(1) * EARTH_RADIUS_KM

# Median of a squared standard normal variable.
_MEDIAN = 0.4549364

# Smallest number of reports of a variable for which the median is used, and the largest factor on
# the expected variance.
_ENOUGH, _WIDEST = 8, 15.0

# Variables whose reports cannot be averaged: wind directions.
_CIRCULAR = re.compile(r"wd(\d+m?)?")

# Columns that distinguish reports of one place and variable; pressures by layers of a tenth.
_KINDS = ("pres", "sensor_index", "satellite")


@dataclass(frozen=True)
class QualityControl:
    """Which reports an analysis uses, and with which errors.

    Attributes:
        gross_error: Largest innovation, in its expected standard deviations, which come from the
            prior (or the background and its errors) and the observation error
            (:func:`gross_errors`); None for no check.
        duplicates: ``"average"`` merges reports of one variable, place and time
            (:func:`average_duplicates`); ``"keep"`` treats them as independent.
        thinning_km: Spacing of :func:`thinned`; None for no thinning.
        superob_km: Spacing of :func:`superobservations`; None for none.
        representativeness: Share of the error variance that reports of one cell have in common,
            for superobservations.
        tolerance: Largest difference in time between report and analysis, before or after; or the
            first and the last offset. Durations, or text such as ``"10min"``.
        default_error: Error standard deviation, in physical units, of reports without one: one for
            all, or by variable; :data:`~ddo_modulus.observations.TYPICAL_ERROR` for others.
        accept: Smallest and largest mark of the column ``quality`` to use; reports without a mark
            are used. None for all marks.
        missing: What to do at a time without usable reports: ``"error"`` to raise, ``"prior"`` to
            draw from the prior (and the background, if there is one).
        operators: Observation operators of the reports; :func:`.report_operators` if None.

    Raises:
        InputError: If an option is out of range, or both ``thinning_km`` and ``superob_km`` are
            set.
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
        defaults = self.default_error
        each = list(defaults.values()) if isinstance(defaults, Mapping) else [defaults]
        if defaults is not None and not all(map(_is_positive, each)):
            raise InputError(
                f"default_error={defaults} must be a positive number, or one by variable"
            )
        if self.accept is not None:
            object.__setattr__(self, "accept", _marks(self.accept))

    @classmethod
    def of(cls, options: QualityControl | Mapping[str, Any] | None) -> QualityControl:
        """The options from such an object, a mapping (JSON, YAML), or None for the defaults.

        Raises:
            InputError: If an option is unknown, or a value is out of range.
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
            InputError: If ``operators`` is set, which is code.
        """
        if self.operators is not None:
            raise InputError("quality.operators are code, and cannot be saved with the options")
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "operators"}
        options["tolerance"] = [str(pd.Timedelta(offset)) for offset in self.offsets]
        options["accept"] = None if self.accept is None else list(self.accept)
        if isinstance(self.default_error, Mapping):
            options["default_error"] = {str(k): float(v) for k, v in self.default_error.items()}
        return options

    @property
    def reduces(self) -> bool:
        """Whether reports are thinned or merged."""
        merged = self.duplicates == "average" or self.superob_km is not None
        return merged or self.thinning_km is not None

    def unaccepted(self, rows: pd.DataFrame) -> pd.Series:
        """Which reports have a quality mark that is not accepted."""
        if self.accept is None or "quality" not in rows:
            return pd.Series(False, rows.index)
        mark = rows["quality"]
        return mark.notna() & ~mark.between(*self.accept)

    def notes(self, rows: pd.DataFrame) -> dict[str, int]:
        """Remarks on reports that are used: marks that are not, and several reports of one place.

        Args:
            rows: Reports of a checked table.
        """
        counts = {}
        if self.accept is None and "quality" in rows and (marked := int(rows["quality"].count())):
            marks = rows["quality"]
            counts[
                f"quality marks {marks.min():g} to {marks.max():g} not used, which "
                "quality.accept=[SMALLEST,LARGEST] would choose by"
            ] = marked
        if self.duplicates == "keep":
            label = _label([*_places(rows), *_kinds(rows)])
            again = int(pd.Series(label).duplicated().sum())
            if again:
                counts[
                    "taken as independent of another at the same place and time, which "
                    "duplicates=average would merge with it"
                ] = again
        return counts

    def errors(self, rows: pd.DataFrame) -> pd.Series:
        """Error standard deviations of reports, with defaults for reports without one.

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


def _is_positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < float(value) < math.inf  # type: ignore[arg-type]


def _marks(accept: object) -> tuple[float, float]:
    """The smallest and the largest accepted mark."""
    marks = list(accept) if isinstance(accept, Sequence) and not isinstance(accept, str) else []
    numbers = [m for m in marks if isinstance(m, int | float) and not isinstance(m, bool)]
    if not (len(numbers) == len(marks) == 2 and -math.inf < marks[0] <= marks[1] < math.inf):
        raise InputError(
            f"accept={marks or accept} must be two marks, the smallest and the largest, e.g. [0,1]"
        )
    return float(marks[0]), float(marks[1])


def normalized_innovations(at: LinearizedSystem) -> Float[Tensor, "T M"]:
    """Innovations over their standard deviations under the prior and the observation errors.

    Args:
        at: The system at the prior mean of each analysis (:meth:`.AnalysisSystem.at_mean`).
    """
    return at.innovation / at.expected_variance().sqrt()


def gross_errors(
    innovation: Float[Tensor, " M"], variables: np.ndarray, threshold: float = GROSS_ERROR
) -> Bool[np.ndarray, " M"]:
    """Which reports of one analysis are gross errors.

    Args:
        innovation: Normalised innovations (:func:`normalized_innovations`).
        variables: ``(M,)`` variable of each report; each variable has a scale of its own.
        threshold: Largest innovation, in standard deviations.

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
    """Merge reports of one variable, place and time into their mean.

    The mean has the smallest of their errors: duplicates are rarely independent measurements.

    Args:
        rows: Reports, with errors.

    Returns:
        Rows in their order; the first of each group holds the mean. Wind directions are unchanged.
    """
    keys = [*_places(rows), *_kinds(rows)]
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
    """Which reports to drop so that each cell has one report of each kind.

    The report nearest in time is kept; among equals, the one with the smallest error, then the
    first.

    Args:
        rows: Reports of one analysis, with errors.
        time: Analysis time.
        spacing_km: Height of a cell, km.

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
    """Average values, places and times of the reports in each cell.

    Wind directions are not averaged.

    Args:
        rows: Reports of one analysis, with errors.
        spacing_km: Height of a cell, km.
        representativeness: Share of the error variance that reports of a cell have in common.

    Returns:
        One row for each cell and kind. Index and columns that are not averaged are those of the
        first report.

    Raises:
        InputError: If the spacing is not positive, or the share not between 0 and 1.
    """
    if not 0 <= representativeness <= 1:
        raise InputError(f"representativeness={representativeness} must be between 0 and 1")
    cell = _label([*_cells(rows, spacing_km), *_kinds(rows)])
    alone = _circular(rows).to_numpy()
    cell[alone] = -1 - np.flatnonzero(alone)  # one cell for each
    _, first, label = np.unique(cell, return_index=True, return_inverse=True)
    variance = rows[ERROR_COLUMN].to_numpy(float) ** 2
    weight = 1 / variance
    weight = weight / np.bincount(label, weight)[label]

    def mean(values: np.ndarray, power: int = 1) -> np.ndarray:
        return np.bincount(label, weight**power * values)

    out = rows.iloc[first].copy()
    # Relative to the first report of a cell, since longitudes wrap and times are large numbers.
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
    """Row and column of the cell of each report."""
    if not (np.isfinite(spacing_km) and spacing_km > 0):
        raise InputError(f"a spacing of {spacing_km} km must be positive")
    height = spacing_km / _KM_PER_DEGREE
    row = np.floor((rows["lat"].to_numpy(float) + 90) / height).astype(np.int64)
    middle = np.clip((row + 0.5) * height - 90, -90, 90)
    around = np.maximum(1, np.round(360 * np.cos(np.deg2rad(middle)) / height))
    column = np.floor(rows["lon"].to_numpy(float) % 360 / 360 * around).astype(np.int64)
    return [row, column]


def _places(rows: pd.DataFrame) -> list[pd.Series]:
    """Time and place of each report, on one branch of longitude."""
    return [rows["time"], rows["lat"], rows["lon"] % 360]


def _kinds(rows: pd.DataFrame) -> list[np.ndarray | pd.Series]:
    """Columns that must agree for reports to be of one kind, apart from their place."""
    kinds: list[np.ndarray | pd.Series] = [rows["variable"]]
    for name in _KINDS:
        if name in rows:
            values = rows[name]
            kinds.append(np.floor(np.log(values) / np.log(1.1)) if name == "pres" else values)
    return kinds


def _label(keys: list[np.ndarray | pd.Series]) -> np.ndarray:
    """Number the combinations of keys; a missing value counts as a value."""
    frame = pd.DataFrame({str(i): np.asarray(key) for i, key in enumerate(keys)})
    return frame.groupby(list(frame), dropna=False, sort=False).ngroup().to_numpy().copy()


def _circular(rows: pd.DataFrame) -> pd.Series:
    return rows["variable"].map(lambda v: _CIRCULAR.fullmatch(str(v)) is not None).astype(bool)
