# SPDX-License-Identifier: Apache-2.0
"""Engines: implementations of a package's prior in torch, compiled, or as exported graphs.

Guidance needs a denoiser and its vector-Jacobian product. A folder of exported graphs has one graph
for each, so that guided sampling runs in the inference engine (docs/export.md).
"""

from ddo_modulus.engines.options import EngineOptions, Precision, pick_precision
from ddo_modulus.engines.selection import ENGINES, open_engine
from ddo_modulus.engines.torch_engine import TorchEngine

__all__ = [
    "ENGINES",
    "EngineOptions",
    "Precision",
    "TorchEngine",
    "open_engine",
    "pick_precision",
]
