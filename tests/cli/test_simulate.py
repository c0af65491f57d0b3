# SPDX-License-Identifier: Apache-2.0
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import xarray as xr

from ddo_modulus.cli.main import compose
from ddo_modulus.cli.simulate import _simulator
from ddo_modulus.data.source import open_dataset
from ddo_modulus.simulators import KolmogorovFlow, NavierStokes, ShallowWater

SMALL = {"resolution": 16, "output_resolution": 8, "spin_up": 0.4, "reynolds": 50.0, "dt": 0.02}
KEYS = {f"simulator__{key}": value for key, value in SMALL.items()}
NEEDED = ["trajectories=1", "frames=1", "out=x"]
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


RE40 = {"simulator__resolution": 16, "simulator__output_resolution": 16, "simulator__spin_up": 0}
EVERY = {
    "kolmogorov": KEYS,
    "kolmogorov_re40": {**RE40, "simulator__dt": 0.02, "simulator__interval": 0.1},
    "navier_stokes": {"simulator__resolution": 16, "simulator__output_resolution": 8},
    "shallow_water": {
        "simulator__truncation": 10,
        "simulator__shape": [16, 32],
        "simulator__peak": 3.0,
        "simulator__interval": 3600.0,
        "simulator__spin_up": 0,
    },
}


@pytest.mark.parametrize("name", EVERY)
def test_every_simulator_appends_batch_by_batch(ddo, tmp_path, name):
    """Stores of the first trajectories, in batches of another size, hold the same ones."""
    if name == "shallow_water":
        pytest.importorskip(
            "torch_harmonics",
            reason="torch-harmonics is not installed, or built for another torch",
            exc_type=ImportError,
        )
    keys = {"simulator": name, "frames": 3, **EVERY[name]}
    assert ddo("simulate", out=tmp_path / "a", trajectories=5, batch=2, **keys).status == 0
    assert ddo("simulate", out=tmp_path / "b", trajectories=3, batch=3, **keys).status == 0
    more, fewer = (xr.open_zarr(tmp_path / n, consolidated=False).load() for n in "ab")
    assert more["trajectory"].values.tolist() == [0, 1, 2, 3, 4]
    assert more.attrs == fewer.attrs
    for variable, field in more.data_vars.items():
        assert field.shape[:2] == (5, 3) and field.encoding["chunks"][:2] == (1, 1)
        start = fewer[variable]
        scale = float(start.std())
        np.testing.assert_allclose(field[:3], start, rtol=0, atol=1e-3 * scale)
        assert abs(field[4] - field[3]).mean() > 0.1 * scale
    assert set(open_dataset(tmp_path / "a").data_vars) == set(more.data_vars)


def test_the_configuration_is_complete():
    """Every parameter has its key, and the presets are what their names say."""
    made = {}
    for name in EVERY:
        made[name] = _simulator(compose("simulate", [f"simulator={name}", *NEEDED]).simulator)
        keys = compose("simulate", [f"simulator={name}", *NEEDED]).simulator
        assert set(keys) == {"equation", *asdict(made[name])}
    assert made["kolmogorov"] == KolmogorovFlow()
    assert made["navier_stokes"] == NavierStokes()
    assert made["shallow_water"] == ShallowWater()
    assert (made["kolmogorov_re40"].reynolds, made["kolmogorov_re40"].drag) == (40.0, 0.0)


def test_an_interruption_leaves_nothing(ddo, tmp_path, monkeypatch):
    """Not even what the finished batches have written."""
    whole = KolmogorovFlow.to_dataset

    def interrupted(self, frames, *, first, seed):
        if first:
            assert len(list(tmp_path.iterdir())) == 1  # the first batch is on disk
            raise KeyboardInterrupt
        return whole(self, frames, first=first, seed=seed)

    monkeypatch.setattr(KolmogorovFlow, "to_dataset", interrupted)
    result = ddo("simulate", out=tmp_path / "x", trajectories=2, frames=1, batch=1, **KEYS)
    assert result.status == 130
    assert list(tmp_path.iterdir()) == []


def test_mistakes(refused, tmp_path):
    good = {"out": tmp_path / "x", "trajectories": 1, "frames": 1, **KEYS}

    def mistake(match, **keys):
        refused(match, "simulate", **{**good, **keys})

    mistake("trajectories=0", trajectories=0)
    mistake("frames=1.5", frames=1.5)
    mistake("seed=-1", seed=-1)
    mistake("reynolds=-1", simulator__reynolds=-1)
    mistake("numbers are needed", simulator__reynolds="high")
    mistake("resolution=16.5", simulator__resolution=16.5)
    mistake("choose one of kolmogorov", simulator__equation="euler")
    mistake("navier_stokes has no drag, forcing_wavenumber", simulator__equation="navier_stokes")
    mistake("overwrite=2", overwrite=2)
    mistake("choose one of kolmogorov", simulator="weather")
    existing = tmp_path / "there"
    existing.mkdir()
    mistake("exists", out=existing)


def test_without_its_solver_shallow_water_says_what_to_install(refused, tmp_path, monkeypatch):
    """A missing package, or one whose extension was built for another torch."""
    monkeypatch.delitem(sys.modules, "ddo_modulus.simulators.sphere", raising=False)
    monkeypatch.setitem(sys.modules, "torch_harmonics", None)
    keys = {"simulator": "shallow_water", "trajectories": 1, "frames": 1, **EVERY["shallow_water"]}
    refused("pip install 'ddo-modulus[sphere]'", "simulate", tmp_path / "x.zarr", **keys)
