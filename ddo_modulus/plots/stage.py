# SPDX-License-Identifier: Apache-2.0
"""The figure that a film is drawn on. It needs matplotlib at once, so it is imported late.

Axes: ``H W`` grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ddo_modulus.plots.style import GREY

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.image import AxesImage

    from ddo_modulus.plots.film import Film, Panel, Scale

Box = tuple[float, float, float, float]

_DPI = 120
_LARGEST = (16.0, 9.0)  # inches; a full-HD screen, if the panels fit in it
_GAP, _TITLE, _HEAD, _BAR, _TICKS = 0.16, 0.27, 0.48, 0.74, 0.24  # inches
_MISSING = "#bdbdbd"


class Stage(Figure):
    """A figure whose still parts are drawn once.

    A writer of matplotlib draws the whole figure for each frame. Here only the images, the lines
    over them and the time are drawn again, on a copy of the rest, which halves the time of a film.

    Args:
        film: Film to draw.
    """

    def __init__(self, film: Film) -> None:
        layout = Layout.of(film)
        super().__init__(figsize=(layout.width, layout.height), dpi=_DPI, facecolor="white")
        self._film, self._still = film, None
        y = 1.0 - 0.5 * _HEAD / layout.height
        left, right = layout.left / layout.width, 1.0 - _GAP / layout.width
        self.text(left, y, film.heading, fontsize=13, fontweight="bold", va="center")
        self._stamp = self.text(right, y, "", fontsize=13, va="center", ha="right")
        self._fields: list[AxesImage] = []
        self._moving: list[Artist] = []
        for number, column in enumerate(film.columns):
            for row, panel in enumerate(column):
                ax = self.add_axes(layout.box(number, row, len(column)))
                image = self._draw_panel(ax, panel)
                ax.tick_params(labelbottom=row == len(column) - 1, labelleft=number == 0)
                self._fields.append(image)
                self._moving += [image, *self._draw_coast(ax), *ax.spines.values()]
        for scale in film.scales:
            self._draw_bar(scale, layout)
        self._moving.append(self._stamp)
        for artist in self._moving:
            artist.set_animated(True)
        canvas = FigureCanvasAgg(self)
        canvas.draw()  # without animated artists, which a writer would not leave out
        self._still = canvas.copy_from_bbox(self.bbox)

    def set_frame(self, fields: Sequence[NDArray[np.floating[Any]]], stamp: str) -> None:
        """Show fields ``(H, W)``, one for each panel, and the text of their time."""
        for image, values in zip(self._fields, fields, strict=True):
            image.set_data(np.ma.masked_invalid(values))
        self._stamp.set_text(stamp)

    def draw(self, renderer: RendererBase) -> None:
        """Draw what moves over a copy of what does not."""
        if self._still is None:
            super().draw(renderer)
            return
        renderer.restore_region(self._still)  # type: ignore[attr-defined]
        for artist in self._moving:
            artist.draw(renderer)

    def _draw_panel(self, ax: Axes, panel: Panel) -> AxesImage:
        """Prepare a panel's axes and its image, which is still empty."""
        film = self._film
        image = ax.imshow(
            np.zeros((2, 2)),
            cmap=colormaps[panel.scale.colors].with_extremes(bad=_MISSING),
            vmin=panel.scale.low,
            vmax=panel.scale.high,
            extent=panel.edges or film.edges,
            origin="upper" if film.geographic else "lower",
            interpolation="nearest",
            aspect="auto",  # the box of the axes has the right one
        )
        ax.set_xlim(film.edges.west, film.edges.east)
        limit = 90.0 if film.geographic else math.inf  # cells at the poles reach beyond
        ax.set_ylim(max(film.edges.south, -limit), min(film.edges.north, limit))
        ax.set_title(panel.title, fontsize=11, pad=4)
        for spine in ax.spines.values():
            spine.set(color=GREY, linewidth=0.8)
        if film.geographic:
            _draw_degrees(ax)
        else:
            ax.set(xticks=[], yticks=[])
        return image

    def _draw_coast(self, ax: Axes) -> list[Artist]:
        """Draw coastlines, dark on a pale halo, to be seen on every colour."""
        if not self._film.coastlines:
            return []
        halo = LineCollection(self._film.coastlines, colors="white", linewidths=1.6, alpha=0.5)
        line = LineCollection(self._film.coastlines, colors="#202020", linewidths=0.7)
        return [ax.add_collection(lines, autolim=False) for lines in (halo, line)]

    def _draw_bar(self, scale: Scale, layout: Layout) -> None:
        """Draw a colour bar under the columns whose panels use its scale."""
        columns = self._film.columns
        used = [i for i, column in enumerate(columns) if any(p.scale == scale for p in column)]
        first = next(i for i, panel in enumerate(self._film.panels) if panel.scale == scale)
        west, east = layout.column(used[0]), layout.column(used[-1]) + layout.panel
        length = min(0.92 * (east - west), 6.0)
        ax = self.add_axes(layout.relative((0.5 * (west + east - length), 0.5, length, 0.13)))
        image = self._fields[first]
        bar = self.colorbar(image, cax=ax, orientation="horizontal", extend=scale.extend)
        largest = max(abs(scale.low), abs(scale.high))
        power = 0 if 1e-2 <= largest < 1e5 else math.floor(math.log10(largest))
        bar.set_label(scale.label(power), fontsize=10 if length > 3.0 else 9)
        bar.ax.tick_params(labelsize=9)
        bar.ax.locator_params(nbins=7 if length > 3.0 else 4)
        bar.ax.xaxis.set_major_formatter(_in_units_of(10.0**power))
        bar.outline.set(color=GREY, linewidth=0.6)


