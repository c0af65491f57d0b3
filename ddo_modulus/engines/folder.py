# SPDX-License-Identifier: Apache-2.0
"""Folders of exported graphs, described by ``engine.json`` and checked when opened.

Axes: ``B`` batch, ``C`` channel, ``D`` channels of a condition, ``H W`` grid.

The description has what a user of the graphs needs: grid, variables, noise levels, precision,
versions, and the error of the graphs relative to the operator in single precision, measured at
export. The same is in the ``metadata_props`` of each graph.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ddo_modulus import __version__
from ddo_modulus.data.output import ENGINE, replacing
from ddo_modulus.diffusion.fingerprint import file_sum, json_sum
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.engines.options import EngineOptions, Precision
from ddo_modulus.engines.trace import Trace, trace
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import BoxGrid, Grid

HEADER = "engine.json"

FORMAT = 2

PRECISIONS = ("fp32", "fp16", "bf16")

#: Graphs larger than this (bytes) keep constants in a separate file: the limit of protocol buffers
#: is 2 GiB.
EXTERNAL = 1_500_000_000


@dataclass(frozen=True)
class Contract:
    """Description of a folder of graphs: what they compute, and how accurately.

    Attributes:
        package: Fingerprint of the operator (:func:`fingerprint`).
        shape: Grid ``(H, W)`` of the states.
        domain: Extent of the grid: first and last latitude and longitude, or lengths.
        variables: Variables of the package, in the order of channels.
        channels: Number of channels ``C`` of a state, over all frames.
        condition: Shape of the condition of one state, ``[D]`` or ``[D, H, W]``; None for none.
        precision: Precision of the network.
        sigma: Smallest and largest noise level of the package.
        opset: ONNX opset of the graphs.
        tolerance: Largest error of each output relative to the operator in single precision, over
            noise levels from the smallest to the largest: the norm of the difference over the norm
            of the result.
        measured_with: Software that evaluated the graphs for this measurement.
        versions: Versions of the software that wrote the graphs.
        files: SHA-256 sum of each file of the graphs.
        whole: SHA-256 sum of the rest of this description.
        format: Format of this description.
    """

    package: str
    shape: tuple[int, int]
    domain: dict[str, list[float] | bool]
    variables: tuple[str, ...]
    channels: int
    condition: tuple[int, ...] | None
    precision: Precision
    sigma: tuple[float, float]
    opset: int
    tolerance: dict[str, float]
    measured_with: str
    versions: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)
    whole: str = ""
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> Contract:
        """Read the description of a folder, and compare the graphs with it.

        Raises:
            InputError: If it is missing, damaged, or of another format, or if a graph is missing or
                is not the one that was exported.
        """
        path = folder / HEADER
        again = f"write the folder again with `ddo export out={folder} overwrite=true`"
        if not path.is_file():
            raise InputError(f"no exported engines in {folder} ({HEADER} is missing); `ddo export`")
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise InputError(f"{path} is of format {content['format']}, not {FORMAT}; {again}")
            names = {f.name for f in fields(cls)}
            content = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
            contract = cls(**{k: v for k, v in content.items() if k in names})
            if contract.whole != contract.sum():
                raise InputError(f"{path} is changed since the export; {again}")
            if not {"denoiser.onnx", "denoiser_vjp.onnx"} <= set(contract.files):
                raise InputError(f"{path} names no graphs; {again}")
            for name, stated in contract.files.items():
                file = folder / Path(name).name
                if not file.is_file():
                    raise InputError(f"{file} is missing; {again}")
                if file_sum(file) != stated:
                    raise InputError(f"{file} is not the graph that was exported; {again}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged ({error}); {again}") from error
        return contract

    def sum(self) -> str:
        """SHA-256 sum of all entries but ``whole``."""
        content = {k: v for k, v in asdict(self).items() if k != "whole"}
        return json_sum(content)


def fingerprint(operator: DiffusionOperator) -> str:
    """A hash of the arguments, parameters and buffers of an operator."""
    arguments = operator._args["__args__"]  # not the module: a class may move to another file
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode())
    for name, value in operator.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _domain(grid: Grid) -> dict[str, list[float] | bool]:
    if isinstance(grid, BoxGrid):
        return {"lengths": list(grid.lengths), "periodic": grid.periodic}
    ends = {"lat": grid.lat, "lon": grid.lon}
    return {name: [float(axis[0]), float(axis[-1])] for name, axis in ends.items()}


def condition_size(package: Package) -> tuple[int, ...] | None:
    """Shape of the condition of one state: ``(D,)``, or ``(D, H, W)`` on the operator's grid."""
    channels = package.operator.condition_channels
    if not channels:
        return None
    return (channels, *package.operator.basis.shape) if package.task.coarse else (channels,)


