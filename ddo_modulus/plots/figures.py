# SPDX-License-Identifier: Apache-2.0
"""Figures of analyses and their verification.

Maps are readable without full colour vision: red-white-blue, centred at zero, for fields of both
signs, viridis for others, and pale-to-dark for error and spread. Figures are made without
``pyplot``, so they leave no global state and need no display. Matplotlib is imported when first
used.

Axes: ``E`` members, ``H W`` grid (latitude, longitude), ``M`` observations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours ("Color Universal Design", 2008) for lines, without yellow and black.
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_GREY = "#595959"
_DPI = 160


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
    """Draw an analysis next to the truth: does it recover it, and does it know where it errs?

    Above: truth, observations, analysis mean and its absolute error. Below: three members and
    the ensemble's spread. All fields share one colour scale; error and spread share another, so
    that a calibrated analysis shows them alike.

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
        signed: Whether zero is the centre of the colour scale; by default, if the truth has
            values well to both sides of it.

    Returns:
        The path written.

    Raises:
        InputError: If shapes do not fit.
    """
    field, members = _array(truth), _array(ensemble)
    y, x = _array(lat), _array(lon)
    points = PointValues(*(_array(part) for part in observations))
    _check_shapes(field, members, y, x, points)
    mean, spread = members.mean(0), members.std(0, ddof=1)
    error = np.abs(mean - field)

    field_scale = color_scale(field, signed)
    top = float(np.nanpercentile(np.stack([error, spread]), 99.0))
    spread_scale: dict[str, Any] = {"cmap": "magma_r", "vmin": 0.0, "vmax": top if top > 0 else 1.0}

    # Degrees of longitude shrink with the cosine of latitude (and coordinates of a unit square,
    # read as degrees, do not: cos is then 1 to four digits).
    aspect = 1.0 / max(0.2, math.cos(math.radians(float(y.mean()))))
    shape = float(np.clip(aspect * np.ptp(y) / np.ptp(x), 0.4, 1.6))
    figure = _figure((11.4, 2.65 * 2 * shape + 1.9), pad=0.07)
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    maps = [
        (axes[0, 0], "truth", field, field_scale),
        (axes[0, 2], "analysis mean", mean, field_scale),
        (axes[0, 3], f"|mean − truth|, RMS {_number(np.sqrt(np.nanmean(error**2)))}", error,
         spread_scale),
        *((axes[1, i], f"member {i + 1}", m, field_scale) for i, m in enumerate(members[:3])),
        (axes[1, 3], f"spread, RMS {_number(np.sqrt(np.nanmean(spread**2)))}", spread,
         spread_scale),
    ]  # fmt: skip
    images = {}
    for ax, name, values, scale in maps:
        ax.set_title(name)
        images[ax] = ax.pcolormesh(x, y, values, shading="nearest", rasterized=True, **scale)
    for ax in axes[1, len(members[:3]) : 3]:  # fewer than three members
        ax.set_visible(False)
    _draw_points(axes[0, 1], points, field_scale, (x, y))
    for ax in axes.flat:
        ax.set_aspect(aspect)
    for ax in axes[1]:
        ax.set_xlabel(labels[0])
    for ax in axes[:, 0]:
        ax.set_ylabel(labels[1])
    suffix = "" if units in ("", "1") else f" ({units})"
    bar: dict[str, Any] = {"location": "bottom", "aspect": 45, "pad": 0.03, "fraction": 0.05}
    figure.colorbar(
        images[axes[0, 0]],
        ax=list(axes[:, :3].flat),
        extend="both",
        shrink=0.6,
        label="field" + suffix,
        **bar,
    )
    figure.colorbar(
        images[axes[1, 3]],
        ax=list(axes[:, 3]),
        extend="max",
        label="error and spread" + suffix,
        **{**bar, "aspect": 25},
    )
    return _save(figure, path)


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
    """Draw an analysis whose truth nobody knows: its mean and its spread, with the observations.

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
    members, y, x = _array(ensemble), _array(lat), _array(lon)
    points = PointValues(*(_array(part) for part in observations))
    mean = members.mean(0)
    _check_shapes(mean, members, y, x, points)
    spread = members.std(0, ddof=1)
    aspect = 1.0 / max(0.2, math.cos(math.radians(float(y.mean()))))
    shape = float(np.clip(aspect * np.ptp(y) / np.ptp(x), 0.4, 1.6))
    figure = _figure((9.6, 4.4 * shape + 2.2), pad=0.07)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    suffix = "" if units in ("", "1") else f" ({units})"
    field_scale = color_scale(mean, None)
    top = float(np.nanmax(spread))
    spread_scale: dict[str, Any] = {"cmap": "magma_r", "vmin": 0.0, "vmax": top if top > 0 else 1.0}
    names = ("analysis mean", f"spread, RMS {_number(np.sqrt(np.nanmean(spread**2)))}")
    for ax, name, values, scale in zip(
        axes, names, (mean, spread), (field_scale, spread_scale), strict=True
    ):
        image = ax.pcolormesh(x, y, values, shading="nearest", rasterized=True, **scale)
        ax.set_title(name)
        ax.set_aspect(aspect)
        ax.set_xlabel(labels[0])
        figure.colorbar(image, ax=ax, location="bottom", label=name.split(",")[0] + suffix)
    _draw_points(axes[0], points, field_scale, (x, y))
    axes[0].set_title(f"analysis mean, {points.value.size:,} observations")  # type: ignore[union-attr]
    axes[1].plot(points.lon, points.lat, "+", color="black", ms=5, mew=0.8)
    axes[0].set_ylabel(labels[1])
    return _save(figure, path)


