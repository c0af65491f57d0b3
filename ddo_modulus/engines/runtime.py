# SPDX-License-Identifier: Apache-2.0
"""Base class of engines that run exported graphs.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddo_modulus.diffusion.package import Package
from ddo_modulus.engines.folder import Contract
from ddo_modulus.errors import InputError
from ddo_modulus.fields.derivative import Pullback
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField

DENOISER, VJP = "denoiser", "denoiser_vjp"


class GraphEngine(ABC):
    """A prior computed by two exported graphs, on a fixed grid.

    Automatic differentiation uses the exported vector-Jacobian product, so an engine can replace
    the operator everywhere.

    Args:
        package: The prior.
        contract: Contract of the graphs.
        batch: Largest number of states computed at once; larger batches are split. None for no
            limit.

    Raises:
        InputError: If a call has another grid or another condition than was exported.
    """

    def __init__(self, package: Package, contract: Contract, batch: int | None = None) -> None:
        self.contract, self.batch = contract, batch
        self.shape = (contract.shape[0], contract.shape[1])
        self.device = torch.device(package.operator.device)
        self.noise: GaussianField = package.operator.noise.at(self.shape)
        self.linear: GaussianDenoiser = package.operator.linear.at(self.shape)

    @abstractmethod
    def run(self, graph: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Run a graph, and return its outputs.

        Args:
            graph: Name of the graph.
            inputs: Inputs by name: float32, contiguous, on the engine's device.
        """

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Differentiable.apply(x, sigma, condition, self)
        return self._outputs(DENOISER, {"x": x, "sigma": sigma}, condition)[0]

    def value_and_pullback(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Pullback]:
        """Expected clean states, and ``v -> J^T v`` from the exported vector-Jacobian product."""
        return self(x, sigma, condition), lambda v: self.vjp(x, sigma, v, condition)[1]

    def vjp(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        v: Float[Tensor, "B C H W"],
        condition: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """Expected clean states and ``J^T v``."""
        clean, product = self._outputs(VJP, {"x": x, "sigma": sigma, "v": v}, condition)
        return clean, product

    def _outputs(
        self, graph: str, inputs: dict[str, Tensor], condition: Tensor | None
    ) -> list[Tensor]:
        x = inputs["x"]
        self._check(x, condition)
        if condition is not None:
            inputs["condition"] = condition.expand(len(x), *condition.shape[1:])
        ready = {k: t.detach().to(self.device, torch.float32) for k, t in inputs.items()}
        size = self.batch or len(x)
        parts = [
            self.run(graph, {k: t[i : i + size].contiguous() for k, t in ready.items()})
            for i in range(0, len(x), size)
        ]
        joined = (torch.cat(p) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
        return [t.to(x.device, x.dtype) for t in joined]

    def _check(self, x: Tensor, condition: Tensor | None) -> None:
        expected = (self.contract.channels, *self.shape)
        if tuple(x.shape[1:]) != expected:
            have, want = ("x".join(map(str, s)) for s in (x.shape[1:], expected))
            raise InputError(
                f"the engine takes states of {want}, got {have}; export one for this grid with "
                f"resolution=[{x.shape[-2]},{x.shape[-1]}]"
            )
        size = None if condition is None else tuple(condition.shape[1:])
        wanted = None if self.contract.condition is None else tuple(self.contract.condition)
        if size != wanted:
            raise InputError(f"the engine takes a condition of {wanted}, got {size}")


class _Saved(Protocol):
    engine: GraphEngine
    saved_tensors: tuple[Tensor, Tensor, Tensor | None]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Differentiable(torch.autograd.Function):
    """An engine as a node of automatic differentiation."""

    @staticmethod
    def forward(
        ctx: _Saved, x: Tensor, sigma: Tensor, condition: Tensor | None, engine: GraphEngine
    ) -> Tensor:
        """Expected clean states."""
        ctx.engine = engine
        ctx.save_for_backward(x, sigma, condition)
        return engine(x, sigma, condition)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, v: Tensor) -> tuple[Tensor, None, None, None]:
        """``J^T v``."""
        x, sigma, condition = ctx.saved_tensors
        return ctx.engine.vjp(x, sigma, v, condition)[1], None, None, None
