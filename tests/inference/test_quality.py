# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas as pd
import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.fields.grid import BoxGrid
from ddo_modulus.inference.quality import (
    average_duplicates,
    gross_errors,
    normalized_innovations,
    superobservations,
    thinned,
)
from ddo_modulus.observations import Observations, PointOperator, StackedOperator, wind_speed
from ddo_modulus.posterior import AnalysisSystem, Background

NOON = np.datetime64("2019-03-27T12:00", "ns")


def rows(lat, lon, observation=0.0, error=1.0, minutes=0, variable="t2m", **more):
    frame = pd.DataFrame({"lat": np.atleast_1d(lat).astype(float), "lon": np.atleast_1d(lon)})
    frame["time"] = NOON + np.asarray(minutes) * np.timedelta64(1, "m")
    frame["observation"], frame["observation_error"] = observation, error
    return frame.assign(variable=variable, **more)


def innovations(prior, observations):
    return normalized_innovations(AnalysisSystem(observations, prior.noise).at_mean(prior.linear))


# ---- gross errors -------------------------------------------------------------------------------


def problem(seed=0, count=7):
    noise = GaussianField(CosineBasis((6, 7)), Matern(0.25, 0.5), 2)
    mean = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(seed)).double()
    prior = GaussianDenoiser(mean, GaussianField(noise.basis, Matern(0.4, 1.5), 2), noise)
    random = np.random.default_rng(seed)
    places = random.uniform(0.1, 0.9, (2, count))
    grid = BoxGrid((6, 7), periodic=False)
    return prior, [PointOperator(grid, *places, channel) for channel in (0, 1)]


def test_innovations_against_dense_matrices(dense):
    """Of points and of a speed, that is not linear; with its own errors each."""
    prior, (u, v) = problem()
    operator = StackedOperator(u, wind_speed(u, v))
    random = torch.Generator().manual_seed(3)
    values = torch.randn(14, generator=random, dtype=torch.float64)
    variance = 0.1 + torch.rand(14, generator=random, dtype=torch.float64)
    found = innovations(prior, Observations(operator, values, variance))
    root = dense(lambda a: prior.fields(a, mean=False), (84,))
    covariance = root @ torch.diag(prior.variance[0]) @ root.T
    h = torch.func.jacrev(lambda s: operator(s)[0])(prior.mean[None]).reshape(14, -1)
    expected = (h @ covariance @ h.T).diagonal() + variance
    innovation = values - operator(prior.mean[None])[0]
    torch.testing.assert_close(found[0], innovation / expected.sqrt(), rtol=1e-5, atol=1e-5)


def test_innovations_of_several_analyses_from_their_backgrounds():
    prior, (u, _) = problem()
    error = GaussianField(prior.noise.basis, Matern(0.3, 1.5), 2, scale=0.2)
    backgrounds = torch.randn(2, 2, 6, 7, generator=torch.Generator().manual_seed(5)).double()
    parts = [Observations(u, torch.full((7,), value), 0.1) for value in (0.5, -0.5)]
    together = innovations(Background(prior, backgrounds, error), Observations.batch(parts))
    for background, part, found in zip(backgrounds, parts, together, strict=True):
        alone = innovations(Background(prior, background, error), part)
        torch.testing.assert_close(found, alone[0])


def test_a_report_too_far_off_is_a_gross_error():
    innovation = torch.tensor([0.3, -4.9, 5.1, -80.0])
    np.testing.assert_array_equal(
        gross_errors(innovation, np.repeat("t2m", 4)), [False, False, True, True]
    )
    np.testing.assert_array_equal(
        gross_errors(innovation, np.repeat("t2m", 4), 4.0), [False, True, True, True]
    )
    with pytest.raises(InputError, match="must be positive"):
        gross_errors(innovation, np.repeat("t2m", 4), 0.0)


def test_where_all_reports_are_far_off_the_prior_is_to_blame():
    """By kind: temperatures of another season do not excuse a wind."""
    random = np.random.default_rng(0)
    season = random.normal(0, 3.0, 60)
    season[7] = 40.0
    wind = random.normal(0, 1.0, 20)
    wind[3] = 9.0
    innovation = torch.from_numpy(np.concatenate([season, wind]))
    variables = np.repeat(["t2m", "u10m"], [60, 20])
    np.testing.assert_array_equal(np.flatnonzero(gross_errors(innovation, variables)), [7, 63])
    # A few reports are no season.
    assert gross_errors(torch.full((5,), 9.0), np.repeat("t2m", 5)).all()
    # Nor is there one in which anything goes.
    assert gross_errors(torch.full((50,), 30.0), np.repeat("t2m", 50)).all()


# ---- duplicates ---------------------------------------------------------------------------------


