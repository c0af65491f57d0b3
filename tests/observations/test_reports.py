# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas as pd
import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.observations import (
    DerivedOperator,
    LinearOperator,
    LinearRadiance,
    PointOperator,
    ProfileRadiance,
    ReportOperators,
    StackedOperator,
    typical_error,
)
from ddo_modulus.observations.atmosphere import (
    pressure_ratio,
    saturation_pressure,
    specific_humidity,
    standard_height,
    standard_pressure,
    standard_temperature,
    vapor_pressure,
)
from ddo_modulus.observations.table import read_table

CHANNELS = (
    *("t2m", "d2m", "sp", "u10m", "v10m", "t850", "t500", "t250"),
    *("q850", "q500", "u850", "u500", "v850", "v500", "z850", "z500"),
)
LAT, LON = 55.25, -2.25


@pytest.fixture
def orography(grid):
    """A plane, which bilinear interpolation reads exactly: 400 m at the station."""
    return 400 + 50 * (grid.lat[:, None] - LAT) - 20 * (grid.lon - LON)


@pytest.fixture
def operators(grid, orography):
    return ReportOperators(CHANNELS, grid, orography)


def row(variable, observation=1.0, **columns):
    return pd.DataFrame(
        [{"lat": LAT, "lon": LON, "variable": variable, "observation": observation, **columns}]
    )


def seen(operators, x, *args, **columns):
    """What one report would be of the first of some states."""
    operator, _ = operators.operator(row(*args, **columns))
    return float(operator(x)[0, 0])


@pytest.fixture
def x(atmosphere):
    return atmosphere(CHANNELS)[0]


@pytest.fixture
def at(grid, x):
    """A channel of the first state at the station."""
    return lambda name: PointOperator(grid, LAT, LON, CHANNELS.index(name))(x)[0, 0]


def test_stations_stand_above_the_models_surface(operators, x, at):
    for column in ("elev", "station_elev"):
        found = seen(operators, x, "t2m", **{column: 700.0})
        assert found == pytest.approx(float(at("t2m")) - 0.0065 * 300)
        ratio = pressure_ratio(at("t2m"), torch.tensor(300.0))
        assert seen(operators, x, "sp", **{column: 700.0}) == pytest.approx(float(at("sp") * ratio))
    # `elev` counts where both are there.
    both = seen(operators, x, "t2m", elev=700.0, station_elev=0.0)
    assert both == pytest.approx(float(at("t2m")) - 0.0065 * 300)
    for name in ("t2m", "sp"):
        assert seen(operators, x, name, elev=np.nan) == pytest.approx(float(at(name)))
    ratio = pressure_ratio(at("t2m"), torch.tensor(-400.0))
    assert seen(operators, x, "msl") == pytest.approx(float(at("sp") * ratio))
    # What has no correction.
    assert seen(operators, x, "d2m", elev=700.0) == pytest.approx(float(at("d2m")))


def test_without_temperature_air_is_standard(grid, orography, x, at):
    operators = ReportOperators(("sp",), grid, orography)
    pressure = x[:, CHANNELS.index("sp")][:, None]
    ground, height = torch.tensor([400.0, 700.0]).double()
    found = seen(operators, pressure, "sp", elev=700.0)
    ratio = standard_pressure(height) / standard_pressure(ground)
    assert found == pytest.approx(float(at("sp") * ratio), rel=1e-6)
    operator, _ = operators.operator(row("sp", elev=700.0))
    assert isinstance(operator, LinearOperator)


def test_station_pressure_from_sea_level_pressure(grid, orography, x, at):
    """In the standard atmosphere, with and without a temperature that follows it."""
    ground, height = torch.tensor([400.0, 700.0]).double()
    msl = torch.full((1, 1, 6, 8), 101325.0, dtype=torch.float64)
    warm = torch.full((1, 1, 6, 8), float(standard_temperature(ground)), dtype=torch.float64)
    plain = ReportOperators(("msl",), grid)
    assert seen(plain, msl, "sp", elev=700.0) == pytest.approx(float(standard_pressure(height)))
    operators = ReportOperators(("msl", "t2m"), grid, np.full((6, 8), 400.0))
    found = seen(operators, torch.cat([msl, warm], 1), "sp", elev=700.0)
    assert found == pytest.approx(float(standard_pressure(height)))
    assert list(plain.refused(row("sp"))) == ["no height of the station"]


def test_without_an_orography_nothing_is_corrected(grid, x, at):
    operators = ReportOperators(CHANNELS, grid)
    for name in ("t2m", "sp"):
        assert seen(operators, x, name, elev=700.0) == pytest.approx(float(at(name)))
    assert not operators.observable("msl")


