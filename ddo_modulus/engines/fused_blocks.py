# SPDX-License-Identifier: Apache-2.0
"""A block of the neural operator in three kernels, and its derivative in three.

Axes: ``B`` batch, ``H`` lines of the grid, ``P`` points, ``C`` channels of a level, ``N`` hidden
ones, ``K`` modes.
"""

# Contexts of automatic differentiation and Triton's kernels have no types.
# ruff: noqa: ANN401

from __future__ import annotations

from typing import Any

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ddo_modulus.engines import kernels
from ddo_modulus.engines.launches import (
    Launch,
    first_order,
    last_product,
    padded_weight,
    register_size,
    transform_matrices,
    turned,
)
from ddo_modulus.fields.basis import Basis
from ddo_modulus.nn.operator import Block
from ddo_modulus.nn.spectral import SpectralLinear
from ddo_modulus.nn.stencil import neighbours


class _Filter:
    """Constants of a spectral filter, and all of it between its first product and its last.

    Attributes:
        analysis: Columns of the first product, ``(K, W)``.
        synthesis: Of the last, ``(W, K)``.
        first_sizes: As the kernels name them that take the first product.
        last_sizes: As those do that take the last.
    """

    def __init__(self, spectral: SpectralLinear, dtype: torch.dtype) -> None:
        rows, columns, rows_back, columns_back = (
            matrix.to(dtype).contiguous()
            for matrix in transform_matrices(spectral.transform, "fine")
        )
        self.analysis, self.analysis_adjoint = columns, turned(columns)
        self.synthesis, self.synthesis_adjoint = columns_back, turned(columns_back)
        number, across = len(columns), rows.shape[1]
        self.first_sizes = {"K": number, "Q_": register_size(number)}
        self.last_sizes = last_product(number)
        self._inner = {"K": number, "Q": across, "Q_": register_size(across)}
        self._page = rows[0].numel() if len(rows) > 1 else 0
        self._weight = spectral.filter().transpose(0, 1).to(dtype).contiguous()
        mix = padded_weight(spectral.mix.weight.mT, dtype)
        self._there = rows, mix, rows_back
        self._back = turned(rows_back), turned(mix), turned(rows)
        self.channels = spectral.mix.in_features, spectral.mix.out_features

    def __call__(self, modes: Float[Tensor, "B K H C"]) -> Float[Tensor, "B K H N"]:
        """From the first product to what the last is taken of."""
        return self._run(modes, *self._there, self.channels[1], first=True)

    def adjoint(self, modes: Float[Tensor, "B K H N"]) -> Float[Tensor, "B K H C"]:
        """Adjoint of the call, for gradients."""
        return self._run(modes, *self._back, self.channels[0], first=False)

    def _run(
        self,
        modes: Tensor,
        analysis: Tensor,
        mix: Tensor,
        synthesis: Tensor,
        channels: int,
        *,
        first: bool,
    ) -> Tensor:
        batch, number, lines, width = modes.shape
        out = modes.new_empty(batch, number, lines, channels)
        _FILTERED.run(
            kernels.filtered, (number, batch), lines, modes, analysis, self._weight, mix, synthesis,
            out, lines, self._page, **self._inner, C=width, C_=register_size(width),
            D=channels, D_=register_size(channels), FIRST=first,
        )  # fmt: skip
        return out


