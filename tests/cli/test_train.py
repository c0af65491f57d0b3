# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ddo_modulus.cli.main import compose, main
from ddo_modulus.cli.options import plain
from ddo_modulus.data.source import open_dataset
from ddo_modulus.diffusion.package import Package
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.training import Recipe, TrainingData, fit_linear, recipe
from ddo_modulus.training.domain import cell_means
from ddo_modulus.training.recipe import DataConfig
from ddo_modulus.training.samples import Samples

TINY = {
    "operator__network__widths": "[4]",
    "operator__network__depths": "[1]",
    "operator__network__modes": "[5]",
    "operator__network__embedding": 8,
    "trainer__steps": 3,
    "trainer__batch": 4,
    "trainer__precision": "fp32",
    "trainer__compile": "false",
    "trainer__validate_every": 2,
    "trainer__checkpoint_every": 2,
}
TORUS = TINY | {
    "experiment": "kolmogorov64",
    "symmetry__roll": "[4,1]",
    "symmetry__glide": 2,
    "data__validation__trajectories": 1,
    "operator__network__coordinates": "[2,0]",
}
REGION = TINY | {
    "experiment": "uk_t2m",
    "prior__folds": 2,
    "data__end": "2019-03-05T23",
    "data__validation__start": "2019-03-05T00",
    "data__validation__end": "2019-03-05T23",
    "operator__network__coordinates": "[1,1]",
}


def opened(*keys):
    """Training data as ``ddo train`` opens them, and the recipe."""
    plan = Recipe.of(plain(compose("train", ["out=x", *keys])))
    data = TrainingData.open(
        plan.data, domain=plan.domain, task=plan.task, normalization=plan.normalization
    )
    return data, plan


@pytest.fixture(scope="module")
def region(tmp_path_factory):
    """A week of hourly temperature with a daily cycle and correlated weather."""
    time = pd.date_range("2019-03-01", periods=24 * 7, freq="1h")
    lat, lon = np.arange(56.0, 50.0, -1), np.arange(-5.0, 3.0)
    random = np.random.default_rng(0)
    weather = random.standard_normal((len(time), 6, 8)).cumsum(1).cumsum(2) / 5
    cycle = 3 * np.sin(2 * np.pi * time.hour.values / 24)[:, None, None]
    axes = {"time": time, "lat": lat, "lon": lon}
    values = (280 + cycle + weather).astype("float32")
    data = xr.Dataset({"t2m": (tuple(axes), values, {"units": "K"})}, coords=axes)
    path = tmp_path_factory.mktemp("region") / "t2m.nc"
    data.to_netcdf(path)
    return path


def test_torus(ddo, refused, torus, tmp_path):
    out = tmp_path / "run"
    result = ddo("train", out=out, data__path=torus, **TORUS)
    assert result.status == 0, result.err
    package = Package.load(out / "package")
    assert package.grid.shape == (8, 8) and package.grid.periodic
    assert package.channels == ("vorticity",) and package.task.condition == "none"
    assert package.provenance["training"]["step"] == 3
    assert package.provenance["configuration"]["trainer"]["steps"] == 3
    assert package.provenance["data"]["simulator"] == "kolmogorov"
    assert str(tmp_path) not in (out / "package" / "package.json").read_text()
    x, sigma = package.operator.noise.sample(2), torch.ones(2)
    assert torch.isfinite(package.operator(x, sigma)).all()
    before = (out / "package" / "operator.mdlus").read_bytes()
    again = ddo("train", out=out, data__path=torus, **TORUS)
    assert again.status == 2 and "overwrite=true" in again.err
    assert (out / "package" / "operator.mdlus").read_bytes() == before
    more = TORUS | {"trainer__steps": 5}
    longer = ddo("train", out=out, data__path=torus, resume="true", overwrite="true", **more)
    assert longer.status == 0, longer.err
    header = json.loads((out / "package" / "package.json").read_text())
    assert header["provenance"]["training"]["step"] == 5


