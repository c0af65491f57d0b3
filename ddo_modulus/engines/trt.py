# SPDX-License-Identifier: Apache-2.0
"""Exported graphs in TensorRT (10 and 11), by its Python API.

A plan is built from each graph on the machine that runs it, for batches from one to a largest one,
and kept in ``plans/`` beside the graphs with a record of the TensorRT version, the GPU and the
graph; it is built anew when one of them differs. Networks are strongly typed: every tensor has the
type that the graph gives it, and TF32 is off. Plans are executed on torch's current stream, on the
memory of torch tensors. Where the size of the batch repeats, as in sampling, the launch is captured
in a CUDA graph and replayed.

A plan is a program for the GPU: open only plans that were built by you. Those here are never taken
from a package.

Written from NVIDIA's documentation and **not run**. Each call was checked, line by line, in the
bindings of https://github.com/NVIDIA/TensorRT, which the pages of the Python API are made from:
``python/src/infer/pyCore.cpp`` and ``python/src/parsers/pyOnnx.cpp`` for names, arguments and what
keeps what alive, ``python/docstrings/`` for what is promised, ``include/*.h`` for what only C++
tells. Read in full at v10.13.0 (b8db91e) and v11.1 (82d1dca); arguments compared at v10.0.0,
v10.13.3, v10.16 and v11.0, where they are the same. Pages are under
https://docs.nvidia.com/deeplearning/tensorrt/:

* ``latest/_static/python-api/infer/Core/Logger.html``: ``Logger``, ``Logger.WARNING``; it has to
  outlive all that is made with it
* ``11.0.0/_static/python-api/infer/Core/Builder.html``: ``Builder``, ``create_network``,
  ``NetworkDefinitionCreationFlag.STRONGLY_TYPED`` (needed in 10; in 11 of another value, and
  ignored), ``create_builder_config``, ``create_optimization_profile``,
  ``build_serialized_network`` (``IHostMemory``, a buffer; None if it failed)
* ``latest/_static/python-api/infer/Core/BuilderConfig.html``: ``set_memory_pool_limit``,
  ``MemoryPoolType.WORKSPACE``, ``clear_flag``, ``BuilderFlag.TF32`` (on by default),
  ``add_optimization_profile``, ``create_timing_cache`` (``b""`` makes an empty one),
  ``set_timing_cache`` (False for a cache of another device)
* ``latest/_static/python-api/infer/Core/OptimizationProfile.html``: ``set_shape``
* ``latest/_static/python-api/infer/Core/TimingCache.html``: ``serialize``; how caches are used, and
  that they are of one device and version: ``10.16.1/performance/builder-performance.html``
* ``latest/_static/python-api/parsers/Onnx/pyOnnx.html``: ``OnnxParser``, ``parse_from_file`` (finds
  constants apart by the path), ``num_errors``, ``get_error``
* ``python/docstrings/infer/pyCoreDoc.h``, ``RuntimeDoc`` (its page in 10 or 11 was not seen):
  ``Runtime``, ``deserialize_cuda_engine`` (None for what it cannot read)
* ``11.0.0/_static/python-api/infer/Core/Engine.html``: ``create_execution_context`` (on profile 0,
  with device memory of its own), ``num_io_tensors``, ``get_tensor_name``, ``get_tensor_dtype``
* ``latest/_static/python-api/infer/FoundationalTypes/DataType.html``: ``float32``
* ``11.4.0/_static/python-api/infer/Core/ExecutionContext.html``: ``set_input_shape``,
  ``set_tensor_address``, ``execute_async_v3``; that they return whether they succeeded, and that
  addresses are multiples of 256: ``include/NvInferRuntime.h``
* ``latest/api/migration/tensorrt-10x-to-11x-python-api-reference.html``: what 11 removed, nothing
  of the above

CUDA graphs: one launch on the same context after its shapes are set, before the one that is
captured, as in ``demo/Diffusion/demo_diffusion/engine.py`` and
``samples/common/sampleInference.cpp`` there (v11.1).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddo_modulus.data.store import replacing
from ddo_modulus.diffusion.package import Package
from ddo_modulus.engines.folder import Contract, find
from ddo_modulus.engines.options import EngineOptions
from ddo_modulus.engines.ort import input_sizes
from ddo_modulus.engines.runtime import DENOISER, VJP, GraphEngine
from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    import tensorrt

#: Major versions that the calls here are documented for.
VERSIONS = (10, 11)

# Scratch memory that a plan may use.
_WORKSPACE = 4 << 30

# CUDA graphs that are kept for each graph: one for each size of the batch.
_CAPTURES = 4

# Addresses that TensorRT takes are multiples of this; those that torch allocates on a GPU are.
_ALIGNMENT = 256


@dataclass(frozen=True)
class PlanRecord:
    """What a plan was built from and for; it serves nothing else.

    Attributes:
        graph: SHA-256 of the graph and its constants.
        tensorrt: Version.
        gpu: Name of the device.
        capability: Its compute capability.
        batch: Largest batch.
    """

    graph: str
    tensorrt: str
    gpu: str
    capability: str
    batch: int

    def outdated(self, found: dict[str, Any] | None) -> str | None:
        """Why a plan with another record cannot be used; None if it can.

        Args:
            found: Record beside the plan, if there is one.
        """
        if found is None:
            return "there is none yet"
        differences = [
            f"{name} is {wanted}, not {found.get(name)}"
            for name, wanted in asdict(self).items()
            if found.get(name) != wanted
        ]
        return ", ".join(differences) or None


def plan_path(folder: Path, graph: str, record: PlanRecord) -> Path:
    """Where a plan is kept: by graph, GPU and largest batch; machines may share a folder."""
    gpu = re.sub(r"[^a-z0-9]+", "-", record.gpu.lower()).strip("-")
    return folder / "plans" / f"{graph}-{gpu}-b{record.batch}.plan"


def read_record(plan: Path) -> dict[str, Any] | None:
    """The record beside a plan; None if it or the plan is missing or damaged."""
    try:
        record = json.loads(plan.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return record if plan.is_file() and isinstance(record, dict) else None


def digest(graph: Path) -> str:
    """SHA-256 of a graph, and of the file of its constants if they are apart."""
    total = hashlib.sha256()
    for path in (graph, graph.with_name(f"{graph.name}.data")):
        if path.is_file():
            with path.open("rb") as file:
                while piece := file.read(1 << 24):
                    total.update(piece)
    return total.hexdigest()


def require_tensorrt(device: str) -> ModuleType:
    """The ``tensorrt`` module.

    Raises:
        InputError: If it is missing, of an unknown version, or the device is no GPU.
    """
    nearest = "torch" if find_spec("onnxruntime") is None else "onnxruntime"
    if find_spec("tensorrt") is None:
        raise InputError(
            "engine=tensorrt needs TensorRT and an NVIDIA GPU: pip install "
            f"'ddo-modulus[tensorrt]'; engine={nearest} works without"
        )
    if device != "cuda":
        raise InputError(f"engine=tensorrt needs device=cuda; engine={nearest} works on a CPU")
    import tensorrt

    if int(tensorrt.__version__.split(".")[0]) not in VERSIONS:
        raise InputError(
            f"engine=tensorrt is written for TensorRT {' and '.join(map(str, VERSIONS))}, not "
            f"{tensorrt.__version__}; engine={nearest} works without"
        )
    return tensorrt


@cache
def _logger(trt: ModuleType) -> tensorrt.Logger:
    """The logger of the process: TensorRT holds on to the first, and ignores later ones."""
    return trt.Logger(trt.Logger.WARNING)


def _timings(config: tensorrt.IBuilderConfig, file: Path) -> tensorrt.ITimingCache:
    """Timings of earlier builds for a build to use and add to; none if the file cannot serve."""
    timings = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def build_plan(
    trt: ModuleType, graph: Path, sizes: dict[str, tuple[int, ...]], batch: int, timed: Path
) -> bytes:
    """Build a plan of a graph.

    Args:
        trt: The ``tensorrt`` module.
        graph: ONNX file.
        sizes: Of each input, for one state.
        batch: Largest batch, which it is optimised for.
        timed: File of timings, which spare a second build most of its time.

    Raises:
        InputError: If TensorRT does not take the graph, with its messages.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    strongly = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise InputError(f"TensorRT {trt.__version__} cannot read {graph}: {'; '.join(errors)}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for name, size in sizes.items():
        profile.set_shape(name, (1, *size), (batch, *size), (batch, *size))
    config.add_optimization_profile(profile)
    timings = _timings(config, timed)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise InputError(
            f"TensorRT {trt.__version__} built no plan of {graph}; its log above says why. "
            "A smaller batch= needs less memory"
        )
    with replacing(timed, overwrite=True) as new:
        new.write_bytes(bytes(timings.serialize()))
    return bytes(plan)


class TensorRTEngine(GraphEngine):
    """A denoiser in TensorRT.

    Args:
        package: The prior, on a GPU.
        folder: Of the graphs.
        contract: Theirs.
        batch: Largest number of states at once.
        cuda_graphs: Whether launches are captured and replayed. Otherwise they are best made on
            another stream than the default one, for which TensorRT waits for the whole device.
        report: Called with a line about a plan that is built, which takes minutes.

    Raises:
        InputError: If TensorRT is missing, or cannot be used.
        RuntimeError: If a launch fails, or is to be captured in a CUDA graph of somebody else's.
    """

    def __init__(
        self,
        package: Package,
        folder: Path,
        contract: Contract,
        batch: int,
        *,
        cuda_graphs: bool = True,
        report: Callable[[str], None] = print,
    ) -> None:
        super().__init__(package, contract, batch)
        trt = self._trt = require_tensorrt(self.device.type)
        self.cuda_graphs = cuda_graphs
        self._engines: dict[str, Any] = {}
        self._contexts: dict[str, Any] = {}
        self._captures: dict[str, OrderedDict[int, _Capture]] = {}
        with torch.cuda.device(self.device):
            try:
                self._runtime = trt.Runtime(_logger(trt))
            except TypeError as error:  # how the bindings report a null pointer
                raise InputError(
                    f"TensorRT {trt.__version__} cannot use this GPU or its driver; its log above "
                    "says why"
                ) from error
            for graph in (DENOISER, VJP):
                self._engines[graph] = self._load(folder, graph, batch, report)
                self._captures[graph] = OrderedDict()
                if not cuda_graphs:  # a context has memory of its own, so none is made in vain
                    self._contexts[graph] = self._context(graph)

    @classmethod
    def of(cls, package: Package, options: EngineOptions) -> TensorRTEngine:
        """The engine of a package; graphs and plans are made first if they are not there."""
        require_tensorrt(torch.device(package.operator.device).type)  # before graphs are exported
        folder, contract = find(package, options)
        return cls(package, folder, contract, options.batch, report=options.report)

    def _load(
        self, folder: Path, graph: str, batch: int, report: Callable[[str], None]
    ) -> tensorrt.ICudaEngine:
        trt, source = self._trt, folder / f"{graph}.onnx"
        properties = torch.cuda.get_device_properties(self.device)
        record = PlanRecord(
            digest(source),
            trt.__version__,
            properties.name,
            f"{properties.major}.{properties.minor}",
            batch,
        )
        path = plan_path(folder, graph, record)
        reason = record.outdated(read_record(path))
        engine = None
        if reason is None:
            engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            reason = None if engine is not None else "it cannot be read"
        if engine is None:
            report(f"building the TensorRT plan {path}: {reason} (minutes, once)")
            timed = path.parent / f"timings-{path.stem.split('-', 1)[1]}-{trt.__version__}.cache"
            plan = build_plan(trt, source, input_sizes(self.contract, graph), batch, timed)
            path.with_suffix(".json").unlink(missing_ok=True)  # no old record beside a new plan
            with replacing(path, overwrite=True) as new:
                new.write_bytes(plan)
            path.with_suffix(".json").write_text(json.dumps(asdict(record), indent=2) + "\n")
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise InputError(
                f"TensorRT {trt.__version__} cannot load the plan {path} that it built; its log "
                "above says why. A smaller batch= needs less memory"
            )
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        if any(engine.get_tensor_dtype(name) != trt.float32 for name in names):
            raise InputError(f"{source} takes or gives something else than fp32; export it again")
        return engine

    def _context(self, graph: str) -> tensorrt.IExecutionContext:
        context = self._engines[graph].create_execution_context()
        if context is None:
            raise RuntimeError(
                "TensorRT made no context; its log above says why. A smaller batch= needs less "
                "memory"
            )
        return context

    def run(self, graph: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        """See :class:`GraphEngine`."""
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a launch of TensorRT can be captured only after another one of the same size, "
                    "in a context of its own; the engine does so itself"
                )
            if not self.cuda_graphs:
                context, outputs = self._contexts[graph], self._blank(graph, inputs)
                ready = {
                    name: tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
                    for name, tensor in inputs.items()
                }
                self._bind(context, ready, outputs)
                self._launch(context)
                return list(outputs.values())
            kept, size = self._captures[graph], len(inputs["x"])
            if size in kept:
                kept.move_to_end(size)
            else:
                kept[size] = self._capture(graph, inputs)
                if len(kept) > _CAPTURES:
                    kept.popitem(last=False)
            return kept[size](inputs)

    def _blank(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        names = ("denoised",) if graph == DENOISER else ("denoised", "product")
        return {name: torch.empty_like(inputs["x"]) for name in names}

    def _bind(
        self,
        context: tensorrt.IExecutionContext,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
    ) -> None:
        """Have the next launches work on the memory of the tensors."""
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(f"TensorRT refused {name} of shape {tuple(tensor.shape)}")
        for name, tensor in {**inputs, **outputs}.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise RuntimeError(f"TensorRT knows no tensor {name}; export the graphs again")

    def _launch(self, context: tensorrt.IExecutionContext) -> None:
        """Launch on the current stream."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if not context.execute_async_v3(stream_handle=stream):
            raise RuntimeError("TensorRT could not launch the plan; its log above says why")

    def _capture(self, graph: str, inputs: dict[str, Tensor]) -> _Capture:
        """Launch once, for what a new shape sets off, and once more into a CUDA graph."""
        context = self._context(graph)
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs = self._blank(graph, held)
        self._bind(context, held, outputs)
        side, main = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self._launch(context)
        main.wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        # Other threads go on with calls that would spoil a capture of the whole process.
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            self._launch(context)
        return _Capture(captured, held, outputs, context)


@dataclass(frozen=True)
class _Capture:
    """A launch that is replayed on memory of its own.

    Attributes:
        graph: The CUDA graph.
        inputs: What it reads.
        outputs: What it writes.
        context: Kept, since the graph uses its memory.
    """

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    context: tensorrt.IExecutionContext

    def __call__(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return [tensor.clone() for tensor in self.outputs.values()]
