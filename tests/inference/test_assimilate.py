# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.inference.assimilate import assimilate
from ddo_modulus.inference.backgrounds import background_error_field
from ddo_modulus.inference.quality import QualityControl
from ddo_modulus.inference.reports import usable
from ddo_modulus.observations import PointOperator
from ddo_modulus.observations.table import read_table
from ddo_modulus.posterior import system as module

POSTERIOR = {field.name for field in fields(PosteriorConfig)}
QUALITY = {field.name for field in fields(QualityControl)}
BACKGROUND = {"background": "forecast", "background_error": "error", "background_length": "length"}


def result_of(package, table, times, **options):
    """``assimilate`` with the options of its objects by their own names."""
    posterior = {name: options.pop(name) for name in POSTERIOR & options.keys()}
    quality = {name: options.pop(name) for name in QUALITY & options.keys()}
    background = {
        new: options.pop(name) for name, new in BACKGROUND.items() if name in options
    } or None
    options |= {"posterior": posterior, "quality": quality, "background": background}
    return assimilate(package, table, times, **options)


def analyse(*args, **options):
    return result_of(*args, **options).dataset


TIMES = np.array(["2019-03-27T06", "2019-03-27T13", "2019-03-28T06"], "datetime64[ns]")


@pytest.fixture(scope="module")
def package(untrained):
    return untrained()


def reports(package, counts=(6, 3, 4), variable="t2m", seed=0):
    """Observations at grid points, a different number at each time."""
    random, means = np.random.default_rng(seed), package.normalization.mean.numpy()
    rows = []
    for time, count in zip(TIMES, counts, strict=True):
        for point in random.permutation(package.grid.shape[0] * package.grid.shape[1])[:count]:
            i, j = divmod(int(point), package.grid.shape[1])
            rows.append(
                {
                    "time": time,
                    "lat": package.grid.lat[i],
                    "lon": package.grid.lon[j],
                    "observation": means[pd.Timestamp(time).hour, 0, i, j] + 2 * random.normal(),
                    "variable": variable,
                    "observation_error": random.choice([0.5, 1.0]),
                }
            )
    return pd.DataFrame(rows)


def optimal_interpolation(package, prior, frame, time, factor):
    """Mean ``(P,)`` and covariance ``(P, P)`` of the analysis in physical units, densely."""
    height, width = package.grid.shape
    points = height * width
    identity = torch.eye(points, dtype=torch.float64).unflatten(1, (1, height, width))
    hour = pd.Timestamp(time).hour
    mean = package.normalization.mean[hour].double().flatten()
    std = package.normalization.std[hour].double().flatten()
    p = factor * std[:, None] * prior(package.operator.noise).cov(identity).flatten(1) * std
    rows = frame[frame["time"] == time]
    h = torch.zeros(len(rows), points, dtype=torch.float64)
    for m, (lat, lon) in enumerate(zip(rows["lat"], rows["lon"], strict=True)):
        i, j = np.argmin(abs(package.grid.lat - lat)), np.argmin(abs(package.grid.lon - lon))
        h[m, i * width + j] = 1
    r = torch.diag(torch.from_numpy(rows["observation_error"].to_numpy(copy=True)) ** 2)
    innovation = torch.from_numpy(rows["observation"].to_numpy(copy=True)) - h @ mean
    gain = p @ h.T @ torch.linalg.inv(h @ p @ h.T + r)
    chi2 = innovation @ torch.linalg.solve(h @ p @ h.T + r, innovation) / len(rows)
    return mean + gain @ innovation, p - gain @ h @ p, chi2, innovation.square().mean().sqrt()


