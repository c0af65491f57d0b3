# SPDX-License-Identifier: Apache-2.0
"""The state of a cycle: that of a prognostic model, into which analyses are inserted.

The state may hold more variables, a larger domain and more times (the model's history) than an
analysis. The analysis replaces what it covers; everything else remains the forecast's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from ddo_modulus.earth2.feedback import MEMBERS, as_tensor, members_of
from ddo_modulus.earth2.host import needs_earth2studio
from ddo_modulus.errors import InputError

with needs_earth2studio():
    from earth2studio.data import fetch_data
    from earth2studio.utils.coords import map_coords

if TYPE_CHECKING:
    from earth2studio.data import DataSource
    from earth2studio.utils.type import CoordSystem


class Forecast:
    """The state of a prognostic model, and its forecasts from one analysis to the next.

    Axes of the state: ``ensemble`` (if there are members), ``time`` (of length one), ``lead_time``
    (the model's history, whose last entry is the present), and the model's own.

    Args:
        prognostic: The model, on its device.
        device: Where the state is.
        batch: Members that are forecast together; all if None.
    """

    def __init__(self, prognostic: Any, device: torch.device, batch: int | None) -> None:  # noqa: ANN401
        self.prognostic, self.device, self.batch = prognostic, device, batch
        own = OrderedDict(
            (k, v) for k, v in prognostic.input_coords().items() if k not in ("batch", "time")
        )
        self.history = own.pop("lead_time").astype("timedelta64[ns]")
        self.domain: CoordSystem = OrderedDict((k, v) for k, v in own.items() if len(v))
        coords = prognostic.input_coords()
        step = prognostic.output_coords(coords)["lead_time"].astype("timedelta64[ns]")
        self.step = step[-1] - self.history[-1]
        self.x: Tensor | None = None
        self.now: np.datetime64 | None = None
        self.order = ["time", *self.domain]  # axes of an analysis

    @property
    def started(self) -> bool:
        """Whether there is a state."""
        return self.x is not None

    def check(self, times: np.ndarray) -> None:
        """Raise unless the times are whole steps apart."""
        apart = np.diff(times)
        wrong = apart[apart % self.step != np.timedelta64(0)]
        if len(wrong):
            raise InputError(
                f"analyses {pd.Timedelta(wrong[0])} apart are no whole number of steps of "
                f"{type(self.prognostic).__name__} ({pd.Timedelta(self.step)})"
            )

    def begin(self, data: DataSource, when: np.datetime64) -> None:
        """Start from the state of a source."""
        x, coords = fetch_data(
            data, np.array([when]), self.domain["variable"], self.history, device=self.device
        )
        x, coords = map_coords(x, coords, self.domain)
        order = ["time", "lead_time", *self.domain]
        self.x, self.now = x.permute([list(coords).index(k) for k in order]), when

    def saved(self) -> dict[str, np.ndarray]:
        """The state, for :meth:`restore`."""
        assert self.x is not None
        return {
            "x": self.x.cpu().numpy(),
            "now": np.array(self.now, "datetime64[ns]"),
            "order": np.array(self.order),
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Continue from a saved state."""
        self.x = torch.as_tensor(state["x"]).to(self.device)
        self.order = state["order"].tolist()
        self.now = np.datetime64(int(state["now"].astype("int64")), "ns")

    def advance(self, when: np.datetime64) -> None:
        """Forecast to a time; do nothing if it is reached."""
        assert self.x is not None and self.now is not None
        steps = int((when - self.now) / self.step)
        if not steps:
            return
        members = self.x.flatten(0, -len(self.domain) - 2)
        batch = len(members) if self.batch is None else self.batch
        parts = [self._forecast(part, steps) for part in members.split(batch)]
        self.x = torch.cat(parts).view(self.x.shape)
        self.now = when

    def _forecast(self, x: Tensor, steps: int) -> Tensor:
        """Members ``(B, lead_time, ...)`` a number of steps later, with their history."""
        assert self.now is not None
        coords = OrderedDict(
            {
                "ensemble": np.arange(len(x)),
                "time": np.array([self.now]),
                "lead_time": self.history,
                **self.domain,
            }
        )
        frames = list(x.split(1, 1))
        iterator = self.prognostic.create_iterator(x[:, None], coords)
        next(iterator)  # the initial state
        wanted = OrderedDict((k, v) for k, v in self.domain.items())
        for _ in range(steps):
            out, out_coords = next(iterator)
            out, _ = map_coords(out, out_coords, wanted)
            frames.append(out[:, 0, -1:].to(self.device))
        return torch.cat(frames[-len(self.history) :], 1)

    def on(self, grid: CoordSystem) -> xr.DataArray:
        """The present state on the variables and domain of an analysis."""
        assert self.x is not None and self.now is not None
        index = self._places(grid)
        x = self.x.select(-len(self.domain) - 1, -1)
        for axis, places in zip(range(-len(index), 0), index, strict=True):
            x = x.index_select(axis, places)
        lead: CoordSystem = OrderedDict({"time": np.array([self.now])})
        if x.ndim > len(index) + 1:
            members = next((d for d in self.order if d in MEMBERS), MEMBERS[0])
            lead = OrderedDict({members: np.arange(len(x)), **lead})
        return labelled_array(x, OrderedDict({**lead, **grid})).transpose(*self.order)

    def take(self, analysis: xr.DataArray, when: np.datetime64) -> None:
        """Insert an analysis into the state.

        Raises:
            InputError: If the two do not share their axes or points, or the analysis leaves values
                of the state undefined.
        """
        self.order = [str(d) for d in analysis.dims]
        axis = members_of(analysis)
        lead = ["time"] if axis is None else [axis, "time"]
        grid = OrderedDict((d, analysis[d].values) for d in self.order if d not in lead)
        index = self._places(grid)
        new = as_tensor(analysis.transpose(*lead, *self.domain)).to(self.device, torch.float32)
        whole = all(len(i) == len(v) for i, v in zip(index, self.domain.values(), strict=True))
        if self.x is None:
            if not whole or len(self.history) > 1:
                raise InputError(
                    f"{type(self.prognostic).__name__} needs more than the analysis holds (other "
                    "variables, points or times): give data=, an initial state"
                )
            sizes = [len(v) for v in self.domain.values()]
            self.x = new.new_full((*new.shape[: -len(index)], 1, *sizes), torch.nan)
        if new.ndim > self.x.ndim - 1:  # the first ensemble
            self.x = self.x.expand(len(new), *self.x.shape)
        state = self.x.clone()
        target = state.select(-len(self.domain) - 1, -1)
        places: Any = (..., *torch.meshgrid(*index, indexing="ij"))
        target[places] = torch.where(new.isfinite(), new, target[places])
        if not bool(target.isfinite().all()):
            raise InputError(
                f"the analysis at {when} leaves values open (NaN) and there is no background to "
                "fill them: give data=, an initial state"
            )
        self.x, self.now = state, when

    def _places(self, grid: CoordSystem) -> list[Tensor]:
        """Indices of the coordinates of an analysis in those of the state."""
        index = []
        for name, own in self.domain.items():
            if name not in grid:
                raise InputError(
                    f"the analysis has no axis {name!r}, which {type(self.prognostic).__name__} has"
                )
            index.append(_find(name, np.asarray(grid[name]), own).to(self.device))
        return index


def _find(name: str, wanted: np.ndarray, own: np.ndarray) -> Tensor:
    """Indices of the values of one axis on another."""
    if np.issubdtype(own.dtype, np.number):
        apart = np.abs(wanted.astype(float)[:, None] - own.astype(float))
        if name == "lon":
            apart = np.minimum(apart, np.abs(360 - apart))
        places, step = apart.argmin(1), np.abs(np.diff(own)).min() if len(own) > 1 else 1.0
        missing = wanted[apart.min(1) > 1e-3 * step]
    else:
        index = {str(v): i for i, v in enumerate(own)}
        missing = np.array([v for v in wanted if str(v) not in index])
        places = np.array([index.get(str(v), 0) for v in wanted])
    if len(missing):
        raise InputError(
            f"the prognostic has no {name} {missing[0]} ({len(missing)} of {len(wanted)} of the "
            "analysis are not on its grid): analyse on its points and variables"
        )
    return torch.as_tensor(places)


def labelled_array(x: Tensor, coords: CoordSystem) -> xr.DataArray:
    """A tensor with its coordinates, on the CPU."""
    return xr.DataArray(x.cpu().numpy(), dict(coords), list(coords))
