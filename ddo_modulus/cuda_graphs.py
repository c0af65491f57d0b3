# SPDX-License-Identifier: Apache-2.0
"""Functions as CUDA graphs: recorded once, then launched whole.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.

A step of a small operator is some hundreds of kernels, each shorter than the time that the host
takes to launch it, so the GPU idles most of the step. A graph launches them all at once. What is
recorded may not wait for the GPU, and reads and writes the same memory at each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ddo_modulus.compat import GraphPool


class Replay:
    """A function of tensors, recorded once for each key and then replayed.

    Args:
        function: Takes a key and tensors (or None) and returns a tensor, without ever waiting for
            the GPU. Tensors of one key have the same shapes at each call.
        kept: Tensors that the function changes, such as sums of gradients.
        warm_up: Runs before the recording: compiled code, caches and workspaces are made in them.
        watched: Whether waiting for the GPU is an error already in the last of them, of which a
            recording recovers less well. The watch is on the whole process.
        pool: Memory to share with graphs that take turns with these on one stream; its own if None.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        kept: Sequence[Tensor] = (),
        *,
        warm_up: int = 3,
        watched: bool = False,
        pool: GraphPool | None = None,
    ) -> None:
        self.function, self.kept = function, kept
        self.warm_up, self.watched = warm_up, watched
        self._recorded: dict[
            Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]
        ] = {}
        self._pool = torch.cuda.graph_pool_handle() if pool is None else pool

    def __call__(self, key: Hashable, *inputs: Tensor | None) -> Tensor:
        """What the function returns for these inputs."""
        if key not in self._recorded:
            self._recorded[key] = self._record(key, inputs)
        graph, fixed, output = self._recorded[key]
        for place, value in zip(fixed, inputs, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        graph.replay()
        return output.clone()

    def _record(
        self, key: Hashable, inputs: tuple[Tensor | None, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]:
        fixed = [None if value is None else value.clone() for value in inputs]
        before = [value.clone() for value in self.kept]
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for i in range(self.warm_up):
                with _watch() if self.watched and i == self.warm_up - 1 else nullcontext():
                    self.function(key, *fixed)
        current.wait_stream(stream)
        for value, first in zip(self.kept, before, strict=True):
            value.copy_(first)
        graph = torch.cuda.CUDAGraph()
        try:
            # Graphs take turns, so they may share their memory. Threads that load data go on with
            # calls that would spoil a capture of the whole process.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                output = self.function(key, *fixed)
        except BaseException:
            # One that fails leaves its own stream, and torch's generator waiting for a replay.
            torch.cuda.set_stream(current)
            generator = torch.cuda.default_generators[current.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph, fixed, output


@contextmanager
def _watch() -> Iterator[None]:
    """Make waiting for the GPU an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