@pytest.mark.parametrize(
    ("covariance", "inflation"), [("linear", "none"), ("jacobian", 2.0), ("linear", "adaptive")]
)
def test_untrained_package_is_optimal_interpolation(
    package, prior, unit_coefficients, monkeypatch, covariance, inflation
):
    """Up to the solver's steps: noise of unit coefficients leaves nothing to chance."""
    monkeypatch.setattr(
        PosteriorConfig, "scheduler", lambda self, noise: unit_coefficients(noise, 0.002, 3e4)
    )
    frame, members = reports(package), 1 + package.operator.noise.basis.size
    result = analyse(
        package,
        read_table(frame),
        TIMES,
        ensemble=members,
        inflation=inflation,
        covariance=covariance,
        steps=64,
        batch=2 * members,
    )
    for i, time in enumerate(TIMES):
        factor = float(result["inflation"][i])
        assert inflation == "adaptive" or factor == (1.0 if inflation == "none" else inflation)
        mean, cov, chi2, omb = optimal_interpolation(package, prior, frame, time, factor)
        states = torch.from_numpy(result["t2m"].values[:, i]).double().flatten(1)
        root = states[1:] - states[0]
        spread = cov.diagonal().sqrt()
        assert ((states[0] - mean) / spread).abs().max() < 0.02
        assert (root.square().sum(0).sqrt() / spread - 1).abs().max() < 0.02
        assert torch.linalg.norm(root.T @ root - cov) < 0.02 * torch.linalg.norm(cov)
        assert float(result["chi2"][i]) == pytest.approx(float(chi2), rel=1e-4)
        assert float(result["t2m_omb"][i]) == pytest.approx(float(omb), rel=1e-4)
    if inflation == "adaptive":
        assert len(np.unique(result["inflation"])) == 3


def first_guess(package, times=TIMES, members=None, seed=4, level=1.0):
    """A forecast in physical units: the climatology and smooth noise."""
    random = np.random.default_rng(seed)
    shape = (len(times), members or 1, *package.grid.shape)
    hours = [pd.Timestamp(t).hour for t in times]
    means = package.normalization.mean[hours, 0].double().numpy()[:, None]
    rows, columns = np.meshgrid(*(np.linspace(0, 1, n) for n in shape[2:]), indexing="ij")
    slopes = level * random.normal(size=(2, *shape[:2], 1, 1))
    values = means + slopes[0] * rows + slopes[1] * columns
    dims = ("time", "ensemble", "lat", "lon")
    axes = {"time": times, "lat": package.grid.lat, "lon": package.grid.lon}
    dataset = xr.Dataset({"t2m": (dims, values)}, coords=axes)
    return dataset if members else dataset.isel(ensemble=0)


@pytest.mark.parametrize("covariance", ["linear", "jacobian"])
def test_a_background_is_one_more_observation_of_all_points(
    package, prior, unit_coefficients, monkeypatch, covariance
):
    """Against the dense update by forecast and observations, in physical units."""
    monkeypatch.setattr(
        PosteriorConfig, "scheduler", lambda self, noise: unit_coefficients(noise, 0.002, 3e4)
    )
    frame, members = reports(package), 1 + package.operator.noise.basis.size
    guess = first_guess(package)
    result = analyse(
        package,
        read_table(frame),
        TIMES,
        ensemble=members,
        inflation=2.0,
        covariance=covariance,
        steps=64,
        batch=2 * members,
        background=guess,
        background_error=1.2,
        background_length=250.0,
        gross_error=None,
    )
    error = background_error_field(package, 1.2, 250.0)
    points = package.grid.shape[0] * package.grid.shape[1]
    unit = torch.eye(points, dtype=torch.float64).unflatten(1, (1, *package.grid.shape))
    for i, time in enumerate(TIMES):
        hour = pd.Timestamp(time).hour
        mean = package.normalization.mean[hour].double().flatten()
        std = package.normalization.std[hour].double().flatten()
        p = 2.0 * std[:, None] * prior(package.operator.noise).cov(unit).flatten(1) * std
        b = std[:, None] * error.cov(unit).flatten(1) * std
        x = torch.from_numpy(guess["t2m"].values[i]).double().flatten()
        gain = p @ torch.linalg.inv(p + b)
        mean, p = mean + gain @ (x - mean), p - gain @ p
        rows = frame[frame["time"] == time]
        h = torch.zeros(len(rows), points, dtype=torch.float64)
        for m, (lat, lon) in enumerate(zip(rows["lat"], rows["lon"], strict=True)):
            row, column = (
                np.argmin(abs(package.grid.lat - lat)),
                np.argmin(abs(package.grid.lon - lon)),
            )
            h[m, row * package.grid.shape[1] + column] = 1
        r = torch.diag(torch.from_numpy(rows["observation_error"].to_numpy(copy=True)) ** 2)
        y = torch.from_numpy(rows["observation"].to_numpy(copy=True))
        total = h @ p @ h.T + r
        chi2 = (y - h @ mean) @ torch.linalg.solve(total, y - h @ mean) / len(rows)
        omb = (y - h @ x).square().mean().sqrt()
        gain = p @ h.T @ torch.linalg.inv(total)
        mean, p = mean + gain @ (y - h @ mean), p - gain @ h @ p
        states = torch.from_numpy(result["t2m"].values[:, i]).double().flatten(1)
        root, spread = states[1:] - states[0], p.diagonal().sqrt()
        assert ((states[0] - mean) / spread).abs().max() < 0.03
        assert (root.square().sum(0).sqrt() / spread - 1).abs().max() < 0.03
        assert float(result["chi2"][i]) == pytest.approx(float(chi2), rel=1e-3)
        assert float(result["t2m_omb"][i]) == pytest.approx(float(omb), rel=1e-3)


