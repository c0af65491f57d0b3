# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import tarfile

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package

QUICK = {"ensemble": 2, "posterior__steps": 4}


def test_all_times_of_the_table(ddo, files, tmp_path):
    out = tmp_path / "x.zarr"
    result = ddo("assimilate", package=files.package, observations=files.table, out=out, **QUICK)
    assert result.status == 0, result.err
    assert "O-B" in result.out and "2019-03-27 18:00" in result.out
    with xr.open_zarr(out, consolidated=False) as analysis:
        assert dict(analysis.sizes) == {"ensemble": 2, "time": 4, "lat": 6, "lon": 8}
        assert analysis.attrs["package"] == str(files.package)
        assert analysis.attrs["steps"] == 4
        assert analysis["observations"].dtype.kind == "i"


def test_stations_above_the_models_surface(ddo, files, tmp_path):
    """A kilometre up, and colder by the lapse rate, they say the same as at the surface."""
    time, lat, lon = pd.date_range("2019-01-01", periods=1), [60.0, 50.0], [-8.0, 4.0]
    surface = xr.Dataset(
        {"z": (("time", "lat", "lon"), np.full((1, 2, 2), 9.80665 * 150))},
        {"time": time, "lat": lat, "lon": lon},
    )
    surface.to_netcdf(tmp_path / "z.nc")
    table = pd.read_parquet(files.table)
    high = table.assign(elev=1150.0, observation=table["observation"] - 5.0)
    high.to_parquet(tmp_path / "high.parquet")
    found = []
    for name, keys in {
        "low": {"observations": files.table},
        "high": {
            "observations": tmp_path / "high.parquet",
            "orography": tmp_path / "z.nc",
            "lapse_rate": 0.005,
        },
    }.items():
        out = tmp_path / f"{name}.zarr"
        result = ddo("assimilate", package=files.package, **keys, out=out, **QUICK)
        assert result.status == 0, result.err
        note = f"t2m without correction for height: {len(table)} rows"
        assert (note in result.out) == (name == "low")
        with xr.open_zarr(out, consolidated=False) as analysis:
            found.append(analysis["t2m"].values)
    np.testing.assert_allclose(*found, atol=2e-3)


@pytest.mark.parametrize(
    ("keys", "hours"),
    [
        ({"time": "2019-03-27T06:00"}, [6]),
        ({"time": "[2019-03-27T06:00,2019-03-27T18:00Z]"}, [6, 18]),
        ({"start": "2019-03-27T05", "end": "2019-03-27T12"}, [6, 12]),
        (
            {"start": "2019-03-27T01", "end": "2019-03-27T05", "step": "4h", "tolerance": "1h"},
            [1, 5],
        ),
    ],
)
def test_choice_of_times(ddo, files, tmp_path, keys, hours):
    out = tmp_path / "x.zarr"
    inputs = {"package": files.package, "observations": files.table}
    levels = {"posterior__guidance_interval": "[0.1,9]"}
    assert ddo("assimilate", **inputs, out=out, **keys, **QUICK, **levels).status == 0
    with xr.open_zarr(out, consolidated=False) as analysis:
        assert analysis["time"].dt.hour.values.tolist() == hours
        assert analysis.attrs["guidance_interval"] == [0.1, 9]


def test_quality_control_and_rejected_reports(ddo, files, tmp_path):
    table = pd.read_parquet(files.table)
    table.loc[3, "observation"] += 40.0
    table.loc[4, "observation"] = np.nan
    lat = table["lat"].iloc[0]
    near = table.iloc[[0]].assign(lat=lat + 1e-3 * np.sign(55.4 - lat), observation_error=2.0)
    pd.concat([table, near]).to_parquet(tmp_path / "table.parquet")
    inputs = {"package": files.package, "observations": tmp_path / "table.parquet", **QUICK}
    out, rejected = tmp_path / "x.zarr", tmp_path / "rejected.csv"
    result = ddo("assimilate", **inputs, out=out, rejected=rejected, thinning__km=5)
    assert result.status == 0, result.err
    assert "left out, gross error: 1 rows" in result.out and str(rejected) in result.out
    found = pd.read_csv(rejected)
    assert sorted(found["reason"]) == ["gross error", "missing value", "thinned"]
    assert found["observation"].max() == table["observation"][3]
    with xr.open_zarr(out, consolidated=False) as analysis:
        assert int(analysis["observations"].sum()) == len(table) - 2
    keys = {"rejected": tmp_path / "r.parquet", "gross_error": "null", "superob__km": 5}
    assert ddo("assimilate", **inputs, out=tmp_path / "y.zarr", **keys).status == 0
    assert pd.read_parquet(tmp_path / "r.parquet")["reason"].tolist() == ["missing value"]