def test_what_is_used_with_a_reservation_is_told(grid, operators):
    rows = pd.concat([row("t2m", elev=5.0), row("t2m"), row("sp"), row("d2m"), row("t2m")])
    assert operators.notes(rows) == {
        "t2m without correction for height": 2,
        "sp without correction for height": 1,
    }
    blind = ReportOperators(("t2m",), grid)
    assert blind.notes(rows) == {"t2m without correction for height": 3}
    assert ReportOperators(("u10m",), grid).notes(rows) == {}


def test_humidity(grid, orography, operators, x, at):
    e = saturation_pressure(at("d2m"))
    expected = 100 * e / saturation_pressure(at("t2m"))
    assert seen(operators, x, "r2m") == pytest.approx(float(expected))
    assert seen(operators, x, "q2m") == pytest.approx(float(specific_humidity(e, at("sp"))))
    pair = x[:, :2]
    standard = ReportOperators(CHANNELS[:2], grid, orography)
    p = standard_pressure(torch.tensor(400.0).double())
    assert seen(standard, pair, "q2m") == pytest.approx(float(specific_humidity(e, p)))
    nothing = ReportOperators(CHANNELS[:2], grid)
    assert nothing.observable("r2m") and not nothing.observable("q2m")
    assert not ReportOperators(("d2m",), grid).observable("r2m")
    for source in ("q2m", "r2m"):
        names = (source, "t2m", "sp")
        other = ReportOperators(names, grid)
        assert all(other.observable(f"{kind}2m") for kind in "dqr")
    assert not ReportOperators(("q2m", "t2m"), grid).observable("d2m")


def test_wind(operators, x, at):
    speed = torch.hypot(at("u10m"), at("v10m"))
    assert seen(operators, x, "ws10m") == pytest.approx(float(speed), rel=1e-6)
    direction = torch.rad2deg(torch.atan2(-at("u10m"), -at("v10m")))
    found = seen(operators, x, "wd10m", float(direction) % 360)
    assert found == pytest.approx(float(direction) % 360, abs=1e-4)
    assert not operators.observable("ws100m")


def test_reports_aloft(grid, operators, x, at):
    share = np.log(70 / 50) / np.log(85 / 50)

    def between(name):
        return share * at(f"{name}850") + (1 - share) * at(f"{name}500")

    for name in ("t", "u", "v", "z", "q"):
        expected = pytest.approx(float(between(name)))
        assert seen(operators, x, name, pres=7e4) == expected
        assert seen(operators, x, f"{name}700") == expected
        assert seen(operators, x, f"{name}850", pres=7e4) == pytest.approx(float(at(f"{name}850")))
    u, v = between("u"), between("v")
    assert seen(operators, x, "ws", pres=7e4) == pytest.approx(float(torch.hypot(u, v)), rel=1e-6)
    direction = float(torch.rad2deg(torch.atan2(-u, -v))) % 360
    assert seen(operators, x, "wd700", direction) == pytest.approx(direction, abs=1e-4)
    e = vapor_pressure(between("q"), torch.tensor(7e4))
    expected = 100 * e / saturation_pressure(between("t"))
    assert seen(operators, x, "r", pres=7e4) == pytest.approx(float(expected))
    relative = ReportOperators(("r850", "r500", "t850", "t500"), grid)
    assert relative.observable("q")
    assert not ReportOperators(("r850", "r500"), grid).observable("q")


def test_brightness_temperatures(grid, operators, x, at):
    weights = operators.radiances["amsua"].weights[6]
    assert set(weights) == {"t250", "t500", "t850", "t2m"}
    expected = sum(w * float(at(name)) for name, w in weights.items())
    assert seen(operators, x, "amsua", sensor_index=6) == pytest.approx(expected)
    assert seen(operators, x, "atms", sensor_index=7) == pytest.approx(expected)  # same frequency
    other = ReportOperators(
        CHANNELS, grid, radiances={"mhs": LinearRadiance({3: {"t500": 0.5}}, {3: 120.0})}
    )
    found = seen(other, x, "mhs", sensor_index=3)
    assert found == pytest.approx(120 + 0.5 * float(at("t500")))
    assert other.observable("amsua") and not operators.observable("mhs")
    assert not ReportOperators(("u10m",), grid).observable("amsua")


def test_functions_of_the_profile(grid, x, at):
    calls = []

    def function(profile):
        calls.append(profile.shape)
        low, high, angle = profile.unbind(-1)
        return torch.stack([low + angle, high - angle, low * high / 300], -1)

    model = ProfileRadiance(function, ("t850", "t500"), (11, 12, 15), ("satellite_za",))
    operators = ReportOperators(CHANNELS, grid, radiances={"iasi": model})
    rows = pd.concat(
        [row("iasi", sensor_index=c, satellite_za=a) for a in (10.0, 30.0) for c in (15, 11)]
    ).reset_index(drop=True)
    operator, ordered = operators.operator(rows)
    found = operator(x)[0]
    assert calls == [(3, 2, 3)]  # two views of two channels each
    low, high = at("t850"), at("t500")
    expected = torch.stack([low * high / 300, low + 10, low * high / 300, low + 30])
    torch.testing.assert_close(found, expected)
    assert list(operators.refused(row("iasi", sensor_index=13))) == [
        "satellite channel not modelled"
    ]
    with pytest.raises(InputError, match="need the columns satellite_za"):
        operators.operator(row("iasi", sensor_index=11))
    with pytest.raises(InputError, match="values of the columns satellite_za are missing"):
        operators.operator(row("iasi", sensor_index=11, satellite_za=np.nan))
    with pytest.raises(InputError, match="of iasi need t850, t500; the prior has t2m"):
        ReportOperators(("t2m",), grid, radiances={"iasi": model})


