# SPDX-License-Identifier: Apache-2.0
"""Draws on the command line: states, trajectories, and states given a coarse view."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from ddo_modulus.data.source import open_dataset
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.diffusion.task import CoarseWindow
from ddo_modulus.diffusion.trajectory import TrajectoryPrior
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.refinement import Refinement
from ddo_modulus.inference.assimilate import member_generator
from ddo_modulus.inference.generate import generate
from ddo_modulus.simulators import KolmogorovFlow


@pytest.fixture(scope="module")
def packages(torus, tiny, arguments, tmp_path_factory):
    """Packages that a few steps of training made: of states, windows and a coarse view."""
    from ddo_modulus.cli.main import main

    folder = tmp_path_factory.mktemp("packages")
    kinds = {
        "state": {},
        "window": {"experiment": "kolmogorov_window", "data__frames": 3},
        "superres": {
            "experiment": "kolmogorov_superres",
            "coarse__factor": 2,
            "coarse__reach": 1,
        },
    }
    for name, more in kinds.items():
        keys = {key: value for key, value in (tiny | more).items() if key != "out"}
        assert main(["train", f"out={folder / name}", *arguments(**keys)]) == 0
    return {name: folder / name / "package" for name in kinds}


def fields(path):
    with xr.open_zarr(path, chunks=None, consolidated=False) as dataset:
        return dataset.load()


def test_states(ddo, packages, tmp_path):
    keys = {"package": packages["state"], "ensemble": 3, "frames": 2, "steps": 4}
    result = ddo("generate", out=tmp_path / "x.zarr", **keys)
    assert result.status == 0, result.err
    found = fields(tmp_path / "x.zarr")
    assert dict(found.sizes) == {"ensemble": 3, "time": 2, "lat": 8, "lon": 8}
    assert found.attrs["trajectory"] == "false" and found.attrs["simulator"] == "kolmogorov"
    assert open_dataset(tmp_path / "x.zarr")["vorticity"].dims[0] == "ensemble"
    states = found["vorticity"].values.reshape(6, -1)
    assert np.unique(states, axis=0).shape == states.shape
    again = ddo("generate", out=tmp_path / "x.zarr", **keys)
    assert again.status == 2 and "overwrite=true" in again.err


def test_a_draw_depends_on_its_member_and_time_alone(packages):
    package = Package.load(packages["state"])
    times = np.array(["2000-01-01T00:00:00", "2000-01-01T00:00:01"], "datetime64[ns]")
    some = generate(package, times, ensemble=3, posterior={"steps": 3, "batch": 2})["vorticity"]
    one = generate(package, times[1:], ensemble=2, posterior={"steps": 3})["vorticity"]
    np.testing.assert_allclose(some.values[:2, 1:], one.values, rtol=1e-4, atol=1e-4)
    other = generate(package, times[1:], ensemble=2, seed=1, posterior={"steps": 3})
    assert not np.allclose(one.values, other["vorticity"].values, atol=0.1)
    frozen = generate(package, times, ensemble=2, frozen=True, posterior={"steps": 3})
    values = frozen["vorticity"].values
    np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "heun", "churn__amount": 3, "discretization": "ve"},
        {"solver": "dpmpp_2m_sde", "sigma_max": 20, "rho": 7, "discretization": "edm"},
    ],
)
def test_options_are_heeded_and_recorded(ddo, packages, tmp_path, options):
    keys = {"package": packages["state"], "ensemble": 1, "frames": 1, "steps": 5}
    assert ddo("generate", out=tmp_path / "plain", **keys).status == 0
    result = ddo("generate", out=tmp_path / "other", **keys, **options)
    assert result.status == 0, result.err
    plain, other = fields(tmp_path / "plain"), fields(tmp_path / "other")
    assert not np.allclose(plain["vorticity"], other["vorticity"], atol=1e-3)
    for name, value in options.items():
        assert other.attrs[name.replace("__", "_")] == value


def test_a_finer_grid_shows_the_same_functions(ddo, packages, tmp_path):
    keys = {"package": packages["state"], "ensemble": 1, "frames": 1, "steps": 5}
    for resolution in (16, "[16,32]"):
        out = tmp_path / str(resolution)
        result = ddo("generate", out=out, resolution=resolution, **keys)
        assert result.status == 0, result.err
        assert fields(out).sizes["lat"] == 16


@pytest.mark.parametrize("kind", ["state", "window", "superres"])
def test_cell_means_of_the_data_stay_so_on_every_grid(packages, kind):
    """The simulator's output is a mean over its cells; so are draws, on each grid its own."""
    package = Package.load(packages[kind])
    assert package.operator.refinement.cell_means
    tail = package.operator.linear.prior.spectrum.tail.rows[:1]  # the same for both laws
    averaged, points = (
        replace(package, operator=package.operator.refined(Refinement(means, tail)))
        for means in (True, False)
    )
    times = np.datetime64("2000-01-01", "ns") + np.arange(5) * np.timedelta64(200, "ms")
    times, coarse = (times, None) if kind != "superres" else (times[:1], torch.zeros(1, 3, 1, 4, 4))
    options = {"ensemble": 1, "coarse": coarse, "posterior": {"steps": 3}}
    for size in (16, 4):
        means, values = (
            generate(p, times, resolution=(size, size), **options)["vorticity"]
            for p in (averaged, points)
        )
        assert means.attrs["cell_methods"] == "lat: lon: mean"
        assert "cell_methods" not in values.attrs
        statistics = package.normalization
        x = statistics.normalize(torch.from_numpy(values.values[0])[:, None])
        expected = statistics.denormalize(averaged.operator.cell_means(x))[:, 0].numpy()
        np.testing.assert_allclose(means.values[0], expected, atol=2e-3 * float(expected.std()))
        assert float((expected - values.values[0]).std() / expected.std()) > 0.02
    own = [generate(p, times, **options)["vorticity"].values for p in (averaged, points)]
    np.testing.assert_array_equal(*own)


