# SPDX-License-Identifier: Apache-2.0
import numpy as np
import xarray as xr

from ddo_modulus.data.source import open_dataset


def test_canonical_store(ddo, files, tmp_path):
    out = tmp_path / "x.zarr"
    result = ddo("prepare", source=files.truth, out=out, variables="t2m", start="2019-03-27T03")
    assert result.status == 0, result.err
    stored, source = open_dataset(out), open_dataset(files.truth)
    assert stored.sizes["time"] == 3
    np.testing.assert_array_equal(stored["t2m"], source["t2m"].isel(time=slice(1, None)))


def test_overwrite(ddo, files, tmp_path):
    out = tmp_path / "x.zarr"
    for end, times in (("2019-03-27T06", 2), ("2019-03-27", 4)):
        assert ddo("prepare", source=files.truth, out=out, end=end, overwrite="true").status == 0
        assert open_dataset(out).sizes["time"] == times


def test_mistakes(refused, files, tmp_path):
    out = tmp_path / "x.zarr"

    def mistake(match, **keys):
        refused(match, "prepare", **{"source": files.truth, "out": out, **keys})

    mistake("no field q", variables="[t2m,q]")
    mistake("start=soon", start="soon")
    mistake("no times in", start="2020-01-01")
    mistake("no such file", source=tmp_path / "none.nc")
    with xr.open_dataset(files.truth) as truth:
        truth.load()
    gap = tmp_path / "gap.nc"
    truth.where(truth["time"].dt.hour != 6).to_netcdf(gap)
    mistake("missing or infinite values", source=gap)
    store = tmp_path / "lost.zarr"
    truth.to_zarr(store, consolidated=False)
    (store / "zarr.json").unlink()
    mistake("not a zarr store", source=store)
