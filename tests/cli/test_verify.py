# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ddo_modulus.cli.verify.analyses import away, matching_truth
from ddo_modulus.data.source import open_dataset
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.grid import BoxGrid, LatLonGrid
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.verification import basis_of


@pytest.fixture(scope="module")
def analysis(files, tmp_path_factory):
    from ddo_modulus.cli.main import main

    out = tmp_path_factory.mktemp("analysis") / "x.zarr"
    keys = {"package": files.package, "observations": files.table, "ensemble": 12, "out": out}
    assert main(["assimilate", *(f"{k}={v}" for k, v in keys.items())]) == 0
    return out


def test_report(ddo, files, analysis, tmp_path):
    out = tmp_path / "report"
    result = ddo("verify", analysis=analysis, truth=files.truth, observations=files.table, out=out)
    assert result.status == 0, result.err
    assert "away from stations" in result.out
    report = json.loads((out / "scores.json").read_text())
    overall, apart = report["t2m, all points"], report["t2m, away from stations"]
    error = open_dataset(analysis)["t2m"].mean("ensemble") - open_dataset(files.truth)["t2m"]
    weight = np.cos(np.deg2rad(error["lat"]))
    rmse = float(np.sqrt((error**2).weighted(weight).mean()))
    assert overall["rmse"] == pytest.approx(rmse, rel=1e-4)
    assert overall["units"] == "K"
    assert overall["points"] == 4 * 48
    assert apart["points"] < overall["points"] - 12
    assert apart["rmse"] > rmse
    assert 0.4 < overall["ratio"] < 2.5  # the truth is a draw of the prior
    assert sum(overall["rank_histogram"]["counts"]) == 4 * 48
    assert overall["rank_histogram"]["thinned_points"] == 4
    assert "t2m, all points" in (out / "scores.md").read_text()
    figures = {path.name for path in out.glob("*.png")}
    assert figures == {"t2m_analysis.png", "t2m_ranks.png", "t2m_spectra.png"}


def test_truth_on_a_larger_region_the_other_way_round(files, analysis, tmp_path):
    with xr.open_dataset(files.truth) as truth:
        wide = truth.pad(lat=2, lon=3, constant_values=280.0)
        wide = wide.assign_coords(lat=np.arange(60.0, 50, -1), lon=np.arange(-9.0, 5) % 360)
        wide.sortby("lat").to_netcdf(tmp_path / "wide.nc")
        found = matching_truth(str(tmp_path / "wide.nc"), open_dataset(analysis), None)
        np.testing.assert_array_equal(found["t2m"], truth["t2m"])


def test_mistakes(refused, files, analysis, tmp_path):
    def mistake(match, **keys):
        inputs = {"analysis": analysis, "truth": files.truth, "out": tmp_path / "report"}
        refused(match, "verify", **{**inputs, **keys})

    with xr.open_dataset(files.truth) as truth:
        truth.load()

    def changed(dataset):
        path = tmp_path / "changed.nc"
        dataset.to_netcdf(path)
        return path

    mistake("has one member", analysis=changed(open_dataset(analysis).isel(ensemble=[0])))
    lacking = changed(truth.isel(time=[0, 1, 3]))
    mistake("lacks 1 of 4 analysis times: 2019-03-27 12:00:00", truth=lacking)
    mistake("lat has", truth=changed(truth.assign_coords(lat=truth["lat"] + 0.5)))
    mistake("lon has", truth=changed(truth.isel(lon=slice(0, 7))))
    mistake("none of the analysed variables", truth=changed(truth.rename(t2m="msl")))
    members = truth.expand_dims(ensemble=2)
    mistake("2 of ensemble", truth=changed(members))
    mistake("missing or infinite", truth=changed(truth.where(truth["lat"] > 54)))
    mistake("no such file", observations=tmp_path / "none.csv")


def test_basis_follows_the_grid():
    assert isinstance(basis_of(BoxGrid((8, 8))), FourierBasis)
    assert isinstance(basis_of(BoxGrid((8, 8), periodic=False)), CosineBasis)
    assert isinstance(basis_of(LatLonGrid(np.arange(58.0, 52, -1), np.arange(8.0))), CosineBasis)
    globe = LatLonGrid(np.linspace(90, -90, 9), np.arange(0, 360, 22.5))
    assert isinstance(basis_of(globe), SphericalBasis)


def test_points_away_from_stations():
    grid = BoxGrid((4, 4))
    stations = [
        pd.DataFrame({"lat": [0.5], "lon": [0.25]}),
        pd.DataFrame({"lat": [0.6], "lon": [0.9]}),
    ]
    mask = away(stations, grid)
    assert mask.shape == (2, 4, 4)
    assert not mask[0, 2, 1] and mask[0, 0].all()
    assert mask[1].sum() == 12
    assert not mask[1][torch.tensor([2, 2, 3, 3]), torch.tensor([3, 0, 3, 0])].any()
