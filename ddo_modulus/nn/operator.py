# SPDX-License-Identifier: Apache-2.0
"""The U-shaped neural operator.

Axes: ``B`` batch, ``H W`` grid, ``C`` channel (last inside the network: every product along the
grid and every mixing of channels is then one large matrix product), ``K1 K2`` modes.

The finest level lives on the grid of its input, whatever that is; the coarser ones live on grids of
their own, fixed by the training grid, and are reached by spectral resampling. All that a block does
is defined in function space: spectral filters by mode, differences at a fixed physical distance,
pointwise maps. The operator may therefore be evaluated on another grid than it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from physicsnemo.core.meta import ModelMetaData
from physicsnemo.core.module import Module
from torch import Tensor, nn

from ddo_modulus.compat import Rehearsed, allow_variants
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.domains import build_basis
from ddo_modulus.nn.spectral import SpectralLinear, Transform, odd_band
from ddo_modulus.nn.stencil import LocalLinear


class Block(nn.Module):
    """Residual block: local differences and a spectral filter, mixed by a pointwise network.

    ``h + W2 silu(W1 [y, differences(y)] + V filter(y))`` with ``y`` the normalised ``h``, scaled
    and shifted by the noise level. Differences carry what a truncated spectral filter cannot see.
    """

    def __init__(
        self, transform: Transform, width: int, embedding: int, expansion: float, local: float
    ) -> None:
        super().__init__()
        hidden = int(width * expansion)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(embedding, 2 * width)
        self.local = LocalLinear(width, hidden, round(width * local))
        self.spectral = SpectralLinear(transform, width, hidden)
        self.out = nn.Linear(hidden, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, h: Float[Tensor, "B H W C"], embedding: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B H W C"]:
        """One residual update."""
        scale, shift = self.modulation(embedding)[:, None, None].chunk(2, -1)
        y = (self.norm(h) * (1 + scale) + shift).to(h.dtype)  # autocast would keep it wide
        mixed = self.local(y, self.spectral.transform.basis) + self.spectral(y)
        return h + self.out(nn.functional.silu(mixed))


class Level(nn.Module):
    """Blocks on one grid, before (down) and after (up) the coarser levels."""

    def __init__(
        self,
        basis: Basis,
        width: int,
        depth: int,
        modes: int,
        embedding: int,
        expansion: float,
        local: float,
    ) -> None:
        super().__init__()
        self.transform = Transform(basis.truncate(odd_band(basis.shape, modes)))

        def blocks() -> nn.ModuleList:
            options = (self.transform, width, embedding, expansion, local)
            return nn.ModuleList(Block(*options) for _ in range(depth))

        self.down, self.up = blocks(), blocks()


class Bridge(nn.Module):
    """Way from a level to the next coarser one, and back up onto the finer field."""

    def __init__(self, fine: Basis, coarse: Basis, widths: tuple[int, int]) -> None:
        super().__init__()
        # What the coarser grid resolves without ambiguity goes between them.
        band = zip(odd_band(coarse.shape), coarse.modes, strict=True)
        self.transform = Transform(fine.truncate([min(pair) for pair in band]), coarse.shape)
        self.shrink = nn.Linear(widths[0], widths[1])
        self.grow = nn.Linear(widths[1], widths[0])

    def forward(
        self, h: Float[Tensor, "B H W C"], fine: Float[Tensor, "B h w c"] | None = None
    ) -> Float[Tensor, "B h w c"]:
        """Down to the coarse grid; or up, added to ``fine``, if there is one."""
        if fine is None:
            return self.transform.resample(self.shrink(h), down=True)
        return fine + self.transform.resample(self.grow(h), down=False, like=fine)


class Lift(nn.Linear):
    """Pointwise linear map to channels last.

    As many empty channels are added as the fast matrix units ask for.
    """

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W D"]:
        """Channels behind."""
        empty = -x.shape[1] % 8
        x = torch.cat([x, x.new_zeros(x.shape[0], empty, *x.shape[2:])], 1).movedim(1, -1)
        weight = torch.cat([self.weight, self.weight.new_zeros(len(self.weight), empty)], 1)
        return nn.functional.linear(x, weight, self.bias)


class Head(nn.Module):
    """Normalisation and projection to the output; zero before training."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.project = nn.Linear(width, out)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, h: Float[Tensor, "B H W C"]) -> Float[Tensor, "B D H W"]:
        """Channels in front again."""
        return self.project(self.norm(h)).movedim(-1, 1)


