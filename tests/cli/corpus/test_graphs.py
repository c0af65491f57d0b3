# SPDX-License-Identifier: Apache-2.0
"""Exported graphs that are altered, cut short, or another package's."""

import json
import shutil

import pytest

from ddo_modulus.diffusion.package import Package
from ddo_modulus.engines.folder import Contract, export, find
from ddo_modulus.engines.options import EngineOptions
from ddo_modulus.errors import InputError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def graphs(files, tmp_path_factory):
    """Graphs of the package, exported once with their constants in separate files."""
    folder = tmp_path_factory.mktemp("graphs") / "engines"
    export(Package.load(files.package), folder, external=True)
    return folder


@pytest.fixture
def folder(graphs, tmp_path):
    return shutil.copytree(graphs, tmp_path / "engines")


def byte(name, place=0.7):
    """Change one byte of a file."""

    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[int(len(data) * place)] ^= 1
        (folder / name).write_bytes(bytes(data))

    return damage


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def manifest(**changes):
    def damage(folder):
        content = json.loads((folder / "engine.json").read_text()) | changes
        (folder / "engine.json").write_text(json.dumps(content))

    return damage


def signed(**changes):
    """Change the manifest together with its own sum."""

    def damage(folder):
        manifest(**changes)(folder)
        content = json.loads((folder / "engine.json").read_text())
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        manifest(whole=Contract(**lists).sum())(folder)

    return damage


def exchanged(folder):
    one, other = folder / "denoiser.onnx", folder / "denoiser_vjp.onnx"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


DAMAGES = {
    "altered": (byte("denoiser.onnx"), "denoiser.onnx is not the graph"),
    "altered-derivative": (byte("denoiser_vjp.onnx"), "denoiser_vjp.onnx is not the graph"),
    "altered-constants": (byte("denoiser.onnx.data"), "denoiser.onnx.data is not the graph"),
    "first-byte": (byte("denoiser.onnx", 0), "denoiser.onnx is not the graph"),
    "cut": (cut("denoiser.onnx"), "denoiser.onnx is not the graph"),
    "cut-constants": (cut("denoiser_vjp.onnx.data"), "denoiser_vjp.onnx.data is not the graph"),
    "no-graph": (lambda f: (f / "denoiser.onnx").unlink(), "denoiser.onnx is missing"),
    "no-constants": (lambda f: (f / "denoiser.onnx.data").unlink(), "onnx.data is missing"),
    "exchanged": (exchanged, "is not the graph"),
    "no-manifest": (lambda f: (f / "engine.json").unlink(), "engine.json is missing"),
    "cut-manifest": (cut("engine.json"), "engine.json is damaged"),
    "manifest-list": (lambda f: (f / "engine.json").write_text("[]"), "engine.json is damaged"),
    "manifest-binary": (lambda f: (f / "engine.json").write_bytes(b"\xff\xfe"), "is damaged"),
    "other-opset": (manifest(opset=9), "engine.json is changed"),
    "other-precision": (manifest(precision="bf16"), "engine.json is changed"),
    "other-levels": (manifest(sigma=[0.1, 3.0]), "engine.json is changed"),
    "other-tolerance": (manifest(tolerance={}), "engine.json is changed"),
    "other-sums": (manifest(files={}), "engine.json is changed"),
    "no-sums": (signed(files={}), "names no graphs"),
    "earlier-format": (manifest(format=1), "of format 1, not 2"),
    "another-package": (signed(package="0" * 32), "the engines of another package"),
    "another-grid": (signed(shape=[9, 9]), "for a grid of 9x9, not 6x8"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_graphs_are_refused(name, folder, files):
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(InputError) as caught:
        find(Package.load(files.package), EngineOptions(folder))
    assert words in str(caught.value) and "ddo export" in str(caught.value)


def test_a_command_refuses_them_in_one_line(folder, files, refusal):
    byte("denoiser.onnx")(folder)
    keys = {"package": files.package, "observations": files.table}
    refusal(
        "assimilate",
        "denoiser.onnx is not the graph that was exported",
        **keys,
        engine="onnxruntime",
        engines=folder,
        batch=4,
    )


def test_sound_graphs_are_found(folder, files):
    (folder / "plans").mkdir()  # what an engine keeps beside them
    assert find(Package.load(files.package), EngineOptions(folder))[0] == folder


def test_damaged_graphs_of_the_cache_are_exported_again(graphs, files, tmp_path, monkeypatch):
    monkeypatch.setenv("DDO_ENGINES", str(tmp_path))
    made = []

    def again(package, folder, **options):
        made.append(options["overwrite"])
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(graphs, folder)

    monkeypatch.setattr("ddo_modulus.engines.folder.export", again)
    options = EngineOptions(report=lambda line: None)
    folder, _ = find(Package.load(files.package), options)
    byte("denoiser.onnx")(folder)
    find(Package.load(files.package), options)
    find(Package.load(files.package), options)
    assert made == [False, True]
