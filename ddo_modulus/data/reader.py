# SPDX-License-Identifier: Apache-2.0
"""Single states of a store, for loaders that read while a model trains.

Axes: ``N`` states, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
import zarr
from jaxtyping import Float
from numcodecs import blosc, zstd
from torch import Tensor
from zarr.codecs import BloscCodec, BytesCodec, ZstdCodec
from zarr.storage import LocalStore

from ddo_modulus.data.formats import FIELDS, LAYOUT
from ddo_modulus.data.source import open_dataset
from ddo_modulus.errors import InputError

Array = np.ndarray

# Of bytes into an array.
_DECOMPRESS = {BloscCodec: blosc.decompress, ZstdCodec: zstd.decompress}

# Indices of trajectory or member (if there are any) and time -> (C, H, W) on the whole grid.
_Read = Callable[[tuple[int, ...]], Array]


class StateReader:
    """States of a store in canonical form, read one at a time.

    States are numbered trajectory by trajectory (or member by member), each in the order of time.
    The store is opened when a state is first read, once in each process that the reader is sent
    to. In a training store a state is one chunk; from any other source it is assembled from its
    variables, which is slower.

    Args:
        path: As :func:`~ddo_modulus.data.source.open_dataset` takes it.
        channels: Variable ids, ``C`` of them; None for all.
        rows: Rows of the grid to keep.
        columns: Columns of the grid to keep.

    Attributes:
        channels: Variable ids.
        times: ``(N,)`` datetime64.
        run: ``(N,)`` trajectory or member; zeros for one record.
        prepared: Whether it is a training store, whose values were checked when it was written.
        region: Rows and columns of the store's grid that are kept.
        shape: Grid ``(H, W)`` of the states.

    Raises:
        InputError: If the store cannot be opened or has no such variable.
    """

    def __init__(
        self,
        path: str | Path,
        channels: Sequence[str] | None = None,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> None:
        dataset = open_dataset(path, channels)
        self.path = str(path)
        self.channels = tuple(str(name) for name in dataset.data_vars)
        first = dataset[self.channels[0]]
        self._lead = first.shape[:-2]  # members, if there are any, and times
        self.region = (rows, columns)
        self.shape = (len(dataset["lat"][rows]), len(dataset["lon"][columns]))
        times = dataset["time"].values
        runs = int(np.prod(self._lead[:-1]))
        self.times = np.tile(times, runs)
        self.run = np.repeat(np.arange(runs), len(times))
        self._numbers = np.arange(len(self.times))
        self.prepared = _is_training_store(self.path)
        self._read: _Read | None = None

    def __len__(self) -> int:
        """Number of states."""
        return len(self._numbers)

    @property
    def nbytes(self) -> int:
        """Size of all states in memory."""
        return 4 * len(self) * len(self.channels) * self.shape[0] * self.shape[1]

    def __getitem__(self, chosen: Array | Tensor) -> StateReader:
        """A reader of the states with these numbers only."""
        chosen = np.asarray(chosen)
        names = ("_numbers", "times", "run")
        return self._with(**{name: getattr(self, name)[chosen] for name in names})

    def part(self, rows: slice, columns: slice) -> StateReader:
        """A reader of a part of this one's grid."""
        region = []
        for kept, taken, size in zip(self.region, (rows, columns), self.shape, strict=True):
            start, stop, _ = taken.indices(size)
            region.append(slice((kept.start or 0) + start, (kept.start or 0) + stop))
        shape = tuple(axis.stop - axis.start for axis in region)
        return self._with(region=tuple(region), shape=shape)

    def load(self) -> Float[Tensor, "N C H W"]:
        """All states in memory, float32.

        Raises:
            InputError: If one cannot be read.
        """
        fields = np.empty((len(self), len(self.channels), *self.shape), np.float32)
        # The netCDF library crashes when several threads open and close files.
        with ThreadPoolExecutor(4 if self.prepared else 1) as pool:
            list(pool.map(lambda n: np.copyto(fields[n], self.read(n)), range(len(self))))
        return torch.from_numpy(fields)

    def _with(self, **changed: Any) -> StateReader:  # noqa: ANN401 - attributes of any type
        other = object.__new__(StateReader)
        other.__dict__ = self.__getstate__() | changed
        return other

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_read": None}  # open stores do not travel

    def read(
        self, state: int, corner: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> Array:
        """One state in physical units.

        Args:
            state: Its number.
            corner: First row and column of a part to cut out; None for the whole state.
            size: Rows and columns of the part.

        Returns:
            ``(C, H, W)``, or ``(C, *size)``, float32; may be a view of a larger array.

        Raises:
            InputError: If it cannot be read or is not there.
        """
        try:
            if self._read is None:
                self._read = _open(self.path, self.channels)
            place = np.unravel_index(int(self._numbers[state]), self._lead)
            whole = self._read(tuple(int(i) for i in place))
            if np.isnan(whole[:, 0, 0]).any():
                raise ValueError("a chunk is missing")
        except MemoryError:
            raise
        except Exception as error:  # every format raises errors of its own for unreadable data
            raise InputError(
                f"{self.path}: the fields at {np.datetime_as_string(self.times[state], unit='s')} "
                f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())}); copy or "
                "prepare the store again"
            ) from error
        part = whole[:, *self.region]
        if corner is None or size is None:
            return part
        (i, j), (height, width) = corner, size
        return part[:, i : i + height, j : j + width]


