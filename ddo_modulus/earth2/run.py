# SPDX-License-Identifier: Apache-2.0
r"""Workflows of assimilation, modelled on ``earth2studio.run``.

:func:`assimilation` makes an analysis at each of a list of times, independently of the others.
:func:`cycle` alternates forecasts and analyses: a prognostic model forecasts from each analysis to
the next time, and this forecast is the background of the next analysis,

.. math:: x_b^{i+1} = M(x_a^i), \qquad x_a^{i+1} = A(x_b^{i+1}, y^{i+1}) .

Assimilation models, prognostics, sources of observations and IO backends are Earth2Studio's own or
any that implement its protocols. A model takes a background if its ``input_coords`` ask for fields
besides the table of observations and its call has an argument ``background``. It then gets an
``xr.DataArray`` on its own grid, with the members of the forecast if there are several. Other
models get the observations only.

A record beside the analyses (:mod:`ddo_modulus.earth2.record`) says which times are done, so that
calling an interrupted run again continues it. It also holds innovations (O-B) and residuals (O-A)
of the observations, with Desroziers' estimates of observation and background errors.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from ddo_modulus.earth2.feedback import MEMBERS, as_tensor, feedback
from ddo_modulus.earth2.forecast import Forecast, labelled_array
from ddo_modulus.earth2.host import needs_earth2studio
from ddo_modulus.earth2.record import Record, RecordFolder
from ddo_modulus.errors import InputError
from ddo_modulus.observations.table import CORE_COLUMNS

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

__all__ = ["RecordFolder", "assimilation", "cycle"]

Times = Sequence[str] | Sequence[datetime] | Sequence[np.datetime64] | np.ndarray


def assimilation(
    time: Times,
    model: AssimilationModel,
    observations: DataFrameSource | Sequence[DataFrameSource],
    io: IOBackend,
    *,
    background: DataSource | None = None,
    output_coords: CoordSystem = OrderedDict({}),  # noqa: B006 - as in earth2studio.run
    record: str | Path | RecordFolder | None = "beside",
    device: torch.device | None = None,
    verbose: bool = True,
) -> IOBackend:
    """Make an analysis at each of a list of times.

    Args:
        time: Analysis times, UTC.
        model: The assimilation model.
        observations: Source of the observations. For a model that takes several tables, a sequence
            of sources in the same order.
        io: Where the analyses are written: for each variable an array on the model's axes.
        background: Fields at the same times, taken at the nearest points. They are the background
            of a model that takes one, and of the innovations in the record.
        output_coords: Part of the domain or of the variables to keep, as in ``earth2studio.run``.
        record: Folder of the record. ``"beside"`` is next to the store (``x.zarr`` and
            ``x.record``), and no record for a backend in memory. None is no record: the run cannot
            be continued. ``RecordFolder(path, overwrite=True)`` replaces the record of another
            run; its store is replaced by options of the backend.
        device: Where the model computes; a GPU by default, if there is one.
        verbose: Whether to show the progress.

    Returns:
        The backend.

    Raises:
        InputError: If the model carries a forecast of its own (use its generator instead), a time
            has no observations, a table lacks a column, or the store or the record already hold
            something else.
    """
    run = _Run.start("assimilation", time, model, observations, io, output_coords, record, device)
    for when in run.remaining(verbose):
        frames = run.observe(when)
        if not any(len(frame) for frame in frames):
            raise InputError(
                f"no observations at {when} from {run.sources}: leave this time out, or choose a "
                "wider time tolerance of the source"
            )
        fields = None if background is None else run.fetch(background, when)
        analysis = run.analyse(frames, fields)
        run.write(analysis, when)
        run.record.save(when, run.feedback(frames, when, analysis, fields))
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
    record: str | Path | RecordFolder | None = "beside",
    device: torch.device | None = None,
    verbose: bool = True,
) -> IOBackend:
    """Alternate forecasts and analyses.

    The prognostic's state may hold more variables and a larger domain than the analysis: an
    analysis replaces what it covers, and everything else remains the forecast's. The points of the
    analysis must be points of the prognostic's grid. Where a time has no observations, its
    background is its analysis.

    Args:
        time: Analysis times, UTC, ascending, whole steps of the prognostic apart.
        prognostic: The forecast model. The members of an analysis are forecast as a batch.
        model: The assimilation model.
        observations: Source of the observations. For a model that takes several tables, a sequence
            of sources in the same order.
        io: Where the analyses are written: for each variable an array on the model's axes.
        data: Initial state, the background of the first analysis. Needed if the state holds more
            than the analysis, or several times. Without it the first analysis has no background.
        output_coords: Part of the domain or of the variables to keep.
        keep_background: Whether the backgrounds are written too, as ``<variable>_background``.
        batch_size: Members that are forecast together; all if None.
        record: Folder of the record; see :func:`assimilation`.
        device: Where both models compute; a GPU by default, if there is one.
        verbose: Whether to show the progress.

    Returns:
        The backend.

    Raises:
        InputError: If times are not whole steps apart, a table lacks a column, the initial state
            is incomplete, grids do not fit, or the store or the record already hold something else.
    """
    run = _Run.start(
        "cycle", time, model, observations, io, output_coords, record, device, prognostic
    )
    if not _takes_background(model):
        logger.warning(
            f"{type(model).__name__} takes no background: its analyses do not use the forecasts"
        )
    forecast = Forecast(prognostic.to(run.device), run.device, batch_size)
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
                "that has observations, or give data="
            )
        forecast.take(analysis, when)
        run.write(analysis, when)
        if keep_background and before is not None:
            run.write(before, when, "_background")
        run.record.save(when, run.feedback(frames, when, analysis, before), forecast.saved())
    return run.finish()


@dataclass
class _Run:
    """What both workflows have in common: inputs, output and record."""

    kind: str
    time: np.ndarray
    model: Any
    sources: list[Any]
    io: Any
    output_coords: CoordSystem
    record: Record
    device: torch.device
    _schemas: Sequence[Any] = field(default_factory=tuple)
    _arrays: set[str] = field(default_factory=set)  # of the store, that this call has checked

    @classmethod
    def start(
        cls,
        kind: str,
        time: Times,
        model: Any,  # noqa: ANN401 - Earth2Studio's protocols
        observations: Any,  # noqa: ANN401
        io: Any,  # noqa: ANN401
        output_coords: CoordSystem,
        record: str | Path | RecordFolder | None,
        device: torch.device | None,
        prognostic: object | None = None,
    ) -> _Run:
        """Check the arguments, and open the record."""
        folder = RecordFolder.of(record)
        times = np.asarray(to_time_array(time) if len(time) else [], "datetime64[ns]")
        if not len(times) or (np.diff(times) <= np.timedelta64(0)).any():
            raise InputError("give analysis times in ascending order, at least one")
        if model.init_coords() is not None:
            raise InputError(
                f"{type(model).__name__} carries a forecast of its own: use its generator "
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
        settings = {
            "workflow": kind,
            "model": type(model).__name__,
            "observations": [type(source).__name__ for source in sources],
            "prognostic": None if prognostic is None else type(prognostic).__name__,
            "time": [str(t) for t in times],
        }
        opened = Record(folder.resolve(_beside(io)), settings)
        model = model.to(device)
        return cls(kind, times, model, sources, io, output_coords, opened, device, schemas)

    @property
    def complete(self) -> bool:
        """Whether every time is done."""
        return all(self.record.saved(t) for t in self.time)

    def remaining(self, verbose: bool) -> Iterator[np.datetime64]:
        """Times yet to be done, with a progress bar over all."""
        if self.complete:
            logger.success("The run is already complete")
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
        if background is not None and _takes_background(self.model):
            result = self.model(*frames, background=background)
        else:
            result = self.model(*frames)
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
        return labelled_array(x, coords).isel(lead_time=0, drop=True)

    def feedback(
        self,
        frames: list[pd.DataFrame],
        when: np.datetime64,
        analysis: xr.DataArray,
        background: xr.DataArray | None,
    ) -> pd.DataFrame | None:
        """Feedback of all observations; None if there are none."""
        parts = [feedback(f, when, analysis, background) for f in frames if len(f)]
        return pd.concat(parts, ignore_index=True) if parts else None

    def write(self, fields: xr.DataArray, when: np.datetime64, suffix: str = "") -> None:
        """Write the fields of one time; the first time, create the arrays for all times."""
        coords = OrderedDict((str(d), fields[d].values) for d in fields.dims)
        if "time" not in coords:
            raise InputError(f"the analysis of {type(self.model).__name__} has no axis time")
        coords["time"] = np.array([when])
        x, coords = map_coords(as_tensor(fields), coords, self.output_coords)
        arrays, coords, names = split_coords(x, coords)
        names = [f"{name}{suffix}" for name in names]
        new = [n for n in names if n not in self._arrays]
        if new:
            there = [n for n in new if n in self.io]
            if there and not self.record.done:
                raise InputError(
                    f"the store already holds {', '.join(there)}; choose another store, or open it "
                    "so that it is overwritten"
                )
            if self.record.done and not there and not suffix:
                raise InputError(
                    "the record lists analyses, but the store holds none; "
                    f"{self.record.restart} starts the run anew"
                )
            if not there:
                self.io.add_array(OrderedDict({**coords, "time": self.time}), new)
            self._arrays.update(new)
        self.io.write(arrays, coords, names)
        if hasattr(self.io, "flush"):
            self.io.flush()

    def finish(self) -> Any:  # noqa: ANN401
        """Log the statistics of innovations and residuals; give the backend back."""
        table = self.record.finish()
        for row in table[table["time"].isna()].itertuples():
            logger.info(
                f"{row.variable}: {row.count} observations, O-B {row.omb_rms:.3g}, O-A "
                f"{row.oma_rms:.3g}; estimated errors: observations {row.observation_error:.3g}, "
                f"background {row.background_error:.3g}; chi2 {row.chi2:.3g}"
            )
        logger.success(f"{self.kind.capitalize()} complete")
        return self.io


def _takes_background(model: AssimilationModel) -> bool:
    """Whether a model asks for a background and has an argument for it."""
    asks = any("observation" not in schema for schema in model.input_coords())
    return asks and "background" in inspect.signature(type(model).__call__).parameters


def _beside(io: Any) -> Path | None:  # noqa: ANN401 - any backend
    """Folder of a record next to the file of a backend; None for a backend in memory."""
    store = getattr(io, "store", None)
    place = getattr(store, "root", None)  # zarr's LocalStore
    if place is None and hasattr(getattr(io, "root", None), "filepath"):
        place = io.root.filepath()  # netCDF4
    if place is None or "://" in str(place):
        return None
    return Path(place).with_suffix(".record")
