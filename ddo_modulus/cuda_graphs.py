# SPDX-License-Identifier: Apache-2.0
"""Functions recorded as CUDA graphs.

A step of a small operator consists of hundreds of kernels. Each is shorter than the time that the
CPU needs to launch it, so the GPU is idle for most of the step. A CUDA graph launches all of them
at once. A recorded function must not wait for the GPU, and it reads and writes the same memory at
each replay.
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
        function: Takes a key and tensors (or None) and returns a tensor, without waiting for the
            GPU. Tensors of one key have the same shapes at each call.
        kept: Tensors that the function changes, such as sums of gradients. Their values are
            restored after the warm-up.
        warm_up: Number of runs before the recording, which compile code and fill caches and
            workspaces.
        watched: Whether waiting for the GPU raises an error in the last warm-up run, which is
            easier to recover from than an error during recording. This setting affects the whole
            process while it lasts.
        pool: Memory pool to share with other graphs that are replayed on the same stream; None for
            a new one.
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
        """Result of the function for these inputs."""
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
            # Graphs are replayed one after the other, so they can share memory. Capture only this
            # thread: calls of threads that load data would invalidate a capture of the process.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                output = self.function(key, *fixed)
        except BaseException:
            # After a failure, the capture stream is still current, and torch's generator expects
            # a replay: restore both.
            torch.cuda.set_stream(current)
            generator = torch.cuda.default_generators[current.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph, fixed, output


@contextmanager
def _watch() -> Iterator[None]:
    """Context in which waiting for the GPU raises an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
