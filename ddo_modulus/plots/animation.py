# SPDX-License-Identifier: Apache-2.0
"""Films of fields: panels side by side, one frame a time, as MP4 or GIF.

They look like the `figures`: red-white-blue, centred at zero, for fields of both signs, viridis for
others, pale to dark for the spread of an ensemble. What does not change is drawn once; for each
frame only the images, what lies over them and the time are drawn again.

Axes: ``H W`` grid; ``Y X`` pixels of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddo_modulus.errors import InputError
from ddo_modulus.plots.figures import color_scale

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Array = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]

#: Kinds of films, by the ending of the file's name, and the most frames a second of each. (The
#: clock of GIFs ticks 100 times a second, and browsers do not show a frame for a single tick.)
FASTEST = {".mp4": 240.0, ".gif": 50.0}

_DPI = 120
_LARGEST = (16.0, 9.0)  # inches; a full-HD screen, if the panels fit in it
_GAP, _TITLE, _HEAD, _BAR, _TICKS = 0.16, 0.27, 0.48, 0.74, 0.24  # inches
_GREY = "#595959"
_MISSING = "#bdbdbd"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Scale(NamedTuple):
    """Colours of some panels.

    Attributes:
        colors: Name of matplotlib's colour map.
        low: Value of the first colour.
        high: Value of the last colour.
        name: What the colours mean.
        units: Its units; ``"1"`` for none.
        note: What else there is to say about them.
        extend: Where values may lie beyond: ``"both"`` or ``"max"``.
    """

    colors: str
    low: float
    high: float
    name: str
    units: str = "1"
    note: str = ""
    extend: str = "both"

    def label(self, power: int) -> str:
        """Label of a colour bar whose numbers are in units of a power of ten."""
        factor = "10" + str(power).translate(_SUPERSCRIPT) if power else ""
        units = " ".join(part for part in (factor, self.units if self.units != "1" else "") if part)
        return (
            self.name + (f" ({units})" if units else "") + (f"; {self.note}" if self.note else "")
        )


def field_scale(values: Array, name: str, units: str, of: str) -> Scale:
    """Colours for fields with values like these; the outermost half per cents may saturate.

    Args:
        values: Any shape; those that are not finite do not count.
        name: What the values are.
        units: Their units; ``"1"`` for none.
        of: What the values are of, to be told with the limits.

    Raises:
        InputError: If no value is finite.
    """
    finite = np.asarray(values[np.isfinite(values)], np.float64)
    if not finite.size:
        raise InputError(f"{name}: all values {of} are missing")
    found = color_scale(finite, None)
    low, high = found["vmin"], found["vmax"]
    if not low < high:  # a constant field
        low, high = low - 0.5, high + 0.5
    return Scale(found["cmap"], low, high, name, units, f"limits hold 99 % of the values {of}")


def spread_scale(values: Array, units: str) -> Scale:
    """Colours for standard deviations like these; the uppermost per cent may saturate."""
    values = values[np.isfinite(values)]
    top = float(np.percentile(values, 99.0)) if values.size else 0.0
    return Scale("magma_r", 0.0, top if top > 0.0 else 1.0, "Spread", units, extend="max")


class Edges(NamedTuple):
    """Outer edges of a grid's first and last cells."""

    west: float
    east: float
    south: float
    north: float


@dataclass(frozen=True)
class Panel:
    """A place in a film for one field.

    Attributes:
        title: What it shows.
        scale: Its colours; panels of an equal one share a colour bar.
        edges: Edges of its grid, if it is not the film's own.
    """

    title: str
    scale: Scale
    edges: Edges | None = None


