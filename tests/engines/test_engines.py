# SPDX-License-Identifier: Apache-2.0
"""Engines in the place of denoisers: in posteriors, samplers and whole analyses."""

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from ddo_modulus.diffusion.package import SHIPPED
from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.engines import ENGINES, EngineOptions, TorchEngine, open_engine
from ddo_modulus.engines.folder import Contract, export, find, fingerprint, probes, relative_error
from ddo_modulus.engines.ort import CPU, CUDA, TENSORRT, choose_providers, provider_options
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import BoxGrid
from ddo_modulus.inference.assimilate import assimilate
from ddo_modulus.observations import Observations, PointOperator
from ddo_modulus.observations.table import ObservationTable
from ddo_modulus.posterior import Inflated, MomentMatching

SHIPPED_NAMES = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())


def observe(grid, channels=1, stations=9, seed=0):
    random = np.random.default_rng(seed)
    lat = random.uniform(grid.lat.min(), grid.lat.max(), stations)
    lon = random.uniform(grid.lon.min(), grid.lon.max(), stations)
    operator = PointOperator(grid, lat, lon, random.integers(0, channels, stations))
    values = torch.from_numpy(random.standard_normal(stations))
    return Observations(operator, values, torch.full((stations,), 0.05).double())


# ---- closed form --------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
def test_guided_sampling_in_an_engine_is_optimal_interpolation(
    covariance, exported, dense, affine_law
):
    """Mean and covariance of all samples, against dense matrices."""
    engine, grid = exported("linear").engine, exported("linear").package.grid
    size = (1, *grid.shape)
    observations = observe(grid)
    root = dense(lambda a: engine.linear.fields(a, mean=False), (grid.shape[0] * grid.shape[1],))
    prior = root @ torch.diag(engine.linear.variance[0]) @ root.T
    h = dense(observations.operator.increment, size)
    r = observations.error_covariance(h)[0]
    gain = torch.linalg.solve(h @ prior @ h.T + r, h @ prior).T
    mean, covariances = gain @ observations.values, prior - gain @ h @ prior
    posterior = MomentMatching(engine, observations, covariance=covariance)
    found, spread = affine_law(posterior, engine.noise, steps=32)
    scale = prior.diagonal().mean().sqrt()
    assert float((found - mean).square().mean().sqrt() / scale) < 0.03
    ratio = (spread.diagonal() / covariances.diagonal()).sqrt()
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02)
    v = torch.randn(20, len(mean), generator=torch.Generator().manual_seed(3)).double()
    projections = ((v @ spread) * v).sum(1) / ((v @ covariances) * v).sum(1)
    assert 0.9 < float(projections.min()) < float(projections.max()) < 1.1


# ---- composed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(exported):
    """The same operator in torch and in ONNX Runtime, and arguments."""
    one = exported("coarse")
    return TorchEngine(one.package.operator), one.engine, probes(one.package, (6, 8), 6)


def test_engines_have_all_their_parts(engines):
    for engine in engines[:2]:
        assert isinstance(engine, Prior)
        assert engine.noise.shape == engine.linear.noise.shape == (6, 8)


def test_inflated(engines):
    torch_engine, engine, (x, sigma, v, condition) = engines
    factor = torch.tensor([0.5, 4.0])  # two analyses of three members
    right, pullback = Inflated(torch_engine, factor).value_and_pullback(x, sigma, condition)
    inflated = Inflated(engine, factor)
    found, product = inflated.value_and_pullback(x, sigma, condition)
    assert relative_error(found, right) < 1e-5
    assert relative_error(product(v), pullback(v)) < 1e-5
    assert relative_error(inflated(x, sigma, condition), right) < 1e-5


def test_automatic_differentiation_goes_through_an_engine(engines):
    torch_engine, engine, (x, sigma, v, condition) = engines

    def gradient(denoiser):
        given = x.clone().requires_grad_()
        (denoiser(2 * given, sigma, condition) * v).sum().backward()
        return given.grad

    assert relative_error(gradient(engine), gradient(torch_engine)) < 1e-5
    inner = [
        MomentMatching(e, observe(BoxGrid((6, 8))), covariance="linear")
        for e in (torch_engine, engine)
    ]
    assert relative_error(gradient(inner[1]), gradient(inner[0])) < 1e-4


def test_dtype_batch_and_place_are_those_of_the_caller(engines, exported):
    _, engine, (x, sigma, _, condition) = engines
    whole = engine(x.double(), sigma.double(), condition)
    assert whole.dtype == torch.float64
    small = type(engine)(exported("coarse").package, exported("coarse").folder, engine.contract, 4)
    torch.testing.assert_close(small(x, sigma, condition), whole.float(), rtol=1e-5, atol=1e-5)
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(engine(strided, sigma, condition), whole.float())
    shared = engine(x, sigma, condition[:1])
    torch.testing.assert_close(shared, engine(x, sigma, condition[:1].expand_as(condition)))


# ---- whole analyses -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_a_guided_analysis_of_a_shipped_package(name, exported):
    """The same members through ONNX Runtime and through torch."""
    one = exported(name)
    package = one.package
    observations = observe(package.grid, package.operator.channels, 12)
    condition = probes(package, package.grid.shape, 2)[3:] or (None,)
    members = []
    for denoiser in (package.operator, one.engine):
        posterior = MomentMatching(Inflated(denoiser, 1.3), observations)
        generator = torch.Generator().manual_seed(0)
        scheduler = package.scheduler()
        members.append(
            sample(posterior, scheduler, 2, steps=5, generator=generator, condition=condition[0])
        )
    assert relative_error(members[1], members[0]) < 1e-3