def test_trajectories(ddo, packages, tmp_path):
    keys = {"package": packages["window"], "ensemble": 2, "steps": 4}
    result = ddo("generate", out=tmp_path / "x.zarr", frames=9, **keys)
    assert result.status == 0, result.err
    found = fields(tmp_path / "x.zarr")
    assert found.sizes["time"] == 9 and found.attrs["trajectory"] == "true"
    step = np.diff(found["time"].values) / np.timedelta64(1, "ms")
    np.testing.assert_allclose(step, 200)
    assert ddo("generate", out=tmp_path / "window.zarr", **keys).status == 0
    assert fields(tmp_path / "window.zarr").sizes["time"] == 3


@pytest.mark.parametrize("frames", [1, 4])
def test_frames_that_windows_reach_from_one_side_only_are_drawn_and_cut(packages, frames):
    """A window of three: two frames more at each end. A trajectory may be shorter than that."""
    package = Package.load(packages["window"])
    times = np.datetime64("2000-01-01", "ns") + np.arange(frames) * np.timedelta64(200, "ms")
    drawn = generate(package, times, ensemble=1, seed=3, posterior={"steps": 3})
    assert drawn.attrs["trajectory"] == str(frames > 1).lower()
    denoiser = TrajectoryPrior(package.operator, 3, frames + 4, balance=1.0)
    whole = sample(
        denoiser,
        package.posterior.scheduler(denoiser.noise),
        1,
        steps=3,
        generator=[member_generator(3, times[0], 0)],
    )
    inner = package.normalization.denormalize(whole[0, 2:-2, None])[:, 0]
    np.testing.assert_allclose(drawn["vorticity"].values[0], inner, rtol=1e-4, atol=1e-4)


def test_a_long_trajectory_has_the_law_of_its_process(packages):
    """Of an untrained window the draws are Gaussian: variances and lags are the extension's."""
    package = Package.load(packages["window"])
    for parameter in package.operator.network.parameters():
        parameter.zero_()
    times = np.datetime64("2000-01-01", "ns") + np.arange(7) * np.timedelta64(200, "ms")
    drawn = generate(package, times, ensemble=400, posterior={"steps": 24, "batch": 3000})
    x = torch.from_numpy(drawn["vorticity"].values)  # E T H W
    x = package.normalization.normalize(x.flatten(0, 1)[:, None])[:, 0].unflatten(0, (400, 7))
    prior = package.operator.linear.prior
    assert isinstance(prior, CoupledField)
    law = prior.extended(3, 7)
    expected = (law.covariance * law.reference.variance[0][:, None, None]).sum(0)
    found = torch.einsum("ethw,eshw->ts", x.double(), x.double()) / x[:, 0].numel()
    assert float((found - expected).abs().max() / expected.max()) < 0.1


