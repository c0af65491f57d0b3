# SPDX-License-Identifier: Apache-2.0
import pickle
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr

from ddo_modulus.data import reader as module
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.store import write_store
from ddo_modulus.data.training_store import write_training_store
from ddo_modulus.errors import InputError


@pytest.fixture(scope="module")
def states(fields):
    """``(N, C, H, W)`` of the fields."""
    return fields.to_array("channel").transpose("time", "channel", "lat", "lon").values


@pytest.fixture(
    params=["compressed", "plain", "through zarr", "by variable", "zarr 2", "netCDF", "members"]
)
def source(request, fields, tmp_path, monkeypatch):
    """The same fields in every layout."""
    kind, path = request.param, tmp_path / "x.zarr"
    if kind in ("compressed", "plain", "through zarr"):
        write_training_store(fields, path, "here", compress=kind == "compressed")
    if kind == "through zarr":
        monkeypatch.setattr(module, "_chunk_files", lambda array: None)
    elif kind == "by variable":
        write_store(fields, path)
    elif kind == "zarr 2":
        fields.isel(lat=slice(None, None, -1)).to_zarr(path, zarr_format=2, consolidated=False)
    elif kind == "netCDF":
        fields.to_netcdf(path)
    elif kind == "members":  # of one: the same states
        write_training_store(fields.expand_dims(ensemble=[3]), path, "here")
    return path


def test_every_layout_gives_the_same_states(source, states, fields):
    reader = StateReader(source, list(fields))
    assert len(reader) == 60 and reader.shape == (10, 12) and reader.channels == tuple(fields)
    np.testing.assert_array_equal(reader.times, fields["time"].values)
    np.testing.assert_array_equal(reader.load(), states)
    sent = pickle.loads(pickle.dumps(reader))
    for number in (0, 17, 59):
        np.testing.assert_array_equal(sent.read(number), states[number])
    some = StateReader(source, ["u10m", "t2m"], slice(2, 8), slice(1, 12))[np.array([40, 3])]
    np.testing.assert_array_equal(some.times, fields["time"].values[[40, 3]])
    expected = states[3][[2, 0], 2:8, 1:12]
    np.testing.assert_array_equal(some.read(1), expected)
    np.testing.assert_array_equal(some.read(1, (1, 2), (4, 3)), expected[:, 1:5, 2:5])
    part = some.part(slice(1, 3), slice(0, 4))
    assert part.shape == (2, 4)
    np.testing.assert_array_equal(part.read(1), expected[:, 1:3, :4])


def test_states_are_numbered_run_by_run(fields, states, tmp_path):
    runs = xr.concat([fields, fields + 1], dim=xr.DataArray([0, 1], dims="trajectory"))
    for write in (lambda p: write_training_store(runs, p, "here"), lambda p: write_store(runs, p)):
        path = tmp_path / "x.zarr"
        write(path)
        reader = StateReader(path, list(fields))
        assert reader.run.tolist() == [0] * 60 + [1] * 60
        assert reader.times[61] == fields["time"].values[1]
        np.testing.assert_array_equal(reader.read(61), (fields + 1).isel(time=1).to_array())
        shutil.rmtree(path)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("fault", ["lost", "cut short", "empty"])
@pytest.mark.parametrize("direct", [True, False])
def test_a_damaged_chunk_is_named(fields, tmp_path, monkeypatch, compress, fault, direct):
    path = write_training_store(fields, tmp_path / "x.zarr", "here", compress=compress)
    if not direct:
        monkeypatch.setattr(module, "_chunk_files", lambda array: None)
    chunk = path / "fields" / "c" / "7" / "0" / "0" / "0"
    whole = chunk.read_bytes()
    chunk.unlink()
    if fault != "lost":
        chunk.write_bytes(whole[: len(whole) // 2 if fault == "cut short" else 0])
    reader = StateReader(path)
    reader.read(6)
    with pytest.raises(InputError, match=r"x.zarr: the fields at 2020-01-01T21:00:00 cannot be re"):
        reader.read(7)


def test_another_chunking_is_read_through_zarr(store, fields, states, tmp_path):
    path = tmp_path / "x.zarr"
    shutil.copytree(store, path)
    shutil.rmtree(path / "fields")
    group = zarr.open_group(path)
    names = ("time", "channel", "lat", "lon")
    array = group.create_array(
        "fields", shape=states.shape, dtype="f4", chunks=(7, 1, 10, 5), dimension_names=names
    )
    array[:] = states
    array.attrs.update(zarr.open_array(store, path="fields").attrs.asdict())
    np.testing.assert_array_equal(StateReader(path).load(), states)
