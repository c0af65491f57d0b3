# SPDX-License-Identifier: Apache-2.0
"""The assimilation model: its contract with Earth2Studio, and what it makes of observations."""

import json
import runpy
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ddo_modulus.diffusion.package import Package
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import BoxGrid
from ddo_modulus.inference.assimilate import assimilate
from ddo_modulus.inference.quality import QualityControl
from ddo_modulus.observations.table import read_table

earth2studio = pytest.importorskip("earth2studio")

from earth2studio.data import fetch_dataframe  # noqa: E402
from earth2studio.io import ZarrBackend  # noqa: E402

from ddo_modulus.earth2 import DDOAssimilation  # noqa: E402
from ddo_modulus.earth2.packaged import CONFIG  # noqa: E402

TIMES = np.array(["2019-03-27T06", "2019-03-27T12"], "datetime64[ns]")
SAMPLING = {"steps": 4, "covariance": "linear"}
QUICK = {"number_of_samples": 3, "seed": 0}


@pytest.fixture(scope="module")
def package(untrained):
    return untrained()


@pytest.fixture(scope="module")
def build(package):
    """Builds a model of few and quick members."""

    def make(posterior=None, **options):
        return DDOAssimilation(
            package, **{**QUICK, **options}, posterior={**SAMPLING, **(posterior or {})}
        )

    return make


def observed(package, counts=(5, 4), times=TIMES, seed=0, variable="t2m"):
    """Observations at grid points, with the request times; longitudes from 0 to 360."""
    random, rows = np.random.default_rng(seed), []
    for time, count in zip(times, counts, strict=True):
        mean = package.normalization.mean[pd.Timestamp(time).hour, 0].numpy()
        for point in random.permutation(mean.size)[:count]:
            i, j = divmod(int(point), mean.shape[1])
            value = mean[i, j] + random.normal()
            place = {"lat": package.grid.lat[i], "lon": package.grid.lon[j] % 360}
            rows.append({"time": time, **place, "observation": value, "variable": variable})
    frame = pd.DataFrame(rows, columns=["time", "lat", "lon", "observation", "variable"])
    frame.attrs = {"request_time": times, "request_lead_time": np.array([np.timedelta64(0, "h")])}
    return frame


def with_rows(frame, *more):
    plain = [part.copy() for part in (frame, *more)]
    for part in plain:  # pandas cannot join frames whose attributes are arrays
        part.attrs = {}
    joined = pd.concat(plain, ignore_index=True)
    joined.attrs = dict(frame.attrs)
    return joined


# ---- coordinates --------------------------------------------------------------------------------


def test_it_is_an_assimilation_model(build):
    """The protocol alone, by its file: its package imports all models, for most of a minute."""
    path = Path(earth2studio.__file__).parent / "models" / "da" / "base.py"
    protocol = runpy.run_path(str(path))["AssimilationModel"]
    assert isinstance(build(), protocol)
    assert not isinstance(torch.nn.Module(), protocol)


def test_coordinates(package, build):
    model = build(fields=["elev", "station"])
    assert model.init_coords() is None
    (schema,) = model.input_coords()
    assert isinstance(schema, OrderedDict)
    names = ["time", "lat", "lon", "observation", "variable", "elev", "station"]
    assert list(schema) == names
    assert schema["time"].dtype == np.dtype("datetime64[ns]") and len(schema["lat"]) == 0
    np.testing.assert_array_equal(schema["variable"], ["t2m"])
    (axes,) = model.output_coords((schema,), request_time=TIMES, request_lead_time=None)
    assert list(axes) == ["time", "variable", "lat", "lon"]
    np.testing.assert_array_equal(axes["time"], TIMES)
    np.testing.assert_array_equal(axes["lat"], package.grid.lat)
    np.testing.assert_array_equal(axes["lon"], package.grid.lon % 360)
    (members,) = build(output="members").output_coords((schema,))
    assert list(members) == ["time", "sample", "variable", "lat", "lon"]
    assert len(members["sample"]) == 3 and len(members["time"]) == 0
    schema, background = build(background={"error": 1.0}).input_coords()
    assert list(background) == ["time", "variable", "lat", "lon"]


