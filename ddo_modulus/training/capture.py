# SPDX-License-Identifier: Apache-2.0
"""Loss and gradients of a micro-batch as one CUDA graph.

A step of a small operator is some four hundred kernels, each shorter than the time that the host
takes to launch it: the GPU idles most of the step. A graph launches them all at once. The optimiser
stays outside: its few fused kernels are launched while the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: Runs before capture: compiled code, caches and workspaces are made in the first ones.
_WARM_UP = 3


class FlatGradients:
    """Gradients of parameters as views of one tensor: fixed addresses, summed up in one message.

    Args:
        parameters: What to give gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        real = [torch.view_as_real(p) if p.is_complex() else p for p in self.parameters]
        sizes = [p.numel() for p in real]
        self.values = torch.zeros(sum(sizes), device=self.parameters[0].device)
        pieces = self.values.split(sizes)
        for parameter, part, piece in zip(self.parameters, real, pieces, strict=True):
            piece = piece.view_as(part)
            parameter.grad = torch.view_as_complex(piece) if parameter.is_complex() else piece

    def zero(self) -> None:
        """Start again from nothing."""
        self.values.zero_()

    def average(self, ranks: int) -> None:
        """Mean over the ranks, on all of them."""
        if ranks > 1:
            dist.all_reduce(self.values)
            self.values.div_(ranks)


class Replay:
    """A function of tensors that adds to gradients, recorded once and then replayed.

    Args:
        function: Takes a key and tensors (or None), adds to the gradients and returns a number,
            without ever waiting for the GPU. Tensors of one key have the same shapes at each call.
        gradients: What it adds to.
    """

    def __init__(self, function: Callable[..., Tensor], gradients: FlatGradients) -> None:
        self.function, self.gradients = function, gradients
        self._recorded: dict[
            Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]
        ] = {}
        self._pool = torch.cuda.graph_pool_handle()

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
        kept = self.gradients.values.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.function(key, *fixed)
        torch.cuda.current_stream().wait_stream(stream)
        self.gradients.values.copy_(kept)
        graph = torch.cuda.CUDAGraph()
        # Graphs take turns, so they may share their memory. Threads that load data go on with
        # calls that would spoil a capture of the whole process.
        with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            output = self.function(key, *fixed)
        return graph, fixed, output