def test_region_with_folds(ddo, region, tmp_path):
    result = ddo("train", out=tmp_path / "run", data__path=region, **REGION)
    assert result.status == 0, result.err
    package = Package.load(tmp_path / "run" / "package")
    assert isinstance(package.grid, LatLonGrid) and package.task.condition == "hour_of_day"
    assert package.units == ("K",) and len(package.operator.eof_index) == 48
    assert package.normalization.per_hour
    # The linear part and the climatology come from all days up to data.end.
    keys = [f"{k.replace('__', '.')}={v}" for k, v in REGION.items()]
    assert error_of_refit(package, *keys, f"data.path={region}") < 1e-3
    times = np.array(["2019-03-06T12"], "datetime64[h]")
    x = package.operator.noise.sample(1)
    clean = package.operator(x, torch.ones(1), package.conditions(times))
    assert torch.isfinite(clean).all()


def error_of_refit(package, *keys):
    """Largest relative difference of a package's linear part from a refit to its data."""
    data, plan = opened(*keys)
    data = data.refitted()
    found = data.normalization
    torch.testing.assert_close(found.mean, package.normalization.mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.std, package.normalization.std, rtol=1e-4, atol=0)
    operator = package.operator
    prior = fit_linear(operator, data, plan.prior)
    exact = GaussianDenoiser(0.0, prior, operator.noise)
    worst = 0.0
    for level in (0.02, 0.3, 5.0, 50.0):
        generator = torch.Generator().manual_seed(0)
        x = prior.sample(4, generator=generator)
        x = x + level * operator.noise.sample(4, generator=generator)
        sigma = torch.full((4,), level)
        expected = exact(x, sigma)
        error = (operator.linear(x, sigma) - expected).norm() / expected.norm()
        worst = max(worst, float(error))
    return worst


@pytest.mark.shared_data
@pytest.mark.slow
def test_the_shipped_linear_part_is_what_its_record_gives(shared_data):
    path = shared_data / "era5-2mt-2019-03-uk.grib"
    keys = ["experiment=uk_t2m", f"data.path={path}"]
    assert error_of_refit(Package.load("uk_t2m"), *keys) < 2e-3


SPECTRUM = REGION | {"prior__kind": "spectrum", "prior__folds": 1, "prior__refit": "false"}


@pytest.fixture(scope="module")
def prepared(region, tmp_path_factory):
    """The region as a training store with statistics of its training days."""
    out = tmp_path_factory.mktemp("prepared") / "t2m.zarr"
    arguments = ["prepare", f"source={region}", f"out={out}", "statistics.end=2019-03-04"]
    assert main(arguments) == 0
    return out


@pytest.mark.parametrize("more", [{}, {"data__crop": "[4,5]"}], ids=["whole", "crops"])
def test_reading_during_training_trains_the_same(ddo, prepared, tmp_path, caplog, more):
    packages = {}
    for loader in ("memory", "torch"):
        caplog.clear()
        keys = SPECTRUM | more | {"data__loader": loader, "data__workers": 1}
        out = tmp_path / loader
        result = ddo("train", out=out, data__path=prepared, **keys)
        assert result.status == 0, result.err
        packages[loader] = Package.load(out / "package")
        if loader == "torch":
            assert "read during training by torch with 1 processes" in caplog.text
            assert "climatology: the statistics of" in caplog.text
            used = "spectrum: the statistics of" in caplog.text
            assert used == (not more)  # the stored spectrum is of the whole grid
    memory, streamed = packages["memory"], packages["torch"]
    assert streamed.grid.shape == ((4, 5) if more else (6, 8))
    torch.testing.assert_close(streamed.normalization.mean, memory.normalization.mean)
    torch.testing.assert_close(streamed.normalization.std, memory.normalization.std)
    for key, value in memory.operator.state_dict().items():
        torch.testing.assert_close(
            streamed.operator.state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=key
        )


def test_statistics_of_other_days_are_not_used(prepared, caplog):
    keys = ["experiment=uk_t2m", f"data.path={prepared}", "data.end=2019-03-03T23"]
    caplog.set_level("INFO")
    streamed = opened(*keys, "data.loader=torch")[0].normalization
    assert "are of 96 samples from 2019-03-01T00:00 to 2019-03-04T23:00" in caplog.text
    assert "takes 72 from 2019-03-01T00:00 to 2019-03-03T23:00" in caplog.text
    expected = opened(*keys, "data.loader=memory")[0].normalization
    torch.testing.assert_close(streamed.mean, expected.mean)
    torch.testing.assert_close(streamed.std, expected.std)