def test_coordinates_that_do_not_fit(build):
    model = build()
    (schema,) = model.input_coords()
    with pytest.raises(InputError, match="have no observation"):
        model.output_coords((OrderedDict((k, v) for k, v in schema.items() if k != "observation"),))
    other = OrderedDict(schema, variable=np.array(["t2m", "z500"]))
    with pytest.raises(ValueError, match="observations of z500 say nothing about"):
        model.output_coords((other,))
    with pytest.raises(InputError, match="give the input coordinates"):
        model.output_coords(())


# ---- one call -----------------------------------------------------------------------------------


def test_a_call_is_the_package_s_own_assimilation(package, build):
    frame = observed(package)
    options = {"ensemble": 3, "seed": 0, "posterior": SAMPLING}
    table, quality = read_table(frame), {"duplicates": "average"}
    expected = assimilate(package, table, TIMES, quality=quality, **options).dataset["t2m"]
    members = build(output="members")(frame)
    assert isinstance(members, xr.DataArray)
    assert members.dims == ("time", "sample", "variable", "lat", "lon")
    assert isinstance(members.data, np.ndarray) and members.dtype == np.float32
    np.testing.assert_array_equal(members.sel(variable="t2m").transpose("sample", ...), expected)
    mean, spread = build()(frame), build(output="spread")(frame)
    assert mean.dims == spread.dims == ("time", "variable", "lat", "lon")
    np.testing.assert_allclose(mean, members.mean("sample"), rtol=1e-6)
    np.testing.assert_allclose(spread, members.std("sample", ddof=1), rtol=1e-4)
    np.testing.assert_array_equal(mean["lon"], package.grid.lon % 360)
    assert mean.attrs["observations"] == [5, 4] and mean.attrs["dropped"] == {}


