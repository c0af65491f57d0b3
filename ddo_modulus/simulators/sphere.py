# SPDX-License-Identifier: Apache-2.0
"""torch-harmonics' operators on the sphere, for many states at once.

Imported where they are needed, since torch-harmonics is an extra.

Axes: ``B`` states of a batch, ``L M`` degrees and orders, ``N`` Gaussian latitudes. The first axis
holds geopotential, vorticity and divergence, of a wind its eastward and northward component.
"""

from __future__ import annotations

from torch import Tensor

from ddo_modulus.errors import InputError

try:
    from torch_harmonics import InverseRealSHT, InverseRealVectorSHT
    from torch_harmonics.examples.shallow_water_equations import ShallowWaterSolver
except ImportError as error:  # also where it was built for another torch
    raise InputError(
        "shallow water needs torch-harmonics, built for the torch that is installed "
        f"({error}): pip install 'ddo-modulus[sphere]'"
    ) from error

__all__ = ["BatchedSolver", "InverseRealSHT", "InverseRealVectorSHT"]


class BatchedSolver(ShallowWaterSolver):
    """The library's solver for states ``(3, B, L, M)``: its vector transforms want ``(B, 2, ...)``.

    Everything else in it works component by component.
    """

    def vrtdivspec(self, ugrid: Tensor) -> Tensor:
        """Coefficients ``(2, B, L, M)`` of a vector field's vorticity and divergence."""
        return super().vrtdivspec(ugrid.transpose(0, 1)).transpose(0, 1)

    def getuv(self, vrtdivspec: Tensor) -> Tensor:
        """Wind ``(2, B, N, 2N)`` of the coefficients of vorticity and divergence."""
        return super().getuv(vrtdivspec.transpose(0, 1)).transpose(0, 1)
