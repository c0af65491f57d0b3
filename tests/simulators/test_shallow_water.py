# SPDX-License-Identifier: Apache-2.0
"""The shallow-water simulator against exact solutions and invariants.

Axes: fields ``(B, C, H, W)``, coefficients ``(B, 3, L, M)``.
"""

import math

import numpy as np
import pytest
import torch
from tensors import generator

from ddo_modulus.errors import InputError
from ddo_modulus.simulators import ShallowWater

pytest.importorskip(
    "torch_harmonics",
    reason="torch-harmonics is not installed, or built for another torch",
    exc_type=ImportError,
)

ALL = ["height", "u", "v", "vorticity", "divergence"]
SMALL = ShallowWater(
    variables=ALL, shape=[33, 64], truncation=21, dt=900.0, interval=3600.0, spin_up=3600.0
)
DOUBLE = (torch.device("cpu"), torch.float64)


def on_grid(flow, fields):
    integrator = flow.integrator(flow.dt, *DOUBLE)
    return integrator.frame(integrator.start(fields))


def latitude(flow):
    return torch.deg2rad(torch.from_numpy(flow.coordinates()["lat"][1]))[:, None]


@pytest.fixture(scope="module")
def random():
    return SMALL.initial(40, generator=generator(), dtype=torch.float64)


def zonal_flow(flow, speed):
    """Williamson et al. (J. Comput. Phys. 102, 1992), test 2: solid rotation and its height."""
    integrator = flow.integrator(flow.dt, *DOUBLE)
    solver = integrator.solver
    sine = torch.sin(solver.lats)[:, None].expand(solver.nlat, solver.nlon)
    a, rotation = flow.radius, flow.rotation
    fields = torch.stack([
        flow.gravity * flow.depth - (a * rotation * speed + speed**2 / 2) * sine**2,
        2 * speed / a * sine,
        0 * sine,
    ])  # fmt: skip
    return solver.grid2spec(fields)[None]


def test_zonal_flow_in_geostrophic_balance_stays_steady():
    start = zonal_flow(SMALL, 40.0)
    before, after = (on_grid(SMALL, x)[0] for x in (start, SMALL.advance(start, 86400.0)))
    exact = 40.0 * torch.cos(latitude(SMALL)).expand(33, 64)
    torch.testing.assert_close(before[1], exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(after[1], exact, rtol=0, atol=1e-4)
    assert after[2].abs().max() < 1e-4
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-2)


def test_gravity_waves_have_the_speed_of_the_dispersion_relation():
    """Without rotation a small height of degree l swings as cos(sqrt(g h l (l + 1)) t / a)."""
    flow = ShallowWater(truncation=21, shape=[33, 64], rotation=0.0, dt=200.0)
    start = torch.zeros(1, 3, 22, 22, dtype=torch.complex128)
    start[0, 0, 0, 0] = math.sqrt(4 * math.pi) * flow.gravity * flow.depth
    start[0, 0, 5, 3] = 1.0 + 0.5j
    frequency = math.sqrt(flow.gravity * flow.depth * 30) / flow.radius
    end = flow.advance(start, 9000.0)
    expected = start[0, 0, 5, 3] * math.cos(frequency * 9000.0)
    assert abs(math.cos(frequency * 9000.0)) > 0.1
    torch.testing.assert_close(end[0, 0, 5, 3], expected, rtol=2e-3, atol=0)