def test_each_member_has_its_own_background(package):
    table, guess = read_table(reports(package)), first_guess(package, members=3)
    options = {"background_error": 0.5, "steps": 6, "inflation": "none", "gross_error": None}
    together = analyse(package, table, TIMES, ensemble=4, background=guess, **options)["t2m"]
    for member in range(4):  # the fourth goes on from the first
        own = guess.isel(ensemble=member % 3)
        alone = analyse(package, table, TIMES, ensemble=4, background=own, **options)["t2m"]
        np.testing.assert_allclose(together[member], alone[member], atol=2e-3)
    for batch in (1, 3):
        parts = analyse(package, table, TIMES, ensemble=4, background=guess, batch=batch, **options)
        np.testing.assert_allclose(parts["t2m"], together, atol=2e-3)


def test_a_background_is_what_reports_are_checked_against(package):
    """Far from the climatology, near the forecast; and the other way round."""
    frame = reports(package, (4, 0, 0))
    guess = first_guess(package, TIMES[:1]) + 15.0
    frame["observation"] += [0.0, 15.0, 15.0, 15.0]
    rejected = result_of(
        package,
        read_table(frame),
        TIMES[:1],
        ensemble=1,
        steps=2,
        background=guess,
        background_error=1.0,
    ).rejected
    assert rejected["reason"].tolist() == ["gross error"]
    assert rejected["observation"].tolist() == [frame["observation"].iloc[0]]


def test_the_spread_of_forecasts_is_no_gross_error(package):
    """Members that differ by much more than their stated errors let expect as much."""
    frame = reports(package, (3, 0, 0))
    frame["observation"] += 9.0
    few = {"ensemble": 1, "steps": 2, "background_error": 0.5, "missing": "prior"}
    wide = first_guess(package, TIMES[:1], members=6, level=9.0)
    for guess, used in ((wide, 3), (wide.mean("ensemble"), 0)):
        found = analyse(package, read_table(frame), TIMES[:1], background=guess, **few)
        assert int(found["observations"][0]) == used


def test_rejected_reports_are_handed_over(package):
    frame = reports(package, (12, 3, 4))
    frame.loc[2, "observation"] += 60.0
    frame.loc[5, "observation"] = np.nan
    outside = frame.iloc[[0]].assign(lat=10.0)
    near = frame.iloc[[14]].assign(observation_error=9.0, lat=frame["lat"].iloc[14] + 1e-3)
    table = pd.concat([frame, outside, near], ignore_index=True)
    found = result_of(package, read_table(table), TIMES, ensemble=1, steps=2, thinning_km=1.0)
    rejected, result = found.rejected, found.dataset
    assert found.dropped == rejected["reason"].value_counts().to_dict()
    assert sorted(rejected["reason"]) == [
        "gross error",
        "missing value",
        "outside the grid",
        "thinned",
    ]
    wrong = rejected[rejected["reason"] == "gross error"].iloc[0]
    assert wrong["observation"] == frame["observation"].iloc[2]
    assert wrong["analysis_time"] == pd.Timestamp(TIMES[0]) and wrong["normalized_innovation"] > 5
    thinned = rejected[rejected["reason"] == "thinned"].iloc[0]
    assert thinned["observation_error"] == 9.0
    np.testing.assert_array_equal(result["observations"], [10, 3, 4])
    np.testing.assert_array_equal(result["dropped"], [2, 1, 0])
    assert json.loads(result.attrs["dropped"]) == rejected["reason"].value_counts().to_dict()
    everything = analyse(package, read_table(table), TIMES, ensemble=1, steps=2, gross_error=None)
    np.testing.assert_array_equal(everything["observations"], [11, 4, 4])


