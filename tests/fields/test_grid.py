# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.grid import BoxGrid, LatLonGrid, overlaps
from ddo_modulus.fields.spherical_basis import SphericalBasis

POLES = LatLonGrid(np.linspace(90, -90, 13), np.arange(24) * 15.0)
CENTRES = LatLonGrid(90 - (np.arange(12) + 0.5) * 15.0, np.arange(24) * 15.0)
SOUTH_UP = LatLonGrid(np.linspace(-90, 90, 13), -180 + np.arange(24) * 15.0)
REGION = LatLonGrid(np.linspace(61, 49, 13), np.linspace(-8, 2, 21))
SEAM = LatLonGrid(np.linspace(61, 49, 13), np.linspace(352, 362, 21))


def interpolate(grid, values, lat, lon):
    index, weight = grid.bilinear(lat, lon)
    assert index.shape == weight.shape == (*np.shape(lat), 4)
    np.testing.assert_allclose(weight.sum(-1), 1.0)
    assert (weight >= 0).all()
    return (np.asarray(values).reshape(-1)[index] * weight).sum(-1)


def places(grid, n=200, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.uniform(grid.lat.min(), grid.lat.max(), n),
        rng.uniform(grid.lon.min(), grid.lon.max(), n),
    )


@pytest.mark.parametrize(
    "grid",
    [
        REGION,
        SEAM,
        CENTRES,
        POLES,
        SOUTH_UP,
        BoxGrid((7, 9), (1.0, 2.0)),
        BoxGrid((7, 9), (1.0, 2.0), periodic=False),
    ],
)
def test_bilinear_functions_are_interpolated_exactly(grid):
    lat, lon = places(grid)

    def function(lat, lon):
        return 3 + 0.5 * lat - 0.2 * lon + 0.01 * lat * lon

    values = function(*np.meshgrid(grid.lat, grid.lon, indexing="ij"))
    np.testing.assert_allclose(interpolate(grid, values, lat, lon), function(lat, lon), atol=1e-9)


@pytest.mark.parametrize("grid", [REGION, SEAM, CENTRES, POLES, SOUTH_UP])
def test_grid_points_are_met_exactly(grid):
    lat, lon = np.meshgrid(grid.lat, grid.lon, indexing="ij")
    values = np.random.default_rng(0).normal(size=grid.shape)
    interior = slice(1, -1)  # on pole rows any longitude is the same place
    np.testing.assert_allclose(
        interpolate(grid, values, lat, lon)[interior], values[interior], atol=1e-9
    )


@pytest.mark.parametrize("grid", [POLES, CENTRES, SOUTH_UP])
def test_longitudes_wrap(grid):
    values = np.random.default_rng(1).normal(size=grid.shape)
    lat, lon = places(grid)
    expected = interpolate(grid, values, lat, lon)
    for turn in (-720, -360, 360):
        np.testing.assert_allclose(interpolate(grid, values, lat, lon + turn), expected)
    west, east, branch = (
        interpolate(grid, values, np.array([12.3]), np.array([lon])) for lon in (359.9, 0.1, -0.1)
    )
    np.testing.assert_allclose(branch, west)
    slope = np.abs(np.diff(values)).max() / 15
    assert abs(west - east) < 0.2 * slope * 2


def test_between_the_last_and_the_first_meridian():
    values = np.zeros(POLES.shape)
    values[:, 0], values[:, -1] = 1.0, 3.0
    assert interpolate(POLES, values, 0.0, 352.5) == pytest.approx(2.0)
    assert interpolate(POLES, values, 0.0, -3.0) == pytest.approx(1.4)


