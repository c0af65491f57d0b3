# SPDX-License-Identifier: Apache-2.0
"""Films of fields: panels side by side, one frame for each time, as MP4 or GIF.

Colours are those of the figures: red-white-blue, centred at zero, for fields of both signs, viridis
for others, pale to dark for the spread of an ensemble. Matplotlib's writer sends the frames to
ffmpeg one by one, so memory does not grow with the film.

Axes: ``H W`` grid.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddo_modulus.errors import InputError
from ddo_modulus.plots.film import Film

if TYPE_CHECKING:
    from matplotlib.animation import FFMpegWriter

Array = NDArray[np.floating[Any]]

#: Kinds of films, by the ending of the file's name, and the most frames a second of each. (The
#: clock of GIFs ticks 100 times a second, and browsers do not show a frame for a single tick.)
FASTEST = {".mp4": 240.0, ".gif": 50.0}

# H.264 in yuv420p, which browsers play. At this quality small print and the edges of cells stay
# sharp. The index goes first, so that a browser can start before it has the whole file.
_MP4 = ["-pix_fmt", "yuv420p", "-crf", "16", "-movflags", "+faststart"]


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
