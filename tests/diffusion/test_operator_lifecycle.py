# SPDX-License-Identifier: Apache-2.0
"""Operators that are pickled, copied, compiled, exported and read from old checkpoints."""

import copy
import io
import json
import pickle
import warnings
import zipfile

import numpy as np
import onnxruntime
import pytest
import torch
from physicsnemo.core.module import Module

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import SHIPPED, Package
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, Matern
from ddo_modulus.fields.refinement import Refinement
from ddo_modulus.nn.operator import NeuralOperator

NETWORK = {"widths": [6, 8], "depths": [1, 1], "modes": [5, 3], "embedding": 8}
PLACES = {"coordinates": [2, 1], "static_channels": 1}
NOISE = {"length_scale": 0.3, "smoothness": 0.5}
KINDS = ["torus", "box", "sphere", "eofs", "coupled", "regression", "condition"]
SHIPPED_NAMES = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())
kinds = pytest.mark.parametrize("kind", KINDS)


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).double()


def build(kind):
    """An operator of each kind with weights and a prior of its own, which has not been called."""
    domain = kind if kind in ("box", "sphere") else "torus"
    shape = {"box": [7, 6], "sphere": [7, 12]}.get(kind, [6, 8])
    options = {
        "torus": {"channels": 2, "network": NETWORK | PLACES},
        "eofs": {"eof_modes": 9},
        "coupled": {"channels": 3, "coupled": True, "network_sigma": 5.0},
        "regression": {"condition_channels": 2, "regression": True},
        "condition": {"condition_channels": 2, "refinement": {"cell_means": True}},
    }.get(kind, {})
    torch.manual_seed(0)
    made = DiffusionOperator(
        shape, domain=domain, noise=NOISE, **({"network": NETWORK} | options)
    ).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    field = GaussianField(made.basis, Matern(0.5, 1.5), made.channels)
    if kind == "eofs":
        root, remainder = random(9, 9), (field.variance / made.noise.variance).flatten()
        field = EOFField.from_covariance(
            made.noise, root @ root.T + torch.eye(9), torch.arange(0, 45, 5), remainder
        )
    if kind == "coupled":
        root = random(made.basis.size, 3, 3)
        field = CoupledField(made.noise, root @ root.mT / 3 + 0.1 * torch.eye(3))
    made.set_prior(field)
    if kind == "regression":
        made.set_regression(random(1, 2, made.basis.size).float())
    return made.requires_grad_(False)


def arguments(operator, batch=2, factor=1):
    shape = [factor * n for n in operator.basis.shape]
    x = random(batch, operator.channels, *shape, seed=1).float()
    sigma = torch.linspace(0.2, 2.0, batch)
    if not operator.condition_channels:
        return x, sigma
    size = shape if operator.regression is not None else []
    return x, sigma, random(batch, operator.condition_channels, *size, seed=2).float()


def saved(operator):
    """By ``torch.save``."""
    file = io.BytesIO()
    torch.save(operator, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def fresh(operator, tmp_path):
    """From a checkpoint, and never called."""
    operator.save(str(tmp_path / "x.mdlus"))
    again = DiffusionOperator.from_checkpoint(str(tmp_path / "x.mdlus"))
    return again.eval().requires_grad_(False)


# ---- copies -------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize(
    "clone",
    [saved, copy.deepcopy, lambda operator: pickle.loads(pickle.dumps(operator))],
    ids=["save", "deepcopy", "pickle"],
)
def test_a_copy_is_the_same_operator_and_stands_alone(kind, called, clone):
    operator = build(kind)
    inputs = arguments(operator)
    if called:
        operator(*inputs)
    other = clone(operator)
    expected = operator(*inputs)
    assert torch.equal(other(*inputs), expected)
    assert not other.training and other._args == operator._args
    other.prior_variance.add_(1.0)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(other.state_dict())
    assert not torch.allclose(other(*inputs), expected, atol=1e-3)
    assert torch.equal(operator(*inputs), expected)


def test_a_pickle_holds_no_constants():
    operator = build("eofs")
    before = len(pickle.dumps(operator))
    for factor in (1, 2):
        operator(*arguments(operator, factor=factor))
    assert len(pickle.dumps(operator)) == before


def test_a_pickled_network_is_the_same():
    network = build("torus").network
    x, sigma = random(2, 6, 6, 8).float(), torch.ones(2)
    expected = network(x, sigma)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x, sigma), expected)
    assert torch.equal(copy.deepcopy(network)(x, sigma), expected)


def test_a_copy_keeps_the_linear_part_that_was_work_to_find():
    operator = build("eofs")
    assert copy.deepcopy(operator).linear is operator.linear


def test_a_new_linear_part_is_the_noise_with_and_without_eofs():
    plain = DiffusionOperator([7, 6], 1, "box", noise=NOISE, network=NETWORK)
    mixed = DiffusionOperator([7, 6], 1, "box", noise=NOISE, network=NETWORK, eof_modes=9)
    x, sigma = random(2, 1, 7, 6).float(), torch.tensor([0.3, 2.0])
    expected = x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
    for operator in (plain, mixed):
        torch.testing.assert_close(operator.linear(x, sigma), expected)


