# SPDX-License-Identifier: Apache-2.0
"""Exported graphs in TensorRT (10 and 11), through its Python API.

A plan is built from each graph on the machine that runs it, for batches up to a largest size. It is
stored in ``plans/`` beside the graphs, with a record of the TensorRT version, the GPU and the
graph, and rebuilt when one of these differs. Networks are strongly typed: every tensor has the type
that it has in the graph, and TF32 is off. Plans run on torch's current stream and on the memory of
torch tensors. If a size of the batch is used again, as in sampling, the launch is captured in a
CUDA graph and replayed.

A plan is a program for the GPU, so use only plans that you have built. This module never loads a
plan from a package.

The module was written from NVIDIA's documentation and has **not been run**. Each call was checked
in the bindings of https://github.com/NVIDIA/TensorRT, from which the pages of the Python API are
generated: ``python/src/infer/pyCore.cpp`` and ``python/src/parsers/pyOnnx.cpp`` for names,
arguments and lifetimes, ``python/docstrings/`` for documented behaviour, ``include/*.h`` for what
is documented only for C++. They were read in full at v10.13.0 (b8db91e) and v11.1 (82d1dca);
arguments are the same at v10.0.0, v10.13.3, v10.16 and v11.0. The pages are under
https://docs.nvidia.com/deeplearning/tensorrt/:

* ``latest/_static/python-api/infer/Core/Logger.html``: ``Logger``, ``Logger.WARNING``; it must
  outlive every object created with it
* ``11.0.0/_static/python-api/infer/Core/Builder.html``: ``Builder``, ``create_network``,
  ``NetworkDefinitionCreationFlag.STRONGLY_TYPED`` (needed in 10; in 11 of another value, and
  ignored), ``create_builder_config``, ``create_optimization_profile``,
  ``build_serialized_network`` (``IHostMemory``, a buffer; None if it failed)
* ``latest/_static/python-api/infer/Core/BuilderConfig.html``: ``set_memory_pool_limit``,
  ``MemoryPoolType.WORKSPACE``, ``clear_flag``, ``BuilderFlag.TF32`` (on by default),
  ``add_optimization_profile``, ``create_timing_cache`` (``b""`` makes an empty one),
  ``set_timing_cache`` (False for a cache of another device)
* ``latest/_static/python-api/infer/Core/OptimizationProfile.html``: ``set_shape``
* ``latest/_static/python-api/infer/Core/TimingCache.html``: ``serialize``; the use of caches, which
  are valid for one device and version, is in ``10.16.1/performance/builder-performance.html``
* ``latest/_static/python-api/parsers/Onnx/pyOnnx.html``: ``OnnxParser``, ``parse_from_file`` (finds
  files of constants by the path), ``num_errors``, ``get_error``
* ``python/docstrings/infer/pyCoreDoc.h``, ``RuntimeDoc`` (its page in 10 or 11 was not seen):
  ``Runtime``, ``deserialize_cuda_engine`` (None for what it cannot read)
* ``11.0.0/_static/python-api/infer/Core/Engine.html``: ``create_execution_context`` (on profile 0,
  with its own device memory), ``num_io_tensors``, ``get_tensor_name``, ``get_tensor_dtype``
* ``latest/_static/python-api/infer/FoundationalTypes/DataType.html``: ``float32``
* ``11.4.0/_static/python-api/infer/Core/ExecutionContext.html``: ``set_input_shape``,
  ``set_tensor_address``, ``execute_async_v3``; their return values (success), and that addresses
  must be multiples of 256, are documented in ``include/NvInferRuntime.h``
* ``latest/api/migration/tensorrt-10x-to-11x-python-api-reference.html``: what was removed in 11,
  which is none of the above

CUDA graphs: after the shapes of a context are set, one launch precedes the launch that is captured,
as in ``demo/Diffusion/demo_diffusion/engine.py`` and
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

from ddo_modulus.data.output import replacing
from ddo_modulus.diffusion.package import Package
from ddo_modulus.engines.folder import Contract, find
from ddo_modulus.engines.options import EngineOptions
from ddo_modulus.engines.ort import input_sizes
from ddo_modulus.engines.runtime import DENOISER, VJP, GraphEngine
from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    import tensorrt

#: Supported major versions of TensorRT.
VERSIONS = (10, 11)

# Scratch memory that a plan may use, bytes.
_WORKSPACE = 4 << 30

# Number of CUDA graphs kept for each ONNX graph: one for each size of the batch.
_CAPTURES = 4

# Addresses must be multiples of this, as those of memory are that torch allocates on a GPU.
_ALIGNMENT = 256


@dataclass(frozen=True)
class PlanRecord:
    """What a plan was built from and for; it cannot be used for anything else.

    Attributes:
        graph: SHA-256 of the graph and its constants.
        tensorrt: Version of TensorRT.
        gpu: Name of the GPU.
        capability: Compute capability of the GPU.
        batch: Largest size of the batch.
    """

    graph: str
    tensorrt: str
    gpu: str
    capability: str
    batch: int

    def outdated(self, found: dict[str, Any] | None) -> str | None:
        """Reason why a plan cannot be used; None if it can.

        Args:
            found: Record stored beside the plan; None if there is none.
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
    """Path of a plan, by graph, GPU and largest batch, so that machines can share a folder."""
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
    """SHA-256 of a graph and of the separate file of its constants, if there is one."""
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
        InputError: If it is missing, of an unsupported version, or the device is not a GPU.
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
    """The logger of the process: TensorRT keeps the first one, and ignores later ones."""
    return trt.Logger(trt.Logger.WARNING)


