# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.observations import (
    DerivedOperator,
    LinearOperator,
    PointOperator,
    StackedOperator,
    humidity,
    joined,
    pressure_at,
    temperature_at,
    wind_direction,
    wind_speed,
)
from ddo_modulus.observations.atmosphere import (
    saturation_pressure,
    standard_pressure,
    standard_temperature,
)

CHANNELS = ("t2m", "d2m", "q2m", "r2m", "sp", "u10m", "v10m")
LAT, LON = [57.9, 55.25, 53.0, 53.4], [-5.5, -2.25, 0.99, -6.0]
RISE = torch.tensor([120.0, -80.0, 0.0, 900.0], dtype=torch.float64)
REPORTED = torch.tensor([350.0, 10.0, 200.0, 300.0], dtype=torch.float64)


@pytest.fixture
def read(grid):
    return lambda name: PointOperator(grid, LAT, LON, CHANNELS.index(name))


def made(read):
    t, d, q, r, p, u, v = (read(name) for name in CHANNELS)
    aloft = torch.tensor([7e4, 8e4, 9e4, 1e5], dtype=torch.float64)
    return {
        "temperature": temperature_at(t, RISE),
        "pressure of standard air": pressure_at(p, RISE, standard_temperature(RISE)),
        "pressure": pressure_at(p, RISE, t),
        "q from d": humidity("q", "d", d, pressure=p),
        "r from d": humidity("r", "d", d, t),
        "d from q": humidity("d", "q", q, pressure=p),
        "r from q": humidity("r", "q", q, t, p),
        "r from q aloft": humidity("r", "q", q, t, aloft),
        "d from r": humidity("d", "r", r, t),
        "q from r": humidity("q", "r", r, t, p),
        "q from r aloft": humidity("q", "r", r, t, aloft),
        "speed": wind_speed(u, v),
        "direction": wind_direction(u, v, REPORTED),
        "all": StackedOperator(
            joined([temperature_at(t, RISE), p]), wind_direction(u, v, REPORTED), wind_speed(u, v)
        ),
    }


NAMES = list(made(lambda name: LinearOperator(torch.zeros(4, 1).long(), torch.ones(4, 1), RISE)))


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_consistent(read, atmosphere, consistent, name):
    consistent(made(read)[name], *atmosphere(CHANNELS))


@pytest.mark.parametrize("name", ["temperature", "pressure of standard air"])
def test_some_are_linear(read, name):
    assert isinstance(made(read)[name], LinearOperator)


def uniform(**values):
    x = torch.zeros(1, len(CHANNELS), 6, 8, dtype=torch.float64)
    for name, value in values.items():
        x[:, CHANNELS.index(name)] = value
    return x


@pytest.mark.parametrize("measured", [True, False])
def test_standard_air_above_a_model_is_the_standard_atmosphere(read, measured):
    """A surface at 400 m in the standard atmosphere, stations above and below it."""
    ground = torch.tensor(400.0, dtype=torch.float64)
    t, p = standard_temperature(ground), standard_pressure(ground)
    x, height = uniform(t2m=t, sp=p), ground + RISE
    warmth = read("t2m") if measured else t.expand(4)
    found = pressure_at(read("sp"), RISE, warmth)(x)[0]
    torch.testing.assert_close(found, standard_pressure(height), rtol=1e-7, atol=0)
    found = temperature_at(read("t2m"), RISE)(x)[0]
    torch.testing.assert_close(found, standard_temperature(height), rtol=1e-7, atol=0)
    steeper = temperature_at(read("t2m"), RISE, 0.0098)(x)[0]
    torch.testing.assert_close(found - steeper, 0.0033 * RISE)


