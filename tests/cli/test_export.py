# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import xarray as xr

QUICK = {"ensemble": 2, "posterior__steps": 4, "time": "2019-03-27T06:00"}


def test_export_and_assimilate(ddo, refused, files, tmp_path):
    """The engines of a folder give torch's analysis."""
    engines = tmp_path / "engines"
    result = ddo("export", package=files.package, out=engines)
    assert result.status == 0, result.err
    assert "relative error" in result.out and str(engines) in result.out
    assert "export 100 %" in result.err
    contract = json.loads((engines / "engine.json").read_text())
    assert contract["shape"] == [6, 8] and contract["domain"]["lat"] == [58.0, 53.0]
    refused("exists", "export", out=engines, package=files.package)

    inputs = {"package": files.package, "observations": files.table, **QUICK}
    found = {}
    for name, keys in {
        "torch": {},
        "folder": {"engine": "onnxruntime", "engines": engines},
    }.items():
        out = tmp_path / f"{name}.zarr"
        result = ddo("assimilate", out=out, **inputs, **keys)
        assert result.status == 0, result.err
        assert ("engine: ONNX Runtime" in result.err) == (name != "torch")
        with xr.open_zarr(out, consolidated=False) as analysis:
            assert analysis.attrs["engine"] == keys.get("engine", "torch")
            found[name] = analysis["t2m"].values
    np.testing.assert_allclose(found["folder"], found["torch"], atol=1e-3)
    inputs["engine"] = "abacus"
    refused("unknown engine 'abacus'", "assimilate", out=tmp_path / "x.zarr", **inputs)


@pytest.mark.slow
def test_engines_are_made_when_they_are_missing(ddo, files, tmp_path, monkeypatch):
    monkeypatch.setenv("DDO_ENGINES", str(tmp_path / "cache"))
    inputs = {"package": files.package, "observations": files.table, **QUICK}
    for name in ("first", "second"):
        out = tmp_path / f"{name}.zarr"
        result = ddo("assimilate", out=out, engine="onnxruntime", **inputs)
        assert result.status == 0, result.err
        assert ("exporting the denoiser to" in result.err) == (name == "first")
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("match", "keys"),
    [
        ("no package 'nowhere'", {"package": "nowhere"}),
        ("precision=int8", {"precision": "int8"}),
        ("resolution=[9] must be", {"resolution": "[9]"}),
        ("resolution=1 must be", {"resolution": 1}),
        ("external=maybe", {"external": "maybe"}),
        ("unknown key 'opset'", {"opset": 3}),
    ],
)
def test_mistakes(refused, files, tmp_path, match, keys):
    refused(match, "export", tmp_path / "e", **{"package": files.package, **keys})
