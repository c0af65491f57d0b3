# SPDX-License-Identifier: Apache-2.0
"""Figures with maps: analyses beside the truth, analyses alone, samples of a prior.

The maps are readable without full colour vision: red-white-blue, centred at zero, for fields of
both signs, viridis for others, and pale to dark for error and spread.

Axes: ``E`` members, ``B`` states, ``C`` channels, ``H W`` grid (latitude, longitude), ``M``
observations, ``K`` wavenumbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddo_modulus.errors import InputError
from ddo_modulus.plots.style import (
    LINES,
    as_array,
    color_scale,
    in_units,
    new_figure,
    positive_scale,
    save_figure,
    unframe,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

Array = NDArray[np.float64]

_BAR: dict[str, Any] = {"location": "bottom", "pad": 0.03, "fraction": 0.05}


class PointValues(NamedTuple):
    """Observed values of one variable.

    Attributes:
        lat: Latitudes, ``(M,)``.
        lon: Longitudes, ``(M,)``, in the convention of the grid.
        value: Values in the field's units, ``(M,)``.
    """

    lat: ArrayLike
    lon: ArrayLike
    value: ArrayLike


def analysis_panel(
    truth: ArrayLike,
    observations: PointValues,
    ensemble: ArrayLike,
    lat: ArrayLike,
    lon: ArrayLike,
    *,
    units: str,
    title: str,
    path: str | Path,
    labels: tuple[str, str] = ("longitude", "latitude"),
    signed: bool | None = None,
) -> Path:
    """Draw an analysis beside the truth.

    Top row: truth, observations, analysis mean and its absolute error. Bottom row: three members
    and the ensemble's spread. All fields share one colour scale. Error and spread share another:
    they look alike if the analysis is calibrated.

    Args:
        truth: ``(H, W)``.
        observations: Observed points.
        ensemble: ``(E, H, W)``, at least two members.
        lat: Latitudes of the rows, ``(H,)``, in either order.
        lon: Longitudes of the columns, ``(W,)``, ascending.
        units: Units of all fields; ``"1"`` for none.
        title: Heading.
        path: File to write; the ending chooses the format.
        labels: Names of the horizontal and the vertical coordinate.
        signed: Whether the colour scale is centred at zero; by default, if the truth has values
            well to both sides of it.

    Returns:
        The path written.

    Raises:
        InputError: If shapes do not fit.
    """
    field, members, grid = as_array(truth), as_array(ensemble), _Grid(lat, lon, labels)
    points = PointValues(*(as_array(part) for part in observations))
    _check_shapes("truth", field, members, grid, points)
    mean, spread = members.mean(0), members.std(0, ddof=1)
    error = np.abs(mean - field)
    fields = color_scale(field, signed)
    errors = positive_scale(float(np.nanpercentile(np.stack([error, spread]), 99.0)))

    figure = new_figure((11.4, 2.65 * 2 * grid.shape + 1.9), pad=0.07)
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    image = grid.draw(axes[0, 0], "truth", field, fields)
    grid.draw(axes[0, 2], "analysis mean", mean, fields)
    grid.draw(axes[0, 3], f"|mean − truth|, RMS {_rms(error)}", error, errors)
    for number, (ax, member) in enumerate(zip(axes[1, :3], members, strict=False)):
        grid.draw(ax, f"member {number + 1}", member, fields)
    for ax in axes[1, len(members) : 3]:
        ax.set_visible(False)
    dark = grid.draw(axes[1, 3], f"spread, RMS {_rms(spread)}", spread, errors)
    _draw_points(axes[0, 1], points, fields, grid)
    grid.label(axes)
    left, right = list(axes[:, :3].flat), list(axes[:, 3])
    names = in_units("field", units), in_units("error and spread", units)
    figure.colorbar(image, ax=left, extend="both", shrink=0.6, aspect=45, label=names[0], **_BAR)
    figure.colorbar(dark, ax=right, extend="max", aspect=25, label=names[1], **_BAR)
    return save_figure(figure, path)


def estimate_panel(
    observations: PointValues,
    ensemble: ArrayLike,
    lat: ArrayLike,
    lon: ArrayLike,
    *,
    units: str,
    title: str,
    path: str | Path,
    labels: tuple[str, str] = ("longitude", "latitude"),
) -> Path:
    """Draw an analysis of which no truth is available: its mean and spread, and the observations.

    Args:
        observations: Observed points; their values are drawn on the mean's colour scale.
        ensemble: ``(E, H, W)``, at least two members.
        lat: Latitudes of the rows, ``(H,)``, in either order.
        lon: Longitudes of the columns, ``(W,)``, ascending.
        units: Units of the field; ``"1"`` for none.
        title: Heading.
        path: File to write; the ending chooses the format.
        labels: Names of the horizontal and the vertical coordinate.

    Returns:
        The path written.

    Raises:
        InputError: If shapes do not fit.
    """
    members, grid = as_array(ensemble), _Grid(lat, lon, labels)
    points = PointValues(*(as_array(part) for part in observations))
    mean = members.mean(0)
    _check_shapes("ensemble mean", mean, members, grid, points)
    spread = members.std(0, ddof=1)
    fields, errors = color_scale(mean, None), positive_scale(float(np.nanmax(spread)))

    figure = new_figure((9.6, 4.4 * grid.shape + 2.2), pad=0.07)
    axes = figure.subplots(1, 2, squeeze=False, sharex=True, sharey=True)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    left, right = axes[0]
    image = grid.draw(left, "analysis mean", mean, fields)
    dark = grid.draw(right, f"spread, RMS {_rms(spread)}", spread, errors)
    for ax, drawn, name in ((left, image, "analysis mean"), (right, dark, "spread")):
        figure.colorbar(drawn, ax=ax, location="bottom", label=in_units(name, units))
    _draw_points(left, points, fields, grid)
    left.set_title(f"analysis mean, {np.size(points.value):,} observations")
    right.plot(points.lon, points.lat, "+", color="black", ms=5, mew=0.8)
    grid.label(axes)
    return save_figure(figure, path)


def samples_figure(
    truth: ArrayLike,
    samples: ArrayLike,
    wavenumber: ArrayLike,
    power: tuple[ArrayLike, ArrayLike],
    *,
    title: str,
    path: str | Path,
) -> Path:
    """Draw samples of a prior beside true states, and the spectra of both.

    One row for each channel, at most three: two true states, three samples, spectra.

    Args:
        truth: True states, ``(B, C, H, W)``.
        samples: Samples, of the same shape.
        wavenumber: Wavenumbers, ``(K,)``; only positive ones are drawn.
        power: Mean power of the true states and of the samples, ``(C, K)`` each.
        title: Heading.
        path: File to write; the ending chooses the format.

    Returns:
        The path written.
    """
    true, drawn = as_array(truth)[:2], as_array(samples)[:3]
    fields = [*(("truth", field) for field in true), *(("sample", field) for field in drawn)]
    channels, height, width = true.shape[1:]
    rows, shape = min(channels, 3), float(np.clip(height / width, 0.4, 1.6))
    k, powers = as_array(wavenumber), [as_array(p) for p in power]

    figure = new_figure((2.1 * len(fields) + 3.2, 2.1 * shape * rows + 0.7))
    axes = figure.subplots(rows, len(fields) + 1, squeeze=False)
    figure.suptitle(title, fontsize=11)
    for channel, row in enumerate(axes):
        scale = color_scale(true[0, channel], None)
        for ax, (name, field) in zip(row, fields, strict=False):
            ax.imshow(field[channel], interpolation="nearest", **scale)
            ax.set_title(name, fontsize=9)
            ax.set_axis_off()
        _draw_spectra(row[-1], k, [p[channel] for p in powers])
    return save_figure(figure, path)


class _Grid:
    """Coordinates of a grid, drawn in degrees of equal length at its middle latitude.

    Attributes:
        x: Longitudes of the columns, ``(W,)``.
        y: Latitudes of the rows, ``(H,)``.
    """

    def __init__(self, lat: ArrayLike, lon: ArrayLike, labels: tuple[str, str]) -> None:
        self.y, self.x, self._labels = as_array(lat), as_array(lon), labels

    @property
    def aspect(self) -> float:
        """Length of a degree of latitude over that of a degree of longitude."""
        # Coordinates of a unit square, read as degrees, are hardly changed: their cosine is 1 to
        # four digits.
        return 1.0 / max(0.2, math.cos(math.radians(float(self.y.mean()))))

    @property
    def shape(self) -> float:
        """Height of a map over its width, within limits that keep a figure readable."""
        return float(np.clip(self.aspect * np.ptp(self.y) / np.ptp(self.x), 0.4, 1.6))

    def draw(self, ax: Axes, title: str, values: Array, scale: dict[str, Any]) -> QuadMesh:
        """Draw a field ``(H, W)``."""
        ax.set_title(title)
        return ax.pcolormesh(self.x, self.y, values, shading="nearest", rasterized=True, **scale)

    def label(self, axes: NDArray[Any]) -> None:
        """Set the aspect of all maps, and name the coordinates along the outer ones."""
        for ax in axes.flat:
            ax.set_aspect(self.aspect)
        for ax in axes[-1]:
            ax.set_xlabel(self._labels[0])
        for ax in axes[:, 0]:
            ax.set_ylabel(self._labels[1])


def _draw_points(ax: Axes, points: PointValues, scale: dict[str, Any], grid: _Grid) -> None:
    """Draw observations in the fields' colours, smaller the more there are."""
    value = np.asarray(points.value)
    size = float(np.clip(4000.0 / max(1, value.size), 4.0, 40.0))
    ax.set_facecolor("#e6e6e6")
    ax.scatter(points.lon, points.lat, c=value, s=size, edgecolors="black", linewidths=0.3, **scale)
    ax.set_title(f"{value.size:,} observations")
    ax.set_xlim(*_edges(grid.x))
    ax.set_ylim(*_edges(grid.y))