def test_the_loader_goes_by_size_and_by_what_is_there(monkeypatch):
    options = DataConfig("x", memory=0.5)
    assert options.loader_for(2**29) == "memory"
    assert options.loader_for(2**29 + 1) == "dali"
    assert DataConfig("x", loader="torch").loader_for(1) == "torch"
    monkeypatch.setattr(recipe, "find_spec", lambda name: None)
    assert options.loader_for(2**29 + 1) == "torch"
    with pytest.raises(InputError, match=r"pip install ddo-modulus\[dali\]"):
        DataConfig("x", loader="dali")


@pytest.mark.parametrize(
    ("edges", "lat", "lon"),
    [
        ([51, 54.5, -2, 1], [54, 53, 52, 51], [-2, -1, 0, 1]),
        ([51, 52, 358, 361], [52, 51], [-2, -1, 0, 1]),  # another branch of the longitude
    ],
)
def test_a_region_is_cut_out(prepared, edges, lat, lon):
    whole = open_dataset(prepared)
    keys = ["experiment=uk_t2m", f"data.path={prepared}", f"data.region={edges}"]
    for loader in ("memory", "torch"):
        data, _ = opened(*keys, f"data.loader={loader}")
        assert data.grid.lat.tolist() == lat and data.grid.lon.tolist() == lon
        chosen = data.select(np.arange(len(data.samples)) == 5)
        found = chosen.samples.load(torch.tensor([0]))
        expected = whole["t2m"].isel(time=5).sel(lat=lat, lon=lon)
        np.testing.assert_array_equal(found[0, 0], expected)


