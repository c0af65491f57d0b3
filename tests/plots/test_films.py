# SPDX-License-Identifier: Apache-2.0
"""Frames are drawn right, and a film that fails leaves nothing behind."""

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ddo_modulus.plots import Edges, Film, Panel, field_scale, write_film
from ddo_modulus.plots.stage import Stage

FIELDS = np.random.default_rng(0).standard_normal((3, 8, 12))


def film(read=lambda number: [FIELDS[number]], count=3):
    scale = field_scale(FIELDS, "Vorticity", "1/s", "shown")
    coast = [np.array([[2.0, 51.0], [9.0, 57.0]])]
    stamps = [f"hour {number}" for number in range(count)]
    edges = Edges(0.0, 12.0, 50.0, 58.0)
    return Film([[Panel("a field", scale)]], read, stamps, "Vorticity", edges, True, coast)


def test_frames_over_the_still_part_are_the_whole_figure_drawn_anew():
    whole, stage = Stage(film()), Stage(film())
    whole._still = None  # matplotlib draws all of it
    for artist in whole._moving:
        artist.set_animated(False)
    for number in range(2):
        frames = []
        for figure in (whole, stage):
            figure.set_frame([FIELDS[number]], f"hour {number}")
            canvas = figure.canvas
            assert isinstance(canvas, FigureCanvasAgg)
            canvas.draw()
            frames.append(np.asarray(canvas.buffer_rgba()).astype(int))
        # The lines around and over the field are drawn after the axes' ticks, not before.
        assert (np.abs(frames[0] - frames[1]).max(-1) > 8).mean() < 1e-3


@pytest.mark.parametrize("kind", [".mp4", ".gif"])
def test_a_film_that_fails_leaves_nothing_and_settings_as_they_were(tmp_path, kind):
    def read(number):
        if number == 2:
            raise ValueError("the third frame cannot be read")
        return [FIELDS[number]]

    before = matplotlib.rcParams["animation.ffmpeg_path"]
    with pytest.raises(ValueError, match="third frame"):
        write_film(film(read), tmp_path / "film", kind=kind, fps=10)
    assert list(tmp_path.iterdir()) == []
    assert matplotlib.rcParams["animation.ffmpeg_path"] == before


def test_an_interruption_that_ends_ffmpeg_too_is_reported_as_one(tmp_path, monkeypatch):
    ended = tmp_path / "ffmpeg"
    ended.write_text("#!/bin/sh\nexit 255\n")
    ended.chmod(0o700)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(ended))

    def read(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_film(film(read), tmp_path / "film", kind=".mp4", fps=10)


def test_progress_is_reported_frame_by_frame(tmp_path):
    seen = []
    write_film(film(), tmp_path / "x", kind=".gif", fps=10, progress=lambda *now: seen.append(now))
    assert seen == [(1, 3), (2, 3), (3, 3)] and (tmp_path / "x").read_bytes()[:3] == b"GIF"
