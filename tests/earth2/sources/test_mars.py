# SPDX-License-Identifier: Apache-2.0
"""MARS: the client's transfer replaced by a local file, everything else real."""

import shutil

import numpy as np
import pytest

from ddo_modulus.errors import InputError

api = pytest.importorskip("ecmwfapi.api")
pytest.importorskip("pdbufr")
pytest.importorskip("pyodc")
pytest.importorskip("earth2studio")

from ddo_modulus.earth2.sources import BufrSource, MarsSource  # noqa: E402

NOON = np.array(["2018-11-02T12:00"], "datetime64[ns]")


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """Neither variables nor a file with a key."""
    for name in ("ECMWF_API_KEY", "ECMWF_API_URL", "ECMWF_API_EMAIL", "ECMWF_API_RC_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def key(no_key, monkeypatch):
    for name, value in {"KEY": "k", "URL": "https://api.ecmwf.int/v1", "EMAIL": "a@b.c"}.items():
        monkeypatch.setenv(f"ECMWF_API_{name}", value)


def answering(monkeypatch, file):
    """MARS answers each request with a file; gives the requests it got."""
    requests = []

    def execute(self, request, target):
        assert self.service == "mars" and self.key == "k"
        requests.append(request)
        shutil.copy(file, target)

    monkeypatch.setattr(api.ECMWFService, "execute", execute)
    return requests


@pytest.mark.shared_data
def test_reports(key, monkeypatch, synop_file):
    requests = answering(monkeypatch, synop_file)
    source = MarsSource(obstypes=(1, 140), request={"area": "60/-10/40/10"})
    rows = source(NOON, ["t2m", "msl"])
    assert requests == [
        {
            "class": "od",
            "expver": "1",
            "stream": "oper",
            "type": "ob",
            "repres": "bu",
            "obstype": "1/140",
            "date": "2018-11-02",
            "time": "0000",
            "range": "1439",
            "area": "60/-10/40/10",
        }
    ]
    expected = BufrSource(synop_file)(NOON, ["t2m", "msl"]).drop_duplicates()
    assert len(rows) == len(expected)
    np.testing.assert_array_equal(rows["observation"], expected["observation"])
    source(NOON + np.timedelta64(20, "m"), "t2m")
    assert len(requests) == 1  # the day is in the cache


@pytest.mark.shared_data
def test_feedback_comes_from_all_analyses_that_saw_the_time(key, monkeypatch, shared_data):
    requests = answering(monkeypatch, shared_data / "pyodc_data1.odb")
    rows = MarsSource("ofb")(np.datetime64("2017-04-17T12:00"), ["sp"])
    assert [r["date"] for r in requests] == ["2017-04-16", "2017-04-17"]
    assert requests[0]["type"] == "ofb" and requests[0]["reportype"] == "16001/16002"
    assert len(rows) == 1  # the same datum in both answers counts once
    assert rows["observation_error"].tolist() == pytest.approx([38.472], abs=1e-3)


@pytest.mark.shared_data
def test_public_data_sets_go_by_the_data_server(key, monkeypatch, synop_file):
    got = []

    def retrieve(self, request):
        got.append(request)
        shutil.copy(synop_file, request["target"])

    monkeypatch.setattr(api.ECMWFDataServer, "retrieve", retrieve)
    assert len(MarsSource(dataset="isobs")(NOON, "t2m")) == 150
    assert got[0]["dataset"] == "isobs"


def test_without_a_key_it_is_said_where_to_get_one(no_key, monkeypatch):
    with pytest.raises(InputError, match="no ECMWF key; set ECMWF_API_URL.*ecmwfapirc.*/key/"):
        MarsSource()(NOON, "t2m")
    monkeypatch.setenv("ECMWF_API_KEY", "only this")
    with pytest.raises(InputError, match="ECMWF key cannot be used.*Incomplete"):
        MarsSource()(NOON, "t2m")


def test_a_refusal_is_passed_on_and_leaves_nothing_behind(key, monkeypatch, cache):
    def refuse(self, request, target):
        raise api.APIException("ecmwf.API error 1: User has no access to services/mars")

    monkeypatch.setattr(api.ECMWFService, "execute", refuse)
    with pytest.raises(InputError, match="no access.*reports .type=ob. are restricted"):
        MarsSource()(NOON + np.timedelta64(400, "D"), "t2m")

    def nothing(self, request, target):
        open(target, "w").close()

    monkeypatch.setattr(api.ECMWFService, "execute", nothing)
    with pytest.raises(InputError, match="has no data for the request"):
        MarsSource()(NOON + np.timedelta64(400, "D"), "t2m")
    assert not list(cache.rglob("*.part"))


def test_the_connection_is_tried_again(key, monkeypatch):
    monkeypatch.setattr("ddo_modulus.earth2.sources.source._BACKOFF", 0.01)
    tries = []

    def drop(self, request, target):
        tries.append(target)
        raise ConnectionResetError("dropped")

    monkeypatch.setattr(api.ECMWFService, "execute", drop)
    with pytest.raises(InputError, match="dropped.*tried 3 times"):
        MarsSource(retries=2)(NOON + np.timedelta64(500, "D"), "t2m")
    assert len(tries) == 3


def test_mistakes_in_the_arguments():
    with pytest.raises(InputError, match="kind is 'fc'"):
        MarsSource("fc")
    with pytest.raises(InputError, match="obstypes is empty"):
        MarsSource(obstypes=())
    with pytest.raises(InputError, match="reportype of obstype .*7"):
        MarsSource("ofb", obstypes=(7,))
