# SPDX-License-Identifier: Apache-2.0
r"""The neural operator in few kernels, for inference and its derivative by the state.

Axes: ``B`` batch, ``H W`` grid, ``C`` channels of a level, ``N`` hidden ones, ``K1 K2`` modes.

A block of :class:`~ddo_modulus.nn.operator.NeuralOperator` moves some twenty fields to the GPU's
memory and back, while its arithmetic would take a fraction of that time. Here it is its
normalisation, the analysis of its filter, and one kernel for all the rest
(:mod:`ddo_modulus.nn.kernels`); its derivative is two kernels and an analysis. Weights are
constants, so nothing is kept for their gradients.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ddo_modulus.basis import Basis
from ddo_modulus.nn import kernels
from ddo_modulus.nn.operator import Block, Bridge, Level, NeuralOperator, noise_features
from ddo_modulus.nn.spectral import Transform
from ddo_modulus.nn.stencil import neighbours


class FusedOperator(nn.Module):
    """A neural operator in few kernels, on its training grid; as it is on any other.

    Blocks of more than 128 channels remain what they are, compiled or not.

    Args:
        network: A trained network; its weights are copied, in the precision asked for.
        dtype: Of fields and products. Sums, normalisations and the embedding are in float32.

    Forward:
        x: ``(B, in_channels, H, W)``.
        sigma: ``(B,)`` noise levels.

    Outputs:
        ``(B, out_channels, H, W)`` in float32. Differentiable by ``x``, once.
    """

    def __init__(self, network: NeuralOperator, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.shape, self.dtype = network, network.basis.shape, dtype
        original = cast(list[Level], network.levels)
        network = copy.deepcopy(network)  # the one kept may be rounded afterwards
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
        ones = [b.modulation.bias.unflatten(0, (2, -1)) + _ONE.to(b.out.weight) for b in narrow]
        self.modulation_bias = torch.cat([bias.flatten() for bias in ones])
        self.widths = [2 * b.out.out_features for b in narrow]
        self.lift = _Pointwise(network.lift.weight, network.lift.bias, dtype)
        self.head = _Pointwise(network.head.project.weight, network.head.project.bias, dtype)
        weight = network.lift.weight
        self.places = network.places(weight.new_empty(1, network.in_channels, *self.shape))

    def forward(
        self, x: Float[Tensor, "B Cin H W"], sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B Cout H W"]:
        """Evaluate the operator on the grid of ``x``."""
        if x.shape[-2:] != self.shape or len(x) > _MOST_STATES:
            return self.network(x, sigma)
        with torch.autocast(x.device.type, enabled=False):
            embedding = self.embed(noise_features(sigma, torch.float32))
            rows = linear(embedding, self.modulation, self.modulation_bias).split(self.widths, 1)
            places = [field.to(x.dtype).expand(len(x), -1, -1, -1) for field in self.places]
            h = _Lift.apply(torch.cat([x, *places], 1), self.lift, self.dtype)

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
            return _Project.apply(h, self.head, self.shape)


_MOST_STATES = 65535  # second dimension of a grid of programs
# Channels of a level above which its blocks are left as they are: their weights are more than the
# kernels can keep at hand, and their arithmetic is enough to keep a GPU busy.
_WIDEST = 128
_ONE = torch.tensor([[1.0], [0.0]])


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
        modes = torch.matmul(self.inward, y)  # (B, H, K, C)
        if len(self.across) == 1:
            modes = torch.bmm(self.across.expand(len(y), -1, -1), modes.flatten(2))
            modes = modes.unflatten(2, (-1, y.shape[-1]))
        else:
            modes = torch.einsum("khj,bjkc->bhkc", self.across, modes).contiguous()
        if onto is None:
            return torch.matmul(self.outward, modes)
        out, onto = torch.empty_like(onto), onto.contiguous()
        batch, lines, points, channels = onto.shape
        size, (_, number, _) = _power(channels), modes.shape[1:]
        _SYNTHESIS.tiled(
            kernels.add_synthesis, batch, points, lines, onto, modes, self.outward, out,
            k_stride=channels, line_stride=number * channels, batch_stride=modes.stride(0),
            C=channels, C_=size, K=number, K_=_piece(number),
        )  # fmt: skip
        return out


def _matrices(transform: Transform, grid: str) -> list[Tensor]:
    """Of analysis and synthesis: rows and columns of each, the rows with pages in front."""
    names = [f"{grid}_{way}_{axis}" for way in ("analysis", "synthesis") for axis in _AXES]
    found = [transform.get_buffer(name) for name in names]
    return [m[None] if axis == "rows" and m.ndim == 2 else m for m, axis in zip(found, 2 * _AXES)]


_AXES = ("rows", "columns")


class _Pointwise:
    """A linear map between channels in front and channels behind."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.sizes = (weight.shape[1], weight.shape[0])
        self.weight = _padded(weight.mT, _power(weight.shape[1]), _power(weight.shape[0]), dtype)
        self.back = self.weight.mT.contiguous()
        self.bias, self.none = bias.float(), torch.zeros_like(self.weight[:, 0], dtype=torch.float)