def test_what_cannot_be_used_has_a_reason(operators):
    rows = pd.concat(
        [
            row("t2m"),
            row("tcc"),
            row("t"),
            row("t", pres=1e4),
            row("t", pres=6e4),
            row("u", pres=3e4),  # t has a level above it, u has none
            row("r", pres=3e4),
            row("t1000"),
            row("w", pres=6e4),
            row("ws100m"),
            row("amsua", sensor_index=14),
            row("amsua"),
            row("q2m"),
        ]
    ).reset_index(drop=True)
    assert list(operators.refused(rows)) == [
        "",
        "unknown variable",
        "no pressure",
        "outside the pressure levels",
        "",
        "outside the pressure levels",
        "outside the pressure levels",
        "outside the pressure levels",
        "unknown variable",
        "unknown variable",
        "satellite channel not modelled",
        "satellite channel not modelled",
        "",
    ]
    with pytest.raises(InputError, match="10 reports: unknown variable"):
        operators.operator(rows)


def test_linear_reports_come_first_as_one_operator(operators, x):
    rows = pd.concat(
        [
            row("ws10m"),
            row("t2m", elev=10.0),
            row("wd10m", 200.0),
            row("t", pres=6e4),
            row("u850"),
            row("amsua", sensor_index=6),
        ]
    ).reset_index(drop=True)
    operator, ordered = operators.operator(rows)
    assert list(ordered["variable"]) == ["t2m", "t", "u850", "amsua", "ws10m", "wd10m"]
    assert isinstance(operator, StackedOperator)
    kinds = [type(part) for part in operator.operators]
    assert kinds == [LinearOperator, DerivedOperator, DerivedOperator]
    for m, index in enumerate(ordered.index):
        alone, _ = operators.operator(rows.loc[[index]])
        torch.testing.assert_close(operator(x)[:, m], alone(x)[:, 0])
    linear, _ = operators.operator(rows[rows["variable"].isin(["t2m", "t", "amsua"])])
    assert isinstance(linear, LinearOperator)


def test_all_together_are_consistent(operators, atmosphere, consistent):
    rows = [row(name, 250.0, elev=650.0) for name in ("sp", "msl", "r2m", "q2m", "ws10m", "wd10m")]
    rows += [row(name, 90.0, pres=6e4) for name in ("t", "r", "wd")]
    operator, _ = operators.operator(pd.concat(rows).reset_index(drop=True))
    consistent(operator, *atmosphere(CHANNELS))


def test_typical_errors():
    names = ["t2m", "u850", "t", "z500", "wd10m", "q700", "q", "tcc", "amsua"]
    rows = pd.concat([row(name, pres=9e4) for name in names]).reset_index(drop=True)
    p = torch.tensor([7e4, 9e4]).double()
    saturated = saturation_pressure(standard_temperature(standard_height(p)))
    q = 0.1 * specific_humidity(saturated, p)
    expected = [1.0, 2.0, 1.0, np.nan, 20.0, float(q[0]), float(q[1]), np.nan, 1.5]
    np.testing.assert_allclose(typical_error(rows), expected)
    assert 3e-4 < float(q[0]) < 6e-4


def test_mistakes_are_named(grid):
    with pytest.raises(InputError, match=r"orography: heights from 4e\+04 to 4e\+04 m cannot be"):
        ReportOperators(CHANNELS, grid, np.full((6, 8), 4e4))
    with pytest.raises(InputError, match=r"orography on \(8, 6\) does not fit a grid \(6, 8\)"):
        ReportOperators(CHANNELS, grid, np.zeros((8, 6)))
    with pytest.raises(InputError, match="lapse rate of 6.5 K/m"):
        ReportOperators(CHANNELS, grid, lapse_rate=6.5)


def test_columns_of_checked_tables_are_understood(operators, x):
    """As they come out of the reader."""
    frame = pd.concat([row("t2m", 283.0, elev=700.0), row("t", 263.0, pres=6e4)])
    table = read_table(frame.assign(time="2019-03-27T06", station="03162"))
    assert not operators.refused(table.frame).any()
    operator, ordered = operators.operator(table.frame)
    expected = [seen(operators, x, "t2m", elev=700.0), seen(operators, x, "t", pres=6e4)]
    np.testing.assert_allclose(operator(x)[0].numpy(), expected)
