# SPDX-License-Identifier: Apache-2.0
import copy
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tensors import relative

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.posterior_config import DEFAULTS, PosteriorConfig
from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.engines import EngineOptions, open_engine
from ddo_modulus.engines.compiled import CompiledEngine
from ddo_modulus.engines.speed import Twin, difference
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.inference.assimilate import assimilate
from ddo_modulus.nn.operator import NeuralOperator
from ddo_modulus.nn.stencil import LocalLinear
from ddo_modulus.observations.table import read_table
from ddo_modulus.posterior import MomentMatching

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def operator():
    operator = DiffusionOperator(
        [8, 10],
        1,
        "torus",
        noise={"length_scale": 0.1, "smoothness": 0.5},
        network={"widths": [8, 8], "depths": [1, 1], "modes": [5, 3]},
    )
    operator.set_prior(GaussianField(operator.basis, Matern(0.3, 1.0)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in operator.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return operator.eval().requires_grad_(False)


@pytest.fixture
def arguments():
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 4, 1, 8, 10, generator=generator)
    return x, torch.tensor([0.05, 0.3, 1.0, 5.0]), v


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("bf16", 2e-2), ("fp16", 3e-3)])
def test_values_and_derivatives(operator, arguments, precision, bound):
    """Within the rounding of the precision; and half precision does round."""
    x, sigma, v = arguments
    clean, pullback = operator.value_and_pullback(x, sigma)
    engine = CompiledEngine(operator, precision=precision, compile=False)
    assert isinstance(engine, Prior)
    assert engine.linear is engine.operator.linear and engine.noise.shape == (8, 10)
    own, own_pullback = engine.value_and_pullback(x, sigma)
    product = own_pullback(v)
    changes = [
        relative(engine(x, sigma), clean),
        relative(own, clean),
        relative(product, pullback(v)),
    ]
    assert all(change <= bound for change in changes)
    assert own.dtype == product.dtype == torch.float32
    if precision != "fp32":
        assert min(changes) > 1e-6


def test_autocast_of_the_trained_weights_gives_the_same(operator, arguments):
    """Weights are rounded ahead exactly where autocast would round them."""
    x, sigma, _ = arguments
    with torch.autocast("cpu", torch.bfloat16):
        expected = operator(x, sigma)
    found = CompiledEngine(operator, precision="bf16", compile=False)(x, sigma)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_operator_is_left_alone(operator):
    engine = CompiledEngine(operator, precision="bf16", compile=False)
    assert {p.dtype for p in operator.parameters()} == {torch.float32}
    weights = {type(m): getattr(m, "weight", None) for m in engine.operator.network.modules()}
    kinds = {kind: w.dtype for kind, w in weights.items() if w is not None}
    assert kinds[LocalLinear] == torch.float32 and kinds[torch.nn.Linear] == torch.bfloat16
    assert engine.operator.prior_variance.dtype == torch.float32


@pytest.fixture
def traced(monkeypatch):
    """Compilation without the compiler: traced, differentiated and run as it is."""
    original = NeuralOperator.compile
    asked = []

    def compile(self, mode=None):
        asked.append(mode)
        original(self, backend="aot_eager")

    torch._dynamo.reset()
    monkeypatch.setattr(NeuralOperator, "compile", compile)
    yield asked
    torch._dynamo.reset()


def test_a_compiled_network_goes_back_more_than_once(operator, arguments, traced):
    x, sigma, v = arguments
    clean, pullback = operator.value_and_pullback(x, sigma)
    found, product = CompiledEngine(operator, compile="max-autotune").value_and_pullback(x, sigma)
    assert traced == ["max-autotune"]
    torch.testing.assert_close(found, clean)
    for scale in (1.0, 2.0):
        torch.testing.assert_close(product(scale * v), pullback(scale * v))


def test_graphs_need_a_gpu(operator):
    with pytest.raises(InputError, match="CUDA graphs need a GPU, and the operator is on cpu"):
        CompiledEngine(operator, graphs=True)
    with pytest.raises(InputError, match="precision=fp8 must be one of fp32, bf16, fp16"):
        CompiledEngine(operator, precision="fp8")  # type: ignore[arg-type]
    engine = CompiledEngine(operator, compile=False)
    assert engine.precision == "fp32" and not engine.graphs
    assert engine.captured(engine) is engine


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
@pytest.mark.parametrize(
    ("precision", "fused", "bound"),
    [
        ("fp32", False, 1e-3),
        ("bf16", False, 0.05),
        ("bf16", True, 0.05),
        ("fp16", False, 0.02),
        ("fp16", True, 0.02),
    ],
)
def test_compiled_graphs_draw_what_eager_code_draws(operator, covariance, precision, fused, bound):
    torch._dynamo.reset()
    operator = copy.deepcopy(operator).to("cuda")
    config = replace(DEFAULTS, steps=8, sigma_min=0.02, covariance=covariance)
    scheduler = config.scheduler(operator.noise)
    twin = Twin.simulate(operator, scheduler, 2, 10, steps=8, device="cuda")
    expected = twin.ensemble(twin.posterior(operator, config), config, operator.noise, 16)
    engine = CompiledEngine(operator, precision=precision, fused=fused)
    assert engine.graphs
    posterior = engine.captured(twin.posterior(engine, config))
    for _ in range(2):
        found = twin.ensemble(posterior, config, engine.noise, 16)
        assert max(map(abs, difference(found, expected))) < bound
    assert posterior.failure is None


# ---- assimilation -------------------------------------------------------------------------------


@pytest.fixture
def table():
    rows = []
    for hour in (0, 6):
        for lat, lon in ((57.2, -5.1), (55.0, -2.0), (53.5, 0.3)):
            rows.append(
                {
                    "time": pd.Timestamp("2019-03-27") + pd.Timedelta(hours=hour),
                    "lat": lat,
                    "lon": lon,
                    "observation": 281.0 + lat - 55 + hour / 6,
                    "variable": "t2m",
                    "observation_error": 0.5,
                }
            )
    return read_table(pd.DataFrame(rows))


def analyse(package, table, engine=None):
    times = table.frame["time"].unique()
    config = PosteriorConfig(steps=4)
    result = assimilate(package, table, times, ensemble=4, posterior=config, engine=engine)
    return result.dataset["t2m"]


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_analyses(untrained, table, monkeypatch, precision, bound):
    """The same states; and the posterior is handed to the engine to be recorded."""
    package = untrained()
    generator = torch.Generator().manual_seed(0)
    for parameter in package.operator.network.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    monkeypatch.setattr(NeuralOperator, "compile", lambda self, mode=None: None)
    lines, recorded = [], []
    engine = open_engine(
        "compile", package, EngineOptions(precision=precision, report=lines.append)
    )
    monkeypatch.setattr(engine, "captured", lambda d: recorded.append(type(d)) or d)
    expected, found = analyse(package, table), analyse(package, table, engine)
    assert float(((found - expected) ** 2).mean()) ** 0.5 < bound  # K
    assert recorded == [MomentMatching]
    assert lines == ["engine=compile without a GPU: compiled code, but no CUDA graphs"]


@pytest.mark.gpu
@GPU
def test_analyses_on_a_gpu(untrained, table):
    torch._dynamo.reset()
    package = untrained()
    expected = analyse(package, table)
    package.operator.to("cuda")
    package = replace(package, normalization=package.normalization.to("cuda"))
    engine = open_engine("compile", package, EngineOptions(precision="bf16"))
    found = analyse(package, table, engine)
    assert float(((found - expected) ** 2).mean()) ** 0.5 < 0.1  # K