def test_duplicates_are_averaged():
    frame = rows(
        [51, 52, 51, 51, 51],
        [-1, 0, 359, -1, -1],
        [280.0, 281, 282, 290, 286],
        [1.0, 1.0, 0.5, 1, 2],
        [0, 0, 0, 5, 0],
    )
    before = frame.copy()
    found = average_duplicates(frame)
    pd.testing.assert_frame_equal(frame, before)
    np.testing.assert_allclose(found["observation"], [(280 + 282 + 286) / 3, 281, 290])
    np.testing.assert_allclose(found["observation_error"], [0.5, 1, 1])
    assert found.index.tolist() == [0, 1, 3]
    assert average_duplicates(frame.iloc[[1, 3]]).equals(frame.iloc[[1, 3]])


def test_what_is_of_another_kind_is_no_duplicate():
    one = rows(51, 0, 280.0)
    kinds = [
        one.assign(variable="d2m"),
        one.assign(pres=5e4),
        one.assign(pres=7e4),
        one.assign(sensor_index=4.0),
        one.assign(sensor_index=5.0),
        rows(51, 0, 359.0, variable="wd10m"),
        rows(51, 0, 3.0, variable="wd10m"),
    ]
    frame = pd.concat([one, *kinds], ignore_index=True)
    assert len(average_duplicates(frame)) == len(frame)
    assert not thinned(frame.iloc[:-1], NOON, 50).any()
    found = superobservations(frame, 50)
    assert len(found) == len(frame) and set(found["observation"]) == {280.0, 359.0, 3.0}


# ---- thinning and superobservations -------------------------------------------------------------


def test_thinning_keeps_the_nearest_in_time_then_the_smallest_error():
    frame = rows(
        [51.01, 51.02, 51.03, 51.04, 55], [0.1, 0.1, 0.1, 0.1, 0.1], error=[1, 1, 0.5, 2, 1]
    )
    frame["time"] = NOON + np.array([-20, 10, -10, 30, 55]) * np.timedelta64(1, "m")
    left_out = thinned(frame, NOON, 50)
    np.testing.assert_array_equal(left_out, [True, True, False, True, False])
    assert not thinned(frame, NOON, 0.5).any()


@pytest.mark.parametrize("lat", [0.0, 52.0, 80.0, -89.9])
def test_cells_have_the_spacing_asked_for(lat):
    """Along a parallel with a report every kilometre, over the seam as elsewhere."""
    circle = 2 * np.pi * 6371 * np.cos(np.deg2rad(lat))
    count = max(8, int(circle))
    frame = rows(np.full(count, lat), np.linspace(-180, 180, count, endpoint=False))
    kept = int((~thinned(frame, NOON, 100)).sum())
    assert abs(kept - circle / 100) <= 0.05 * circle / 100 + 3
    shifted = frame.assign(lon=frame["lon"] % 360)
    np.testing.assert_array_equal(thinned(shifted, NOON, 100), thinned(frame, NOON, 100))


def test_superobservations_against_dense_matrices():
    """Mean and error of the best linear mean of errors of which a share is common."""
    sigma, share = np.array([0.5, 1.0, 2.0]), 0.3
    frame = rows([50.9, 51.0, 51.1], [0.1, 0.2, 0.4], [280.0, 283.0, 290.0], sigma, [0, 10, 20])
    (found,) = superobservations(frame, 100, representativeness=share).to_dict("records")
    weight = sigma**-2 / (sigma**-2).sum()
    covariance = share * np.outer(sigma, sigma) + (1 - share) * np.diag(sigma**2)
    assert found["observation"] == pytest.approx(weight @ frame["observation"])
    assert found["lat"] == pytest.approx(weight @ frame["lat"])
    assert found["lon"] == pytest.approx(weight @ frame["lon"])
    assert found["observation_error"] == pytest.approx(np.sqrt(weight @ covariance @ weight))
    late = (found["time"] - pd.Timestamp(NOON)) / pd.Timedelta("1min")
    assert late == pytest.approx(weight @ [0, 10, 20])


def test_superobservations_have_a_floor_and_a_seam():
    many = rows(np.full(400, 51.01), np.tile([359.99, 0.01, -0.01, 0.02], 100), 280.0, 2.0)
    # The seam of the cells is where longitudes have theirs: two cells, each about its own middle.
    found = superobservations(many, 50, representativeness=0.25)
    assert len(found) == 2
    np.testing.assert_allclose(found["observation_error"], 1.0, rtol=0.01)
    assert (found["lon"] % 360).min() < 0.02 and (found["lon"] % 360).max() > 359.98
    single = superobservations(many.iloc[:1], 50)
    pd.testing.assert_frame_equal(single, many.iloc[:1])
    before = many.copy()
    superobservations(many, 50)
    pd.testing.assert_frame_equal(many, before)


def test_mistakes():
    frame = rows([51, 52], [0, 1])
    for spacing in (0, -5, np.nan, np.inf):
        with pytest.raises(InputError, match="spacing"):
            thinned(frame, NOON, spacing)
    with pytest.raises(InputError, match="between 0 and 1"):
        superobservations(frame, 50, representativeness=1.5)
