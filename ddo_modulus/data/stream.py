# SPDX-License-Identifier: Apache-2.0
"""Loaders that read states from a store while a model trains.

Processes read states and crop them, in the order of :class:`~ddo_modulus.data.loader.Order`.
Normalisation, symmetries and conditions are applied to whole batches, on the device to train on.

Axes: ``N`` samples, ``B`` batch, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ddo_modulus.data.loader import BatchOptions, Draw, Order, cut, move
from ddo_modulus.data.normalization import Normalization, hours_of
from ddo_modulus.data.reader import StateReader
from ddo_modulus.errors import InputError


@dataclass(frozen=True)
class ReadingOptions:
    """How states are read during training; no batch depends on it.

    Attributes:
        workers: Processes that read.
        prefetch: Batches to read ahead.

    Raises:
        InputError: If a number is below 1.
    """

    workers: int = 4
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("prefetch", self.prefetch)):
            if value < 1:
                raise InputError(f"data.{name}={value} must be at least 1")


class StoreLoader(ABC):
    """Endless shuffled batches of a store's states; a subclass says how they are read.

    Args:
        reader: The states, in physical units.
        normalization: Of the states, by point on the grid of the reader.
        options: How batches are put together.
        condition: Of each sample ``(N, D)``, or None.
        frames: ``(N, P)`` indices of the states that make up each sample; None if each is one.
        reading: How many processes read, and how far ahead.
        device: Where batches are put.

    Raises:
        InputError: As :class:`~ddo_modulus.data.loader.Order`.
    """

    def __init__(
        self,
        reader: StateReader,
        normalization: Normalization,
        options: BatchOptions,
        condition: Tensor | None = None,
        frames: Int[Tensor, "N P"] | None = None,
        *,
        reading: ReadingOptions = ReadingOptions(),
        device: torch.device | str = "cpu",
    ) -> None:
        self.frames = torch.arange(len(reader))[:, None] if frames is None else frames
        self.order = Order(options, len(self.frames), reader.shape)
        self.reader, self.reading, self.device = reader, reading, torch.device(device)
        self.normalization = normalization.to(self.device)
        self.hours = torch.from_numpy(hours_of(reader.times))
        self.condition = None if condition is None else condition.to(self.device)
        self._running: list[Generator[Tensor]] = []

    @abstractmethod
    def fields(self, start: int) -> Generator[Float[Tensor, "B C H W"]]:
        """This rank's states from step ``start`` on, in physical units, on the device.

        Raises:
            InputError: If one cannot be read.
        """

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """States and conditions of this rank, from step ``start`` on.

        Raises:
            InputError: If a state cannot be read; it names the store and the time.
        """
        running = self.fields(start)
        self._running.append(running)
        with closing(running):
            for step in itertools.count(start):
                draw = self.order(step)
                try:
                    states = next(running)
                except (RuntimeError, OSError, EOFError) as error:  # when a process is gone
                    raise InputError(
                        f"{self.reader.path}: a process that reads it has died "
                        f"({' '.join(str(error).split())[:200]}); if the memory ran out, take "
                        "fewer data.workers or a smaller data.prefetch"
                    ) from error
                x = self._normalized(states, draw)
                if draw.moves is not None:
                    x = move(x, draw.moves)
                if self.condition is None:
                    yield x, None
                else:
                    yield x, self.condition[draw.samples.to(self.device, non_blocking=True)]

    def close(self) -> None:
        """End the processes that read."""
        while self._running:
            self._running.pop().close()

    def _normalized(self, x: Tensor, draw: Draw) -> Tensor:
        """As ``Normalization.normalize``, but for crops, and without waiting for the device."""
        mean, std = self.normalization.mean, self.normalization.std
        states = self.frames[draw.samples]  # B P
        if self.normalization.per_hour:
            hour = self.hours[states].to(self.device, non_blocking=True)
            mean, std = (v[hour].flatten(1, 2) for v in (mean, std))
        else:
            mean, std = (v.repeat(1, states.shape[1], 1, 1) for v in (mean, std))
        crop = self.order.options.crop
        if crop is not None and draw.corners is not None and mean.shape[-2:] != (1, 1):
            mean, std = (cut(v.expand(len(x), -1, -1, -1), draw.corners, crop) for v in (mean, std))
        return (x - mean) / std


class SampleOfStep:
    """Reads one sample of this rank's share of a step; sent to the processes that read.

    Args:
        reader: The states.
        frames: ``(N, P)`` indices of the states that make up each sample.
        order: Says which samples a step takes, and where their crops are.
    """

    def __init__(self, reader: StateReader, frames: Int[Tensor, "N P"], order: Order) -> None:
        self.reader, self.frames, self.order = reader, frames, order

    def __call__(self, step: int, place: int) -> np.ndarray:
        """Sample at a place of the share: ``(P C, h, w)`` float32 in physical units."""
        draw = self.order(step)
        corner = None if draw.corners is None else draw.corners[place].tolist()
        states = self.frames[draw.samples[place]].tolist()
        parts = [self.reader.read(state, corner, self.order.options.crop) for state in states]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _Steps(Dataset):
    """The states of each step as one tensor, or the message of the error if one cannot be read."""

    def __init__(self, read: SampleOfStep) -> None:
        self.read = read

    def __getitem__(self, step: int) -> Tensor | str:
        try:
            states = [self.read(step, place) for place in range(self.read.order.share)]
        except InputError as error:  # raised here, it would come wrapped in tracebacks
            return str(error)
        # In a worker this stacks straight into memory shared with the training process.
        batch: Tensor = default_collate([torch.from_numpy(state) for state in states])
        return batch


class StreamLoader(StoreLoader):
    """Reads through PyTorch's ``DataLoader``: a worker reads a batch at a time."""

    def fields(self, start: int) -> Generator[Float[Tensor, "B C H W"]]:
        """As :meth:`StoreLoader.fields`."""
        loader = DataLoader(
            _Steps(SampleOfStep(self.reader, self.frames, self.order)),
            batch_size=None,
            sampler=itertools.count(start),
            num_workers=self.reading.workers,
            prefetch_factor=self.reading.prefetch,
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="spawn",  # a fork would copy locks that threads hold
        )
        for states in loader:
            if isinstance(states, str):
                raise InputError(states)
            yield states.to(self.device, non_blocking=True)
