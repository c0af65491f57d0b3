# SPDX-License-Identifier: Apache-2.0
"""Samples: fields in physical units with their times, in memory or in a store.

Axes: ``N`` samples, ``P`` frames of a window, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.data.normalization import hours_of
from ddo_modulus.data.reader import StateReader
from ddo_modulus.errors import InputError
from ddo_modulus.training.domain import WHOLE, Part


@dataclass(frozen=True, eq=False)
class Samples:
    """Fields in physical units with their times.

    Attributes:
        fields: ``(N, C, H, W)`` float32, or a reader of them from a store.
        times: ``(N,)`` datetime64.
        trajectory: ``(N,)`` number of the independent run (or member) that each belongs to.
    """

    fields: Float[Tensor, "N C H W"] | StateReader
    times: np.ndarray
    trajectory: np.ndarray

    @classmethod
    def of(cls, dataset: xr.Dataset) -> Samples:
        """All fields of a dataset in canonical form, read into memory."""
        stacked = dataset.to_array("channel")
        lead = [d for d in ("trajectory", "ensemble") if d in stacked.dims]
        stacked = stacked.transpose(*lead, "time", "channel", "lat", "lon")
        runs, times = int(np.prod(stacked.shape[: len(lead)])), stacked.sizes["time"]
        fields = torch.from_numpy(np.ascontiguousarray(stacked.values, np.float32))
        return cls(
            fields.flatten(0, len(lead)),
            np.tile(stacked["time"].values, runs),
            np.repeat(np.arange(runs), times),
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.times)

    @property
    def hours(self) -> Int[Tensor, " N"]:
        """Hour of the day, UTC."""
        return torch.from_numpy(hours_of(self.times))

    @property
    def shape(self) -> tuple[int, int]:
        """Grid ``(H, W)``."""
        height, width = self.fields.shape[-2:]
        return height, width

    def select(self, mask: np.ndarray) -> Samples:
        """The samples where a mask ``(N,)`` is true."""
        if mask.all():
            return self
        chosen = torch.from_numpy(np.flatnonzero(mask))
        return Samples(self.fields[chosen], self.times[mask], self.trajectory[mask])

    def part(self, part: Part) -> Samples:
        """The same samples on a part of the grid."""
        if part == WHOLE:
            return self
        rows, columns = part
        if isinstance(self.fields, StateReader):
            return Samples(self.fields.part(rows, columns), self.times, self.trajectory)
        return Samples(self.fields[..., rows, columns], self.times, self.trajectory)

    def load(self, chosen: Int[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
        """The fields with these indices, in memory."""
        fields = self.fields[chosen]
        return fields.load() if isinstance(fields, StateReader) else fields

    def time_step(self) -> np.timedelta64 | None:
        """Shortest step in time within a trajectory; None if none has two samples."""
        steps = np.diff(self.times)[self.trajectory[1:] == self.trajectory[:-1]]
        steps = steps[steps > np.timedelta64(0)]
        return steps.min() if len(steps) else None

    def windows(self, length: int) -> Int[Tensor, "N P"]:
        """Indices of the samples of all windows of ``length`` frames, one time step apart.

        Raises:
            InputError: If there is no such window.
        """
        first = np.arange(max(len(self) - length + 1, 0))
        last = first + length - 1
        step = self.time_step()
        complete = self.trajectory[first] == self.trajectory[last]
        if step is not None:
            complete &= self.times[last] - self.times[first] == (length - 1) * step
        if not complete.any():
            raise InputError(
                f"the samples hold no {length} frames in a row (equal steps in time, within one "
                "trajectory); take fewer data.frames, a smaller coarse.reach or longer trajectories"
            )
        return torch.from_numpy(first[complete])[:, None] + torch.arange(length)