def test_superobservations_and_duplicates_weigh_as_they_should(package):
    """Reports of the same place, as one of their mean with the error that is left."""
    frame = reports(package, (6, 3, 4)).assign(observation_error=0.8)
    twice = pd.concat([frame.assign(observation=frame["observation"] + s) for s in (0.5, -0.5)])
    options = {"ensemble": 2, "steps": 6, "gross_error": None}

    def fields_of(table, **more):
        return analyse(package, read_table(table), TIMES, **options, **more)["t2m"].values

    same = fields_of(twice, duplicates="average")
    np.testing.assert_allclose(same, fields_of(frame), atol=2e-3)
    half = frame.assign(observation_error=0.8 * np.sqrt(0.25 + 0.75 / 2))
    np.testing.assert_allclose(fields_of(twice, superob_km=1.0), fields_of(half), atol=2e-3)
    assert np.abs(fields_of(twice) - same).max() > 0.05


@pytest.mark.parametrize("with_background", [False, True])
def test_a_time_without_observations_may_be_drawn_from_what_is_known(
    package, prior, with_background
):
    frame = reports(package, (6, 0, 4))
    with pytest.raises(InputError, match="no observations within"):
        analyse(package, read_table(frame), TIMES, ensemble=1)
    guess = first_guess(package)
    more = {"background": guess, "background_error": 0.1} if with_background else {}
    result = analyse(
        package, read_table(frame), TIMES, ensemble=60, missing="prior", inflation=2.0, **more
    )
    np.testing.assert_array_equal(result["observations"], [6, 0, 4])
    assert np.isnan(result["chi2"][1]) and np.isnan(result["t2m_omb"][1])
    states = result["t2m"].values[:, 1]
    if with_background:
        np.testing.assert_allclose(states.mean(0), guess["t2m"][1], atol=0.15)
        return
    hour = pd.Timestamp(TIMES[1]).hour
    z = (states - package.normalization.mean[hour].numpy()) / package.normalization.std[
        hour
    ].numpy()
    assert z.std() == pytest.approx(2**0.5, rel=0.15)
    # No row at all that could be used is the same.
    nothing = analyse(
        package, read_table(frame.assign(lat=10.0)), TIMES, ensemble=1, missing="prior", steps=2
    )
    np.testing.assert_array_equal(nothing["observations"], [0, 0, 0])


def test_what_quality_control_leaves_nothing_of(package):
    frame = reports(package, (3, 0, 0)).assign(observation=330.0)
    with pytest.raises(InputError, match="are gross errors.*raise gross_error"):
        analyse(package, read_table(frame), TIMES[:1], ensemble=1)


