# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas as pd
import pytest

from ddo_modulus.errors import InputError
from ddo_modulus.observations.table import read_table


def made(n=6, **columns):
    """One station that reports every hour."""
    table = {
        "time": pd.date_range("2019-03-27", periods=n, freq="1h"),
        "lat": 52.0,
        "lon": -1.0,
        "observation": 280.0 + np.arange(n),
        "variable": "t2m",
    }
    return pd.DataFrame(table | columns)


@pytest.mark.parametrize("kind", ["parquet", "csv", "frame"])
def test_every_source_gives_the_same_table(tmp_path, kind):
    frame = made(observation_error=0.5)
    source = frame
    if kind != "frame":
        source = tmp_path / f"table.{kind}"
        getattr(frame, f"to_{kind}")(source, index=False)
    table = read_table(source, ["t2m"])
    assert table.dropped == {}
    assert table.frame["time"].dtype == "datetime64[ns]"
    expected = frame.astype({"time": "datetime64[ns]", "variable": str})
    pd.testing.assert_frame_equal(table.frame, expected, check_column_type=False)


def test_the_callers_frame_is_left_as_it_is():
    frame = made(observation=["280", "MSNG", "281", "282", "283", "284"])
    before = frame.copy(deep=True)
    read_table(frame)
    pd.testing.assert_frame_equal(frame, before)


def test_an_error_that_is_not_given_is_nan():
    assert read_table(made()).frame["observation_error"].isna().all()


def test_times_with_a_zone_become_utc():
    local = pd.date_range("2019-03-27T02:00", periods=6, freq="1h", tz="Europe/Paris")
    frame = read_table(made(time=local)).frame
    assert frame["time"].iloc[0] == pd.Timestamp("2019-03-27T01:00")


def test_flawed_rows_are_left_out_and_counted():
    frame = pd.concat(
        [
            made(20),
            made(1, observation=np.nan),
            made(2, lat=np.inf),
            made(1, time=pd.NaT),
            made(3, observation=372.0),  # a gross error of a station
            made(1, lat=1e11),
            made(2, variable="prmsl"),
            made(4),  # again
            made(1, observation=277.7),  # another report from the same place and time
        ]
    )
    table = read_table(frame, ["t2m", "u10m"])
    assert table.dropped == {
        "unknown variable": 2,
        "missing value": 4,
        "off the globe": 1,
        "implausible value": 3,
        "repeated row": 4,
    }
    assert len(table.frame) == 21
    assert table.frame["time"].is_monotonic_increasing
    assert table.rejected["reason"].value_counts().to_dict() == table.dropped
    wrong = table.rejected[table.rejected["reason"] == "implausible value"]
    assert wrong["observation"].tolist() == [372.0] * 3


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (made().drop(columns=["lat", "variable"]), "no column lat, variable; has time, lon"),
        (made(0), "no rows"),
        (made(variable="sst"), "no observations of t2m, u10m; the table has sst"),
        (made(observation=np.nan), "no usable row is left .missing value: 6"),
        (made(observation=np.arange(6.0)), r"\(middle half\): t2m .*add 273.15"),
        (made(observation_error=np.inf), "no usable .*impossible observation_error: 6"),
        (made(time="yesterday-ish"), "time 'yesterday-ish' cannot be understood; write dates"),
        (made(time=np.arange(6)), "time '0' is a number, .*; write dates"),
    ],
)
def test_a_spoilt_table_is_refused(frame, message):
    with pytest.raises(InputError, match=f"observation table.*{message}"):
        read_table(frame, ["t2m", "u10m"])


def test_files_are_named(tmp_path):
    with pytest.raises(InputError, match="x.parquet: no such file"):
        read_table(tmp_path / "x.parquet")
    (tmp_path / "x.dat").write_text("time,lat")
    with pytest.raises(InputError, match="x.dat: not a .parquet or .csv"):
        read_table(tmp_path / "x.dat")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(InputError, match="x.csv: the file is empty"):
        read_table(tmp_path / "x.csv")
    made().to_parquet(tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-50])
    with pytest.raises(InputError, match="x.parquet: is cut short"):
        read_table(tmp_path / "x.parquet")


def test_each_analysis_time_gets_its_window():
    table = read_table(made(12))
    times = np.array(["2019-03-27T03:00", "2019-03-27T06:20"], dtype="datetime64[ns]")
    exact, *_ = table.at(times[:1])
    assert exact["observation"].tolist() == [283.0]
    three, six = table.at(times, np.timedelta64(2, "h"))
    assert three["observation"].tolist() == [281.0, 282.0, 283.0, 284.0, 285.0]
    assert six["observation"].tolist() == [285.0, 286.0, 287.0, 288.0]  # 285 serves both