@pytest.mark.parametrize("grid", [POLES, CENTRES, SOUTH_UP])
@pytest.mark.parametrize("sign", [1, -1])
def test_values_are_continuous_across_a_pole(grid, sign):
    """A smooth function of space: a path over the pole sees no jump and the right value."""
    lat, lon = np.deg2rad(np.meshgrid(grid.lat, grid.lon, indexing="ij"))
    values = np.cos(lat) * np.cos(lon) + 2 * np.sin(lat)  # x + 2 z

    def at(latitude, longitude):
        return float(interpolate(grid, values, sign * latitude, longitude))

    here, there = at(89.9, 40.0), at(89.9, 220.0)
    exact = np.cos(np.deg2rad(89.9)) * np.cos(np.deg2rad(40))
    # Bilinear interpolation sees the curvature of 2 z, but the same one on both sides.
    assert here - there == pytest.approx(2 * exact, abs=1e-3)
    assert at(90.0, 40.0) == pytest.approx(at(90.0, 220.0), abs=1e-9)
    assert at(90.0, 40.0) == pytest.approx(2 * sign, abs=0.03)
    path = [at(latitude, 40.0) for latitude in np.linspace(80, 90, 101)]
    path += [at(latitude, 220.0) for latitude in np.linspace(90, 80, 101)]
    assert np.abs(np.diff(path)).max() < 0.01


def test_global_grids_hold_every_place():
    for grid in (POLES, CENTRES, SOUTH_UP):
        assert grid.is_global
        assert grid.contains([90.0, -90.0, 0.0], [0.0, 1234.5, -179.99]).all()
        assert not grid.contains([np.nan, 0.0], [0.0, np.inf]).any()
    band = LatLonGrid(np.linspace(60, -60, 25), np.arange(24) * 15.0)
    assert band.is_global
    assert band.contains([60.0, -60.0], [359.0, -1.0]).all()
    assert not band.contains([60.1, -61.0], [0.0, 0.0]).any()


@pytest.mark.parametrize("grid", [REGION, SEAM])
def test_regions_hold_their_hull_on_any_branch(grid):
    assert not grid.is_global
    inside = [(61, -8), (49, 2), (55, 352.0), (55, 362.0), (55, 0.0), (55, -358.0)]
    outside = [(61.1, 0), (48.9, 0), (55, -8.1), (55, 2.1), (55, 351.9), (55, 180), (np.nan, 0)]
    assert grid.contains(*np.array(inside).T).all()
    assert not grid.contains(*np.array(outside).T).any()
    values = np.broadcast_to(np.linspace(-8, 2, 21), (13, 21))
    lon = np.array([-7.9, 352.1, 0.0, 360.0, 2.0])
    np.testing.assert_allclose(
        interpolate(grid, values, np.full(5, 55.3), lon), [-7.9, -7.9, 0.0, 0.0, 2.0], atol=1e-9
    )


def test_places_outside_are_named():
    with pytest.raises(InputError, match=r"2 of 3 .* first is lat=70, lon=0.5.*contains"):
        REGION.bilinear([55.0, 70.0, 55.0], [0.0, 0.5, 30.0])
    with pytest.raises(InputError, match="1 of 1 .*lat=nan"):
        CENTRES.bilinear([np.nan], [0.0])
    with pytest.raises(InputError, match="1 of 1 "):
        BoxGrid((4, 4)).bilinear(1.5, 0.5)


# ---- boxes --------------------------------------------------------------------------------------


def test_torus_wraps_and_box_does_not():
    values = np.arange(4.0)[None].repeat(4, 0)  # columns 0 1 2 3
    torus, box = BoxGrid((4, 4)), BoxGrid((4, 4), periodic=False)
    assert interpolate(torus, values, 0.3, 0.875) == pytest.approx(1.5)  # half-way from 3 to 0
    assert interpolate(torus, values, 0.3, 1.0) == pytest.approx(0.0)
    assert interpolate(box, values, 0.3, 1.0) == pytest.approx(3.0)
    assert interpolate(box, values, 0.3, 0.0) == pytest.approx(0.0)
    assert interpolate(box, values, 0.3, 0.25) == pytest.approx(0.5)
    assert torus.contains(0.0, 1.0) and box.contains(0.0, 1.0)
    assert not torus.contains(-0.1, 0.5) and not box.contains(0.5, 1.1)