def rank_histogram_figure(
    counts: ArrayLike,
    *,
    title: str,
    path: str | Path,
    p_value: float | None = None,
) -> Path:
    """Draw how often each rank of the truth among the members occurs.

    The line is the calibrated frequency. The band holds nine in ten bars of a calibrated
    ensemble if the points are independent; correlated points vary more.

    Args:
        counts: Counts of the ranks, ``(E+1,)``.
        title: Heading.
        path: File to write.
        p_value: Probability of so uneven a histogram if calibrated, to be shown.

    Returns:
        The path written.

    Raises:
        InputError: If there are no counts.
    """
    number = _array(counts)
    total = number.sum()
    if number.ndim != 1 or number.size < 2 or not total > 0:
        raise InputError(f"counts of shape {number.shape} must be (E+1,) with a positive sum")
    ranks = number.size
    share = number / total * ranks
    deviation = 1.645 * math.sqrt((ranks - 1) / total)  # normal limit of the binomial
    figure = _figure((5.6, 3.4))
    ax = figure.subplots()
    ax.bar(np.arange(ranks), share, width=0.92, color=_LINES[4], edgecolor="none")
    ax.axhspan(1.0 - deviation, 1.0 + deviation, color=_GREY, alpha=0.25, lw=0)
    ax.axhline(1.0, color=_GREY, lw=1.2)
    ax.set_xlim(-0.6, ranks - 0.4)
    ax.set_ylim(0.0, max(1.5, 1.12 * float(share.max()), 1.1 + deviation))
    ax.set_xlabel(f"members below the truth, of {ranks - 1}")
    ax.set_ylabel("frequency over calibrated")
    note = f"{int(total):,} points"
    if p_value is not None:
        note += f", p = {p_value:.2g}"
    ax.text(0.985, 0.965, note, transform=ax.transAxes, ha="right", va="top", color=_GREY)
    ax.set_title(title, fontsize=12)
    _unframe(ax)
    return _save(figure, path)


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
        wavenumber: Wavenumbers, ``(K,)``; those that are not positive are left out.
        power: Power by label, each ``(K,)``. The first is drawn in black, under the others.
        title: Heading.
        path: File to write.
        units: Units of the field, squared on the axis; ``"1"`` for none.
        xlabel: Name of the wavenumber's axis.

    Returns:
        The path written.

    Raises:
        InputError: If a spectrum's shape does not fit or nothing is positive.
    """
    k = _array(wavenumber)
    figure = _figure((5.6, 3.9))
    ax = figure.subplots()
    styles = ("-", "--", "-.", (0, (1, 1)), (0, (4, 1, 1, 1, 1, 1)))  # readable in print
    top = 0.0
    for i, (label, values) in enumerate(power.items()):
        p = _array(values)
        if k.ndim != 1 or p.shape != k.shape:
            raise InputError(f"spectrum {label!r} has shape {p.shape}; wavenumber has {k.shape}")
        seen = (k > 0) & (p > 0)
        if not seen.any():
            raise InputError(f"spectrum {label!r} has no positive power at a positive wavenumber")
        top = max(top, float(p[seen].max()))
        if i == 0:
            ax.loglog(k[seen], p[seen], color="black", lw=3.0, alpha=0.75, label=label)
        else:
            color, style = _LINES[(i - 1) % len(_LINES)], styles[(i - 1) % len(styles)]
            ax.loglog(k[seen], p[seen], color=color, ls=style, lw=1.8, label=label)
    if top == 0.0:
        raise InputError("no spectrum to draw")
    low, _ = ax.get_ylim()
    ax.set_ylim(max(low, 1e-10 * top))  # round-off at truncated scales would hide the rest
    ax.set_xlabel(xlabel)
    squared = f"{units}²" if units.isalpha() else f"({units})²"
    ax.set_ylabel("power" if units in ("", "1") else f"power ({squared})")
    ax.set_title(title, fontsize=12)
    ax.grid(which="major", color="#dddddd", lw=0.6)
    ax.legend(frameon=False)
    _unframe(ax)
    return _save(figure, path)


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

    One row a channel, three at most: two true states, three samples, spectra.

    Args:
        truth: True states, ``(B, C, H, W)``.
        samples: Samples, of the same shape.
        wavenumber: Wavenumbers, ``(K,)``; those that are not positive are left out.
        power: Mean power of the true states and of the samples, ``(C, K)`` each.
        title: Heading.
        path: File to write; the ending chooses the format.

    Returns:
        The path written.
    """
    fields = [*_array(truth)[:2], *_array(samples)[:3]]
    names = ["truth"] * len(_array(truth)[:2]) + ["sample"] * len(_array(samples)[:3])
    rows = min(fields[0].shape[0], 3)
    k, powers = _array(wavenumber), [_array(p) for p in power]
    shape = float(np.clip(fields[0].shape[1] / fields[0].shape[2], 0.4, 1.6))
    figure = _figure((2.1 * len(fields) + 3.2, 2.1 * shape * rows + 0.7))
    axes = figure.subplots(rows, len(fields) + 1, squeeze=False)
    figure.suptitle(title, fontsize=11)
    for channel, row in enumerate(axes):
        scale = color_scale(fields[0][channel], None)
        for ax, name, field in zip(row, names, fields, strict=False):
            ax.imshow(field[channel], interpolation="nearest", **scale)
            ax.set_title(name, fontsize=9)
            ax.set_axis_off()
        for label, style, p in zip(("truth", "samples"), ("black", _LINES[1]), powers, strict=True):
            seen = (k > 0) & (p[channel] > 0)
            row[-1].loglog(k[seen], p[channel][seen], color=style, label=label)
        row[-1].xaxis.set_minor_formatter("")  # no room for numbers between the decades
        row[-1].set_title("power over wavenumber", fontsize=9)
        row[-1].legend(frameon=False, fontsize=8)
        _unframe(row[-1])
    return _save(figure, path)


