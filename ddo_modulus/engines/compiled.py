# SPDX-License-Identifier: Apache-2.0
"""PyTorch, compiled: networks in half precision, whole posteriors as CUDA graphs.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.

The network runs in a few kernels of our own (:mod:`.fused`), or is compiled by torch part by part,
with its weights in the precision that it computes in. The linear part around it stays in single
precision. A posterior on top of the engine can be recorded as one CUDA graph
(:meth:`CompiledEngine.captured`), with the derivatives that guidance takes.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddo_modulus.compat import repeatable_backward
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.engines.capture import Captured
from ddo_modulus.engines.options import EngineOptions, Precision
from ddo_modulus.engines.torch_engine import TorchEngine
from ddo_modulus.errors import InputError
from ddo_modulus.nn.stencil import LocalLinear

if TYPE_CHECKING:
    from ddo_modulus.engines.fused import FusedOperator

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CompiledEngine(TorchEngine):
    """An operator with its network compiled and in the precision asked for.

    The operator itself is left unchanged.

    Args:
        operator: A trained operator, on the device to compute on.
        precision: Precision of the network's products: ``"fp32"``, ``"bf16"`` or ``"fp16"``. None:
            bf16 on a GPU, fp32 elsewhere.
        compile: Whether to compile the network, or a mode of :func:`torch.compile`.
        fused: Whether the network runs in our fused kernels, which must support it
            (:func:`.fits`). None: in half precision on a GPU that they are tuned for (Hopper,
            Blackwell), if ``compile`` is True.
        graphs: Whether :meth:`captured` records CUDA graphs; None where there is a GPU.
        shape: Grid ``(H, W)`` that :attr:`noise` and :attr:`linear` are of; its own if None.

    Raises:
        InputError: On another precision, graphs without a GPU, or fused kernels that do not fit.
    """

    def __init__(
        self,
        operator: DiffusionOperator,
        *,
        precision: Precision | None = None,
        compile: bool | str = True,
        fused: bool | None = None,
        graphs: bool | None = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        cuda = operator.device.type == "cuda"
        if precision is None:
            precision = "bf16" if cuda else "fp32"
        if precision not in _DTYPES:
            raise InputError(f"precision={precision} must be one of {', '.join(_DTYPES)}")
        if graphs and not cuda:
            raise InputError(
                f"CUDA graphs need a GPU, and the operator is on {operator.device}; load it with "
                "device=cuda, or leave graphs out"
            )
        self.precision = precision
        self.graphs = cuda if graphs is None else graphs
        super().__init__(copy.deepcopy(operator).eval().requires_grad_(False), shape)
        network, dtype = self.operator.network, _DTYPES[precision]
        if fused is None:
            fused = compile is True and precision != "fp32" and _fast(operator)
        if fused:
            made = _fused_operator(operator, precision)(network, dtype)
            self.operator.network = made  # type: ignore[assignment]
        if precision != "fp32":
            _round_weights(network, dtype)
        if compile:  # beside the fused one for what that leaves to it
            network.compile(mode=None if compile is True else compile)

    @classmethod
    def of(cls, package: Package, options: EngineOptions) -> CompiledEngine:
        """The engine of a package."""
        if package.operator.device.type != "cuda":
            options.report("engine=compile without a GPU: compiled code, but no CUDA graphs")
        return cls(package.operator, precision=options.precision, shape=options.shape)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.operator.device

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean state."""
        dtype = None if self.precision == "fp32" else _DTYPES[self.precision]
        # Guidance goes back through the network several times.
        with (
            repeatable_backward(),
            torch.autocast(x.device.type, dtype, enabled=dtype is not None),
        ):
            return self.operator(x, sigma, condition)

    def captured(self, prior: Prior) -> Prior:
        """A prior that calls this engine as a CUDA graph, or itself without graphs."""
        return Captured(prior) if self.graphs else prior


def _fast(operator: DiffusionOperator) -> bool:
    """Whether fused kernels are expected to be faster: on data-centre GPUs since Hopper.

    Others have less shared memory than the kernels need.
    """
    if operator.device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    from ddo_modulus.engines.fused import fits

    capability = torch.cuda.get_device_capability(operator.device)
    return capability[0] in (9, 10) and fits(operator.network)


def _fused_operator(operator: DiffusionOperator, precision: Precision) -> type[FusedOperator]:
    """The class, where it can be used."""
    if find_spec("triton") is None:
        raise InputError("fused kernels need Triton, which comes with torch on Linux")
    import triton

    from ddo_modulus.engines.fused import FusedOperator, fits

    cuda = operator.device.type == "cuda"
    if not cuda and not triton.knobs.runtime.interpret:
        raise InputError(
            f"fused kernels need a GPU, and the operator is on {operator.device}; load it with "
            "device=cuda, or leave fused out"
        )
    if cuda and precision == "fp32":
        raise InputError("fused kernels are for precision=bf16 or fp16")
    if not fits(operator.network):
        raise InputError("fused kernels are not cut for this network; leave fused out")
    return FusedOperator


def _round_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Weights and matrices in the dtype that autocast would turn them into at every call."""
    for part in network.modules():
        if isinstance(part, LocalLinear):  # rounded when its weights are combined, not before
            continue
        for own in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if own.is_floating_point():
                own.data = own.data.to(dtype)
