# SPDX-License-Identifier: Apache-2.0
"""Calls of torch that are not public, in one place.

Anything here may change with torch's next release; the tests of this module say what it must do.
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

    Compilers, tracers and captured graphs keep the path that they saw. A branch that depends on a
    value would then be taken, or not taken, for all later values.
    """
    return (
        torch.compiler.is_compiling()
        or get_proxy_mode() is not None
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that outlive what is going on around them.

    A constant is made when it is first needed, which may be inside a function transform
    (``torch.func``), a tracer, an exporter or ``inference_mode``. Made by their rules it would be a
    wrapper that dies with the transform, a tensor without values, or one that refuses gradients.
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
    """For modules that keep constants of their first call, and are compiled before it.

    Such constants are made with NumPy and :func:`lasting`, which the compiler cannot follow. So the
    compiler makes the first call itself: it runs the module once, on ones, when it starts to trace.
    """

    def rehearse(self, *inputs: Tensor | None) -> None:
        """Make that call; to stand at the top of ``forward``. Nothing happens outside a compiler.

        Args:
            inputs: Arguments of ``forward``. Only shape, dtype and device matter; a batch of one
                is run.
        """
        if torch.compiler.is_dynamo_compiling():
            self._run_on_ones(*[None if t is None else _description(t) for t in inputs])

    @torch.compiler.assume_constant_result
    def _run_on_ones(self, *inputs: _Description | None) -> bool:
        # The compiler runs this as it is. A method, since torch 2.11 takes no module as argument.
        with lasting():
            self.forward(  # type: ignore[attr-defined]
                *[
                    None if like is None else torch.ones(1, *like[0], dtype=like[1], device=like[2])
                    for like in inputs
                ]
            )
        return True


_Description = tuple[tuple[int, ...], torch.dtype, torch.device]


def _description(t: Tensor) -> _Description:
    # A compiler that has seen two grids takes sizes for symbols; index() makes them numbers.
    return tuple([index(n) for n in t.shape[1:]]), t.dtype, t.device


def allow_variants(count: int) -> None:
    """Let the compiler keep at least this many variants of a function.

    After its limit, eight by default, it gives up on a function and runs it uncompiled.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(count, config.recompile_limit)


def repeatable_backward() -> AbstractContextManager[None]:
    """Have what is compiled within keep its saved tensors for more than one backward pass.

    The compiler otherwise lets the first pass overwrite them.
    """
    return torch._functorch.config.patch(donated_buffer=False)


def valueless(sizes: Sequence[Sequence[int]]) -> tuple[FakeTensorMode, list[Tensor]]:
    """Tensors of these sizes (float32, on the CPU) that have no values and take no memory.

    Returns:
        The mode to trace in, where they may meet tensors with values, and the tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    blank = mode.from_tensor(torch.empty(1))
    return mode, [blank.new_empty(tuple(size)) for size in sizes]


def core_decompositions() -> dict[Any, Callable]:
    """Formulas that reduce ATen to its core operations, by operation."""
    return dict(core_aten_decompositions())


def last_recorded() -> fx.Node:
    """The node that the tracer wrote last.

    Raises:
        RuntimeError: If nothing is being traced.
    """
    proxy = get_proxy_mode()
    if proxy is None:
        raise RuntimeError("no tracer is active")
    return proxy.tracer.graph._root.prev


def move_towards(averages: list[Tensor], values: list[Tensor], share: float) -> None:
    """``averages += share (values - averages)``, in place, all tensors at once."""
    torch._foreach_lerp_(averages, values, share)


def on_gpu(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    """Whether what a profiler saw is a kernel or a copy on a GPU, not a call on the CPU."""
    return event.device_type == torch._C._autograd.DeviceType.CUDA
