# SPDX-License-Identifier: Apache-2.0
import json
from importlib import import_module

import pytest
import torch

from ddo_modulus.engines import ENGINES
from ddo_modulus.nn.operator import NeuralOperator

QUICK = {"observations": 6, "steps": 3, "repeats": 1}


@pytest.fixture
def engines(monkeypatch):
    """Two that can be used here, the second without the compiler; one that cannot."""
    monkeypatch.setattr(NeuralOperator, "compile", lambda self, mode=None: None)
    for name in list(ENGINES):
        if name not in ("torch", "compile"):
            monkeypatch.delitem(ENGINES, name)
    monkeypatch.setitem(ENGINES, "missing", lambda *_: import_module("no_such_package"))


def test_every_engine_precision_and_size(ddo, files, tmp_path, engines):
    out = tmp_path / "speed.json"
    result = ddo("benchmark", package=files.package, ensemble="[2,3]", analyses=2, out=out, **QUICK)
    assert result.status == 0, result.err
    rows = json.loads(out.read_text())["rows"]
    kinds = [("torch", "fp32"), ("compile", "fp32"), ("compile", "bf16")]
    kinds += [("missing", "fp32"), ("missing", "bf16")]
    expected = [(e, p, 2, n) for n in (2, 3) for e, p in kinds]
    assert [(r["engine"], r["precision"], r["analyses"], r["ensemble"]) for r in rows] == expected
    for row in rows:
        if row["engine"] == "missing":
            assert "no_such_package" in row["failure"] and row["seconds"] is None
            continue
        members = 2 * row["ensemble"]
        assert row["members_per_second"] == pytest.approx(members / row["seconds"])
        assert row["mean_difference"] < 1e-5 and row["failure"] is None  # the network is zero
        assert row["evaluations"] == 3 * 5 and row["steps"] == 3
    assert "missing, bf16: No module named" in result.out
    assert "compile" in result.out and "ms a member" in result.out


def test_markdown_of_one_engine(ddo, files, tmp_path, engines):
    out = tmp_path / "speed.md"
    keys = {"package": files.package, "out": out, "ensemble": 2, "precision": "bf16"} | QUICK
    assert ddo("benchmark", engine="compile", **keys).status == 0
    rows = [line for line in out.read_text().splitlines() if line.startswith("| compile")]
    assert len(rows) == 1 and rows[0].startswith("| compile | bf16 | 1 x 2 | 3 | 15 |")
    assert "| torch" not in out.read_text()


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"engine": "jax"}, "unknown engine 'jax'; choose one of torch, compile"),
        ({"precision": "fp8"}, "precision=fp8 must be one of fp32, bf16, fp16"),
        ({"steps": "[4,0]"}, "steps=0 must be a whole number from 1"),
        ({"ensemble": "many"}, "ensemble=many must be a whole number"),
        ({"observations": 49}, "observations=49 of 48 grid values"),
        ({"error": 0}, "error=0 must be a finite number, above 0"),
    ],
)
def test_mistakes(refused, files, tmp_path, keys, match):
    keys = {"package": files.package, **QUICK, **keys}
    refused(match, "benchmark", tmp_path / "speed.md", **keys)


def test_tables_of_other_kinds(refused, files, tmp_path):
    refused("must end in .md or .json", "benchmark", tmp_path / "x.csv", package=files.package)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_graphs_on_a_gpu(ddo, files, tmp_path):
    out = tmp_path / "speed.json"
    torch._dynamo.reset()
    keys = {"package": files.package, "engine": "[torch,compile]", "out": out} | QUICK
    assert ddo("benchmark", **keys).status == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["engine"] for row in rows] == ["torch", "compile", "compile"]
    assert all(row["failure"] is None and row["mean_difference"] < 1e-3 for row in rows)
    assert all(row["memory_gib"] > 0 for row in rows)