def test_mistakes_in_how_to_read(refused, prepared, torus, tmp_path):
    def mistake(match, **others):
        keys = {**SPECTRUM, "data__path": prepared, "out": tmp_path / "run", **others}
        refused(match, "train", **keys)

    mistake("data.loader=tape must be one of auto, memory, dali, torch", data__loader="tape")
    mistake("data.region=[0, 1]: expected [south", data__region="[0,1]")
    mistake("holds no grid", data__region="[0,1,0,1]")
    mistake("does not fit into the grid of 6x8", data__crop="[7,4]")
    mistake("needs domain=box", data__crop="[4,4]", domain="sphere")
    mistake("data.crop=4: expected [rows, columns]", data__crop=4)
    mistake("data.start=soon is no date", data__start="soon")
    mistake(
        "data.validation.samples=0 must be a whole number, at least 1", data__validation__samples=0
    )
    mistake("data.workers=0", data__workers=0, data__loader="torch")
    mistake("needs all samples in memory", prior__kind="hybrid", data__loader="torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_what_the_machine_cannot_do_is_refused_before_the_data_are_opened(refused, tmp_path):
    keys = {**SPECTRUM, "data__path": tmp_path / "nowhere", "out": tmp_path / "run"}
    refused("trainer.cuda_graph=true needs a GPU", "train", **keys, trainer__cuda_graph="true")


def test_mistakes(refused, torus, region, tmp_path):
    def mistake(match, keys, **others):
        refused(match, "train", **{**keys, "out": tmp_path / "run", **others})

    mistake("nowhere.nc", TORUS, data__path=tmp_path / "nowhere.nc")
    mistake("trainer.precision=fp8 must be", TORUS, data__path=torus, trainer__precision="fp8")
    mistake("no samples to train on", REGION, data__path=region, data__start="2030-01-01")
    mistake("prior.kind=magic must be one of", TORUS, data__path=torus, prior__kind="magic")
    mistake("latitude-longitude region", TORUS, data__path=torus, prior__kind="hybrid")


@pytest.mark.parametrize("loader", ["memory", "torch"])
def test_windows(ddo, torus, tmp_path, loader):
    keys = TORUS | {"experiment": "kolmogorov_window", "data__frames": 3, "data__loader": loader}
    result = ddo("train", out=tmp_path / "run", data__path=torus, data__workers=1, **keys)
    assert result.status == 0, result.err
    package = Package.load(tmp_path / "run" / "package")
    assert package.task.frames == 3 and package.operator.channels == 3
    assert package.interval == pytest.approx(0.2)
    samples = Samples.of(open_dataset(torus))
    training = samples.select(samples.trajectory < samples.trajectory.max())
    x = package.normalization.normalize(training.fields)
    frames = training.windows(3)
    z = package.operator.noise.whiten(x[frames][:, :, 0].double())
    label = package.operator.basis.symmetry()
    k = label == label[9]
    found = package.operator.linear.prior.covariance[9]
    torch.testing.assert_close(found.trace(), 3 * z[..., k].square().mean(), rtol=1e-4, atol=0)
    step = (z[:, 1:] - z[:, :-1])[..., k].square().mean()
    torch.testing.assert_close(found[0, 0] + found[1, 1] - 2 * found[0, 1], step, rtol=0.01, atol=0)


def test_windows_stay_within_a_run_and_its_steps(torus):
    samples = Samples.of(open_dataset(torus))
    frames = samples.windows(3)
    runs, count = len(np.unique(samples.trajectory)), len(samples.times)
    assert len(frames) == count - 2 * runs
    assert (np.diff(samples.trajectory[frames]) == 0).all()
    gap = samples.select(np.arange(count) != 1)  # the first run lacks its second frame
    assert len(gap.windows(3)) == len(frames) - 2
    with pytest.raises(InputError, match="hold no 100 frames in a row"):
        samples.windows(100)


def test_super_resolution(ddo, torus, tmp_path):
    keys = TORUS | {"experiment": "kolmogorov_superres", "coarse__factor": 1.1, "coarse__reach": 1}
    result = ddo("train", out=tmp_path / "run", data__path=torus, **keys)
    assert result.status == 0, result.err
    package = Package.load(tmp_path / "run" / "package")
    operator, task = package.operator, package.task
    assert task.span == 3 and operator.condition_channels == 3
    with pytest.raises(InputError, match="coarse view"):
        package.conditions(np.array(["2020-01-01T00"], "datetime64[h]"))
    # 7 x 7 points determine more than half of 8 x 8; the prior is that of the rest.
    names = [f"{k.replace('__', '.')}={v}" for k, v in keys.items()]
    data, _ = opened(*names, f"data.path={torus}")
    x, condition = data.tensors(operator.basis, None, "cpu")
    left = (x - operator.conditional_mean(condition, x)).square().mean()
    assert float(left) < 0.5 * float(x.square().mean())
    modes = operator.basis.analyze(x - operator.conditional_mean(condition, x))
    variance = operator.linear.prior.variance
    assert 0.5 < float(modes.square().mean() / variance.mean()) < 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"coarse": "null"}, "belongs to condition=coarse"),
        ({"coarse__factor": 0.5}, "must be a number from 1 up"),
        ({"coarse__factor": 8, "coarse__reach": 1}, "choose a smaller one"),
        ({"coarse__factor": 2, "coarse__reach": 50}, "frames in a row"),
        (
            {"coarse__factor": 2, "coarse__reach": 1, "prior__kind": "none"},
            "prior.kind=none must be one of",
        ),
        ({"coarse__factor": 2, "coarse__reach": 1, "prior__folds": 2}, "operator.regression=false"),
        ({"data__frames": 0}, "frames=0"),
        ({"condition": "hour_of_day", "coarse": "null"}, "needs a condition that is a field"),
    ],
)
def test_a_condition_that_cannot_be_is_refused(ddo, torus, tmp_path, keys, message):
    keys = TORUS | {"experiment": "kolmogorov_superres"} | keys
    result = ddo("train", out=tmp_path / "run", data__path=torus, **keys)
    assert result.status == 2 and message in result.err, result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("methods", "domain", "expected", "warned"),
    [
        (("area: mean", "lat: lon: mean"), "torus", True, False),
        (("area: mean", "time: mean"), "box", False, True),
        (("", ""), "box", False, False),
        (("area: mean", "area: mean"), "sphere", False, True),
    ],
)
def test_attributes_say_whether_values_are_cell_means(methods, domain, expected, warned, caplog):
    names = dict(zip("ab", methods, strict=True))
    dataset = xr.Dataset({k: ("x", [0.0], {"cell_methods": v}) for k, v in names.items()})
    assert cell_means(dataset, domain) == expected
    assert ("values at points" in caplog.text) == warned