class NeuralOperator(Module, Rehearsed):
    r"""U-shaped neural operator with a noise level.

    Args:
        in_channels: Channels of the input, conditions included.
        out_channels: Channels of the output.
        basis: Arguments of :func:`.build_basis`: ``{"domain": ..., "shape": (H, W), "lengths":
            ...}``, with the training grid, and the extent of the domain (not for the sphere).
        widths: Channels of each level, the finest first.
        depths: Blocks of each level on the way down, and again on the way up.
        modes: Spectral modes along each axis at each level.
        expansion: Hidden over visible channels in a block.
        local: Share of the channels whose differences a block sees.
        embedding: Size of the embedding of the noise level.
        coordinates: Row and column functions of the basis as further inputs, where the process
            depends on the place; ``(0, 0)`` for none.
        static_channels: Learned fields as further inputs (in the low modes of the basis).

    Forward:
        x: ``(B, in_channels, H, W)``.
        sigma: ``(B,)`` noise levels.

    Outputs:
        ``(B, out_channels, H, W)``; zero before training.
    """

    __model_checkpoint_version__ = "0.3.0"
    __supported_model_checkpoint_version__ = {
        "0.2.0": "NeuralOperator: arguments of checkpoint version 0.2.0 are converted to 0.3.0",
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        basis: Mapping[str, Any],
        widths: Sequence[int] = (64, 96, 128),
        depths: Sequence[int] = (2, 2, 2),
        modes: Sequence[int] = (23, 23, 15),
        expansion: float = 1.5,
        local: float = 0.5,
        embedding: int = 64,
        coordinates: Sequence[int] = (0, 0),
        static_channels: int = 0,
    ) -> None:
        super().__init__(
            meta=ModelMetaData(
                cuda_graphs=True,
                amp=True,
                bf16=True,
                onnx=True,
                func_torch=True,
                auto_grad=True,
            )
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.basis = build_basis(**basis)
        self.coordinates = (int(coordinates[0]), int(coordinates[1]))
        self.embed = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.static = None
        if static_channels:
            self.static_basis = self.basis.truncate(odd_band(self.basis.shape, 15))
            self.static = nn.Parameter(torch.zeros(static_channels, self.static_basis.size))
        grids = [self.basis]
        for _ in widths[1:]:
            grids.append(self.basis.at([max(math.ceil(n / 2), 4) for n in grids[-1].shape]))
        self.levels = nn.ModuleList(
            Level(grid, width, depth, mode, embedding, expansion, local)
            for grid, width, depth, mode in zip(grids, widths, depths, modes, strict=True)
        )
        self.bridges = nn.ModuleList(
            Bridge(grids[i], grids[i + 1], (widths[i], widths[i + 1]))
            for i in range(len(grids) - 1)
        )
        self.lift = Lift(in_channels + sum(self.coordinates) + static_channels, widths[0])
        self.head = Head(widths[0], out_channels)

    @classmethod
    def _backward_compat_arg_mapper(cls, version: str, args: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a checkpoint of another version, as the constructor takes them now.

        Version 0.2.0 had those of the basis one by one.
        """
        if version != "0.2.0":
            return args
        basis = {k: args[k] for k in ("domain", "shape", "lengths") if k in args}
        return {k: v for k, v in args.items() if k not in basis} | {
            "basis": {"domain": "torus"} | basis
        }

    def forward(
        self, x: Float[Tensor, "B Cin H W"], sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B Cout H W"]:
        """Evaluate the operator on the grid of ``x``."""
        self.rehearse(x, sigma)
        if not torch.compiler.is_compiling() and x.shape[1] != self.in_channels:
            raise ValueError(f"expected {self.in_channels} input channels, got {tuple(x.shape)}")
        embedding = self.embed(noise_features(sigma, self.lift.weight.dtype))
        h = self.lift(torch.cat([x, *self.places(x)], 1))
        kept: list[Tensor] = []
        levels, bridges = cast(list[Level], self.levels), cast(list[Bridge], self.bridges)
        for i, level in enumerate(levels):
            for block in level.down:
                h = block(h, embedding)
            if i < len(bridges):
                kept.append(h)
                h = bridges[i](h)
        for i in reversed(range(len(levels))):
            if i < len(bridges):
                h = bridges[i](h, kept.pop())
            for block in levels[i].up:
                h = block(h, embedding)
        return self.head(h)

    def compile(self, *args: object, **kwargs: object) -> None:
        """Compile part by part, as :meth:`torch.nn.Module.compile` compiles the whole.

        Blocks of one level share their code: it is traced once, not once for each block, so the
        time to compile does not grow with the depth.
        """
        # All parts of a kind are variants of one function to the compiler, which gives up on a
        # function after eight of them and runs it uncompiled.
        allow_variants(64)
        for part in self.modules():
            if isinstance(part, Lift | Block | Bridge | Head):
                part.compile(*args, **kwargs)

    def places(self, x: Tensor) -> list[Tensor]:
        """Coordinate functions and learned fields on the grid of ``x``."""
        shape = (x.shape[-2], x.shape[-1])
        fields = []
        if sum(self.coordinates):
            fields.append(self.basis.coordinates(self.coordinates, shape, x.device).to(x.dtype))
        if self.static is not None:
            fields.append(self.static_basis.synthesize(self.static, shape).to(x.dtype))
        return [field.expand(x.shape[0], -1, -1, -1) for field in fields]


_FREQUENCIES = 16


def noise_features(sigma: Float[Tensor, " B"], dtype: torch.dtype) -> Float[Tensor, "B E"]:
    """Sines and cosines of log noise, over scales from the whole range of levels to a step."""
    octave = torch.arange(_FREQUENCIES, device=sigma.device, dtype=torch.float32)
    angle = sigma.float().log()[:, None] * (0.1 * 2 ** (octave / 3))
    return torch.cat([angle.sin(), angle.cos()], 1).to(dtype)
