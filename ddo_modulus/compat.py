# SPDX-License-Identifier: Apache-2.0
"""All uses of private functions of torch.

They may change with any release of torch; the tests of this module state what they must do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE as GraphPool

__all__ = [
    "GraphPool",
    "OpOverload",
    "Rehearsed",
    "allow_variants",
    "core_decompositions",
    "last_recorded",
    "lasting",
    "move_towards",
    "on_gpu",
    "recorded",
    "repeatable_backward",
    "valueless",
]


def recorded() -> bool:
    """Whether operations are being recorded, to be run again with other values.

    Compilers, tracers and CUDA graphs record one path. If a branch depends on a value, the recorded
    path would be used for all later values.
    """
    return (
        torch.compiler.is_compiling()
        or get_proxy_mode() is not None
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


@contextmanager
def lasting() -> Iterator[None]:
    """Create ordinary tensors, for constants that are kept.

    A constant is computed when it is first needed, which may be inside a function transform
    (``torch.func``), a tracer, an exporter or ``inference_mode``. There it would become a wrapper
    that is invalid after the transform, a tensor without values, or one that cannot be used with
    gradients.
    """
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


class Rehearsed:
    """Mixin for modules that cache constants at their first call, so that they can be compiled.

    The constants are computed with NumPy and :func:`lasting`, which the compiler cannot trace. So
    the module is run once on ones, outside the trace, when the compiler starts to trace it.
    """

    def rehearse(self, *inputs: Tensor | None) -> None:
        """Run the module once on ones, if it is being compiled; call it first in ``forward``.

        Args:
            inputs: Arguments of ``forward``. Only their shapes, dtypes and devices are used, with a
                batch of one.
        """
        if torch.compiler.is_dynamo_compiling():
            self._run_on_ones(*[None if t is None else _description(t) for t in inputs])

    def _run_on_ones(self, *inputs: _Description | None) -> bool:
        # The compiler calls this without tracing it. It is a method because torch 2.11 allows no
        # module as argument.
        with lasting():
            self.forward(  # type: ignore[attr-defined]
                *[
                    None if like is None else torch.ones(1, *like[0], dtype=like[1], device=like[2])
                    for like in inputs
                ]
            )
        return True

    # What torch.compiler.assume_constant_result sets, without its import of the whole compiler,
    # which would take a second of every command.
    _run_on_ones._dynamo_marked_constant = True  # type: ignore[attr-defined]


_Description = tuple[tuple[int, ...], torch.dtype, torch.device]


def _description(t: Tensor) -> _Description:
    # After two grids the compiler makes sizes symbolic; index() turns them into numbers.
    return tuple([index(n) for n in t.shape[1:]]), t.dtype, t.device


def allow_variants(count: int) -> None:
    """Let the compiler keep at least this many variants of a function.

    Beyond its limit, eight by default, it runs the function uncompiled.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(count, config.recompile_limit)


def repeatable_backward() -> AbstractContextManager[None]:
    """Context in which functions are compiled for more than one backward pass.

    Otherwise the first backward pass may overwrite the saved tensors.
    """
    return torch._functorch.config.patch(donated_buffer=False)


def valueless(sizes: Sequence[Sequence[int]]) -> tuple[FakeTensorMode, list[Tensor]]:
    """Tensors of these sizes (float32, on the CPU) without values and memory.

    Returns:
        The mode to trace in, in which they may be combined with ordinary tensors; and the tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    blank = mode.from_tensor(torch.empty(1))
    return mode, [blank.new_empty(tuple(size)) for size in sizes]


def core_decompositions() -> dict[Any, Callable]:
    """Decompositions of ATen operations into core operations, by operation."""
    return dict(core_aten_decompositions())


def last_recorded() -> fx.Node:
    """The last node that the tracer recorded.

    Raises:
        RuntimeError: If nothing is being traced.
    """
    proxy = get_proxy_mode()
    if proxy is None:
        raise RuntimeError("no tracer is active")
    return proxy.tracer.graph._root.prev


def move_towards(averages: list[Tensor], values: list[Tensor], share: float) -> None:
    """``averages += share (values - averages)``, in place, for all tensors at once."""
    torch._foreach_lerp_(averages, values, share)


def on_gpu(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    """Whether an event of a profiler is a kernel or copy on a GPU, not a call on the CPU."""
    return event.device_type == torch._C._autograd.DeviceType.CUDA
