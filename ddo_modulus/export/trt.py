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

Written from NVIDIA's documentation, page by page (under
https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/):

* ``infer/Core/Logger.html``: ``Logger``
* ``infer/Core/Builder.html``: ``Builder``, ``create_network`` and
  ``NetworkDefinitionCreationFlag.STRONGLY_TYPED`` (needed in 10, accepted and ignored in 11),
  ``create_builder_config``, ``create_optimization_profile``, ``build_serialized_network``
* ``infer/Core/BuilderConfig.html``: ``set_memory_pool_limit``, ``MemoryPoolType.WORKSPACE``,
  ``clear_flag``, ``BuilderFlag.TF32``, ``add_optimization_profile``, ``create_timing_cache``,
  ``set_timing_cache``, ``get_timing_cache``
* ``infer/Core/OptimizationProfile.html``: ``set_shape``
* ``infer/Core/TimingCache.html``: ``serialize``
* ``parsers/Onnx/pyOnnx.html``: ``OnnxParser``, ``parse_from_file``, ``num_errors``, ``get_error``
* ``infer/Core/Runtime.html``: ``Runtime``, ``deserialize_cuda_engine``
* ``infer/Core/Engine.html``: ``create_execution_context``, ``num_io_tensors``,
  ``get_tensor_name``, ``get_tensor_dtype``
* ``infer/Core/ExecutionContext.html``: ``set_input_shape``, ``set_tensor_address``,
  ``execute_async_v3``

What 11 removed: ``api/migration/tensorrt-10x-to-11x-python-api-reference.html`` (nothing of the
above). Timing caches: ``performance/builder-performance.html``. Capture: a call of
``execute_async_v3`` before it takes care of what a new shape sets off (same folder as the first).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddo_modulus.data.store import replacing
from ddo_modulus.errors import InputError
from ddo_modulus.export.engines import EngineOptions
from ddo_modulus.export.folder import Contract, find
from ddo_modulus.export.ort import input_sizes
from ddo_modulus.export.runtime import DENOISER, VJP, GraphEngine
from ddo_modulus.package import Package

if TYPE_CHECKING:
    import tensorrt

#: Major versions that the calls here are documented for.
VERSIONS = (10, 11)

# Scratch memory that a plan may use.
_WORKSPACE = 4 << 30

# CUDA graphs that are kept for each graph: one for each size of the batch.
_CAPTURES = 4


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


def build_plan(
    trt: ModuleType, graph: Path, sizes: dict[str, tuple[int, ...]], batch: int, cache: Path
) -> bytes:
    """Build a plan of a graph.

    Args:
        trt: The ``tensorrt`` module.
        graph: ONNX file.
        sizes: Of each input, for one state.
        batch: Largest batch, which it is optimised for.
        cache: File of timings, which spare a second build most of its time.

    Raises:
        InputError: If TensorRT does not take the graph; its own words are told.
    """
    logger = trt.Logger(trt.Logger.WARNING)
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
    timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
    config.set_timing_cache(timings, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise InputError(
            f"TensorRT {trt.__version__} built no plan of {graph}; its log above tells why. "
            "A smaller batch= needs less memory"
        )
    with replacing(cache, overwrite=True) as new:
        new.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


class TensorRTEngine(GraphEngine):
    """A denoiser in TensorRT.

    Args:
        package: The prior, on a GPU.
        folder: Of the graphs.
        contract: Theirs.
        batch: Largest number of states at once.
        cuda_graphs: Whether launches are captured and replayed.
        tell: Called with a line about a plan that is built, which takes minutes.

    Raises:
        InputError: If TensorRT is missing, or cannot be used.
    """

    def __init__(
        self,
        package: Package,
        folder: Path,
        contract: Contract,
        batch: int,
        *,
        cuda_graphs: bool = True,
        tell: Callable[[str], None] = print,
    ) -> None:
        super().__init__(package, contract, batch)
        self._trt = require_tensorrt(self.device.type)
        self.cuda_graphs = cuda_graphs
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
        self._engines: dict[str, Any] = {}
        self._contexts: dict[str, Any] = {}
        self._captures: dict[str, OrderedDict[int, _Capture]] = {}
        with torch.cuda.device(self.device):
            for graph in (DENOISER, VJP):
                self._engines[graph] = self._load(folder, graph, batch, tell)
                self._contexts[graph] = self._engines[graph].create_execution_context()
                self._captures[graph] = OrderedDict()

    @classmethod
    def of(cls, package: Package, options: EngineOptions) -> TensorRTEngine:
        """The engine of a package; graphs and plans are made first if they are not there."""
        require_tensorrt(torch.device(package.operator.device).type)  # before graphs are exported
        folder, contract = find(package, options)
        return cls(package, folder, contract, options.batch, tell=options.tell)

    def _load(
        self, folder: Path, graph: str, batch: int, tell: Callable[[str], None]
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
            tell(f"building the TensorRT plan {path}: {reason} (minutes, once)")
            cache = path.parent / f"timings-{path.stem.split('-', 1)[1]}-{trt.__version__}.cache"
            plan = build_plan(trt, source, input_sizes(self.contract, graph), batch, cache)
            path.with_suffix(".json").unlink(missing_ok=True)  # no old record beside a new plan
            with replacing(path, overwrite=True) as new:
                new.write_bytes(plan)
            path.with_suffix(".json").write_text(json.dumps(asdict(record), indent=2) + "\n")
            engine = self._runtime.deserialize_cuda_engine(plan)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        if any(engine.get_tensor_dtype(name) != trt.float32 for name in names):
            raise InputError(f"{source} takes or gives something else than fp32; export it again")
        return engine

    def run(self, graph: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        """See :class:`GraphEngine`."""
        with torch.cuda.device(self.device):
            if not self.cuda_graphs or torch.cuda.is_current_stream_capturing():
                outputs = self._blank(graph, inputs)
                self._enqueue(self._contexts[graph], inputs, outputs)
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

    def _enqueue(
        self,
        context: tensorrt.IExecutionContext,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
    ) -> None:
        """Launch on the current stream, on the memory of the tensors."""
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(f"TensorRT refused {name} of shape {tuple(tensor.shape)}")
        for name, tensor in {**inputs, **outputs}.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise RuntimeError(f"TensorRT knows no tensor {name}; export the graphs again")
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if not context.execute_async_v3(stream_handle=stream):
            raise RuntimeError("TensorRT could not launch the plan; its log above tells why")

    def _capture(self, graph: str, inputs: dict[str, Tensor]) -> _Capture:
        """Launch once, for what a new shape sets off, and once more into a CUDA graph."""
        context = self._engines[graph].create_execution_context()
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs = self._blank(graph, held)
        side, main = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self._enqueue(context, held, outputs)
        main.wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            self._enqueue(context, held, outputs)
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
