# SPDX-License-Identifier: Apache-2.0
"""Denoisers in inference engines: ONNX graphs, and what runs them.

Guidance needs the denoiser and its vector-Jacobian product, so both are exported, and the whole
guided sampler runs in the engine (docs/export.md).
"""

from ddo_modulus.engines.engines import (
    ENGINES,
    EngineOptions,
    Precision,
    TorchEngine,
    open_engine,
    pick_precision,
)

__all__ = [
    "ENGINES",
    "EngineOptions",
    "Precision",
    "TorchEngine",
    "open_engine",
    "pick_precision",
]
