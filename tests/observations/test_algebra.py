# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from tensors import randn

from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import BoxGrid, LatLonGrid
from ddo_modulus.fields.linalg import per_member
from ddo_modulus.observations import (
    AreaMeanOperator,
    DerivedOperator,
    LinearOperator,
    Observations,
    PointOperator,
    StackedOperator,
    wind_speed,
)

GRID = LatLonGrid(np.linspace(90, -90, 9), np.arange(16) * 22.5)
SHAPE = (2, *GRID.shape)
LAT = np.array([51.5, -12.0, 89.9, 0.0, 33.3])
LON = np.array([-0.1, 359.9, 100.0, 22.5, 400.0])


def points(channels=(0, 1, 0, 1, 1), moved=0.0):
    return PointOperator(GRID, LAT - np.sign(LAT) * moved, LON + moved, channels)


def area():
    return AreaMeanOperator(
        GRID, [-30, 40, -90], [30, 70, -60], [0, 315, 0], [90, 45, 359], [0, 1, 0]
    )


def per_analysis():
    """Three analyses with places of their own, and an offset."""
    rng = np.random.default_rng(0)
    operator = PointOperator(GRID, rng.uniform(-90, 90, (3, 4)), rng.uniform(-180, 180, (3, 4)), 1)
    return LinearOperator(operator.index, operator.weight, randn(3, 4))


LINEAR = {
    "points": points,
    "areas": area,
    "analyses": per_analysis,
    "stack": lambda: StackedOperator(points(), area(), points(1, 5.0)),
}
NONLINEAR = {
    "wind": lambda: wind_speed(points(0), points(1)),
    "product": lambda: DerivedOperator(lambda a, b: a * b.exp(), points(0), points(1, 3.0)),
    "stack": lambda: StackedOperator(area(), wind_speed(points(0), points(1)), points(0)),
}


def operators(*groups):
    table = {f"{i}-{name}": make for i, g in enumerate(groups) for name, make in g.items()}
    return pytest.mark.parametrize("make", table.values(), ids=table.keys())


# ---- linear operators ---------------------------------------------------------------------------


def test_points_read_a_bilinear_field():
    lat, lon = np.meshgrid(GRID.lat, GRID.lon, indexing="ij")
    state = torch.from_numpy(np.stack([lat + 0 * lon, 0.1 * lat]))[None]
    observed = PointOperator(GRID, [51.5, -12.0], [10.0, 200.0], [0, 1])(state)
    np.testing.assert_allclose(observed[0].numpy(), [51.5, -1.2], rtol=1e-6)


def test_coordinates_may_stand_for_the_grid():
    state = randn(1, *SHAPE)
    plain = PointOperator((GRID.lat, GRID.lon), LAT, LON, 1)
    assert torch.equal(plain(state), PointOperator(GRID, LAT, LON, 1)(state))


def test_points_on_the_grid_read_its_values():
    state = randn(3, *SHAPE)
    operator = PointOperator(GRID, GRID.lat[[2, 5]], GRID.lon[[7, 15]], [0, 1])
    expected = torch.stack([state[:, 0, 2, 7], state[:, 1, 5, 15]], 1)
    torch.testing.assert_close(operator(state), expected)


def test_points_either_side_of_the_seam_nearly_agree():
    state = randn(1, *SHAPE)
    west, east = PointOperator(GRID, [10.0, 10.0], [359.9, -0.1])(state)[0]
    assert west == east
    over = PointOperator(GRID, [10.0, 10.0], [-1e-5, 1e-5])(state)[0]
    assert abs(over[0] - over[1]) < 1e-4


@operators(LINEAR)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_adjoint_identity(make, dtype, tolerance):
    operator = make()
    v, u = randn(6, *SHAPE, dtype=dtype), randn(6, operator.size, seed=1, dtype=dtype)
    tangent = operator.linearize(v)
    assert tangent.linear
    left = (tangent(v).double() * u.double()).sum()
    right = (v.double() * tangent.adjoint(u, SHAPE).double()).sum()
    assert abs(left - right) < tolerance * float(v.norm() * u.norm())