@pytest.mark.parametrize(
    ("grid", "basis"),
    [
        (BoxGrid((9, 12), (1.0, 2.0)), FourierBasis((9, 12), (1.0, 2.0), 3)),
        (BoxGrid((9, 12), (1.0, 2.0), periodic=False), CosineBasis((9, 12), (1.0, 2.0), 3)),
    ],
)
def test_points_stand_where_the_basis_has_them(grid, basis):
    """Interpolation of a basis function converges to its formula, at second order."""
    lat, lon = places(grid, 50)
    number = 4  # row function 1, column function 1
    errors = []
    for factor in (4, 8):
        fine = grid.at((9 * factor, 12 * factor))
        unit = np.zeros(basis.size)
        unit[number] = 1.0
        values = basis.synthesize(torch.from_numpy(unit), fine.shape).numpy()
        turn = 2 * np.pi if isinstance(basis, FourierBasis) else np.pi
        exact = 2 * np.cos(turn * lat) * np.cos(turn * lon / 2.0)
        errors.append(np.abs(interpolate(fine, values, lat, lon) - exact).max())
    assert errors[0] < 0.02
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("grid", [POLES, CENTRES], ids=["poles", "centres"])
@pytest.mark.parametrize("shape", [None, (24, 48), (25, 48), (39, 72), (8, 16), (7, 12)])
def test_global_rows_stand_where_the_spherical_basis_has_them(grid, shape):
    """On every grid, from odd to even heights as well: pole rows stay, cell centres stay."""
    basis = SphericalBasis(grid.shape)
    if shape is not None:
        grid, basis = grid.at(shape), basis.at(shape)
    np.testing.assert_allclose(basis.latitudes(grid.shape[0]), grid.lat, atol=1e-12)


# ---- areas and other numbers of points ----------------------------------------------------------


def test_areas():
    for grid in (POLES, CENTRES, REGION):
        assert grid.area().shape == grid.shape
        assert grid.area().mean() == pytest.approx(1.0)
    lat = np.deg2rad(REGION.lat)
    np.testing.assert_allclose(
        REGION.area()[:, 3] / REGION.area()[0, 3], np.cos(lat) / np.cos(lat[0])
    )
    assert (BoxGrid((3, 4)).area() == 1).all()


def test_other_numbers_of_points_keep_the_domain():
    fine = POLES.at((25, 48))
    np.testing.assert_allclose(fine.lat[::2], POLES.lat)
    np.testing.assert_allclose(fine.lon[::2], POLES.lon)
    assert fine.is_global
    cells = CENTRES.at((24, 48))
    assert cells.is_global
    np.testing.assert_allclose(cells.lat.reshape(12, 2).mean(1), CENTRES.lat)
    region = REGION.at((26, 63))  # rows halved, columns divided by three
    np.testing.assert_allclose(region.lat.reshape(13, 2).mean(1), REGION.lat)
    np.testing.assert_allclose(region.lon[1::3], REGION.lon)
    assert REGION.at((13, 21)) is REGION
    box = BoxGrid((4, 4), (1.0, 2.0), periodic=False).at((12, 12))
    np.testing.assert_allclose(box.lat[1::3], BoxGrid((4, 4), periodic=False).lat)
    torus = BoxGrid((4, 4)).at((8, 8))
    np.testing.assert_allclose(torus.lat[::2], BoxGrid((4, 4)).lat)


@pytest.mark.parametrize(
    ("lat", "lon", "message"),
    [
        ([1, 2, 4], [0, 1], "lat is not evenly spaced"),
        ([1, np.nan], [0, 1], "lat must be at least two finite"),
        ([1], [0, 1], "lat must be at least two finite"),
        ([80, 100], [0, 1], "latitudes reach 100"),
        ([1, 2], [1, 0], "longitudes must ascend"),
        ([1, 2], np.arange(40) * 10, "more than the globe"),
    ],
)
def test_coordinates_are_checked(lat, lon, message):
    with pytest.raises(InputError, match=message):
        LatLonGrid(lat, lon)


def test_overlaps_are_lengths_in_common():
    shared = overlaps(np.array([0.5, 2.0, -3.0]), np.array([2.5, 3.0, -1.0]), np.arange(4.0))
    assert shared.tolist() == [[0.5, 1.0, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    edges = np.linspace(0.0, 6.0, 5)
    assert overlaps(edges[:-1], edges[1:], np.arange(7.0)).sum(0) == pytest.approx(np.ones(6))
