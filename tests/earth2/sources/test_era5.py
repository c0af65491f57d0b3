# SPDX-License-Identifier: Apache-2.0
"""ERA5 from local files, and the choice among Earth2Studio's stores."""

import numpy as np
import pytest
import xarray as xr

from ddo_modulus.errors import InputError

pytest.importorskip("earth2studio")

from ddo_modulus.earth2.sources import Era5Source, FieldSource  # noqa: E402

TIME = np.array(["2020-01-01T06:00"], "datetime64[ns]")


@pytest.fixture
def field_file(tmp_path):
    """A region across Greenwich, t2m and z500, hourly."""
    axes = {
        "time": np.arange("2020-01-01", "2020-01-02", dtype="datetime64[h]").astype("M8[ns]"),
        "latitude": np.arange(56.0, 46.0, -1),
        "longitude": np.r_[355.0:360.0, 0.0:7.0],
    }
    random = np.random.default_rng(0)
    shape = tuple(map(len, axes.values()))
    fields = {
        "2m_temperature": 280 + random.standard_normal(shape),
        "z500": 55e3 + random.standard_normal(shape),
    }
    path = tmp_path / "fields.nc"
    xr.Dataset({k: (tuple(axes), v) for k, v in fields.items()}, axes).to_netcdf(path)
    return path


def test_a_local_file_is_a_data_source(field_file):
    from earth2studio.data.base import DataSource
    from earth2studio.data.utils import fetch_data

    source = Era5Source(field_file)
    assert isinstance(source, DataSource) and isinstance(FieldSource(field_file), DataSource)
    fields, coords = fetch_data(source, TIME, np.array(["z500", "t2m"]))
    assert fields.shape == (1, 1, 2, 10, 12)
    assert list(coords["variable"]) == ["z500", "t2m"]
    np.testing.assert_array_equal(coords["lon"], np.arange(-5.0, 7.0))
    stored = xr.open_dataset(field_file)["2m_temperature"].sel(time=TIME[0])
    np.testing.assert_allclose(fields[0, 0, 1], stored, rtol=1e-6)
    array = source(TIME, "t2m")
    assert array.dims == ("time", "variable", "lat", "lon")
    assert array.attrs["store"] == str(field_file)


@pytest.mark.shared_data
def test_real_grib_and_its_members(shared_data):
    path = shared_data / "era5-levels-members.grib"
    with pytest.raises(InputError, match="10 along ensemble; choose one, member=0 to 9"):
        FieldSource(path)
    one, other = FieldSource(path, member=0), Era5Source(path, member=3)
    time = np.datetime64("2017-01-01T12:00")
    fields = one(time, ["t850", "z500"])
    assert fields.sizes == {"time": 1, "variable": 2, "lat": 61, "lon": 120}
    assert np.all(np.diff(fields["lat"]) < 0) and fields["lon"].values[0] == 0
    assert float(fields.sel(variable="z500").mean()) == pytest.approx(55e3, rel=0.03)
    assert not np.array_equal(fields.sel(variable="t850"), other(time, "t850").squeeze())


def test_local_requests_that_cannot_be_met(field_file, tmp_path):
    source = FieldSource(field_file)
    with pytest.raises(InputError, match="no variable q700; it has t2m, z500"):
        source(TIME, ["t2m", "q700"])
    with pytest.raises(InputError, match="no field at 2021-.*24 times from 2020-01-01T00"):
        source(np.datetime64("2021-01-01"), "t2m")
    celsius = tmp_path / "celsius.nc"
    (xr.open_dataset(field_file) - 273.15).to_netcdf(celsius)
    with pytest.raises(InputError, match="look like degrees Celsius"):
        FieldSource(celsius)(TIME, "t2m")
    cut = tmp_path / "cut.nc"
    cut.write_bytes(field_file.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.nc"):
        FieldSource(cut)


@pytest.fixture
def stores(monkeypatch):
    """Earth2Studio's stores with their transfer replaced: what each gives or raises."""
    import earth2studio.data as data

    answers, asked = {}, []

    def answer(name):
        async def fetch(self, time, variable):
            asked.append(name)
            result = answers.get(name, ValueError("not asked for"))
            if isinstance(result, Exception):
                raise result
            return result

        return fetch

    for name in ("ARCO_ERA5", "WB2ERA5", "NCAR_ERA5"):
        monkeypatch.setattr(getattr(data, name), "fetch", answer(name))
    monkeypatch.setattr("ddo_modulus.earth2.sources.source._BACKOFF", 0.01)
    return answers, asked


def test_the_next_store_is_asked_where_one_cannot_serve(stores):
    answers, asked = stores
    answers["ARCO_ERA5"] = ValueError("needs to be on or before 2023")
    answers["WB2ERA5"] = field = xr.DataArray(np.zeros(3))
    found = Era5Source("arco", ["wb2", "ncar"])(TIME, "t2m")
    assert asked == ["ARCO_ERA5", "WB2ERA5"]
    assert found.attrs["store"] == "wb2" and field.attrs == {}


def test_errors_of_the_connection_are_tried_again_and_others_are_not(stores):
    answers, asked = stores
    answers["ARCO_ERA5"] = ConnectionError("no route")
    answers["WB2ERA5"] = KeyError("fancy")
    with pytest.raises(InputError) as caught:
        Era5Source("arco", ["wb2"], retries=1)(TIME, "fancy")
    assert asked == ["ARCO_ERA5", "ARCO_ERA5", "WB2ERA5"]
    for part in ("fancy at 2020-01-01 06:00:00", "arco: no route", "wb2 has no variable 'fancy'"):
        assert part in str(caught.value)


def test_a_missing_key_for_the_climate_data_store(monkeypatch, tmp_path):
    for name in ("CDSAPI_URL", "CDSAPI_KEY", "CDSAPI_RC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="no key for the Climate Data Store"):
        Era5Source("cds")(TIME, "t2m")


def test_choices_that_make_no_sense(field_file):
    with pytest.raises(InputError, match="era6 is neither a file nor one of the stores arco"):
        Era5Source("era6")
    with pytest.raises(InputError, match="arco .0.25 degrees., wb2_32x64 .5.625 degrees. differ"):
        Era5Source("arco", ["wb2_32x64"])
    with pytest.raises(InputError, match="leave fallback out"):
        Era5Source(field_file, ["arco"])