def test_a_part_of_the_domain(package):
    table = read_table(reports(package))
    whole = analyse(package, table, TIMES, ensemble=2, steps=6)["t2m"]
    part = LatLonGrid(package.grid.lat[1:4], package.grid.lon[2:7])
    crop = analyse(package, table, TIMES, ensemble=2, steps=6, grid=part)
    np.testing.assert_array_equal(crop["lat"], part.lat)
    np.testing.assert_allclose(crop["t2m"], whole[:, :, 1:4, 2:7], atol=1e-3)
    between = LatLonGrid(np.arange(56.5, 53, -1), np.arange(-4.5, 0))
    found = analyse(package, table, TIMES, ensemble=2, steps=6, grid=between)["t2m"]
    expected = whole.interp(lat=between.lat, lon=between.lon)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_finer_grid(package, prior, unit_coefficients, monkeypatch):
    """Optimal interpolation on it, with the prior's own covariance function."""
    fine = package.grid.at((12, 16))
    noise = package.operator.noise.at(fine.shape)
    monkeypatch.setattr(
        PosteriorConfig, "scheduler", lambda self, noise: unit_coefficients(noise, 0.002, 3e4)
    )
    frame, members = reports(package, (6, 0, 0)), 1 + noise.basis.size
    result = analyse(
        package,
        read_table(frame),
        TIMES[:1],
        ensemble=members,
        inflation="none",
        covariance="linear",
        steps=64,
        grid=fine,
    )
    np.testing.assert_allclose(result["lat"], fine.lat)
    unit = torch.eye(192, dtype=torch.float64).unflatten(1, (1, 12, 16))
    statistics = package.statistics_at(fine)
    mean, std = (t[6].double().flatten() for t in (statistics.mean, statistics.std))
    linear = package.operator.linear.at((12, 16))
    root = linear.fields(
        torch.eye(192, dtype=torch.float64) * linear.variance.sqrt(), mean=False
    ).flatten(1)
    p = std[:, None] * (root.T @ root) * std
    h = PointOperator(fine, frame["lat"], frame["lon"]).increment(unit).T
    r = torch.diag(torch.from_numpy(frame["observation_error"].to_numpy(copy=True)) ** 2)
    gain = p @ h.T @ torch.linalg.inv(h @ p @ h.T + r)
    y = torch.from_numpy(frame["observation"].to_numpy(copy=True))
    mean, p = mean + gain @ (y - h @ mean), p - gain @ h @ p
    states = torch.from_numpy(result["t2m"].values[:, 0]).double().flatten(1)
    spread = p.diagonal().sqrt()
    assert ((states[0] - mean) / spread).abs().max() < 0.03
    found = (states[1:] - states[0]).square().sum(0).sqrt()
    assert (found / spread - 1).abs().max() < 0.03


def test_noise_has_the_right_spread(package, prior):
    frame, members = reports(package), 400
    result = analyse(package, read_table(frame), TIMES[:1], ensemble=members, batch=150)
    factor = float(result["inflation"][0])
    mean, cov, *_ = optimal_interpolation(package, prior, frame, TIMES[0], factor)
    states = torch.from_numpy(result["t2m"].values[:, 0]).double().flatten(1)
    assert ((states.mean(0) - mean) / (cov.diagonal() / members).sqrt()).abs().max() < 4.5
    assert abs(float((states.var(0) / cov.diagonal()).mean()) - 1) < 0.15


def test_members_do_not_depend_on_what_is_computed_with_them(package):
    table = read_table(reports(package))

    def fields_of(times=TIMES, ensemble=4, **options):
        result = analyse(package, table, times, ensemble=ensemble, steps=6, **options)
        return result["t2m"].values

    whole = fields_of()
    for batch in (1, 3, 8):
        np.testing.assert_allclose(fields_of(batch=batch), whole, atol=2e-3)
    np.testing.assert_allclose(fields_of(TIMES[1:2]), whole[:, 1:2], atol=2e-3)
    np.testing.assert_allclose(fields_of(TIMES[::-1]), whole, atol=2e-3)
    np.testing.assert_allclose(fields_of(ensemble=2), whole[:2], atol=2e-3)
    np.testing.assert_array_equal(fields_of(), whole)
    assert np.abs(fields_of(seed=1) - whole).mean() > 0.1
    noise = [fields_of(batch=batch, solver="dpmpp_2m_sde") for batch in (1, 256)]
    np.testing.assert_allclose(*noise, atol=2e-3)


def test_how_posteriors_are_solved_is_the_packages_unless_told(package, conditionings, monkeypatch):
    seen = conditionings()
    own = replace(
        package.posterior, covariance="jacobian", iterations=3, guidance_interval=[0.2, 9], steps=2
    )
    monkeypatch.setattr(package, "posterior", own)
    table = read_table(reports(package))
    result = analyse(package, table, TIMES[:1], ensemble=2)
    other = analyse(
        package, table, TIMES[:1], ensemble=2, iterations=1, guidance_interval=[0.5, 4.0]
    )
    assert seen == [
        {"covariance": "jacobian", "iterations": 3, "guidance_interval": (0.2, 9.0)},
        {"covariance": "jacobian", "iterations": 1, "guidance_interval": (0.5, 4.0)},
    ]
    assert list(result.attrs["guidance_interval"]) == [0.2, 9.0]
    assert other.attrs["iterations"] == 1
    with pytest.raises(InputError, match="guidance_interval='ab' must be two noise levels"):
        analyse(package, table, TIMES[:1], guidance_interval="ab")
    everywhere = replace(own, guidance_interval=[0, np.inf])
    monkeypatch.setattr(package, "posterior", everywhere)
    assert "guidance_interval" not in analyse(package, table, TIMES[:1], ensemble=2).attrs


