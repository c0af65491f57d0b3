# SPDX-License-Identifier: Apache-2.0
import pytest

from ddo_modulus.errors import InputError
from ddo_modulus.lexicon import (
    are_cell_means,
    check_units,
    long_name,
    plausible_range,
    reported_range,
    units_of,
    variable_id,
)


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("2m_temperature", None, "t2m"),
        ("10u", None, "u10m"),
        ("v10", None, "v10"),  # at 10 hPa, unless attributes say otherwise
        ("mean_sea_level_pressure", None, "msl"),
        ("geopotential", 500.0, "z500"),
        ("u_component_of_wind", 850, "u850"),
        ("t", 2.5, "t2.5"),
        ("geopotential_at_surface", None, "z"),
        ("total_precipitation_6hr", None, "tp06"),
        ("wind_speed", 850, "ws850"),
        ("relative_humidity", 700, "r700"),
        ("vorticity", None, "vorticity"),
        ("u", None, "u"),  # a simulation's own, on no level
    ],
)
def test_names_become_lexicon_ids(name, level, expected):
    assert variable_id(name, level) == expected


@pytest.mark.parametrize(
    ("name", "attributes", "expected"),
    [
        ("u100", {}, "u100"),
        ("u100", {"long_name": "U wind at 100 hPa"}, "u100"),
        ("u100", {"long_name": "100 metre U wind component"}, "u100m"),
        ("v10", {"long_name": "10m v-component of wind"}, "v10m"),
        ("v10", {"GRIB_shortName": "10v"}, "v10m"),
        ("u10", {"GRIB_typeOfLevel": "heightAboveGround"}, "u10m"),
    ],
)
def test_only_attributes_make_a_height_of_an_id(name, attributes, expected):
    assert variable_id(name, attributes=attributes) == expected


LEVELS = [1, 2, 3, 5, 7, 10, 20, 30, 50, 70, *range(100, 251, 25), *range(300, 751, 50)]
LEVELS += [*range(775, 1001, 25)]
SURFACE = ["t2m", "d2m", "u10m", "v10m", "u100m", "v100m", "ws10m", "msl", "sp", "sst", "skt"]
SURFACE += ["tcwv", "tcw", "tcc", "stl1", "stl2", "swvl1", "swvl2", "lsm", "z", "tp", "tp06"]
SURFACE += ["tp12", "tp24", "r2m", "q2m"]
LETTERS = ["z", "t", "u", "v", "w", "q", "r", "ws"]


@pytest.mark.parametrize("level", LEVELS)
def test_an_id_is_not_mapped_again(level):
    for letter in LETTERS:
        variable = variable_id(letter, level)
        assert variable == f"{letter}{level}"
        assert variable_id(variable) == variable
        assert variable_id(variable, attributes={"long_name": long_name(variable)}) == variable
        assert units_of(variable) is not None


@pytest.mark.parametrize("variable", SURFACE)
def test_a_surface_id_is_not_mapped_again(variable):
    assert variable_id(variable) == variable
    assert variable_id(variable, attributes={"long_name": long_name(variable)}) == variable
    assert units_of(variable) is not None


@pytest.mark.parametrize(
    ("variable", "low", "high", "mend"),
    [
        ("t2m", -12.0, 31.0, "add 273.15"),
        ("t850", -40.0, 25.0, "add 273.15"),
        ("msl", 970.0, 1040.0, "multiply by 100"),
        ("q700", 0.1, 9.0, "divide by 1000"),
        ("r500", 0.0, 1.2, "multiply by 100"),
        ("z500", 4900.0, 5900.0, "multiply by 9.80665"),
        ("z850", 1200.0, 1600.0, "multiply by 9.80665"),
        ("u10m", -10.0, 1e11, "Convert the values to m/s"),
    ],
)
def test_wrong_units_are_named_with_their_mend(variable, low, high, mend):
    with pytest.raises(InputError, match=f"here: {variable} runs from .*{mend}"):
        check_units(variable, low, high, "here")


@pytest.mark.parametrize(
    ("variable", "low", "high"),
    [
        ("t2m", 190.0, 330.0),
        ("msl", 87000.0, 108500.0),
        ("sp", 48000.0, 105000.0),
        ("z1000", -5000.0, 5000.0),
        ("z850", 9500.0, 16500.0),
        ("z500", 45000.0, 59500.0),
        ("z50", 175000.0, 208000.0),
        ("r500", -2.0, 130.0),
        ("vorticity", -1e9, 1e9),
    ],
)
def test_real_extremes_pass(variable, low, high):
    check_units(variable, low, high, "here")


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ("lat: lon: mean", True),
        ("area: mean", True),
        ("time: maximum latitude: longitude: mean", True),
        ("area: mean where land time: mean", True),
        ("longitude: latitude: mean (interval: 0.25 degree)", True),
        ("", False),
        ("time: mean", False),
        ("area: point", False),
        ("area: sum time: mean", False),
        ("longitude: mean", False),  # a zonal mean
    ],
)
def test_means_over_cells_are_recognised_by_their_attribute(methods, expected):
    assert are_cell_means(methods) == expected


def test_unknown_units_have_no_range():
    assert plausible_range("vorticity") is None
    assert plausible_range("z") is None  # the surface's, any height
    assert plausible_range("q") is None  # of a simulation; a report of an observation table
    assert reported_range("q") == plausible_range("q500")
