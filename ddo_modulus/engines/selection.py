# SPDX-License-Identifier: Apache-2.0
"""Engines by name.

An engine is a prior (:class:`.Prior`) with a derivative of its own. Each has requirements of its
own, so its module is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.engines.options import EngineOptions
from ddo_modulus.engines.torch_engine import TorchEngine
from ddo_modulus.errors import InputError


def _compiled(package: Package, options: EngineOptions) -> Prior:
    from ddo_modulus.engines.compiled import CompiledEngine

    return CompiledEngine.of(package, options)


def _onnxruntime(package: Package, options: EngineOptions) -> Prior:
    from ddo_modulus.engines.ort import ONNXRuntimeEngine

    return ONNXRuntimeEngine.of(package, options)


def _tensorrt(package: Package, options: EngineOptions) -> Prior:
    from ddo_modulus.engines.trt import TensorRTEngine

    return TensorRTEngine.of(package, options)


#: What makes the engine of a package, by the name of the engine.
ENGINES: dict[str, Callable[[Package, EngineOptions], Prior]] = {
    "torch": TorchEngine.of,
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
}


def open_engine(name: str, package: Package, options: EngineOptions | None = None) -> Prior:
    """An engine for the operator of a package, on the device of the package.

    Args:
        name: One of :data:`ENGINES`.
        package: The prior.
        options: How the engine is made; defaults if None.

    Raises:
        InputError: If there is no such engine, or it cannot be used here.
    """
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    return ENGINES[name](package, EngineOptions() if options is None else options)
