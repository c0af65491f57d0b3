# SPDX-License-Identifier: Apache-2.0
"""The operator as an engine: PyTorch and its automatic differentiation.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.engines.options import EngineOptions
from ddo_modulus.fields.derivative import Differentiable
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField


class TorchEngine(Differentiable):
    """The operator itself, with automatic differentiation.

    Args:
        operator: The operator.
        shape: Grid ``(H, W)`` of :attr:`noise` and :attr:`linear`; the operator's own if None.
    """

    def __init__(self, operator: DiffusionOperator, shape: tuple[int, int] | None = None) -> None:
        self.operator = operator
        self.shape = operator.basis.shape if shape is None else shape

    @classmethod
    def of(cls, package: Package, options: EngineOptions) -> TorchEngine:
        """The engine of a package."""
        return cls(package.operator, options.shape)

    @property
    def noise(self) -> GaussianField:
        """Noise field on the grid."""
        return self.operator.noise.at(self.shape)

    @property
    def linear(self) -> GaussianDenoiser:
        """Gaussian part on the grid."""
        return self.operator.linear.at(self.shape)

    def __call__(
        self,
        x: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Expected clean states."""
        return self.operator(x, sigma, condition)
