# SPDX-License-Identifier: Apache-2.0
"""Figures with curves: rank histograms, spectra, functions of generated and of true fields.

Axes: ``E`` members, ``K`` points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddo_modulus.errors import InputError
from ddo_modulus.plots.style import (
    GREY,
    LINES,
    as_array,
    grid_lines,
    in_units,
    new_figure,
    save_figure,
    unframe,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

_STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (4, 1, 1, 1, 1, 1)))  # readable in print
_FLOOR = 1e-10  # of the largest power; below is round-off at scales that a model cuts off


def rank_histogram_figure(
    counts: ArrayLike,
    *,
    title: str,
    path: str | Path,
    p_value: float | None = None,
) -> Path:
    """Draw how often the truth has each rank among the members.

    The line is the frequency of a calibrated ensemble. The band holds nine in ten bars of a
    calibrated ensemble if the points are independent; with correlated points they vary more.

    Args:
        counts: Counts of the ranks, ``(E+1,)``.
        title: Heading.
        path: File to write.
        p_value: Probability of a histogram at least as uneven from a calibrated ensemble, shown
            if given.

    Returns:
        The path written.

    Raises:
        InputError: If there are no counts.
    """
    number = as_array(counts)
    total = number.sum()
    if number.ndim != 1 or number.size < 2 or not total > 0:
        raise InputError(f"counts of shape {number.shape} must be (E+1,) with a positive sum")
    ranks = number.size
    share = number / total * ranks
    deviation = 1.645 * math.sqrt((ranks - 1) / total)  # normal limit of the binomial
    figure = new_figure((5.6, 3.4))
    ax = figure.subplots()
    ax.bar(np.arange(ranks), share, width=0.92, color=LINES[4], edgecolor="none")
    ax.axhspan(1.0 - deviation, 1.0 + deviation, color=GREY, alpha=0.25, lw=0)
    ax.axhline(1.0, color=GREY, lw=1.2)
    ax.set_xlim(-0.6, ranks - 0.4)
    ax.set_ylim(0.0, max(1.5, 1.12 * float(share.max()), 1.1 + deviation))
    ax.set_xlabel(f"members below the truth, of {ranks - 1}")
    ax.set_ylabel("frequency over calibrated")
    note = f"{int(total):,} points" + ("" if p_value is None else f", p = {p_value:.2g}")
    ax.text(0.985, 0.965, note, transform=ax.transAxes, ha="right", va="top", color=GREY)
    ax.set_title(title, fontsize=12)
    unframe(ax)
    return save_figure(figure, path)


def spectra_figure(
    wavenumber: ArrayLike,
    power: Mapping[str, ArrayLike],
    *,
    title: str,
    path: str | Path,
    units: str = "1",
    xlabel: str = "wavenumber (waves over the domain)",
) -> Path:
    """Draw power spectra on logarithmic axes; the first one is the reference.

    Args:
        wavenumber: Wavenumbers, ``(K,)``; only positive ones are drawn.
        power: Power by label, each ``(K,)``. The first is drawn in black, under the others.
        title: Heading.
        path: File to write.
        units: Units of the field, squared on the axis; ``"1"`` for none.
        xlabel: Name of the wavenumber's axis.

    Returns:
        The path written.

    Raises:
        InputError: If there is no spectrum, one has the wrong shape or no positive power.
    """
    if not power:
        raise InputError("no spectrum to draw")
    k = as_array(wavenumber)
    lines = {label: _positive(label, k, as_array(values)) for label, values in power.items()}
    figure = new_figure((5.6, 3.9))
    ax = figure.subplots()
    for number, (label, (x, y)) in enumerate(lines.items()):
        if number == 0:
            ax.loglog(x, y, color="black", lw=3.0, alpha=0.75, label=label)
            continue
        color, style = LINES[(number - 1) % len(LINES)], _STYLES[(number - 1) % len(_STYLES)]
        ax.loglog(x, y, color=color, ls=style, lw=1.8, label=label)
    largest = max(float(y.max()) for _, y in lines.values())
    ax.set_ylim(max(ax.get_ylim()[0], _FLOOR * largest))
    ax.set_xlabel(xlabel)
    squared = f"{units}²" if units.isalpha() else f"({units})²"
    ax.set_ylabel(in_units("power", "1" if units in ("", "1") else squared))
    ax.set_title(title, fontsize=12)
    grid_lines(ax)
    ax.legend(frameon=False)
    unframe(ax)
    return save_figure(figure, path)


def _positive(label: str, wavenumber: Array, power: Array) -> tuple[Array, Array]:
    """The part of a spectrum that logarithmic axes can show."""
    if wavenumber.ndim != 1 or power.shape != wavenumber.shape:
        raise InputError(
            f"spectrum {label!r} has shape {power.shape}; wavenumber has {wavenumber.shape}"
        )
    positive = (wavenumber > 0) & (power > 0)
    if not positive.any():
        raise InputError(f"spectrum {label!r} has no positive power at a positive wavenumber")
    return wavenumber[positive], power[positive]


class CurvePanel(NamedTuple):
    """A function of generated and of true fields, with the truth's sampling variability.

    Attributes:
        title: What is shown.
        xlabel: Name of the abscissa.
        x: Abscissa, ``(K,)``.
        samples: Function of the samples, ``(K,)``.
        truth: Function of the truth, ``(K,)``.
        low: Lower edge of the band of samples of the truth's law, ``(K,)``.
        high: Upper edge, ``(K,)``.
        log_x: Whether the abscissa is logarithmic; then only positive values are drawn.
        log_y: Whether the ordinate is logarithmic.
    """

    title: str
    xlabel: str
    x: ArrayLike
    samples: ArrayLike
    truth: ArrayLike
    low: ArrayLike
    high: ArrayLike
    log_x: bool = False
    log_y: bool = False


def curves_figure(
    panels: Sequence[CurvePanel], *, title: str, path: str | Path, columns: int = 3
) -> Path:
    """Draw functions of generated and of true fields over each other.

    The band holds nine in ten sets of samples of the truth's law, point by point: a line outside
    it differs by more than chance. Below each logarithmic panel is the samples' ratio to the
    truth.

    Args:
        panels: One for each function.
        title: Heading.
        path: File to write; the ending chooses the format.
        columns: Panels beside each other.

    Returns:
        The path written.

    Raises:
        InputError: If there is no panel.
    """
    if not panels:
        raise InputError("no curve to draw")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    heights = (3.0, 1.1)
    figure = new_figure((3.9 * columns + 0.4, sum(heights) * rows + 0.5), pad=0.05)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    places = figure.add_gridspec(2 * rows, columns, height_ratios=heights * rows)
    for number, panel in enumerate(panels):
        row, column = 2 * (number // columns), number % columns
        if panel.log_y:
            ax = figure.add_subplot(places[row, column])
            below = figure.add_subplot(places[row + 1, column], sharex=ax)
            _draw_ratio(below, panel)
            below.set_xlabel(panel.xlabel)
            ax.tick_params(labelbottom=False)
        else:
            ax = figure.add_subplot(places[row : row + 2, column])
            ax.set_xlabel(panel.xlabel)
        _draw_curve(ax, panel)
        if number == 0:
            ax.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def _draw_curve(ax: Axes, panel: CurvePanel) -> None:
    """Draw both functions and the band."""
    x, samples, truth, low, high = (as_array(v) for v in panel[2:7])
    shown = (x > 0) | (not panel.log_x)
    if panel.log_y:
        shown &= (truth > 0) | (samples > 0)
        samples, truth = (np.where(v > 0, v, np.nan) for v in (samples, truth))
        low = np.where(low > 0, low, np.nanmin(truth[shown], initial=np.inf))
    x, samples, truth, low, high = (v[shown] for v in (x, samples, truth, low, high))
    _scale_axis(ax, panel)
    ax.set_yscale("log" if panel.log_y else "linear")
    ax.fill_between(x, low, high, color=GREY, alpha=0.3, lw=0, label="truth, 9 of 10")
    ax.plot(x, truth, color="black", lw=2.4, alpha=0.75, label="truth")
    ax.plot(x, samples, color=LINES[1], lw=1.6, ls="--", label="samples")
    if panel.log_y:
        ax.set_ylim(max(ax.get_ylim()[0], _FLOOR * float(np.nanmax(truth, initial=0.0))))
    ax.set_title(panel.title, fontsize=11)
    grid_lines(ax)
    unframe(ax)


def _scale_axis(ax: Axes, panel: CurvePanel) -> None:
    ax.set_xscale("log" if panel.log_x else "linear")
    if panel.log_x:
        ax.xaxis.set_minor_formatter("")  # no room for numbers between the decades


def _draw_ratio(ax: Axes, panel: CurvePanel) -> None:
    """Draw samples over truth; the axis reaches at least 10 % to each side of one."""
    x, samples, truth, low, high = (as_array(v) for v in panel[2:7])
    shown = ((x > 0) | (not panel.log_x)) & (truth > 0)
    x, samples, truth, low, high = (v[shown] for v in (x, samples, truth, low, high))
    ratio = samples / truth
    _scale_axis(ax, panel)
    ax.fill_between(x, low / truth, high / truth, color=GREY, alpha=0.3, lw=0)
    ax.axhline(1.0, color="black", lw=1.2, alpha=0.75)
    ax.plot(x, ratio, color=LINES[1], lw=1.6, ls="--")
    reach = float(np.percentile(np.abs(ratio - 1.0), 90.0)) if ratio.size else 0.0
    reach = float(np.clip(1.3 * reach, 0.1, 1.0))
    ax.set_ylim(1.0 - reach, 1.0 + reach)
    ax.set_ylabel("ratio", fontsize=9)
    grid_lines(ax)
    unframe(ax)
