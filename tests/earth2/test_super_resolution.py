# SPDX-License-Identifier: Apache-2.0
"""Super-resolution as a diagnostic model: its contract with Earth2Studio, and its draws."""

import itertools
import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
import xarray as xr
from packages import conditional

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.task import Task
from ddo_modulus.earth2.host import needs_earth2studio
from ddo_modulus.errors import InputError

pytest.importorskip("earth2studio")

from earth2studio.utils import handshake_dim  # noqa: E402

from ddo_modulus.earth2 import DDOSuperResolution, GaussianFieldPerturbation  # noqa: E402
from ddo_modulus.earth2.packaged import CONFIG  # noqa: E402

TIMES = np.array(["2019-03-27T06", "2019-03-27T12"], "datetime64[ns]")
LEAD = np.array([0, 6], "timedelta64[h]")
DIMS = ("batch", "time", "lead_time", "variable", "lat", "lon")


def coords_for(model, batch=1, times=1, leads=1, **leading):
    own = model.input_coords()
    leading = leading or {"batch": np.arange(batch)}
    return OrderedDict(
        **leading,
        time=TIMES[:times],
        lead_time=own["lead_time"] if len(own["lead_time"]) else LEAD[:leads],
        variable=own["variable"],
        lat=own["lat"],
        lon=own["lon"],
    )


def field_for(coords, seed=0, mean=281.0):
    generator = torch.Generator().manual_seed(seed)
    shape = [len(axis) for axis in coords.values()]
    return mean + 1.5 * torch.randn(shape, generator=generator)


# The mean of a state is the coarse view of its own frame.
OWN_FRAME = (0.0, 1.0, 0.0)


@pytest.fixture
def model(untrained):
    """A prior of optimal interpolation on 6 x 8 points, and cells of 2 x 2 of them."""
    return DDOSuperResolution(untrained(), coarse_factor=2, seed=0, posterior={"steps": 12})


# ---- coordinates ------------------------------------------------------------------------------


def test_coordinates_of_the_shipped_prior():
    model = DDOSuperResolution.from_pretrained(
        coarse_lat=np.arange(57.5, 50, -1),
        coarse_lon=[
            *np.arange(351.5, 360),
            0.5,
            1.5,
        ],
    )
    coords = model.input_coords()
    assert tuple(coords) == DIMS
    assert all(len(coords[name]) == 0 for name in ("batch", "time", "lead_time"))
    assert list(coords["variable"]) == ["t2m"]
    np.testing.assert_array_equal(coords["lat"], np.arange(57.5, 50, -1))
    np.testing.assert_array_equal(coords["lon"], [*np.arange(351.5, 360), 0.5, 1.5])
    out = model.output_coords(coords)
    assert tuple(out) == DIMS
    np.testing.assert_array_equal(out["lat"], np.arange(58, 49.9, -0.25))
    np.testing.assert_array_equal(out["lon"], np.mod(np.arange(-10, 2.1, 0.25), 360))
    coords["lat"][:] = 0  # a caller's copy
    assert model.input_coords()["lat"][0] == 57.5


def test_cells_cover_the_domain_by_default():
    model = DDOSuperResolution.from_pretrained()
    coords = model.input_coords()
    assert (len(coords["lat"]), len(coords["lon"])) == (8, 12)
    assert coords["lat"].mean() == pytest.approx(54) and coords["lon"].max() < 360


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("samples", [1, 2])
def test_call(untrained, batch, samples):
    model = DDOSuperResolution(
        untrained(), coarse_factor=2, number_of_samples=samples, posterior={"steps": 2}, seed=0
    )
    coords = coords_for(model, batch, times=2, leads=2)
    out, out_coords = model(field_for(coords), coords)
    names = list(DIMS) if samples == 1 else [DIMS[0], "sample", *DIMS[1:]]
    assert list(out_coords) == names
    for index, name in enumerate(names):
        handshake_dim(out_coords, name, index)
    expected = [batch, samples, 2, 2, 1, 6, 8] if samples > 1 else [batch, 2, 2, 1, 6, 8]
    assert list(out.shape) == expected == [len(axis) for axis in out_coords.values()]
    assert out.dtype == torch.float32 and out.isfinite().all()
    predicted = model.output_coords(coords)
    assert list(predicted) == names
    for name, axis in predicted.items():
        np.testing.assert_array_equal(axis, out_coords[name])


