# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
import xarray as xr

from ddo_modulus.data import statistics
from ddo_modulus.data.normalization import Normalization
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.statistics import (
    StoredStatistics,
    moments,
    random_subset,
    write_statistics,
)
from ddo_modulus.data.training_store import write_training_store
from ddo_modulus.fields.basis import CosineBasis, FourierBasis

CHANNELS = ("t2m", "z500", "u10m")


@pytest.fixture(scope="module")
def values(fields):
    """``(N, C, H, W)`` float64, and the hours."""
    x = fields[list(CHANNELS)].to_array("channel").transpose("time", "channel", ...)
    return x.values.astype(np.float64), fields["time"].dt.hour.values


@pytest.fixture(scope="module")
def prepared(fields, tmp_path_factory):
    """A training store with the statistics of all but its last twelve times."""

    def finish(path):
        reader = StateReader(path)
        write_statistics(path, reader[np.arange(48)], spectrum=("box", (0.5, 1.0)), fields=48)

    path = tmp_path_factory.mktemp("prepared") / "x.zarr"
    return write_training_store(fields, path, "here", finish=finish)


def test_moments_are_those_of_float64(store, values, monkeypatch):
    """Deviations of 0.01 K about 280 K, where sums in float32 are off by more than that."""
    monkeypatch.setattr(statistics, "_BLOCK_BYTES", 4 * 3 * 120 * 3)  # many blocks
    x, hours = values
    found = moments(StateReader(store))
    for hour in range(24):
        part = x[hours == hour]
        assert found.count[hour] == len(part)
        if len(part):
            np.testing.assert_allclose(found.mean[hour], part.mean(0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(found.variance[hour], part.var(0), rtol=1e-6)


def test_a_store_holds_every_level_of_detail(prepared, values):
    x, hours = (v[:48] for v in values)
    with xr.open_zarr(prepared, group="statistics", consolidated=False) as stored:
        stored.load()
    assert stored.attrs["samples"] == 48
    assert (stored.attrs["first"], stored.attrs["last"]) == (
        "2020-01-01T00:00:00",
        "2020-01-06T21:00:00",
    )
    close = {"rtol": 1e-6, "atol": 1e-12}
    np.testing.assert_allclose(stored["hour_mean"][9], x[hours == 9].mean(0), **close)
    np.testing.assert_allclose(stored["hour_std"][9], x[hours == 9].std(0), **close)
    assert stored["hour_count"].values.tolist() == [6, 0, 0] * 8
    assert np.isnan(stored["hour_mean"][1]).all()
    np.testing.assert_allclose(stored["point_mean"], x.mean(0), **close)
    np.testing.assert_allclose(stored["point_std"], x.std(0), **close)
    np.testing.assert_allclose(stored["channel_mean"], x.mean((0, 2, 3)), **close)
    np.testing.assert_allclose(stored["channel_std"], x.std((0, 2, 3)), **close)


@pytest.mark.parametrize("per_point", [False, True])
@pytest.mark.parametrize("harmonics", [False, 1, 2])
def test_a_normalization_from_statistics_is_the_one_from_samples(
    prepared, values, per_point, harmonics
):
    options = {"per_point": per_point, "per_hour": harmonics is not False}
    options["harmonics"] = harmonics or None
    x, hours = (torch.from_numpy(v[:48]) for v in values)
    expected = Normalization.fit(CHANNELS, x.float(), hours, **options)
    stored = StoredStatistics.of(str(prepared)).moments(CHANNELS, slice(None), slice(None))
    found = Normalization.from_moments(CHANNELS, stored, **options)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.std, expected.std, rtol=1e-5, atol=0)
    part = StoredStatistics.of(str(prepared)).moments(("u10m",), slice(2, 5), slice(1, 4))
    torch.testing.assert_close(part.mean, stored.mean[:, 2:, 2:5, 1:4])


def test_one_spectrum_serves_every_climatology(prepared, values):
    x, hours = (torch.from_numpy(v[:48]) for v in values)
    basis = CosineBasis((10, 12), (0.5, 1.0))
    stored = StoredStatistics.of(str(prepared))
    for options in ({}, {"per_point": True}, {"per_hour": True, "harmonics": 1}):
        fitted = Normalization.fit(CHANNELS, x.float(), hours, **options)
        scale = fitted.std.mean((0, 2, 3), keepdim=True).expand_as(fitted.std)
        common = Normalization(CHANNELS, fitted.mean, scale)
        expected = basis.analyze(common.normalize(x, hours)).square().mean(0)
        torch.testing.assert_close(stored.power(basis, common), expected, rtol=1e-6, atol=1e-12)
    assert stored.power(FourierBasis((10, 12), (0.5, 1.0)), common) is None
    assert stored.power(CosineBasis((10, 12), (0.5, 2.0)), common) is None
    assert stored.power(CosineBasis((9, 12), (0.5, 1.0)), common) is None
    by_point = Normalization.fit(CHANNELS, x.float(), per_point=True)
    assert stored.power(basis, by_point) is None


def test_statistics_know_whose_they_are(prepared, store, fields, tmp_path):
    times = fields["time"].values
    stored = StoredStatistics.of(str(prepared))
    assert stored.are_of(times[:48])
    for other in (times[:47], times, times[1:49], times[10:58]):
        assert not stored.are_of(other)
    assert StoredStatistics.of(str(store)) is None
    assert StoredStatistics.of(str(tmp_path / "none.nc")) is None


def test_a_few_of_many_do_not_fall_on_the_same_hours():
    chosen = random_subset(24 * 500, 500)
    assert len(set(chosen.tolist())) == 500 and (np.diff(chosen) > 0).all()
    assert np.bincount(chosen % 24, minlength=24).min() > 5
    assert random_subset(3, 5).tolist() == [0, 1, 2]
