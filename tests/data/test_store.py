# SPDX-License-Identifier: Apache-2.0
import errno
import gc
import time

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from zarr.storage import _local

from ddo_modulus.data import source
from ddo_modulus.data.source import open_dataset
from ddo_modulus.data.store import write_store
from ddo_modulus.errors import InputError


def analysis(times=5, members=2, value=280.0):
    # Below a second, and in pandas' default microseconds, on purpose.
    time = pd.date_range("2019-03-01", periods=times, freq="250ms").as_unit("us")
    shape = (members, times, 3, 4)
    values = value + np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 100
    coords = {
        "ensemble": np.arange(members),
        "time": time,
        "lat": [52.0, 51.0, 50.0],
        "lon": [-1.0, 0.0, 1.0, 2.0],
    }
    return xr.Dataset({"t2m": (("ensemble", "time", "lat", "lon"), values)}, coords, {"seed": 3})


def read(path):
    """Load a store, with times in the unit of `analysis`."""
    dataset = open_dataset(path).load()
    return dataset.assign_coords(time=dataset["time"].astype("datetime64[us]"))


def test_what_is_written_can_be_opened(tmp_path):
    path = write_store(analysis(), tmp_path / "deep" / "a.zarr")
    xr.testing.assert_identical(read(path), analysis())


def test_writing_in_pieces_gives_the_same_store(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_SLAB_BYTES", 1)
    path = write_store(analysis(), tmp_path / "a.zarr")
    xr.testing.assert_identical(read(path), analysis())


@pytest.mark.parametrize("compress", [True, False])
def test_a_chunk_is_one_field_at_one_time(tmp_path, compress):
    path = write_store(analysis(), tmp_path / "a.zarr", compress=compress)
    array = zarr.open_group(path, mode="r")["t2m"]
    assert array.metadata.zarr_format == 3
    assert array.chunks == (1, 1, 3, 4)
    assert bool(array.compressors) == compress


def test_a_lost_chunk_reads_as_missing(tmp_path):
    path = write_store(analysis(), tmp_path / "a.zarr")
    (path / "t2m" / "c" / "1" / "2" / "0" / "0").unlink()
    lost = np.isnan(open_dataset(path)["t2m"].values)
    assert lost[1, 2].all()
    assert lost.sum() == 12


def test_a_store_opened_lazily_can_be_written_again(tmp_path):
    first = write_store(analysis(), tmp_path / "a.zarr")
    second = write_store(open_dataset(first), tmp_path / "b.zarr", compress=False)
    xr.testing.assert_identical(read(second), analysis())


def test_an_existing_store_is_kept_unless_overwrite_is_set(tmp_path):
    path = write_store(analysis(), tmp_path / "a.zarr")
    with pytest.raises(InputError, match="a.zarr exists; .*overwrite=true"):
        write_store(analysis(value=250.0), path)
    assert open_dataset(path)["t2m"].max() > 280
    write_store(analysis(value=250.0, times=2), path, overwrite=True)
    xr.testing.assert_identical(read(path), analysis(value=250.0, times=2))
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_store_is_ever_replaced_by_one(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="not a zarr store"):
        write_store(analysis(), tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_the_older_store_and_nothing_else(tmp_path, monkeypatch, error):
    path = write_store(analysis(), tmp_path / "a.zarr")

    def interrupted(*args, **kwargs):
        yield analysis(value=250.0).isel(time=slice(0, 1))
        raise error

    monkeypatch.setattr("ddo_modulus.data.store.slabs", interrupted)
    with pytest.raises(error):
        write_store(analysis(value=250.0), path, overwrite=True)
    xr.testing.assert_identical(read(path), analysis())
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_while_chunks_are_written(tmp_path, monkeypatch, caplog):
    path = write_store(analysis(times=8), tmp_path / "a.zarr")
    older = sorted(path.rglob("*")), read(path)
    put, written = _local._put, []

    def slow(place, *rest, **keys):
        if "/t2m/c/" in place.as_posix():
            written.append(place)
            if len(written) == 1:
                raise OSError(errno.ENOSPC, "full")
            time.sleep(0.2)
        return put(place, *rest, **keys)

    monkeypatch.setattr(_local, "_put", slow)
    with pytest.raises(InputError, match="no space left on device"):
        write_store(analysis(times=8), path, overwrite=True)
    assert len(written) > 1
    time.sleep(0.5)
    gc.collect()
    assert list(tmp_path.iterdir()) == [path]
    assert sorted(path.rglob("*")) == older[0]
    xr.testing.assert_identical(read(path), older[1])
    assert not [r for r in caplog.records if r.name == "asyncio"]


def test_no_times_are_refused(tmp_path):
    with pytest.raises(InputError, match="no times"):
        write_store(analysis(times=0), tmp_path / "a.zarr")
    assert list(tmp_path.iterdir()) == []
