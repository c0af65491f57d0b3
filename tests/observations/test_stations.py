# SPDX-License-Identifier: Apache-2.0
"""Real stations, which report the pressure at their height and at sea level."""

import numpy as np
import pytest
import torch

from ddo_modulus.observations.atmosphere import pressure_ratio, standard_temperature

_MESSAGES = 1500


def test_stations_reduce_pressure_alike(shared_data, tmp_path):
    """SYNOP of 2018-11-02 12 UTC: with the station's own temperature to a tenth of a hPa or so."""
    pdbufr = pytest.importorskip("pdbufr")
    data, end = (shared_data / "pdbufr_perf_synop.bufr").read_bytes(), 0
    for _ in range(_MESSAGES):
        start = data.index(b"BUFR", end)
        end = start + int.from_bytes(data[start + 4 : start + 7], "big")
    (tmp_path / "some.bufr").write_bytes(data[:end])
    names = {
        "height": "heightOfStation",
        "station": "nonCoordinatePressure",
        "sea": "pressureReducedToMeanSeaLevel",
        "temperature": "airTemperatureAt2M",
    }
    frame = pdbufr.read_bufr(tmp_path / "some.bufr", columns=tuple(names.values())).dropna()
    height, station, sea, temperature = (
        torch.from_numpy(frame[name].to_numpy(float, copy=True)) for name in names.values()
    )
    low = (height < 300).numpy()
    assert low.sum() > 200
    errors = {}
    for kind, t in {"own": temperature, "standard": standard_temperature(height)}.items():
        error = (station * pressure_ratio(t, -height) - sea).numpy() / 100  # hPa
        errors[kind] = np.median(np.abs(error[low]))
        assert abs(np.median(error[low])) < 0.3
    assert errors["own"] < 0.2 < 2.0 < np.median((station - sea).abs().numpy()[low] / 100)
    assert errors["own"] < errors["standard"]