def test_mass_and_energy_are_conserved_without_friction(random):
    """Exactly and, since truncated products are not exact in the cubic energy, nearly."""
    integrator = SMALL.integrator(6 * 3600.0, *DOUBLE)
    integrator.solver.hyperdiff.fill_(1.0)
    start = random[:4]
    end = integrator.fields(integrator.run(integrator.start(start)))
    torch.testing.assert_close(end[:, 0, 0, 0], start[:, 0, 0, 0], rtol=1e-13, atol=0)
    weights = integrator.solver.quad_weights

    def energies(x):
        state = integrator.start(x)
        phi = integrator.solver.spec2grid(state[0])
        wind = integrator.solver.getuv(state[1:]).square().sum(0)
        mean = SMALL.gravity * SMALL.depth
        area = (weights / 2 / phi.shape[-1]).expand(phi.shape[-2:])
        return [(x * area).sum((-2, -1)) for x in (0.5 * phi * wind, 0.5 * (phi - mean) ** 2)]

    kinetic, potential = energies(start)
    kinetic_end, potential_end = energies(end)
    assert (on_grid(SMALL, end)[:, 3] - on_grid(SMALL, start)[:, 3]).std() > 5e-6
    total, total_end = kinetic + potential, kinetic_end + potential_end
    assert ((total_end - total) / total).abs().max() < 1e-4


def test_time_stepping_is_of_fourth_order(random):
    """Without the hyperdiffusion, which is split off and of first order, if small."""

    def end(dt):
        flow = ShallowWater(truncation=21, shape=[33, 64], dt=dt)
        integrator = flow.integrator(3600.0, *DOUBLE)
        integrator.solver.hyperdiff.fill_(1.0)
        return integrator.run(integrator.start(random[:2]))[1:]

    reference = end(75.0)
    coarse, fine = ((end(dt) - reference).norm() for dt in (900.0, 450.0))
    assert 3.5 < math.log2(float(coarse / fine)) < 4.7


def test_initial_wind_is_isotropic_balanced_and_as_strong_as_stated(random):
    fields = on_grid(SMALL, random)
    square = (fields[:, 1:3] ** 2).sum(1).mean((0, 2))
    weight = torch.cos(latitude(SMALL))[:, 0]
    assert math.sqrt(float((square * weight).sum() / weight.sum())) == pytest.approx(20.0, rel=0.05)
    by_latitude = fields[:, 3].square().mean((0, 2)).sqrt()
    # Half of a hemisphere each; the poles see one place only, 40 times.
    assert by_latitude[8] / by_latitude[16] == pytest.approx(1.0, abs=0.15)
    assert by_latitude[[0, 32]].mean() / by_latitude[16] == pytest.approx(1.0, abs=0.25)
    assert fields[:, 4].abs().max() < 1e-18
    integrator = SMALL.integrator(SMALL.dt, *DOUBLE)
    tendency = integrator.solver.dudtspec(integrator.start(random))
    assert tendency[2].abs().max() < 1e-8 * tendency[1].abs().max()
    later = on_grid(SMALL, SMALL.advance(random[:4], 86400.0))
    assert later[:, 4].std() < 0.03 * later[:, 3].std()


def test_vorticity_and_divergence_are_derivatives_of_the_wind_northward_and_eastward(random):
    """Differences on a fine grid fix the axes and the signs of u and v."""
    flow = ShallowWater(variables=ALL, shape=[361, 720], truncation=21)
    fields = random[:1].clone()
    fields[:, 2] = random[1, 1]  # a divergence as large as the vorticity
    u, v, vorticity, divergence = on_grid(flow, fields)[0, 1:]
    phi, a = latitude(flow), flow.radius
    step = math.radians(0.5)

    def east(x):
        return (x.roll(-1, 1) - x.roll(1, 1))[1:-1] / (2 * step)

    def north(x):
        x = x * torch.cos(phi)
        return (x[:-2] - x[2:]) / (2 * step)

    cos = a * torch.cos(phi)[1:-1]
    inner = slice(60, -60)
    for found, exact in (
        ((east(v) - north(u)) / cos, vorticity),
        ((east(u) + north(v)) / cos, divergence),
    ):
        error = (found - exact[1:-1])[inner]
        assert error.abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize("shape", [[33, 64], [24, 48]])
