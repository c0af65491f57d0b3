# SPDX-License-Identifier: Apache-2.0
"""Super-resolution: the coarse cells, and draws that belong to them."""

import numpy as np
import pytest
import torch
from packages import conditional

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.task import CoarseWindow
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import BoxGrid, LatLonGrid
from ddo_modulus.inference.assimilate import member_generator
from ddo_modulus.inference.generate import generate
from ddo_modulus.inference.super_resolve import CoarseGrid, conditioned, super_resolve

TIMES = np.array(["2020-01-01T05", "2020-06-01T17"], "datetime64[ns]")
GLOBAL = LatLonGrid(np.linspace(90, -90, 13), np.arange(24) * 15.0)
UK = LatLonGrid(np.arange(58.0, 49.9, -0.25), np.arange(-10.0, 2.1, 0.25))


def generators(count, members, seed=0):
    return [[member_generator(seed, t, e) for e in range(members)] for t in TIMES[:count]]


def uniform(package, mean=280.0, std=3.0):
    """The package with statistics that are the same at all points and hours."""
    size = (1, len(package.channels), 1, 1)
    statistics = Normalization(package.channels, torch.full(size, mean), torch.full(size, std))
    return Package(
        package.operator, package.grid, statistics, package.units, package.posterior, package.task
    )


# ---- the cells --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 2.5, 4])
@pytest.mark.parametrize("periodic", [True, False])
def test_blocks_of_a_box_are_those_of_the_coarse_window(factor, periodic):
    grid, window = BoxGrid((8, 20), periodic=periodic), CoarseWindow(factor)
    x = torch.randn(2, 3, 8, 20, dtype=torch.float64)
    cells = CoarseGrid.blocks(grid, window)
    torch.testing.assert_close(cells.means(x, grid), window.view(x))
    # On the globe's grids the points weigh by their area.
    area = torch.from_numpy(UK.area()).expand(1, 1, -1, -1)
    y, cells = torch.randn_like(area), CoarseGrid.of(UK, factor)
    mean = CoarseWindow(factor).view(area * y) / CoarseWindow(factor).view(area)
    torch.testing.assert_close(cells.means(y, UK), mean)


@pytest.mark.parametrize(
    ("cells", "points"),
    [
        # Half of the points on the border of a degree, all of those inside; across Greenwich.
        (CoarseGrid([57.5, 56.5], [359.5, 0.5]), [(8, -1.0, 0.0), (8, 0.0, 1.0)]),
        (CoarseGrid([56.5, 57.5], [-0.5, 0.5]), [(4, -1.0, 0.0), (4, 0.0, 1.0)]),
    ],
)
def test_a_mean_over_a_degree(cells, points):
    lat, lon = np.meshgrid(UK.lat, UK.lon, indexing="ij")
    means = cells.means(torch.from_numpy(lat + lon**2), UK)
    north = 57.0 if cells.lat[0] > 57 else 56.0
    inside = np.abs(UK.lat - north - 0.5) <= 0.5 + 1e-9
    row = np.where(np.abs(UK.lat - north - 0.5) > 0.49, 0.5, 1.0) * inside
    row = row * np.cos(np.deg2rad(UK.lat))
    for j, (_, west, east) in enumerate(points):
        column = np.where((UK.lon > west) & (UK.lon < east), 1.0, 0.0)
        column[(UK.lon == west) | (UK.lon == east)] = 0.5
        weight = row[:, None] * column
        expected = (weight * (lat + lon**2)).sum() / weight.sum()
        assert float(means[0, j]) == pytest.approx(expected, rel=1e-12)


def test_coarse_cells_of_the_globe_keep_the_mean_and_the_poles():
    cells = CoarseGrid.of(GLOBAL, 3)
    assert cells.shape == (5, 8)
    assert (cells.lat[[0, -1]] == [90, -90]).all() and cells.lon[0] == GLOBAL.lon[0]
    rows, columns = cells.weights(GLOBAL)
    # Weighted by the areas of the cells, which are positive, their means have the field's mean.
    for weights, area in ((rows, GLOBAL.area()[:, 0]), (columns, np.ones(24))):
        held = torch.linalg.lstsq(weights.mT, torch.from_numpy(area)).solution
        assert (held > 0).all()
        torch.testing.assert_close(held @ weights, torch.from_numpy(area), rtol=0, atol=2e-6)
    # The first column of cells lies on both sides of the seam.
    assert columns[0, 0] > 0 and columns[0, -1] > 0 and columns[0, 2] == 0


@pytest.mark.parametrize("grid", [UK, GLOBAL, BoxGrid((12, 16))], ids=["region", "globe", "torus"])
def test_the_operator_takes_the_means(grid):
    cells = CoarseGrid.of(grid, 3.5)
    x = torch.randn(2, 3, *grid.shape, dtype=torch.float64)
    expected = cells.means(x, grid).flatten(1)
    torch.testing.assert_close(cells.operator(grid, 3)(x), expected, rtol=1e-5, atol=1e-6)


