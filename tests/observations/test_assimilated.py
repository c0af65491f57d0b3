# SPDX-License-Identifier: Apache-2.0
"""Reports of every kind assimilated, against optimal interpolation with dense matrices.

The prior is Gaussian (the network is zero), so a call of the posterior is one Gauss-Newton step
with its covariance, and a member without noise ends at the mean or, where the reports are not
linear, near the most probable state. What the reports would be is written down here once more, by
itself.
"""

import json
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.inference.assimilate import assimilate
from ddo_modulus.inference.reports import report_operators
from ddo_modulus.observations import Observations, ProfileRadiance
from ddo_modulus.observations.table import read_table
from ddo_modulus.posterior import MomentMatching

TIME = np.datetime64("2019-03-27T06", "ns")
PLACES = [(1, 2), (4, 5), (3, 0)]  # grid points


def es(t):
    return 611.21 * torch.exp(17.502 * (t - 273.16) / (t - 32.19))


def mixing(e, p):
    return 0.62198 * e / (p - 0.37802 * e)


def height(p, t, rise):
    return p * (1 - 0.0065 * rise / t) ** 5.25588


def turned(u, v, reported):
    away = torch.rad2deg(torch.atan2(-u, -v)) - reported
    sure = 1 - 0.25 / (u**2 + v**2 + 0.25)
    return reported + sure * ((away + 180) % 360 - 180)


def share(low, high, p):
    """Weight of the lower level."""
    return np.log(p / high) / np.log(low / high)


def square(profile):
    return (profile[..., :1] - 230) ** 2 / 200 + profile[..., 1:]


# Channels with their means and standard deviations; then reports: variable, the columns, error, and
# what it is of the channels at its place and the rise to the station (210 m).
CASES = {
    "stations": (
        {"t2m": (284, 3), "d2m": (279, 3), "sp": (98e3, 600)},
        [
            ("t2m", {}, 0.7, lambda t, d, p: t - 0.0065 * 210),
            ("d2m", {}, 0.8, lambda t, d, p: d),
            ("r2m", {}, 4.0, lambda t, d, p: 100 * es(d) / es(t)),
            ("q2m", {}, 3e-4, lambda t, d, p: mixing(es(d), p)),
            ("sp", {}, 80.0, lambda t, d, p: height(p, t, 210)),
            ("msl", {}, 80.0, lambda t, d, p: height(p, t, -140)),
        ],
    ),
    "wind": (
        {"u10m": (14, 2), "v10m": (-2, 2)},
        [
            ("wd10m", {}, 8.0, lambda u, v: turned(u, v, 290.0)),
            ("ws10m", {}, 1.0, lambda u, v: torch.hypot(u, v)),
            ("u10m", {}, 1.5, lambda u, v: u),
        ],
    ),
    "northerly": (  # across the seam of directions
        {"u10m": (0.5, 2), "v10m": (-20, 2)},
        [("wd10m", {}, 4.0, lambda u, v: turned(u, v, 4.0))],
    ),
    "aloft": (
        {"t850": (275, 3), "t500": (252, 3), "q850": (4e-3, 5e-4), "q500": (1e-3, 2e-4)},
        [
            ("t", {"pres": 6e4}, 1.0, lambda a, b, c, d: b + share(850, 500, 600) * (a - b)),
            ("t700", {}, 1.0, lambda a, b, c, d: b + share(850, 500, 700) * (a - b)),
            (
                "r",
                {"pres": 8.5e4},
                6.0,
                lambda a, b, c, d: 100 * c * 85e3 / (0.62198 + 0.37802 * c) / es(a),
            ),
        ],
    ),
    "radiance": (
        {"t850": (275, 3), "t500": (252, 3), "t250": (222, 3)},
        [
            (
                "amsua",
                {"sensor_index": 6},
                0.5,
                lambda a, b, c: sum(w * t for w, t in zip(AMSUA_6, (a, b, c), strict=True)),
            ),
            (
                "sensor",
                {"sensor_index": 2},
                0.5,
                lambda a, b, c: square(torch.stack([b, c], -1))[..., 0],
            ),
        ],
    ),
}


def quadrature(levels, peak):
    """Weights of levels by another rule than the package's: midpoints in pressure."""
    edge = np.linspace(levels[-1], levels[0], 400001)
    middle = (edge[1:] + edge[:-1]) / 2
    emitted = 2 * middle / peak**2 * np.exp(-((middle / peak) ** 2))
    hats = [np.interp(np.log(middle), np.log(levels[::-1]), row) for row in np.eye(3)[::-1]]
    weights = np.array([(hat * emitted).sum() for hat in hats])
    return weights / weights.sum()


AMSUA_6 = quadrature([850.0, 500.0, 250.0], 400.0)


def built(untrained, name):
    """The package of a case, its operators, and a table with every report at every place."""
    channels, reports = CASES[name]
    units = tuple("K" for _ in channels)
    package = untrained(tuple(channels), units)
    generator = torch.Generator().manual_seed(3)
    value, deviation = torch.tensor(list(channels.values())).T[:, None, :, None, None]
    shape = (24, len(channels), *package.grid.shape)
    mean = value + 0.3 * deviation * torch.randn(shape, generator=generator)
    std = deviation * (0.8 + 0.4 * torch.rand(shape, generator=generator))
    package.normalization = Normalization(tuple(channels), mean, std)
    package.orography = np.full(package.grid.shape, 140.0)
    operators = report_operators(package)
    if name == "radiance":
        model = ProfileRadiance(square, ("t500", "t250"), (2,))
        operators = replace(operators, radiances={**operators.radiances, "sensor": model})
    rows = []
    for i, j in PLACES:
        for variable, columns, error, function in reports:
            truth = function(*(mean[6, :, i, j].double() + 0.7 * std[6, :, i, j].double()))
            observation = {"wd10m": 290.0 if name == "wind" else 4.0}.get(variable, float(truth))
            rows.append(
                {
                    "time": TIME,
                    "lat": package.grid.lat[i],
                    "lon": package.grid.lon[j],
                    "elev": 350.0,
                    "variable": variable,
                    "observation": observation,
                    "observation_error": error,
                    **columns,
                }
            )
    return package, operators, pd.DataFrame(rows)


def predicted(package, name):
    """Dense observation function of a flat state in physical units, in the order of the table."""
    shape = (len(package.channels), *package.grid.shape)

    def h(x):
        x = x.reshape(shape)
        return torch.stack(
            [function(*x[:, i, j]) for i, j in PLACES for *_, function in CASES[name][1]]
        )

    return h


def statistics(package, prior):
    """Mean and covariance of the prior, and covariance of the noise, in physical units, flat."""
    shape = (len(package.channels), *package.grid.shape)
    unit = torch.eye(int(np.prod(shape)), dtype=torch.float64).unflatten(1, shape)
    mean, std = (
        s[6].double().flatten() for s in (package.normalization.mean, package.normalization.std)
    )
    noise = package.operator.noise
    p, c = prior(noise).cov(unit).flatten(1), noise.cov(unit).flatten(1)
    return mean, std[:, None] * p * std, std[:, None] * c * std


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("covariance", ["linear", "jacobian"])
def test_a_call_is_one_gauss_newton_step(untrained, prior, name, covariance):
    package, operators, frame = built(untrained, name)
    operator, ordered = operators.operator(frame)
    shape = (len(package.channels), *package.grid.shape)
    mean, std = (s[6].double() for s in (package.normalization.mean, package.normalization.std))
    y = torch.tensor(ordered["observation"].tolist(), dtype=torch.float64)
    r = torch.tensor(ordered["observation_error"].tolist()).double() ** 2
    observations = Observations(operator, y, r).rescale(mean, std)
    denoiser = package.operator.double()
    posterior = MomentMatching(denoiser, observations, covariance=covariance, iterations=12)
    m, p, c = statistics(package, prior)
    h = predicted(package, name)
    order = torch.tensor(ordered.index.to_numpy())
    for level in (0.1, 1.0):
        sigma = torch.full((2,), level, dtype=torch.float64)
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5)).double()
        condition = package.conditions(np.array([TIME, TIME])).double()
        found = posterior(x, sigma, condition) * std + mean
        wiener = p @ torch.linalg.inv(p + level**2 * c)
        v = p - wiener @ p
        for state, result in zip(x, found, strict=True):
            physical = (state * std + mean).flatten()
            clean = m + wiener @ (physical - m)
            jacobian = torch.autograd.functional.jacobian(h, clean)[order]
            system = jacobian @ v @ jacobian.T + torch.diag(r)
            step = v @ jacobian.T @ torch.linalg.solve(system, y - h(clean)[order])
            error = (result.flatten() - clean - step) / std.flatten()
            assert error.norm() < 2e-3 * (step / std.flatten()).norm()


class _Silent(FieldNoiseScheduler):
    """Draws no noise."""

    def draw(self, like, generator=None):
        return torch.zeros_like(like)


@pytest.mark.parametrize("name", CASES)
def test_analyses_are_those_of_gauss_newton(untrained, prior, monkeypatch, name):
    package, operators, frame = built(untrained, name)
    monkeypatch.setattr(PosteriorConfig, "scheduler", lambda self, noise: _Silent(noise, 0.01, 3e3))
    result = assimilate(
        package,
        read_table(frame),
        [TIME],
        ensemble=1,
        posterior={"inflation": "none", "covariance": "linear", "steps": 32},
        quality={"operators": operators},
    ).dataset
    found = np.stack([result[name].values[0, 0] for name in package.channels])
    m, p, _ = statistics(package, prior)
    h = predicted(package, name)
    y = torch.tensor(frame["observation"].tolist(), dtype=torch.float64)
    r = torch.diag(torch.tensor(frame["observation_error"].tolist()).double() ** 2)
    x = m
    for _ in range(30):  # converged long before
        jacobian = torch.autograd.functional.jacobian(h, x)
        system = jacobian @ p @ jacobian.T + r
        x = m + p @ jacobian.T @ torch.linalg.solve(system, y - h(x) + jacobian @ (x - m))
    deviation = p.diagonal().sqrt()
    error = (torch.from_numpy(found).double().flatten() - x) / deviation
    assert ((x - m) / deviation).abs().max() > 0.4  # there was something to find
    assert error.abs().max() < 0.08
    for variable in frame["variable"].unique():
        here = (frame["variable"] == variable).to_numpy()
        expected = float((y - h(m))[torch.tensor(here.tolist())].square().mean().sqrt())
        assert float(result[f"{variable}_omb"][0]) == pytest.approx(expected, rel=1e-3)
        assert result[f"{variable}_oma"][0] < result[f"{variable}_omb"][0]


def test_reports_that_cannot_be_used_are_counted_and_told(untrained, caplog):
    package, operators, frame = built(untrained, "aloft")
    high = frame.iloc[[0]].assign(pres=2e4)
    nowhere = frame.iloc[[0]].assign(pres=np.nan, lat=53.0)
    table = read_table(pd.concat([frame, high, nowhere]))
    analysed = assimilate(package, table, [TIME], ensemble=1, posterior={"steps": 2})
    result = analysed.dataset
    dropped = {"outside the pressure levels": 1, "no pressure": 1}
    assert analysed.dropped == dropped and analysed.notes == {}
    assert json.loads(result.attrs["dropped"]) == dropped
    assert int(result["dropped"][0]) == 2
    assert result["t_omb"].attrs["units"] == "K" and result["r_omb"].attrs["units"] == "%"
    assert json.loads(result.attrs["notes"]).keys() == {"sampling"}  # two steps are few
    package, operators, frame = built(untrained, "stations")
    package.orography = None
    frame = frame[frame["variable"] != "msl"]
    with caplog.at_level(logging.INFO, "ddo_modulus"):
        analysed = assimilate(
            package, read_table(frame), [TIME], ensemble=1, posterior={"steps": 2}
        )
    result = analysed.dataset
    notes = {f"{name} without correction for height": 3 for name in ("t2m", "sp")}
    stated = json.loads(result.attrs["notes"])
    assert analysed.notes == notes == {k: n for k, n in stated.items() if k != "sampling"}
    notices = [record.getMessage() for record in caplog.records if "height" in record.getMessage()]
    assert notices == [f"{note}: 3 reports" for note in notes]


def test_packages_carry_their_orography(untrained, tmp_path):
    package = untrained()
    package.save(tmp_path / "without")
    assert Package.load(tmp_path / "without").orography is None
    package.orography = np.arange(48.0).reshape(6, 8)
    package.save(tmp_path / "with")
    np.testing.assert_array_equal(Package.load(tmp_path / "with").orography, package.orography)
    with_surface = untrained(("t2m", "z"), ("K", "m2/s2"))
    expected = with_surface.normalization.mean[:, 1].double().mean(0) / 9.80665
    np.testing.assert_allclose(with_surface.orography, expected, atol=1e-6)