def test_super_resolution(ddo, packages, torus, tmp_path):
    keys = {"package": packages["superres"], "ensemble": 2, "steps": 4}
    out = tmp_path / "fine.zarr"
    result = ddo("generate", out=out, data__path=torus, data__trajectory=1, **keys)
    assert result.status == 0, result.err
    found, data = fields(out), open_dataset(torus)["vorticity"].isel(trajectory=1)
    assert dict(found["vorticity"].sizes) == {"ensemble": 2, "time": 3, "lat": 8, "lon": 8}
    np.testing.assert_allclose(found["vorticity_truth"], data[1:4])
    view = CoarseWindow(2).view(torch.from_numpy(data[1:4].values)[:, None])[:, 0]
    np.testing.assert_allclose(found["vorticity_lowres"], view, atol=1e-6)
    assert (found["time"].values == data["time"].values[1:4]).all()
    centres = found["lat"].values.reshape(4, 2).mean(1)
    np.testing.assert_allclose(found["lat_lowres"], centres)
    np.testing.assert_allclose(found["lon_lowres"], centres)
    # The coarse fields suffice.
    coarse = CoarseWindow(2).view(torch.from_numpy(data.values)[:, None])[:, 0]
    axes = {"time": data["time"], "lat": np.arange(4) / 4, "lon": np.arange(4) / 4}
    small = xr.Dataset({"vorticity": (("time", "lat", "lon"), coarse.numpy())}, axes)
    for name in ("lat", "lon"):
        small[name].attrs["units"] = "1"
    small.to_netcdf(tmp_path / "coarse.nc")
    again = tmp_path / "again.zarr"
    result = ddo("generate", out=again, data__path=tmp_path / "coarse.nc", frames=2, **keys)
    assert result.status == 0, result.err
    same = fields(again)
    assert "vorticity_truth" not in same
    np.testing.assert_allclose(same["vorticity"], found["vorticity"][:, :2], atol=1e-4)


def test_the_shipped_super_resolution_finds_the_scales_below_the_blocks():
    """States of its flow that it has not seen: closeness, spread, and power down to the cut-off."""
    package = Package.load("kolmogorov_superres")
    coarse = package.task.coarse
    flow = KolmogorovFlow(
        reynolds=40.0, drag=0.0, resolution=64, interval=1.0, dt=0.01, spin_up=30.0
    )
    generator = torch.Generator().manual_seed(12345)
    frames = torch.cat(list(flow.simulate(1, 7, generator=generator)))[0]
    truth, std = frames[coarse.reach], float(package.normalization.std)
    drawn = generate(
        package,
        np.array(["2000-01-01"], "datetime64[ns]"),
        ensemble=2,
        coarse=coarse.view(frames[:, None])[None],
    )["vorticity"]
    members = torch.from_numpy(drawn.values[:, 0])
    error = (members - truth).square().mean((1, 2)).sqrt() / std
    assert float(error.max()) < 0.3  # the mean of the state itself is off by one
    basis = package.operator.basis
    # The solver empties waves beyond 21 of an axis, and what a draw has there is as good as none.
    power = basis.power(members.double()).mean(0) / basis.power(truth.double())
    assert float(power[1:26].log().abs().max()) < 1.0
    prior = package.operator.linear.prior.variance[0]
    empty = prior < 1e-9 * prior.mean()
    assert int(empty.sum()) == 64**2 - 43**2 + 1  # and their mean, which vanishes
    square = basis.analyze(members.double() / std).square().mean(0)
    assert float(square[empty].mean()) < 1e-8 * float(prior.mean())


def test_what_is_generated_is_verified_and_filmed(ddo, packages, torus, tmp_path):
    keys = {"package": packages["superres"], "ensemble": 3, "steps": 4, "data__trajectory": 1}
    out = tmp_path / "fine.zarr"
    assert ddo("generate", out=out, data__path=torus, **keys).status == 0
    report = ddo("verify", samples=out, out=tmp_path / "report")
    assert report.status == 0, report.err
    assert (tmp_path / "report" / "scores.json").exists()
    film = ddo("animate", samples=out, out=tmp_path / "film.gif")
    assert film.status == 0, film.err


@pytest.mark.parametrize(
    ("kind", "keys", "match"),
    [
        ("state", {"steps": 0}, "steps=0"),
        ("state", {"solver": "rk4"}, "solver=rk4 must be one of euler"),
        ("state", {"ensemble": 0}, "ensemble=0"),
        ("state", {"resolution": "fine"}, "resolution=fine"),
        ("state", {"discretization": "ddim"}, "discretization=ddim must be one of edm"),
        ("state", {"sigma_min": 9, "sigma_max": 3}, "sigma_min=9.0 must be below sigma_max=3.0"),
        ("state", {"churn__amount": 1}, "churn is for solver=euler or heun"),
        ("state", {"data__path": "x.nc"}, "it takes no data"),
        ("window", {"time": "[2000-01-01T00,2000-01-01T01,2000-01-01T02]"}, "every 0.2 s"),
        ("superres", {}, "give data.path"),
        ("superres", {"data__path": "TORUS"}, "choose one by data.trajectory"),
        ("superres", {"data__path": "TORUS", "data__trajectory": 9}, "not one of the 4"),
        (
            "superres",
            {"data__path": "TORUS", "data__trajectory": 0, "frames": 4},
            "at most frames=3",
        ),
    ],
)
def test_mistakes_are_refused(refused, packages, torus, tmp_path, kind, keys, match):
    keys = {key: torus if value == "TORUS" else value for key, value in keys.items()}
    refused(match, "generate", tmp_path / "x.zarr", package=packages[kind], **keys)