class Layout(NamedTuple):
    """Where the parts of a film lie, in inches.

    Matplotlib's layout engines fit panels into a figure. Here the figure is fitted to panels of a
    fixed shape, and to an even number of pixels, which H.264 needs.

    Attributes:
        rows: Panels of the longest column.
        title: Height of the titles.
        panel: Width of a panel.
        tall: Height of a panel.
        left: Left edge of the first column.
        width: Width of the figure.
        height: Height of the figure.
    """

    rows: int
    title: float
    panel: float
    tall: float
    left: float
    width: float
    height: float

    @classmethod
    def of(cls, film: Film) -> Layout:
        """The largest panels of the right shape with which the film fits a screen."""
        west, east, south, north = film.edges
        # Degrees of longitude shrink with the cosine of latitude.
        shrink = math.cos(math.radians(0.5 * (south + north))) if film.geographic else 1.0
        shape = float(np.clip((north - south) / ((east - west) * max(shrink, 0.2)), 0.25, 4.0))
        columns, rows = len(film.columns), max(len(column) for column in film.columns)
        ticks = _TICKS if film.geographic else 0.0
        title = _TITLE if any(panel.title for panel in film.panels) else 0.0
        left = _GAP + 1.5 * ticks
        across = left + columns * _GAP
        down = _HEAD + rows * (title + _GAP) + ticks + _BAR
        fit = min((_LARGEST[0] - across) / columns, (_LARGEST[1] - down) / (rows * shape))
        # No wider than half a screen, no narrower than can be seen.
        panel = max(min(fit, 7.5, 6.0 / math.sqrt(shape)), 1.3)
        width, height = across + columns * panel, down + rows * panel * shape
        padding = max(0.0, 4.6 - width)  # room for the heading
        left += 0.5 * padding
        return cls(rows, title, panel, panel * shape, left, _even(width + padding), _even(height))

    def column(self, number: int) -> float:
        """Left edge of a column."""
        return self.left + number * (self.panel + _GAP)

    def box(self, column: int, row: int, rows: int) -> Box:
        """Relative box of the panel in a row of a column of so many rows."""
        step = self.tall + self.title + _GAP
        top = _HEAD + self.title + (row + 0.5 * (self.rows - rows)) * step
        left, bottom = self.column(column), self.height - top - self.tall
        return self.relative((left, bottom, self.panel, self.tall))

    def relative(self, box: Box) -> Box:
        """Box ``(left, bottom, width, height)`` in fractions of the figure."""
        left, bottom, width, height = box
        return left / self.width, bottom / self.height, width / self.width, height / self.height


def _even(length: float) -> float:
    """Round a length up to an even number of pixels."""
    step = 2.0 / _DPI
    return step * math.ceil(length / step)


def _draw_degrees(ax: Axes) -> None:
    """Label the axes in degrees north and east."""
    ax.tick_params(labelsize=8, color=GREY, labelcolor=GREY, length=3)
    ax.locator_params(nbins=5, steps=[1, 1.5, 2, 3, 4.5, 5, 6, 9, 10])
    ax.xaxis.set_major_formatter(lambda value, _: _degrees((value + 180) % 360 - 180, "EW"))
    ax.yaxis.set_major_formatter(lambda value, _: _degrees(value, "NS"))


def _degrees(value: float, sides: str) -> str:
    """Format degrees, as `30°N`."""
    if abs(value) < 1e-9 or (sides == "EW" and abs(abs(value) - 180.0) < 1e-9):
        return f"{abs(value):g}°"
    return f"{abs(value):g}°{sides[int(value < 0)]}"


def _in_units_of(unit: float) -> Callable[[float, float], str]:
    """Format numbers in multiples of a unit, for matplotlib."""
    return lambda value, _: f"{value / unit:g}".replace("-", "−")
