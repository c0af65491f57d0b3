# SPDX-License-Identifier: Apache-2.0
"""Properties of any table: its form does not matter, and a flawed cell costs no other row."""

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from ddo_modulus.errors import InputError
from ddo_modulus.observations.table import read_table

COUNT = 6
COLUMNS = ("time", "lat", "lon", "observation", "variable", "observation_error", "elev")


def made():
    return pd.DataFrame(
        {
            "time": [f"2019-03-27T{hour:02}:00" for hour in range(COUNT)],
            "lat": 50.0 + np.arange(COUNT),
            "lon": -3.0 + np.arange(COUNT),
            "observation": 280.5 + np.arange(COUNT),
            "variable": "t2m",
            "observation_error": 0.5,
            "elev": 10.0,
        }
    )


@given(st.permutations(range(COUNT)))
@settings(max_examples=20, deadline=None)
def test_order_of_rows_does_not_matter(order):
    pd.testing.assert_frame_equal(read_table(made().iloc[order]).frame, read_table(made()).frame)


@given(st.lists(st.integers(-3, 3), min_size=COUNT, max_size=COUNT))
@settings(max_examples=20, deadline=None)
def test_branches_of_longitude_do_not_matter(turns):
    frame = made()
    table = read_table(pd.concat([frame, frame.assign(lon=frame["lon"] + 360.0 * np.array(turns))]))
    assert table.dropped == {"repeated row": COUNT}


@given(
    st.datetimes(pd.Timestamp("1900-01-01"), pd.Timestamp("2100-01-01")),
    st.integers(-12, 12),
    st.sampled_from("T "),
)
@settings(max_examples=40, deadline=None)
def test_forms_of_an_instant_are_one(instant, hours, between):
    instant = instant.replace(microsecond=0)
    there = instant + pd.Timedelta(hours=hours).to_pytimedelta()
    forms = [
        f"{instant:%Y-%m-%d}{between}{instant:%H:%M:%S}",
        f"{instant:%Y%m%dT%H%M%S}Z",
        f"{there:%Y-%m-%d}{between}{there:%H:%M:%S}.000{hours:+03}:00",
    ]
    times = read_table(made().iloc[:3].assign(time=forms)).frame["time"]
    assert (times == instant).all()


@given(st.integers(0, COUNT - 1), st.sampled_from(COLUMNS), st.text(max_size=12))
@settings(max_examples=150, deadline=None)
def test_garbage_in_a_cell_costs_at_most_its_row(row, column, garbage):
    frame = made().astype(object)
    frame.loc[row, column] = garbage
    try:
        table = read_table(frame, ["t2m"])
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert sum(table.dropped.values()) <= 1
    others = made()["observation"].drop(row)
    assert set(others) <= set(table.frame["observation"])


@given(st.sampled_from(",;\t|"), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le"]))
@settings(max_examples=16, deadline=None)
def test_separators_and_encodings_do_not_matter(tmp_path_factory, separator, encoding):
    path = tmp_path_factory.mktemp("table") / "obs.csv"
    decimal = "," if separator == ";" else "."
    made().to_csv(path, sep=separator, index=False, decimal=decimal, encoding=encoding)
    pd.testing.assert_frame_equal(read_table(path).frame, read_table(made()).frame)