class CurvePanel(NamedTuple):
    """One function of two sets of fields, with the truth's sampling variability.

    Attributes:
        title: What is shown.
        xlabel: Name of the abscissa.
        x: Abscissa, ``(K,)``.
        samples: Of the samples, ``(K,)``.
        truth: Of the truth, ``(K,)``.
        low: Lower edge of the band in which samples of the truth's law lie, ``(K,)``.
        high: Upper edge, ``(K,)``.
        log_x: Whether the abscissa is logarithmic; what is not positive is left out.
        log_y: Whether the ordinate is.
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
    """Draw functions of generated and true fields over each other.

    The band holds nine in ten sets of samples of the truth's law, point by point: a line outside
    it differs by more than chance. Below each logarithmic panel the samples' ratio to the truth.

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
    figure = _figure((3.9 * columns + 0.4, sum(heights) * rows + 0.5), pad=0.05)
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
    return _save(figure, path)


def _draw_curve(ax: Axes, panel: CurvePanel) -> None:
    x, samples, truth, low, high = (_array(v) for v in panel[2:7])
    shown = (x > 0) | (not panel.log_x)
    if panel.log_y:
        shown &= (truth > 0) | (samples > 0)
        samples, truth = (np.where(v > 0, v, np.nan) for v in (samples, truth))
        low = np.where(low > 0, low, np.nanmin(truth[shown], initial=np.inf))
    x, samples, truth, low, high = (v[shown] for v in (x, samples, truth, low, high))
    _scale_axis(ax, panel)
    ax.set_yscale("log" if panel.log_y else "linear")
    ax.fill_between(x, low, high, color=_GREY, alpha=0.3, lw=0, label="truth, 9 of 10")
    ax.plot(x, truth, color="black", lw=2.4, alpha=0.75, label="truth")
    ax.plot(x, samples, color=_LINES[1], lw=1.6, ls="--", label="samples")
    if panel.log_y:  # round-off at truncated scales would hide the rest
        ax.set_ylim(max(ax.get_ylim()[0], 1e-10 * float(np.nanmax(truth, initial=0.0))))
    ax.set_title(panel.title, fontsize=11)
    ax.grid(which="major", color="#dddddd", lw=0.6)
    _unframe(ax)