def test_a_table_of_observations(exported):
    """``assimilate`` with an engine, in physical units."""
    one = exported("box")
    rows = {"time": "2020-01-01T06", "observation": 0.5, "observation_error": 0.1, "variable": "a"}
    frame = pd.DataFrame([{**rows, "lat": 0.4, "lon": 0.6}, {**rows, "lat": 0.8, "lon": 0.2}])
    frame["time"] = pd.to_datetime(frame["time"])
    table = ObservationTable(frame, {})
    arguments = (one.package, table, ["2020-01-01T06"])
    right = assimilate(*arguments, ensemble=3).dataset
    found = assimilate(*arguments, ensemble=3, engine=one.engine).dataset
    for variable in ("a", "b"):
        difference = np.abs(found[variable] - right[variable]).max()
        assert float(difference) < 1e-3 * float(right[variable].std())


# ---- by name ------------------------------------------------------------------------------------


def test_torch_is_the_operator_itself(built, vjp):
    package = built("sphere")
    engine = open_engine("torch", package)
    x, sigma, v = probes(package, (7, 12), 2)
    assert torch.equal(engine(x, sigma), package.operator(x, sigma))
    torch.testing.assert_close(vjp(engine, x, sigma, v), vjp(package.operator, x, sigma, v))


def test_graphs_are_exported_once(exported, built, tmp_path, monkeypatch):
    """On the fly into the cache; found again, but not for another operator."""
    monkeypatch.setenv("DDO_ENGINES", str(tmp_path))
    made, lines = [], []

    def fake(package, folder, **options):
        made.append(options)
        shutil.copytree(exported("linear").folder, folder)

    monkeypatch.setattr("ddo_modulus.engines.folder.export", fake)
    package = built("linear")
    options = EngineOptions(report=lines.append)
    assert find(package, options)[0] == find(package, options)[0]
    assert len(made) == 1 and len(lines) == 1 and str(tmp_path) in lines[0]
    package.operator.prior_variance[0] += 1
    find(package, options)
    find(package, EngineOptions(shape=(8, 8), report=lines.append))
    assert len(made) == 3


def test_onnxruntime_by_name(exported):
    one, lines = exported("linear"), []
    engine = open_engine("onnxruntime", one.package, EngineOptions(one.folder, report=lines.append))
    assert engine.providers == [CPU] and CPU in lines[0]
    x, sigma, _ = probes(one.package, (5, 6), 2)
    torch.testing.assert_close(engine(x, sigma), one.engine(x, sigma))


def test_providers():
    assert choose_providers([CPU, CUDA, TENSORRT], "cuda") == [TENSORRT, CUDA, CPU]
    assert choose_providers([CPU, CUDA, TENSORRT], "cpu") == [CPU]
    with pytest.raises(InputError, match="onnxruntime-gpu"):
        choose_providers([CPU], "cuda")
    options = dict(provider_options([TENSORRT, CUDA, CPU], 1, 77, {"a": "b"}, SHIPPED))
    assert options[CUDA] == {"device_id": 1, "user_compute_stream": "77", "use_tf32": 0}
    assert options[TENSORRT]["a"] == "b" and options[CPU] == {}


def test_mistakes(exported, built, tmp_path, monkeypatch):
    one = exported("coarse")
    x, sigma, _, condition = probes(one.package, (6, 8), 2)
    with pytest.raises(InputError, match=r"resolution=\[8,8\]"):
        one.engine(torch.zeros(2, 1, 8, 8), sigma, condition)
    with pytest.raises(InputError, match=r"condition of \(3, 6, 8\), got None"):
        one.engine(x, sigma)
    with pytest.raises(InputError, match="unknown engine 'abacus'; choose one of torch"):
        open_engine("abacus", one.package)
    with pytest.raises(InputError, match="engines of another package"):
        find(built("linear"), EngineOptions(one.folder))
    with pytest.raises(InputError, match="for a grid of 6x8, not 9x9"):
        find(one.package, EngineOptions(one.folder, shape=(9, 9)))
    with pytest.raises(InputError, match="no exported engines"):
        find(one.package, EngineOptions(tmp_path))
    with pytest.raises(InputError, match="precision='fp8' must be one of fp32, fp16, bf16"):
        export(one.package, tmp_path / "e", precision="fp8")
    with pytest.raises(InputError, match="exists"):
        export(one.package, one.folder)
    with pytest.raises(InputError, match="holds no engines"):
        export(one.package, tmp_path, overwrite=True)
    for content, match in (("{", "damaged"), ('{"format": 7}', "of format 7"), ("{}", "damaged")):
        (tmp_path / "engine.json").write_text(content)
        with pytest.raises(InputError, match=match):
            Contract.read(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(InputError, match=r"pip install 'ddo-modulus\[export\]'"):
        export(one.package, tmp_path / "e")
    assert json.loads((one.folder / "engine.json").read_text())["package"] == fingerprint(
        one.package.operator
    )
    assert set(ENGINES) >= {"torch", "onnxruntime", "tensorrt"}
