# SPDX-License-Identifier: Apache-2.0
"""Random perturbations: their law on the sphere, and what Earth2Studio asks of a perturbation."""

import contextvars
from collections import OrderedDict

import numpy as np
import pytest
import torch
from scipy.special import eval_legendre

from ddo_modulus.constants import EARTH_RADIUS_KM
from ddo_modulus.errors import InputError
from ddo_modulus.fields.covariance import distances_km
from ddo_modulus.fields.grid import LatLonGrid

pytest.importorskip("earth2studio")

from earth2studio.utils.checkpoint import Checkpoint  # noqa: E402

from ddo_modulus.earth2 import GaussianFieldPerturbation  # noqa: E402

GLOBE = LatLonGrid(np.linspace(90, -90, 19), np.arange(36) * 10.0)  # with both poles
CENTRES = LatLonGrid(85.0 - 10 * np.arange(18), np.arange(36) * 10.0)  # without
UK = LatLonGrid(np.arange(58.0, 49.9, -1.0), np.arange(-10.0, 2.1, 1.0))


def coords_of(grid, **leading):
    return OrderedDict(**leading, lat=grid.lat, lon=np.mod(grid.lon, 360))


def covariance(perturbation, grid):
    """Exact covariance of the field that is added, between all points."""
    field = perturbation._field_at(grid.lat, np.mod(grid.lon, 360))
    points = torch.eye(len(grid.lat) * len(grid.lon), dtype=torch.float64)
    root = field.color_adjoint(points.unflatten(1, (1, *grid.shape))).flatten(1)
    return (root @ root.mT).numpy()


@pytest.mark.parametrize("grid", [GLOBE, CENTRES, UK], ids=["poles", "centres", "region"])
@pytest.mark.parametrize(("length", "smoothness"), [(3000.0, 1.5), (2000.0, 0.5)])
def test_covariance_is_the_spheres_matern_of_the_distance(grid, length, smoothness):
    perturbation = GaussianFieldPerturbation(1.0, length, smoothness)
    c = covariance(perturbation, grid)
    # Variance one everywhere, poles included.
    np.testing.assert_allclose(np.diag(c), 1.0, atol=1e-9)
    # The series of Legendre polynomials of the angle, by another code.
    degree = np.arange(perturbation._field.basis.lmax + 1)
    kappa2 = 2 * smoothness * (EARTH_RADIUS_KM / length) ** 2
    weight = (2 * degree + 1) * (kappa2 + degree * (degree + 1.0)) ** -(smoothness + 1)
    cosine = np.cos(distances_km(grid) / EARTH_RADIUS_KM)
    legendre = eval_legendre(degree[:, None, None], cosine)
    expected = np.tensordot(weight / weight.sum(), legendre, 1)
    np.testing.assert_allclose(c, expected, atol=1e-7)


@pytest.mark.parametrize(("length", "smoothness"), [(400.0, 1.5), (500.0, 2.5)])
def test_short_correlations_are_those_of_the_plane_at_every_latitude(length, smoothness):
    perturbation = GaussianFieldPerturbation(1.0, length, smoothness)
    for north in (4.0, 58.0, 88.0):
        grid = LatLonGrid(north - np.arange(9.0), np.arange(12.0))
        c, d = covariance(perturbation, grid), distances_km(grid)
        r = np.sqrt(2 * smoothness) * d / length
        more = r**2 / 3 if smoothness == 2.5 else 0.0
        np.testing.assert_allclose(c, (1 + r + more) * np.exp(-r), atol=6e-3)


def test_a_region_is_a_window_of_the_globe():
    perturbation = GaussianFieldPerturbation(1.0, 3000.0, max_degree=12)
    rows, columns = slice(3, 8), np.r_[34, 35, 0, 1]
    part = LatLonGrid(GLOBE.lat[rows], np.array([-20.0, -10.0, 0.0, 10.0]))
    chosen = np.arange(19 * 36).reshape(19, 36)[rows][:, columns].ravel()
    whole = covariance(perturbation, GLOBE)[np.ix_(chosen, chosen)]
    np.testing.assert_allclose(covariance(perturbation, part), whole, atol=1e-7)
    # The same numbers, too: a seed tells the field, not its values on one grid.
    fields = []
    for grid in (GLOBE, part, LatLonGrid(part.lat[::-1], part.lon)):
        again = GaussianFieldPerturbation(1.0, 3000.0, max_degree=12, seed=5)
        fields.append(again(torch.zeros(grid.shape), coords_of(grid))[0])
    torch.testing.assert_close(fields[0].flatten()[chosen].view(5, 4), fields[1])
    torch.testing.assert_close(fields[1].flip(0), fields[2])


