# SPDX-License-Identifier: Apache-2.0
"""Reports turned into observations."""

import numpy as np
import pandas as pd
import pytest

from ddo_modulus.earth2.sources.conversions import relative_humidity, specific_humidity
from ddo_modulus.earth2.sources.reports import (
    SCHEMA,
    SURFACE_VARIABLES,
    UPPER_AIR_VARIABLES,
    observations,
    parse_variable,
)


def reports(**columns):
    size = len(next(iter(columns.values())))
    place = {
        "time": pd.date_range("2020-01-01", periods=size, freq="h"),
        "lat": np.linspace(50, 52, size),
        "lon": np.linspace(-3, 3, size),
        "station": [f"s{i}" for i in range(size)],
    }
    return pd.DataFrame(place | columns)


def test_names_and_types_are_earth2studios():
    lexicon = pytest.importorskip("earth2studio.lexicon.base")
    for field in SCHEMA:
        if field.name != "observation_error":
            assert field.type == lexicon.E2STUDIO_SCHEMA.field(field.name).type, field.name
    for variable in (*SURFACE_VARIABLES, "t850", "u500", "q850", "r850", "z500"):
        assert variable in lexicon.E2STUDIO_VOCAB, variable


def test_a_variable_id_is_split_into_quantity_and_level():
    assert parse_variable("t850") == ("t", 85000.0)
    assert parse_variable("z") == ("z", None)
    quantity, level = parse_variable("t2m")
    assert quantity == "t" and np.isnan(level)
    for wrong in ("t0", "x850", "t850hPa", "T850", "", "amsua", "u10"):
        assert parse_variable(wrong) is None or wrong == "u10"
    assert set(UPPER_AIR_VARIABLES).isdisjoint(SURFACE_VARIABLES)


def test_missing_values_are_left_out_and_the_rest_is_kept_as_it_is():
    frame = reports(t=[280.0, np.nan, 372.2], p=[1e5, 1e5, np.nan])
    rows = observations(frame, ["t2m", "sp"])
    assert rows["observation"].tolist() == [280.0, 372.2, 1e5, 1e5]
    assert rows["variable"].tolist() == ["t2m", "t2m", "sp", "sp"]
    assert rows["station"].tolist() == ["s0", "s2", "s0", "s1"]
    assert set(SCHEMA.names) == set(rows.columns)


def test_speed_is_kept_where_the_direction_is_missing():
    frame = reports(speed=[5.0, 7.0, 0.0], direction=[270.0, np.nan, np.nan])
    rows = observations(frame, ["u10m", "v10m"]).set_index(["station", "variable"])["observation"]
    assert rows["s0", "u10m"] == pytest.approx(5.0)
    assert rows["s1"].to_dict() == {"ws10m": 7.0}
    assert rows["s2"].to_dict() == {"u10m": 0.0, "v10m": 0.0}  # calm
    # Asked for, it is there for every report, and once.
    rows = observations(frame, ["u10m", "v10m", "ws10m"])
    assert (rows["variable"] == "ws10m").sum() == 3
    assert "ws10m" not in set(observations(frame, ["t2m"])["variable"])


def test_humidity_is_derived_where_it_is_not_reported():
    t, td, p = np.array([285.0, 285.0]), np.array([280.0, 280.0]), np.array([9.9e4, 9.9e4])
    rows = observations(reports(t=t, td=td, p=p, rh=[50.0, np.nan]), ["r2m", "q2m", "d2m"])
    humidity = rows[rows["variable"] == "r2m"]["observation"]
    np.testing.assert_allclose(humidity, [50.0, relative_humidity(t, td)[1]])
    specific = rows[rows["variable"] == "q2m"]["observation"]
    np.testing.assert_allclose(specific, specific_humidity(td, p))


@pytest.mark.parametrize(("worst", "mark"), [("max", 4.0), ("min", 1.0)])
def test_a_derived_value_has_the_worst_mark_of_its_parents(worst, mark):
    frame = reports(
        speed=[5.0], direction=[10.0], speed_quality=[1.0], direction_quality=[4.0], u_error=[1.5]
    )
    rows = observations(frame, ["u10m", "ws10m"], worst=worst).set_index("variable")
    assert rows.loc["u10m", "quality"] == mark
    assert rows.loc["ws10m", "quality"] == 1.0
    assert rows.loc["u10m", "observation_error"] == 1.5


def test_levels_are_not_mixed_with_each_other_nor_with_the_surface():
    frame = reports(t=[280.0, 281.0, 250.0], td=[279.0] * 3, pres=[np.nan, 85000.0, 50000.0])
    assert observations(frame, ["t2m"])["observation"].tolist() == [280.0]
    assert observations(frame, ["t850"])["observation"].tolist() == [281.0]
    rows = observations(frame, ["t", "q"])
    assert rows["pres"].tolist() == [85000.0, 50000.0] * 2
    # Aloft, the level's pressure makes the humidity.
    expected = specific_humidity(np.array([279.0, 279.0]), np.array([85000.0, 50000.0]))
    np.testing.assert_allclose(rows[rows["variable"] == "q"]["observation"], expected)
    assert observations(frame, ["t700"]).empty


def test_the_frame_of_reports_is_left_as_it_is():
    frame = reports(speed=[5.0], direction=[10.0])
    before = frame.copy()
    observations(frame, ["u10m", "r2m"])
    pd.testing.assert_frame_equal(frame, before)
