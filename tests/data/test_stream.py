# SPDX-License-Identifier: Apache-2.0
import multiprocessing
import shutil
import time
from itertools import islice

import numpy as np
import pytest
import torch

from ddo_modulus.data.dali import DaliLoader
from ddo_modulus.data.loader import BatchOptions, Symmetry, TensorLoader
from ddo_modulus.data.normalization import Normalization
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.statistics import hours_of
from ddo_modulus.data.stream import ReadingOptions, SampleOfStep, StoreLoader, StreamLoader
from ddo_modulus.data.training_store import write_training_store
from ddo_modulus.diffusion.task import Task
from ddo_modulus.errors import InputError

LOADERS = [StreamLoader, DaliLoader]
ALL = {"symmetry": Symmetry((1, 2), True, 3), "condition": True, "per_hour": True}


class InProcess(StoreLoader):
    """Reads where it is used."""

    def fields(self, start):
        read, step = SampleOfStep(self.reader, self.frames, self.order), start
        while True:
            states = [torch.from_numpy(read(step, i)) for i in range(self.order.share)]
            yield torch.stack(states)
            step += 1


FRAMES = torch.arange(47)[:, None] + torch.tensor([0, 1, 3])


def loaders(
    store, kind, *, per_hour=False, per_point=True, condition=False, frames=None, **options
):
    """The loader in memory and one of the kind, for the same batches."""
    reader = StateReader(store)[np.arange(50)]
    x, hours = reader.load(), torch.from_numpy(hours_of(reader.times))
    harmonics = 1 if per_hour else None
    fitted = Normalization.fit(
        reader.channels, x, hours, per_hour=per_hour, per_point=per_point, harmonics=harmonics
    )
    hour = Task(condition="hour_of_day").at(reader.times) if condition else None
    if condition and frames is not None:
        hour = hour[: len(frames)]
    batches, one_worker = BatchOptions(**options), ReadingOptions(workers=1)
    memory = TensorLoader(fitted.normalize(x, hours), batches, hour, frames)
    return memory, kind(reader, fitted, batches, hour, frames, reading=one_worker)


def assert_equal(memory, other, start=0, count=3):
    """Whether batches agree, bit for bit."""
    batches = islice(zip(memory.batches(start), other.batches(start), strict=True), count)
    for (x, one), (y, two) in batches:
        assert torch.equal(x, y)
        assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.parametrize(
    "options",
    [
        {},
        ALL,
        {"crop": (4, 5), "per_hour": True, "condition": True},
        {"crop": (4, 5)},
        {"crop": (10, 12), "per_point": False},
        {"batch": 64, "symmetry": Symmetry(rotate=True)},  # more than an epoch
        {"frames": FRAMES, **ALL},
        {"frames": FRAMES, "crop": (4, 5), "per_hour": True},
        {"frames": FRAMES, "crop": (10, 12), "per_point": False},
    ],
    ids=[
        *("plain", "all", "crop by hour", "crop", "crop by channel", "large"),
        *("frames", "cropped frames", "frames by channel"),
    ],
)
def test_batches_are_those_in_memory(store, options):
    assert_equal(*loaders(store, InProcess, **{"batch": 8, "seed": 3, **options}))


def test_ranks_share_a_batch(store):
    options = {"batch": 6, "crop": (8, 8), **ALL}
    whole, _ = loaders(store, InProcess, **options)
    parts = [loaders(store, InProcess, **options, rank=rank, ranks=3)[1] for rank in range(3)]
    streams = zip(whole.batches(4), *(part.batches(4) for part in parts), strict=True)
    for (x, condition), *shares in islice(streams, 3):
        assert torch.equal(x, torch.stack([s[0] for s in shares], 1).flatten(0, 1))
        assert torch.equal(condition, torch.stack([s[1] for s in shares], 1).flatten(0, 1))


def test_nothing_is_read_that_is_skipped(store, monkeypatch):
    _, loader = loaders(store, InProcess, batch=4)
    read = []
    original = StateReader.read
    monkeypatch.setattr(
        StateReader, "read", lambda self, n, *rest: read.append(n) or original(self, n, *rest)
    )
    next(loader.batches(1000))
    assert read == loader.order(1000).samples.tolist()


@pytest.mark.parametrize("kind", LOADERS)
def test_processes_read_the_same_and_their_death_is_no_hang(store, kind):
    memory, loader = loaders(store, kind, batch=6, seed=1, rank=1, ranks=2, frames=FRAMES, **ALL)
    batches = loader.batches(5)
    for expected, (x, condition) in zip(islice(memory.batches(5), 4), batches, strict=False):
        assert torch.equal(x, expected[0]) and torch.equal(condition, expected[1])
    with pytest.raises(InputError, match="x.zarr: a process that reads it has died"):
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        for _ in range(50):  # what was read ahead comes first
            next(batches)
    loader.close()
    assert not alive()


def alive(seconds=10.0):
    """Processes that are still there after a while."""
    end = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    return multiprocessing.active_children()


@pytest.mark.parametrize("kind", LOADERS)
def test_a_lost_chunk_is_named(store, kind, tmp_path):
    path = tmp_path / "x.zarr"
    shutil.copytree(store, path)
    (path / "fields" / "c" / "3" / "0" / "0" / "0").unlink()
    _, loader = loaders(store, kind, batch=4)
    loader.reader = StateReader(path)[np.array([3] * 50)]
    assert not multiprocessing.active_children()
    with pytest.raises(InputError, match=r"^\S*x.zarr: the fields at 2020-01-01T09:00:00 .*again$"):
        next(loader.batches())
    loader.close()
    assert not alive()


def test_numbers_are_checked():
    for options, match in (({"workers": 0}, "data.workers=0"), ({"prefetch": 0}, "data.prefetch")):
        with pytest.raises(InputError, match=match):
            ReadingOptions(**options)


@pytest.mark.shared_data
def test_dali_reads_era5(shared_data, tmp_path):
    from ddo_modulus.data.source import open_dataset

    grib = open_dataset(shared_data / "era5-levels-members.grib", ["t850", "z500"])
    path = write_training_store(grib, tmp_path / "x.zarr", "grib", compress=False)
    reader = StateReader(path)
    x = reader.load()
    fitted = Normalization.fit(reader.channels, x, per_point=True)
    options = BatchOptions(4, crop=(30, 40))
    memory = TensorLoader(fitted.normalize(x), options)
    loader = DaliLoader(reader, fitted, options, reading=ReadingOptions(workers=1))
    assert_equal(memory, loader, start=7)
    loader.close()
