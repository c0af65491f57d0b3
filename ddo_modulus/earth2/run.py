# SPDX-License-Identifier: Apache-2.0
r"""Workflows of assimilation, in the manner of ``earth2studio.run``.

:func:`assimilation` makes an analysis at each of a list of times, each by itself. :func:`cycle`
carries the analyses forward: a prognostic model forecasts from one to the next, the forecast is the
background of the next analysis,

.. math:: x_b^{i+1} = M(x_a^i), \qquad x_a^{i+1} = A(x_b^{i+1}, y^{i+1}) .

Assimilation models, prognostics, sources of observations and IO backends are Earth2Studio's own or
any that keep its protocols. A model whose ``input_coords`` ask for fields beside the table of
observations, and whose call has an argument ``background``, is given one: an ``xr.DataArray`` on
its own grid, with the members of the forecast if there are several. Others see the observations
alone.

Beside the analyses is a record (:mod:`ddo_modulus.earth2.record`) of what is done, so that a run
that was cut short is continued by calling it again, and of the observations' departures from
background and analysis, with Desroziers' estimates of their errors.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from ddo_modulus.data.table import CORE_COLUMNS
from ddo_modulus.earth2 import needs_earth2studio
from ddo_modulus.earth2.departures import MEMBERS, as_tensor, departures, members_of
from ddo_modulus.earth2.record import Record
from ddo_modulus.errors import InputError

with needs_earth2studio():  # none of these imports a model; earth2studio.run imports them all
    from earth2studio.data import fetch_data, fetch_dataframe
    from earth2studio.utils.coords import map_coords, split_coords
    from earth2studio.utils.time import to_time_array
    from loguru import logger
    from tqdm import tqdm

if TYPE_CHECKING:
    from earth2studio.data import DataFrameSource, DataSource
    from earth2studio.io import IOBackend
    from earth2studio.models.da import AssimilationModel
    from earth2studio.models.px import PrognosticModel
    from earth2studio.utils.type import CoordSystem

Times = Sequence[str] | Sequence[datetime] | Sequence[np.datetime64] | np.ndarray
#: Where a record goes that is not told: beside the store, or nowhere if the backend has no file.
Place = str | Path | Literal["beside"] | None


def assimilation(
    time: Times,
    model: AssimilationModel,
    observations: DataFrameSource | Sequence[DataFrameSource],
    io: IOBackend,
    *,
    background: DataSource | None = None,
    output_coords: CoordSystem = OrderedDict({}),  # noqa: B006 - as in earth2studio.run
    record: Place = "beside",
    overwrite: bool = False,
    device: torch.device | None = None,
    verbose: bool = True,
) -> IOBackend:
    """Make an analysis at each of a list of times.

    Args:
        time: Analysis times, UTC.
        model: The assimilation model.
        observations: Their source; a sequence for a model that takes several tables, in its order.
        io: Where the analyses go: an array on the model's axes for each variable.
        background: Fields for a model that takes a background, and for observation minus
            background: at the same times, nearest points.
        output_coords: Part of the domain or of the variables to keep, as in ``earth2studio.run``.
        record: Folder of the record; ``"beside"``: next to the store (``x.zarr`` and ``x.record``),
            none for a backend in memory. None: none, and the run cannot be continued.
        overwrite: Whether the record of another run there is replaced (its store is the backend's
            to replace).
        device: Where the model computes; a GPU if there is one.
        verbose: Whether to show the progress.

    Returns:
        The backend.

    Raises:
        InputError: If the model carries a forecast of its own (drive its generator instead), a
            time has no observations, a table lacks a column, or the store or the record hold
            something else already.
    """
    run = _Run.start(
        "assimilation", time, model, observations, io, output_coords, record, overwrite, device
    )
    for when in run.remaining(verbose):
        frames = run.observe(when)
        if not any(len(frame) for frame in frames):
            raise InputError(
                f"no observations at {when} from {run.sources}: leave this time out, or take a "
                "wider time tolerance of the source"
            )
        fields = None if background is None else run.fetch(background, when)
        analysis = run.analyse(frames, fields)
        run.write(analysis, when)
        run.record.save(when, run.departures(frames, when, analysis, fields))
    return run.finish()


def cycle(
    time: Times,
    prognostic: PrognosticModel,
    model: AssimilationModel,
    observations: DataFrameSource | Sequence[DataFrameSource],
    io: IOBackend,
    *,
    data: DataSource | None = None,
    output_coords: CoordSystem = OrderedDict({}),  # noqa: B006 - as in earth2studio.run
    keep_background: bool = False,
    batch_size: int | None = None,
    record: Place = "beside",
    overwrite: bool = False,
    device: torch.device | None = None,
    verbose: bool = True,
) -> IOBackend:
    """Cycle: forecast, analysis, forecast.

    The prognostic's state may hold more variables and a larger domain than are analysed: an
    analysis replaces what it covers, all else is the forecast's. The points of the analysis must be
    points of the prognostic's grid. A time without observations keeps its background.

    Args:
        time: Analysis times, UTC, ascending, whole steps of the prognostic apart.
        prognostic: The forecast model. The members of an analysis are forecast side by side.
        model: The assimilation model.
        observations: Their source; a sequence for a model that takes several tables.
        io: Where the analyses go: an array on the model's axes for each variable.
        data: Initial state, the background of the first analysis. Needed if the state holds
            more than the analysis, or several times; without it, the first analysis is made of the
            observations alone.
        output_coords: Part of the domain or of the variables to keep.
        keep_background: Whether the backgrounds go to the backend too, as
            ``<variable>_background``.
        batch_size: Members that are forecast together; all if None.
        record: Folder of the record; see :func:`assimilation`.
        overwrite: Whether the record of another run there is replaced.
        device: Where both models compute; a GPU if there is one.
        verbose: Whether to show the progress.

    Returns:
        The backend.

    Raises:
        InputError: If times are not whole steps apart, a table lacks a column, the state cannot
            be made of what is given, grids do not fit, or the store or the record hold something
            else already.
    """
    run = _Run.start(
        "cycle", time, model, observations, io, output_coords, record, overwrite, device, prognostic
    )
    if not _takes_background(model):
        logger.warning(
            f"{type(model).__name__} takes no background: its analyses do not know the forecasts"
        )
    forecast = _Forecast(prognostic.to(run.device), run.device, batch_size)
    forecast.check(run.time)
    if run.record.done and not run.complete:
        forecast.restore(run.record.state())
    elif data is not None and not run.complete:
        forecast.begin(data, run.time[0])
    for when in run.remaining(verbose):
        before: xr.DataArray | None = None
        if forecast.started:
            forecast.advance(when)
            before = forecast.on(run.grid(when))
        frames = run.observe(when)
        if any(len(frame) for frame in frames):
            analysis = run.analyse(frames, before)
        elif before is not None:
            logger.warning(f"No observations at {when}: the background stays")
            analysis = before
        else:
            raise InputError(
                f"no observations at {when} from {run.sources}, and no background: start at a time "
                "that has some, or from data="
            )
        forecast.take(analysis, when)
        run.write(analysis, when)
        if keep_background and before is not None:
            run.write(before, when, "_background")
        run.record.save(when, run.departures(frames, when, analysis, before), forecast.saved())
    return run.finish()


@dataclass
class _Run:
    """What both workflows share: inputs, output, record."""

    kind: str
    time: np.ndarray
    model: Any
    sources: list[Any]
    io: Any
    output_coords: CoordSystem
    record: Record
    device: torch.device
    _schemas: Sequence[Any] = field(default_factory=tuple)
    _known: set[str] = field(default_factory=set)

    @classmethod
    def start(
        cls,
        kind: str,
        time: Times,
        model: Any,  # noqa: ANN401 - Earth2Studio's protocols
        observations: Any,  # noqa: ANN401
        io: Any,  # noqa: ANN401
        output_coords: CoordSystem,
        record: Place,
        overwrite: bool,
        device: torch.device | None,
        prognostic: object | None = None,
    ) -> _Run:
        """Check all that can be known before the work."""
        times = np.asarray(to_time_array(time) if len(time) else [], "datetime64[ns]")
        if not len(times) or (np.diff(times) <= np.timedelta64(0)).any():
            raise InputError("give analysis times that ascend, at least one")
        if model.init_coords() is not None:
            raise InputError(
                f"{type(model).__name__} carries a forecast of its own: drive its generator "
                "(create_generator) instead"
            )
        schemas = [schema for schema in model.input_coords() if "observation" in schema]
        sources = list(observations) if isinstance(observations, Sequence) else [observations]
        if len(sources) != len(schemas):
            raise InputError(
                f"{type(model).__name__} takes {len(schemas)} table(s) of observations, got "
                f"{len(sources)} source(s)"
            )
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info(f"Running {kind} workflow on {device}")
        place = _beside(io) if record == "beside" else record
        settings = {
            "workflow": kind,
            "model": type(model).__name__,
            "observations": [type(source).__name__ for source in sources],
            "prognostic": None if prognostic is None else type(prognostic).__name__,
            "time": [str(t) for t in times],
        }
        kept = Record(None if place is None else Path(place), settings, overwrite=overwrite)
        return cls(kind, times, model.to(device), sources, io, output_coords, kept, device, schemas)

    @property
    def complete(self) -> bool:
        """Whether every time is done."""
        return all(self.record.saved(t) for t in self.time)

    def remaining(self, verbose: bool) -> Iterator[np.datetime64]:
        """Times yet to be done, with a progress bar over all."""
        if self.complete:
            logger.success("The run is complete already")
            return
        done = sum(self.record.saved(t) for t in self.time)
        if done:
            logger.info(f"Continuing after {done} of {len(self.time)} analyses")
        with tqdm(
            total=len(self.time), initial=done, desc=f"Running {self.kind}", disable=not verbose
        ) as bar:
            for when in self.time:
                if not self.record.saved(when):
                    yield when
                    bar.update(1)

    def observe(self, when: np.datetime64) -> list[pd.DataFrame]:
        """The tables for one time, as the model takes them."""
        frames = []
        for source, schema in zip(self.sources, self._schemas, strict=True):
            wanted = np.asarray(schema["variable"]) if "variable" in schema else np.empty(0, str)
            frame = fetch_dataframe(source, np.array([when]), wanted)
            missing = [c for c in {*CORE_COLUMNS, *schema} if c not in frame]
            if missing:
                raise InputError(
                    f"the table of {type(source).__name__} at {when} has no column "
                    f"{', '.join(sorted(missing))}; {type(self.model).__name__} needs it"
                )
            frames.append(frame)
        return frames

    def analyse(self, frames: list[pd.DataFrame], background: xr.DataArray | None) -> xr.DataArray:
        """The model's analysis."""
        given = {}
        if background is not None and _takes_background(self.model):
            given["background"] = background
        result = self.model(*frames, **given)
        # The protocol says tuple, the built-in models return the array itself.
        return result[0] if isinstance(result, tuple) else result

    def grid(self, when: np.datetime64) -> CoordSystem:
        """Variables and domain of the model's analyses."""
        inputs = self.model.input_coords()
        (coords,) = self.model.output_coords(inputs, request_time=np.array([when]))
        return OrderedDict(
            (k, v) for k, v in coords.items() if k not in ("time", "batch", *MEMBERS) and len(v)
        )

    def fetch(self, source: DataSource, when: np.datetime64) -> xr.DataArray:
        """A field of a source at the model's points and variables."""
        grid = self.grid(when)
        x, coords = fetch_data(source, np.array([when]), grid["variable"], device="cpu")
        x, coords = map_coords(x, coords, grid)
        return _array(x, coords).isel(lead_time=0, drop=True)

    def departures(
        self,
        frames: list[pd.DataFrame],
        when: np.datetime64,
        analysis: xr.DataArray,
        background: xr.DataArray | None,
    ) -> pd.DataFrame | None:
        """Of all tables together; None of nothing."""
        parts = [departures(f, when, analysis, background) for f in frames if len(f)]
        return pd.concat(parts, ignore_index=True) if parts else None

    def write(self, fields: xr.DataArray, when: np.datetime64, suffix: str = "") -> None:
        """One time of the fields to the backend; at the first, make the arrays for all."""
        coords = OrderedDict((str(d), fields[d].values) for d in fields.dims)
        if "time" not in coords:
            raise InputError(f"{type(self.model).__name__} gave an analysis without time")
        coords["time"] = np.array([when])
        x, coords = map_coords(as_tensor(fields), coords, self.output_coords)
        arrays, coords, names = split_coords(x, coords)
        names = [f"{name}{suffix}" for name in names]
        new = [n for n in names if n not in self._known]
        if new:
            there = [n for n in new if n in self.io]
            if there and not self.record.done:
                raise InputError(
                    f"the store holds {', '.join(there)} already; choose another, or open it so "
                    "that it replaces what is there"
                )
            if self.record.done and not there and not suffix:
                raise InputError(
                    "the record says that analyses are there, but the store holds none; "
                    "overwrite=True starts the run anew"
                )
            if not there:
                self.io.add_array(OrderedDict({**coords, "time": self.time}), new)
            self._known.update(new)
        self.io.write(arrays, coords, names)
        if hasattr(self.io, "flush"):
            self.io.flush()

    def finish(self) -> Any:  # noqa: ANN401
        """Statistics of the departures, and the backend."""
        table = self.record.finish()
        for row in table[table["time"].isna()].itertuples():
            logger.info(
                f"{row.variable}: {row.count} observations, O-B {row.omb_rms:.3g}, O-A "
                f"{row.oma_rms:.3g}; estimated errors: observations {row.observation_error:.3g}, "
                f"background {row.background_error:.3g}; chi2 {row.chi2:.3g}"
            )
        logger.success(f"{self.kind.capitalize()} complete")
        return self.io


