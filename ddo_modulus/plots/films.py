# SPDX-License-Identifier: Apache-2.0
"""Films of fields: panels side by side, one frame for each time, as MP4 or GIF.

Colours are those of the figures: red-white-blue, centred at zero, for fields of both signs, viridis
for others, pale to dark for the spread of an ensemble. Matplotlib's writer sends the frames to
ffmpeg one by one, so memory does not grow with the film.

Axes: ``H W`` grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddo_modulus.errors import InputError
from ddo_modulus.plots.style import color_scale, positive_scale

if TYPE_CHECKING:
    from matplotlib.animation import FFMpegWriter

Array = NDArray[np.floating[Any]]

#: Kinds of films, by the ending of the file's name, and the most frames a second of each. (The
#: clock of GIFs ticks 100 times a second, and browsers do not show a frame for a single tick.)
FASTEST = {".mp4": 240.0, ".gif": 50.0}

# H.264 in yuv420p, which browsers play. At this quality small print and the edges of cells stay
# sharp. The index goes first, so that a browser can start before it has the whole file.
_MP4 = ["-pix_fmt", "yuv420p", "-crf", "16", "-movflags", "+faststart"]
_GREYS = 40  # of the 256 colours of a GIF, for text, lines and missing values
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Scale(NamedTuple):
    """Colours of some panels.

    Attributes:
        colors: Name of matplotlib's colour map.
        low: Value of the first colour.
        high: Value of the last colour.
        name: Quantity that the colours stand for.
        units: Its units; ``"1"`` for none.
        note: Remark for the label of the colour bar.
        extend: Where values may lie beyond the limits: ``"both"`` or ``"max"``.
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
    """Colours for a field; 0.5 % of the values at each end may lie beyond the limits.

    Args:
        values: A sample of the field, any shape; values that are not finite are ignored.
        name: Name of the quantity.
        units: Its units; ``"1"`` for none.
        of: What the values were sampled from, for the label of the colour bar.

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
    """Colours for ensemble standard deviations; the highest 1 % may lie beyond the limit."""
    values = values[np.isfinite(values)]
    found = positive_scale(float(np.percentile(values, 99.0)) if values.size else 0.0)
    return Scale(found["cmap"], found["vmin"], found["vmax"], "Spread", units, extend="max")


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
        title: Title above the panel.
        scale: Its colours; panels with equal scales share a colour bar.
        edges: Edges of its grid; those of the film if None.
    """

    title: str
    scale: Scale
    edges: Edges | None = None


@dataclass(frozen=True)
class Film:
    """Panels in columns, and the fields that they show from frame to frame.

    Attributes:
        columns: Panels of each column from top to bottom; shorter columns are centred.
        read: Returns the fields of frame number ``n``, ``(H, W)`` each, in the order of `panels`.
            Rows run from north to south if ``geographic``, from south to north (y upwards) if
            not. Values that are not finite are drawn in grey.
        stamps: Time of each frame, as text.
        heading: Heading of all frames.
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

    @property
    def panels(self) -> list[Panel]:
        """All panels, column by column."""
        return [panel for column in self.columns for panel in column]

    @property
    def scales(self) -> list[Scale]:
        """The different scales, in the order of the panels."""
        return list(dict.fromkeys(panel.scale for panel in self.panels))

    def palette(self) -> NDArray[np.uint8]:
        """256 colours ``(16, 16, 3)`` that serve all frames: those of the scales, and greys."""
        from matplotlib import colormaps

        colors = [np.repeat(np.linspace(0, 1, _GREYS)[:, None], 3, 1)]
        parts = np.array_split(np.arange(256 - _GREYS), len(self.scales))
        for part, scale in zip(parts, self.scales, strict=True):
            colors.append(colormaps[scale.colors](np.linspace(0, 1, len(part)))[:, :3])
        return (255.0 * np.concatenate(colors)).round().astype(np.uint8).reshape(16, 16, 3)


def check_rate(kind: str, fps: float) -> None:
    """Raise unless films of this kind can have this frame rate.

    Raises:
        InputError: If there is no such kind, or the frame rate is out of its range.
    """
    if kind not in FASTEST:
        raise InputError(f"films end in {' or '.join(FASTEST)}, not in {kind or 'nothing'!r}")
    if not 0.01 <= fps <= FASTEST[kind]:  # also false for NaN
        raise InputError(f"fps={fps} must lie between 0.01 and {FASTEST[kind]:g} for {kind} films")


def write_film(
    film: Film,
    path: str | Path,
    *,
    kind: str,
    fps: float,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw a film and encode it with the ffmpeg of ``imageio-ffmpeg``.

    Args:
        film: Film of at least one frame.
        path: File to write; it appears when the film is complete.
        kind: ``".mp4"``, or ``".gif"``, which repeats.
        fps: Frames a second.
        progress: Called with the number of frames done and their total.

    Raises:
        InputError: If there is no such kind, or the frame rate is out of its range.
    """
    check_rate(kind, fps)
    from subprocess import CalledProcessError

    from imageio_ffmpeg import get_ffmpeg_exe
    from matplotlib import rc_context

    from ddo_modulus.plots.stage import Stage

    path = Path(path).absolute()
    stage, count = Stage(film), len(film.stamps)
    with (
        TemporaryDirectory(prefix=".film-", dir=path.parent) as folder,
        rc_context({"animation.ffmpeg_path": get_ffmpeg_exe()}),
    ):
        made = Path(folder, f"film{kind}")
        writer = _mp4_writer(fps) if kind == ".mp4" else _gif_writer(film, fps, Path(folder))
        try:
            with writer.saving(stage, str(made), stage.dpi):
                for number, stamp in enumerate(film.stamps):
                    stage.set_frame(film.read(number), stamp)
                    writer.grab_frame()
                    if progress is not None:
                        progress(number + 1, count)
        except CalledProcessError as failed:
            # Ctrl-C ends ffmpeg too. Its complaint must not hide the interruption.
            if isinstance(failed.__context__, KeyboardInterrupt):
                raise failed.__context__ from None
            raise
        made.replace(path)


def _mp4_writer(fps: float) -> FFMpegWriter:
    from matplotlib.animation import FFMpegWriter

    # The stub says int; ffmpeg takes any number.
    return FFMpegWriter(fps, codec="libx264", extra_args=_MP4)  # type: ignore[arg-type]


def _gif_writer(film: Film, fps: float, folder: Path) -> FFMpegWriter:
    """Make a writer of GIFs with one palette for all frames, which is put into a folder.

    Matplotlib's ``PillowWriter`` holds all frames in memory, gives each frame a palette of its own
    and rounds every delay down.
    """
    from matplotlib.animation import FFMpegWriter
    from matplotlib.image import imsave

    palette = folder / "palette.png"
    imsave(palette, film.palette())
    # ffmpeg shows the last frame as long as the one before. It gets what is left of the film.
    count = len(film.stamps)
    ticks = round(100 * count / fps) - round(100 * (count - 1) / fps)
    options = ["-i", str(palette), "-filter_complex", "paletteuse=dither=none"]
    options += ["-final_delay", str(ticks)]
    return FFMpegWriter(fps, extra_args=options)  # type: ignore[arg-type]