def _timings(config: tensorrt.IBuilderConfig, file: Path) -> tensorrt.ITimingCache:
    """Timing cache of a build, with the timings of earlier builds if the file can be used."""
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
        sizes: Shape of each input, for one state.
        batch: Largest size of the batch; the plan is optimised for it.
        timed: File of the timing cache, which makes later builds much faster.

    Raises:
        InputError: If TensorRT cannot read the graph or build a plan, with its messages.
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
        folder: Folder of the graphs.
        contract: Contract of the graphs.
        batch: Largest number of states computed at once.
        cuda_graphs: Whether launches are captured and replayed. If not, use another stream than
            the default one, on which TensorRT synchronises the whole device.
        report: Called with a line when a plan is built, which takes minutes.

    Raises:
        InputError: If TensorRT is missing, or cannot be used.
        RuntimeError: If a launch fails, or the caller is capturing a CUDA graph.
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
            except TypeError as error:  # the bindings raise this for a null pointer
                raise InputError(
                    f"TensorRT {trt.__version__} cannot use this GPU or its driver; its log above "
                    "says why"
                ) from error
            for graph in (DENOISER, VJP):
                self._engines[graph] = self._load(folder, graph, batch, report)
                self._captures[graph] = OrderedDict()
                if not cuda_graphs:  # captures have their own contexts, each with its own memory
                    self._contexts[graph] = self._context(graph)

    @classmethod
    def of(cls, package: Package, options: EngineOptions) -> TensorRTEngine:
        """The engine of a package; graphs and plans are made first if they do not exist."""
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
            raise InputError(f"{source} has inputs or outputs not in fp32; export it again")
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
        """Let the next launches read and write the memory of these tensors."""
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(f"TensorRT refused {name} of shape {tuple(tensor.shape)}")
        for name, tensor in {**inputs, **outputs}.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise RuntimeError(f"the plan has no tensor {name}; export the graphs again")

    def _launch(self, context: tensorrt.IExecutionContext) -> None:
        """Launch on the current stream."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if not context.execute_async_v3(stream_handle=stream):
            raise RuntimeError("TensorRT could not launch the plan; its log above says why")

    def _capture(self, graph: str, inputs: dict[str, Tensor]) -> _Capture:
        """Launch once, for the initialisation of a new shape, then capture a second launch."""
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
        # Calls of other threads would invalidate a capture of the whole process.
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            self._launch(context)
        return _Capture(captured, held, outputs, context)


@dataclass(frozen=True)
class _Capture:
    """A captured launch, replayed on its own memory.

    Attributes:
        graph: The CUDA graph.
        inputs: Tensors that it reads.
        outputs: Tensors that it writes.
        context: Kept alive, since the graph uses its memory.
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