class _Forecast:
    """The state of a prognostic model and its way from one analysis to the next.

    Axes of the state: ``ensemble`` (if there are members), ``time`` (one), ``lead_time`` (the
    model's history, the last is now), and the model's own.
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
        """Take the state of a source."""
        x, coords = fetch_data(
            data, np.array([when]), self.domain["variable"], self.history, device=self.device
        )
        x, coords = map_coords(x, coords, self.domain)
        order = ["time", "lead_time", *self.domain]
        self.x, self.now = x.permute([list(coords).index(k) for k in order]), when

    def saved(self) -> dict[str, np.ndarray]:
        """The state, to be restored."""
        assert self.x is not None
        return {
            "x": self.x.cpu().numpy(),
            "now": np.array(self.now, "datetime64[ns]"),
            "order": np.array(self.order),
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what was saved."""
        self.x = torch.as_tensor(state["x"]).to(self.device)
        self.order = state["order"].tolist()
        self.now = np.datetime64(int(state["now"].astype("int64")), "ns")

    def advance(self, when: np.datetime64) -> None:
        """Forecast to a time; nothing if it is there."""
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
        """Some members ``(B, lead_time, ...)`` so many steps on, with their history."""
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
        """The state now, on the variables and domain of an analysis."""
        assert self.x is not None and self.now is not None
        index = self._places(grid)
        x = self.x.select(-len(self.domain) - 1, -1)
        for axis, places in zip(range(-len(index), 0), index, strict=True):
            x = x.index_select(axis, places)
        lead: CoordSystem = OrderedDict({"time": np.array([self.now])})
        if x.ndim > len(index) + 1:
            members = next((d for d in self.order if d in MEMBERS), MEMBERS[0])
            lead = OrderedDict({members: np.arange(len(x)), **lead})
        return _array(x, OrderedDict({**lead, **grid})).transpose(*self.order)

    def take(self, analysis: xr.DataArray, when: np.datetime64) -> None:
        """Put an analysis into the state."""
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
                    "variables, points or times): give data=, to start from"
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
                "fill them: give data=, to start from"
            )
        self.x, self.now = state, when

    def _places(self, grid: CoordSystem) -> list[Tensor]:
        """Index of an analysis' coordinates in the state's."""
        index = []
        for name, own in self.domain.items():
            if name not in grid:
                raise InputError(
                    f"the analysis has no axis {name!r}, which {type(self.prognostic).__name__} has"
                )
            index.append(_find(name, np.asarray(grid[name]), own).to(self.device))
        return index


