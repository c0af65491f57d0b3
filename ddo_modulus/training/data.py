# SPDX-License-Identifier: Apache-2.0
"""What training takes from a store: samples, in memory or read on the way, and their climatology.

Axes: ``N`` samples, ``P`` frames of a sample, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from omegaconf import DictConfig, OmegaConf
from physicsnemo.distributed import DistributedManager
from torch import Tensor

from ddo_modulus.console import progress_bar
from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.data.loader import Loader, Symmetry, TensorLoader
from ddo_modulus.data.normalization import Moments, Normalization
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.source import check_values, is_cartesian, open_dataset
from ddo_modulus.data.statistics import StoredStatistics, hours_of, moments, spread
from ddo_modulus.data.stream import StoreLoader, StreamLoader
from ddo_modulus.diffusion.task import CoarseWindow, Task
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.grid import BoxGrid, Grid, LatLonGrid
from ddo_modulus.lexicon import are_cell_means

log = logging.getLogger(__name__)

_LOADERS = ("auto", "memory", "dali", "torch")
_PIECE_BYTES = 2**28  # of samples that are worked on at a time

Window = tuple[slice, slice]
WHOLE: Window = (slice(None), slice(None))


@dataclass(frozen=True)
class Samples:
    """Fields in physical units with their times.

    Attributes:
        fields: ``(N, C, H, W)`` float32, or a reader of them from a store.
        times: ``(N,)`` datetime64.
        trajectory: ``(N,)`` the independent run each belongs to; zeros for one record.
    """

    fields: Float[Tensor, "N C H W"] | StateReader
    times: np.ndarray
    trajectory: np.ndarray

    def select(self, mask: np.ndarray) -> Samples:
        """Those where the mask is true."""
        chosen = torch.from_numpy(np.flatnonzero(mask))
        return Samples(self.fields[chosen], self.times[mask], self.trajectory[mask])

    def part(self, window: Window) -> Samples:
        """The same on a part of the grid."""
        if window == WHOLE:
            return self
        rows, columns = window
        if isinstance(self.fields, StateReader):
            return Samples(self.fields.part(rows, columns), self.times, self.trajectory)
        return Samples(self.fields[..., rows, columns], self.times, self.trajectory)

    @property
    def hours(self) -> Int[Tensor, " N"]:
        """Hour of the day, UTC."""
        return torch.from_numpy(hours_of(self.times))


@dataclass(frozen=True)
class Record:
    """A store, opened for training.

    Attributes:
        dataset: Coordinates and attributes; its values are not to be read.
        samples: The samples on its grid.
        units: Of each channel.
        loader: ``memory``, ``dali`` or ``torch``.
    """

    dataset: xr.Dataset
    samples: Samples
    units: tuple[str, ...]
    loader: str

    @property
    def channels(self) -> list[str]:
        """Variable ids."""
        return [str(name) for name in self.dataset.data_vars]


def open_record(config: DictConfig) -> Record:
    """Open what the section ``data`` of a configuration names; read it if it goes into memory.

    Raises:
        InputError: If the store or an option cannot be used.
    """
    where = str(config.path)
    dataset = open_dataset(config.path, config.variables)
    rows, columns = region_window(dataset, config.region)
    dataset = dataset.isel(lat=rows, lon=columns)
    size = 4 * sum(field.size for field in dataset.data_vars.values())
    loader = pick_loader(config, size)
    reading = "in memory"
    if loader != "memory":
        reading = f"read on the way by {loader} with {config.workers} processes"
    log.info("%s: %.2f GiB, %s", where, size / 2**30, reading)
    units = tuple(str(field.attrs.get("units", "1")) for field in dataset.data_vars.values())
    names = [str(name) for name in dataset.data_vars]
    reader = StateReader(where, names, rows, columns)
    if loader == "memory" and not reader.prepared:
        check_values(dataset, where)
        return Record(dataset, load_samples(dataset)[0], units, loader)
    check_values(dataset.isel(time=slice(0, 1)), where)
    fields = reader.load() if loader == "memory" else reader
    return Record(dataset, Samples(fields, reader.times, reader.run), units, loader)


def pick_loader(config: DictConfig, size: int) -> str:
    """How to load: as ``data.loader`` says, or by the size in bytes and by what is installed.

    Raises:
        InputError: If there is no such loader.
    """
    if config.loader not in _LOADERS:
        raise InputError(f"data.loader={config.loader}: choose one of {', '.join(_LOADERS)}")
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if config.loader == "dali" and not installed:
        raise InputError(
            "data.loader=dali needs NVIDIA DALI: pip install ddo-modulus[dali], or choose torch"
        )
    if config.loader != "auto":
        return str(config.loader)
    if size <= config.memory * 2**30:
        return "memory"
    return "dali" if installed else "torch"


def region_window(dataset: xr.Dataset, region: list[float] | None) -> Window:
    """Rows and columns of a region ``[south, north, west, east]`` (degrees, or places in a box).

    Raises:
        InputError: If it is no such list, or holds fewer than two rows or columns.
    """
    if region is None:
        return WHOLE
    try:
        south, north, west, east = (float(v) for v in region)
    except (TypeError, ValueError) as error:
        raise InputError(f"data.region={region}: expected [south, north, west, east]") from error
    lat, lon = dataset["lat"].values, dataset["lon"].values
    if not is_cartesian(dataset):  # the store's own branch of the longitude
        turns = 360.0 * np.ceil((lon[0] - 1e-6 - west) / 360.0)
        west, east = west + turns, east + turns
    rows = np.flatnonzero((lat >= south - 1e-6) & (lat <= north + 1e-6))
    columns = np.flatnonzero((lon >= west - 1e-6) & (lon <= east + 1e-6))
    if len(rows) < 2 or len(columns) < 2:
        raise InputError(
            f"data.region={list(region)} holds no grid; the data reach from {lat.min():g} to "
            f"{lat.max():g} and from {lon.min():g} to {lon.max():g}"
        )
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def central_window(dataset: xr.Dataset, config: DictConfig) -> Window:
    """The window of size ``data.crop`` in the middle of the grid; all of it without a crop.

    A model trained on windows has the window for its domain: this one stands for them in the
    package, for its prior and its validation.

    Raises:
        InputError: If there is a crop and the domain has no border.
    """
    crop = config.data.crop
    if crop is None:
        return WHOLE
    if config.domain != "box":
        raise InputError(f"data.crop={list(crop)} needs domain=box: a window is not periodic")
    first = [(dataset.sizes[d] - n) // 2 for d, n in zip(("lat", "lon"), crop, strict=True)]
    rows, columns = (slice(i, i + n) for i, n in zip(first, crop, strict=True))
    if min(first) < 0:
        raise InputError(
            f"data.crop={list(crop)} does not fit into the grid of {dataset.sizes['lat']}x"
            f"{dataset.sizes['lon']} points"
        )
    return rows, columns


def load_samples(dataset: xr.Dataset) -> tuple[Samples, tuple[str, ...]]:
    """All fields of a dataset as one tensor, and the unit of each variable."""
    stacked = dataset.to_array("channel")
    lead = [d for d in ("trajectory", "ensemble") if d in stacked.dims]
    stacked = stacked.transpose(*lead, "time", "channel", "lat", "lon")
    runs, times = int(np.prod(stacked.shape[: len(lead)])), stacked.sizes["time"]
    fields = torch.from_numpy(np.ascontiguousarray(stacked.values, np.float32))
    units = tuple(str(dataset[name].attrs.get("units", "1")) for name in dataset.data_vars)
    time = np.tile(stacked["time"].values, runs)
    run = np.repeat(np.arange(runs), times)
    return Samples(fields.flatten(0, len(lead)), time, run), units


def within(samples: Samples, config: DictConfig) -> np.ndarray:
    """Samples between the start and the end of the record to use."""
    inside = np.ones(len(samples.times), bool)
    if config.start is not None:
        inside &= samples.times >= np.datetime64(config.start)
    if config.end is not None:
        inside &= samples.times <= np.datetime64(config.end)
    return inside


def split(samples: Samples, config: DictConfig) -> tuple[Samples, Samples]:
    """Training and validation samples: a span of time, or the last trajectories.

    Raises:
        InputError: If no sample is left to train on.
    """
    inside = within(samples, config)
    held = np.zeros(len(inside), bool)
    if config.validation.start is not None:
        held = samples.times >= np.datetime64(config.validation.start)
        if config.validation.end is not None:
            held &= samples.times <= np.datetime64(config.validation.end)
    if config.validation.trajectories:
        held |= samples.trajectory > samples.trajectory.max() - config.validation.trajectories
    if not (inside & ~held).any():
        raise InputError(
            f"no samples to train on: the data run from {samples.times.min()} to "
            f"{samples.times.max()}; check data.start, data.end and data.validation"
        )
    return samples.select(inside & ~held), samples.select(inside & held)


def build_grid(dataset: xr.Dataset, domain: str) -> Grid:
    """Grid of a dataset: geographical, or the unit square."""
    lat, lon = dataset["lat"].values, dataset["lon"].values
    if domain == "torus" or dataset["lat"].attrs.get("units") == "1":
        return BoxGrid((len(lat), len(lon)), periodic=domain == "torus")
    return LatLonGrid(lat, lon)


def cell_means(dataset: xr.Dataset, domain: str) -> bool:
    """Whether the variables of a record are means over the cells of its grid, as they say.

    On the sphere means over cells are taken for values at points.
    """
    fields = dataset.data_vars.values()
    said = [are_cell_means(str(field.attrs.get("cell_methods", ""))) for field in fields]
    if all(said) and domain != "sphere":
        return True
    if any(said):
        reason = "some variables are none" if not all(said) else "they mix functions on the sphere"
        log.warning("means over cells are taken for values at points: %s", reason)
    return False


def domain_lengths(grid: Grid) -> tuple[float, float]:
    """Extent of the domain: 1000 km for a region of the globe, its own units for a box."""
    if isinstance(grid, BoxGrid):
        return grid.lengths
    degree = math.radians(1) * EARTH_RADIUS_KM / 1e3
    height = abs(grid.lat[1] - grid.lat[0]) * len(grid.lat)
    width = (grid.lon[1] - grid.lon[0]) * len(grid.lon) * np.cos(np.deg2rad(grid.lat.mean()))
    return float(height * degree), float(width * degree)


def fit_normalization(channels: list[str], samples: Samples, config: DictConfig) -> Normalization:
    """Climatology and scale of the training samples (:meth:`Normalization.fit`).

    For samples in a store they come from its statistics, if those are of the same samples;
    otherwise the samples are read once.
    """
    options = {
        "per_hour": config.per_hour,
        "per_point": config.per_point,
        "harmonics": config.harmonics if config.per_hour else None,
    }
    if isinstance(samples.fields, StateReader):
        fitted = Normalization.from_moments(channels, _stored_moments(samples.fields), **options)
    else:
        fitted = Normalization.fit(channels, samples.fields, samples.hours, **options)
    if config.common_scale:  # one number for a channel: the covariance knows where it varies
        scale = fitted.std.square().mean((0, 2, 3), keepdim=True).sqrt()
        fitted = Normalization(fitted.channels, fitted.mean, scale.expand_as(fitted.std).clone())
    return fitted


def _stored_moments(reader: StateReader) -> Moments:
    stored = StoredStatistics.of(reader.path)
    if stored is not None and stored.are_of(reader.times):
        log.info("climatology: the statistics of %s", reader.path)
        return stored.moments(reader.channels, *reader.window)
    first, last = (np.datetime_as_string(t, unit="m") for t in reader.times[[0, -1]])
    if stored is None:
        log.info("climatology: %s has no statistics; reading %d samples", reader.path, len(reader))
    else:
        log.warning(
            "climatology: the statistics of %s are of %d samples from %s to %s, but training takes "
            "%d from %s to %s; computing those by reading them all (or prepare the store with "
            "statistics.start and statistics.end to match)",
            reader.path,
            stored.samples,
            np.datetime_as_string(stored.first, unit="m"),
            np.datetime_as_string(stored.last, unit="m"),
            len(reader),
            first,
            last,
        )
    with progress_bar("statistics") as progress:
        return moments(reader, progress)


def build_task(config: DictConfig) -> Task:
    """What the configuration trains an operator to draw.

    Raises:
        InputError: If its parts do not fit together.
    """
    coarse = (
        CoarseWindow(**cast(dict[str, Any], OmegaConf.to_container(config.coarse)))
        if config.coarse is not None
        else None
    )
    return Task(config.data.frames, config.condition, coarse)


def windows(samples: Samples, span: int) -> Int[Tensor, "N P"]:
    """Numbers of the states of all windows of ``span`` frames, in steps of the record.

    Raises:
        InputError: If there is no such window.
    """
    start = np.arange(max(len(samples.times) - span + 1, 0))
    last = start + span - 1
    step = time_step(samples)
    whole = samples.trajectory[start] == samples.trajectory[last]
    if step is not None:
        whole &= samples.times[last] - samples.times[start] == (span - 1) * step
    if not whole.any():
        raise InputError(
            f"the samples hold no {span} frames in a row (runs of equal steps in time, within a "
            "trajectory); take fewer data.frames, a smaller coarse.reach or longer trajectories"
        )
    return torch.from_numpy(start[whole])[:, None] + torch.arange(span)


def time_step(samples: Samples) -> np.timedelta64 | None:
    """Shortest step in time within a run; None if no run has two samples."""
    steps = np.diff(samples.times)[samples.trajectory[1:] == samples.trajectory[:-1]]
    steps = steps[steps > np.timedelta64(0)]
    return steps.min() if len(steps) else None


def pieces(
    samples: Samples, normalization: Normalization, task: Task, basis: Basis, most: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Normalised states of a task and their conditions, part by part.

    Args:
        samples: Frames on the grid of ``basis``.
        normalization: Of the frames.
        task: Says what a sample is made of.
        basis: Of the operator.
        most: Number of samples to take, spread over all; None for all.
    """
    frames = windows(samples, task.span)
    if most is not None and len(frames) > most:
        frames = frames[spread(len(frames), most)]
    size = 4 * task.span * int(np.prod(samples.fields.shape[-2:])) * len(normalization.channels)
    for part in frames.split(max(1, _PIECE_BYTES // size)):
        needed, place = part.unique(return_inverse=True)
        states = samples.fields[needed]
        if isinstance(states, StateReader):
            states = states.load()
        x = normalization.normalize(states, samples.hours[needed])[place].flatten(1, 2)
        yield task.split(x, task.at(samples.times[part[:, task.span // 2]]), basis)


def tensors(
    samples: Samples,
    normalization: Normalization,
    task: Task,
    basis: Basis,
    most: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """States of a task and their conditions in memory; arguments as of :func:`pieces`."""
    states, conditions = zip(*pieces(samples, normalization, task, basis, most), strict=True)
    x = torch.cat(states).to(device)
    return x, None if conditions[0] is None else torch.cat(conditions).to(device)


def build_loader(
    samples: Samples,
    normalization: Normalization,
    task: Task,
    config: DictConfig,
    loader: str,
    manager: DistributedManager,
) -> Loader:
    """A loader of the training samples, in memory or of the kind that `pick_loader` named.

    Its batches are of all frames of a sample; :meth:`Task.split` makes states and conditions.

    Raises:
        InputError: If the options do not fit the samples.
    """
    symmetry = (
        Symmetry(**cast(dict[str, Any], OmegaConf.to_container(config.symmetry)))
        if config.symmetry
        else None
    )
    frames = windows(samples, task.span) if task.span > 1 else None
    middle = slice(None) if frames is None else frames[:, task.span // 2].numpy()
    condition = task.at(samples.times[middle])
    options: dict[str, Any] = {
        "frames": frames,
        "batch": config.trainer.batch,
        "seed": config.trainer.seed,
        "symmetry": symmetry,
        "crop": config.data.crop,
        "rank": manager.rank,
        "ranks": manager.world_size,
    }
    if not isinstance(samples.fields, StateReader):
        x = normalization.normalize(samples.fields, samples.hours).to(manager.device)
        given = None if condition is None else condition.to(manager.device)
        return TensorLoader(x, given, **options)
    options |= {
        "device": manager.device,
        "workers": config.data.workers,
        "prefetch": config.data.prefetch,
    }
    kind: type[StoreLoader] = StreamLoader
    if loader == "dali":  # the import needs the extra
        from ddo_modulus.data.dali import DaliLoader

        kind = DaliLoader
    return kind(samples.fields, normalization, condition, **options)
