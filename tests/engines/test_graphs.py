# SPDX-License-Identifier: Apache-2.0
"""Both graphs of every kind of operator, and of every shipped package, against torch."""

import json
from importlib.resources import files

import numpy as np
import onnx
import pytest
import torch

from ddo_modulus.diffusion.package import SHIPPED
from ddo_modulus.engines.folder import export, probes, relative_error
from ddo_modulus.engines.graph import to_onnx, unsupported
from ddo_modulus.engines.ort import ONNXRuntimeEngine
from ddo_modulus.engines.trace import trace
from ddo_modulus.errors import InputError

SMALL = ["box", "window", "coarse", "sphere"]
SHIPPED_NAMES = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())
TABLE = json.loads(files("ddo_modulus.engines").joinpath("tensorrt_operators.json").read_text())


@pytest.mark.parametrize("name", [*SMALL, *SHIPPED_NAMES])
def test_graphs_agree_with_torch_for_any_batch(name, exported, vjp):
    one = exported(name)
    for batch in (1, 7):
        x, sigma, v, *given = probes(one.package, one.package.grid.shape, batch, seed=batch)
        if batch == 1:
            sigma[:] = 0.3
        condition = given[0] if given else None
        expected = vjp(one.package.operator, x, sigma, v, condition)
        found = one.engine.vjp(x, sigma, v, condition)
        pairs = [*zip(found, expected, strict=True)]
        pairs.append((one.engine(x, sigma, condition), expected[0]))
        for result, right in pairs:
            assert relative_error(result, right) < (1e-4 if name in SHIPPED_NAMES else 1e-5)


@pytest.mark.parametrize("name", [*SMALL, *SHIPPED_NAMES])
def test_graphs_are_what_tensorrt_reads(name, exported):
    one = exported(name)
    constants = {"denoiser": 0, "denoiser_vjp": 0}
    for graph in constants:
        model = onnx.load(one.folder / f"{graph}.onnx")
        onnx.checker.check_model(str(one.folder / f"{graph}.onnx"), full_check=True)
        assert {node.op_type for node in model.graph.node} <= set(TABLE["operators"])
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert model.opset_import[0].version >= 18
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
        contents = [(i.data_type, tuple(i.dims), i.raw_data) for i in model.graph.initializer]
        assert len(set(contents)) == len(contents)
        constants[graph] = sum(len(raw) for *_, raw in contents)
        described = {p.key: json.loads(p.value) for p in model.metadata_props}
        assert described["sigma"] == list(one.contract.sigma)
        assert described["tolerance"]["product"] < 1e-4
    # The derivative needs the constants of the denoiser, and hardly any of its own.
    assert constants["denoiser_vjp"] < 1.05 * constants["denoiser"] + 1e5


def test_noise_levels_and_conditions_are_not_baked_in(exported):
    """Levels above and below the one where the network fades out, in one batch and alone."""
    one = exported("box")
    operator, engine = one.package.operator, one.engine
    x, _, _, condition = probes(one.package, (6, 8), 4)
    sigma = torch.tensor([0.05, 0.5, 4.0, 50.0])
    together = engine(x, sigma, condition)
    for i in range(4):
        one_of = slice(i, i + 1)
        alone = operator(x[one_of], sigma[one_of], condition[one_of])
        assert relative_error(engine(x[one_of], sigma[one_of], condition[one_of]), alone) < 1e-5
        assert relative_error(together[one_of], alone) < 1e-5
    linear = operator.linear(x, sigma)
    assert relative_error(together[:1], linear[:1]) > 1e-3
    assert relative_error(together[3:], linear[3:]) < 1e-5
    assert relative_error(engine(x, sigma, -condition)[:1], together[:1]) > 1e-3


def test_a_finer_grid(built, vjp, tmp_path):
    """Where the network sees the training band, and the scales beyond it are linear."""
    package = built("box")
    contract = export(package, tmp_path / "e", shape=(9, 11))
    engine = ONNXRuntimeEngine(package, tmp_path / "e", contract, 4)
    x, sigma, v, condition = probes(package, (9, 11), 6)
    expected = vjp(package.operator, x, sigma, v, condition)
    for found, right in zip(engine.vjp(x, sigma, v, condition), expected, strict=True):
        assert relative_error(found, right) < 1e-5
    assert engine.noise.shape == engine.linear.noise.shape == (9, 11)