def test_options_may_be_mappings_or_objects(package):
    table = read_table(reports(package))
    options = {"steps": 3, "inflation": 1.5}
    one = assimilate(package, table, TIMES, ensemble=2, posterior=options)
    two = assimilate(package, table, TIMES, ensemble=2, posterior=PosteriorConfig(**options))
    np.testing.assert_array_equal(one.dataset["t2m"], two.dataset["t2m"])
    with pytest.raises(InputError, match="posterior has no option step; choose from steps"):
        assimilate(package, table, TIMES, posterior={"step": 3})
    with pytest.raises(InputError, match="quality='strict' must be options by name"):
        assimilate(package, table, TIMES, quality="strict")


def test_a_table_may_be_a_frame(package):
    frame = reports(package)
    one, two = (
        assimilate(package, table, TIMES, ensemble=1, posterior={"steps": 2})
        for table in (frame, read_table(frame))
    )
    np.testing.assert_array_equal(one.dataset["t2m"], two.dataset["t2m"])
    assert one.diagnostics["time"].tolist() == list(pd.to_datetime(TIMES))


@pytest.mark.parametrize("variable", ["t2m", "ws10m"])
def test_the_square_root_is_computed_once_an_analysis(untrained, monkeypatch, variable):
    """For quality control, inflation, guidance with a background, and diagnostics together."""
    channels = ("t2m",) if variable == "t2m" else ("u10m", "v10m")
    package = untrained(channels, ("K",) if variable == "t2m" else ("m/s", "m/s"))
    frame = reports(package, (9, 6, 7), variable)
    if variable == "ws10m":
        frame["observation"] = 9.0
    frame.loc[2, "observation"] += 60.0
    computed, original = [], module.observation_root

    def counted(tangent, noise, like):
        computed.append(tangent.terms[0][1].size)
        return original(tangent, noise, like)

    monkeypatch.setattr(module, "observation_root", counted)
    background = {}
    if variable == "t2m":
        background = {"background": first_guess(package), "background_error": 4.0}
    result = result_of(
        package,
        read_table(frame),
        TIMES,
        ensemble=3,
        steps=3,
        batch=4,
        thinning_km=1.0,
        **background,
    )
    assert result.dropped["gross error"] >= 1
    parts = 1 if variable == "t2m" else 2  # wind speed is made of two linear operators
    assert sorted(computed) == sorted([9, 6, 7] * parts)


def test_labels(package):
    result = analyse(package, read_table(reports(package)), TIMES, ensemble=2)
    assert result["t2m"].dims == ("ensemble", "time", "lat", "lon")
    assert result["t2m"].dtype == np.float32
    assert result["t2m"].attrs == {"units": "K", "long_name": "2m temperature"}
    np.testing.assert_array_equal(result["lat"], package.grid.lat)
    np.testing.assert_array_equal(result["observations"], [6, 3, 4])
    assert result["t2m_oma"].attrs["units"] == "K"
    assert result.attrs["seed"] == 0
    assert result.attrs["steps"] == 16


def test_tolerance_and_unused_rows_are_counted(package):
    frame = reports(package)
    outside = frame.iloc[[0]].assign(lat=10.0)
    other = frame.iloc[[0]].assign(variable="msl", observation=1e5)
    late = frame.iloc[[0]].assign(time=TIMES[0] + np.timedelta64(20, "m"))
    table = read_table(pd.concat([frame, outside, other, late]))
    result = analyse(package, table, TIMES, ensemble=1, tolerance=np.timedelta64(30, "m"), steps=2)
    np.testing.assert_array_equal(result["observations"], [7, 3, 4])
    np.testing.assert_array_equal(result["dropped"], [2, 0, 0])
    assert json.loads(result.attrs["dropped"]) == {"unknown variable": 1, "outside the grid": 1}


