# SPDX-License-Identifier: Apache-2.0
"""``ddo verify samples=`` on stores as `ddo generate` and `ddo simulate` write them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ddo_modulus.fields.basis import FourierBasis
from ddo_modulus.fields.gaussian_field import GaussianField, Matern

STEP = pd.Timedelta("1s")


def fields(shape, seed, size=16):
    """Band-limited draws of one law, ``(*shape, size, size)``."""
    field = GaussianField(FourierBasis((16, 16), modes=(15, 15)), Matern(0.2, 1.0))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(int(np.prod(shape)), 1, field.basis.size, generator=generator)
    x = field.basis.synthesize(field.root(z) * z, (size, size))
    return x.reshape(*shape, size, size).numpy()


def dataset(lead, values, **attrs):
    size = values.shape[-1]
    axes = {d: np.arange(n) for d, n in zip(lead, values.shape, strict=False)}
    axes["time"] = pd.Timestamp("2000-01-01") + STEP * np.arange(values.shape[len(lead)])
    axes |= {d: (d, np.arange(size) / size, {"units": "1"}) for d in ("lat", "lon")}
    dims = (*lead, "time", "lat", "lon")
    return xr.Dataset({"w": (dims, values, {"units": "1"})}, coords=axes, attrs=attrs)


def save(data, path):
    data.to_zarr(path, zarr_format=3, consolidated=False, mode="w")
    return path


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    path = tmp_path_factory.mktemp("truth") / "truth.zarr"
    return save(dataset(["trajectory"], fields((20, 10), 0)), path)


def test_samples_of_a_prior(ddo, truth, tmp_path):
    samples = save(dataset(["ensemble"], fields((40, 3), 1)), tmp_path / "x.zarr")
    out = tmp_path / "report"
    result = ddo("verify", samples=samples, truth=truth, resamples=40, out=out)
    assert result.status == 0, result.err
    assert "F2ID" in result.out and "verify 100 %" in result.err
    report = json.loads((out / "scores.json").read_text())["w"]
    assert report["sizes"] == {"samples": [120, 1], "truth": [20, 10]}
    found = report["quantities"]
    assert "time-difference energy" not in found  # no trajectories
    for name in ("log-spectrum distance", "Wasserstein-1 distance", "F2ID"):
        assert found[name]["distance"] < 1.5 * found[name]["own_high"], name
        assert found[name]["ratio"] == pytest.approx(
            found[name]["distance"] / found[name]["own_median"]
        )
    text = (out / "scores.md").read_text()
    assert "| log-spectrum distance" in text and "single frames" in text
    assert {path.name for path in out.glob("*.png")} == {
        "w_distribution.png",
        "w_structure.png",
        "w_autocovariance.png",
    }


def test_the_report_is_that_of_the_function(ddo, truth, tmp_path):
    """Read part by part from stores, or whole from memory: the same numbers."""
    from ddo_modulus.fields.grid import BoxGrid
    from ddo_modulus.verification import compare

    x = 1.3 * fields((6, 8), 2)
    samples = save(dataset(["ensemble"], x, trajectory=True), tmp_path / "x.zarr")
    out = tmp_path / "report"
    assert ddo("verify", samples=samples, truth=truth, resamples=10, out=out).status == 0
    found = json.loads((out / "scores.json").read_text())["w"]["quantities"]
    expected = compare(
        torch.from_numpy(x), torch.from_numpy(fields((20, 10), 0)), BoxGrid((16, 16)), resamples=10
    )
    assert list(found) == [quantity.name for quantity in expected.quantities]
    for quantity in expected.quantities:
        row = found[quantity.name]
        assert row["distance"] == pytest.approx(quantity.distance, rel=1e-5, abs=1e-7)
        assert row["own_median"] == pytest.approx(quantity.own_median, rel=1e-5, abs=1e-7)
    assert (out / "w_time.png").exists()


def test_trajectories_are_read_in_parts(ddo, truth, tmp_path, monkeypatch):
    """Nothing is lost at the border of two parts."""
    from ddo_modulus.cli.verify import samples as command

    samples = save(dataset(["ensemble"], fields((4, 10), 3)), tmp_path / "x.zarr")
    reports = []
    for size in (command._PIECE_BYTES, 3 * 8 * 16 * 16):
        monkeypatch.setattr(command, "_PIECE_BYTES", size)
        out = tmp_path / f"report{size}"
        keys = {"trajectories": "true", "resamples": 4}
        assert ddo("verify", samples=samples, truth=truth, out=out, **keys).status == 0
        reports.append(json.loads((out / "scores.json").read_text())["w"])
    for name, row in reports[0]["quantities"].items():
        assert reports[1]["quantities"][name]["distance"] == pytest.approx(row["distance"]), name
    assert reports[0]["curves"]["seam"] == reports[1]["curves"]["seam"]


def conditional(tmp_path, spread=0.3, size=16):
    """A store with `w_truth` and `w_lowres` beside `w`: truth plus independent errors."""
    target = fields((12,), 5)
    centre = target + spread * fields((12,), 6)
    members = centre[None] + spread * fields((8, 12), 7)
    data = dataset(["ensemble"], members)
    data["w_truth"] = (("time", "lat", "lon"), target, {"units": "1"})
    lowres = target.reshape(12, 4, 4, 4, 4).mean((2, 4))
    data["w_lowres"] = (("time", "lat_lowres", "lon_lowres"), lowres, {"units": "1"})
    return save(data, tmp_path / "x.zarr"), target, members


def test_conditional_samples_are_scored_against_their_truth(ddo, truth, tmp_path):
    samples, target, members = conditional(tmp_path)
    out = tmp_path / "report"
    result = ddo("verify", samples=samples, resamples=10, out=out)
    assert result.status == 0, result.err
    report = json.loads((out / "scores.json").read_text())
    assert set(report) == {"w", "w, all points"}
    scores = report["w, all points"]
    assert scores["rmse"] == pytest.approx(np.sqrt(((members.mean(0) - target) ** 2).mean()))
    assert scores["spread"] == pytest.approx(np.sqrt(members.var(0, ddof=1).mean()))
    assert scores["ratio"] == pytest.approx(1.0, abs=0.15)
    assert sum(scores["rank_histogram"]["counts"]) == target.size
    assert scores["rank_histogram"]["thinned_points"] == 12
    assert report["w"]["sizes"]["samples"] == [12, 1]  # members of one time count once
    assert (out / "w_ranks.png").exists()
    assert "members of one time counted once" in (out / "scores.md").read_text()

    both = ddo("verify", samples=samples, truth=truth, resamples=4, out=tmp_path / "both")
    assert both.status == 0, both.err
    other = json.loads((tmp_path / "both" / "scores.json").read_text())
    assert other["w"]["sizes"]["truth"] == [20, 10]
    assert other["w, all points"] == scores


def test_scores_of_parts_are_pooled(monkeypatch, tmp_path):
    from ddo_modulus.cli.verify.samples import ensemble_scores
    from ddo_modulus.data import source
    from ddo_modulus.fields.grid import BoxGrid

    _, target, members = conditional(tmp_path)
    data = dataset(["ensemble"], members)
    data["t"] = (("time", "lat", "lon"), target)
    arguments = (data["w"], data["t"], BoxGrid((16, 16)), "1", 0)
    whole = ensemble_scores(*arguments)
    monkeypatch.setattr(source, "_SLAB_BYTES", 5 * 9 * 4 * 16 * 16)
    parts = ensemble_scores(*arguments)
    assert parts[0].points == whole[0].points == target.size
    for name in ("rmse", "spread", "ratio", "crps"):
        expected = getattr(whole[0], name)
        assert getattr(parts[0], name) == pytest.approx(expected, rel=1e-6), name
    assert torch.equal(whole[1].counts, parts[1].counts)


def test_samples_on_a_finer_grid(ddo, truth, tmp_path):
    fine = save(dataset(["ensemble"], fields((30, 2), 1, size=32)), tmp_path / "fine.zarr")
    coarse = save(dataset(["ensemble"], fields((30, 2), 1)), tmp_path / "coarse.zarr")
    found = []
    for samples in (fine, coarse):
        out = tmp_path / samples.stem
        assert ddo("verify", samples=samples, truth=truth, resamples=4, out=out).status == 0
        found.append(json.loads((out / "scores.json").read_text())["w"])
        text = (out / "scores.md").read_text()
        assert ("finer fields truncated" in text) == (samples is fine)
    assert found[0]["grid"] == found[1]["grid"] == [16, 16]
    for name, row in found[1]["quantities"].items():
        other = found[0]["quantities"][name]["distance"]
        assert other == pytest.approx(row["distance"], rel=1e-3, abs=1e-5), name


def test_largest_wavenumber_and_octaves(ddo, truth, tmp_path):
    samples = save(dataset(["ensemble"], fields((20, 2), 1)), tmp_path / "x.zarr")
    keys = {"largest_wavenumber": 4, "octaves": 2, "resamples": 4}
    assert ddo("verify", samples=samples, truth=truth, out=tmp_path / "r", **keys).status == 0
    report = json.loads((tmp_path / "r" / "scores.json").read_text())["w"]
    waves = np.array(report["curves"]["spectrum"]["x"]) / (2 * np.pi)
    np.testing.assert_allclose(waves, [1, 2, 3, 4])
    assert report["octaves"] == 2


@pytest.mark.parametrize("globe", [True, False])
def test_on_the_globe_and_on_a_region(ddo, tmp_path, globe):
    """Members of ERA5-like fields, a truth of finer rows on the globe, of a larger region else."""
    random = np.random.default_rng(0)
    if globe:
        lat, lon = np.linspace(90, -90, 13), np.arange(0, 360, 15.0)
    else:
        lat, lon = np.arange(56.0, 46, -1), np.arange(-6.0, 6)
    times = pd.date_range("2020-01-01", periods=6, freq="6h")

    def make(shape, lat, lon, dims):
        values = (
            280
            + 10 * np.cos(np.deg2rad(lat))[:, None]
            + random.normal(size=(*shape, len(lat), len(lon)))
        )  # noqa: E501
        axes = dict(zip(dims, map(np.arange, shape), strict=True)) | {"time": times}
        coords = axes | {"lat": lat, "lon": lon}
        return xr.Dataset(
            {"t2m": ((*dims, "lat", "lon"), values.astype("f4"), {"units": "K"})}, coords=coords
        )

    samples = save(make((4, 6), lat, lon, ("ensemble", "time")), tmp_path / "x.zarr")
    if globe:
        lat, lon = np.linspace(90, -90, 25), np.arange(0, 360, 7.5)
    else:
        lat, lon = np.arange(58.0, 44, -1), np.arange(-9.0, 8) % 360
        lon.sort()
    wide = make((6,), lat, lon, ("time",))
    truth = tmp_path / "truth.nc"
    wide.to_netcdf(truth)
    result = ddo("verify", samples=samples, truth=truth, resamples=4, out=tmp_path / "r")
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "r" / "scores.json").read_text())["t2m"]
    assert report["grid"] == ([13, 24] if globe else [10, 12])
    assert report["quantities"]["mean"]["units"] == "K"
    assert report["quantities"]["mean"]["distance"] < 0.3


def test_mistakes(refused, truth, tmp_path):
    good = dataset(["ensemble"], fields((6, 4), 1))
    path = tmp_path / "x.zarr"
    save(good, path)

    def mistake(match, data=None, **keys):
        if data is not None:
            save(data, path)
        given = {"samples": path, "truth": truth, "out": tmp_path / "report"} | keys
        refused(match, "verify", **{k: v for k, v in given.items() if v is not None})

    mistake("either analysis=... ", samples=None)
    mistake("not both", analysis=path)
    mistake("observations= goes with analysis=", observations="x.csv")
    mistake("give truth=...: true fields", truth=None)
    mistake("resamples=1 must", resamples=1)
    mistake("largest_wavenumber=-1", largest_wavenumber=-1)
    mistake("leaves no shell", largest_wavenumber=0.1)
    mistake("16x16 grid resolves 3 octaves, not octaves=5", octaves=5)
    mistake("trajectories=maybe must be one of false, true", trajectories="maybe")
    mistake("no such file", truth=tmp_path / "none.zarr")
    mistake("no such file", samples=tmp_path / "none.zarr")
    mistake("missing or infinite", good.where(good["lat"] > 0.2))
    mistake("no field q", good.rename(w="q"))
    mistake("the samples are in m/s", good.assign(w=good["w"].assign_attrs(units="m/s")))
    mistake("torus of 2 x 2", good.assign_coords(
        {d: (d, np.arange(16) / 8, {"units": "1"}) for d in ("lat", "lon")}
    ))  # fmt: skip
    slow = good.assign_coords(time=pd.Timestamp("2000-01-01") + 2 * STEP * np.arange(4))
    mistake("2 s apart", slow, trajectories="true")
    mistake("not evenly spaced", good.isel(time=[0, 1, 3]), trajectories="true")
    mistake("one time", good.isel(time=[0]), trajectories="true")
    mistake("goes with samples=", good, analysis=path, samples=None, octaves=3)
    one = tmp_path / "one.zarr"
    save(dataset([], fields((1,), 0)), one)
    mistake("one true field", good, truth=one)
    existing = tmp_path / "there"
    existing.mkdir()
    mistake("exists", good, out=existing)
