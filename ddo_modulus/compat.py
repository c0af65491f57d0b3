# SPDX-License-Identifier: Apache-2.0
"""Calls of torch that are not public, in one place.

Anything here may change with torch's next release; the tests of this module say what it must do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes


def recorded() -> bool:
    """Whether operations are recorded, to be done again with other values.

    Compilers, tracers and captured graphs keep one path; what is decided by a value is then decided
    for ever.
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
    (``torch.func``), a tracer or ``inference_mode``. Made by their rules it would be a wrapper that
    dies with the transform, a fake without values, or a tensor that refuses gradients for ever.
    """
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield
