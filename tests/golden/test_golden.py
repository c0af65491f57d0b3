# SPDX-License-Identifier: Apache-2.0
"""The same seeds give the same analyses as revision 78bfdfd, on a CPU.

``78bfdfd.npz`` holds what that revision gave: every third point of the fields, and the diagnostics.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ddo_modulus import (
    FieldNoiseScheduler,
    LatLonGrid,
    MomentMatching,
    Observations,
    Package,
    PointOperator,
    TrajectoryPrior,
    sample,
)
from ddo_modulus.inference.assimilate import assimilate, member_generator
from ddo_modulus.inference.generate import generate
from ddo_modulus.inference.super_resolve import CoarseGrid, super_resolve
from ddo_modulus.observations import joined

GOLDEN = np.load(Path(__file__).with_name("78bfdfd.npz"))
UK_TIMES = np.array(["2019-03-27T06", "2019-03-28T13"], "datetime64[ns]")
FLOW_TIME = np.array(["2000-01-01T00"], "datetime64[ns]")


def check(case, arrays):
    """Every array of a case, to 1e-5 of the standard deviation of its values."""
    names = [key for key in GOLDEN.files if key.startswith(f"{case}/")]
    assert names
    for key in names:
        expected, found = GOLDEN[key], np.asarray(arrays[key.partition("/")[2]])
        scale = max(float(expected.std()), 1e-3 * float(np.abs(expected).max()), 1e-6)
        assert (
            np.abs(found.astype(float) - expected).max()
            < 1e-5 * scale + 1e-6 * np.abs(expected).max()
        ), key


def thinned(dataset):
    return {
        str(name): v.values[..., ::3, ::3] if "lat" in v.dims else v.values
        for name, v in dataset.data_vars.items()
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uk():
    return Package.load("uk_t2m")


@pytest.fixture(scope="module")
def flow():
    return Package.load("kolmogorov64")


def uk_reports():
    random = np.random.default_rng(1)
    rows = []
    for time in UK_TIMES:
        for k in range(40):
            lat, lon = random.uniform(50.2, 57.8), random.uniform(-9.8, 1.8)
            value = 281 + 2.5 * np.sin(lat) + 1.5 * random.normal()
            error = (0.5, 1.0, np.nan)[k % 3]
            rows.append((time, lat, lon, value, "t2m", error))
    columns = ["time", "lat", "lon", "observation", "variable", "observation_error"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.loc[3, "observation"] = 305.0  # a gross error
    return frame


def uk_forecast(package, members):
    random = np.random.default_rng(2)
    y, x = np.meshgrid(np.linspace(0, 1, 33), np.linspace(0, 1, 49), indexing="ij")
    s = random.normal(size=(3, 2, members, 1, 1))
    values = 281 + 2 * np.sin(6 * y) + s[0] * y + s[1] * x + s[2] * np.sin(9 * x * y)
    axes = {"time": UK_TIMES, "lat": package.grid.lat, "lon": package.grid.lon}
    dims = ("time", "ensemble", "lat", "lon")
    dataset = xr.Dataset({"t2m": (dims, values)}, coords=axes)
    return dataset if members > 1 else dataset.isel(ensemble=0)


def flow_reports():
    random = np.random.default_rng(3)
    rows = [
        (
            FLOW_TIME[0],
            random.uniform(0, 1),
            random.uniform(0, 1),
            3 * random.normal(),
            "vorticity",
            0.5,
        )
        for _ in range(60)
    ]
    columns = ["time", "lat", "lon", "observation", "variable", "observation_error"]
    return pd.DataFrame(rows, columns=columns)


def coarse_fields(shape, seed):
    return torch.from_numpy(2 * np.random.default_rng(seed).normal(size=shape)).float()


def generators(times):
    return [[member_generator(7, time, member) for member in range(2)] for time in times]


UK = {
    "uk_adaptive": {},
    "uk_jacobian": {
        "times": UK_TIMES[:1],
        "posterior": {
            "covariance": "jacobian",
            "iterations": 2,
            "guidance_interval": (0.1, 10.0),
        },
    },
    "uk_quality": {
        "posterior": {"inflation": 1.7},
        "quality": {"gross_error": 3.0, "thinning_km": 120.0},
    },
    "uk_superobbed": {
        "posterior": {"inflation": "none"},
        "quality": {"superob_km": 100.0, "duplicates": "average", "default_error": 0.7},
    },
    "uk_background": {"members": 1, "background": {"error": 1.1, "length": 250.0}},
    "uk_backgrounds": {
        "members": 2,
        "background": {"error": {"t2m": 0.8}},
        "posterior": {"inflation": 1.3},
    },
    "uk_finer": {
        "times": UK_TIMES[:1],
        "grid": LatLonGrid(np.arange(56.0, 52.0, -0.2), np.arange(-6.0, 0.0, 0.2)),
    },
}


@pytest.mark.parametrize("case", UK)
def test_analyses_of_two_metre_temperature(uk, case):
    options = dict(UK[case])
    times = options.pop("times", UK_TIMES)
    posterior = {"steps": 8, **options.pop("posterior", {})}
    if "background" in options:
        forecast = uk_forecast(uk, options.pop("members"))
        options["background"] = {**options["background"], "forecast": forecast}
    result = assimilate(uk, uk_reports(), times, ensemble=3, seed=5, posterior=posterior, **options)
    check(case, thinned(result.dataset))


FLOW = {
    "flow_adaptive": {},
    "flow_linear": {"covariance": "linear", "inflation": "none", "solver": "heun"},
    "flow_iterated": {"iterations": 3, "guidance_interval": (0.0, np.inf), "solver": "euler"},
}


@pytest.mark.parametrize("case", FLOW)
def test_analyses_of_vorticity(flow, case):
    result = assimilate(
        flow,
        flow_reports(),
        FLOW_TIME,
        ensemble=2,
        seed=5,
        posterior={"steps": 6, **FLOW[case]},
    )
    check(case, thinned(result.dataset))


def test_generated_fields(uk, flow):
    found = generate(uk, UK_TIMES, ensemble=2, seed=3, posterior={"steps": 8})
    check("uk_generated", thinned(found))
    found = generate(
        flow, FLOW_TIME, ensemble=2, seed=3, resolution=(96, 96), posterior={"steps": 6}
    )
    check("flow_finer", thinned(found))


def test_fields_from_coarse_ones(uk, flow):
    cells = CoarseGrid.of(uk.grid, 6.0)
    coarse = 281 + coarse_fields((2, 1, 1, *cells.shape), 4)
    found = super_resolve(
        uk, UK_TIMES, coarse, generators(UK_TIMES), cells=cells, posterior={"steps": 8}
    )
    check("uk_super_resolved", {"t2m": found[..., ::3, ::3]})
    cells = CoarseGrid.of(flow.grid, 8.0)
    found = super_resolve(
        flow,
        FLOW_TIME,
        coarse_fields((1, 1, 1, *cells.shape), 6),
        generators(FLOW_TIME),
        cells=cells,
        posterior={"steps": 6, "inflation": 1.2},
    )
    check("flow_super_resolved", {"vorticity": found[..., ::3, ::3]})
    package = Package.load("kolmogorov_superres")
    shape = package.task.coarse.shape(package.grid.shape)
    found = generate(
        package,
        FLOW_TIME,
        ensemble=2,
        seed=3,
        coarse=coarse_fields((1, package.task.span, 1, *shape), 8),
        posterior={"steps": 6},
    )
    check("superres_generated", thinned(found))


def test_trajectories():
    package = Package.load("kolmogorov_window")
    step = np.timedelta64(round(package.interval * 1e9), "ns")
    times = FLOW_TIME[0] + step * np.arange(4)
    found = generate(package, times, ensemble=1, seed=3, posterior={"steps": 4})
    check("window_generated", thinned(found))
    prior = TrajectoryPrior(package.operator, package.task.frames, 7, balance=0.5)
    random = np.random.default_rng(9)
    points = [
        PointOperator(package.grid, random.uniform(0, 1, 20), random.uniform(0, 1, 20), frame)
        for frame in range(7)
    ]
    values = torch.from_numpy(random.normal(size=140))
    observations = Observations(
        joined(points), values, torch.full((140,), 0.04, dtype=torch.float64)
    )
    own = package.posterior
    found = sample(
        MomentMatching(prior, observations, covariance="linear"),
        FieldNoiseScheduler(prior.noise, own.sigma_min, own.sigma_max, own.rho),
        2,
        steps=5,
        solver="dpmpp_2m_sde",
        generator=[torch.Generator().manual_seed(k) for k in range(2)],
    )
    check("window_posterior", {"vorticity": found[..., ::3, ::3]})
