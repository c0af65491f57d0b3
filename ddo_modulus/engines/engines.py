# SPDX-License-Identifier: Apache-2.0
"""Engines by name: what evaluates a denoiser and its vector-Jacobian product.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, cast, get_args

from jaxtyping import Float
from torch import Tensor

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.errors import InputError
from ddo_modulus.fields.derivative import Differentiable
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is made.

    Attributes:
        folder: Of exported graphs (``ddo export``); None for one in the user's cache, where they
            are exported to when they are missing.
        precision: Of the network, compiled or in graphs that have to be exported.
        shape: Grid ``(H, W)`` of the states; the package's if None.
        batch: Largest number of states computed at once.
        tell: Called with a line about what takes time, or was chosen.
    """

    folder: Path | None = None
    precision: Precision = "fp32"
    shape: tuple[int, int] | None = None
    batch: int = 256
    tell: Callable[[str], None] = print


def pick_precision(name: object) -> Precision:
    """Precision of a network by name.

    Raises:
        InputError: If it is unknown.
    """
    if name not in get_args(Precision):
        raise InputError(f"precision={name} must be one of {', '.join(get_args(Precision))}")
    return cast(Precision, name)


#: Engines by name: where the function ``(package, options) -> engine`` is found. Looked up when it
#: is asked for, since each has its own requirements.
ENGINES: dict[str, str] = {
    "torch": "ddo_modulus.engines.engines:TorchEngine.of",
    "compile": "ddo_modulus.engines.compiled:CompiledEngine.of",
    "onnxruntime": "ddo_modulus.engines.ort:ONNXRuntimeEngine.of",
    "tensorrt": "ddo_modulus.engines.trt:TensorRTEngine.of",
}


def open_engine(name: str, package: Package, options: EngineOptions | None = None) -> Prior:
    """An engine for the denoiser of a package, on the device of the package.

    Args:
        name: One of :data:`ENGINES`.
        package: The prior.
        options: See there.

    Raises:
        InputError: If there is no such engine, or it cannot be used here.
    """
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    module, _, path = ENGINES[name].partition(":")
    make = import_module(module)
    for attribute in path.split("."):
        make = getattr(make, attribute)
    return make(package, EngineOptions() if options is None else options)  # type: ignore[operator]


class TorchEngine(Differentiable):
    """The operator itself, with automatic differentiation.

    Args:
        operator: The denoiser.
        shape: Grid ``(H, W)`` that :attr:`noise` and :attr:`linear` are of; its own if None.
    """

    def __init__(self, operator: DiffusionOperator, shape: tuple[int, int] | None = None) -> None:
        self.operator = operator
        self.shape = operator.basis.shape if shape is None else shape

    @classmethod
    def of(cls, package: Package, options: EngineOptions) -> TorchEngine:
        """The engine of a package."""
        return cls(package.operator, options.shape)

    @property
    def noise(self) -> GaussianField:
        """Noise field on the grid."""
        return self.operator.noise.at(self.shape)

    @property
    def linear(self) -> GaussianDenoiser:
        """Gaussian part on the grid."""
        return self.operator.linear.at(self.shape)

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states."""
        return self.operator(x, sigma, condition)