def test_draws_have_that_law_at_pole_and_equator():
    x = torch.zeros(600, *GLOBE.shape)
    noise, _ = GaussianFieldPerturbation(2.0, 1500.0, seed=0)(
        x, coords_of(GLOBE, sample=range(600))
    )
    variance = noise.square().mean(0)
    pole, equator = variance[0, 0], variance[9].mean()
    assert abs(float(pole) / 4 - 1) < 0.2 and abs(float(equator) / 4 - 1) < 0.05
    assert float(noise[:, 0].std(1).max()) < 1e-5  # all longitudes meet at the pole
    assert noise.mean().abs() < 0.05
    # Different samples are independent.
    assert (noise[:-1] * noise[1:]).mean().abs() < 0.1


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3)])
@pytest.mark.parametrize("amplitude", [1.0, 0.05, "tensor"])
def test_it_adds_noise_of_the_amplitude(shape, amplitude):
    names = ("ensemble", "time", "variable")[3 - len(shape) :]
    coords = coords_of(GLOBE, **{n: np.arange(s) for n, s in zip(names, shape, strict=True)})
    x = 10 + torch.randn(*shape, *GLOBE.shape)
    kept = x.clone()
    if amplitude == "tensor":
        amplitude = torch.tensor([0.0, 1.0, 2.0])[:, None, None] if shape else torch.tensor(0.3)
    perturbation = GaussianFieldPerturbation(amplitude, 1000.0, seed=1)
    out, same = perturbation(x, coords)
    assert same is coords and torch.equal(x, kept)  # the caller's state is left alone
    assert out.shape == x.shape and out.dtype == x.dtype and out.device == x.device
    unit, _ = GaussianFieldPerturbation(1.0, 1000.0, seed=1)(torch.zeros_like(x), coords)
    torch.testing.assert_close(out - x, torch.as_tensor(amplitude) * unit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_keeps_the_precision_of_the_state(dtype):
    x = torch.zeros(UK.shape, dtype=dtype)
    out, _ = GaussianFieldPerturbation(1.0, seed=0)(x, coords_of(UK))
    assert out.dtype == dtype and out.isfinite().all() and out.std() > 0


def test_seeds():
    x, coords = torch.zeros(2, *UK.shape), coords_of(UK, variable=np.array(["t2m", "msl"]))

    def two(seed):
        perturbation = GaussianFieldPerturbation(1.0, seed=seed)
        return perturbation(x, coords)[0], perturbation(x, coords)[0]

    first, second = two(7)
    again = two(7)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.allclose(first, second)  # calls go on, and do not repeat
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first, two(8)[0])
    assert not torch.allclose(two(None)[0], two(None)[0])


def test_the_grid_may_change_between_calls():
    perturbation = GaussianFieldPerturbation(1.0, 2000.0, seed=0)
    for grid in (GLOBE, UK, GLOBE):
        out, _ = perturbation(torch.zeros(grid.shape), coords_of(grid))
        assert out.shape == grid.shape and 0.2 < out.abs().mean() < 3


def test_lead_times_follow_a_process_in_time():
    lead = np.array([-12, 0, -6]).astype("timedelta64[h]")
    coords = coords_of(UK, sample=np.arange(400), lead_time=lead)
    x = torch.zeros(400, 3, *UK.shape)
    noise, _ = GaussianFieldPerturbation(1.0, 500.0, time_scale=12.0, seed=0)(x, coords)
    product = torch.einsum("slhw,smhw->lm", noise, noise) / noise[:, 0].numel()
    hours = torch.tensor([-12.0, 0.0, -6.0])
    expected = torch.exp(-(hours[:, None] - hours).abs() / 12)
    torch.testing.assert_close(product, expected, rtol=0, atol=0.15)
    alone, _ = GaussianFieldPerturbation(1.0, 500.0, seed=0)(x, coords)
    apart = torch.einsum("slhw,smhw->lm", alone, alone) / noise[:, 0].numel()
    torch.testing.assert_close(apart, torch.eye(3), rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("lat", "lon", "error"),
    [
        ("not_lat", "lon", KeyError),
        ("lat", "not_lon", KeyError),
        ("lon", "lat", ValueError),
    ],
)
def test_dimensions_that_are_missing_or_elsewhere(lat, lon, error):
    coords = OrderedDict([(lat, UK.lat), (lon, UK.lon)])
    with pytest.raises(error):
        GaussianFieldPerturbation()(torch.zeros(UK.shape), coords)


