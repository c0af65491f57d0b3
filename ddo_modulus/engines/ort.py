# SPDX-License-Identifier: Apache-2.0
"""Exported graphs in ONNX Runtime, with its TensorRT, CUDA and CPU execution providers.

Inputs and outputs are torch tensors, bound by their addresses without a copy. On a GPU the
providers compute on a separate stream, which is synchronised with torch's before and after a run.

Documentation: https://onnxruntime.ai/docs/api/python/api_summary.html (``InferenceSession``,
``IOBinding.bind_input``, ``run_with_iobinding``),
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html (``device_id``,
``user_compute_stream``, ``use_tf32``) and
https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
(``trt_profile_*_shapes``, ``trt_engine_cache_enable``, ``trt_timing_cache_enable``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddo_modulus.diffusion.package import Package
from ddo_modulus.engines.folder import Contract, find
from ddo_modulus.engines.options import EngineOptions
from ddo_modulus.engines.runtime import DENOISER, VJP, GraphEngine
from ddo_modulus.errors import InputError

TENSORRT, CUDA, CPU = (f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU"))


class ONNXRuntimeEngine(GraphEngine):
    """A denoiser in ONNX Runtime.

    Args:
        package: The prior; the engine computes on its device.
        folder: Folder of the graphs.
        contract: Contract of the graphs.
        batch: Largest number of states computed at once.

    Attributes:
        providers: Execution providers in use, in order of preference.

    Raises:
        InputError: If ONNX Runtime is missing, or none of its providers can run the graphs on the
            device.
    """

    def __init__(self, package: Package, folder: Path, contract: Contract, batch: int) -> None:
        super().__init__(package, contract, batch)
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(
                "engine=onnxruntime needs ONNX Runtime: pip install 'ddo-modulus[export]' (on a "
                "GPU: pip install onnxruntime-gpu); engine=torch works without"
            ) from error
        available = onnxruntime.get_available_providers()
        chosen = choose_providers(available, self.device.type)
        # Not torch's default stream: its handle is zero, which ONNX Runtime takes for no stream.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        stream = 0 if self._stream is None else self._stream.cuda_stream
        if TENSORRT in chosen:
            (folder / "plans").mkdir(exist_ok=True)
        self._sessions = {}
        for graph in (DENOISER, VJP):
            options = provider_options(
                chosen, self.device.index or 0, stream, _profiles(contract, graph, batch), folder
            )
            settings = onnxruntime.SessionOptions()
            settings.log_severity_level = 3
            if self.device.type == "cpu":  # as many threads as torch uses
                settings.intra_op_num_threads = torch.get_num_threads()
            try:
                self._sessions[graph] = onnxruntime.InferenceSession(
                    folder / f"{graph}.onnx", settings, providers=options
                )
            except Exception as error:  # the exceptions of ONNX Runtime are not public
                reason = str(error).split("\n")[0]
                raise InputError(
                    f"ONNX Runtime ({', '.join(chosen)}) cannot run {folder / graph}.onnx: "
                    f"{reason}. Graphs in {contract.precision} may need another provider; "
                    "precision=fp32 runs on all of them, and engine=torch needs none"
                ) from error
        self.providers: list[str] = self._sessions[DENOISER].get_providers()

    @classmethod
    def of(cls, package: Package, options: EngineOptions) -> ONNXRuntimeEngine:
        """The engine of a package; its graphs are exported first if they do not exist."""
        folder, contract = find(package, options)
        engine = cls(package, folder, contract, options.batch)
        options.report(f"engine: ONNX Runtime, {contract.precision}, {', '.join(engine.providers)}")
        return engine

    def run(self, graph: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        """See :class:`GraphEngine`."""
        session, x = self._sessions[graph], inputs["x"]
        binding = session.io_binding()
        outputs = [torch.empty_like(x) for _ in session.get_outputs()]
        place = self.device.type, self.device.index or 0, np.float32
        for name, tensor in inputs.items():
            binding.bind_input(name, *place, tuple(tensor.shape), tensor.data_ptr())
        for node, tensor in zip(session.get_outputs(), outputs, strict=True):
            binding.bind_output(node.name, *place, tuple(tensor.shape), tensor.data_ptr())
        if self._stream is None:
            session.run_with_iobinding(binding)
            return outputs
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        session.run_with_iobinding(binding)
        current.wait_stream(self._stream)
        return outputs


def choose_providers(available: Sequence[str], device: str) -> list[str]:
    """Execution providers for a device, the fastest first.

    Raises:
        InputError: If none of them is available.
    """
    wanted = [TENSORRT, CUDA, CPU] if device == "cuda" else [CPU]
    chosen = [name for name in wanted if name in available]
    if device == "cuda" and CUDA not in chosen:
        raise InputError(
            f"this ONNX Runtime cannot use the GPU (it has {', '.join(available)}): pip install "
            "onnxruntime-gpu in its place, or take device=cpu, or engine=torch"
        )
    return chosen


def provider_options(
    chosen: Sequence[str],
    device: int,
    stream: int,
    profiles: dict[str, str],
    folder: Path,
) -> list[tuple[str, dict[str, Any]]]:
    """Options of each provider: device, stream, no TF32, and the folder of plans."""
    on_device = {"device_id": device, "user_compute_stream": str(stream)}
    options: dict[str, dict[str, Any]] = {
        TENSORRT: {
            **on_device,
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder / "plans"),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder / "plans"),
            **profiles,
        },
        CUDA: {**on_device, "use_tf32": 0},
        CPU: {},
    }
    return [(name, options[name]) for name in chosen]


def _profiles(contract: Contract, graph: str, batch: int) -> dict[str, str]:
    """Shapes that TensorRT optimises for, in the format of its provider."""
    sizes = input_sizes(contract, graph)

    def all_of(count: int) -> str:
        return ",".join(f"{n}:{'x'.join(map(str, (count, *s)))}" for n, s in sizes.items())

    return {
        "trt_profile_min_shapes": all_of(1),
        "trt_profile_opt_shapes": all_of(batch),
        "trt_profile_max_shapes": all_of(batch),
    }


def input_sizes(contract: Contract, graph: str) -> dict[str, tuple[int, ...]]:
    """Size of each input of a graph, for one state."""
    state = (contract.channels, *contract.shape)
    sizes: dict[str, tuple[int, ...]] = {"x": state, "sigma": ()}
    if graph == VJP:
        sizes["v"] = state
    if contract.condition is not None:
        sizes["condition"] = tuple(contract.condition)
    return sizes
