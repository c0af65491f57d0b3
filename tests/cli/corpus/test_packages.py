# SPDX-License-Identifier: Apache-2.0
"""Packages that are damaged, mixed up, or no packages at all."""

import io
import json
import math
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch

from ddo_modulus.diffusion.fingerprint import stamp
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_field import GaussianField, Matern

NAN, INF = math.nan, math.inf


@pytest.fixture
def package(files, tmp_path):
    """A copy of a sound package, to be damaged."""
    return shutil.copytree(files.package, tmp_path / "package")


def header(**changes):
    """Change entries of ``package.json``; a dot leads into an entry, None removes it."""

    def damage(folder):
        content = json.loads((folder / "package.json").read_text())
        for path, value in changes.items():
            *outer, last = path.split("__")
            inner = content
            for name in outer:
                inner = inner[name]
            if value is None:
                del inner[last]
            else:
                inner[last] = value
        content.pop("fingerprint", None)
        (folder / "package.json").write_text(json.dumps(content))

    return damage


def unstamped(folder):
    """Remove the fingerprint, so that what stands behind it is checked."""
    header()(folder)


def archive(change):
    """Change the members of ``operator.mdlus``."""

    def damage(folder):
        unstamped(folder)
        path = folder / "operator.mdlus"
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
        change(members)
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)

    return damage


def weight(name, value, place=0):
    """Change a value of a tensor of the operator."""

    def change(members):
        state = torch.load(io.BytesIO(members["model.pt"]))
        key = next(key for key in state if key.startswith(name) and state[key].numel() > place)
        state[key].view(-1)[place] = value
        buffer = io.BytesIO()
        torch.save(state, buffer)
        members["model.pt"] = buffer.getvalue()

    return archive(change)


def argument(**changes):
    """Change arguments of the operator."""

    def change(members):
        content = json.loads(members["args.json"])
        content["__args__"] |= changes
        members["args.json"] = json.dumps(content).encode()

    return archive(change)


def named(name):
    """Name another class in the checkpoint."""

    def change(members):
        content = json.loads(members["args.json"]) | {"__name__": name}
        members["args.json"] = json.dumps(content).encode()

    return archive(change)


