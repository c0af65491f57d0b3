# SPDX-License-Identifier: Apache-2.0
"""A week of three variables, in memory and as a training store."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from ddo_modulus.data.training_store import write_training_store


@pytest.fixture(scope="session")
def fields():
    """Canonical float32 dataset: t2m with a tiny variance about a large mean, z500, u10m."""
    time = pd.date_range("2020-01-01", periods=60, freq="3h")
    axes = {"time": time, "lat": np.arange(56.0, 46.0, -1), "lon": np.arange(-5.0, 7.0)}
    random = np.random.default_rng(0)
    noise = random.standard_normal((3, 60, 10, 12)).astype(np.float32)
    cycle = np.sin(2 * np.pi * time.hour.values / 24)[:, None, None]
    values = {
        "t2m": 280 + 0.05 * cycle + 0.01 * noise[0],
        "z500": 55e3 + 400 * noise[1] + 100 * cycle,
        "u10m": 8 * noise[2],
    }
    units = {"t2m": "K", "z500": "m2/s2", "u10m": "m/s"}
    attributes = {k: {"units": unit} for k, unit in units.items()}
    attributes["z500"]["cell_methods"] = "area: mean"
    return xr.Dataset(
        {k: (tuple(axes), v.astype(np.float32), attributes[k]) for k, v in values.items()},
        axes,
        {"title": "made"},
    )


@pytest.fixture(scope="session")
def store(fields, tmp_path_factory):
    """The same as a training store; read only."""
    return write_training_store(fields, tmp_path_factory.mktemp("store") / "x.zarr", "here")
