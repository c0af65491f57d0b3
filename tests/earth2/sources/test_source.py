# SPDX-License-Identifier: Apache-2.0
"""The base class of observation sources, with a source of synthetic rows."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from ddo_modulus.earth2.sources.source import ObservationSource, needed
from ddo_modulus.errors import InputError

pytest.importorskip("earth2studio")

DAY = np.datetime64("2020-01-01", "ns")


class Hourly(ObservationSource):
    """Hourly temperatures of one day, with negative and positive longitudes."""

    SOURCE_ID = "hourly"
    _where = "the day"

    def _load(self, windows, variables):
        hours = np.arange(24)
        return pd.DataFrame(
            {
                "time": DAY + hours[::-1] * np.timedelta64(1, "h"),
                "lat": 50.0,
                "lon": np.linspace(-180, 180, 24),
                "observation": 273.0 + hours[::-1],
                "variable": "t2m",
                "quality": np.where(hours == 3, np.nan, hours - 1.0),
            }
        )


def hours(frame):
    return frame["time"].dt.hour.tolist()


def test_time_windows_of_several_times_are_united():
    source = Hourly(np.timedelta64(90, "m"))
    times = DAY + np.array([3, 4, 12]) * np.timedelta64(1, "h")
    assert hours(source(times, "t2m")) == [2, 3, 4, 5, 11, 12, 13]
    one_sided = Hourly((np.timedelta64(-2, "h"), np.timedelta64(0, "h")))
    assert hours(one_sided(times[2], ["t2m"])) == [10, 11, 12]


def test_columns_have_the_types_of_the_schema():
    frame = Hourly(np.timedelta64(1, "D"))(DAY, "t2m")
    assert frame["lon"].between(0, 360, inclusive="left").all()
    assert frame["quality"].dtype == "UInt16"
    # -1 does not fit the type, and one mark is missing.
    assert frame["quality"].isna().sum() == 2
    table = pa.Table.from_pandas(frame, preserve_index=False)
    for field in Hourly.SCHEMA:
        if frame[field.name].notna().any():
            kind = table.schema.field(field.name).type
            assert kind == field.type or pa.types.is_large_string(kind)
    assert frame.attrs["source"] == "hourly"


def test_fields_may_be_a_schema():
    wanted = pa.schema([Hourly.SCHEMA.field("time"), Hourly.SCHEMA.field("observation")])
    assert list(Hourly()(DAY, "t2m", wanted)) == ["time", "observation"]
    wrong = pa.schema([pa.field("observation", pa.float64())])
    with pytest.raises(InputError, match="observation has the type float, not double"):
        Hourly()(DAY, "t2m", wrong)


def test_between_two_reports_there_is_nothing_and_outside_is_a_mistake():
    source = Hourly(np.timedelta64(10, "m"))
    empty = source(DAY + np.timedelta64(90, "m"), "t2m")
    assert empty.empty and list(empty) == Hourly.SCHEMA.names
    with pytest.raises(InputError, match="the day: holds 2020-01-01 00:00:00 to .*23:00:00"):
        source(DAY + np.timedelta64(2, "D"), "t2m")
    with pytest.raises(InputError, match="at least one time and one variable"):
        source([], "t2m")


def test_it_can_be_awaited():
    import asyncio

    frame = asyncio.run(Hourly().fetch(DAY, "t2m"))
    pd.testing.assert_frame_equal(frame, Hourly()(DAY, "t2m"))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "earth2studio.data.utils", None)
    with pytest.raises(
        InputError, match=r"needs earth2studio.*pip install 'ddo-modulus\[earth2\]'"
    ):
        Hourly()(DAY, "t2m")
    with pytest.raises(InputError, match=r"needs no_such_package.*ddo-modulus\[observations\]"):
        needed("no_such_package.of.ours")


def test_names_load_late_and_without_the_packages_they_need():
    code = (
        "import sys\n"
        "packages = ('earth2studio', 'nnja_ai', 'pdbufr', 'pyodc', 'ecmwfapi', 'cdsapi')\n"
        "sys.modules.update(dict.fromkeys(packages))\n"
        "from ddo_modulus.earth2 import sources\n"
        "for name in sources.__all__: getattr(sources, name)\n"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@pytest.mark.parametrize("first", ["", "import eccodes", "import cfgrib", "import pdbufr"])
def test_eccodes_and_pygrib_do_not_crash_on_exit(first):
    """Each has a copy of the same C library; two copies that share variables free them twice."""
    pytest.importorskip("pygrib")
    code = f"{first}\nimport ddo_modulus.data.source, eccodes, pygrib\n"
    code += "eccodes.codes_release(eccodes.codes_grib_new_from_samples('regular_ll_sfc_grib1'))"
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