@operators(LINEAR)
def test_operators_are_their_dense_matrices(make):
    operator = make()
    size = math.prod(SHAPE)
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *SHAPE)
    analyses = 3 if make is per_analysis else 1
    rows = operator.linearize(randn(analyses, *SHAPE)).rows(unit)  # T M N
    x = randn(6, *SHAPE)
    zero = operator(torch.zeros_like(x))
    expected = torch.einsum("bmn,bn->bm", per_member(rows, 6), x.flatten(1)) + zero
    torch.testing.assert_close(operator(x), expected)
    u = randn(6, operator.size, seed=1)
    adjoint = torch.einsum("bmn,bm->bn", per_member(rows, 6), u).unflatten(1, SHAPE)
    torch.testing.assert_close(operator.linearize(x).adjoint(u, SHAPE), adjoint)


def test_members_of_an_analysis_stand_next_to_each_other():
    operator = per_analysis()
    x = randn(6, *SHAPE)
    for analysis in range(3):
        alone = LinearOperator(
            operator.index[analysis], operator.weight[analysis], operator.offset[analysis]
        )
        members = slice(2 * analysis, 2 * analysis + 2)
        torch.testing.assert_close(operator(x)[members], alone(x[members]))
    with pytest.raises(InputError, match="4 states cannot be shared out to 3 analyses"):
        operator(x[:4])


def test_area_means():
    constant = torch.full((1, *SHAPE), 3.5, dtype=torch.float64)
    torch.testing.assert_close(
        area()(constant), torch.full((1, 3), 3.5).double(), rtol=1e-6, atol=0
    )
    x = randn(1, *SHAPE)
    rows = np.flatnonzero((GRID.lat >= 40) & (GRID.lat <= 70))
    columns = [14, 15, 0, 1, 2]  # 315, 337.5, 0, 22.5, 45: across the seam
    weight = np.cos(np.deg2rad(GRID.lat[rows]))
    zonal = x[0, 1].numpy()[np.ix_(rows, columns)].mean(1)
    assert float(area()(x)[0, 1]) == pytest.approx((weight * zonal).sum() / weight.sum(), rel=1e-6)
    with pytest.raises(InputError, match=r"50..52, 3..4 holds no grid point"):
        AreaMeanOperator(GRID, 50, 52, 3, 4)


def test_an_area_may_be_one_column_or_one_row():
    x = randn(1, *SHAPE)
    weight = np.cos(np.deg2rad(GRID.lat))
    meridian = AreaMeanOperator(GRID, -90, 90, GRID.lon[3], GRID.lon[3])(x)
    expected = (x[0, 0, :, 3].numpy() * weight).sum() / weight.sum()
    assert float(meridian) == pytest.approx(expected, rel=1e-5)
    circle = AreaMeanOperator(GRID, GRID.lat[2], GRID.lat[2], 0, 360)(x)
    assert float(circle) == pytest.approx(float(x[0, 0, 2].mean()), rel=1e-5)


def test_points_outside_are_refused():
    region = LatLonGrid(np.linspace(60, 50, 11), np.linspace(-8, 2, 11))
    with pytest.raises(InputError, match="1 of 2 locations are outside"):
        PointOperator(region, [55, 45], [0, 0])
    with pytest.raises(InputError, match="channels must not be negative"):
        PointOperator(region, [55], [0], -1)


def test_box_grids_take_points_too():
    grid = BoxGrid((8, 8))
    x = randn(1, 1, 8, 8)
    assert float(PointOperator(grid, 0.25, 0.5)(x)) == pytest.approx(float(x[0, 0, 2, 4]))


# ---- derived quantities -------------------------------------------------------------------------