class _FusedBridge:
    """Constants of a way to the next coarser level and back."""

    def __init__(self, bridge: Bridge, dtype: torch.dtype) -> None:
        down_rows, down, rows, columns = _matrices(bridge.transform, "fine")
        up_rows, up, coarse_rows, coarse_columns = _matrices(bridge.transform, "coarse")
        inward = coarse_rows @ down_rows
        self.down = _Resampling(*(m.to(dtype) for m in (down, inward, coarse_columns)))
        self.up = _Resampling(*(m.to(dtype) for m in (up, rows @ up_rows, columns)))
        self.down_back, self.up_back = self.down.transpose, self.up.transpose
        self._shrink = bridge.shrink.weight.to(dtype), bridge.shrink.bias.to(dtype)
        self._grow = bridge.grow.weight.to(dtype), bridge.grow.bias.to(dtype)

    def shrink(self, h: Float[Tensor, "B h w C"]) -> Tensor:
        """To the channels of the coarser level; after the resampling, which it commutes with."""
        return linear(h, *self._shrink)

    def grow(self, h: Float[Tensor, "B h w C"]) -> Tensor:
        """To the channels of the finer level."""
        return linear(h, *self._grow)


class _FusedBlock:
    """Constants of a block, its place among all, and their sizes as the kernels name them."""

    def __init__(self, block: Block, dtype: torch.dtype, order: int) -> None:
        self.order = order
        transform, mix = block.spectral.transform, block.spectral.mix.weight
        hidden, width = mix.shape
        near = block.local.split[0]
        side, size, wide = _power(max(near, width - near)), _power(width), _power(hidden)
        piece = _cut(hidden)
        padded = -(-hidden // piece) * piece
        self.width = {"C": width, "C_": size}
        self.local = {"L": near, "S_": side}
        self.there = {**self.width, "N": hidden, "N_": padded, "J_": piece}
        whole = padded if padded <= 128 else piece
        self.whole = {**self.there, "J_": whole}
        self.pieces = {"N": hidden, "J_": min(_BACKWARD, whole)}
        self.wide = {"D": hidden, "D_": wide}
        self.back = {"C": hidden, "C_": wide, "D": width, "D_": size}
        rows, columns, rows_back, columns_back = (
            m.to(dtype).contiguous() for m in _matrices(transform, "fine")
        )
        number, across = columns.shape[0], rows.shape[1]
        self.modes = {"K": number, "K_": _piece(number)}
        self.lines = {"K": number, "Q_": _power(number)}
        self.across = {"K": number, "Q": across, "Q_": _power(across)}
        self.page = rows[0].numel() if len(rows) > 1 else 0
        self.analysis, self.synthesis = columns, columns_back
        self.analysis_back, self.synthesis_back = (m.mT.contiguous() for m in (columns, columns_back))
        self.rows, self.rows_back = rows, rows_back
        self.rows_turned, self.rows_back_turned = (m.mT.contiguous() for m in (rows, rows_back))
        self.filter = block.spectral.filter().transpose(0, 1).to(dtype).contiguous()
        self.mix = _padded(mix.mT, size, wide, dtype)
        self.mix_back = self.mix.mT.contiguous()
        table = _table(transform.basis)
        here = torch.arange(table.shape[1], dtype=table.dtype)[None]
        self.seen = torch.cat([here, here, table]).contiguous().to(mix.device)
        self.sources = _sources(torch.cat([here, table])).contiguous().to(mix.device)
        parts = block.local.stencil().split([near, width - near, *4 * [near]], 1)
        parts = [_padded(w.mT, side, padded, dtype) for w in parts]
        self.weight = torch.stack(parts)
        rows_back = -(-hidden // self.pieces["J_"]) * self.pieces["J_"]
        back = self.weight[:, :, :rows_back].mT.contiguous()
        self.far, self.weight_back = back[1], torch.cat([back[:1], back[2:]])
        self.bias = pad(block.local.bias, (0, padded - hidden))
        self.out = _padded(block.out.weight.mT, padded, size, dtype)
        self.out_back, self.out_bias = self.out.mT.contiguous(), block.out.bias

    def filtered(self, modes: Tensor, analysis: Tensor, mix: Tensor, synthesis: Tensor, **sizes: int) -> Tensor:
        """The filter from its second product to its last but one.

        Args:
            modes: ``(B, K, H, C)``.
            analysis: Its second product.
            mix: Map of the channels.
            synthesis: First product of the synthesis.
            sizes: As the kernel names them.
        """
        batch, number, lines, _ = modes.shape
        out = modes.new_empty(batch, number, lines, sizes["D"])
        _FILTERED.run(
            kernels.filtered, (number, batch), lines, modes, analysis, self.filter, mix, synthesis,
            out, lines, self.page, **self.across, **sizes,
        )  # fmt: skip
        return out


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
    nobody = torch.full_like(found[0][0], -1)
    rows = [torch.stack([p[i] if i < len(p) else nobody for p in found]) for i in range(most)]
    return torch.stack(rows).int()


class _RunBlock(torch.autograd.Function):
    """A block; its modulation and constants are not differentiated by."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, modulation: Tensor, block: _FusedBlock) -> Tensor:
        batch, lines, points, width = h.shape
        hidden, number = block.there["N"], block.modes["K"]
        factor, shift = modulation.chunk(2, 1)
        y, modes = torch.empty_like(h), h.new_empty(batch, number, lines, width)
        _NORMALISE.run(
            kernels.normalise, (lines, batch), points, h, factor, shift, block.analysis, y, modes,
            points, lines, modulation.stride(0), **block.width, **block.lines,
        )  # fmt: skip
        modes = block.filtered(
            modes, block.rows, block.mix, block.rows_back, **block.width, **block.wide, FIRST=True
        )
        keep = ctx.needs_input_grad[0]
        mixed = h.new_empty(*h.shape[:3], hidden) if keep else h
        out = torch.empty_like(h)
        _BLOCK.tiled(
            kernels.block, batch, points, lines, h, y, modes, block.synthesis,
            block.seen, block.weight, block.bias, block.out, block.out_bias, mixed, out,
            **block.whole, **block.local, **block.modes, KEEP=keep,
        )  # fmt: skip
        if keep:
            ctx.save_for_backward(h, modulation, mixed)
            ctx.block = block
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (h, modulation, mixed), block = ctx.saved_tensors, ctx.block
        (g,) = (gradient.contiguous() for gradient in gradients)
        batch, lines, points, width = h.shape
        hidden, number = block.there["N"], block.modes["K"]
        inner, modes = torch.empty_like(mixed), h.new_empty(batch, number, lines, hidden)
        pieces = triton.cdiv(hidden, block.there["J_"])
        _GATE.run(
            kernels.gate_backward, (lines * pieces, batch), points, g, mixed, block.out_back,
            block.synthesis_back, inner, modes, points, lines, **block.there, **block.lines,
        )  # fmt: skip
        modes = block.filtered(
            modes, block.rows_back_turned, block.mix_back, block.rows_turned, **block.back,
            FIRST=False,
        )  # fmt: skip
        out = torch.empty_like(h)
        _BLOCK_BACKWARD.tiled(
            kernels.block_backward, batch, points, lines, g, inner, h, modulation,
            modes, block.analysis_back, block.sources, block.weight_back, block.far, out,
            row_stride=modulation.stride(0), C=width, **block.local, **block.pieces,
            **block.modes, PAIRS=len(block.sources) > 1,
        )  # fmt: skip
        return out, None, None


class _Descend(torch.autograd.Function):
    """A field, and itself on the coarser grid."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bridge: _FusedBridge) -> tuple[Tensor, Tensor]:
        ctx.bridge = bridge
        return h.view_as(h), bridge.down(h)

    @staticmethod
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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,) = gradients
        return g, ctx.bridge.up_back(g), None


class _Lift(torch.autograd.Function):
    """Channels behind, in the dtype of the network."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lift: _Pointwise, dtype: torch.dtype) -> Tensor:
        ctx.lift, ctx.like = lift, x
        batch, channels, height, width = x.shape
        h = x.new_empty(batch, height, width, lift.sizes[1], dtype=dtype)
        known, size = lift.weight.shape
        _POINTWISE.flat(
            kernels.lift, height * width, batch, x.contiguous(), lift.weight, lift.bias, h,
            height * width, D=channels, D_=known, C=lift.sizes[1], C_=size,
        )  # fmt: skip
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g,), lift = gradients, ctx.lift
        out = torch.empty_like(ctx.like, memory_format=torch.contiguous_format)
        points = out.shape[2] * out.shape[3]
        known, size = lift.weight.shape
        _POINTWISE.flat(
            kernels.project, points, len(out), g.contiguous(), lift.back, lift.none, out, points,
            D=out.shape[1], D_=known, C=g.shape[-1], C_=size, NORM=False,
        )  # fmt: skip
        return out, None, None


class _Project(torch.autograd.Function):
    """Normalised, and the channels in front again, in float32."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: _Pointwise, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(h)
        ctx.head = head
        channels = head.sizes[1]
        out = h.new_empty(len(h), channels, *shape, dtype=torch.float32)
        size, known = head.weight.shape
        points = shape[0] * shape[1]
        _POINTWISE.flat(
            kernels.project, points, len(h), h, head.weight, head.bias, out, points,
            D=channels, D_=known, C=h.shape[-1], C_=size, NORM=True,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g,), (h,), head = gradients, ctx.saved_tensors, ctx.head
        out, points = torch.empty_like(h), h.shape[1] * h.shape[2]
        size, known = head.weight.shape
        _POINTWISE.flat(
            kernels.project_backward, points, len(h), g.contiguous(), h, head.back, out, points,
            D=g.shape[1], D_=known, C=h.shape[-1], C_=size,
        )  # fmt: skip
        return out, None, None


def _power(size: int) -> int:
    """Size of an array in registers."""
    return max(16, triton.next_power_of_2(size))


def _padded(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    more = (0, columns - weight.shape[1], 0, rows - weight.shape[0])
    return pad(weight, more).to(dtype).contiguous()


def _piece(modes: int) -> int:
    """Modes that a product takes at once."""
    return 32 if -modes % 32 < 16 else 16


def _cut(channels: int) -> int:
    """Size of the pieces that channels are taken in."""
    return min(64, _power(channels))


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
        """Over all points of all states, a tile in each program."""
        tile = min(self.points, _power(points * lines))
        if points % tile == 0 or tile % points == 0:
            touched = max(tile // points, 1)
        else:
            touched = (tile - 2) // points + 2
        sizes |= {"points": points, "lines": lines, "LINES": touched}
        grid = (triton.cdiv(points * lines, tile), batch)
        self.run(kernel, grid, tile, *inputs, **sizes)


_BACKWARD = 64  # hidden channels at once in the kernel of a block's derivative
_NORMALISE = _FILTERED = _BLOCK = _SYNTHESIS = _Launch()
_GATE = _BLOCK_BACKWARD = _Launch(stages=2)
_POINTWISE = _Launch(128)