def test_leading_dimensions_are_batch_and_none_is_needed(model):
    coords = coords_for(model, a=np.arange(2), b=np.arange(3))
    x = field_for(coords)
    out, out_coords = model(x, coords)
    assert list(out_coords) == ["a", "b", *DIMS[1:]] and out.shape[:2] == (2, 3)
    flat = coords_for(model, batch=6)
    torch.testing.assert_close(model(x.flatten(0, 1), flat)[0], out.flatten(0, 1))
    single = OrderedDict(list(flat.items())[1:])
    alone, alone_coords = model(x[0, 0], single)
    assert list(alone_coords) == list(DIMS[1:])
    torch.testing.assert_close(alone, out[0, 0], rtol=0, atol=1e-3)


def test_exceptions(model):
    good = coords_for(model)
    x = field_for(good)

    def changed(**axes):
        return OrderedDict((name, axes.get(name, axis)) for name, axis in good.items())

    renamed = OrderedDict(("wrong" if n == "variable" else n, a) for n, a in good.items())
    with pytest.raises((KeyError, ValueError)):
        model(x, renamed)
    swapped = OrderedDict((n, good[n]) for n in (*DIMS[:4], "lon", "lat"))
    with pytest.raises(ValueError):
        model(x.mT, swapped)
    for axes in (
        {"variable": np.array(["msl"])},
        {"lat": good["lat"] + 0.5},
        {"lat": np.linspace(90, -90, 7)},
        {"lon": good["lon"][::-1]},
    ):
        with pytest.raises(ValueError, match="not the same"):
            model(x, changed(**axes))
    with pytest.raises(InputError, match=r"have shape .* their coordinates"):
        model(x, changed(time=TIMES))
    with pytest.raises(InputError, match="degrees Celsius"):
        model(x - 273.15, good)
    with pytest.raises(InputError, match="t2m has 1 missing"):
        model(
            x.index_fill(-1, torch.tensor(0), torch.nan)[..., :1]
            .expand_as(x)
            .where(torch.arange(x.numel()).view_as(x) == 0, x),
            good,
        )


# ---- draws ------------------------------------------------------------------------------------


def test_seeds(untrained, model):
    coords = coords_for(model, batch=2, times=2)
    x = field_for(coords, seed=1)[:1, :1].expand(2, 2, -1, -1, -1, -1)
    out = model(x, coords)[0]
    assert torch.equal(model(x, coords)[0], out)
    # Places in the batch, and times, differ by their noise.
    assert (out[0] - out[1]).abs().mean() > 0.05
    other = DDOSuperResolution(untrained(), coarse_factor=2, seed=1, posterior={"steps": 12})
    assert (other(x, coords)[0] - out).abs().mean() > 0.05
    free = DDOSuperResolution(untrained(), coarse_factor=2, posterior={"steps": 12})
    torch.manual_seed(5)
    first, second = free(x, coords)[0], free(x, coords)[0]
    assert (first - second).abs().mean() > 0.05
    torch.manual_seed(5)
    assert torch.equal(free(x, coords)[0], first)