def test_windows_may_reach_further_to_one_side():
    table = read_table(made(12))
    offsets = (np.timedelta64(-2, "h"), np.timedelta64(1, "h"))
    (rows,) = table.at([np.datetime64("2019-03-27T03:00")], offsets)
    assert rows["observation"].tolist() == [281.0, 282.0, 283.0, 284.0]


def test_what_need_not_be_there():
    empty = made(0).astype({"time": "datetime64[ns]"})
    assert read_table(empty, required=False).frame.empty
    table = read_table(made(observation=np.nan), required=False)
    assert table.frame.empty and table.dropped == {"missing value": 6}
    (rows,) = table.at([np.datetime64("2019-03-27T03:00")], required=False)
    assert rows.empty


def test_attributes_that_are_arrays_do_no_harm():
    """As Earth2Studio's frames have them; pandas cannot join such."""
    frame = made(observation=[280.0, np.nan, 280.0, 372.0, 280.0, 280.0])
    frame.attrs = {"request_time": np.array(["2019-03-27", "2019-03-28"], "datetime64[ns]")}
    table = read_table(frame)
    assert table.rejected["reason"].tolist() == ["missing value", "implausible value"]
    assert len(frame.attrs["request_time"]) == 2


def test_times_without_observations_are_named():
    table = read_table(made())
    times = [np.datetime64("2019-03-27T03:00"), np.datetime64("2019-04-01T00:00")]
    with pytest.raises(
        InputError, match="of 1 of 2 analysis times: 2019-04-01 00:00:00; .*2019-03-27 05:00:00 UTC"
    ):
        table.at(times, np.timedelta64(30, "m"))


# ---- further columns ----------------------------------------------------------------------------


def test_further_columns_are_kept_with_one_type_each():
    frame = made(
        elev=["25", "1e11", "-", "-60", "9000", None],
        pres=[1e5, -999, np.nan, 7e4, 5e4, 900],
        sensor_index=5,
        quality=[0, 1, 2, 3, 4, 15],
        station=[3162, "03162", None, "EGLL", "x", "y"],
        comment="nothing to us",
    )
    kept = read_table(frame).frame
    assert "comment" not in kept and "station_elev" not in kept
    np.testing.assert_array_equal(kept["elev"], [25, np.nan, np.nan, -60, 9000, np.nan])
    np.testing.assert_array_equal(kept["pres"], [1e5, np.nan, np.nan, 7e4, 5e4, 900])
    assert kept["sensor_index"].dtype == kept["quality"].dtype == np.float64
    assert kept["station"].tolist() == [3162, "03162", None, "EGLL", "x", "y"]


def test_a_flawed_cell_costs_its_row():
    frame = made(
        elev=["25", "high", "12000", "-60", "9000", None],
        pres=[1e5, 1e5, 1e5, 0.0, 1.2e5, 900],
        observation_error=[0.5, 1, 1, 1, 1, 0],
    )
    table = read_table(frame)
    assert table.frame["elev"].tolist() == [25]
    assert table.dropped == {
        "unreadable elev": 1,
        "impossible elev": 1,
        "impossible pres": 2,
        "impossible observation_error": 1,
    }
    assert table.rejected["cell"].tolist()[:4] == ["high", "12000", "0.0", "120000.0"]


def test_pressures_in_hectopascal_are_refused():
    with pytest.raises(InputError, match="median of pres is 700, .* in Pa. .*hPa: multiply by 100"):
        read_table(made(pres=[1000.0, 850.0, 700.0, 700.0, 500.0, np.nan], variable="t"))
    read_table(made(pres=[1e5, 8e4, 4e4, 1e4, 900.0, 500.0], variable="t"))
    read_table(made(pres=np.nan))


def test_what_differs_in_a_number_is_no_repetition():
    frame = pd.concat([made(1, pres=p, station=s) for p in (7e4, 5e4) for s in ("a", "b")])
    table = read_table(frame.assign(variable="t"))
    assert table.dropped == {"repeated row": 2}  # under another name
    assert sorted(table.frame["pres"]) == [5e4, 7e4]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("t", 12.0, "t runs from 12 .*add 273.15"),
        ("q", 5.0, "q runs .*divide by 1000"),
        ("wd10m", 400.0, "wd10m .* 0 to 360 degrees"),
        ("amsua", 12.0, "amsua .*add 273.15"),
    ],
)
def test_units_of_reports(variable, value, message):
    with pytest.raises(InputError, match=message):
        read_table(made(variable=variable, observation=value))