def _find(name: str, wanted: np.ndarray, own: np.ndarray) -> Tensor:
    """Where the values of one axis stand on another."""
    if np.issubdtype(own.dtype, np.number):
        apart = np.abs(wanted.astype(float)[:, None] - own.astype(float))
        if name == "lon":
            apart = np.minimum(apart, np.abs(360 - apart))
        places, step = apart.argmin(1), np.abs(np.diff(own)).min() if len(own) > 1 else 1.0
        missing = wanted[apart.min(1) > 1e-3 * step]
    else:
        known = {str(v): i for i, v in enumerate(own)}
        missing = np.array([v for v in wanted if str(v) not in known])
        places = np.array([known.get(str(v), 0) for v in wanted])
    if len(missing):
        raise InputError(
            f"the prognostic has no {name} {missing[0]} ({len(missing)} of {len(wanted)} of the "
            "analysis are not on its grid): analyse on its points and variables"
        )
    return torch.as_tensor(places)


def _array(x: Tensor, coords: CoordSystem) -> xr.DataArray:
    """A tensor with its coordinates, in main memory."""
    return xr.DataArray(x.cpu().numpy(), dict(coords), list(coords))


def _takes_background(model: AssimilationModel) -> bool:
    """Whether a model asks for a background and has an argument for it."""
    asks = any("observation" not in schema for schema in model.input_coords())
    return asks and "background" in inspect.signature(type(model).__call__).parameters


def _beside(io: Any) -> Path | None:  # noqa: ANN401 - any backend
    """Folder next to the file of a backend; None for one in memory."""
    store = getattr(io, "store", None)
    place = getattr(store, "root", None)  # zarr's LocalStore
    if place is None and hasattr(getattr(io, "root", None), "filepath"):
        place = io.root.filepath()  # netCDF4
    if place is None or "://" in str(place):
        return None
    return Path(place).with_suffix(".record")