class FusedBlock:
    """Constants of a block, its place among all, and sizes as the kernels name them."""

    def __init__(self, block: Block, dtype: torch.dtype, order: int) -> None:
        self.order = order
        self.filter = _Filter(block.spectral, dtype)
        width, hidden = self.filter.channels
        near = block.local.split[0]
        side, wide = register_size(max(near, width - near)), register_size(width)
        piece = min(64, register_size(hidden))
        padded = -(-hidden // piece) * piece
        self.local_sizes = {"L": near, "S_": side}
        self.gate_sizes = {"C": width, "C_": wide, "N": hidden, "N_": padded, "J_": piece}
        whole = padded if padded <= 128 else piece
        self.forward_sizes = self.gate_sizes | {"J_": whole}
        self.backward_sizes = {"C": width, "N": hidden, "J_": whole}
        device = block.out.weight.device
        table = _table(block.spectral.transform.basis)
        here = torch.arange(table.shape[1], dtype=table.dtype)[None]
        self.seen = torch.cat([here, here, table]).to(device)
        self.sources = _sources(torch.cat([here, table])).to(device)
        parts = block.local.stencil().split([near, width - near, *4 * [near]], 1)
        self.weight = torch.stack([padded_weight(w.mT, dtype, side, padded) for w in parts])
        adjoint = turned(self.weight)
        self.adjoint, self.far_adjoint = torch.cat([adjoint[:1], adjoint[2:]]), adjoint[1]
        self.bias, self.out_bias = pad(block.local.bias, (0, padded - hidden)), block.out.bias
        self.out = padded_weight(block.out.weight.mT, dtype, padded, wide)
        self.out_adjoint = turned(self.out)


def _table(basis: Basis) -> Int[Tensor, "4 P"]:
    """Points that each point sees as its eastern, western, southern and northern neighbour."""
    height, width = basis.shape
    here = torch.arange(height * width, dtype=torch.float64).view(1, height, width, 1)
    return torch.stack([there.flatten() for there in neighbours(here, basis)]).round().int()


def _sources(table: Int[Tensor, "4 P"]) -> Int[Tensor, "S 4 P"]:
    """The reverse: points that see each one as a neighbour, two of them at mirrors; -1 for none."""
    found = []
    for seen in table.long():
        order = seen.argsort(stable=True)
        number = seen.bincount(minlength=len(seen))
        first = number.cumsum(0) - number
        pairs = [
            torch.where(number > i, order[(first + i).clamp_max(len(seen) - 1)], -1)
            for i in range(int(number.max()))
        ]
        found.append(pairs)
    most = max(len(pairs) for pairs in found)
    assert most <= 2  # what the kernel takes
    nobody = torch.full_like(found[0][0], -1)
    rows = [torch.stack([p[i] if i < len(p) else nobody for p in found]) for i in range(most)]
    return torch.stack(rows).int()


class RunBlock(torch.autograd.Function):
    """A block; its modulation and constants are not differentiated by."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, modulation: Tensor, block: FusedBlock) -> Tensor:
        """See the class."""
        h = h.contiguous()
        batch, lines, points, width = h.shape
        factor, shift = modulation.chunk(2, 1)
        y, out = torch.empty_like(h), torch.empty_like(h)
        modes = h.new_empty(batch, block.filter.first_sizes["K"], lines, width)
        _by_width(width).run(
            kernels.normalise, (lines, batch), points, h, factor, shift, block.filter.analysis, y,
            modes, points, lines, modulation.stride(0), C=width, C_=register_size(width),
            **block.filter.first_sizes,
        )  # fmt: skip
        keep = ctx.needs_input_grad[0]
        mixed = h.new_empty(*h.shape[:3], block.gate_sizes["N"]) if keep else h
        _BLOCK.tiled(
            kernels.block, batch, points, lines, h, y, block.filter(modes), block.filter.synthesis,
            block.seen, block.weight, block.bias, block.out, block.out_bias, mixed, out,
            **block.forward_sizes, **block.local_sizes, **block.filter.last_sizes, KEEP=keep,
        )  # fmt: skip
        if keep:
            ctx.save_for_backward(h, modulation, mixed)
            ctx.block = block
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient by the states."""
        (h, modulation, mixed), block = ctx.saved_tensors, ctx.block
        (g,) = (gradient.contiguous() for gradient in gradients)
        batch, lines, points, _ = h.shape
        inner, hidden = torch.empty_like(mixed), block.gate_sizes["N"]
        modes = h.new_empty(batch, block.filter.first_sizes["K"], lines, hidden)
        pieces = triton.cdiv(hidden, block.gate_sizes["J_"])
        _by_width(h.shape[3]).run(
            kernels.gate_backward, (lines * pieces, batch), points, g, mixed, block.out_adjoint,
            block.filter.synthesis_adjoint, inner, modes, points, lines, **block.gate_sizes,
            **block.filter.first_sizes,
        )  # fmt: skip
        out = torch.empty_like(h)
        _BLOCK_BACKWARD.tiled(
            kernels.block_backward, batch, points, lines, g, inner, h, modulation,
            block.filter.adjoint(modes), block.filter.analysis_adjoint, block.sources,
            block.adjoint, block.far_adjoint, out, row_stride=modulation.stride(0),
            **block.backward_sizes, **block.local_sizes, **block.filter.last_sizes,
            PAIRS=len(block.sources) > 1,
        )  # fmt: skip
        return out, None, None


def _by_width(channels: int) -> Launch:
    """Launches of the kernels that go along a line part by part."""
    return Launch(64 if channels <= 32 else 32)


_FILTERED = Launch()
_BLOCK = Launch(128)
_BLOCK_BACKWARD = Launch(stages=2)
