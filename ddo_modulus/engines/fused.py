# SPDX-License-Identifier: Apache-2.0
r"""The neural operator in few kernels, for inference and its derivative by the state.

Axes: ``B`` batch, ``H W`` grid, ``C`` channels of a level, ``N`` hidden ones, ``K1 K2`` modes.

A block of :class:`~ddo_modulus.nn.operator.NeuralOperator` moves some twenty fields to the GPU's
memory and back, while its arithmetic would take a fraction of that time. Here it is three kernels
(:mod:`.kernels`): its normalisation, the middle of its filter, and all the rest; its
derivative is three as well. Weights are constants, so nothing is kept for their gradients.
"""

# Contexts of automatic differentiation and Triton's kernels have no types.
# ruff: noqa: ANN401

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ddo_modulus.engines import kernels
from ddo_modulus.fields.basis import Basis
from ddo_modulus.nn.operator import Block, Bridge, Level, NeuralOperator, noise_features
from ddo_modulus.nn.spectral import SpectralLinear, Transform
from ddo_modulus.nn.stencil import neighbours

# Channels of a level above which its blocks are left as they are: their weights are more than the
# kernels can keep at hand, and their arithmetic is enough to keep a GPU busy.
_WIDEST = 128
_MOST_MODES = 64  # along an axis, of which sums are kept in registers
_MOST_STATES = 65535  # second dimension of a grid of programs