def test_a_background_from_a_file_and_from_an_analysis(ddo, files, tmp_path):
    inputs = {"package": files.package, "observations": files.table, "ensemble": 8}
    inputs |= {"posterior__steps": 8, "inflation": "none"}
    with xr.open_dataset(files.truth) as truth:
        truth = truth["t2m"].load()

    def error(name, **keys):
        result = ddo("assimilate", **inputs, out=tmp_path / name, **keys)
        assert result.status == 0, result.err
        with xr.open_zarr(tmp_path / name, consolidated=False) as analysis:
            return float(((analysis["t2m"].mean("ensemble") - truth) ** 2).mean() ** 0.5)

    alone = error("alone.zarr")
    forecast = {"background_error": 0.1, "background_length": 200.0}
    with_truth = error("truth.zarr", background=files.truth, **forecast)
    assert with_truth < 0.25 * alone
    # The members of a store are backgrounds of members.
    again = error("again.zarr", background=tmp_path / "truth.zarr", **forecast)
    assert again < 0.25 * alone


def test_a_grid_of_its_own_and_times_without_observations(ddo, files, tmp_path):
    inputs = {"package": files.package, "observations": files.table, **QUICK}
    keys = {"grid__region": "[54,57,-5,0]", "grid__spacing": "[0.5,0.5]"}
    keys |= {"time": "[2019-03-27T06:00,2019-03-28T06:00]", "missing": "prior"}
    result = ddo("assimilate", **inputs, out=tmp_path / "x.zarr", **keys)
    assert result.status == 0, result.err
    with xr.open_zarr(tmp_path / "x.zarr", consolidated=False) as analysis:
        np.testing.assert_allclose(analysis["lat"], np.arange(57, 53.9, -0.5))
        np.testing.assert_allclose(analysis["lon"], np.arange(-5, 0.1, 0.5))
        assert analysis["observations"].values[1] == 0
        assert bool(np.isfinite(analysis["t2m"]).all())


def test_mistakes(refused, files, tmp_path):
    inputs = {"package": files.package, "observations": files.table, "out": tmp_path / "x.zarr"}

    def mistake(match, **keys):
        refused(match, "assimilate", **{**inputs, **QUICK, **keys})

    mistake("no package 'nowhere'", package="nowhere")
    mistake("no such file", observations=tmp_path / "none.parquet")
    mistake("time=soon is no time", time="soon")
    mistake("time=", time="[2019-03-27T06:00,")
    mistake("no observations within", time="2020-01-01")
    mistake("no observations from", start="2020-01-01")
    mistake("give either time", time="2019-03-27T06:00", step="6h")
    mistake("a step needs start and end", step="6h")
    mistake("tolerance=x is no duration", tolerance="x")
    mistake("tolerance=-1h must not be negative", tolerance="-1h")
    mistake("ensemble=0", ensemble=0)
    mistake("inflation=lots must be", inflation="lots")
    mistake("inflation=-1 must be", inflation=-1)
    mistake("batch=0 must be a whole number", batch=0)
    mistake("default_error", default_error="{t2m:-1}")
    mistake("gross_error=0", gross_error=0)
    mistake("either thinned or averaged", thinning__km=5, superob__km=5)
    mistake("thinning.km=near must be a number", thinning__km="near")
    mistake("rejected=r.txt: name a .parquet or .csv file", rejected="r.txt")
    mistake("needs background_error", background=files.truth)
    mistake("background_error=-1", background=files.truth, background_error=-1)
    mistake("give background as well", background_error=1)
    mistake("no such file", background=tmp_path / "none.nc", background_error=1)
    mistake("reaches beyond", grid__region="[50,60,-5,0]")
    mistake("is no region", grid__region="[57,54,-5,0]")
    mistake("must be [south,north,west,east]", grid__region="[54,57]")
    mistake("missing=guess must be one of error, prior", missing="guess")
    mistake("posterior.solver=rk4 must be one of euler", posterior__solver="rk4")
    mistake(
        "posterior.covariance=full must be one of jacobian, linear", posterior__covariance="full"
    )
    mistake("posterior.steps=0 must be", posterior__steps=0)
    mistake("posterior.iterations=x must be", posterior__iterations="x")
    mistake("posterior.guidance_interval=[9, 1] must be two", posterior__guidance_interval="[9,1]")
    mistake("posterior.guidance_interval='x' must be two", posterior__guidance_interval="x")
    mistake("device=gpu9", device="gpu9")
    mistake("lapse_rate=6.5 must be a finite number from -0.05 to 0.05", lapse_rate=6.5)
    mistake("lapse_rate=x must be a number", lapse_rate="x")
    mistake("none.nc", orography=tmp_path / "none.nc")
    mistake("unknown key 'posterior.stepz'", posterior__stepz=3)
    existing = tmp_path / "y.zarr"
    existing.mkdir()
    mistake("exists", out=existing)


