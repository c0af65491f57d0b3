# SPDX-License-Identifier: Apache-2.0
"""What is measured on each field of two sets that are to be compared.

All measures are numbers of single fields (or of a field and those that follow it); what is
compared are their means, under any weights of the fields.

Axes: ``N`` fields, ``T`` frames, ``H W`` grid, ``S`` shells, ``K`` numbers measured on a field,
``R`` resamplings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.grid import Grid
from ddo_modulus.verification.scattering import Scattering, check_octaves, resolved_octaves
from ddo_modulus.verification.structure import (
    basis_of,
    pair_moments,
    shell_power,
)
from ddo_modulus.verification.temporal import lagged_products, time_difference_energy

_VALUES = 2**21  # point values kept of a set of fields; points are thinned at random beyond
_LAGS = 32  # of the temporal autocovariance, at most


class Measures:
    """What is measured on each field, on its own grid or on the grid that two sets share.

    Args:
        samples: Grid of the samples.
        truth: Grid of the truth.
        mean: Mean of the truth over fields and area: origin of moments and autocovariances.
        fields: Number of fields of the larger set.
        lags: Frames that later measures look ahead; 0 for fields without order in time.
        largest: Largest wavenumber of the spectra; all that both grids resolve if None.
        octaves: Of the features; all that both grids resolve, at most five, if None.

    Raises:
        InputError: If a grid does not resolve the octaves, or no shell is left.

    Attributes:
        grid: The shared one.
        wavenumbers: ``(S,)``.
        points: Points (flat) of the shared grid whose values are kept.
    """

    def __init__(
        self,
        samples: Grid,
        truth: Grid,
        *,
        mean: float = 0.0,
        fields: int,
        lags: int = 0,
        largest: float | None = None,
        octaves: int | None = None,
    ) -> None:
        self.bases = {grid.shape: basis_of(grid) for grid in (samples, truth)}
        ends = {grid: self.bases[grid.shape].complete_wavenumber() for grid in (samples, truth)}
        self.grid = min((truth, samples), key=lambda grid: ends[grid])
        self.mean, self.lags = mean, lags
        self.largest = min(ends.values()) if largest is None else min(*ends.values(), largest)
        self.octaves = resolved_octaves(*self.bases.values()) if octaves is None else octaves
        for basis in self.bases.values():
            check_octaves(basis, self.octaves)
        self._scattering = {
            shape: Scattering(basis, self.octaves)
            for shape, basis in self.bases.items()
            if self.octaves
        }
        self.area = torch.from_numpy(self.grid.area())
        self.area = self.area / self.area.sum()
        count = self.area.numel()
        kept = min(count, max(1, _VALUES // fields))
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randperm(count, generator=generator)[:kept].sort().values
        zeros = torch.zeros(1, *self.basis.shape)
        self.wavenumbers = shell_power(zeros, self.basis, largest=self.largest)[0]

    @property
    def basis(self) -> Basis:
        """Basis of the shared grid."""
        return self.bases[self.grid.shape]

    def __call__(self, x: Float[Tensor, "T H W"], count: int | None = None) -> dict[str, Tensor]:
        """Measure consecutive frames.

        Args:
            x: Frames on the samples' or the truth's grid.
            count: How many to measure, from the first on; those after them are only looked ahead
                at. All if None.

        Returns:
            ``(count, ...)`` by name, float64 in main memory; NaN where a later frame is missing.
        """
        count = len(x) if count is None else count
        power = self._power(x[:count])
        coarse = self._to_shared(x)
        area = self.area.to(x.device)
        deviation = coarse.double() - self.mean
        now = deviation[:count]
        powers = [(now**p * area).sum((-2, -1)) for p in (1, 2, 3, 4)]
        found = {
            "power": power,
            "moments": torch.stack(powers, 1),
            "pairs": pair_moments(now, self.grid),
            "values": now.flatten(-2)[:, self.points.to(x.device)].float(),
        }
        if self.octaves:
            found["features"] = self._scattering[_shape(x)](x[:count])
        if self.lags:
            energy = x.new_full((count,), torch.nan, dtype=torch.float64)
            jump = power.new_full(power.shape, torch.nan)
            if len(x) > 1:
                steps = time_difference_energy(deviation, area)[:count]
                energy[: len(steps)] = steps
                jump[: len(steps)] = self._power((x[1:].double() - x[:-1].double())[:count])
            found["differences"], found["difference power"] = energy[:, None], jump
            found["lagged"] = lagged_products(deviation, self.lags, area)[:count]
        return {name: value.cpu() for name, value in found.items()}

    def _power(self, x: Tensor) -> Tensor:
        return shell_power(x, self.bases[_shape(x)], largest=self.largest)[1]

    def _to_shared(self, x: Tensor) -> Tensor:
        """Fields on the shared grid: as they are, or truncated to its band."""
        if _shape(x) == self.grid.shape:
            return x
        own = self.bases[_shape(x)]
        here, there = (i.to(x.device) for i in own.shared(self.basis))
        found = own.analyze(x.double())
        coefficients = found.new_zeros(len(x), self.basis.size)
        coefficients[:, there] = found[:, here]
        return self.basis.synthesize(coefficients)


@dataclass(frozen=True)
class Measured:
    """Measures of a set of fields.

    Attributes:
        values: ``(N, ...)`` by name, trajectory by trajectory.
        size: Number of trajectories and of frames in each; for single fields one frame, and as
            many as may be taken for independent.
    """

    values: dict[str, Tensor]
    size: tuple[int, int]

    @classmethod
    def of(cls, parts: Iterable[dict[str, Tensor]], size: tuple[int, int]) -> Measured:
        """Join what was measured part by part."""
        listed = list(parts)
        return cls({name: torch.cat([p[name] for p in listed]) for name in listed[0]}, size)

    def mean(self, name: str, weights: Float[Tensor, "R N"] | None = None) -> Float[Tensor, "R K"]:
        """Means of a measure under weights of the fields (equal ones if None), flattened."""
        x = self.values[name].double().flatten(1)
        w = x.new_full((1, len(x)), 1.0 / len(x)) if weights is None else weights
        finite = x.isfinite()
        if finite.all():
            return w @ x
        return (w @ torch.where(finite, x, 0.0)) / (w @ finite.double())


def temporal_lags(*frames: int) -> int:
    """Largest lag of the temporal autocovariance for trajectories of these lengths.

    Raises:
        InputError: If a trajectory has one frame.
    """
    if min(frames) < 2:
        raise InputError("trajectories need two frames or more on both sides")
    return min(_LAGS, max(1, min(frames) // 2))


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