class FusedOperator(nn.Module):
    """A neural operator in few kernels, on its training grid; as it is on any other.

    Blocks of more than 128 channels are those of the network that is given, compiled or not; all
    else is copied, and stays on the device and in the precision that it was made for.

    Args:
        network: A trained network that :func:`fits`.
        dtype: Of fields and products. Sums, normalisations and the embedding are in float32.

    Forward:
        x: ``(B, in_channels, H, W)``.
        sigma: ``(B,)`` noise levels, or one for all; not differentiated by.

    Outputs:
        ``(B, out_channels, H, W)`` in float32; what the network gives on another grid, or for more
        than 65535 states. Derivatives by ``x`` alone, of first order, in reverse mode.
    """

    def __init__(self, network: NeuralOperator, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.shape, self.dtype = network, network.basis.shape, dtype
        original = cast(list[Level], network.levels)
        # The one kept may be rounded afterwards.
        network = copy.deepcopy(network).float().requires_grad_(False)
        narrow: list[Block] = []

        def of(block: nn.Module, same: nn.Module) -> _FusedBlock | Block:
            assert isinstance(block, Block) and isinstance(same, Block)
            if block.out.out_features > _WIDEST:
                return same
            narrow.append(block)
            return _FusedBlock(block, dtype, len(narrow) - 1)

        pairs = list(zip(cast(list[Level], network.levels), original, strict=True))
        self.down = [[of(*b) for b in zip(new.down, old.down, strict=True)] for new, old in pairs]
        self.up = [[of(*b) for b in zip(new.up, old.up, strict=True)] for new, old in pairs]
        self.bridges = [_FusedBridge(b, dtype) for b in cast(list[Bridge], network.bridges)]
        self.embed = network.embed
        # Factors and shifts of all blocks at once; what a factor is apart from one was learned.
        self.modulation = torch.cat([b.modulation.weight for b in narrow])
        learned = [b.modulation.bias.chunk(2) for b in narrow]
        self.modulation_bias = torch.cat(
            [b for scale, shift in learned for b in (1 + scale, shift)]
        )
        self.widths = [2 * b.out.out_features for b in narrow]
        self.lift = _Pointwise(network.lift, dtype)
        self.head = _Pointwise(network.head.project, dtype)
        weight = network.lift.weight
        self.places = network.places(weight.new_empty(1, network.in_channels, *self.shape))

    def forward(
        self, x: Float[Tensor, "B Cin H W"], sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B Cout H W"]:
        """Evaluate the operator on the grid of ``x``."""
        known = (self.network.in_channels, *self.shape)
        if x.shape[1:] != known or len(x) > _MOST_STATES:
            return self.network(x, sigma)  # which refuses a wrong number of channels
        sigma = sigma.detach().expand(len(x))
        # Triton launches on the current device, whatever its arguments are on.
        with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
            embedding = self.embed(noise_features(sigma, torch.float32))
            rows = linear(embedding, self.modulation, self.modulation_bias).split(self.widths, 1)
            places = [field.to(x.dtype).expand(len(x), -1, -1, -1) for field in self.places]
            h = _Lift.apply(torch.cat([x, *places], 1), self.lift)

            def run(block: _FusedBlock | Block, h: Tensor) -> Tensor:
                if isinstance(block, _FusedBlock):
                    return _RunBlock.apply(h, rows[block.order], block)
                half = self.dtype != torch.float32
                with torch.autocast(h.device.type, self.dtype if half else None, enabled=half):
                    return block(h, embedding)

            kept = []
            for i, blocks in enumerate(self.down):
                for block in blocks:
                    h = run(block, h)
                if i < len(self.bridges):
                    fine, coarse = _Descend.apply(h, self.bridges[i])
                    kept.append(fine)
                    h = self.bridges[i].shrink(coarse)
            for i in reversed(range(len(self.up))):
                if i < len(self.bridges):
                    h = _Ascend.apply(kept.pop(), self.bridges[i].grow(h), self.bridges[i])
                for block in self.up[i]:
                    h = run(block, h)
            return _Project.apply(h, self.head)


def fits(network: NeuralOperator) -> bool:
    """Whether kernels are cut for a network: for its finest level, where most of the time goes.

    And for the modes of all levels that are not too wide for them, and the channels at both ends.
    """
    ends = network.lift.in_features, network.head.project.out_features
    blocks = [m for m in network.modules() if isinstance(m, Block)]
    narrow = [block for block in blocks if block.out.out_features <= _WIDEST]
    points = network.basis.shape[0] * network.basis.shape[1]
    return (
        max(ends) <= _WIDEST
        and bool(narrow)
        and blocks[0] is narrow[0]
        and max(max(block.spectral.transform.modes) for block in narrow) <= _MOST_MODES
        and points * max(block.out.in_features for block in narrow) < 2**31  # offsets in a state
    )


class _Resampling:
    """A separable linear map between two grids: along lines to modes, across them, and back.

    Args:
        inward: ``(K, W)``, along the lines of the one grid.
        across: ``(P, h, H)``, a page for each mode or one for all.
        outward: ``(w, K)``, along the lines of the other.
    """

    def __init__(self, inward: Tensor, across: Tensor, outward: Tensor) -> None:
        self.inward, self.across, self.outward = (
            matrix.contiguous() for matrix in (inward, across, outward)
        )

    @property
    def transpose(self) -> _Resampling:
        """The adjoint map."""
        return _Resampling(self.outward.mT, self.across.mT, self.inward.mT)

    def __call__(
        self, y: Float[Tensor, "B H W C"], onto: Float[Tensor, "B h w C"] | None = None
    ) -> Float[Tensor, "B h w C"]:
        """The field on the other grid, added to one there if that is given."""
        with torch.autocast(y.device.type, enabled=False):  # derivatives are taken anywhere
            return self._resample(y, onto)

    def _resample(self, y: Tensor, onto: Tensor | None) -> Tensor:
        modes = _along_lines(self.inward, y)  # (B, H, K, C)
        if len(self.across) == 1:
            modes = torch.bmm(self.across.expand(len(y), -1, -1), modes.flatten(2))
            modes = modes.unflatten(2, (-1, y.shape[-1]))
        else:
            modes = torch.einsum("khj,bjkc->bhkc", self.across, modes).contiguous()
        return _along_lines(self.outward, modes, onto)


def _along_lines(
    matrix: Float[Tensor, "W K"],
    x: Float[Tensor, "B H K C"],
    onto: Float[Tensor, "B H W C"] | None = None,
) -> Float[Tensor, "B H W C"]:
    """A matrix times each line, added to a field if that is given."""
    batch, lines, number, channels = x.shape
    if channels > _WIDEST:
        out = torch.matmul(matrix, x)
        return out if onto is None else onto + out
    points, wide = len(matrix), _power(channels)
    out = x.new_empty(batch, lines, points, channels)
    together = max(1, 128 // wide)
    pieces = {"K": number, "K_": 64} if number % 64 == 0 else _last(number)
    tile = min(_ALONG.points, _power(points))
    _ALONG.run(
        kernels.along_lines, (triton.cdiv(points, tile) * triton.cdiv(lines, together), batch),
        tile, x.contiguous(), matrix, out if onto is None else onto.contiguous(), out, points,
        lines, C=channels, C_=wide, **pieces, G=together, ADD=onto is not None,
    )  # fmt: skip
    return out


def _matrices(transform: Transform, grid: str) -> list[Tensor]:
    """Of analysis and synthesis: rows and columns of each, the rows with pages in front."""
    names = [f"{grid}_{way}_{axis}" for way in ("analysis", "synthesis") for axis in _AXES]
    found = [transform.get_buffer(name) for name in names]
    return [
        m[None] if axis == "rows" and m.ndim == 2 else m
        for m, axis in zip(found, 2 * _AXES, strict=True)
    ]


_AXES = ("rows", "columns")


class _Pointwise:
    """A linear map between channels in front and channels behind."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight = _padded(layer.weight.mT, dtype)
        self.adjoint = _turned(self.weight)
        self.bias, self.no_bias = layer.bias, torch.zeros_like(self.weight[:, 0], dtype=torch.float)
        self.out = layer.out_features


class _FusedBridge:
    """Constants of a way to the next coarser level and back."""

    def __init__(self, bridge: Bridge, dtype: torch.dtype) -> None:
        down_rows, columns, rows, columns_back = _matrices(bridge.transform, "fine")
        up_rows, coarse, coarse_rows, coarse_back = _matrices(bridge.transform, "coarse")
        down, up = (
            (columns, coarse_rows @ down_rows, coarse_back),
            (coarse, rows @ up_rows, columns_back),
        )
        self.down = _Resampling(*(matrix.to(dtype) for matrix in down))
        self.up = _Resampling(*(matrix.to(dtype) for matrix in up))
        self.down_back, self.up_back = self.down.transpose, self.up.transpose
        self._shrink = bridge.shrink.weight.to(dtype), bridge.shrink.bias.to(dtype)
        self._grow = bridge.grow.weight.to(dtype), bridge.grow.bias.to(dtype)

    def shrink(self, h: Float[Tensor, "B h w C"]) -> Tensor:
        """To the channels of the coarser level; after the resampling, which it commutes with."""
        return linear(h, *self._shrink)

    def grow(self, h: Float[Tensor, "B h w C"]) -> Tensor:
        """To the channels of the finer level."""
        return linear(h, *self._grow)


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
            matrix.to(dtype).contiguous() for matrix in _matrices(spectral.transform, "fine")
        )
        self.analysis, self.analysis_adjoint = columns, _turned(columns)
        self.synthesis, self.synthesis_adjoint = columns_back, _turned(columns_back)
        number, across = len(columns), rows.shape[1]
        self.first_sizes = {"K": number, "Q_": _power(number)}
        self.last_sizes = _last(number)
        self._inner = {"K": number, "Q": across, "Q_": _power(across)}
        self._page = rows[0].numel() if len(rows) > 1 else 0
        self._weight = spectral.filter().transpose(0, 1).to(dtype).contiguous()
        mix = _padded(spectral.mix.weight.mT, dtype)
        self._there = rows, mix, rows_back
        self._back = _turned(rows_back), _turned(mix), _turned(rows)
        self.channels = spectral.mix.in_features, spectral.mix.out_features

    def __call__(self, modes: Float[Tensor, "B K H C"]) -> Float[Tensor, "B K H N"]:
        """From the first product to what the last is taken of."""
        return self._run(modes, *self._there, self.channels[1], first=True)

    def adjoint(self, modes: Float[Tensor, "B K H N"]) -> Float[Tensor, "B K H C"]:
        """The way back of gradients."""
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
            out, lines, self._page, **self._inner, C=width, C_=_power(width),
            D=channels, D_=_power(channels), FIRST=first,
        )  # fmt: skip
        return out


class _FusedBlock:
    """Constants of a block, its place among all, and sizes as the kernels name them."""

    def __init__(self, block: Block, dtype: torch.dtype, order: int) -> None:
        self.order = order
        self.filter = _Filter(block.spectral, dtype)
        width, hidden = self.filter.channels
        near = block.local.split[0]
        side, wide = _power(max(near, width - near)), _power(width)
        piece = min(64, _power(hidden))
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
        self.weight = torch.stack([_padded(w.mT, dtype, side, padded) for w in parts])
        adjoint = _turned(self.weight)
        self.adjoint, self.far_adjoint = torch.cat([adjoint[:1], adjoint[2:]]), adjoint[1]
        self.bias, self.out_bias = pad(block.local.bias, (0, padded - hidden)), block.out.bias
        self.out = _padded(block.out.weight.mT, dtype, padded, wide)
        self.out_adjoint = _turned(self.out)


def _table(basis: Basis) -> Int[Tensor, "4 P"]:
    """Points that each point sees as its eastern, western, southern and northern neighbour."""
    height, width = basis.shape
    here = torch.arange(height * width, dtype=torch.float64).view(1, height, width, 1)
    return torch.stack([there.flatten() for there in neighbours(here, basis)]).round().int()


def _sources(table: Int[Tensor, "4 P"]) -> Int[Tensor, "S 4 P"]:
    """The reverse: who sees a point as a neighbour; -1 for nobody. Mirrors let two see the same."""
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


def _first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Refuse a derivative of the derivative, which nothing is kept for."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError("fused kernels have first derivatives only: leave create_graph out")
        return backward(ctx, *gradients)

    return checked


class _RunBlock(torch.autograd.Function):
    """A block; its modulation and constants are not differentiated by."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, modulation: Tensor, block: _FusedBlock) -> Tensor:
        h = h.contiguous()
        batch, lines, points, width = h.shape
        factor, shift = modulation.chunk(2, 1)
        y, out = torch.empty_like(h), torch.empty_like(h)
        modes = h.new_empty(batch, block.filter.first_sizes["K"], lines, width)
        _by_width(width).run(
            kernels.normalise, (lines, batch), points, h, factor, shift, block.filter.analysis, y,
            modes, points, lines, modulation.stride(0), C=width, C_=_power(width),
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
    @_first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
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


class _Descend(torch.autograd.Function):
    """A field, and itself on the coarser grid."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bridge: _FusedBridge) -> tuple[Tensor, Tensor]:
        ctx.bridge = bridge
        return h.view_as(h), bridge.down(h)

    @staticmethod
    @_first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        fine, coarse = gradients
        return ctx.bridge.down_back(coarse, onto=fine), None


class _Ascend(torch.autograd.Function):
    """A field with one of the coarser grid added."""

    @staticmethod
    def forward(ctx: Any, fine: Tensor, coarse: Tensor, bridge: _FusedBridge) -> Tensor:
        ctx.bridge = bridge
        return bridge.up(coarse, onto=fine)

    @staticmethod
    @_first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,) = gradients
        return g, ctx.bridge.up_back(g), None


class _Lift(torch.autograd.Function):
    """Channels behind, in the dtype of the network."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lift: _Pointwise) -> Tensor:
        ctx.lift, ctx.like = lift, x.new_empty(0)
        ctx.size = batch, channels, height, width = x.shape
        h = x.new_empty(batch, height, width, lift.out, dtype=lift.weight.dtype)
        _POINTWISE.flat(
            kernels.lift, height * width, batch, x.contiguous(), lift.weight, lift.bias, h,
            height * width, **_sizes(channels, lift.out),
        )  # fmt: skip
        return h

    @staticmethod
    @_first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,), lift = gradients, ctx.lift
        out = ctx.like.new_empty(ctx.size)
        points = out.shape[2] * out.shape[3]
        _POINTWISE.flat(
            kernels.project, points, len(out), g.contiguous(), lift.adjoint, lift.no_bias, out,
            points, **_sizes(out.shape[1], lift.out), NORM=False,
        )  # fmt: skip
        return out, None


class _Project(torch.autograd.Function):
    """Normalised, and the channels in front again, in float32."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: _Pointwise) -> Tensor:
        h = h.contiguous()
        ctx.save_for_backward(h)
        ctx.head = head
        batch, height, width, channels = h.shape
        out = h.new_empty(batch, head.out, height, width, dtype=torch.float32)
        _POINTWISE.flat(
            kernels.project, height * width, batch, h, head.weight, head.bias, out, height * width,
            **_sizes(head.out, channels), NORM=True,
        )  # fmt: skip
        return out

    @staticmethod
    @_first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,), (h,), head = gradients, ctx.saved_tensors, ctx.head
        out, points = torch.empty_like(h), h.shape[1] * h.shape[2]
        _POINTWISE.flat(
            kernels.project_backward, points, len(h), g.contiguous(), h, head.adjoint, out, points,
            **_sizes(head.out, h.shape[-1]),
        )  # fmt: skip
        return out, None


def _sizes(front: int, behind: int) -> dict[str, int]:
    """Channels in front and behind, as the kernels name them."""
    return {"D": front, "D_": _power(front), "C": behind, "C_": _power(behind)}


def _last(modes: int) -> dict[str, int]:
    """Modes of a last product of a synthesis, and how many are taken at once."""
    return {"K": modes, "K_": 32 if -modes % 32 < 16 else 16}


def _power(size: int) -> int:
    """Size of an array in registers."""
    return max(16, triton.next_power_of_2(size))


def _padded(
    weight: Tensor, dtype: torch.dtype, rows: int | None = None, columns: int | None = None
) -> Tensor:
    """A matrix with zeros behind, up to the sizes of arrays in registers if none are given."""
    height, width = weight.shape
    rows = _power(height) if rows is None else rows
    columns = _power(width) if columns is None else columns
    return pad(weight, (0, columns - width, 0, rows - height)).to(dtype).contiguous()


def _turned(matrix: Tensor) -> Tensor:
    return matrix.mT.contiguous()


@dataclass(frozen=True)
class _Launch:
    """How a kernel is cut into programs: what was quickest on an H200.

    Attributes:
        points: Points, or lines, of a tile.
        warps: Of a program.
        stages: Loads under way at once.
    """

    points: int = 64
    warps: int = 4
    stages: int = 3

    def run(
        self, kernel: Any, grid: tuple[int, ...], number: int, *inputs: object, **sizes: object
    ) -> None:
        """Over so many points, or lines, in each program, part after part."""
        parts = min(self.points, _power(number))
        kernel[grid](*inputs, **sizes, M=parts, num_warps=self.warps, num_stages=self.stages)

    def flat(self, kernel: Any, points: int, batch: int, *inputs: object, **sizes: object) -> None:
        """Over all points of all states, a tile in each program."""
        grid = (triton.cdiv(points, self.points), batch)
        self.run(kernel, grid, self.points, *inputs, **sizes)

    def tiled(
        self, kernel: Any, batch: int, points: int, lines: int, *inputs: object, **sizes: object
    ) -> None:
        """The same, tiles of which lines are taken apart: no larger than the grid.

        What is done line by line in them costs as much for a part as for the whole, so that large
        tiles are for long lines.
        """
        tile = min(self.points, _power(points * lines), 128 if points >= 128 else 64)
        if points % tile == 0 or tile % points == 0:
            touched = max(tile // points, 1)
        else:
            touched = (tile - 2) // points + 2
        sizes |= {"points": points, "lines": lines, "LINES": touched}
        grid = (triton.cdiv(points * lines, tile), batch)
        self.run(kernel, grid, tile, *inputs, **sizes)


def _by_width(channels: int) -> _Launch:
    """Of the kernels that go along a line, part after part."""
    return _Launch(64 if channels <= 32 else 32)


_FILTERED = _Launch()
_BLOCK = _POINTWISE = _Launch(128)
_ALONG = _Launch()
_BLOCK_BACKWARD = _Launch(stages=2)