def test_wind_speed():
    state = torch.zeros(1, *SHAPE, dtype=torch.float64)
    state[:, 0], state[:, 1] = 3.0, -4.0
    speed = wind_speed(points(0), points(1))
    torch.testing.assert_close(speed(state), torch.full((1, 5), 5.0).double(), rtol=1e-5, atol=0)
    calm = speed.linearize(torch.zeros_like(state))
    assert bool(calm.adjoint(torch.ones(1, 5).double(), SHAPE).isfinite().all())


@operators(NONLINEAR)
def test_tangents_agree_with_finite_differences(make):
    operator = make()
    x, v = randn(3, *SHAPE), randn(3, *SHAPE, seed=1)
    tangent = operator.linearize(x)
    assert not tangent.linear
    step = 1e-5
    difference = (operator(x + step * v) - operator(x - step * v)) / (2 * step)
    torch.testing.assert_close(tangent(v), difference, rtol=1e-6, atol=1e-6)


@operators(NONLINEAR)
def test_adjoint_identity_of_tangents(make):
    operator = make()
    x, v = randn(3, *SHAPE), randn(3, *SHAPE, seed=1)
    u = randn(3, operator.size, seed=2)
    tangent = operator.linearize(x)
    left, right = (tangent(v) * u).sum(), (v * tangent.adjoint(u, SHAPE)).sum()
    assert abs(left - right) < 1e-12 * float(v.norm() * u.norm())
    size = math.prod(SHAPE)
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *SHAPE)
    dense = torch.einsum("bmn,bn->bm", tangent.rows(unit), v.flatten(1))
    torch.testing.assert_close(tangent(v), dense)


def test_operators_are_differentiable():
    operator = NONLINEAR["stack"]()
    x = randn(2, *SHAPE).requires_grad_()
    u = randn(2, operator.size, seed=1)
    [gradient] = torch.autograd.grad((operator(x) * u).sum(), x)
    torch.testing.assert_close(gradient, operator.linearize(x).adjoint(u, SHAPE))


def test_stacks_observe_one_after_the_other():
    x = randn(2, *SHAPE)
    parts = points(), area(), wind_speed(points(0), points(1))
    stack = StackedOperator(*parts)
    assert stack.size == 13
    torch.testing.assert_close(stack(x), torch.cat([part(x) for part in parts], 1))


def test_derived_operators_observe_equally_often():
    with pytest.raises(InputError, match="must observe equally often"):
        wind_speed(points(0), area())


@operators(LINEAR, NONLINEAR)
@pytest.mark.parametrize("kind", ["channel", "point", "analysis"])
def test_rescaled_operators_observe_normalised_states(make, kind):
    operator = make()
    shape = {"channel": (2, 1, 1), "point": SHAPE, "analysis": (3, *SHAPE)}[kind]
    mean = randn(*shape, seed=5).expand(*shape[:-3], *SHAPE)
    std = randn(*shape, seed=6).exp().expand(*shape[:-3], *SHAPE)
    x = randn(6, *SHAPE)
    normalised = (
        (x - per_member(mean, 6)) / per_member(std, 6) if kind == "analysis" else (x - mean) / std
    )
    torch.testing.assert_close(
        operator.rescale(mean, std)(normalised), operator(x), rtol=1e-6, atol=1e-6
    )


# ---- observations -------------------------------------------------------------------------------


def test_errors_of_observations_become_matrices():
    operator = points()
    like = torch.zeros(1, dtype=torch.float64)
    r = Observations(operator, torch.zeros(5), 0.25).error_covariance(like)
    torch.testing.assert_close(r, 0.25 * torch.eye(5, dtype=torch.float64)[None])
    variance = torch.arange(1.0, 6.0)
    r = Observations(operator, torch.zeros(5), variance).error_covariance(like)
    torch.testing.assert_close(r[0], torch.diag(variance).double())
    root = randn(5, 5)
    full = root @ root.T + torch.eye(5)
    r = Observations(operator, torch.zeros(5).double(), covariance=full).error_covariance(like)
    torch.testing.assert_close(r[0], full)