def test_mistakes_are_refused_before_an_engine_is_made(refused, files, tmp_path, monkeypatch):
    def made(*_):
        raise AssertionError("long work")

    monkeypatch.setattr("ddo_modulus.cli.assimilate.open_engine", made)
    inputs = {"package": files.package, "observations": files.table, "out": tmp_path / "x.zarr"}
    for match, mistake in (
        ("posterior.guidance_interval", {"posterior__guidance_interval": "[9,1]"}),
        ("background_error=-1", {"background_error": -1}),
        ("is no region", {"grid__region": "[57,54,-5,0]"}),
    ):
        refused(match, "assimilate", **inputs, engine="compile", **mistake)


def test_bad_tables(refused, files, tmp_path):
    good = pd.read_parquet(files.table)

    def mistake(match, frame):
        path = tmp_path / "bad.parquet"
        frame.to_parquet(path)
        keys = {"package": files.package, "observations": path, "out": tmp_path / "x.zarr"}
        refused(match, "assimilate", **keys, **QUICK)

    mistake("missing value: ", good.assign(observation=np.nan))
    mistake("They look like degrees Celsius: add 273.15", good.assign(
        observation=good["observation"] - 273.15
    ))  # fmt: skip
    mistake("is in the package's grid", good.assign(lat=10.0))
    mistake("no observations of t2m", good.assign(variable="visibility"))
    mistake("no rows", good.iloc[:0])
    mistake("no column lat", good.drop(columns="lat"))
    mistake("impossible observation_error", good.assign(observation_error=0.0))


def test_bad_packages(refused, files, untrained, tmp_path):
    keys = {"observations": files.table, "out": tmp_path / "x.zarr", **QUICK}

    def mistake(match, change):
        folder = tmp_path / "package"
        shutil.copytree(files.package, folder)
        header = json.loads((folder / "package.json").read_text())
        del header["fingerprint"]  # as if of an earlier version: each part is read
        (folder / "package.json").write_text(json.dumps(header, indent=2))
        change(folder)
        refused(match, "assimilate", package=folder, **keys)
        shutil.rmtree(folder)

    def other_class(folder):
        operator = DiffusionOperator.from_checkpoint(str(folder / "operator.mdlus"))
        operator.network.save(str(folder / "operator.mdlus"))

    def other_grid(folder):
        header = folder / "package.json"
        header.write_text(header.read_text().replace("58.0,", "59.0,\n      58.0,"))

    def also_tar(folder):
        """A file that is both archives; the host would read the tar."""
        good = (folder / "operator.mdlus").read_bytes()
        with tarfile.open(folder / "operator.mdlus", "w") as archive:
            archive.add(folder / "package.json")
        with (folder / "operator.mdlus").open("ab") as file:
            file.write(good)

    def cut(folder):
        data = (folder / "operator.mdlus").read_bytes()
        (folder / "operator.mdlus").write_bytes(data[: len(data) // 2])

    mistake("NeuralOperator, not a DiffusionOperator", other_class)
    mistake("does not fit a grid (7, 8)", other_grid)
    mistake("damaged", cut)
    mistake("damaged", lambda folder: (folder / "package.json").write_text("{"))
    mistake("not laid out", also_tar)
    mistake("no package", lambda folder: (folder / "package.json").unlink())


def test_a_shipped_package_is_found_beside_a_run_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "uk_t2m" / "checkpoints").mkdir(parents=True)
    assert Package.load("uk_t2m").normalization.channels == ("t2m",)