def test_fp16(built, tmp_path):
    """On a coarser grid, with constants in a file of their own.

    Cotangents from 1e-6 to 1e3, at noise levels from least to largest, lose nothing.
    """
    package = built("coarse")
    contract = export(package, tmp_path / "e", precision="fp16", shape=(5, 6), external=True)
    assert "onnxruntime" in contract.measured_with
    assert 1e-6 < contract.tolerance["denoised"] < 5e-3
    assert 1e-5 < contract.tolerance["product"] < 5e-3
    assert (tmp_path / "e" / "denoiser.onnx.data").is_file()
    model = onnx.load(tmp_path / "e" / "denoiser_vjp.onnx")
    types = {i.data_type for i in model.graph.initializer if len(i.dims) == 2}
    assert types == {onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT}
    engine = ONNXRuntimeEngine(package, tmp_path / "e", contract, 8)
    x, sigma, v, condition = probes(package, (5, 6), 3)
    sigma[:], v = 0.3, v / v.abs().amax((1, 2, 3), keepdim=True)
    expected = engine.vjp(x, sigma, v, condition)[1]
    for size in (1e-9, 1e9):  # the derivative is linear, also where fp16 ends
        assert relative_error(engine.vjp(x, sigma, size * v, condition)[1], size * expected) < 1e-3
    kept = [i for i in model.graph.initializer if 30 in i.dims]  # whitening and regression
    assert kept and {i.data_type for i in kept} == {onnx.TensorProto.FLOAT}


def test_bf16(built, vjp):
    """Before the exporter, which is the same for all: no provider of a CPU computes in bf16."""
    package = built("coarse")
    traced = trace(package.operator, (6, 8), (3, 6, 8), "bf16")
    types = {b.dtype for b in traced.module.buffers() if b.ndim == 2}
    assert {torch.bfloat16, torch.float32} <= types
    x, sigma, v, condition = probes(package, (6, 8))
    expected = vjp(package.operator, x, sigma, v, condition)
    for found, right in zip(traced.function(x, sigma, v, condition), expected, strict=True):
        assert 1e-5 < relative_error(found, right) < 0.1


def test_what_tensorrt_has_not_is_refused(built, tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return x * (1 + (x.detach().to(torch.int32) & 1).to(x.dtype))

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd()

        def forward(self, x, sigma):
            return self.odd(x[:, :1])

    package = built("sphere")
    package.operator.network = Network()
    with pytest.raises(InputError, match=r"BitwiseAnd \(of network.odd\)"):
        export(package, tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_restrictions_of_the_list():
    """Types and variants that TensorRT's list leaves out, on a graph made by hand."""
    import onnx_ir as ir

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape([2]))
    nodes = [
        ir.node("Add", [x, x]),
        ir.node("ScatterND", [x, x, x], {"reduction": "add"}),
        ir.node("LayerNormalization", [x, x], num_outputs=2),
        ir.node("Sign", [x], domain="made.up"),
    ]
    graph = ir.Graph([x], [], nodes=nodes, opset_imports={"": 25})

    class Nobody:
        def makers(self, target):
            return []

    found = " ".join(unsupported(ir.Model(graph, ir_version=10), Nobody()))
    for what in (
        "Add in double",
        "ScatterND with a reduction",
        "more than one",
        "Sign",
        "opset 25",
    ):
        assert what in found


@pytest.mark.parametrize(
    "mixed",
    [lambda x: x - x.mean(0, keepdim=True), lambda x: x * len(x), lambda x: x.flip(0) + len(x)],
)
def test_dependence_on_the_batch_is_refused(mixed, built):
    """An operator that knows how many states there are is no denoiser, and no graph."""

    class Network(torch.nn.Module):
        def forward(self, x, sigma):
            return mixed(x[:, :1])

    operator = built("sphere").operator
    operator.network = Network()
    with pytest.raises(InputError, match="number of states computed together"):
        to_onnx(trace(operator, operator.basis.shape))


def test_traces_leave_the_operator_as_it_was(built):
    package = built("sphere")
    before = {k: t.clone() for k, t in package.operator.state_dict().items()}
    package.operator.double().train()
    trace(package.operator, (7, 12))
    assert package.operator.training and package.operator.prior_variance.dtype == torch.float64
    assert not package.operator.network._forward_hooks
    for key, tensor in package.operator.state_dict().items():
        np.testing.assert_allclose(tensor, before[key])