def test_integers_are_observations_too():
    assert Observations(points(), torch.arange(5), 1).values.dtype == torch.float32


def test_batched_analyses_equal_single_ones():
    rng = np.random.default_rng(0)
    parts = []
    for size in (2, 5, 3):
        operator = PointOperator(GRID, rng.uniform(-90, 90, size), rng.uniform(0, 360, size), 1)
        values = torch.from_numpy(rng.normal(size=size))
        parts.append(Observations(operator, values, torch.from_numpy(rng.uniform(0.1, 1, size))))
    parts.append(Observations(area(), torch.zeros(3).double(), 0.3))
    together = Observations.batch(parts)
    assert together.operator.size == 5
    x = randn(8, *SHAPE)
    observed = together.operator(x)
    errors = together.error_covariance(x)
    for analysis, part in enumerate(parts):
        members, size = slice(2 * analysis, 2 * analysis + 2), part.operator.size
        torch.testing.assert_close(observed[members, :size], part.operator(x[members]))
        assert bool((observed[members, size:] == 0).all())
        torch.testing.assert_close(together.values[analysis, :size], part.values)
        torch.testing.assert_close(errors[analysis, :size, :size], part.error_covariance(x)[0])
        # What pads has an error of its own and shares none.
        torch.testing.assert_close(
            errors[analysis, size:], torch.eye(5, dtype=torch.float64)[size:]
        )
    gradient = together.operator.linearize(x).adjoint(torch.ones(8, 5).double(), SHAPE)
    alone = parts[0].operator.linearize(x[:2]).adjoint(torch.ones(2, 2).double(), SHAPE)
    torch.testing.assert_close(gradient[:2], alone)


def test_rescaled_observations_keep_values_and_errors():
    observations = Observations(points(), randn(5), 0.3)
    mean, std = randn(*SHAPE), randn(*SHAPE).exp()
    again = observations.rescale(mean, std)
    assert torch.equal(again.values, observations.values)
    assert torch.equal(again.variance, observations.variance)
    full = Observations(points(), randn(5), covariance=torch.eye(5)).rescale(mean, std)
    assert full.variance is None and full.covariance is not None


def test_only_what_fits_one_matrix_batches():
    linear = Observations(points(), torch.zeros(5), 1.0)
    wind = Observations(wind_speed(points(0), points(1)), torch.zeros(5), 1.0)
    full = Observations(points(), torch.zeros(5), covariance=torch.eye(5))
    for other in (wind, full):
        for parts in ([linear, other], [other, other]):
            with pytest.raises(InputError, match="only linear operators with diagonal errors"):
                Observations.batch(parts)
    with pytest.raises(InputError, match="no analyses"):
        Observations.batch([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.tensor([1.0, math.nan, math.inf, 0, 0])}, "2 observed values are NaN"),
        ({"values": torch.zeros(4)}, "4 values do not fit an operator of 5"),
        ({"variance": -1.0}, "variances must be positive"),
        ({"variance": torch.tensor([1.0, 0.0, 1, 1, 1])}, "variances must be positive"),
        ({"variance": math.nan}, "variances must be positive"),
        ({"variance": torch.ones(3)}, r"variances of shape \(3,\) do not fit 5"),
        ({"variance": None}, "either the variance or the covariance"),
        ({"covariance": torch.eye(5)}, "either the variance or the covariance"),
        ({"variance": None, "covariance": torch.eye(4)}, "must be 5x5"),
        ({"variance": None, "covariance": -torch.eye(5)}, "not symmetric positive definite"),
        (
            {"variance": None, "covariance": torch.eye(5) + torch.eye(5).roll(1, 1).triu(1) / 4},
            "not symmetric positive definite",
        ),
        ({"operator": PointOperator(GRID, [], [])}, "there are no observations"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"operator": points(), "values": torch.zeros(5), "variance": 1.0} | change
    with pytest.raises(InputError, match=message):
        Observations(**arguments)
