# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch

from ddo_modulus.data.simulators import KolmogorovFlow
from ddo_modulus.data.source import open_dataset

SMALL = {"resolution": 16, "output_resolution": 8, "spin_up": 0.4, "reynolds": 50.0, "dt": 0.02}
KEYS = {f"simulator__{key}": value for key, value in SMALL.items()}
KEYS["simulator__forcing_wavenumber"] = 2


def test_store_reads_back_the_same_way_up(ddo, tmp_path):
    out = tmp_path / "a[1].zarr"
    result = ddo("simulate", out=out, trajectories=3, frames=2, seed=5, batch=2, **KEYS)
    assert result.status == 0, result.err
    flow = KolmogorovFlow(forcing_wavenumber=2, **SMALL)
    generator = torch.Generator().manual_seed(5)
    frames = torch.cat(list(flow.simulate(3, 2, generator=generator, batch=2)))
    stored = open_dataset(out)
    np.testing.assert_array_equal(stored["vorticity"], frames)
    np.testing.assert_array_equal(stored["lat"], np.arange(8) / 8)
    np.testing.assert_array_equal(stored["lon"], np.arange(8) / 8)
    assert stored["lat"].attrs["units"] == "1"
    assert stored.attrs["seed"] == 5


def test_prepare_keeps_the_orientation(ddo, tmp_path):
    assert ddo("simulate", out=tmp_path / "a", trajectories=1, frames=3, **KEYS).status == 0
    result = ddo("prepare", source=tmp_path / "a", out=tmp_path / "b", end="2000-01-01T00:00:00.3")
    assert result.status == 0, result.err
    first, second = (open_dataset(tmp_path / name) for name in "ab")
    np.testing.assert_array_equal(second["vorticity"], first["vorticity"].isel(time=slice(0, 2)))
    np.testing.assert_array_equal(second["lat"], first["lat"])


def test_mistakes(refused, tmp_path):
    good = {"out": tmp_path / "x", "trajectories": 1, "frames": 1, **KEYS}

    def mistake(match, **keys):
        refused(match, "simulate", **{**good, **keys})

    mistake("trajectories=0", trajectories=0)
    mistake("frames=1.5", frames=1.5)
    mistake("seed=-1", seed=-1)
    mistake("reynolds=-1", simulator__reynolds=-1)
    mistake("numbers are needed", simulator__reynolds="high")
    mistake("overwrite=2", overwrite=2)
    mistake("choose one of kolmogorov", simulator="weather")
    existing = tmp_path / "there"
    existing.mkdir()
    mistake("exists", out=existing)