@dataclass(frozen=True)
class Film:
    """Panels in columns and what they show from frame to frame.

    Attributes:
        columns: Panels, each column from above; shorter columns are centred.
        read: Gives the fields of a frame's number, ``(H, W)`` each, in the order of the panels,
            column by column. Rows run from north to south if ``geographic``, from south to north
            (y upwards) if not. Values that are not finite are drawn in grey.
        stamps: Time of each frame, in words.
        heading: What is shown.
        edges: Edges of the grid.
        geographic: Whether the edges are degrees.
        coastlines: Lines ``(N, 2)`` of longitude and latitude to draw over the fields.
    """

    columns: Sequence[Sequence[Panel]]
    read: Callable[[int], Sequence[Array]]
    stamps: Sequence[str]
    heading: str
    edges: Edges
    geographic: bool = False
    coastlines: Sequence[Array] = field(default_factory=tuple)

    def frames(self) -> Iterator[Pixels]:
        """Draw the frames, ``(Y, X, 3)`` each, with even numbers of pixels."""
        canvas, images, over, stamp = self._stage()
        canvas.draw()
        still = canvas.copy_from_bbox(canvas.figure.bbox)
        for number, time in enumerate(self.stamps):
            canvas.restore_region(still)
            for image, values in zip(images, self.read(number), strict=True):
                image.set_data(np.ma.masked_invalid(values))
            stamp.set_text(time)
            for artist in over:
                (artist.axes or canvas.figure).draw_artist(artist)
            yield np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def palette(self) -> Pixels:
        """256 colours ``(256, 3)`` that do for all frames: those of the scales, and greys."""
        from matplotlib import colormaps

        greys = np.repeat(np.linspace(0, 255, 40)[:, None], 3, 1)
        scales = list(dict.fromkeys(panel.scale for column in self.columns for panel in column))
        colors = [greys]
        for part, scale in zip(np.array_split(np.arange(216), len(scales)), scales, strict=True):
            colors.append(255.0 * colormaps[scale.colors](np.linspace(0, 1, len(part)))[:, :3])
        return np.concatenate(colors).round().astype(np.uint8)

    def _stage(self) -> tuple[FigureCanvasAgg, list[AxesImage], list[Artist], Any]:
        """Draw all that stays; give the images, what is drawn for each frame, and the stamp."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        plan = _Plan.of(self)
        figure = Figure(figsize=(plan.width, plan.height), dpi=_DPI, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        y = 1.0 - 0.5 * _HEAD / plan.height
        left, right = plan.left / plan.width, 1.0 - _GAP / plan.width
        figure.text(left, y, self.heading, fontsize=13, fontweight="bold", va="center")
        stamp = figure.text(right, y, "", fontsize=13, va="center", ha="right", animated=True)
        images: list[AxesImage] = []
        over: list[Artist] = []
        for number, column in enumerate(self.columns):
            for row, panel in enumerate(column):
                box = plan.box(number, row, len(column))
                ax = figure.add_axes(box)
                outermost = row == len(column) - 1, number == 0
                images.append(self._draw_panel(ax, panel, outermost))
                over += [images[-1], *self._draw_coast(ax), *ax.spines.values()]
        for artist in over:
            artist.set_animated(True)
        self._draw_bars(figure, images, plan)
        return canvas, images, [*over, stamp], stamp

    def _draw_panel(self, ax: Axes, panel: Panel, outermost: tuple[bool, bool]) -> AxesImage:
        """Prepare a panel's axes and its image, which is empty yet."""
        from matplotlib import colormaps

        colors = colormaps[panel.scale.colors].with_extremes(bad=_MISSING)
        image = ax.imshow(
            np.zeros((2, 2)),
            cmap=colors,
            vmin=panel.scale.low,
            vmax=panel.scale.high,
            extent=panel.edges or self.edges,
            origin="upper" if self.geographic else "lower",
            interpolation="nearest",
            aspect="auto",  # the axes' box has the right one
        )
        ax.set_xlim(self.edges.west, self.edges.east)
        limit = 90.0 if self.geographic else math.inf  # cells at the poles would reach beyond
        ax.set_ylim(max(self.edges.south, -limit), min(self.edges.north, limit))
        ax.set_title(panel.title, fontsize=11, pad=4)
        for spine in ax.spines.values():
            spine.set(color=_GREY, linewidth=0.8)
        if not self.geographic:
            ax.set(xticks=[], yticks=[])
            return image
        ax.tick_params(labelsize=8, color=_GREY, labelcolor=_GREY, length=3)
        ax.locator_params(nbins=5, steps=[1, 1.5, 2, 3, 4.5, 5, 6, 9, 10])
        ax.xaxis.set_major_formatter(lambda value, _: _degrees((value + 180) % 360 - 180, "EW"))
        ax.yaxis.set_major_formatter(lambda value, _: _degrees(value, "NS"))
        bottom, left = outermost
        ax.tick_params(labelbottom=bottom, labelleft=left)
        return image

    def _draw_coast(self, ax: Axes) -> list[Artist]:
        if not self.coastlines:
            return []
        from matplotlib.collections import LineCollection

        # Dark on a pale halo: to be seen on every colour.
        halo = LineCollection(self.coastlines, colors="white", linewidths=1.6, alpha=0.5)
        line = LineCollection(self.coastlines, colors="#202020", linewidths=0.7)
        return [ax.add_collection(lines, autolim=False) for lines in (halo, line)]

    def _draw_bars(self, figure: Figure, images: Sequence[AxesImage], plan: _Plan) -> None:
        """Draw a colour bar for each scale, under the columns that use it."""
        scales = dict.fromkeys(panel.scale for column in self.columns for panel in column)
        panels = [panel for column in self.columns for panel in column]
        for scale in scales:
            image = images[next(i for i, p in enumerate(panels) if p.scale == scale)]
            of = [i for i, col in enumerate(self.columns) if any(p.scale == scale for p in col)]
            west, east = plan.column(of[0]), plan.column(of[-1]) + plan.panel
            length = min(0.92 * (east - west), 6.0)
            middle = 0.5 * (west + east)
            box = (middle - 0.5 * length, 0.5, length, 0.13)
            ax = figure.add_axes(plan.relative(box))
            bar = figure.colorbar(image, cax=ax, orientation="horizontal", extend=scale.extend)
            largest = max(abs(scale.low), abs(scale.high))
            power = 0 if 1e-2 <= largest < 1e5 else math.floor(math.log10(largest))
            bar.set_label(scale.label(power), fontsize=10 if length > 3.0 else 9)
            bar.ax.tick_params(labelsize=9)
            bar.ax.locator_params(nbins=7 if length > 3.0 else 4)
            bar.ax.xaxis.set_major_formatter(_in_units_of(10.0**power))
            bar.outline.set(color=_GREY, linewidth=0.6)


