# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ddo_modulus.cli import compose
from ddo_modulus.commands.train import _within as within
from ddo_modulus.commands.train import fit_normalization, fit_prior, load_samples
from ddo_modulus.data.simulators import KolmogorovFlow
from ddo_modulus.data.source import open_dataset
from ddo_modulus.denoiser import GaussianDenoiser
from ddo_modulus.grid import LatLonGrid
from ddo_modulus.package import Package

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


@pytest.fixture(scope="module")
def torus(tmp_path_factory):
    flow = KolmogorovFlow(
        reynolds=50.0,
        forcing_wavenumber=2,
        resolution=16,
        output_resolution=8,
        spin_up=0.4,
        dt=0.02,
    )
    frames = torch.cat(list(flow.simulate(4, 5, generator=torch.Generator().manual_seed(0))))
    path = tmp_path_factory.mktemp("torus") / "flow.nc"
    flow.to_dataset(frames, seed=0).to_netcdf(path)
    return path


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
    assert package.channels == ("vorticity",) and package.condition == "none"
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
    assert isinstance(package.grid, LatLonGrid) and package.condition == "hour_of_day"
    assert package.units == ("K",) and len(package.operator.eof_index) == 48
    assert package.normalization.per_hour
    # The linear part and the climatology come from all days up to data.end.
    config = compose(
        "train",
        [f"{k.replace('__', '.')}={v}" for k, v in REGION.items()] + ["out=x", "data.path=x"],
    )
    refit = refitted(package, config, open_dataset(region))
    assert refit < 1e-3
    times = np.array(["2019-03-06T12"], "datetime64[h]")
    x = package.operator.noise.sample(1)
    clean = package.operator(x, torch.ones(1), package.conditions(times))
    assert torch.isfinite(clean).all()


def refitted(package, config, dataset):
    """Largest relative difference of a package's linear part from a refit of its record."""
    samples, _ = load_samples(dataset)
    samples = samples.select(within(samples, config.data))
    normalization = fit_normalization(list(package.channels), samples, config.normalization)
    torch.testing.assert_close(normalization.mean, package.normalization.mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(normalization.std, package.normalization.std, rtol=1e-4, atol=0)
    operator = package.operator
    prior = fit_prior(operator, samples, normalization, package.grid, config.prior)
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
    config = compose("train", ["experiment=uk_t2m", "out=x", "data.path=x"])
    dataset = open_dataset(shared_data / "era5-2mt-2019-03-uk.grib", config.data.variables)
    error = refitted(Package.load("uk_t2m"), config, dataset)
    assert error < 2e-3


def test_mistakes(refused, torus, region, tmp_path):
    def mistake(match, keys, **others):
        refused(match, "train", **{**keys, "out": tmp_path / "run", **others})

    mistake("nowhere.nc", TORUS, data__path=tmp_path / "nowhere.nc")
    mistake("precision must be", TORUS, data__path=torus, trainer__precision="fp8")
    mistake("no samples to train on", REGION, data__path=region, data__start="2030-01-01")
    mistake("unknown prior.kind 'magic'", TORUS, data__path=torus, prior__kind="magic")
    mistake("latitude-longitude region", TORUS, data__path=torus, prior__kind="hybrid")