def test_samples_have_the_law_of_optimal_interpolation(untrained, prior, dense):
    package = untrained()
    model = DDOSuperResolution(
        package,
        2,
        number_of_samples=600,
        seed=0,
        coarse_error=0.05,
        posterior={"inflation": "none", "batch": 600},
    )
    coords = coords_for(model)
    x = field_for(coords, mean=283.0)
    out = model(x, coords)[0][0, :, 0, 0].double()  # E C H W
    # Optimal interpolation by dense matrices, in kelvin.
    m, s = (
        v[6].double().flatten() for v in (package.normalization.mean, package.normalization.std)
    )
    shape = (1, *package.grid.shape)
    b = s[:, None] * dense(prior(package.operator.noise).cov, shape) * s
    h = dense(lambda x: model.coarsen(x[:, 0]), shape)
    gain = b @ h.mT @ torch.linalg.inv(h @ b @ h.mT + (0.05 * s.mean()) ** 2 * torch.eye(len(h)))
    analysis, a = m + gain @ (x.double().flatten() - h @ m), b - gain @ h @ b
    error = out.mean(0).flatten() - analysis
    assert error.square().mean() < 3 * a.trace() / len(m) / 600 + (0.02 * s.mean()) ** 2
    deviation = out.flatten(1) - out.mean(0).flatten()
    sample = deviation.mT @ deviation / 599
    assert sample.trace() == pytest.approx(float(a.trace()), rel=0.05)
    assert (sample - a).norm() < 0.25 * a.norm()


def test_the_shipped_prior_makes_a_quarter_degree_of_whole_ones(shared_data):
    """Real temperatures of a day that the prior was not trained on, seen as means over degrees."""
    data = xr.open_dataset(
        shared_data / "era5-2mt-2019-03-uk.grib", engine="cfgrib", backend_kwargs={"indexpath": ""}
    )["t2m"]
    truth = torch.from_numpy(data.sel(time=TIMES[1]).values)
    model = DDOSuperResolution.from_pretrained(
        coarse_lat=np.arange(57.5, 50, -1),
        coarse_lon=np.arange(-9.5, 2),
        number_of_samples=12,
        seed=0,
    )
    coords = coords_for(model)
    coords["time"] = TIMES[1:]
    coarse = model.coarsen(truth)
    out = model(coarse[None, None, None, None], coords)[0][0, :, 0, 0, 0]
    # The coarse field is kept, far below what the cells hold: .01 standard deviations of 3 K.
    assert (model.coarsen(out) - coarse).abs().mean() < 0.06
    inside = (slice(2, 31), slice(2, 47))
    mean = out.mean(0)
    rmse, spread = (mean - truth)[inside].square().mean().sqrt(), out.std(0)[inside].mean()
    assert 0.5 < spread / rmse < 2.0
    # Better than the cells' own values, of which it has the detail.
    rows = torch.from_numpy(np.abs(data.latitude.values[:, None] - coords["lat"]).argmin(1))
    columns = np.abs((data.longitude.values[:, None] - coords["lon"] + 180) % 360 - 180).argmin(1)
    cells = coarse[rows][:, torch.from_numpy(columns)]
    assert rmse < 0.8 * (cells - truth)[inside].square().mean().sqrt()


def test_it_works_in_inference_mode_with_the_jacobian(untrained):
    posterior = {"covariance": "jacobian", "guidance_interval": [0.1, 9], "steps": 3}
    model = DDOSuperResolution(untrained(), 2, posterior=posterior, seed=0)
    coords = coords_for(model)
    x = field_for(coords)
    expected = model(x, coords)[0]
    with torch.inference_mode():
        out = model(x.clone(), coords)[0]
    torch.testing.assert_close(out, expected)


def test_a_region_at_another_resolution(untrained):
    package = untrained()
    mean, std = torch.full((1, 1, 1, 1), 281.0), torch.full((1, 1, 1, 1), 2.0)
    package.normalization = Normalization(("t2m",), mean, std)
    model = DDOSuperResolution(package, 2, resolution=(12, 16), posterior={"steps": 12}, seed=0)
    coords = coords_for(model)
    x = field_for(coords)
    out, out_coords = model(x, coords)
    assert out.shape[-2:] == (12, 16) == (len(out_coords["lat"]), len(out_coords["lon"]))
    fine = package.grid.at((12, 16))
    np.testing.assert_allclose(out_coords["lat"], fine.lat)
    np.testing.assert_allclose(out_coords["lon"], np.mod(fine.lon, 360))