def _draw_spectra(ax: Axes, wavenumber: Array, powers: Sequence[Array]) -> None:
    """Draw the spectra of true states and of samples, where they are positive."""
    for label, color, power in zip(("truth", "samples"), ("black", LINES[1]), powers, strict=True):
        positive = (wavenumber > 0) & (power > 0)
        ax.loglog(wavenumber[positive], power[positive], color=color, label=label)
    ax.xaxis.set_minor_formatter("")  # no room for numbers between the decades
    ax.set_title("power over wavenumber", fontsize=9)
    ax.legend(frameon=False, fontsize=8)
    unframe(ax)


def _edges(coordinate: Array) -> tuple[float, float]:
    """Outer edges of the first and the last cell, ascending."""
    half = 0.5 * float(np.ptp(coordinate)) / max(1, coordinate.size - 1)
    return float(coordinate.min()) - half, float(coordinate.max()) + half


def _rms(values: Array) -> str:
    """Root mean square to three significant digits, missing values left out."""
    return f"{np.sqrt(np.nanmean(values**2)):.3g}"


def _check_shapes(
    name: str, field: Array, members: Array, grid: _Grid, points: PointValues
) -> None:
    """Raise unless a field, the ensemble, the coordinates and the observations fit together."""
    lat, lon = grid.y, grid.x
    if lat.ndim != 1 or lon.ndim != 1 or field.shape != (lat.size, lon.size) or field.size < 4:
        raise InputError(
            f"{name} has shape {field.shape}; lat {lat.shape} and lon {lon.shape} need (H, W)"
        )
    if members.shape[1:] != field.shape or len(members) < 2:
        raise InputError(
            f"ensemble has shape {members.shape}; expected (E, {lat.size}, {lon.size}), E >= 2"
        )
    if len({np.shape(part) for part in points}) != 1 or np.ndim(points.value) != 1:
        raise InputError("lat, lon and value of the observations must have the same length")
