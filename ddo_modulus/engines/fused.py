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
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from ddo_modulus.engines import kernels
from ddo_modulus.engines.fused_blocks import FusedBlock, RunBlock
from ddo_modulus.engines.fused_bridges import Ascend, Descend, FusedBridge
from ddo_modulus.engines.launches import (
    WIDEST,
    Launch,
    channel_sizes,
    first_order,
    padded_weight,
    turned,
)
from ddo_modulus.nn.operator import Block, Bridge, Level, NeuralOperator, noise_features

_MOST_MODES = 64  # along an axis, of which sums are kept in registers
_MOST_STATES = 65535  # second dimension of a grid of programs


class FusedOperator(nn.Module):
    """A neural operator in few kernels on its training grid; the network itself on any other.

    Blocks of more than 128 channels are those of ``network``, compiled or not; all
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

        def of(block: nn.Module, same: nn.Module) -> FusedBlock | Block:
            assert isinstance(block, Block) and isinstance(same, Block)
            if block.out.out_features > WIDEST:
                return same
            narrow.append(block)
            return FusedBlock(block, dtype, len(narrow) - 1)

        pairs = list(zip(cast(list[Level], network.levels), original, strict=True))
        self.down = [[of(*b) for b in zip(new.down, old.down, strict=True)] for new, old in pairs]
        self.up = [[of(*b) for b in zip(new.up, old.up, strict=True)] for new, old in pairs]
        self.bridges = [FusedBridge(b, dtype) for b in cast(list[Bridge], network.bridges)]
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
        expected = (self.network.in_channels, *self.shape)
        if x.shape[1:] != expected or len(x) > _MOST_STATES:
            return self.network(x, sigma)  # which refuses a wrong number of channels
        sigma = sigma.detach().expand(len(x))
        # Triton launches on the current device, whatever its arguments are on.
        with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
            embedding = self.embed(noise_features(sigma, torch.float32))
            rows = linear(embedding, self.modulation, self.modulation_bias).split(self.widths, 1)
            places = [field.to(x.dtype).expand(len(x), -1, -1, -1) for field in self.places]
            h = _Lift.apply(torch.cat([x, *places], 1), self.lift)

            def run(block: FusedBlock | Block, h: Tensor) -> Tensor:
                if isinstance(block, FusedBlock):
                    return RunBlock.apply(h, rows[block.order], block)
                half = self.dtype != torch.float32
                with torch.autocast(h.device.type, self.dtype if half else None, enabled=half):
                    return block(h, embedding)

            kept = []
            for i, blocks in enumerate(self.down):
                for block in blocks:
                    h = run(block, h)
                if i < len(self.bridges):
                    fine, coarse = Descend.apply(h, self.bridges[i])
                    kept.append(fine)
                    h = self.bridges[i].shrink(coarse)
            for i in reversed(range(len(self.up))):
                if i < len(self.bridges):
                    h = Ascend.apply(kept.pop(), self.bridges[i].grow(h), self.bridges[i])
                for block in self.up[i]:
                    h = run(block, h)
            return _Project.apply(h, self.head)


def fits(network: NeuralOperator) -> bool:
    """Whether kernels are cut for a network: for its finest level, where most of the time goes.

    And for the modes of all levels that are not too wide for them, and the channels at both ends.
    """
    ends = network.lift.in_features, network.head.project.out_features
    blocks = [m for m in network.modules() if isinstance(m, Block)]
    narrow = [block for block in blocks if block.out.out_features <= WIDEST]
    points = network.basis.shape[0] * network.basis.shape[1]
    return (
        max(ends) <= WIDEST
        and bool(narrow)
        and blocks[0] is narrow[0]
        and max(max(block.spectral.transform.modes) for block in narrow) <= _MOST_MODES
        and points * max(block.out.in_features for block in narrow) < 2**31  # offsets in a state
    )


class _Pointwise:
    """Weights of a linear map between channels first and channels last."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight = padded_weight(layer.weight.mT, dtype)
        self.adjoint = turned(self.weight)
        self.bias, self.no_bias = layer.bias, torch.zeros_like(self.weight[:, 0], dtype=torch.float)
        self.out = layer.out_features


class _Lift(torch.autograd.Function):
    """From channels first to the hidden channels, last, in the dtype of the network."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lift: _Pointwise) -> Tensor:
        """See the class."""
        ctx.lift, ctx.like = lift, x.new_empty(0)
        ctx.size = batch, channels, height, width = x.shape
        h = x.new_empty(batch, height, width, lift.out, dtype=lift.weight.dtype)
        _POINTWISE.flat(
            kernels.lift, height * width, batch, x.contiguous(), lift.weight, lift.bias, h,
            height * width, **channel_sizes(channels, lift.out),
        )  # fmt: skip
        return h

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Gradient by the states."""
        (g,), lift = gradients, ctx.lift
        out = ctx.like.new_empty(ctx.size)
        points = out.shape[2] * out.shape[3]
        _POINTWISE.flat(
            kernels.project, points, len(out), g.contiguous(), lift.adjoint, lift.no_bias, out,
            points, **channel_sizes(out.shape[1], lift.out), NORM=False,
        )  # fmt: skip
        return out, None


class _Project(torch.autograd.Function):
    """From normalised hidden channels, last, to channels first, in float32."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: _Pointwise) -> Tensor:
        """See the class."""
        h = h.contiguous()
        ctx.save_for_backward(h)
        ctx.head = head
        batch, height, width, channels = h.shape
        out = h.new_empty(batch, head.out, height, width, dtype=torch.float32)
        _POINTWISE.flat(
            kernels.project, height * width, batch, h, head.weight, head.bias, out, height * width,
            **channel_sizes(head.out, channels), NORM=True,
        )  # fmt: skip
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Gradient by the states."""
        (g,), (h,), head = gradients, ctx.saved_tensors, ctx.head
        out, points = torch.empty_like(h), h.shape[1] * h.shape[2]
        _POINTWISE.flat(
            kernels.project_backward, points, len(h), g.contiguous(), h, head.adjoint, out, points,
            **channel_sizes(head.out, h.shape[-1]),
        )  # fmt: skip
        return out, None


_POINTWISE = Launch(128)
