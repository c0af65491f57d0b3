# SPDX-License-Identifier: Apache-2.0
"""A real ODB-2 file, and files written by pyodc."""

import numpy as np
import pandas as pd
import pytest

from ddo_modulus.errors import InputError

pyodc = pytest.importorskip("pyodc")
pytest.importorskip("earth2studio")

from ddo_modulus.earth2.sources import OdbSource  # noqa: E402
from ddo_modulus.earth2.sources.odb import read_odb  # noqa: E402

NOON = np.array(["2017-04-17T12:00"], "datetime64[ns]")


@pytest.fixture
def feedback(tmp_path):
    """Writes rows of an ODB-2 file."""

    def write(name="made.odb", **columns):
        size = len(next(iter(columns.values())))
        common = {
            "seqno@hdr": np.arange(size),
            "date@hdr": np.full(size, 20170417),
            "time@hdr": np.full(size, 113000),
            "lat@hdr": np.linspace(40, 50, size),
            "lon@hdr": np.linspace(-5, 5, size),
            "statid@hdr": [f"{i:05d}" for i in range(size)],
            "stalt@hdr": np.full(size, 250.0),
            "vertco_type@body": np.full(size, 1),
            "vertco_reference_1@body": np.full(size, np.nan),
            "datum_status@body": np.full(size, 1),
            "final_obs_error@errstat": np.full(size, 0.5),
        }
        path = tmp_path / name
        named = common | {k.replace("__", "@"): v for k, v in columns.items()}
        frame = pd.DataFrame({k: v for k, v in named.items() if v is not None})
        pyodc.encode_odb(frame, str(path))
        return path

    return write


@pytest.mark.shared_data
def test_the_real_file(shared_data):
    from earth2studio.data.base import DataFrameSource
    from earth2studio.data.utils import fetch_dataframe

    source = OdbSource(shared_data / "pyodc_data1.odb", time_tolerance=np.timedelta64(4, "h"))
    assert isinstance(source, DataFrameSource)
    rows = fetch_dataframe(source, NOON, np.array(["sp", "r2m"]))
    assert len(rows) == 13
    pressure = rows[rows["variable"] == "sp"]
    humidity = rows[rows["variable"] == "r2m"]
    assert len(pressure) == 11 and len(humidity) == 2
    assert pressure["observation"].between(99e3, 102e3).all()
    assert sorted(humidity["observation"]) == pytest.approx([54.03, 56.978], abs=0.01)  # in %
    assert sorted(humidity["observation_error"]) == pytest.approx([12.06, 12.105], abs=0.001)
    assert pressure["observation_error"].tolist() == pytest.approx([38.472] * 11, abs=0.001)
    assert set(rows["station"]) == {"61997", "61998"}
    elevation = pressure.groupby("station")["elev"].unique().str[0]
    assert elevation.to_dict() == pytest.approx({"61997": 146.0, "61998": 30.0}, abs=0.01)
    assert (rows["quality"] == 1).all()
    assert rows["time"].dt.hour.tolist() == sorted(rows["time"].dt.hour)
    within = OdbSource(shared_data / "pyodc_data1.odb")(NOON, ["sp"])
    assert set(within["time"]) == {pd.Timestamp(NOON[0])}


def test_kinds_of_data_levels_and_missing_values(feedback):
    path = feedback(
        varno__body=[39, 40, 2, 7, 1, 3, 39, 2, 999],
        obsvalue__body=[280.0, 275.0, 250.0, 0.001, 54e3, 12.0, np.nan, 251.0, 1.0],
        vertco_type__body=[1, 1, 1, 1, 1, 1, 1, 2, 1],
        vertco_reference_1__body=[np.nan, np.nan, 5e4, 5e4, 5e4, 8.5e4, np.nan, 5e4, np.nan],
    )
    rows = OdbSource(path)(NOON, ["t2m", "d2m", "t500", "q500", "z500", "u850"])
    found = rows.set_index("variable")
    assert found["observation"].to_dict() == pytest.approx(
        {"t2m": 280.0, "d2m": 275.0, "t500": 250.0, "q500": 0.001, "z500": 54e3, "u850": 12.0}
    )
    assert found["pres"].dropna().to_dict() == {
        "t500": 5e4,
        "q500": 5e4,
        "z500": 5e4,
        "u850": 8.5e4,
    }
    assert (rows["time"] == pd.Timestamp("2017-04-17T11:30")).all()
    assert (rows["observation_error"] == 0.5).all()


def test_pressure_at_sea_level_and_at_the_station_are_distinguished(feedback):
    path = feedback(
        varno__body=[110, 110, 108],
        obsvalue__body=[98e3, 101e3, 102e3],
        vertco_type__body=[2, 2, 2],
        vertco_reference_1__body=[250.0 * 9.80665, 0.0, np.nan],
    )
    found = OdbSource(path)(NOON, ["sp", "msl"]).set_index("station")
    assert found["variable"].to_dict() == {"00000": "sp", "00001": "msl", "00002": "msl"}
    assert found["elev"]["00000"] == pytest.approx(250.0)


def test_a_file_without_stations_has_no_names_of_stations(feedback):
    path = feedback(varno__body=[39, 39], obsvalue__body=[280.0, 281.0], statid__hdr=None)
    rows = OdbSource(path)(NOON, ["t2m"])
    assert rows["observation"].tolist() == [280.0, 281.0]
    assert rows["station"].isna().all() and rows["type"].isna().all()


def test_speed_and_direction_of_one_report_make_components(feedback):
    path = feedback(
        varno__body=[112, 111, 112, 111, 112],
        obsvalue__body=[5.0, 270.0, 7.0, 180.0, 9.0],
        seqno__hdr=[1, 1, 2, 2, 3],
        lat__hdr=[40.0, 40.0, 41.0, 41.0, 42.0],
        lon__hdr=[1.0, 1.0, 1.0, 1.0, 1.0],
        statid__hdr=["a", "a", "b", "b", "c"],
    )
    found = OdbSource(path)(NOON, ["u10m", "v10m"]).set_index(["station", "variable"])
    value = found["observation"]
    assert value["a", "u10m"] == pytest.approx(5.0) and value["b", "v10m"] == pytest.approx(7.0)
    assert value["c"].to_dict() == {"ws10m": 9.0}


def test_what_cannot_be_read_is_refused(shared_data, tmp_path, feedback):
    whole = (shared_data / "pyodc_data1.odb").read_bytes()
    (tmp_path / "cut.odb").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.odb: damaged or cut short"):
        read_odb(tmp_path / "cut.odb")
    (tmp_path / "other.odb").write_bytes(b"BUFR")
    with pytest.raises(InputError, match="not an ODB-2 file"):
        read_odb(tmp_path / "other.odb")
    with pytest.raises(InputError, match="no such file"):
        OdbSource(tmp_path / "none.odb")(NOON, "t2m")
    with pytest.raises(
        InputError, match="no_varno.odb: no column varno@body; it has .*hdr and body"
    ):
        read_odb(feedback("no_varno.odb", obsvalue__body=[1.0, 2.0]))
    with pytest.raises(InputError, match="no observations of t850"):
        OdbSource(shared_data / "pyodc_data1.odb")(NOON, "t850")