# ---- a package that was trained for it --------------------------------------------------------


def test_windows_of_lead_times_give_the_middle_one():
    model = DDOSuperResolution(conditional(OWN_FRAME), seed=0, number_of_samples=2)
    coords = coords_for(model, batch=2, times=2)
    hours = coords["lead_time"] / np.timedelta64(1, "h")
    np.testing.assert_array_equal(hours, [-1, 0, 1])
    assert len(coords["lat"]) == len(coords["lon"]) == 4
    assert coords["lat"][0] == pytest.approx(0.5 / 8)  # centres of blocks, as on the torus
    out, out_coords = model(field_for(coords, mean=0.0), coords)
    assert out.shape == (2, 2, 2, 1, 1, 8, 8)
    assert list(out_coords["lead_time"]) == [np.timedelta64(0, "h")]
    np.testing.assert_array_equal(out_coords["lon"], np.arange(8) / 8)
    # Later in a forecast the window moves along.
    coords["lead_time"] = coords["lead_time"] + np.timedelta64(30, "h")
    assert list(model.output_coords(coords)["lead_time"]) == [np.timedelta64(30, "h")]
    for wrong in (coords["lead_time"] * 2, coords["lead_time"][:2], coords["lead_time"][::-1]):
        coords["lead_time"] = wrong
        with pytest.raises(InputError, match="takes 3 frames at once"):
            model.output_coords(coords)


def test_the_right_frame_of_the_window_counts():
    model = DDOSuperResolution(conditional(OWN_FRAME), seed=0)
    coords = coords_for(model)
    x = torch.zeros([len(axis) for axis in coords.values()])
    x[:, :, 1] = 50.0  # the middle one: the mean of the state is its view
    assert model(x, coords)[0].mean() == pytest.approx(50.0, abs=2.0)
    x = x.roll(1, 2)
    assert model(x, coords)[0].mean() == pytest.approx(0.0, abs=2.0)


def test_a_view_of_one_frame_takes_any_lead_times():
    model = DDOSuperResolution(conditional((1.0,), interval=None), seed=0)
    coords = coords_for(model, leads=2)
    out, _ = model(field_for(coords, mean=0.0), coords)
    assert out.shape == (1, 1, 2, 1, 8, 8)


def test_coarsen_is_the_view_that_it_takes(model):
    x = torch.randn(2, 1, 8, 8)
    expected = x.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-1, -3))
    torch.testing.assert_close(DDOSuperResolution(conditional(OWN_FRAME)).coarsen(x), expected)
    area = torch.from_numpy(model.package.grid.area()).float()
    y = torch.randn(3, 6, 8)
    held = (area * y).unflatten(-1, (4, 2)).unflatten(-3, (3, 2)).sum((-1, -3))
    whole = area.unflatten(-1, (4, 2)).unflatten(-3, (3, 2)).sum((-1, -3))
    torch.testing.assert_close(model.coarsen(y), held / whole)