class _Plan(NamedTuple):
    """Where the parts of a film lie, in inches."""

    rows: int
    title: float
    panel: float  # width of a panel
    tall: float  # height of a panel
    left: float
    ticks: float
    width: float
    height: float

    @classmethod
    def of(cls, film: Film) -> _Plan:
        """The largest panels of the right shape with which the film fits a screen."""
        west, east, south, north = film.edges
        # Degrees of longitude shrink with the cosine of latitude.
        shrink = math.cos(math.radians(0.5 * (south + north))) if film.geographic else 1.0
        shape = float(np.clip((north - south) / ((east - west) * max(shrink, 0.2)), 0.25, 4.0))
        columns, rows = len(film.columns), max(len(column) for column in film.columns)
        ticks = _TICKS if film.geographic else 0.0
        title = _TITLE if any(panel.title for column in film.columns for panel in column) else 0.0
        left = _GAP + 1.5 * ticks
        across = left + columns * _GAP
        down = _HEAD + rows * (title + _GAP) + ticks + _BAR
        fit = min((_LARGEST[0] - across) / columns, (_LARGEST[1] - down) / (rows * shape))
        # No wider than a screen's half, no narrower than can be seen.
        panel = max(min(fit, 7.5, 6.0 / math.sqrt(shape)), 1.3)
        width = across + columns * panel
        padding = max(0.0, 4.6 - width)  # room for the heading
        even = 2.0 / _DPI
        return cls(
            rows,
            title,
            panel,
            panel * shape,
            left + 0.5 * padding,
            ticks,
            even * math.ceil((width + padding) / even),
            even * math.ceil((down + rows * panel * shape) / even),
        )

    def column(self, number: int) -> float:
        """Left edge of a column."""
        return self.left + number * (self.panel + _GAP)

    def box(self, column: int, row: int, rows: int) -> tuple[float, float, float, float]:
        """Relative box of the panel in a row of a column that has so many."""
        step = self.tall + self.title + _GAP
        top = _HEAD + self.title + (row + 0.5 * (self.rows - rows)) * step
        return self.relative(
            (self.column(column), self.height - top - self.tall, self.panel, self.tall)
        )

    def relative(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """Box ``(left, bottom, width, height)`` in parts of the figure."""
        left, bottom, width, height = box
        return left / self.width, bottom / self.height, width / self.width, height / self.height


def write_film(
    film: Film,
    path: str | Path,
    *,
    kind: str,
    fps: float,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw a film and encode it.

    Args:
        film: Film of at least one frame.
        path: File to write.
        kind: ``".mp4"`` (H.264 in yuv420p, which browsers play) or ``".gif"``, which repeats.
        fps: Frames a second.
        progress: Called with the number of frames done and their total.

    Raises:
        InputError: If there is no such kind, or the frame rate is out of its range.
    """
    check_rate(kind, fps)

    def counted() -> Iterator[Pixels]:
        for number, frame in enumerate(film.frames()):
            yield frame
            if progress is not None:
                progress(number + 1, len(film.stamps))

    if kind == ".mp4":
        _write_mp4(counted(), path, fps)
    else:
        _write_gif(counted(), path, fps, film.palette())


def check_rate(kind: str, fps: float) -> None:
    """Raise unless films of this kind can have this frame rate.

    Raises:
        InputError: If there is no such kind, or the frame rate is out of its range.
    """
    if kind not in FASTEST:
        raise InputError(f"films end in {' or '.join(FASTEST)}, not in {kind or 'nothing'!r}")
    if not 0.01 <= fps <= FASTEST[kind]:  # also false for NaN
        raise InputError(f"fps={fps} must lie between 0.01 and {FASTEST[kind]:g} for {kind} films")


def _write_mp4(frames: Iterator[Pixels], path: str | Path, fps: float) -> None:
    from imageio_ffmpeg import write_frames

    first = next(frames)
    writer = write_frames(
        str(path),
        (first.shape[1], first.shape[0]),
        fps=fps,
        codec="libx264",
        quality=None,
        macro_block_size=2,
        # Small print and the edges of cells stay sharp at this quality; the index goes first, so
        # that a browser can start before it has all.
        output_params=["-crf", "16", "-movflags", "+faststart", "-f", "mp4"],
    )
    writer.send(None)
    try:
        writer.send(np.ascontiguousarray(first))
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()


def _write_gif(frames: Iterator[Pixels], path: str | Path, fps: float, palette: Pixels) -> None:
    from PIL import Image

    colors = Image.new("P", (1, 1))
    colors.putpalette(palette.tobytes())
    ticks = 0.0

    def delay() -> int:
        """Milliseconds of the next frame: whole ticks, which keep up with the frame rate."""
        nonlocal ticks
        before, ticks = round(ticks), ticks + 100.0 / fps
        return 10 * (round(ticks) - before)

    def images() -> Iterator[Image.Image]:
        for frame in frames:
            image = Image.fromarray(frame).quantize(palette=colors, dither=Image.Dither.NONE)
            image.info["duration"] = delay()
            yield image

    drawn = images()
    first = next(drawn)
    first.save(path, format="GIF", save_all=True, append_images=drawn, loop=0, optimize=False)


def _in_units_of(unit: float) -> Callable[[float, float], str]:
    """Format numbers in multiples of a unit, for matplotlib."""
    return lambda value, _: f"{value / unit:g}".replace("-", "−")


def _degrees(value: float, sides: str) -> str:
    """Format degrees, as `30°N`."""
    if abs(value) < 1e-9 or (sides == "EW" and abs(abs(value) - 180.0) < 1e-9):
        return f"{abs(value):g}°"
    return f"{abs(value):g}°{sides[int(value < 0)]}"
