# SPDX-License-Identifier: Apache-2.0
"""Generated fields against true ones that are not the same states: are they of one law?

Every field is measured once (`Measures`); what is compared are means over fields, so a resampling
is no more than other weights. Each distance comes with the truth's own, of resamplings of equal
size (`resampling`): about one of it is as near as samples can come.

Fields of two grids are compared by their spectra over the shells that both fill, by features that
know no grid (`scattering`), and for the rest on the coarser of the two grids, the finer fields
truncated to its band.

Axes: ``N`` fields, ``T`` frames, ``H W`` grid, ``S`` shells, ``K`` numbers measured on a field,
``R`` resamplings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import Grid
from ddo_modulus.verification.distribution import PointValues
from ddo_modulus.verification.measures import Measured, Measures, temporal_lags
from ddo_modulus.verification.resampling import resample, resample_in_order
from ddo_modulus.verification.scattering import f2id_of_features
from ddo_modulus.verification.structure import (
    ORDERS,
    rms_log_ratio,
    separations,
    spectral_distance,
)
from ddo_modulus.verification.temporal import seam_ratio

#: Tail quantiles that are compared.
LEVELS = (0.001, 0.01, 0.99, 0.999)

#: Heads of the columns of :meth:`Quantity.cells`.
COLUMNS = (
    "",
    "units",
    "samples",
    "truth",
    "distance",
    "truth's own, median",
    "95 %",
    "distance/own",
)

_BINS = 60
_BATCH = 64  # fields measured together


@dataclass(frozen=True)
class Quantity:
    """One row of the table.

    Attributes:
        name: What is compared.
        units: Of ``samples``, ``truth`` and ``distance``; ``ln`` is a difference of natural
            logarithms, ``1`` a pure number.
        samples: Its value of the samples; None for a curve.
        truth: Its value of the truth; None for a curve.
        distance: Between the two.
        own_median: Median distance between resamplings of the truth of equal sizes.
        own_high: Their 95 % quantile.
    """

    name: str
    units: str
    samples: float | None
    truth: float | None
    distance: float
    own_median: float
    own_high: float

    @property
    def ratio(self) -> float:
        """Distance over the truth's own median; about one for samples of the truth's law."""
        return self.distance / self.own_median if self.own_median > 0 else math.nan

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        values = (self.samples, self.truth, self.distance, self.own_median, self.own_high)
        numbers = ("" if value is None else f"{value:.3g}" for value in values)
        ratio = f"{self.ratio:.2f}" if math.isfinite(self.ratio) else ""
        return self.name, self.units, *numbers, ratio


@dataclass(frozen=True)
class Curve:
    """A function of wavenumber, distance, value or time, of both sets; ``(K,)`` each.

    Attributes:
        x: Abscissa.
        samples: Of the samples.
        truth: Of the truth.
        low: Where the truth's law has one in twenty sets of samples below it.
        high: Where it has one in twenty above it.
    """

    x: Tensor
    samples: Tensor
    truth: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Comparison:
    """Distances and curves of one variable.

    Attributes:
        quantities: Rows of the table.
        curves: By name.
    """

    quantities: list[Quantity] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Quantity:
        return next(quantity for quantity in self.quantities if quantity.name == name)


class Statistic(NamedTuple):
    """A number or curve of both sets, ``(...)``, and of the resamplings, ``(R, ...)``.

    Attributes:
        samples: Of the samples.
        truth: Of the truth.
        like_samples: Of the truth, resampled as the samples.
        like_truth: Of the truth, resampled as itself.
    """

    samples: Tensor
    truth: Tensor
    like_samples: Tensor
    like_truth: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Statistic:
        """The same function of all four."""
        return Statistic(*map(function, self))

    def take(self, *index: int | slice) -> Statistic:
        """The same part of all four, by the last axes."""
        return self.map(lambda x: x[(..., *index)])


class Comparer:
    """Turns measures of both sets into quantities and curves.

    Args:
        measures: How they were measured.
        samples: Measures of the samples.
        truth: Measures of the truth.
        units: Of the fields.
        resamples: Pairs of resamplings of the truth.
        seed: Of the resamplings.
    """

    def __init__(
        self,
        measures: Measures,
        samples: Measured,
        truth: Measured,
        *,
        units: str = "1",
        resamples: int = 100,
        seed: int = 0,
    ) -> None:
        self.measures, self.samples, self.truth, self.units = measures, samples, truth, units
        self.resamples, self.generator = resamples, torch.Generator().manual_seed(seed)
        self.pairs = resample(truth.size, samples.size, resamples, self.generator)
        #: Variance of the truth about its mean.
        self.variance = float(truth.mean("moments")[0, 1]) or 1.0
        self.result = Comparison()

    def run(self) -> Comparison:
        """Compare all that was measured."""
        power = self._statistic("power")
        self._distance("log-spectrum distance", "ln", spectral_distance, power)
        self._curve("spectrum", self.measures.wavenumbers, power, positive=True)
        self._moments()
        self._point_values()
        self._pairs()
        if self.measures.lags:
            self._temporal()
        if self.measures.octaves:
            mine, own = (side.values["features"] for side in (self.samples, self.truth))
            found = f2id_of_features(mine, own, self.pairs, self.measures.octaves)
            numbers = found.distance, found.own_median, found.own_high
            self.result.quantities.append(Quantity("F2ID", "1", None, None, *numbers))
        return self.result

    def _statistic(self, name: str) -> Statistic:
        """Means of a measure."""
        return Statistic(
            self.samples.mean(name)[0],
            self.truth.mean(name)[0],
            self.truth.mean(name, self.pairs.samples),
            self.truth.mean(name, self.pairs.truth),
        )

    def _add(
        self,
        name: str,
        units: str,
        distance: Tensor,
        own: Tensor,
        values: tuple[float, float] | None = None,
    ) -> None:
        mine, true = (None, None) if values is None else values
        numbers = (float(x) for x in (distance, own.median(), own.quantile(0.95)))
        self.result.quantities.append(Quantity(name, units, mine, true, *numbers))

    def _distance(
        self,
        name: str,
        units: str,
        distance: Callable[[Tensor, Tensor], Tensor],
        x: Statistic,
    ) -> None:
        """Add the distance between two curves."""
        own = distance(x.like_samples, x.like_truth)
        self._add(name, units, distance(x.samples, x.truth), own)

    def _number(self, name: str, units: str, x: Statistic) -> None:
        """Add two numbers and their difference."""
        values = float(x.samples), float(x.truth)
        own = (x.like_samples - x.like_truth).abs()
        self._add(name, units, (x.samples - x.truth).abs(), own, values)

    def _curve(self, name: str, abscissa: Tensor, x: Statistic, *, positive: bool = False) -> None:
        """Keep a curve; the band of a positive one is moved by factors, not differences."""
        if positive:
            tiny = torch.finfo(torch.float64).tiny
            band = x.truth * x.like_samples / x.like_truth.clamp_min(tiny)
        else:
            band = x.truth + x.like_samples - x.like_truth
        low, high = band.quantile(0.05, dim=0), band.quantile(0.95, dim=0)
        self.result.curves[name] = Curve(abscissa, x.samples, x.truth, low, high)

    def _moments(self) -> None:
        moments = self._statistic("moments").map(_standardised)
        step, shift = 1e-6 * math.sqrt(self.variance), self.measures.mean
        # To a millionth of the standard deviation: less is round-off.
        mean = moments.take(0).map(lambda m: (m / step).round() * step + shift)
        self._number("mean", self.units, mean)
        self._number("standard deviation", self.units, moments.take(1))
        self._number("skewness", "1", moments.take(2))
        self._number("kurtosis", "1", moments.take(3))

    def _point_values(self) -> None:
        area, mean = self.measures.area.flatten()[self.measures.points], self.measures.mean
        values = [side.values["values"] for side in (self.samples, self.truth)]
        equal = [torch.full((len(v),), 1.0 / len(v), dtype=torch.float64) for v in values]
        mine, own = (PointValues.of(v, area) for v in values)
        both = PointValues.of(torch.cat(values), area)
        signed = torch.cat([equal[0], -equal[1]])
        pairs = zip(self.pairs.samples, self.pairs.truth, strict=True)
        floor = torch.stack([own.wasserstein(one - other) for one, other in pairs])
        self._add("Wasserstein-1 distance", self.units, both.wasserstein(signed), floor)

        levels = torch.tensor(LEVELS, dtype=torch.float64)
        quantiles = Statistic(
            mine.quantiles(levels, equal[0]),
            own.quantiles(levels, equal[1]),
            torch.stack([own.quantiles(levels, w) for w in self.pairs.samples]),
            torch.stack([own.quantiles(levels, w) for w in self.pairs.truth]),
        )
        for k, level in enumerate(LEVELS):
            one = quantiles.take(k).map(lambda q: q + mean)
            self._number(f"quantile {100 * level:g} %", self.units, one)

        low, high = float(both.values[0]), float(both.values[-1])
        edges = torch.linspace(low, high if high > low else low + 1.0, _BINS + 1).double()
        density = Statistic(
            mine.density(edges, equal[0][None])[0],
            own.density(edges, equal[1][None])[0],
            own.density(edges, self.pairs.samples),
            own.density(edges, self.pairs.truth),
        )
        self._curve("histogram", (edges[1:] + edges[:-1]) / 2 + mean, density)

    def _pairs(self) -> None:
        distances, _ = separations(self.measures.grid)
        shape = (2, len(ORDERS) + 1, distances.shape[1])
        folded = self._statistic("pairs").map(lambda m: m.unflatten(-1, shape))
        for place, order in enumerate(ORDERS):
            part = folded.take(place, slice(None))
            flat = part.map(lambda m: m.flatten(-2))
            self._distance(f"structure function S{order}", "ln", rms_log_ratio, flat)
            for axis, label in enumerate(("rows", "columns")):
                along = part.take(axis, slice(None))
                self._curve(f"S{order} along {label}", distances[axis], along, positive=True)
        products = folded.take(-1, slice(None)).map(lambda m: m / self.variance)
        flat = products.map(lambda m: m.flatten(-2))
        self._distance("spatial autocovariance", "1", _rms_difference, flat)
        for axis, label in enumerate(("rows", "columns")):
            along = products.take(axis, slice(None))
            self._curve(f"autocovariance along {label}", distances[axis], along)

    def _temporal(self) -> None:
        lagged = self._statistic("lagged").map(lambda m: m / self.variance)
        self._distance("temporal autocovariance", "1", _rms_difference, lagged)
        lags = torch.arange(len(lagged.truth), dtype=torch.float64)
        self._curve("temporal autocovariance", lags, lagged)

        energy = self._statistic("differences").take(0)
        squared = "1" if self.units in ("", "1") else f"({self.units})²"
        self._number("time-difference energy", squared, energy)
        jumps = self._statistic("difference power")
        name = "log-spectrum distance of time differences"
        self._distance(name, "ln", spectral_distance, jumps)
        self._curve("time-difference spectrum", self.measures.wavenumbers, jumps, positive=True)

        mine, own = (
            side.values["differences"].view(side.size)[:, :-1]
            for side in (self.samples, self.truth)
        )
        ratio = seam_ratio(mine)
        size = (mine.shape[0], mine.shape[1])
        drawn = resample_in_order(own, size, self.resamples, self.generator)
        null = torch.stack([seam_ratio(energies) for energies in drawn])
        own_seams = (null - 1).abs().amax(1)
        self._add("seam: largest |frame/mean - 1|", "1", (ratio - 1).abs().max(), own_seams)
        low, high = null.quantile(0.05, dim=0), null.quantile(0.95, dim=0)
        frames = torch.arange(len(ratio), dtype=torch.float64)
        self.result.curves["seam"] = Curve(frames, ratio, torch.ones_like(ratio), low, high)


def compare(
    samples: Float[Tensor, "*N H W"],
    truth: Float[Tensor, "*M H2 W2"],
    grid: Grid,
    *,
    trajectories: bool | None = None,
    units: str = "1",
    largest: float | None = None,
    octaves: int | None = None,
    resamples: int = 100,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare generated with true fields.

    Args:
        samples: ``(N, H, W)`` fields or ``(N, T, H, W)`` trajectories, on any device.
        truth: The same, on this or another grid of the domain.
        grid: Of the truth.
        trajectories: Whether the samples' frames follow each other as the truth's do, at the same
            interval; if they have an axis of frames, by default.
        units: Of the fields.
        largest: Largest wavenumber of the spectra (angular, per length of the domain).
        octaves: Of the F2ID's features.
        resamples: Pairs of resamplings of the truth.
        seed: Of the resamplings.
        progress: Called with the fields measured and their total.

    Raises:
        InputError: If a value is not finite or the sets do not fit together.
    """
    if trajectories is None:
        trajectories = samples.ndim == 4 and truth.ndim == 4
    if trajectories and (samples.ndim != 4 or truth.ndim != 4):
        raise InputError("trajectories need an axis of frames: (N, T, H, W) on both sides")
    for name, x in (("samples", samples), ("truth", truth)):
        if x.ndim not in (3, 4) or not bool(x.isfinite().all()):
            raise InputError(
                f"{name} of shape {tuple(x.shape)} must be finite, (N, H, W) or (N, T, H, W)"
            )
    runs = [x if x.ndim == 4 else x[:, None] for x in (samples, truth)]
    area = torch.from_numpy(grid.area()).to(truth.device)
    measures = Measures(
        grid.at((samples.shape[-2], samples.shape[-1])),
        grid,
        mean=float((runs[1].double() * area).mean()),
        fields=max(x.shape[0] * x.shape[1] for x in runs),
        lags=temporal_lags(runs[0].shape[1], runs[1].shape[1]) if trajectories else 0,
        largest=largest,
        octaves=octaves,
    )
    total = sum(x.shape[0] * x.shape[1] for x in runs)
    done = 0

    def parts(x: Tensor) -> Iterable[dict[str, Tensor]]:
        nonlocal done
        for run in x:
            for start in range(0, len(run), _BATCH):
                count = min(_BATCH, len(run) - start)
                yield measures(run[start : start + count + measures.lags], count)
                done += count
                if progress is not None:
                    progress(done, total)

    # Fields without order in time are measured many at a time, and each stands for itself.
    mine = runs[0] if trajectories else runs[0].reshape(1, -1, *runs[0].shape[-2:])
    own = runs[1] if trajectories else runs[1].reshape(1, -1, *runs[1].shape[-2:])
    size = (len(runs[0]), runs[0].shape[1]) if trajectories else (mine.shape[1], 1)
    return Comparer(
        measures,
        Measured.of(parts(mine), size),
        Measured.of(parts(own), (len(runs[1]), runs[1].shape[1])),
        units=units,
        resamples=resamples,
        seed=seed,
    ).run()


def _standardised(raw: Float[Tensor, "*R K"]) -> Float[Tensor, "*R K"]:
    """Mean, standard deviation, skewness and kurtosis from raw moments of orders 1 to 4."""
    m, two, three, four = raw.unbind(-1)
    variance = (two - m**2).clamp_min(0)
    third = three - 3 * m * two + 2 * m**3
    fourth = four - 4 * m * three + 6 * m**2 * two - 3 * m**4
    scale = torch.where(variance > 0, variance, 1.0)
    return torch.stack([m, variance.sqrt(), third / scale**1.5, fourth / scale**2], -1)


def _rms_difference(one: Float[Tensor, "*R K"], other: Float[Tensor, "*R K"]) -> Tensor:
    return (one - other).square().mean(-1).sqrt()
