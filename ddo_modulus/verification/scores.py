# SPDX-License-Identifier: Apache-2.0
r"""Scores of an ensemble of fields against the truth.

A calibrated ensemble and the truth are draws from one distribution. Then the spread predicts the
error of the ensemble mean, every rank of the truth among the members is equally likely, and the
continuous ranked probability score (CRPS) is as small as that distribution allows:

.. math::
    \mathrm{CRPS}(F, y) = \mathrm{E} |X - y| - \tfrac12 \mathrm{E} |X - X'|,
    \qquad X, X' \sim F .

Scores are *fair*: their expectation does not depend on the number of members.

Axes: ``E`` members (first), ``H W`` grid (last), ``...`` fields between them, in any number.
Means are taken in float64 over all fields and points, with optional ``weights`` (the points'
areas, say) and ``mask`` that broadcast to ``(..., H, W)``. A mask is true where a point counts;
what the fields hold elsewhere, NaN included, has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.stats import chisquare
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.verification.tables import markdown, rich

if TYPE_CHECKING:
    from rich.table import Table


def average(x: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Take the weighted mean over all points that count.

    Args:
        x: Values, ``(..., H, W)``.
        weights: Weights that are not negative, broadcast to ``x``.
        mask: True where a point counts, broadcast to ``x``.

    Returns:
        The mean, a float64 scalar.

    Raises:
        InputError: If a shape does not fit or no weight is left.
    """
    values = x.double()
    share = torch.ones_like(values)
    if weights is not None:
        share = _fit(weights, x, "weights").to(share)
    if mask is not None:
        counts = _fit(mask, x, "mask").to(x.device, torch.bool)
        values = torch.where(counts, values, 0.0)
        share = torch.where(counts, share, 0.0)
    norm = share.sum()
    if not norm > 0:
        raise InputError("no point is left to score: the mask or the weights exclude all")
    return (values * share).sum() / norm