def test_other_branches_of_longitude_and_other_directions_are_the_same_cells():
    west, east = (CoarseGrid([55.5, 54.5], np.array([-1.5, -0.5, 0.5]) + turn) for turn in (0, 360))
    x = torch.randn(1, *UK.shape, dtype=torch.float64)
    torch.testing.assert_close(west.means(x, UK), east.means(x, UK))
    north = CoarseGrid([54.5, 55.5], west.lon)
    torch.testing.assert_close(north.means(x, UK), west.means(x, UK).flip(1))


@pytest.mark.parametrize(
    ("lat", "lon", "message"),
    [
        ([58.0, 57.0], [0.0, 1.0], "1 of 2 coarse cells reach out of the grid.*lat=58.*49.875"),
        ([57.0, 56.0], [1.5, 2.5], "1 of 2 coarse cells reach out of the grid.*lon=2.5"),
        ([57.0, 56.0, 54.0], [0.0, 1.0], "coarse lat is not evenly spaced"),
        ([57.0], [0.0, 1.0], "coarse lat must be at least two"),
        ([57.0, 56.0], [1.0, 0.0], "coarse lon must ascend"),
        ([57.0, np.nan], [0.0, 1.0], "finite"),
    ],
)
def test_cells_that_the_grid_does_not_cover(lat, lon, message):
    with pytest.raises(InputError, match=message):
        CoarseGrid(lat, lon).weights(UK)


def test_cells_that_go_round_twice():
    with pytest.raises(InputError, match="overlap"):
        CoarseGrid([30.0, 0.0], np.arange(14) * 30.0).weights(GLOBAL)


# ---- a prior, given the cells -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("covariance", "inflation"), [("linear", "none"), ("linear", 2.5), ("jacobian", 2.5)]
)
def test_an_untrained_prior_gives_optimal_interpolation(
    untrained, prior, affine_law, dense, covariance, inflation
):
    package = untrained()
    package.operator.double()
    grid = package.grid
    cells, error = CoarseGrid.of(grid, 2), 0.05
    means = 283 + 2 * torch.randn(1, 1, *cells.shape, dtype=torch.float64)
    denoiser = conditioned(
        package,
        TIMES[:1],
        means,
        cells,
        error=error,
        posterior={"inflation": inflation, "covariance": covariance, "iterations": 2},
    )
    noise = package.operator.noise
    mean, covariance_ = affine_law(
        lambda x, sigma, c: denoiser(x, sigma, package.conditions(TIMES[:1]).expand(len(x), -1)),
        noise,
        steps=32,
        sigma_min=1e-3,
        rho=20.0,
    )
    # The same in physical units, by dense matrices.
    hour = 5
    m, s = (
        v[hour].double().flatten() for v in (package.normalization.mean, package.normalization.std)
    )
    factor = 1.0 if inflation == "none" else inflation
    b = factor * s[:, None] * dense(prior(noise).cov, (1, *grid.shape)) * s
    h = dense(lambda x: cells.means(x[:, 0], grid), (1, *grid.shape))
    r = (error * s.mean()) ** 2 * torch.eye(len(h), dtype=torch.float64)
    gain = b @ h.mT @ torch.linalg.inv(h @ b @ h.mT + r)
    analysis = m + gain @ (means.flatten() - h @ m)
    torch.testing.assert_close(m + s * mean, analysis, rtol=0, atol=0.02 * float(s.mean()))
    expected = b - gain @ h @ b
    error_ = (s[:, None] * covariance_ * s - expected).norm() / expected.norm()
    assert error_ < 0.03


def test_draws_keep_the_coarse_field_and_differ_below_it(untrained):
    package = untrained()
    cells = CoarseGrid.of(package.grid, 2)
    generator = torch.Generator().manual_seed(3)
    coarse = 283 + 2 * torch.randn(2, 1, 1, *cells.shape, generator=generator)
    states = super_resolve(package, TIMES, coarse, generators(2, 24), cells=cells)
    assert states.shape == (2, 24, 1, *package.grid.shape) and states.dtype == torch.float32
    std = float(package.normalization.std.mean())
    again = cells.means(states, package.grid)
    assert (again - coarse).square().mean().sqrt() < 0.03 * std
    spread = states.std(1).mean() / std
    assert 0.1 < spread < 0.9


