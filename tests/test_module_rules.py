# SPDX-License-Identifier: Apache-2.0
"""What PhysicsNeMo asks of a model, and what ours say of themselves in their ``ModelMetaData``."""

import io
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from physicsnemo.core.module import Module
from physicsnemo.core.registry import ModelRegistry

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.nn.operator import NeuralOperator

REFERENCE = Path(__file__).parent / "reference"
NETWORK = {"widths": [8, 8], "depths": [1, 1], "modes": [5, 3], "embedding": 8}
SHAPES = {"torus": [8, 10], "box": [7, 10], "sphere": [9, 16]}


def fill(module):
    """Weights by a formula, so that no version of a random generator matters."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            values = 0.3 * torch.sin(1.7 * index + number)
            parameter.copy_(values.view_as(parameter))
    return module.eval()


def network(domain):
    basis = {"domain": domain, "shape": SHAPES[domain]}
    return fill(NeuralOperator(3, 2, basis, **NETWORK, coordinates=[2, 2]))


def denoiser(domain):
    noise = {"length_scale": 0.2, "smoothness": 0.5}
    operator = DiffusionOperator(
        SHAPES[domain], 3, domain, noise=noise, condition_channels=2, network=NETWORK
    )
    operator.set_prior(GaussianField(operator.basis, Matern(0.4, 1.5), 3))
    return fill(operator)


BUILD = {"network": network, "denoiser": denoiser}


def arguments(model, batch=2):
    """Inputs by a formula."""
    shape = (batch, 3, *model.basis.shape)
    x = torch.sin(torch.arange(np.prod(shape), dtype=torch.float64)).float().view(shape)
    sigma = torch.linspace(0.1, 3.0, batch)
    if isinstance(model, NeuralOperator):
        return x, sigma
    return x, sigma, torch.linspace(-1.0, 1.0, 2 * batch).view(batch, 2)


@pytest.fixture(params=[f"{kind}-{domain}" for kind in BUILD for domain in SHAPES])
def model(request):
    kind, domain = request.param.split("-")
    return BUILD[kind](domain)


def test_classes_are_found_by_their_bare_names(model):
    assert ModelRegistry().factory(type(model).__name__) is type(model)


def test_it_is_built_from_what_json_can_hold(model):
    stored = json.loads(json.dumps(model._args))
    again = Module.instantiate(stored)
    assert type(again) is type(model)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_outputs_are_those_of_the_reference(model, request):
    """To renew after a change that is meant: delete the file and run the test twice."""
    name = request.node.callspec.params["model"]
    file = REFERENCE / f"{name}.npz"
    with torch.no_grad():
        found = model(*arguments(model)).numpy()
    if not file.exists():
        REFERENCE.mkdir(exist_ok=True)
        np.savez_compressed(file, output=found)
        pytest.fail(f"no reference; wrote {file.name}: look at it and commit it")
    np.testing.assert_allclose(found, np.load(file)["output"], rtol=1e-4, atol=1e-5)


def test_mdlus_round_trip(model, tmp_path):
    model.save(str(tmp_path / "model.mdlus"))
    again = Module.from_checkpoint(str(tmp_path / "model.mdlus")).eval()
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(*arguments(model)), model(*arguments(model)))


def test_half_precision_as_declared(model):
    assert model.meta.amp_cpu and model.meta.amp_gpu and model.meta.bf16
    with torch.no_grad():
        exact = model(*arguments(model))
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                rough = model(*arguments(model)).float()
            assert (rough - exact).norm() < 0.05 * exact.norm()
            assert not torch.equal(rough, exact)  # it did run in half precision


def test_it_compiles_without_a_break(model):
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = compiled(*arguments(model))  # before any other call
        torch.testing.assert_close(found, model(*arguments(model)))


def test_rounded_products_are_no_obstacle(model, monkeypatch):
    """What happens on a GPU in half precision: to function transforms and to a compiler."""
    x, *rest = arguments(model, 1)

    def tangent():
        with torch.autocast("cpu", torch.bfloat16):
            return torch.func.jvp(lambda x: model(x, *rest), (x,), (torch.cos(x),))[1]

    expected = tangent()
    monkeypatch.setattr(
        "ddo_modulus.fields.basis._rounding_gains", lambda _: not torch.compiler.is_compiling()
    )
    torch.testing.assert_close(tangent(), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x, *rest), model(x, *rest), rtol=2e-2, atol=2e-2)


def test_derivatives_as_declared(model):
    """Automatic differentiation and function transforms, against a finite difference."""
    assert model.meta.auto_grad and model.meta.func_torch
    model = model.double()
    x, *rest = (a.double() for a in arguments(model, 1))
    v = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)
    value, tangent = torch.func.jvp(lambda x: model(x, *rest), (x,), (v,))
    step = 1e-5
    difference = (model(x + step * v, *rest) - model(x - step * v, *rest)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-7)
    w = torch.sin(torch.arange(value.numel(), dtype=torch.float64) ** 2).view_as(value)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, *rest), x, w)
    torch.testing.assert_close((gradient * v).sum(), (tangent * w).sum())


def test_onnx_as_declared(model, tmp_path):
    assert model.meta.onnx_cpu and model.meta.onnx_gpu
    inputs = arguments(model)
    with torch.no_grad():
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
        expected = model(*inputs)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feeds = dict(zip(names, (a.numpy() for a in inputs), strict=True))
    found = session.run(None, feeds)[0]
    error = np.linalg.norm(found - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert error < 1e-4


def test_what_is_not_declared(model):
    """Flags that would promise what nobody has shown (graphs: tests/training/test_gpu.py)."""
    assert model.meta.cuda_graphs and not (model.meta.jit or model.meta.trt)