def rmse(
    ensemble: Tensor, truth: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Root-mean-square error of the ensemble mean.

    Args:
        ensemble: ``(E, ..., H, W)``.
        truth: ``(..., H, W)``, same units.
        weights: See `average`.
        mask: See `average`.

    Returns:
        A float64 scalar in the fields' units.

    Raises:
        InputError: If shapes do not fit or nothing is left to score.
    """
    _check(ensemble, truth, members=1)
    error = _anomalies(ensemble, truth).mean(0)
    return average(error.double().square(), weights=weights, mask=mask).sqrt()


def spread(
    ensemble: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Square root of the mean unbiased ensemble variance.

    Variances are averaged, not standard deviations (Fortin et al., J. Hydrometeor. 15, 2014).

    Args:
        ensemble: ``(E, ..., H, W)``, at least two members.
        weights: See `average`.
        mask: See `average`.

    Returns:
        A float64 scalar in the fields' units.

    Raises:
        InputError: If there are fewer than two members or nothing is left to score.
    """
    _check(ensemble, None, members=2)
    variance = _anomalies(ensemble, ensemble[0]).var(0, correction=1)
    return average(variance, weights=weights, mask=mask).sqrt()


def spread_skill_ratio(
    ensemble: Tensor, truth: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    r"""Ratio of spread to error, one for a calibrated ensemble of any size.

    With truth and members drawn alike with variance :math:`s^2`, the mean of ``E`` members misses
    the truth by :math:`s^2 (1 + 1/E)`: hence the factor :math:`\sqrt{(E + 1) / E}` on the spread
    (Fortin et al., J. Hydrometeor. 15, 2014, equation 15).

    Args:
        ensemble: ``(E, ..., H, W)``, at least two members.
        truth: ``(..., H, W)``, same units.
        weights: See `average`.
        mask: See `average`.

    Returns:
        A float64 scalar without units; below one: over-confident.

    Raises:
        InputError: If shapes do not fit or nothing is left to score.
    """
    members = _check(ensemble, truth, members=2)
    return (
        math.sqrt((members + 1) / members)
        * spread(ensemble, weights=weights, mask=mask)
        / rmse(ensemble, truth, weights=weights, mask=mask)
    )


def fair_crps(ensemble: Tensor, truth: Tensor) -> Tensor:
    """Fair CRPS of an ensemble, point by point.

    The pairs' mean distance is divided by ``E (E - 1)``, not ``E^2`` (Ferro, Q. J. R. Meteorol.
    Soc. 140, 2014; Zamo and Naveau, Math. Geosci. 50, 2018). Sorting the members turns the sum
    over pairs into a weighted sum: O(E log E).

    PhysicsNeMo's `kcrps` is the same formula, as fast. But importing it takes as long as all of
    ``ddo verify`` does and warns of a deprecated compiler, and it needs anomalies to be precise.

    Args:
        ensemble: ``(E, ..., H, W)``, at least two members.
        truth: ``(..., H, W)``, same units.

    Returns:
        ``(..., H, W)`` in the fields' units; its expectation does not depend on ``E``.

    Raises:
        InputError: If shapes do not fit or there are fewer than two members.
    """
    members = _check(ensemble, truth, members=2)
    anomalies = _anomalies(ensemble, truth)
    rank = torch.arange(1, members + 1, device=anomalies.device, dtype=anomalies.dtype)
    factor = (2.0 * rank - members - 1.0) / (members * (members - 1))
    ordered = anomalies.sort(0).values
    return anomalies.abs().mean(0) - torch.tensordot(factor, ordered, dims=1)


def gaussian_crps(mean: Tensor, std: Tensor, truth: Tensor) -> Tensor:
    """CRPS of a normal distribution, point by point.

    Gneiting et al., Mon. Weather Rev. 133 (2005), equation 5. The score of a Gaussian analysis
    (optimal interpolation), for which no ensemble need be drawn.

    Args:
        mean: Mean, broadcast with the others.
        std: Standard deviation, not negative; where it is zero the score is the absolute error.
        truth: Truth, same units.

    Returns:
        The score in the fields' units, in the arguments' common shape.
    """
    error = truth - mean
    z = error / torch.where(std > 0, std, 1.0)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
    score = std * (z * torch.erf(z / math.sqrt(2.0)) + 2.0 * density - 1.0 / math.sqrt(math.pi))
    return torch.where(std > 0, score, error.abs())


@dataclass(frozen=True)
class RankHistogram:
    """Counts of the truth's rank among the members, with a test of flatness.

    Attributes:
        counts: Number of points at each rank, ``(E+1,)``, int64. A bowl: over-confident; a dome:
            under-confident; a slope: biased.
        chi_square: Pearson's statistic against equal counts, with ``E`` degrees of freedom.
        p_value: Probability of a statistic at least as large from a calibrated ensemble and
            *independent points*. Neighbours in a field are correlated, which makes it far too
            small: draw one point (or a few, far apart) from each field for a valid test.
    """

    counts: Tensor
    chi_square: float
    p_value: float

    @classmethod
    def of(cls, counts: Tensor) -> RankHistogram:
        """Test counts ``(E+1,)``, which may be sums over several parts.

        Raises:
            InputError: If there are none.
        """
        if not counts.any():
            raise InputError("no point is left to count: the mask excludes all")
        test = chisquare(counts.double().cpu())
        return cls(counts, float(test.statistic), float(test.pvalue))


def rank_histogram(
    ensemble: Tensor,
    truth: Tensor,
    *,
    generator: torch.Generator,
    mask: Tensor | None = None,
    points_per_field: int | None = None,
) -> RankHistogram:
    """Count the ranks of the truth among the members, ties broken at random.

    Hamill, Mon. Weather Rev. 129 (2001).

    Args:
        ensemble: ``(E, ..., H, W)``.
        truth: ``(..., H, W)``.
        generator: Source of randomness for ties and for the choice of points.
        mask: True where a point counts, broadcast to ``truth``.
        points_per_field: Points to draw from each ``(H, W)`` field, without replacement; a field
            with fewer gives all it has. ``None`` takes every point.

    Returns:
        Counts, statistic and p-value.

    Raises:
        InputError: If shapes do not fit, a counted value is not finite or none is left to count.
    """
    members = _check(ensemble, truth, members=1)
    counts = torch.ones_like(truth, dtype=torch.bool)
    if mask is not None:
        counts = _fit(mask, truth, "mask").to(truth.device, torch.bool)
    if points_per_field is not None:
        if points_per_field < 1:
            raise InputError(f"points_per_field={points_per_field} must be at least 1")
        # The largest of random keys, excluded points last, are a draw without replacement.
        keys = _uniform(truth.shape, generator, truth.device).flatten(-2)
        keys = torch.where(counts.flatten(-2), keys, -1.0)
        best = keys.topk(min(points_per_field, keys.shape[-1]), dim=-1).indices
        drawn = torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, best, True)
        counts = counts & drawn.unflatten(-1, truth.shape[-2:])
    if not torch.isfinite(truth[counts]).all() or not torch.isfinite(ensemble[:, counts]).all():
        raise InputError("a point to count is not finite; leave it out with the mask")
    below = (ensemble < truth).sum(0)
    ties = (ensemble == truth).sum(0)
    rank = below + (_uniform(truth.shape, generator, truth.device) * (ties + 1)).long()
    return RankHistogram.of(torch.bincount(rank[counts], minlength=members + 1))


@dataclass(frozen=True)
class Scores:
    """One row of a table of scores.

    Attributes:
        label: What was scored.
        units: Units of ``rmse``, ``spread`` and ``crps``.
        members: Ensemble size.
        points: Number of points that count, over all fields.
        rmse: Root-mean-square error of the ensemble mean.
        spread: Root mean unbiased ensemble variance.
        ratio: Spread over error, corrected for the ensemble's size; see `spread_skill_ratio`.
        crps: Mean fair CRPS.
    """

    label: str
    units: str
    members: int
    points: int
    rmse: float
    spread: float
    ratio: float
    crps: float


def score(
    ensemble: Tensor,
    truth: Tensor,
    *,
    label: str,
    units: str,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> Scores:
    """Compute all scores of an ensemble.

    Args:
        ensemble: ``(E, ..., H, W)``, at least two members.
        truth: ``(..., H, W)``, same units.
        label: Name of the row.
        units: Units of the fields.
        weights: See `average`.
        mask: See `average`; false at observed points to score the unobserved ones.

    Returns:
        The row.

    Raises:
        InputError: If shapes do not fit or nothing is left to score.
    """
    members = _check(ensemble, truth, members=2)
    points = truth.numel() if mask is None else int(_fit(mask, truth, "mask").bool().sum())
    error = float(rmse(ensemble, truth, weights=weights, mask=mask))
    width = float(spread(ensemble, weights=weights, mask=mask))
    ratio = math.sqrt((members + 1) / members) * width / error if error > 0 else math.nan
    crps = float(average(fair_crps(ensemble, truth), weights=weights, mask=mask))
    return Scores(label, units, members, points, error, width, ratio, crps)


_COLUMNS = ("", "units", "members", "points", "RMSE", "spread", "spread/RMSE", "CRPS")


def _cells(row: Scores) -> tuple[str, ...]:
    numbers = (f"{value:.3g}" for value in (row.rmse, row.spread))
    return (
        row.label,
        row.units,
        str(row.members),
        f"{row.points:,}",
        *numbers,
        f"{row.ratio:.2f}",
        f"{row.crps:.3g}",
    )


def pool(rows: Sequence[Scores]) -> Scores:
    """Scores of all fields together, from those of parts of them.

    Args:
        rows: Scores of the same ensemble size over fields of one grid, without a mask.

    Returns:
        The row, with the label and units of the first.
    """
    points = sum(row.points for row in rows)
    first = rows[0]

    def mean(values: Iterable[float]) -> float:
        return sum(v * r.points for v, r in zip(values, rows, strict=True)) / points

    error = math.sqrt(mean(row.rmse**2 for row in rows))
    width = math.sqrt(mean(row.spread**2 for row in rows))
    ratio = (
        math.sqrt((first.members + 1) / first.members) * width / error if error > 0 else math.nan
    )
    crps = mean(row.crps for row in rows)
    return Scores(first.label, first.units, first.members, points, error, width, ratio, crps)


def markdown_table(rows: Sequence[Scores]) -> str:
    """Render scores as a Markdown table, one row each, columns aligned."""
    return markdown(_COLUMNS, [_cells(row) for row in rows])


def rich_table(rows: Sequence[Scores], *, title: str | None = None) -> Table:
    """Render scores as a table for the terminal."""
    return rich(_COLUMNS, [_cells(row) for row in rows], title=title)


def _check(ensemble: Tensor, truth: Tensor | None, *, members: int) -> int:
    """Check ``(E, ..., H, W)`` against ``(..., H, W)`` and return ``E``."""
    if ensemble.ndim < 3:
        raise InputError(
            f"ensemble has shape {tuple(ensemble.shape)}; expected (E, ..., H, W), members first"
        )
    if truth is not None and ensemble.shape[1:] != truth.shape:
        raise InputError(
            f"ensemble of shape {tuple(ensemble.shape)} and truth of shape {tuple(truth.shape)} "
            "do not fit; expected (E, ..., H, W) and (..., H, W)"
        )
    if ensemble.shape[0] < members:
        raise InputError(
            f"the ensemble has {ensemble.shape[0]} member(s); this score needs {members}"
        )
    return ensemble.shape[0]


def _anomalies(ensemble: Tensor, origin: Tensor) -> Tensor:
    """Subtract an origin, at least in float32: at 280 K single precision keeps only 3e-5 K."""
    dtype = torch.promote_types(torch.promote_types(ensemble.dtype, origin.dtype), torch.float32)
    return ensemble.to(dtype) - origin.to(dtype)


def _fit(x: Tensor, target: Tensor, name: str) -> Tensor:
    """Broadcast to the target's shape, or say which argument does not fit."""
    try:
        return x.expand(target.shape)
    except RuntimeError as error:
        raise InputError(
            f"{name} of shape {tuple(x.shape)} does not broadcast to {tuple(target.shape)}"
        ) from error


def _uniform(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw from [0, 1) on the generator's device, in double precision: no ties among keys."""
    draw = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return draw.to(device)
