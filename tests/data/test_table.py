# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas as pd
import pytest

from ddo_modulus.data.table import read_table
from ddo_modulus.errors import InputError


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


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (made().drop(columns=["lat", "variable"]), "no column lat, variable; has time, lon"),
        (made(0), "no rows"),
        (made(variable="sst"), "no observations of t2m, u10m; the table has sst"),
        (made(observation=np.nan), "no usable row is left .missing value: 6"),
        (made(observation=np.arange(6.0)), r"\(middle half\): t2m .*add 273.15"),
        (made(observation_error=[0.5, 0.0, 1, 1, -1, 1]), "2 rows .* of t2m .0."),
        (made(observation_error=np.inf), "6 rows"),
        (made(time="yesterday-ish"), "time cannot be understood"),
        (made(time=np.arange(6)), "time holds numbers"),
    ],
)
def test_a_spoilt_table_is_refused(frame, message):
    with pytest.raises(InputError, match=f"observation table.*{message}"):
        read_table(frame, ["t2m", "u10m"])


def test_files_are_named(tmp_path):
    with pytest.raises(InputError, match="x.parquet: no such file"):
        read_table(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="x.xlsx: not a .parquet or .csv"):
        read_table(tmp_path / "x.xlsx")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(InputError, match="x.csv: the file is empty"):
        read_table(tmp_path / "x.csv")
    made().to_parquet(tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-50])
    with pytest.raises(InputError, match="x.parquet: cannot be read"):
        read_table(tmp_path / "x.parquet")


def test_each_analysis_time_gets_its_window():
    table = read_table(made(12))
    times = np.array(["2019-03-27T03:00", "2019-03-27T06:20"], dtype="datetime64[ns]")
    exact, *_ = table.at(times[:1])
    assert exact["observation"].tolist() == [283.0]
    three, six = table.at(times, np.timedelta64(2, "h"))
    assert three["observation"].tolist() == [281.0, 282.0, 283.0, 284.0, 285.0]
    assert six["observation"].tolist() == [285.0, 286.0, 287.0, 288.0]  # 285 serves both


def test_times_without_observations_are_named():
    table = read_table(made())
    times = [np.datetime64("2019-03-27T03:00"), np.datetime64("2019-04-01T00:00")]
    with pytest.raises(
        InputError, match="of 1 of 2 analysis times: 2019-04-01 00:00:00; .*2019-03-27 05:00:00 UTC"
    ):
        table.at(times, np.timedelta64(30, "m"))