def test_a_draw_depends_on_nothing_but_its_own_field_time_and_generator(untrained):
    package = untrained()
    cells = CoarseGrid.of(package.grid, 2)
    coarse = 283 + torch.randn(2, 1, 1, *cells.shape)

    def run(which, members, batch):
        return super_resolve(
            package,
            TIMES[which],
            coarse[which],
            [generators(2, members)[t] for t in range(2)[which]],
            cells=cells,
            posterior={"steps": 4, "batch": batch},
        )

    together = run(slice(0, 2), 3, 64)
    for batch in (1, 2, 5):
        torch.testing.assert_close(run(slice(0, 2), 3, batch), together, rtol=0, atol=2e-3)
    torch.testing.assert_close(run(slice(1, 2), 2, 64), together[1:, :2], rtol=0, atol=2e-3)
    assert (together[0, 0] - together[0, 1]).abs().mean() > 0.05


def test_a_finer_grid_sees_the_same_cells(untrained):
    package = uniform(untrained())
    cells = CoarseGrid.of(package.grid, 2)
    coarse = 281 + torch.randn(1, 1, 1, *cells.shape)
    fine = super_resolve(package, TIMES[:1], coarse, generators(1, 4), cells=cells, shape=(12, 16))
    assert fine.shape == (1, 4, 1, 12, 16)
    again = cells.means(fine, package.grid.at((12, 16)))
    assert (again - coarse).square().mean().sqrt() < 0.1


def test_inflation_widens_where_the_field_is_far_from_the_prior(untrained):
    package = untrained()
    cells = CoarseGrid.of(package.grid, 2)
    climate = package.normalization.mean[5].expand(1, *package.grid.shape)[None, None]
    far = cells.means(climate, package.grid) + 15 * torch.randn(1, 1, 1, *cells.shape).sign()
    spread = [
        super_resolve(
            package,
            TIMES[:1],
            far,
            generators(1, 16),
            cells=cells,
            posterior={"inflation": inflation},
        )
        .std(1)
        .mean()
        for inflation in ("none", "adaptive")
    ]
    assert spread[1] > 1.5 * spread[0]


def test_progress_counts_to_its_total(untrained):
    package, calls = untrained(), []
    cells = CoarseGrid.of(package.grid, 2)
    coarse = torch.full((2, 1, 1, *cells.shape), 283.0)
    super_resolve(
        package,
        TIMES,
        coarse,
        generators(2, 3),
        cells=cells,
        posterior={"steps": 2, "batch": 2},
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (12, 12) and [d for d, _ in calls] == sorted(d for d, _ in calls)


# ---- a package that was trained for it --------------------------------------------------------


@pytest.fixture
def trained():
    """A package with a coarse view of three frames."""
    return conditional((1 / 3, 1 / 3, 1 / 3), mean=1.0, std=2.0)


@pytest.mark.parametrize("shape", [None, (16, 16)])
def test_a_conditional_package_draws_as_generate_does(trained, shape):
    coarse = torch.randn(2, 3, 1, 4, 4)
    states = super_resolve(trained, TIMES, coarse, generators(2, 3), shape=shape)
    same = generate(trained, TIMES, ensemble=3, coarse=coarse, resolution=shape)
    expected = torch.from_numpy(same["vorticity"].values).transpose(0, 1)
    torch.testing.assert_close(states[:, :, 0], expected)


# ---- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coarse": lambda c: c - 273.15}, "degrees Celsius"),
        ({"coarse": lambda c: c.where(c != c[0, 0, 0, 0, 0], torch.nan)}, "t2m has 1 missing"),
        ({"coarse": lambda c: c[..., 1:]}, "have shape"),
        ({"cells": None}, "takes coarse cells"),
        ({"error": 0.0}, "error=0.0 must be positive"),
        ({"posterior": {"inflation": "some"}}, "inflation=some must be a number from 0.01 to 100"),
        ({"posterior": {"inflation": -1.0}}, "inflation=-1.0 must be"),
        ({"posterior": {"covariance": "none"}}, "covariance=none must be one of jacobian, linear"),
        ({"shape": (12, 16)}, "draws on its own grid only"),
        ({"posterior": {"solver": "none"}}, "solver=none must be one of euler"),
    ],
)
def test_mistakes_are_told_before_work(untrained, change, message):
    package = untrained()
    cells = CoarseGrid.of(package.grid, 2)
    coarse = 283 + torch.rand(1, 1, 1, *cells.shape)
    if "coarse" in change:
        coarse = change.pop("coarse")(coarse)
    arguments = {"cells": cells, **change}
    with pytest.raises(InputError, match=message):
        super_resolve(package, TIMES[:1], coarse, generators(1, 2), **arguments)


def test_each_package_goes_one_way(trained, untrained):
    cells = CoarseGrid.of(trained.grid, 2)
    with pytest.raises(InputError, match="no coarse cells, since its own are part of it"):
        super_resolve(trained, TIMES[:1], torch.zeros(1, 3, 1, 4, 4), generators(1, 1), cells=cells)
    with pytest.raises(InputError, match="prior of single states"):
        conditioned(trained, TIMES[:1], torch.zeros(1, 1, 4, 4), cells)