# ---- options and packages ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coarse_factor": 0.5}, "must be a number from 1 up"),
        ({"coarse_factor": 6}, "choose a smaller one"),
        ({"coarse_lat": [55.0, 54.0]}, "both coarse_lat and coarse_lon"),
        (
            {"coarse_factor": 2, "coarse_lat": [55.0, 54.0], "coarse_lon": [0.0, 1.0]},
            "either coarse_factor or both",
        ),
        ({"coarse_lat": [75.0, 74.0], "coarse_lon": [-1.0, 0.0]}, "reach out of the grid"),
        ({"number_of_samples": 0}, "number_of_samples=0 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"posterior": {"steps": 0}}, "steps=0 must be"),
        ({"posterior": {"guidance_interval": [9, 1]}}, "must be two noise levels"),
        ({"posterior": {"guidance_interval": 3.0}}, "must be two noise levels"),
        ({"posterior": {"batch": 0.5}}, "batch=0.5 must be"),
        ({"posterior": {"solver": "none"}}, "solver=none must be one of euler"),
        ({"posterior": {"solver": "heun", "churn": {"low": 1}}}, "churn needs an amount"),
        ({"posterior": 12}, "posterior=12 must be options by name: steps"),
        ({"resolution": (12, 16)}, "draws on its own grid only"),
    ],
)
def test_options_that_do_not_fit(untrained, options, message):
    with pytest.raises(InputError, match=message):
        DDOSuperResolution(untrained(), **options)


def test_packages_of_another_kind(untrained):
    with pytest.raises(InputError, match="the package has its own coarse grid"):
        DDOSuperResolution(conditional(OWN_FRAME), coarse_factor=2)
    with pytest.raises(InputError, match="how far apart its frames are"):
        DDOSuperResolution(conditional(OWN_FRAME, interval=None))
    package = untrained(("u10m", "v10m"), ("m/s", "m/s"))
    statistics = Normalization(("u10m",), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    window = Package(
        package.operator, package.grid, statistics, ("m/s",), task=Task(2, "hour_of_day")
    )
    with pytest.raises(InputError, match="windows of 2 frames"):
        DDOSuperResolution(window)


def test_how_a_prior_is_conditioned_reaches_its_posterior(untrained, conditionings):
    seen = conditionings()
    options = {"covariance": "jacobian", "iterations": 1, "guidance_interval": [0.1, 9]}
    model = DDOSuperResolution(untrained(), 2, posterior={**options, "steps": 1}, seed=0)
    coords = coords_for(model)
    model(field_for(coords), coords)
    assert seen == [options | {"guidance_interval": (0.1, 9.0)}]


def test_a_package_goes_round_with_its_options(untrained, tmp_path):
    axes = {"coarse_lat": np.array([56.5, 54.5]), "coarse_lon": np.array([-4.5, -2.5, -0.5])}
    posterior = {"steps": 2, "solver": "heun", "churn": {"amount": 0.5}}
    options = {"number_of_samples": 3, "seed": 4, "posterior": posterior}
    model = DDOSuperResolution(untrained(), **axes, **options)
    folder = model.save(tmp_path / "model")
    json.loads((folder / CONFIG).read_text(), parse_constant=pytest.fail)  # no infinity
    back = DDOSuperResolution.from_pretrained(str(folder))
    coords = coords_for(model)
    x = field_for(coords)
    assert back.options == model.options
    churn = {"amount": 0.5, "low": 0.0, "high": None, "noise": 1.0}
    assert back.options["posterior"] == posterior | {"churn": churn, "batch": 64}
    torch.testing.assert_close(back(x, coords)[0], model(x, coords)[0])


def test_devices(untrained, monkeypatch):
    model = DDOSuperResolution(untrained(), 2, posterior={"steps": 2}, seed=0)
    assert model.to("cpu") is model and model.to(torch.device("cpu")) is model
    if torch.cuda.is_available():
        coords = coords_for(model)
        x = field_for(coords)
        expected = model(x, coords)[0]
        out = model.to("cuda")(x.cuda(), coords)[0]
        assert out.device.type == "cuda" and model.device.type == "cuda"
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0.05)


