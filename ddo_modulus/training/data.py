# SPDX-License-Identifier: Apache-2.0
"""The data of a training run as one object, from a store to batches.

Axes: ``N`` samples, ``P`` frames of a window, ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ddo_modulus.data.loader import BatchOptions, Loader, TensorLoader
from ddo_modulus.data.normalization import Normalization
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.source import check_values, open_dataset
from ddo_modulus.data.statistics import random_subset
from ddo_modulus.data.stream import ReadingOptions, StoreLoader, StreamLoader
from ddo_modulus.diffusion.task import Task
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis
from ddo_modulus.fields.grid import Grid
from ddo_modulus.training.climatology import fit_normalization
from ddo_modulus.training.domain import Part, build_grid, centre, region
from ddo_modulus.training.recipe import DataConfig, NormalizationConfig
from ddo_modulus.training.samples import Samples

log = logging.getLogger(__name__)

_PIECE_BYTES = 2**28  # of samples that are normalised at a time


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Samples with all that training needs to know of them; make one with :meth:`open`.

    Every method returns a new object, or numbers, and leaves this one as it is.

    Attributes:
        samples: Fields in physical units with their times.
        normalization: Of the fields, by point on their grid.
        task: Frames of a state, and its condition.
        dataset: Coordinates and attributes of the store, on the samples' grid. Its values are not
            to be read.
        domain: ``"torus"``, ``"box"`` or ``"sphere"``.
        options: Section ``data`` of the configuration.
        normalization_options: Section ``normalization``.
        loader_kind: ``"memory"``, ``"dali"`` or ``"torch"``.
    """

    samples: Samples
    normalization: Normalization
    task: Task
    dataset: xr.Dataset
    domain: str
    options: DataConfig
    normalization_options: NormalizationConfig
    loader_kind: str

    @classmethod
    def open(
        cls,
        options: DataConfig,
        *,
        domain: str,
        task: Task,
        normalization: NormalizationConfig,
    ) -> TrainingData:
        """Open a store; its fields are read if they go into memory.

        Args:
            options: Which samples, and how they are read.
            domain: ``"torus"``, ``"box"`` or ``"sphere"``.
            task: Frames of a state, and its condition.
            normalization: How climatology and scale are fitted, to the samples to train on.

        Raises:
            InputError: If the store cannot be used, or has no samples to train on.
        """
        dataset = open_dataset(options.path, options.variables)
        part = region(dataset, options.region)
        dataset = dataset.isel(lat=part[0], lon=part[1])
        kind = _loader_kind(dataset, options)
        samples = _open_samples(dataset, options, part, kind)
        inside = _in_period(samples.times, options.start, options.end)
        if not (inside & ~_held_back(samples, options)).any():
            raise InputError(
                f"no samples to train on: the data run from {samples.times.min()} to "
                f"{samples.times.max()}; check data.start, data.end and data.validation"
            )
        samples = samples.select(inside)
        training = samples.select(~_held_back(samples, options))
        centre(training.shape, options.crop)  # refuses a crop that does not fit
        channels = [str(name) for name in dataset.data_vars]
        fitted = fit_normalization(channels, training, normalization)
        return cls(samples, fitted, task, dataset, domain, options, normalization, kind)

    @property
    def channels(self) -> tuple[str, ...]:
        """Variable ids."""
        return self.normalization.channels

    @property
    def units(self) -> tuple[str, ...]:
        """Physical unit of each channel."""
        fields = self.dataset.data_vars.values()
        return tuple(str(field.attrs.get("units", "1")) for field in fields)

    @property
    def attributes(self) -> dict[str, str | int | float]:
        """What the store says of itself, less its history, as JSON can hold it."""
        return {
            str(key): value if isinstance(value, str | int | float) else str(value)
            for key, value in self.dataset.attrs.items()
            if key != "history"
        }

    @cached_property
    def grid(self) -> Grid:
        """Where the samples are."""
        return build_grid(self.dataset, self.domain)

    def select(self, mask: np.ndarray) -> TrainingData:
        """The samples where a mask ``(N,)`` is true, with the same normalization."""
        return replace(self, samples=self.samples.select(mask))

    def split(self) -> tuple[TrainingData, TrainingData]:
        """Samples to train on, and those held back for validation."""
        held_back = _held_back(self.samples, self.options)
        return self.select(~held_back), self.select(held_back)

    def refitted(self) -> TrainingData:
        """The same samples with climatology and scale fitted to all of them."""
        fitted = fit_normalization(self.channels, self.samples, self.normalization_options)
        return replace(self, normalization=fitted)

    def cropped(self) -> TrainingData:
        """The part of size ``data.crop`` in the middle of the grid; all of it without a crop.

        The domain of a model that is trained on crops is one crop. This one stands for them all
        in its linear part, its validation and its package.
        """
        if self.options.crop is None:
            return self
        rows, columns = centre(self.samples.shape, self.options.crop)
        return replace(
            self,
            samples=self.samples.part((rows, columns)),
            normalization=self.normalization.window(rows, columns),
            dataset=self.dataset.isel(lat=rows, lon=columns),
        )

    def folds(self, count: int) -> Iterator[tuple[TrainingData, TrainingData]]:
        """Each of ``count`` contiguous blocks of the samples, after all the other samples."""
        block = np.arange(len(self.samples)) * count // len(self.samples)
        for fold in range(count):
            yield self.select(block != fold), self.select(block == fold)

    def pieces(
        self, basis: Basis, most: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Normalised states and their conditions, on the operator's grid, piece by piece.

        Args:
            basis: Of the operator.
            most: Largest number of states, drawn at random; None for all.

        Raises:
            InputError: If there are no states, or one cannot be read.
        """
        data, task = self.cropped(), self.task
        samples = data.samples
        windows = samples.windows(task.span)
        if most is not None and len(windows) > most:
            windows = windows[random_subset(len(windows), most)]
        size = 4 * task.span * len(self.channels) * samples.shape[0] * samples.shape[1]
        for piece in windows.split(max(1, _PIECE_BYTES // size)):
            needed, place = piece.unique(return_inverse=True)
            x = data.normalization.normalize(samples.load(needed), samples.hours[needed])
            condition = task.at(samples.times[piece[:, task.span // 2]])
            yield task.split(x[place].flatten(1, 2), condition, basis)

    def tensors(
        self, basis: Basis, most: int | None, device: torch.device | str
    ) -> tuple[Tensor, Tensor | None]:
        """All of :meth:`pieces` in memory: states and their conditions."""
        states, conditions = zip(*self.pieces(basis, most), strict=True)
        x = torch.cat(states).to(device)
        return x, None if conditions[0] is None else torch.cat(conditions).to(device)

    def loader(self, batches: BatchOptions, device: torch.device | str) -> Loader:
        """Endless batches of normalised windows ``(B, P C, H, W)``, cropped and transformed.

        :meth:`.Task.split` makes states and conditions of them.

        Args:
            batches: How they are put together.
            device: Where they are put.

        Raises:
            InputError: If the options do not fit the samples.
        """
        samples, task = self.samples, self.task
        windows = samples.windows(task.span) if task.span > 1 else None
        middle = slice(None) if windows is None else windows[:, task.span // 2].numpy()
        condition = task.at(samples.times[middle])
        if not isinstance(samples.fields, StateReader):
            x = self.normalization.normalize(samples.fields, samples.hours).to(device)
            moved = None if condition is None else condition.to(device)
            return TensorLoader(x, batches, moved, windows)
        return self._store_loader()(
            samples.fields,
            self.normalization,
            batches,
            condition,
            windows,
            reading=ReadingOptions(self.options.workers, self.options.prefetch),
            device=device,
        )

    def _store_loader(self) -> type[StoreLoader]:
        if self.loader_kind != "dali":
            return StreamLoader
        from ddo_modulus.data.dali import DaliLoader  # an optional dependency

        return DaliLoader


def batches_of_states(
    loader: Loader, task: Task, basis: Basis, start: int = 0
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """States and conditions from the windows of a loader, from step ``start`` on."""
    for windows, condition in loader.batches(start):
        yield task.split(windows, condition, basis)


def _loader_kind(dataset: xr.Dataset, options: DataConfig) -> str:
    size = 4 * sum(field.size for field in dataset.data_vars.values())
    kind = options.loader_for(size)
    reading = "in memory"
    if kind != "memory":
        reading = f"read during training by {kind} with {options.workers} processes"
    log.info("%s: %.2f GiB, %s", options.path, size / 2**30, reading)
    return kind


def _open_samples(dataset: xr.Dataset, options: DataConfig, part: Part, kind: str) -> Samples:
    """Samples of a store, in memory or as a reader.

    Args:
        dataset: The store, on the part of the grid.
        options: Names the store.
        part: Of the store's grid.
        kind: ``"memory"``, ``"dali"`` or ``"torch"``.
    """
    where = str(options.path)
    reader = StateReader(where, [str(name) for name in dataset.data_vars], *part)
    if kind == "memory" and not reader.prepared:
        check_values(dataset, where)
        return Samples.of(dataset)
    check_values(dataset.isel(time=slice(0, 1)), where)
    return Samples(reader.load() if kind == "memory" else reader, reader.times, reader.run)


def _in_period(times: np.ndarray, start: Any, end: Any) -> np.ndarray:  # noqa: ANN401
    """Which times are from start to end, both included; None is no bound."""
    inside = np.ones(len(times), bool)
    if start is not None:
        inside &= times >= np.datetime64(start)
    if end is not None:
        inside &= times <= np.datetime64(end)
    return inside


def _held_back(samples: Samples, options: DataConfig) -> np.ndarray:
    """Which samples are for validation: a span of time, or the last trajectories."""
    validation, held_back = options.validation, np.zeros(len(samples), bool)
    if validation.start is not None:
        held_back = _in_period(samples.times, validation.start, validation.end)
    if validation.trajectories:
        held_back |= samples.trajectory > samples.trajectory.max() - validation.trajectories
    return held_back