# ---- before the first call ----------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("factor", [1, 2], ids=["training grid", "finer grid"])
def test_it_compiles_before_its_first_call(kind, factor, tmp_path):
    operator = build(kind)
    inputs = arguments(operator, factor=factor)
    torch._dynamo.reset()
    compiled = torch.compile(fresh(operator, tmp_path), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), operator(*inputs))


@kinds
@pytest.mark.parametrize("strict", [False, True], ids=["fake tensors", "strict"])
def test_it_exports_before_its_first_call(kind, strict, tmp_path):
    operator = build(kind)
    inputs = arguments(operator)
    program = torch.export.export(fresh(operator, tmp_path), inputs, strict=strict)
    torch.testing.assert_close(program.module()(*inputs), operator(*inputs))


@pytest.mark.parametrize("kind", ["torus", "eofs", "sphere"])
def test_it_exports_to_onnx_before_its_first_call(kind, tmp_path):
    operator = build(kind)
    inputs = arguments(operator)
    program = torch.onnx.export(fresh(operator, tmp_path), inputs, dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    found = session.run(None, dict(zip(names, (a.numpy() for a in inputs), strict=True)))[0]
    expected = operator(*inputs).numpy()
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_compiled_code_follows_a_new_prior():
    operator = build("torus")
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    inputs = arguments(operator)
    before = compiled(*inputs)
    operator.set_prior(GaussianField(operator.basis, Matern(0.1, 0.5), 2))
    torch.testing.assert_close(compiled(*inputs), operator(*inputs))
    assert not torch.allclose(compiled(*inputs), before, atol=1e-2)


@pytest.mark.parametrize("name", ["uk_t2m", "kolmogorov64"])  # half a minute for each of the others
def test_shipped_packages_compile_and_export_as_they_are_loaded(name):
    expected = Package.load(name).operator
    inputs = arguments(expected, 1)
    result = expected(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(Package.load(name).operator, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), result, rtol=1e-4, atol=1e-4)
    program = torch.export.export(Package.load(name).operator, inputs)
    torch.testing.assert_close(program.module()(*inputs), result, rtol=1e-4, atol=1e-4)


# ---- checkpoints of before ----------------------------------------------------------------------


def rewritten(path, version, change):
    """Give a checkpoint another version and other arguments."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for name, edit in (
        ("args.json", change),
        ("metadata.json", lambda m: m | {"mdlus_file_version": version}),
    ):
        files[name] = json.dumps(edit(json.loads(files[name]))).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_shipped_packages_load_in_silence(name):
    """Their arguments are of an older version, and name a module that no longer exists."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = Package.load(name).operator
    with zipfile.ZipFile(SHIPPED / name / "operator.mdlus") as archive:
        args = json.loads(archive.read("args.json"))["__args__"]
        version = json.loads(archive.read("metadata.json"))["mdlus_file_version"]
    assert version == "0.1.0" != DiffusionOperator.__model_checkpoint_version__
    tail = args.get("tail")
    assert operator.refinement == Refinement(
        args.get("cell_means", False), None if tail is None else tuple(map(tuple, tail))
    )
    assert (operator.coupling is not None) == args.get("coupled", False)
    assert len(operator.eof_index) == args["eof_modes"]


def test_older_arguments_are_converted_by_the_host_as_well(tmp_path):
    path = SHIPPED / "kolmogorov64" / "operator.mdlus"
    with pytest.warns(UserWarning, match="arguments of checkpoint version 0.1.0"):
        operator = Module.from_checkpoint(str(path))
    assert type(operator) is DiffusionOperator and operator.refinement.cell_means
    operator.save(str(tmp_path / "x.mdlus"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Module.from_checkpoint(str(tmp_path / "x.mdlus"))
    assert again.refinement == operator.refinement


def test_checkpoints_of_networks_of_before(tmp_path):
    basis = {"domain": "box", "shape": [7, 6], "lengths": [1.0, 2.0]}
    network = NeuralOperator(3, 1, basis, **NETWORK, **PLACES).eval()
    torch.nn.init.normal_(network.head.project.weight)
    path = str(tmp_path / "x.mdlus")
    network.save(path)

    def change(args):
        inner = args["__args__"]
        return args | {"__args__": {k: v for k, v in inner.items() if k != "basis"} | basis}

    rewritten(path, "0.2.0", change)
    with pytest.warns(UserWarning, match="arguments of checkpoint version 0.2.0"):
        again = Module.from_checkpoint(path).eval()
    x, sigma = random(2, 3, 7, 6).float(), torch.ones(2)
    assert torch.equal(again(x, sigma), network(x, sigma))
    assert again.basis.lengths == (1.0, 2.0)


def test_checkpoints_of_an_unknown_version(tmp_path):
    path = str(tmp_path / "x.mdlus")
    build("box").save(path)
    rewritten(path, "7.0.0", lambda args: args)
    with pytest.raises(OSError, match="version 7.0.0 is not compatible"):
        DiffusionOperator.from_checkpoint(path)