def test_saturated_air(read):
    """At the dew point relative humidity is 100 %, and every kind leads to the same vapour."""
    x = uniform(t2m=283.0, d2m=283.0, sp=9.5e4)
    torch.testing.assert_close(
        humidity("r", "d", read("d2m"), read("t2m"))(x), torch.full((1, 4), 100.0).double()
    )
    q = humidity("q", "d", read("d2m"), pressure=read("sp"))(x)
    x[:, CHANNELS.index("q2m")] = q[0, 0]
    back = humidity("d", "q", read("q2m"), pressure=read("sp"))(x)
    torch.testing.assert_close(back, torch.full((1, 4), 283.0).double(), rtol=1e-6, atol=0)
    e = float(saturation_pressure(torch.tensor(283.0).double()))
    assert float(q[0, 0]) == pytest.approx(0.62198 * e / (9.5e4 - 0.37802 * e), rel=1e-5)


def test_what_humidity_needs(read):
    with pytest.raises(InputError, match="'r' from 'd' needs temperature"):
        humidity("r", "d", read("d2m"))
    with pytest.raises(InputError, match="'q' from 'd' needs pressure"):
        humidity("q", "d", read("d2m"), read("t2m"))
    with pytest.raises(InputError, match="kind d, q or r"):
        humidity("w", "d", read("d2m"))


# ---- direction ----------------------------------------------------------------------------------


def wind(speed, direction):
    """Components of a wind from a direction."""
    angle = np.deg2rad(direction)
    return uniform(u10m=-speed * np.sin(angle), v10m=-speed * np.cos(angle))


@pytest.mark.parametrize("direction", [0.0, 5.0, 90.0, 180.0, 271.0, 359.0])
def test_innovations_of_direction_are_wrapped(read, direction):
    operator = wind_direction(read("u10m"), read("v10m"), REPORTED)
    innovation = REPORTED - operator(wind(20.0, direction))[0]
    expected = (REPORTED - direction + 180) % 360 - 180
    torch.testing.assert_close(innovation, expected, rtol=2e-3, atol=1e-4)


def test_calm_has_no_direction(read, atmosphere):
    operator = wind_direction(read("u10m"), read("v10m"), REPORTED)
    calm = uniform()
    torch.testing.assert_close(operator(calm)[0], REPORTED)
    slope = operator.linearize(calm).adjoint(torch.ones(1, 4).double(), calm.shape[1:])
    assert bool((slope == 0).all())
    # Bounded slopes all round: a steeper one would be seen between near winds.
    for angle in range(0, 360, 15):
        for speed in (0.01, 0.3, 0.5, 1.0):
            tangent = operator.linearize(wind(speed, 200.0 + angle + 1))
            steepest = tangent.adjoint(torch.eye(4).double()[2:3], calm.shape[1:])
            assert float(steepest.flatten(1).norm()) < 250  # degrees for 1 m/s


def test_steps_turn_the_wind_to_the_report_the_short_way(read):
    """Gauss-Newton steps with the wind's covariance as in optimal interpolation."""
    for reported, start in ((10.0, 320.0), (10.0, 150.0), (200.0, 45.0)):
        operator = wind_direction(read("u10m"), read("v10m"), torch.full((4,), reported))
        x, seen = wind(6.0, start), [start]
        for _ in range(12):
            h = operator.linearize(x).adjoint(torch.eye(4).double()[1:2], x.shape[1:])
            gain = 4.0 * h / (4.0 * h.square().sum() + 5.0**2)
            x = x + gain * (reported - operator(x)[0, 1])
            u, v = (read(name)(x)[0, 1] for name in ("u10m", "v10m"))
            seen.append(float(torch.rad2deg(torch.atan2(-u, -v))) % 360)
        away = np.abs((np.array(seen) - reported + 180) % 360 - 180)
        assert (np.diff(away) < 0.5).all() and away[-1] < 0.2 * away[0]


def test_constants_stay_with_their_observations(read):
    u, v = read("u10m"), read("v10m")
    x = wind(7.0, 100.0)
    some = torch.tensor([2, 0])
    few = wind_direction(u.take(some), v.take(some), REPORTED[some])
    torch.testing.assert_close(few(x), wind_direction(u, v, REPORTED)(x)[:, some])
    shifted = DerivedOperator(lambda a, b: a + b, u, constants=[RISE])
    torch.testing.assert_close(shifted(x), u(x) + RISE)