def test_any_branch_of_longitude(package):
    frame = reports(package)
    turned = frame.assign(lon=frame["lon"] % 360)
    one, other = (analyse(package, read_table(f), TIMES, ensemble=1) for f in (frame, turned))
    np.testing.assert_allclose(one["t2m"], other["t2m"], atol=1e-3)


def test_wind_speed_follows_from_its_components(untrained):
    package = untrained(("u10m", "v10m"), ("m/s", "m/s"))
    speed = reports(package, (8, 0, 8), "ws10m").assign(observation=9.0)
    wind = reports(package, (5, 5, 0), "u10m", seed=1).assign(observation=4.0)
    table = read_table(pd.concat([speed, wind]))
    options = {"ensemble": 8, "inflation": "none"}
    result = analyse(package, table, TIMES, **options)
    assert result["ws10m_oma"].attrs["units"] == "m/s"
    assert np.isnan(result["ws10m_oma"].values[1])
    for name in ("ws10m", "u10m"):
        used = np.isfinite(result[f"{name}_oma"])
        assert (result[f"{name}_oma"] < result[f"{name}_omb"])[used].all()
    alone = analyse(package, table, TIMES[2:], batch=3, **options)
    np.testing.assert_allclose(alone["v10m"].values[:, 0], result["v10m"].values[:, 2], atol=2e-3)


def test_observation_errors_by_default(package):
    complete = reports(package).assign(observation_error=1.0)
    unknown = read_table(complete.drop(columns="observation_error"))
    options = {"ensemble": 1, "steps": 4}
    expected = analyse(package, read_table(complete), TIMES, **options)["t2m"]
    np.testing.assert_allclose(analyse(package, unknown, TIMES, **options)["t2m"], expected)
    for default in (3.0, {"t2m": 3.0}):
        other = analyse(package, unknown, TIMES, default_error=default, **options)["t2m"]
        assert np.abs(other - expected).max() > 0.1


def test_unknown_observation_error_is_refused(untrained):
    package = untrained(("z500",), ("m2/s2",))
    frame = reports(package, variable="z500").assign(observation=54e3, observation_error=np.nan)
    with pytest.raises(InputError, match=r"z500 .*default_error=\{z500"):
        analyse(package, read_table(frame), TIMES, ensemble=1)


def test_mistakes_have_names(package):
    frame = reports(package)
    table = read_table(frame)
    with pytest.raises(InputError, match="none of the 13 observations is in the package's grid"):
        usable(package, read_table(frame.assign(lon=100.0)))
    with pytest.raises(InputError, match="no observations of t2m"):
        usable(package, read_table(frame.assign(variable="msl", observation=1e5)))
    with pytest.raises(InputError, match="no observations within"):
        analyse(package, table, TIMES + np.timedelta64(1, "D"))
    moved = frame.assign(lat=frame["lat"].where(frame["time"] != TIMES[1], 0.0))
    with pytest.raises(InputError, match="3 observations outside the grid"):
        analyse(package, read_table(moved), TIMES)
    for options in ({"ensemble": 0}, {"seed": -1}, {"inflation": "lots"}, {"inflation": -1.0}):
        with pytest.raises(InputError):
            analyse(package, table, TIMES, **options)
    with pytest.raises(InputError, match="number of times"):
        analyse(package, table, [])
    for match, options in (
        ("needs background_error", {"background": first_guess(package), "background_error": None}),
        ("has no forecast", {"background_error": 1.0}),
        ("gross_error=-1", {"gross_error": -1}),
        ("either thinned or averaged", {"thinning_km": 5, "superob_km": 5}),
        ("'keep' or 'average'", {"duplicates": "drop"}),
        ("'error' or 'prior'", {"missing": "guess"}),
        ("reaches beyond", {"grid": LatLonGrid([60.0, 50.0], [-6.0, 0.0])}),
    ):
        with pytest.raises(InputError, match=match):
            analyse(package, table, TIMES, ensemble=1, **options)