def _scale_axis(ax: Axes, panel: CurvePanel) -> None:
    ax.set_xscale("log" if panel.log_x else "linear")
    if panel.log_x:
        ax.xaxis.set_minor_formatter("")  # no room for numbers between the decades


def _draw_ratio(ax: Axes, panel: CurvePanel) -> None:
    """Samples over truth; the axis shows the band and factors of at least a tenth."""
    x, samples, truth, low, high = (_array(v) for v in panel[2:7])
    shown = ((x > 0) | (not panel.log_x)) & (truth > 0)
    x, samples, truth, low, high = (v[shown] for v in (x, samples, truth, low, high))
    ratio = samples / truth
    _scale_axis(ax, panel)
    ax.fill_between(x, low / truth, high / truth, color=_GREY, alpha=0.3, lw=0)
    ax.axhline(1.0, color="black", lw=1.2, alpha=0.75)
    ax.plot(x, ratio, color=_LINES[1], lw=1.6, ls="--")
    reach = float(np.percentile(np.abs(ratio - 1.0), 90.0)) if ratio.size else 0.0
    reach = float(np.clip(1.3 * reach, 0.1, 1.0))
    ax.set_ylim(1.0 - reach, 1.0 + reach)
    ax.set_ylabel("ratio", fontsize=9)
    ax.grid(which="major", color="#dddddd", lw=0.6)
    _unframe(ax)


def _figure(size: tuple[float, float], pad: float = 0.04) -> Figure:
    """Make a figure that lays itself out, without pyplot; sizes and padding in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=pad, w_pad=0.04))


def _save(figure: Figure, path: str | Path) -> Path:
    """Write the figure; make the folder it goes to."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=_DPI)
    return target


def _draw_points(
    ax: Axes, points: PointValues, scale: dict[str, Any], grid: Sequence[NDArray[np.float64]]
) -> None:
    """Draw observations in the fields' colours, smaller the more there are."""
    value = np.asarray(points.value)
    size = float(np.clip(4000.0 / max(1, value.size), 4.0, 40.0))
    ax.set_facecolor("#e6e6e6")
    ax.scatter(points.lon, points.lat, c=value, s=size, edgecolors="black", linewidths=0.3, **scale)
    ax.set_title(f"{value.size:,} observations")
    left_right, bottom_top = (_edges(coordinate) for coordinate in grid)
    ax.set_xlim(*left_right)
    ax.set_ylim(*bottom_top)


def _edges(coordinate: NDArray[np.float64]) -> tuple[float, float]:
    """Outer edges of the first and the last cell, ascending."""
    half = 0.5 * float(np.ptp(coordinate)) / max(1, coordinate.size - 1)
    return float(coordinate.min()) - half, float(coordinate.max()) + half


def color_scale(field: NDArray[np.float64], signed: bool | None) -> dict[str, Any]:
    """Choose colours for fields like this one; the outermost half per cent may saturate."""
    low, high = np.nanpercentile(field, [0.5, 99.5])
    if signed is None:
        signed = low < 0 < high and min(-low, high) > 0.2 * max(-low, high)
    if signed:
        limit = float(max(-low, high)) or 1.0
        return {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    return {"cmap": "viridis", "vmin": float(low), "vmax": float(high)}


def _unframe(ax: Axes) -> None:
    """Drop the two spines that carry no scale."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _number(value: float) -> str:
    """Format to three significant digits."""
    return f"{value:.3g}"


def _array(x: ArrayLike) -> NDArray[np.float64]:
    """Read an array or a tensor in main memory."""
    return np.asarray(x, dtype=np.float64)


def _check_shapes(
    field: NDArray[np.float64],
    members: NDArray[np.float64],
    lat: NDArray[np.float64],
    lon: NDArray[np.float64],
    points: PointValues,
) -> None:
    """Raise unless truth, ensemble, coordinates and observations fit together."""
    if lat.ndim != 1 or lon.ndim != 1 or field.shape != (lat.size, lon.size) or field.size < 4:
        raise InputError(
            f"truth has shape {field.shape}; lat {lat.shape} and lon {lon.shape} call for (H, W)"
        )
    if members.shape[1:] != field.shape or len(members) < 2:
        raise InputError(
            f"ensemble has shape {members.shape}; expected (E, {lat.size}, {lon.size}), E >= 2"
        )
    if len({np.shape(part) for part in points}) != 1 or np.ndim(points.value) != 1:
        raise InputError("lat, lon and value of the observations must be of one length")
