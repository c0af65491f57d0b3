# SPDX-License-Identifier: Apache-2.0
r"""Super-resolution: ensembles of fine states that agree with a coarse field.

Axes: ``T`` coarse fields, ``E`` members, ``B = T E`` states (members of a field are consecutive),
``P`` frames, ``C`` variables, ``H W`` grid, ``h w`` coarse grid.

There are two ways. A package with a coarse view as condition was trained for it (:mod:`.task`). A
prior of single states needs no training, since the value :math:`y` of a coarse cell is the mean of
the state over the cell, a linear observation

.. math:: y = A x + \epsilon, \qquad
    A_{ij} = \frac{|c_i \cap f_j|}{\sum_k |c_i \cap f_k|}, \qquad \epsilon \sim N(0, r^2),

Here :math:`c_i` are the coarse cells and :math:`f_j` the cells around the points of the state.
Moment matching conditions on :math:`y` as on any observation (Rozet et al., arXiv 2405.13712). The
error :math:`r` is small, so that draws agree with the coarse field and differ at smaller scales.
For a Gaussian prior, they are draws from the exact posterior, which is optimal interpolation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.prior import Prior, Recorder
from ddo_modulus.diffusion.samplers import StepCounter
from ddo_modulus.diffusion.task import CoarseWindow
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import BoxGrid, Grid, LatLonGrid, evenly_spaced, overlaps
from ddo_modulus.inference.generate import conditions_of, draw, finished
from ddo_modulus.inference.result import check_finite, sampling_note
from ddo_modulus.lexicon import check_units
from ddo_modulus.observations import LinearOperator, Observations
from ddo_modulus.posterior import (
    AnalysisSystem,
    Inflated,
    MomentMatching,
    innovation_inflation,
)

Array = np.ndarray


@dataclass(frozen=True)
class CoarseGrid:
    """Cells of a coarse grid, described by their centres.

    A cell extends half a step to either side of its centre, but not beyond a pole.

    Attributes:
        lat: ``(h,)`` row coordinates, evenly spaced, in either direction.
        lon: ``(w,)`` column coordinates, evenly spaced and ascending; on the globe they may start
            anywhere, and wrap.

    Raises:
        InputError: If a coordinate is not as described.
    """

    lat: Array
    lon: Array

    def __post_init__(self) -> None:
        for name in ("lat", "lon"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))

    @classmethod
    def blocks(cls, grid: Grid, window: CoarseWindow) -> CoarseGrid:
        """The cells of a coarse view of a grid."""
        axes = []
        for axis, few in zip((grid.lat, grid.lon), window.shape(grid.shape), strict=True):
            place = (np.arange(few) + 0.5) * len(axis) / few - 0.5
            axes.append(axis[0] + place * (axis[1] - axis[0]))
        return cls(*axes)

    @classmethod
    def of(cls, grid: Grid, factor: float) -> CoarseGrid:
        """Cells ``factor`` times as large as those of a grid, over its whole domain.

        On a global grid the first meridian stays the same. If the grid has points at the poles, the
        coarse cells have centres there.

        Raises:
            InputError: If the factor is below one, or leaves a single row or column.
        """
        window = CoarseWindow(factor)
        if not isinstance(grid, LatLonGrid) or not grid.is_global:
            return cls.blocks(grid, window)
        height, width = window.shape(grid.shape)
        if np.abs(grid.lat[[0, -1]]).min() > 90 - 1e-6:
            height = round((grid.shape[0] - 1) / factor) + 1
        coarse = grid.at((height, width))
        return cls(coarse.lat, coarse.lon)

    @property
    def shape(self) -> tuple[int, int]:
        """``(h, w)``."""
        return len(self.lat), len(self.lon)

    def weights(self, grid: Grid) -> tuple[Float[Tensor, "h H"], Float[Tensor, "w W"]]:
        """Weights of the rows and columns of a grid in the mean over each cell; they sum to one.

        Raises:
            InputError: If a cell extends beyond the cells of the grid.
        """
        lat, lon = evenly_spaced(self.lat, "coarse lat"), self.lon
        periodic = (False, False)
        if isinstance(grid, LatLonGrid):
            lon = np.unwrap(lon, period=360.0)
            lon = lon + 360.0 * np.round((grid.lon.mean() - lon.mean()) / 360.0)
            periodic = (False, grid.is_global)
        elif isinstance(grid, BoxGrid):
            periodic = (grid.periodic, grid.periodic)
        lon = evenly_spaced(lon, "coarse lon")
        if lon[1] < lon[0]:
            raise InputError("coarse lon must ascend; sort the data by longitude first")
        rows = _overlap(grid.lat, lat, periodic[0], "lat", isinstance(grid, LatLonGrid))
        columns = _overlap(grid.lon, lon, periodic[1], "lon")
        rows = rows * grid.area()[:, 0]
        return tuple(  # type: ignore[return-value]
            torch.from_numpy(share / share.sum(1, keepdims=True)) for share in (rows, columns)
        )

    def means(self, x: Float[Tensor, "*B H W"], grid: Grid) -> Float[Tensor, "*B h w"]:
        """Means of fields over the cells."""
        rows, columns = (weight.to(x) for weight in self.weights(grid))
        return rows @ x @ columns.mT

    def operator(self, grid: Grid, channels: int) -> LinearOperator:
        """Means of every channel over the cells, in the order ``C h w``.

        Raises:
            InputError: As for :meth:`weights`.
        """
        (row, row_weight), (column, column_weight) = (_sparse(w) for w in self.weights(grid))
        index = row[:, None, :, None] * grid.shape[1] + column[None, :, None, :]
        weight = row_weight[:, None, :, None] * column_weight[None, :, None, :]
        index, weight = (v.flatten(2).flatten(0, 1) for v in (index, weight))
        start = torch.arange(channels) * grid.shape[0] * grid.shape[1]
        index = (start[:, None, None] + index).flatten(0, 1)
        return LinearOperator(index, weight.repeat(channels, 1), torch.zeros(len(index)))


def _overlap(fine: Array, coarse: Array, periodic: bool, name: str, poles: bool = False) -> Array:
    """Share of each of ``n`` fine cells that is in each of ``m`` coarse cells, ``(m, n)``."""
    count, step = len(fine), fine[1] - fine[0]
    place = (coarse - fine[0]) / step
    half = abs((coarse[1] - coarse[0]) / step) / 2
    low, high = place - half, place + half
    if poles:  # a cell at a pole ends there
        ends = np.sort((np.array([-90.0, 90.0]) - fine[0]) / step)
        low, high = np.clip(low, *ends), np.clip(high, *ends)
    outside = (low < -0.5 - 1e-6) | (high > count - 0.5 + 1e-6)
    if not periodic and outside.any():
        border = fine[[0, -1]] + np.array([-0.5, 0.5]) * step
        raise InputError(
            f"{int(outside.sum())} of {len(coarse)} coarse cells reach out of the grid, the first "
            f"at {name}={coarse[outside][0]:g}: it takes cells of {abs(coarse[1] - coarse[0]):g} "
            f"within {name} {border.min():g} to {border.max():g}. Leave the others out"
        )
    if periodic and 2 * half * len(coarse) > count + 1e-6:
        raise InputError(f"the coarse cells overlap: {name} covers more than one period")
    share = np.zeros((len(coarse), count))
    for turn in (-count, 0, count) if periodic else (0,):
        share += overlaps(low, high, np.arange(count + 1) + turn - 0.5)
    return np.where(share < 1e-9, 0.0, share)


def _sparse(weight: Float[Tensor, "m n"]) -> tuple[Tensor, Tensor]:
    """Indices and values of the nonzero weights, padded with zeros, ``(m, k)`` each."""
    width = int((weight != 0).sum(1).max())
    index = (weight != 0).int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return index, weight.gather(1, index).float()


def conditioned(
    package: Package,
    times: Sequence[np.datetime64] | Array,
    means: Float[Tensor, "T C h w"],
    cells: CoarseGrid,
    *,
    shape: tuple[int, int] | None = None,
    error: float = 0.01,
    posterior: PosteriorConfig | Mapping[str, Any] | None = None,
    engine: Prior | None = None,
) -> MomentMatching:
    """Condition a prior of single states on means over coarse cells.

    Args:
        package: The prior.
        times: ``(T,)`` UTC.
        means: Means over the cells, in physical units.
        cells: The coarse cells.
        shape: Grid of the states; the package's own if None.
        error: Error standard deviation of a mean, in standard deviations of its variable.
        posterior: Options of sampling; None for those of the package.
        engine: Evaluates the package's prior (:mod:`ddo_modulus.engines`); the operator itself if
            None.

    Returns:
        The posterior, in the operator's units.

    Raises:
        InputError: If an argument is out of range or does not fit the package.
    """
    config = PosteriorConfig.of(posterior).resolve(package)
    channels, count = len(package.channels), len(times)
    if package.task.frames > 1 or package.task.coarse is not None:
        raise InputError("coarse cells condition a prior of single states without a coarse view")
    if tuple(means.shape) != (count, channels, *cells.shape):
        raise InputError(
            f"the coarse fields have shape {tuple(means.shape)}; expected "
            f"{(count, channels, *cells.shape)}"
        )
    if not 0 < error < np.inf:
        raise InputError(f"error={error} must be positive and finite")
    grid = _grid_at(package, shape)
    statistics = package.normalization.to("cpu")
    hours = package.hours(np.asarray(times)) if statistics.per_hour else slice(None)
    mean, std = (
        v[hours].double().expand(-1, channels, *grid.shape)
        for v in (statistics.mean, statistics.std)
    )
    variance = (error * std.mean((-2, -1))).square()[:, :, None, None]
    observations = Observations(
        cells.operator(grid, channels),
        means.detach().double().cpu().flatten(1),
        variance.expand(-1, -1, *cells.shape).flatten(1),
    ).rescale(mean, std)
    system = AnalysisSystem(observations, package.operator.noise.at(grid.shape))
    prior: Prior = package.operator if engine is None else engine
    if config.inflation == "adaptive":
        prior = Inflated(prior, innovation_inflation(package.operator, system))
    elif config.inflation != "none":
        factor = torch.full((count,), float(config.inflation), dtype=torch.float64)
        prior = Inflated(prior, factor)
    return MomentMatching.configured(prior, system, config)


def super_resolve(
    package: Package,
    times: Sequence[np.datetime64] | Array,
    coarse: Float[Tensor, "T P C h w"],
    generators: Sequence[Sequence[torch.Generator]],
    *,
    cells: CoarseGrid | None = None,
    shape: tuple[int, int] | None = None,
    error: float = 0.01,
    posterior: PosteriorConfig | Mapping[str, Any] | None = None,
    engine: Prior | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "T E C H W"]:
    """Draw fine states that agree with coarse fields, in either of the two ways (see the module).

    Up to round-off, a draw depends only on its coarse field, its time and its generator, not on
    other draws or the batch.

    Args:
        package: A package with a coarse view as condition, or a prior of single states.
        times: ``(T,)`` UTC; those of the middle frames if there are several.
        coarse: Coarse fields in physical units; ``P`` is the span of the coarse view, or 1.
        generators: ``T`` lists of ``E`` generators, one for each draw.
        cells: The coarse cells; only for a prior of single states.
        shape: Grid of the draws; the package's own if None.
        error: Only for a prior of single states; see :func:`conditioned`.
        posterior: Options of sampling; None for those of the package.
        engine: See :func:`conditioned`.
        progress: Called with the number of steps times states done, and their total.

    Returns:
        States in physical units, float32 on the CPU.

    Raises:
        InputError: If an argument is out of range or does not fit the package, if a coarse value is
            missing or not plausible in its units, or if a result is not finite.
    """
    config = PosteriorConfig.of(posterior).resolve(package)
    times = np.asarray(times, "datetime64[ns]")
    _check_values(package, coarse)
    sampling_note(package, config)
    if (cells is None) != (package.task.coarse is not None):
        raise InputError(
            f"the package's condition is {package.task.condition!r}: it takes "
            + ("coarse cells" if cells is None else "no coarse cells, since its own are part of it")
        )
    grid, members = _grid_at(package, shape), len(generators[0])
    counter = StepCounter(config.steps * members * len(times), progress)
    # A posterior needs whole ensembles: as many as fit in a batch, or one ensemble in parts.
    together = max(1, config.batch // members) if cells is not None else len(times)
    parts = []
    for first in range(0, len(times), together):
        some = slice(first, first + together)
        prior: Prior = package.operator if engine is None else engine
        if cells is not None:
            prior = conditioned(
                package,
                times[some],
                coarse[some, 0],
                cells,
                shape=grid.shape,
                error=error,
                posterior=config,
                engine=engine,
            )
        if isinstance(engine, Recorder):
            prior = engine.captured(prior)
        fields = coarse[some].detach().float().cpu() if cells is None else None
        drawn = draw(
            prior,
            config,
            [generator for row in generators[some] for generator in row],
            shape=grid.shape,
            conditions=conditions_of(package, times[some], fields),
            rows=np.repeat(np.arange(len(times[some])), members).tolist(),
            batch=config.batch,
            progress=counter,
            device=package.operator.device,
        )
        parts.append(drawn)
    states = torch.cat(parts)
    if cells is None:
        frames = finished(package, states, package.operator.linear, config)
    else:
        frames = states.unflatten(1, (-1, len(package.channels)))
    hours = package.hours(times.repeat(members))
    middle = frames[:, package.task.frames // 2]
    physical = package.normalization.to("cpu").denormalize(middle, hours)
    physical = physical.float()
    check_finite(physical, package.channels, "the fine field")
    return physical.unflatten(0, (len(times), members))


def _grid_at(package: Package, shape: tuple[int, int] | None) -> Grid:
    """Grid of the draws.

    Raises:
        InputError: If the package has statistics by point and the grid is another.
    """
    if shape is None or tuple(shape) == package.grid.shape:
        return package.grid
    if package.normalization.mean.shape[-1] > 1:
        raise InputError("the package's climatology is by point: it draws on its own grid only")
    return package.grid.at(shape)


def _check_values(package: Package, coarse: Float[Tensor, "T P C h w"]) -> None:
    for i, variable in enumerate(package.channels):
        values = coarse[:, :, i]
        bad = int((~values.isfinite()).sum())
        if bad:
            raise InputError(
                f"the coarse {variable} has {bad} missing or infinite values of {values.numel()}; "
                "fill them, or take times without"
            )
        check_units(variable, float(values.min()), float(values.max()), "the coarse fields")