class Payload:
    """Would run code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran-code",)


def payload(members):
    members["model.pt"] = pickle.dumps(Payload())


def statistics(**changes):
    """Change arrays of ``normalization.npz`` at their first place, or replace them."""

    def damage(folder):
        unstamped(folder)
        with np.load(folder / "normalization.npz") as file:
            content = {name: file[name] for name in file.files}
        for name, value in changes.items():
            if np.ndim(value):
                content[name] = np.asarray(value)
            else:
                content[name].flat[0] = value
        np.savez(folder / "normalization.npz", **content)

    return damage


def cut(name, share=0.5, keep=True):
    """Cut a file short."""

    def damage(folder):
        if not keep:
            unstamped(folder)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def gone(name, keep=True):
    def damage(folder):
        if not keep:
            unstamped(folder)
        (folder / name).unlink()

    return damage


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def folder_for(name):
    def damage(folder):
        unstamped(folder)
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def array(content, **options):
    def damage(folder):
        unstamped(folder)
        np.save(folder / "orography.npy", content, **options)

    return damage


LAT, LON = list(np.arange(58.0, 52.0, -1)), list(np.arange(-6.0, 2.0))
JSON, NPZ, MDLUS = "package.json", "normalization.npz", "operator.mdlus"

DAMAGES = {
    # Files.
    "no-header": (gone(JSON), "no package"),
    "no-weights": (gone(MDLUS), f"{MDLUS} is not what"),
    "no-weights-unstamped": (gone(MDLUS, keep=False), MDLUS),
    "no-statistics": (gone(NPZ), f"{NPZ} is not what"),
    "no-statistics-unstamped": (gone(NPZ, keep=False), NPZ),
    "empty-header": (written(JSON, b""), "cannot be read"),
    "empty-weights": (written(MDLUS, b""), f"{MDLUS} is not what"),
    "empty-statistics": (written(NPZ, b""), f"{NPZ} is not what"),
    "cut-header": (cut(JSON), "cannot be read"),
    "cut-weights": (cut(MDLUS), f"{MDLUS} is not what"),
    "cut-weights-unstamped": (cut(MDLUS, keep=False), "cannot be read"),
    "cut-weights-at-the-end": (cut(MDLUS, 0.99), f"{MDLUS} is not what"),
    "cut-statistics": (cut(NPZ), f"{NPZ} is not what"),
    "cut-statistics-unstamped": (cut(NPZ, keep=False), f"{NPZ}: cannot be read"),
    "weights-are-text": (written(MDLUS, b"weights"), f"{MDLUS} is not what"),
    "weights-are-a-folder": (folder_for(MDLUS), MDLUS),
    "statistics-are-a-folder": (folder_for(NPZ), NPZ),
    # The header.
    "header-is-a-list": (written(JSON, b"[1, 2]"), "format None"),
    "header-is-a-number": (written(JSON, b"3"), "format None"),
    "header-is-latin-1": (written(JSON, b'{"format": "\xe9"}'), "cannot be read"),
    "header-is-utf-16": (written(JSON, '{"format": 1}'.encode("utf-16")), "cannot be read"),
    "another-format": (header(format=9), "of format 9"),
    "no-format": (header(format=None), "format None"),
    "no-grid": (header(grid=None), "no entry 'grid'"),
    "no-units": (header(units=None), "no entry 'units'"),
    "no-sampling": (header(sampling=None), "no entry 'sampling'"),
    "no-condition": (header(condition=None), "no entry 'condition'"),
    "unknown-condition": (header(condition="moon"), "unknown condition 'moon'"),
    "other-condition": (header(condition="none"), "does not fit an operator with a condition"),
    "units-of-two": (header(units=["K", "K"]), "do not fit an operator of 1"),
    "frames-0": (header(frames=0), "frames=0 must be a whole number"),
    "frames-2": (header(frames=2), "2 frame(s) of t2m"),
    "interval-0": (header(interval=0), "interval=0 must be"),
    "interval-nan": (header(interval=NAN), "interval=nan must be"),
    "interval-text": (header(interval="1h"), "interval=1h must be"),
    "grid-nan": (header(grid__lat=[NAN, *LAT[1:]]), "grid.lat=nan must be"),
    "grid-inf": (header(grid__lon=[*LON[:-1], INF]), "grid.lon=inf must be"),
    "grid-text": (header(grid__lat=["58", *LAT[1:]]), "grid.lat=58 must be a number"),
    "grid-uneven": (header(grid__lat=[60.0, *LAT[1:]]), "lat"),
    "grid-short": (header(grid__lat=LAT[1:]), "does not fit a grid (5, 8)"),
    "grid-descending": (header(grid__lon=LON[::-1]), "longitudes must ascend"),
    "grid-empty": (header(grid={}), "no entry"),
    "box-infinite": (
        header(grid={"shape": [6, 8], "lengths": [1.0, INF], "periodic": True}),
        "grid.lengths=inf must be",
    ),
    "box-of-no-size": (
        header(grid={"shape": [6, 8], "lengths": [1.0, 0.0], "periodic": True}),
        "grid.lengths=0.0 must be",
    ),
    "box-unknown-period": (
        header(grid={"shape": [6, 8], "lengths": [1.0, 1.0], "periodic": "yes"}),
        "grid.periodic=yes must be",
    ),
    "sigma-max-inf": (header(sampling__sigma_max=INF), "sigma_max=inf must be"),
    "sigma-min-nan": (header(sampling__sigma_min=NAN), "sigma_min=nan must be"),
    "sigma-min-negative": (header(sampling__sigma_min=-1.0), "sigma_min=-1.0 must be"),
    "sigmas-exchanged": (header(sampling__sigma_min=99.0), "must be below sigma_max"),
    "rho-nan": (header(sampling__rho=NAN), "rho=nan must be"),
    "rho-0": (header(sampling__rho=0), "rho=0 must be"),
    "steps-0": (header(sampling__steps=0), "steps=0 must be"),
    "steps-half": (header(sampling__steps=1.5), "steps=1.5 must be"),
    "steps-text": (header(sampling__steps="24"), "steps=24 must be"),
    "inflation-huge": (header(sampling__inflation=1e10), "inflation=10000000000.0 must be"),
    "unknown-option": (header(sampling__colour=3), "has no option colour"),
    "unknown-solver": (header(sampling__solver="rk4"), "solver=rk4 must be one of"),
    # Numbers of the operator.
    "nan-weight": (weight("network", NAN), "NaN or infinite"),
    "infinite-weight": (weight("network", -INF), "NaN or infinite"),
    "nan-variance": (weight("prior_variance", NAN), "prior_variance"),
    "infinite-variance": (weight("prior_variance", INF), "prior_variance"),
    "negative-variance": (weight("prior_variance", -0.1), "variance in prior_variance"),
    "no-variance": (weight("prior_variance", 0.0, 5), "variance in prior_variance"),
    "noise-nan": (argument(noise={"length_scale": NAN, "smoothness": 0.5}), "length_scale"),
    "noise-negative": (argument(noise={"length_scale": -1.0, "smoothness": 0.5}), "length_scale"),
    "noise-rough": (argument(noise={"length_scale": 1.0, "smoothness": 0.0}), "smoothness"),
    "fade-nan": (argument(network_sigma=NAN), "network_sigma=nan must be"),
    "fade-negative": (argument(network_sigma=-2.0), "network_sigma=-2.0 must be"),
    "tail-nan": (argument(refinement={"tail": [[NAN, 1.0, 1.0]]}), "refinement.tail=nan"),
    "other-shape": (argument(shape=[4, 4]), "cannot be read"),
    "unknown-argument": (argument(depth=3), "cannot be read"),
    # Statistics.
    "mean-nan": (statistics(mean=NAN), "mean is not finite for t2m"),
    "std-zero": (statistics(std=0.0), "std is not positive for t2m"),
    "std-negative": (statistics(std=-1.0), "std is not positive for t2m"),
    "std-inf": (statistics(std=INF), "std is not finite for t2m"),
    "other-names": (statistics(channels=["a", "b"]), "mean has 1 channels; expected 2"),
    "names-pickled": (statistics(channels=np.array([Payload()], object)), NPZ),
    "other-size": (statistics(mean=np.zeros((24, 1, 5, 8))), "give both the same shape"),
    # Orography.
    "orography-pickled": (array(np.array([Payload()], object), allow_pickle=True), "read"),
    "orography-nan": (array(np.full((6, 8), NAN)), "cannot be right"),
    "orography-size": (array(np.zeros((3, 3))), "does not fit a grid"),
    # Code and classes.
    "another-class": (named("FourierNeuralOperator"), "not a DiffusionOperator"),
    "a-class-of-python": (named("subprocess.Popen"), "not a DiffusionOperator"),
    "code-in-weights": (archive(payload), "cannot be read"),
    "no-arguments": (archive(lambda members: members.pop("args.json")), "cannot be read"),
    "no-state": (archive(lambda members: members.pop("model.pt")), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_package_is_refused(name, package, monkeypatch, tmp_path):
    damage, words = DAMAGES[name]
    monkeypatch.chdir(tmp_path)
    damage(package)
    with pytest.raises(InputError) as caught:
        Package.load(package)
    assert words in str(caught.value) and str(package) in str(caught.value)
    assert not (tmp_path / "ran-code").exists()


@pytest.mark.parametrize("name", ["nan-weight", "std-zero", "no-grid", "cut-weights", "no-header"])
@pytest.mark.parametrize("command", ["assimilate", "generate", "export"])
def test_commands_refuse_it_in_one_line(command, name, package, files, refusal):
    damage, words = DAMAGES[name]
    damage(package)
    keys = {"observations": files.table} if command == "assimilate" else {}
    refusal(command, words, str(package), package=package, **keys)


def other_noise(package):
    """The same package with a smoother noise, and a prior to match."""
    options = package.operator._args["__args__"]
    options = options | {"noise": {"length_scale": 0.2, "smoothness": 0.5}}
    operator = DiffusionOperator(**options)
    operator.set_prior(GaussianField(operator.basis, Matern(0.4, 1.0), operator.channels))
    package.operator = operator.eval().requires_grad_(False)
    return package


def exchanged(name):
    return lambda folder, other: shutil.copyfile(other / name, folder / name)


def entry(*keys, sums=False):
    """Take entries of the other header, with their sums or without."""

    def exchange(folder, other):
        own, foreign = (json.loads((f / JSON).read_text()) for f in (folder, other))
        own |= {key: foreign[key] for key in keys}
        if sums:
            own["fingerprint"] |= {k: foreign["fingerprint"][k] for k in keys}
        (folder / JSON).write_text(json.dumps(own))

    return exchange


@pytest.mark.parametrize(
    ("exchange", "words"),
    [
        (exchanged(NPZ), f"{NPZ} is not what"),
        (exchanged(MDLUS), f"{MDLUS} is not what"),
        (exchanged(JSON), f"{MDLUS} is not what"),
        (entry("grid"), f"{JSON}: grid is not what"),
        (entry("grid", sums=True), f"{JSON}: whole is not what"),
        (entry("units"), f"{JSON}: channels is not what"),
        (entry("interval"), f"{JSON}: task is not what"),
        (entry("sampling"), f"{JSON}: sampling is not what"),
        (lambda folder, other: np.save(folder / "orography.npy", np.zeros((6, 8))), "orography"),
    ],
    ids=["statistics", "noise", "header", "grid", "grid-and-sum", "units", "interval"]
    + ["levels", "orography"],
)
def test_a_part_of_another_package_is_refused(exchange, words, package, untrained, tmp_path):
    other = other_noise(untrained(seed=1))
    other.grid = type(other.grid)(other.grid.lat - 1, other.grid.lon)
    other.interval, other.units = 3600.0, ("degC",)
    other.posterior = type(other.posterior)(sigma_max=40.0).over(other.posterior)
    other.save(tmp_path / "other")
    exchange(package, tmp_path / "other")
    with pytest.raises(InputError, match="copy all files of one package") as caught:
        Package.load(package)
    assert words in str(caught.value)


def test_free_options_may_be_edited_and_laid_out_anew(package):
    content = json.loads((package / JSON).read_text())
    content["sampling"] |= {"steps": 7, "rho": 9.0}
    content["provenance"] = {"note": "edited"}
    (package / JSON).write_text(json.dumps(dict(reversed(content.items()))))
    assert Package.load(package).posterior.steps == 7


def test_a_package_of_an_earlier_version_loads_and_can_be_stamped(package, caplog):
    unstamped(package)
    before = {p.name: p.read_bytes() for p in package.iterdir() if p.name != JSON}
    with caplog.at_level("INFO"):
        old = Package.load(package)
    assert "without a fingerprint" in caplog.text
    stamp(package)
    new = Package.load(package)
    assert torch.equal(old.operator.prior_variance, new.operator.prior_variance)
    assert {p.name: p.read_bytes() for p in package.iterdir() if p.name != JSON} == before


def test_a_sound_package_is_saved_with_its_sums_and_loads(untrained, tmp_path):
    package = untrained()
    for half in (False, True):
        again = Package.load(package.save(tmp_path / f"half-{half}", half=half))
        assert again.channels == package.channels


@pytest.mark.parametrize("name", ["network", "prior_variance"])
def test_a_package_with_nan_is_not_written(name, untrained, tmp_path):
    package = untrained()
    state = package.operator.state_dict()
    key = next(key for key in state if key.startswith(name))
    state[key].view(-1)[0] = NAN
    with pytest.raises(InputError, match=f"is not written: .* {name}.* NaN or infinite"):
        package.save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_weights_beyond_half_precision_are_not_written(untrained, tmp_path):
    package = untrained()
    state = package.operator.state_dict()
    next(v for k, v in state.items() if k.startswith("network")).view(-1)[0] = 1e6
    with pytest.raises(InputError, match="is not written"):
        package.save(tmp_path / "p", half=True)
    package.save(tmp_path / "p")


def place(kind, files, tmp_path):
    """Something that is no folder of a package."""
    path = tmp_path / "thing"
    if kind == "file":
        path.write_text("text")
    elif kind == "table":
        path = files.table
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "empty":
        path.mkdir()
    elif kind == "store":
        path.mkdir()
        (path / "zarr.json").write_text("{}")
    elif kind == "long":
        path = tmp_path / ("n" * 300)
    elif kind == "header":
        path = files.package / JSON
    elif kind == "weights":
        path = files.package / MDLUS
    return path


@pytest.mark.parametrize(
    "kind",
    ["file", "table", "loop", "dangling", "empty", "store", "long", "header", "weights", "absent"],
)
def test_what_is_no_package_is_named(kind, files, tmp_path, refusal):
    path = place(kind, files, tmp_path)
    refusal("generate", "no package", "uk_t2m", package=path, time="2019-03-27T12")