# ---- in Earth2Studio's own workflow -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_as_a_diagnostic_of_a_forecast(tmp_path):
    """Slow to import, not to run: Earth2Studio's workflows bring all of its models."""
    with needs_earth2studio():
        from earth2studio.io import ZarrBackend
        from earth2studio.models.dx.base import DiagnosticModel
        from earth2studio.models.px import Persistence
        from earth2studio.perturbation.base import Perturbation
        from earth2studio.run import diagnostic
        from earth2studio.utils.coords import map_coords, split_coords

    model = DDOSuperResolution.from_pretrained(
        coarse_lat=np.arange(57.0, 50.5, -1),
        coarse_lon=np.arange(-9.0, 2),
        posterior={"steps": 4},
        seed=0,
    )
    assert isinstance(model, DiagnosticModel)
    assert isinstance(GaussianFieldPerturbation(), Perturbation)
    globe = OrderedDict(lat=np.linspace(90, -90, 181), lon=np.arange(360.0))

    def source(time, variable):
        lat, lon = np.meshgrid(globe["lat"], np.mod(globe["lon"] + 180, 360), indexing="ij")
        values = 300 - 0.4 * np.abs(lat) + 0.02 * (lon - 180)
        shape = (len(time), len(variable), 181, 360)
        return xr.DataArray(
            np.broadcast_to(values, shape).astype(np.float32),
            dims=("time", "variable", "lat", "lon"),
            coords={"time": time, "variable": variable, **globe},
        )

    io = diagnostic(
        list(TIMES),
        2,
        Persistence(["t2m", "msl"], globe),
        model,
        source,
        ZarrBackend(str(tmp_path / "fine.zarr"), backend_kwargs={"overwrite": True}),
        device=torch.device("cpu"),
        verbose=False,
    )
    fine = torch.from_numpy(io["t2m"][:])
    assert fine.shape == (2, 3, 33, 49) and fine.isfinite().all()
    stored = xr.open_zarr(tmp_path / "fine.zarr", consolidated=False)
    np.testing.assert_array_equal(stored["lon"], np.mod(np.arange(-10, 2.1, 0.25), 360))
    # Each field is what a call gives, and belongs to the nearest points, in the right place.
    lat, lon = np.meshgrid(np.arange(57.0, 50.5, -1), np.arange(-9.0, 2), indexing="ij")
    coarse = torch.from_numpy(300 - 0.4 * lat + 0.02 * lon).float()
    assert (model.coarsen(fine) - coarse).abs().mean() < 0.1
    coords = OrderedDict(batch=np.arange(1), **coords_for(model, times=2, leads=2, a=[0]))
    del coords["a"]
    alone, _ = model(coarse.expand(1, 2, 2, 1, -1, -1), coords)
    torch.testing.assert_close(fine[:, 1], alone[0, :, 1, 0], rtol=0, atol=0.02)

    # With several samples, the loop that the component's page gives.
    model = DDOSuperResolution(
        model.package,
        coarse_lat=model.options["coarse_lat"],
        coarse_lon=model.options["coarse_lon"],
        number_of_samples=2,
        posterior={"steps": 4},
        seed=0,
    )
    prognostic = Persistence(["t2m"], globe)
    x_coords = OrderedDict(time=TIMES[:1], lead_time=LEAD[:1], variable=np.array(["t2m"]), **globe)
    x = torch.from_numpy(source(TIMES[:1], ["t2m"]).values)[:, None]
    total = OrderedDict(sample=np.arange(2), time=TIMES[:1], lead_time=LEAD)
    grid = {name: model.output_coords(model.input_coords())[name] for name in ("lat", "lon")}
    io = ZarrBackend(str(tmp_path / "samples.zarr"), backend_kwargs={"overwrite": True})
    io.add_array(OrderedDict(**total, **grid), "t2m")
    forecast = prognostic.create_iterator(x, x_coords)
    for x, x_coords in itertools.islice(forecast, 2):
        fine, fine_coords = model(*map_coords(x, x_coords, model.input_coords()))
        io.write(*split_coords(fine, fine_coords))
    drawn = torch.from_numpy(io["t2m"][:])
    assert drawn.shape == (2, 1, 2, 33, 49) and drawn.isfinite().all()
    assert (drawn[0] - drawn[1]).abs().mean() > 0.02