@pytest.mark.parametrize(
    ("x", "coords", "message"),
    [
        (torch.zeros(4, 13), coords_of(UK), "do not fit a state"),
        (torch.zeros(2, *UK.shape), coords_of(UK), "2 coordinates do not fit"),
        (torch.zeros(2, 2), OrderedDict(lat=np.zeros((2, 2)), lon=np.zeros((2, 2))), "two axes"),
        (torch.zeros(2, 2), OrderedDict(lat=np.array([91.0, 90]), lon=np.zeros(2)), "-90 to 90"),
        (torch.zeros(2, 2), OrderedDict(lat=np.array([np.nan, 0]), lon=np.zeros(2)), "-90 to 90"),
    ],
)
def test_grids_that_are_none(x, coords, message):
    with pytest.raises(InputError, match=message):
        GaussianFieldPerturbation()(x, coords)


@pytest.mark.parametrize("amplitude", [torch.ones(2, 1, 1), torch.ones(5, 1, 9, 13)])
def test_an_amplitude_that_does_not_broadcast(amplitude):
    coords = coords_of(UK, variable=np.arange(3))
    with pytest.raises(InputError, match="noise_amplitude .* does not broadcast"):
        GaussianFieldPerturbation(amplitude)(torch.zeros(3, *UK.shape), coords)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_scale": 0.0}, "length_scale must be positive"),
        ({"smoothness": -1.0}, "smoothness must be positive"),
        ({"time_scale": 0.0}, "time_scale must be positive"),
        ({"max_degree": 0}, "max_degree must be at least 1"),
        ({"noise_amplitude": float("nan")}, "noise_amplitude"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        GaussianFieldPerturbation(**options)


@pytest.fixture
def apart():
    """Runs a function that leaves no checkpoint behind for components made later."""
    return contextvars.copy_context().run


def test_a_checkpoint_restores_the_draws(tmp_path, apart):
    apart(restart, tmp_path)


def restart(tmp_path):
    x, coords = torch.zeros(UK.shape), coords_of(UK)

    # Level 1 starts a member again: with the perturbation that it had.
    member = Checkpoint("member", path=tmp_path / "member", level=1)
    with member as session:
        perturbation = GaussianFieldPerturbation(1.0)
        expected, _ = perturbation(x, coords)
        assert perturbation.checkpoint.generator_state is not None
        session.write(lead_time=np.timedelta64(0, "h"))
    with member.select(-1):
        perturbation = GaussianFieldPerturbation(1.0)
        again, _ = perturbation(x, coords)
        assert perturbation.checkpoint.checkpoint_state_loaded
        assert torch.equal(again, expected)

    # Level 2 goes on: with the perturbations that were to come.
    rollout = Checkpoint("rollout", path=tmp_path / "rollout", flush_interval=2, level=2)
    with rollout as session:
        perturbation = GaussianFieldPerturbation(1.0)
        for hours in (0, 6):
            perturbation(x, coords)
            session.write(lead_time=np.timedelta64(hours, "h"))
        expected = [perturbation(x, coords)[0] for _ in range(2)]
    with rollout.select(-1):
        perturbation = GaussianFieldPerturbation(1.0)
        assert torch.equal(perturbation(x, coords)[0], expected[0])
        assert torch.equal(perturbation(x, coords)[0], expected[1])


@pytest.mark.parametrize("level", [None, 0])
def test_no_checkpoint_no_state(level, tmp_path, apart):
    def run():
        if level is not None:
            Checkpoint("none", path=tmp_path, level=level)
        perturbation = GaussianFieldPerturbation(1.0)
        perturbation(torch.zeros(UK.shape), coords_of(UK))
        return perturbation.checkpoint.generator_state

    assert apart(run) is None
