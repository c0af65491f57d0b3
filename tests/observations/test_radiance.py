# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from ddo_modulus.errors import InputError
from ddo_modulus.observations import (
    DerivedOperator,
    LinearRadiance,
    PointOperator,
    ProfileOperator,
    StackedOperator,
    sounding,
)
from ddo_modulus.observations.radiance import AMSU_A_PEAKS

LEVELS = {f"t{p}": float(p) for p in (1000, 925, 850, 700, 600, 500, 400, 300, 250, 200, 150, 100)}
HIGH = LEVELS | {f"t{p}": float(p) for p in (70, 50, 30, 20, 10)}


# ---- weighting functions ------------------------------------------------------------------------


@pytest.mark.parametrize("surface", [None, "skt"])
def test_weights_add_up_to_one(surface):
    made = sounding(HIGH, surface=surface)
    assert made.channels == (5, 6, 7, 8, 9)
    for weights in made.weights.values():
        assert sum(weights.values()) == pytest.approx(1.0, abs=1e-12)
        assert min(weights.values()) >= 0
        assert ("skt" in weights) == (surface is not None)


def test_weights_peak_where_the_channel_does():
    """Per unit of log p, on levels fine enough to tell."""
    pressure = np.geomspace(5, 1000, 120)
    for channel, weights in sounding({f"t{p:.3f}": p for p in pressure}).weights.items():
        peak = pressure[1:-1][np.argmax(list(weights.values())[1:-1])]
        assert peak == pytest.approx(AMSU_A_PEAKS[channel], rel=0.05)


@pytest.mark.parametrize("surface", [None, "skt"])
def test_a_profile_linear_in_log_p_is_seen_exactly(surface):
    """Against the integral of the profile over the transmittance, by fine quadrature."""
    levels = HIGH if surface is None else HIGH
    made = sounding(levels, surface=surface)
    bottom = 1000.0 if surface is None else 1013.25
    p = np.geomspace(10, bottom, 200001)
    for channel, weights in made.weights.items():
        seen = sum(
            w * (280 + 30 * np.log((1013.25 if name == "skt" else HIGH[name]) / 1000))
            for name, w in weights.items()
        )
        transmittance = np.exp(-((p / AMSU_A_PEAKS[channel]) ** 2))
        emitted = -np.diff(transmittance)
        air = 280 + 30 * np.log(np.sqrt(p[1:] * p[:-1]) / 1000)
        total, expected = emitted.sum(), (emitted * air).sum()
        if surface is not None:
            ground = transmittance[-1]
            total, expected = total + ground, expected + ground * (280 + 30 * np.log(1.01325))
        assert seen == pytest.approx(expected / total, abs=1e-3)


def test_channels_that_the_levels_do_not_hold_are_left_out():
    assert sounding(LEVELS).channels == (5, 6, 7, 8)  # 90 hPa is above 100
    assert sounding({"t850": 850.0, "t500": 500.0}).channels == ()
    assert sounding({"t850": 850.0, "t500": 500.0}, surface="t2m", least=0.5).channels == (5,)
    assert sounding({}).channels == ()


def test_weights_have_to_be_numbers():
    for weights in ({}, {"t500": np.nan}):
        with pytest.raises(InputError, match="weights of satellite channel 3"):
            LinearRadiance({3: weights})


# ---- functions of a profile ---------------------------------------------------------------------

CHANNELS = ("t850", "t500", "q850", "u500")
LAT, LON = [57.9, 55.25, 53.0], [-5.5, -2.25, 0.99]
POINT, OUTPUT = torch.tensor([0, 2, 2, 1, 0, 1]), torch.tensor([1, 0, 3, 3, 0, 0])
ANGLE = torch.tensor([[0.0], [20.0], [40.0]], dtype=torch.float64)


def emulator(profile):
    """Four smooth channels of two temperatures, humidity and an angle."""
    low, high, q, angle = profile.unbind(-1)
    thick = 300 * q / torch.cos(torch.deg2rad(angle))
    share = torch.stack([(-k * thick).exp() for k in (0.3, 0.6, 1.2, 2.0)], -1)
    return share * low[..., None] + (1 - share) * high[..., None]


@pytest.fixture
def read(grid):
    return lambda name: PointOperator(grid, LAT, LON, CHANNELS.index(name))


def built(read, function=emulator):
    inputs = [read(name) for name in CHANNELS[:3]]
    return ProfileOperator(function, inputs, POINT, OUTPUT, ANGLE)


def test_operators_are_consistent(read, atmosphere, consistent):
    consistent(built(read), *atmosphere(CHANNELS))
    consistent(StackedOperator(read("u500"), built(read)), *atmosphere(CHANNELS))


def test_observations_are_outputs_of_their_points(read, atmosphere):
    """Against one derived operator for each observation."""
    x, v = atmosphere(CHANNELS)
    operator = built(read)
    tangent = operator.linearize(x)
    for m, (n, k) in enumerate(zip(POINT.tolist(), OUTPUT.tolist(), strict=True)):
        parts = [read(name).take(torch.tensor([n])) for name in CHANNELS[:3]]

        def one(low, high, q, k=k, angle=ANGLE[n]):
            return emulator(torch.stack([low, high, q, angle.expand_as(q)], -1))[..., k]

        alone = DerivedOperator(one, *parts)
        torch.testing.assert_close(operator(x)[:, m], alone(x)[:, 0])
        torch.testing.assert_close(tangent(v)[:, m], alone.linearize(x)(v)[:, 0])


def test_air_of_one_temperature_is_seen_as_that(read):
    x = torch.full((1, 4, 6, 8), 250.0, dtype=torch.float64)
    x[:, 2] = 5e-3
    torch.testing.assert_close(built(read)(x), torch.full((1, 6), 250.0).double())


def test_modules_compute_in_their_own_precision(read, atmosphere):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    x, v = atmosphere(CHANNELS)
    operator = built(read, network)
    assert operator(x).dtype == torch.float64 and operator.linearize(x)(v).dtype == torch.float64
    torch.testing.assert_close(operator(x), operator(x.float()).double(), rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        assert bool(operator.linearize(x.float())(v.float()).isfinite().all())


def test_mistakes_are_named(read, atmosphere):
    inputs = [read(name) for name in CHANNELS[:3]]
    with pytest.raises(InputError, match="one of the 3 points"):
        ProfileOperator(emulator, inputs, torch.tensor([3]), torch.tensor([0]))
    with pytest.raises(InputError, match="counted from zero"):
        ProfileOperator(emulator, inputs, torch.tensor([0]), torch.tensor([-1]))
    with pytest.raises(InputError, match="equally many points"):
        ProfileOperator(emulator, [*inputs, inputs[0].take(POINT)], POINT, OUTPUT)
    with pytest.raises(InputError, match=r"made \(3, 3, 2\) of \(3, 3, 4\).*at least 4 outputs"):
        built(read, lambda profile: profile[..., :2])(atmosphere(CHANNELS)[0])
