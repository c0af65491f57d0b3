# SPDX-License-Identifier: Apache-2.0
"""When plans are built anew; and, where there is TensorRT and a GPU, the plans themselves."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ddo_modulus.diffusion.package import SHIPPED
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.engines import EngineOptions, open_engine
from ddo_modulus.engines.folder import Contract, export, probes, relative_error
from ddo_modulus.engines.trt import (
    PlanRecord,
    TensorRTEngine,
    digest,
    plan_path,
    read_record,
    require_tensorrt,
)
from ddo_modulus.errors import InputError
from ddo_modulus.posterior import MomentMatching

RECORD = PlanRecord("abc", "10.13.0", "NVIDIA H100 80GB HBM3", "9.0", 256)


def test_plans_are_built_anew_when_anything_differs(tmp_path):
    path = plan_path(tmp_path, "denoiser", RECORD)
    assert path == tmp_path / "plans" / "denoiser-nvidia-h100-80gb-hbm3-b256.plan"
    assert RECORD.outdated(read_record(path)) == "there is none yet"
    path.parent.mkdir()
    path.write_bytes(b"plan")
    assert read_record(path) is None  # a plan without a record
    written = json.dumps(RECORD.__dict__)
    path.with_suffix(".json").write_text(written)
    assert RECORD.outdated(read_record(path)) is None
    for change in (
        {"graph": "def"},
        {"tensorrt": "10.14.0"},
        {"gpu": "NVIDIA H200"},
        {"capability": "10.0"},
        {"batch": 8},
    ):
        ((name, value),) = change.items()
        reason = replace(RECORD, **change).outdated(read_record(path))
        assert reason == f"{name} is {value}, not {getattr(RECORD, name)}"
    path.with_suffix(".json").write_text(written[:20])
    assert read_record(path) is None
    path.with_suffix(".json").write_text(written)
    path.unlink()
    assert read_record(path) is None


def test_other_batches_and_devices_have_plans_of_their_own(tmp_path):
    paths = {
        plan_path(tmp_path, graph, replace(RECORD, **change))
        for graph in ("denoiser", "denoiser_vjp")
        for change in ({}, {"batch": 8}, {"gpu": "NVIDIA A100"})
    }
    assert len(paths) == 6


def test_the_digest_covers_constants_in_another_file(tmp_path):
    graph = tmp_path / "denoiser.onnx"
    graph.write_bytes(b"graph")
    alone = digest(graph)
    (tmp_path / "denoiser.onnx.data").write_bytes(b"constants")
    assert digest(graph) != alone


def test_without_tensorrt_one_line_says_what_to_do(built, monkeypatch):
    absent = lambda name: None if name == "tensorrt" else SimpleNamespace()  # noqa: E731
    monkeypatch.setattr("ddo_modulus.engines.trt.find_spec", absent)
    with pytest.raises(InputError, match=r"pip install 'ddo-modulus\[tensorrt\]'.*onnxruntime"):
        open_engine("tensorrt", built("linear"))
    monkeypatch.setattr("ddo_modulus.engines.trt.find_spec", lambda name: None)
    with pytest.raises(InputError, match="engine=torch works without"):
        require_tensorrt("cuda")
    monkeypatch.setattr("ddo_modulus.engines.trt.find_spec", lambda name: SimpleNamespace())
    with pytest.raises(InputError, match="device=cuda"):
        require_tensorrt("cpu")


# ---- with TensorRT ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def plans(built, tmp_path_factory):
    """``plans(name, precision)``: a package on the GPU and its engine, built once."""
    pytest.importorskip("tensorrt")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made = {}

    def get(name, precision="fp32"):
        if (name, precision) not in made:
            folder = tmp_path_factory.mktemp("plans") / name
            package = built(name)
            export(package, folder, precision=precision)
            package.operator.to("cuda")
            options = EngineOptions(folder, batch=8)
            made[name, precision] = package, open_engine("tensorrt", package, options), folder
        return made[name, precision]

    return get


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["box", "coarse", *sorted(p.name for p in SHIPPED.glob("*"))])
def test_plans_agree_with_torch(name, precision, plans, vjp):
    package, engine, _ = plans(name, precision)
    for batch in (1, 7, 7, 11):  # captured, replayed, and more than a plan takes at once
        x, sigma, v, *given = (t.cuda() for t in probes(package, package.grid.shape, batch))
        condition = given[0] if given else None
        expected = vjp(package.operator, x, sigma, v, condition)
        found = engine.vjp(x, sigma, v, condition)
        limit = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 0.1}[precision]
        for result, right in zip(found, expected, strict=True):
            assert relative_error(result, right) < limit


@pytest.mark.tensorrt
def test_launches_that_are_not_captured(plans, vjp):
    package, _, folder = plans("box")
    engine = TensorRTEngine(package, folder, Contract.read(folder), 8, cuda_graphs=False)
    for batch in (3, 11):  # the rest of the second is not aligned
        x, sigma, v, condition = (t.cuda() for t in probes(package, package.grid.shape, batch))
        expected = vjp(package.operator, x, sigma, v, condition)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            found = engine.vjp(x, sigma, v, condition)
            torch.cuda.current_stream().synchronize()
        for result, right in zip(found, expected, strict=True):
            assert relative_error(result, right) < 1e-4


@pytest.mark.tensorrt
def test_a_guided_analysis_in_tensorrt(plans):
    from ddo_modulus.observations import Observations, PointOperator

    package, engine, _ = plans("kolmogorov64")
    operator = PointOperator(package.grid, [0.2, 0.7], [0.1, 0.5], [0, 0])
    observations = Observations(operator, torch.tensor([1.0, -1.0]), 0.01)
    members = []
    for denoiser in (package.operator, engine):
        posterior = MomentMatching(denoiser, observations)
        generator = torch.Generator("cuda").manual_seed(0)
        members.append(sample(posterior, package.scheduler(), 4, steps=8, generator=generator))
    assert relative_error(members[1], members[0]) < 1e-3


@pytest.mark.tensorrt
def test_plans_are_kept(plans):
    package, _, folder = plans("box")
    lines = []
    open_engine("tensorrt", package, EngineOptions(folder, batch=8, report=lines.append))
    assert not lines
    record = next((folder / "plans").glob("*.json"))
    record.write_text(record.read_text().replace('"batch": 8', '"batch": 9'))
    open_engine("tensorrt", package, EngineOptions(folder, batch=8, report=lines.append))
    assert len(lines) == 1 and "batch is 8, not 9" in lines[0]