def test_output_grids_sample_one_field(random, shape):
    """The rows are where the coordinates say: P1 and a sectoral wave, at any grid."""
    flow = ShallowWater(variables=["vorticity"], shape=shape, truncation=21)
    fields = torch.zeros(1, 3, 22, 22, dtype=torch.complex128)
    fields[0, 0, 0, 0] = 1e6
    fields[0, 1, 1, 0] = 1.0
    fields[0, 1, 1, 1] = 0.5j
    lon = torch.deg2rad(torch.from_numpy(flow.coordinates()["lon"][1]))
    sine, cosine = torch.sin(latitude(flow)), torch.cos(latitude(flow))
    exact = math.sqrt(3 / 4 / math.pi) * sine
    exact = exact - math.sqrt(3 / 8 / math.pi) * cosine * torch.sin(lon)
    torch.testing.assert_close(on_grid(flow, fields)[0, 0], exact, rtol=1e-10, atol=1e-12)


def test_trajectories_do_not_depend_on_the_batch():
    batches = list(SMALL.simulate(3, 2, generator=generator(3), dtype=torch.float64, batch=2))
    assert [tuple(b.shape) for b in batches] == [(2, 2, 5, 33, 64), (1, 2, 5, 33, 64)]
    (alone,) = SMALL.simulate(1, 2, generator=generator(3), dtype=torch.float64)
    torch.testing.assert_close(batches[0][:1], alone, rtol=1e-9, atol=1e-12)
    start = SMALL.initial(1, generator=generator(3), dtype=torch.float64)
    expected = on_grid(SMALL, SMALL.advance(start, 7200.0))
    torch.testing.assert_close(alone[:, 1], expected, rtol=1e-9, atol=1e-12)


def test_single_precision_is_enough(random):
    start = random[:1]
    double = on_grid(SMALL, SMALL.advance(start, 86400.0))
    end = SMALL.advance(start.to(torch.complex64), 86400.0)
    assert end.dtype == torch.complex64
    single = on_grid(SMALL, end.to(torch.complex128))
    for channel in range(4):
        error = (single - double)[:, channel].std()
        assert error < 1e-3 * double[:, channel].std()


def test_labels():
    (frames,) = SMALL.simulate(1, 2, generator=generator())
    data = SMALL.to_dataset(frames, first=7, seed=1)
    assert list(data) == ALL and data["u"].dims == ("trajectory", "time", "lat", "lon")
    np.testing.assert_array_equal(data["v"].values, frames[:, :, 2].numpy())
    assert data["height"].attrs["units"] == "m" and data["lat"].attrs["units"] == "degrees_north"
    assert data["lat"].values[0] == 90 and data["trajectory"].values.tolist() == [7]
    assert data["time"].values[1] - data["time"].values[0] == np.timedelta64(1, "h")
    assert data.attrs["simulator"] == "shallow_water" and data.attrs["shape"] == [33, 64]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"variables": ["t2m"]}, "choose from height"),
        ({"variables": []}, "choose from height"),
        ({"shape": [32, 64]}, r"at least \[64, 127\]"),
        ({"shape": [64, 128.5]}, "latitudes, longitudes"),
        ({"truncation": 21.5}, "whole number"),
        ({"wind": -1.0}, "wind"),
        ({"depth": 0.0}, "depth"),
    ],
)
def test_parameters_out_of_range_are_named(wrong, match):
    with pytest.raises(InputError, match=match):
        ShallowWater(**wrong)


def test_what_cannot_be_integrated_is_refused():
    fast = ShallowWater(truncation=21, shape=[33, 64], dt=7200.0)
    with pytest.raises(InputError, match=r"time step .* is unstable.*use dt <= "):
        list(fast.simulate(1, 1, generator=generator()))
    shallow = ShallowWater(truncation=21, shape=[33, 64], depth=100.0)
    with pytest.raises(InputError, match="use a larger depth"):
        list(shallow.simulate(1, 1, generator=generator()))
    with pytest.raises(InputError, match="expected"):
        SMALL.advance(torch.zeros(1, 3, 5, 5, dtype=torch.complex128), 1.0)
    with pytest.raises(InputError, match="expected"):
        SMALL.to_dataset(torch.zeros(1, 1, 33, 64))
