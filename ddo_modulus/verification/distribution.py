# SPDX-License-Identifier: Apache-2.0
r"""Distributions of point values: Wasserstein distance, quantiles, histograms.

The Wasserstein-1 distance is the area between two distribution functions,

.. math::
    W_1(F, G) = \int |F(x) - G(x)|\, dx ,

in the values' own units. All values are sorted once; any weights of the fields that they belong to
then give distribution functions by running sums, so a thousand resamplings need one sort.

Axes: ``N`` fields, ``P`` points of a field, ``V`` values, ``R`` resamplings, ``B`` bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import scipy.stats
import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError


def wasserstein_distance(
    one: Float[Tensor, " V"],
    other: Float[Tensor, " V2"],
    weights: tuple[Tensor, Tensor] | None = None,
) -> float:
    """Exact Wasserstein-1 distance of two samples of numbers.

    Args:
        one: Values; any shape is flattened.
        other: Values, in any other number.
        weights: Weights of both, of the values' shapes; equal ones if None.

    Returns:
        The distance in the values' units.

    Raises:
        InputError: If there are no values.
    """
    if one.numel() == 0 or other.numel() == 0:
        raise InputError("the Wasserstein distance needs values on both sides")
    one, other, *shares = (x.flatten().cpu() for x in (one, other, *(weights or ())))
    return float(scipy.stats.wasserstein_distance(one, other, *shares))


@dataclass(frozen=True)
class PointValues:
    """Values of many fields at the same points, sorted.

    Attributes:
        values: ``(V,)`` ascending.
        field: ``(V,)`` the field that each is of.
        share: ``(V,)`` weight of its point; those of one field sum to one.
    """

    values: Float[Tensor, " V"]
    field: Tensor
    share: Float[Tensor, " V"]

    @classmethod
    def of(cls, values: Float[Tensor, "N P"], area: Float[Tensor, " P"]) -> PointValues:
        """Sort the values of fields; ``area`` weighs their points."""
        number, points = values.shape
        ordered, order = values.reshape(-1).sort()
        share = (area / area.sum()).to(values.device, torch.float64)
        return cls(ordered.double(), order // points, share[order % points])

    def weights(self, fields: Float[Tensor, " N"]) -> Float[Tensor, " V"]:
        """Weights of the values, from weights of their fields."""
        return fields.to(self.share)[self.field] * self.share

    def quantiles(
        self, levels: Float[Tensor, " K"], fields: Float[Tensor, " N"]
    ) -> Float[Tensor, " K"]:
        """Quantiles of the values under weights of the fields."""
        below = self.weights(fields).cumsum(0)
        place = torch.searchsorted(below, levels.to(below) * below[-1])
        return self.values[place.clamp_max(len(self.values) - 1)]

    def wasserstein(self, fields: Float[Tensor, " N"]) -> Float[Tensor, ""]:
        """Exact Wasserstein-1 distance of two weightings of the fields, from their difference."""
        gap = self.weights(fields).cumsum(0)[:-1]
        return (gap.abs() * self.values.diff()).sum()

    def density(
        self, edges: Float[Tensor, " B1"], fields: Float[Tensor, "R N"]
    ) -> Float[Tensor, "R B"]:
        """Probability density in bins, for each weighting of the fields; outer bins are open."""
        inner = edges[1:-1].to(self.values)
        index = torch.bucketize(self.values, inner)
        bins, number = len(edges) - 1, fields.shape[1]
        table = self.share.new_zeros(number * bins)
        table.index_add_(0, self.field * bins + index, self.share)
        mass = fields.to(table) @ table.unflatten(0, (number, bins))
        return mass / edges.diff().to(mass)