def test_the_frame_of_the_caller_is_left_alone(package, build):
    frame = observed(package)
    before, attributes = frame.copy(deep=True), dict(frame.attrs)
    build()(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert frame.attrs == attributes


def test_request_times_in_any_order_are_a_batch(package, build):
    frame, model = observed(package), build()
    both = model(frame)
    for order in ([1, 0], [0, 0, 1]):
        frame.attrs["request_time"] = TIMES[order]
        found = model(frame)
        np.testing.assert_array_equal(found["time"], TIMES[order])
        np.testing.assert_array_equal(found.values, both.values[order])
        assert found.attrs["observations"] == [[5, 4][i] for i in order]
    frame.attrs["request_time"] = TIMES[1]  # a single one, as it is
    np.testing.assert_allclose(model(frame), both[1:], atol=2e-3)
    frame.attrs["request_time"] = [pd.Timestamp(TIMES[1]).to_pydatetime()]
    np.testing.assert_allclose(model(frame), both[1:], atol=2e-3)


@pytest.mark.parametrize(
    ("tolerance", "used"),
    [
        ("10min", 1),
        (np.timedelta64(2, "h"), 3),
        (timedelta(hours=2), 3),
        ((np.timedelta64(-2, "h"), np.timedelta64(0, "h")), 2),
        (["0min", "3h"], 3),
    ],
)
def test_time_tolerance(package, build, tolerance, used):
    frame = observed(package, (4,), TIMES[:1])
    frame["time"] = TIMES[0] + np.array([-60, 0, 60, 180]) * np.timedelta64(1, "m")
    result = build(quality={"tolerance": tolerance})(frame)
    assert result.attrs["observations"] == [used]
    again = DDOAssimilation(package, **build(quality={"tolerance": tolerance}).options)
    assert again(frame).attrs["observations"] == [used]


def test_seeds(package, build):
    frame = observed(package)
    fixed = build()
    np.testing.assert_array_equal(fixed(frame), fixed(frame))
    assert np.abs(fixed(frame, seed=1) - fixed(frame)).max() > 0.05
    np.testing.assert_array_equal(build(seed=1)(frame), fixed(frame, seed=1))
    free = build(seed=None)
    torch.manual_seed(3)
    first = free(frame)
    assert np.abs(free(frame) - first).max() > 0.05
    torch.manual_seed(3)
    np.testing.assert_array_equal(free(frame), first)
    np.testing.assert_array_equal(fixed(frame, seed=first.attrs["seed"]), first)


def test_how_the_system_is_solved_reaches_the_analysis(package, build, conditionings):
    seen = conditionings()
    options = {"covariance": "jacobian", "iterations": 1, "guidance_interval": [0.1, 9]}
    build(posterior=options)(observed(package))
    assert seen[0] == options | {"guidance_interval": (0.1, 9.0)}


def test_in_inference_mode(package, build):
    frame = observed(package)
    model = build(posterior={"covariance": "jacobian", "guidance_interval": [0.1, 9]})
    expected = model(frame)
    with torch.inference_mode():
        np.testing.assert_allclose(model(frame), expected, atol=1e-4)


# ---- observations that are not as they should be ------------------------------------------------


@pytest.mark.parametrize("column", ["time", "lat", "lon", "observation", "variable"])
def test_missing_columns(package, build, column):
    frame = observed(package).drop(columns=column)
    frame.attrs = observed(package).attrs
    with pytest.raises(ValueError, match=f"no column {column}"):
        build()(frame)


def test_missing_request_time(package, build):
    frame = observed(package)
    for attributes in ({}, {"request_time": "soon"}, {"request_time": np.array([], "M8[ns]")}):
        frame.attrs = attributes
        with pytest.raises(InputError, match="request_time"):
            build()(frame)
    with pytest.raises(InputError, match="request_time"):
        build()(None)


def test_values_that_are_missing_are_dropped_and_listed(package, build):
    good = observed(package)
    bad = good.iloc[:2].copy()
    bad["observation"], bad["lat"] = [np.nan, 281.0], [56.0, np.nan]
    model = build()
    found = model(with_rows(good, bad))
    np.testing.assert_array_equal(found, model(good))
    found = model(with_rows(good, bad))
    assert found.attrs["dropped"] == {"missing value": 2}
    assert model.rejected["reason"].tolist() == ["missing value"] * 2
    model.rejected.drop(columns="reason", inplace=True)  # a copy
    assert "reason" in model.rejected


def test_gross_errors_are_rejected_and_listed(package, build):
    good = observed(package)
    lat = good["lat"].iloc[0]
    wrong = good.iloc[[0]].assign(observation=330.0, lat=lat + 0.2 * np.sign(55.4 - lat))
    model = build()
    found = model(with_rows(good, wrong))
    assert found.attrs["dropped"] == {"gross error": 1}
    assert model.rejected["observation"].tolist() == [330.0]
    np.testing.assert_allclose(found, model(good), atol=2e-3)
    assert model.rejected.empty
    unchecked = build(quality={"gross_error": None})
    assert unchecked(with_rows(good, wrong)).attrs["dropped"] == {}


def test_duplicates_are_averaged(package, build):
    frame = observed(package).assign(observation_error=0.4)
    twice = [frame.assign(observation=frame["observation"] + step) for step in (-1.0, 1.0)]
    both = with_rows(frame.iloc[:0], *twice)
    both.attrs = frame.attrs
    np.testing.assert_allclose(build()(both), build()(frame), atol=2e-3)
    keeping = build(quality={"duplicates": "keep"})
    assert np.abs(keeping(both) - build()(frame)).max() > 0.02


def test_errors_marks_and_other_variables(package, build):
    frame, model = observed(package), build()
    default = model(frame)
    np.testing.assert_array_equal(model(frame.assign(observation_error=1.0)), default)
    exact = build()(with_rows(frame.assign(observation_error=0.05)))
    assert np.abs(exact - default).max() > 0.05
    found = build(quality={"default_error": {"t2m": 0.05}})(frame)
    np.testing.assert_allclose(found, exact, atol=2e-3)
    marked = frame.assign(quality=[1.0, 9.0, np.nan, *([2.0] * 6)])
    found = build(quality={"accept": [0, 3]})(marked)
    assert found.attrs["dropped"] == {"quality": 1} and found.attrs["observations"] == [4, 4]
    assert model(marked).attrs["observations"] == [5, 4]
    wind = frame.iloc[:3].assign(variable="ws10m", observation=5.0)
    assert model(with_rows(frame, wind)).attrs["dropped"] == {"unknown variable": 3}


@pytest.mark.parametrize(
    "nothing", ["none at one time", "outside", "an empty frame", "all missing"]
)
def test_without_observations_it_draws_from_the_prior(package, build, nothing):
    """As Earth2Studio's own models do."""
    full = observed(package, (0, 5) if nothing == "none at one time" else (5, 5))
    frame = {
        "none at one time": full,
        "outside": full.assign(lat=10.0),
        "an empty frame": full.iloc[:0],
        "all missing": full.assign(observation=np.nan),
    }[nothing]
    frame.attrs = full.attrs
    model = build(
        output="members", number_of_samples=40, posterior={"steps": 8, "inflation": "none"}
    )
    result = model(frame)
    assert result.attrs["observations"][0] == 0
    z = result.values[0, :, 0] - package.normalization.mean[6, 0].numpy()
    z = z / package.normalization.std[6, 0].numpy()
    assert z.std() == pytest.approx(1.0, abs=0.15) and abs(z.mean()) < 0.5


def test_wrong_units_are_named(package, build):
    frame = observed(package)
    celsius = frame.assign(observation=frame["observation"] - 273.15)
    celsius.attrs = frame.attrs
    with pytest.raises(ValueError, match="degrees Celsius"):
        build()(celsius)


# ---- generator ----------------------------------------------------------------------------------


def test_generator(package, build):
    model, first, second = build(), observed(package), observed(package, seed=1)
    generator = model.create_generator()
    assert generator.send(None) is None
    np.testing.assert_array_equal(generator.send(first), model(first))
    np.testing.assert_array_equal(generator.send(second), model(second))
    generator.close()
    with pytest.raises(StopIteration):
        next(generator)


# ---- backgrounds --------------------------------------------------------------------------------


def forecast(package, members=None, seed=2):
    """Near the climatology, on our own grid with longitudes from 0 to 360."""
    random = np.random.default_rng(seed)
    means = package.normalization.mean[[6, 12]].numpy()[:, None]
    values = means + random.normal(size=(2, members or 1, 1, 1, 1))
    values = np.broadcast_to(values, (2, members or 1, *means.shape[2:]))
    axes = {"time": TIMES, "sample": np.arange(members or 1), "variable": ["t2m"]}
    axes |= {"lat": package.grid.lat, "lon": package.grid.lon % 360}
    array = xr.DataArray(values.copy(), axes, tuple(axes))
    return array if members else array.isel(sample=0, drop=True)


def test_a_background(package, build):
    frame, background = observed(package), forecast(package)
    model = build(background={"error": 0.2})
    alone, found = model(frame), model(frame, background)
    close, far = (np.abs(a - background.values).mean() for a in (found.values, alone.values))
    assert close < 0.5 * far
    # Errors this small leave nothing else; none at all need no observations either.
    tight = build(background={"error": 0.01})
    np.testing.assert_allclose(tight(None, background), background, atol=0.1)
    lead = background.assign_coords(time=TIMES - np.timedelta64(6, "h"))
    lead = lead.expand_dims(lead_time=[np.timedelta64(6, "h")], axis=1)
    np.testing.assert_allclose(model(frame, lead), found, atol=1e-4)
    generator = model.create_generator()
    next(generator)
    np.testing.assert_array_equal(generator.send((frame, background)), found)


def test_a_background_of_each_member(package, build):
    frame, ensemble = observed(package), forecast(package, 3)
    model = build(output="members", background={"error": 0.2})
    together = model(frame, ensemble)
    for member in range(3):
        alone = model(frame, ensemble.isel(sample=member, drop=True))
        np.testing.assert_allclose(together[:, member], alone[:, member], atol=2e-3)


def test_backgrounds_that_do_not_fit(package, build):
    frame, background = observed(package), forecast(package)
    with pytest.raises(InputError, match="give the model background={'error': ...}"):
        build()(frame, background)
    model = build(background={"error": 1.0})
    for match, wrong in (
        ("needs time, variable", background.isel(variable=0, drop=True)),
        ("no t2m; it has msl", background.assign_coords(variable=["msl"])),
        ("the background has no 2019-03-27", background.isel(time=[0])),
        ("degrees Celsius", background - 273.15),
        ("does not cover", background.isel(lat=slice(0, 3))),
        ("several lead times", background.expand_dims(lead_time=[0, 1])),
    ):
        with pytest.raises(InputError, match=match):
            model(frame, wrong)


# ---- other grids --------------------------------------------------------------------------------


def test_a_grid_inside_the_domain(package, build):
    frame = observed(package)
    whole = build()(frame)
    part = build(lat=package.grid.lat[1:5], lon=package.grid.lon[2:8])(frame)
    np.testing.assert_allclose(part, whole[:, :, 1:5, 2:8], atol=1e-3)
    # Across Greenwich, from 0 to 360, as it is labelled.
    lon = np.array([359.0, 0.0, 1.0])
    across = build(lon=lon)(frame)
    np.testing.assert_array_equal(across["lon"], lon)
    np.testing.assert_allclose(across, whole[:, :, :, 5:], atol=1e-3)
    fine = build(lat=np.arange(57.5, 53, -0.25), lon=np.arange(355, 360, 0.25))(frame)
    assert fine.shape[2:] == (18, 20) and bool(np.isfinite(fine).all())
    with pytest.raises(InputError, match="reaches beyond"):
        build(lat=[60.0, 50.0], lon=[0.0, 1.0])


# ---- packages -----------------------------------------------------------------------------------


def test_it_survives_a_package(package, build, tmp_path):
    frame = observed(package).assign(observation_error=0.3)
    model = build(
        output="spread",
        lat=package.grid.lat[:4],
        quality={
            "tolerance": ("-1h", "10min"),
            "default_error": {"t2m": 0.5},
            "accept": [0, 3],
        },
        background={"error": {"t2m": 1.0}, "length": 300.0},
        posterior={"guidance_interval": (0.1, np.inf)},
        engine={"name": "torch", "folder": tmp_path},
        fields=["elev"],
    )
    model.save(tmp_path / "model")
    again = DDOAssimilation.from_pretrained(tmp_path / "model")
    assert again.options == model.options
    np.testing.assert_array_equal(again(frame), model(frame))
    json.loads((tmp_path / "model" / CONFIG).read_text(), parse_constant=pytest.fail)
    other = DDOAssimilation.from_pretrained(
        tmp_path / "model", output="mean", posterior={"steps": 5}, quality=QualityControl()
    )
    assert other.output == "mean"
    assert other.options["posterior"] == model.options["posterior"] | {"steps": 5}
    assert other.options["quality"] == QualityControl().to_json()


def test_a_package_keeps_its_orography(untrained, tmp_path):
    """Stations far above the surface of the model say something else than those at it."""
    package = untrained()
    package.orography = np.full(package.grid.shape, 150.0, np.float32)
    frame = observed(package).assign(elev=1150.0, observation_error=0.3)
    model = DDOAssimilation(package, **QUICK, posterior=SAMPLING, quality={"gross_error": None})
    model.save(tmp_path / "model")
    again = DDOAssimilation.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(again(frame), model(frame))
    package.orography = None
    assert np.abs(again(frame) - model(frame)).max() > 1.0


def test_the_shipped_package():
    model = DDOAssimilation.load_model(DDOAssimilation.load_default_package())
    np.testing.assert_array_equal(model.input_coords()[0]["variable"], ["t2m"])
    assert model.output_coords(model.input_coords())[0]["lat"].shape == (33,)


def test_options_that_cannot_be(package, build):
    for match, options in (
        ("'mean', 'spread' or 'members'", {"output": "median"}),
        ("number_of_samples=0", {"number_of_samples": 0}),
        (
            "number_of_samples=1 must be a whole number from 2",
            {"output": "spread", "number_of_samples": 1},
        ),
        ("steps=2.5", {"posterior": {"steps": 2.5}}),
        ("seed=-1", {"seed": -1}),
        ("solver=rk4 must be one of euler", {"posterior": {"solver": "rk4"}}),
        ("posterior has no option stepz; choose from steps", {"posterior": {"stepz": 2}}),
        ("gross_error=0", {"quality": {"gross_error": 0}}),
        ("tolerance='soon'", {"quality": {"tolerance": "soon"}}),
        ("first offset is after the last", {"quality": {"tolerance": ["1h", "0h"]}}),
        ("must be a duration, or the first and last", {"quality": {"tolerance": ["1h"]}}),
        ("must be two marks", {"quality": {"accept": [3, 0]}}),
        ("must be options by name: gross_error", {"quality": [0, 3]}),
        ("must be two noise levels", {"posterior": {"guidance_interval": [9, 1]}}),
        ("must be two noise levels", {"posterior": {"guidance_interval": 3.0}}),
        ("no use is made of the columns colour", {"fields": ["colour"]}),
        ("observations of z500 say nothing", {"variables": ["z500"]}),
        ("must be positive", {"background": {"error": -1.0}}),
        ("needs background_error", {"background": {"length": 300.0}}),
        ("background_error has no t2m", {"background": {"error": {"z500": 1.0}}}),
        (
            "leave background.forecast out",
            {"background": {"error": 1.0, "forecast": xr.Dataset()}},
        ),
    ):
        with pytest.raises(InputError, match=match):
            build(**options)


def test_packages_that_cannot_be(untrained):
    with pytest.raises(InputError, match="lives on a box"):
        DDOAssimilation(untrained(grid=BoxGrid((6, 8))))
    with pytest.raises(InputError, match="takes a ddo_modulus Package"):
        DDOAssimilation("uk_t2m")
    assert isinstance(untrained(), Package)


# ---- hosts' arrays ------------------------------------------------------------------------------


class Elsewhere:
    """A frame as cuDF has it: it converts itself, and is no pandas frame."""

    def __init__(self, frame):
        self.frame, self.attrs = frame, frame.attrs

    def to_pandas(self):
        plain = self.frame.copy()
        plain.attrs = {}
        return plain


class OnDevice(np.ndarray):
    """An array as cuPy has it: it comes to the host when asked."""

    def get(self):
        return np.asarray(self)


def test_frames_and_arrays_of_another_device(package, build):
    frame, background = observed(package), forecast(package)
    model = build(background={"error": 0.5})
    there = background.copy(data=background.values.view(OnDevice))
    expected = model(frame, background)
    np.testing.assert_array_equal(model(Elsewhere(frame), there), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(package, build):
    frame = observed(package)
    expected = build()(frame)
    model = build().to("cuda")
    try:
        found = model(frame)
        values = found.data.get() if hasattr(found.data, "get") else found.values
        np.testing.assert_allclose(values, expected.values, atol=2e-2)
    finally:
        model.to("cpu")


# ---- the workflow -------------------------------------------------------------------------------


class Local:
    """A source of a frame that is there already."""

    def __init__(self, frame):
        self.frame = frame

    def __call__(self, time, variable, fields=None):
        chosen = self.frame[self.frame["variable"].isin(list(variable))]
        return chosen[list(fields)].copy()


def test_from_a_source_to_a_store(package, tmp_path):
    source, store = Local(observed(package)), str(tmp_path / "analysis.zarr")
    model = DDOAssimilation(package, number_of_samples=4, posterior={"steps": 4}, seed=0)

    schema = model.input_coords()[0]
    obs = fetch_dataframe(source, TIMES, schema["variable"], fields=np.array(list(schema)))
    analysis = model(obs)
    io = ZarrBackend(store)
    coords = OrderedDict((name, analysis[name].values) for name in analysis.dims)
    names = list(coords.pop("variable"))
    io.add_array(coords, names)
    fields = [torch.from_numpy(analysis.sel(variable=name).values) for name in names]
    io.write(fields, coords, names)

    with xr.open_zarr(store, consolidated=False) as found:
        np.testing.assert_array_equal(found["t2m"], analysis.sel(variable="t2m"))
        np.testing.assert_array_equal(found["time"], TIMES)


def test_another_engine(package, build, tmp_path, monkeypatch):
    """The same analysis, in whatever computes the denoiser; opened once."""
    monkeypatch.setenv("DDO_ENGINES", str(tmp_path))
    frame = observed(package)
    model = build(engine="onnxruntime")
    analysis = model(frame)
    torch.testing.assert_close(
        torch.from_numpy(analysis.values),
        torch.from_numpy(build()(frame).values),
        rtol=0,
        atol=1e-3,
    )
    assert list(tmp_path.rglob("engine.json"))
    assert model._engine(package.grid.shape) is model._engine(package.grid.shape)
    assert model.options["engine"] == "onnxruntime"
    assert build(engine={"name": "onnxruntime"}).options["engine"] == "onnxruntime"
    with pytest.raises(InputError, match="unknown engine 'magic'; choose one of torch"):
        build(engine="magic")
    with pytest.raises(InputError, match="precision=fp8 must be one of"):
        build(engine={"name": "onnxruntime", "precision": "fp8"})
    with pytest.raises(InputError, match="engine has no option speed; choose from name"):
        build(engine={"name": "onnxruntime", "speed": 2})