def export(
    package: Package,
    folder: str | Path,
    *,
    precision: Precision = "fp32",
    shape: tuple[int, int] | None = None,
    external: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Contract:
    """Write the graphs of a package: ``denoiser.onnx``, ``denoiser_vjp.onnx`` and ``engine.json``.

    Args:
        package: The prior.
        folder: Folder to write.
        precision: Precision of the network; the linear part and functions of sigma stay in fp32.
        shape: Grid ``(H, W)``; the package's if None.
        external: Whether constants go to separate files; those of large graphs always do.
        overwrite: Whether an existing folder of engines may be replaced.
        progress: Called with the number of steps done and their total.

    Raises:
        InputError: If the precision is unknown, the operator cannot be used on the grid, an
            operation is not supported by TensorRT, or the folder may not be replaced.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
    folder = Path(folder)
    if folder.exists() and overwrite and not (folder / HEADER).is_file():
        raise InputError(f"{folder} exists and holds no engines; choose another folder")
    try:
        import onnx
        import onnx_ir as ir
        import onnxscript
    except ImportError as error:
        raise InputError(
            f"exporting needs {error.name}: pip install 'ddo-modulus[export]'"
        ) from error
    from ddo_modulus.engines.graph import OPSET, to_onnx, unsupported

    def done(step: int) -> None:
        if progress is not None:
            progress(step, 5)

    shape = package.grid.shape if shape is None else (shape[0], shape[1])
    with replacing(folder, overwrite=overwrite, kind=ENGINE) as new:
        new.mkdir()
        traced = trace(package.operator, shape, condition_size(package), precision)
        done(1)
        models = to_onnx(traced)
        done(3)
        sampling = package.posterior
        graphs = {}
        for name, model in models.items():
            if missing := unsupported(model, traced):
                raise InputError(f"TensorRT has no {'; no '.join(missing)}")
            path = new / f"{name}.onnx"
            size = sum(v.const_value.nbytes for v in model.graph.initializers.values())  # type: ignore
            apart = external or size > EXTERNAL
            ir.save(model, path, external_data=f"{path.name}.data" if apart else None)
            graphs[name] = path
        tolerance, measured = _measure(package, traced, graphs, shape)
        done(4)
        if not all(map(math.isfinite, tolerance.values())):
            raise InputError(
                f"the graphs in precision={precision} give NaN or infinity; choose fp32 or bf16"
            )
        contract = Contract(
            package=fingerprint(package.operator),
            shape=shape,
            domain=_domain(package.grid),
            variables=package.channels,
            channels=package.operator.channels,
            condition=condition_size(package),
            precision=precision,
            sigma=(sampling.sigma_min, sampling.sigma_max),
            opset=OPSET,
            tolerance=tolerance,
            measured_with=measured,
            versions={
                "ddo_modulus": __version__,
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxscript": onnxscript.__version__,
            },
        )
        described = {k: json.dumps(v) for k, v in asdict(contract).items()}
        for path in graphs.values():
            model = onnx.load(path, load_external_data=False)
            onnx.helper.set_model_props(model, described)
            onnx.save(model, path)
            onnx.checker.check_model(str(path), full_check=True)
        contract = replace(
            contract, files={path.name: file_sum(path) for path in sorted(new.glob("*.onnx*"))}
        )
        contract = replace(contract, whole=contract.sum())
        (new / HEADER).write_text(json.dumps(asdict(contract), indent=2) + "\n")
        done(5)
    return contract


def find(package: Package, options: EngineOptions) -> tuple[Path, Contract]:
    """The folder of the graphs of a package: ``options.folder``, or one in the cache.

    Raises:
        InputError: If ``options.folder`` is for another package or grid.
    """
    shape = package.grid.shape if options.shape is None else options.shape
    own = fingerprint(package.operator)
    if options.folder is not None:
        contract = Contract.read(options.folder)
        if contract.package != own:
            raise InputError(
                f"{options.folder} holds the engines of another package (of "
                f"{', '.join(contract.variables)}); `ddo export` this one, or leave engines= out"
            )
        if tuple(contract.shape) != tuple(shape):
            have, want = ("x".join(map(str, s)) for s in (contract.shape, shape))
            raise InputError(
                f"{options.folder} is for a grid of {have}, not {want}; "
                f"`ddo export resolution=[{shape[0]},{shape[1]}]`"
            )
        return options.folder, contract
    name = f"{own}-{shape[0]}x{shape[1]}-{options.precision}-{__version__}-torch{torch.__version__}"
    folder = cache() / name
    found = _exported(folder)
    if found is None:
        options.report(f"exporting the denoiser to {folder} (once for each package and grid)")
        export(package, folder, precision=options.precision, shape=shape, overwrite=folder.exists())
        found = Contract.read(folder)
    return folder, found


def _exported(folder: Path) -> Contract | None:
    """Description of a folder of the cache; None if its graphs are missing or damaged."""
    try:
        return Contract.read(folder)
    except InputError:
        return None


def cache() -> Path:
    """Folder of exported engines: ``$DDO_ENGINES``, or in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DDO_ENGINES") or home / "ddo_modulus" / "engines")


# ---- accuracy ----------------------------------------------------------------------------------


def probes(
    package: Package, shape: tuple[int, int], batch: int = 7, seed: int = 0
) -> tuple[Tensor, ...]:
    """Arguments ``(x, sigma, v[, condition])`` that are typical of sampling, to measure errors.

    They are noisy draws from the linear part at noise levels from the smallest to the largest,
    random cotangents of sizes over several decades, and random conditions.
    """
    generator = torch.Generator().manual_seed(seed)
    operator, sampling = package.operator, package.posterior
    linear = operator.linear.at(shape)
    size = condition_size(package)
    condition = None if size is None else torch.randn(batch, *size, generator=generator)
    low, high = (torch.tensor(s).log() for s in (sampling.sigma_min, sampling.sigma_max))
    sigma = torch.linspace(float(low), float(high), batch).exp()
    z = torch.randn(batch, linear.variance.shape[-1], generator=generator)
    x = linear.fields(z * linear.variance[:1].sqrt().float().cpu())
    x = x + sigma.view(-1, 1, 1, 1) * linear.noise.sample(batch, generator=generator)
    v = torch.randn(x.shape, generator=generator)
    v = v * torch.logspace(3, -6, batch).view(-1, 1, 1, 1)
    return (x, sigma, v) if condition is None else (x, sigma, v, condition)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of a state: norm of the difference over norm of the expected state."""
    difference = (found.double() - expected.double()).flatten(1).norm(dim=1)
    return float((difference / expected.double().flatten(1).norm(dim=1)).max())


def _measure(
    package: Package, traced: Trace, graphs: dict[str, Path], shape: tuple[int, int]
) -> tuple[dict[str, float], str]:
    """Errors of both outputs of the graphs, and the software that evaluated the graphs."""
    x, sigma, v, *conditions = arguments = probes(package, shape)
    device = package.operator.device
    condition = conditions[0].to(device) if conditions else None
    clean, pullback = package.operator.value_and_pullback(x.to(device), sigma.to(device), condition)
    expected = [clean.cpu(), pullback(v.to(device)).cpu()]
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(graphs["denoiser_vjp"], providers=[_CPU])
        names = [node.name for node in session.get_inputs()]
        feeds = {n: t.numpy() for n, t in zip(names, arguments, strict=True)}
        found = [torch.from_numpy(a) for a in session.run(None, feeds)]
        measured = f"onnxruntime {onnxruntime.__version__} on a CPU"
    except Exception as error:  # the exceptions of ONNX Runtime are not public
        if not isinstance(error, ImportError) and "NOT_IMPLEMENTED" not in str(error):
            raise
        found, measured = list(traced.function(*arguments)), f"torch {torch.__version__} on a CPU"
    errors = map(relative_error, found, expected)
    return dict(zip(("denoised", "product"), errors, strict=True)), measured


_CPU = "CPUExecutionProvider"