def _is_training_store(path: str) -> bool:
    if "://" in path or not (Path(path) / FIELDS / "zarr.json").exists():
        return False
    return zarr.open_group(path, mode="r").attrs.get("layout") == LAYOUT


def _open(path: str, channels: tuple[str, ...]) -> _Read:
    """The fastest way to read whole states."""
    if not _is_training_store(path):
        return _variables(path, channels)
    array = zarr.open_group(path, mode="r")[FIELDS]
    assert isinstance(array, zarr.Array)
    with xr.open_zarr(path, chunks=None, consolidated=False) as dataset:
        stored = dataset["channel"].values.tolist()
    index = [stored.index(name) for name in channels]
    whole = _chunk_files(array) or (lambda place: np.asarray(array[place]))
    if index == list(range(len(stored))):
        return whole
    return lambda place: whole(place)[index]


def _variables(path: str, channels: tuple[str, ...]) -> _Read:
    """Read variable by variable from any source."""
    fields = [field.variable for field in open_dataset(path, channels).data_vars.values()]
    return lambda place: np.stack([field[place].values for field in fields]).astype(np.float32)


def _chunk_files(array: zarr.Array) -> _Read | None:
    """Read states straight from the files of their chunks, where a training store is on disk.

    A chunk of 4 MiB takes 2.2 ms uncompressed and 4.2 ms compressed through zarr, but .5 and
    1.6 ms from its file, without an event loop, threads and a second copy. None if zarr's metadata
    describe another layout than :mod:`~ddo_modulus.data.training_store` writes.
    """
    lead = array.ndim - 3
    codecs = array.compressors
    if (
        not isinstance(array.store, LocalStore)
        or array.metadata.zarr_format != 3
        or array.chunks != (1,) * lead + array.shape[lead:]
        or array.shards is not None
        or array.filters
        or array.serializer != BytesCodec(endian="little")
        or array.dtype != np.float32
        or len(codecs) > 1
        or not all(type(codec) in _DECOMPRESS for codec in codecs)
    ):
        return None
    folder = array.store.root / array.path
    shape, key = array.shape[lead:], array.metadata.encode_chunk_key
    decompress = _DECOMPRESS[type(codecs[0])] if codecs else None
    # Workers are separate processes, and BLOSC's threads are not safe with several callers.
    blosc.use_threads = False

    def read(place: tuple[int, ...]) -> Array:
        state = np.empty(shape, np.float32)
        with (folder / key((*place, 0, 0, 0))).open("rb", buffering=0) as file:
            if decompress is not None:
                decompress(file.read(), state)
            elif file.readinto(state.data.cast("B")) != state.nbytes:
                raise EOFError("the chunk is cut short")
        return state

    return read
