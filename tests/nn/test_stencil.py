# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from tensors import randn

from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.nn.stencil import LocalLinear, neighbours


def test_torus():
    y = randn(2, 6, 7, 3)
    east, west, south, north = neighbours(y, FourierBasis((6, 7)))
    assert torch.equal(east, torch.roll(y, -1, 2)) and torch.equal(west, torch.roll(y, 1, 2))
    assert torch.equal(south, torch.roll(y, -1, 1)) and torch.equal(north, torch.roll(y, 1, 1))


def box_function(rows, columns):
    """Even about all borders of the unit box, as a mirrored field is."""
    y = torch.cos(2 * math.pi * rows)[:, None] * torch.cos(3 * math.pi * columns)
    return (y + torch.cos(math.pi * columns))[None, :, :, None]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_box_mirrors_at_cell_faces_at_the_same_distance_on_every_grid(factor):
    basis = CosineBasis((6, 8))
    rows, columns = (
        (torch.arange(n * factor, dtype=torch.float64) + 0.5) / (n * factor) for n in basis.shape
    )
    found = neighbours(box_function(rows, columns), basis)
    moves = [(0, 1 / 8), (0, -1 / 8), (1 / 6, 0), (-1 / 6, 0)]
    for field, (down, across) in zip(found, moves, strict=True):
        torch.testing.assert_close(field, box_function(rows + down, columns + across))


def sphere_function(latitude, longitude):
    """A smooth function of the place in space, so passing a pole needs no convention."""
    x = torch.cos(latitude)[:, None] * torch.cos(longitude)
    y = torch.cos(latitude)[:, None] * torch.sin(longitude)
    z = torch.sin(latitude)[:, None] * torch.ones_like(longitude)
    return (x + 2 * y * z + z**2 + x**3)[None, :, :, None]


@pytest.mark.parametrize("basis_shape", [(7, 12), (8, 12)], ids=["poles", "centres"])
@pytest.mark.parametrize("grid", ["same", "finer", "even"])
def test_sphere_passes_the_poles(basis_shape, grid):
    basis = SphericalBasis(basis_shape)
    shape = basis_shape
    if grid == "finer":
        shape = (13, 24) if basis.poles else (16, 24)
    if grid == "even":  # the coarse levels of a grid with poles keep them with any number of rows
        basis = basis.at((4, 6))
        shape = basis.shape
    latitude = torch.from_numpy(basis.latitudes(shape[0])).deg2rad()
    longitude = torch.arange(shape[1], dtype=torch.float64) * 2 * math.pi / shape[1]
    found = neighbours(sphere_function(latitude, longitude), basis)
    step = float(-torch.from_numpy(basis.latitudes(basis.shape[0])).deg2rad().diff()[0])
    across = 2 * math.pi / basis.shape[1]
    moves = [(0, across), (0, -across), (-step, 0), (step, 0)]
    for field, (north, east) in zip(found, moves, strict=True):
        torch.testing.assert_close(field, sphere_function(latitude + north, longitude + east))


def test_between_points_values_are_interpolated():
    y = randn(1, 6, 9, 2)
    east, west, _, _ = neighbours(y, FourierBasis((6, 6)))  # 1.5 points
    torch.testing.assert_close(east, (torch.roll(y, -1, 2) + torch.roll(y, -2, 2)) / 2)
    torch.testing.assert_close(west, (torch.roll(y, 1, 2) + torch.roll(y, 2, 2)) / 2)
    mirrored = torch.cat([y.flip(2), y, y.flip(2)], 2)
    east, west, _, _ = neighbours(y, CosineBasis((6, 6)))
    torch.testing.assert_close(east, (mirrored[:, :, 10:19] + mirrored[:, :, 11:20]) / 2)
    torch.testing.assert_close(west, (mirrored[:, :, 8:17] + mirrored[:, :, 7:16]) / 2)


@pytest.mark.parametrize("local", [3, 2, 0])
@pytest.mark.parametrize("family", [FourierBasis, CosineBasis, SphericalBasis])
def test_local_linear_is_a_map_of_differences(family, local):
    basis = family((7, 12))
    layer = LocalLinear(3, 5, local).double()
    y = randn(2, 7, 12, 3)
    some = y[..., :local]
    east, west, south, north = neighbours(some, basis)
    differences = [
        y,
        (east - west) / 2,
        (south - north) / 2,
        east - 2 * some + west,
        south - 2 * some + north,
    ]
    expected = torch.cat(differences, -1) @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(y, basis), expected)
