# SPDX-License-Identifier: Apache-2.0
"""A package, its truth and observations of it on disk, and the command line to run on them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ddo_modulus.cli.main import main

TIMES = pd.date_range("2019-03-27", periods=4, freq="6h")


@pytest.fixture(scope="session")
def files(untrained, prior, tmp_path_factory):
    """Paths: ``package``, ``truth`` (draws of the prior) and ``table``; read only."""
    folder = tmp_path_factory.mktemp("files")
    package = untrained()
    package.save(folder / "package")
    generator = torch.Generator().manual_seed(1)
    draws = prior(package.operator.noise).sample(len(TIMES), generator=generator)
    fields = package.normalization.denormalize(draws, package.hours(TIMES.values))[:, 0]
    axes = {"time": TIMES, "lat": package.grid.lat, "lon": package.grid.lon}
    truth = xr.Dataset({"t2m": (tuple(axes), fields.numpy())}, coords=axes)
    truth.to_netcdf(folder / "truth.nc")
    random = np.random.default_rng(0)
    rows = []
    for time in TIMES:
        for i, j in zip(random.integers(0, 6, 5), random.integers(0, 8, 5), strict=True):
            value = truth["t2m"].sel(time=time)[i, j]
            place = {"lat": float(value["lat"]), "lon": float(value["lon"])}
            observed = float(value) + 0.3 * random.standard_normal()
            rows.append({"time": time, **place, "observation": observed, "variable": "t2m"})
    table = pd.DataFrame(rows).drop_duplicates(["time", "lat", "lon"])
    table.assign(observation_error=0.3).to_parquet(folder / "table.parquet")
    paths = {name: folder / name for name in ("package", "truth.nc", "table.parquet")}
    return SimpleNamespace(**{name.split(".")[0]: path for name, path in paths.items()})


@pytest.fixture
def ddo(capsys):
    """Run a command; the result has ``status``, ``out`` and ``err``."""

    def run(command, **keys):
        arguments = [f"{key.replace('__', '.')}={value}" for key, value in keys.items()]
        status = main([command, *arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def refused(ddo):
    """Run a command that must fail: status 2, one line of explanation, nothing written."""

    def run(match, command, out, **keys):
        before = sorted(out.parent.iterdir())
        result = ddo(command, out=out, **keys)
        lines = [line for line in result.err.splitlines() if not line.endswith(" %")]
        assert result.status == 2
        assert len(lines) == 1 and lines[0].startswith("ddo: "), result.err
        assert match in lines[0]
        assert result.out == ""
        assert sorted(out.parent.iterdir()) == before

    return run
