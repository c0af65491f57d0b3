# SPDX-License-Identifier: Apache-2.0
"""Properties of the Kolmogorov-flow solver that hold for the equation itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tensors import generator
from torch import Tensor

from ddo_modulus.errors import InputError
from ddo_modulus.simulators import KolmogorovFlow


def centres(n: int, length: float) -> tuple[Tensor, Tensor]:
    """Return y and x of the cell centres, each ``(n, n)``."""
    line = (torch.arange(n, dtype=torch.float64) + 0.5) * length / n
    y, x = torch.meshgrid(line, line, indexing="ij")
    return y, x


def velocity(vorticity: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """Invert the curl with full complex transforms (independent of the solver's operators)."""
    n = vorticity.shape[-1]
    k = torch.fft.fftfreq(n, 1.0 / n, dtype=torch.float64) * 2.0 * math.pi / length
    ky, kx = k[:, None], k[None, :]
    square = kx**2 + ky**2
    square[0, 0] = 1.0
    psi = torch.fft.fft2(vorticity.double()) / square
    return torch.fft.ifft2(1j * ky * psi).real, torch.fft.ifft2(-1j * kx * psi).real


def energy(vorticity: Tensor, length: float) -> Tensor:
    """Return the mean kinetic energy of each field."""
    u, v = velocity(vorticity, length)
    return 0.5 * (u**2 + v**2).mean((-2, -1))


@pytest.mark.parametrize(("length", "drag"), [(2.0 * math.pi, 0.0), (1.0, 0.0), (1.0, 0.3)])
def test_taylor_green_vortex_decays_as_the_exact_solution(length: float, drag: float) -> None:
    """Taylor and Green (1937): advection vanishes, the amplitude decays as exp(-2 nu k^2 t)."""
    flow = KolmogorovFlow(
        reynolds=50.0,
        forcing_amplitude=0.0,
        drag=drag,
        length=length,
        resolution=16,
        output_resolution=16,
        forcing_wavenumber=1,
        dt=0.02,
    )
    y, x = centres(16, length)
    k = 2.0 * math.pi / length
    start = 2.0 * k * torch.cos(k * x) * torch.cos(k * y)
    end = flow.advance(start[None], 0.7)[0]
    exact = start * math.exp(-(2.0 * k**2 / flow.reynolds + drag) * 0.7)
    torch.testing.assert_close(end, exact, rtol=1e-9, atol=1e-9)


def test_laminar_flow_reaches_the_exact_steady_state_along_x() -> None:
    """At low Reynolds number u = A sin(k y) / (nu k^2 + mu), which fixes axes, sign and phase."""
    flow = KolmogorovFlow(
        reynolds=1.0, forcing_wavenumber=2, resolution=16, output_resolution=16, dt=0.05
    )
    y, _ = centres(16, flow.length)
    end = flow.advance(torch.zeros(1, 16, 16, dtype=torch.float64), 6.0)[0]
    u, v = velocity(end, flow.length)
    torch.testing.assert_close(u, torch.sin(2.0 * y) / (4.0 + flow.drag), rtol=1e-6, atol=1e-6)
    assert v.abs().max() < 1e-9


def test_energy_budget_closes() -> None:
    """The change of energy is the work of the force less dissipation and drag."""
    flow = KolmogorovFlow(reynolds=200.0, resolution=48, output_resolution=48, dt=0.01)
    w = flow.initial(3, generator=generator(), dtype=torch.float64)
    w = flow.advance(w, 1.0)
    y, _ = centres(48, flow.length)
    step, before, after = 0.01, w, w
    rates = []
    energies = [energy(w, flow.length)]
    for _ in range(21):
        u, _ = velocity(after, flow.length)
        work = (u * flow.forcing_amplitude * torch.sin(flow.forcing_wavenumber * y)).mean((-2, -1))
        dissipation = (after**2).mean((-2, -1)) / flow.reynolds
        rates.append(torch.stack([work, dissipation, 2.0 * flow.drag * energies[-1]]))
        before, after = after, flow.advance(after, step)
        energies.append(energy(after, flow.length))
    terms = torch.trapezoid(torch.stack(rates), dx=step, dim=0)
    expected = terms[0] - terms[1] - terms[2]
    change = energy(before, flow.length) - energies[0]
    assert (change - expected).abs().max() < 1e-4 * terms.abs().max()


def test_inviscid_advection_conserves_energy_and_enstrophy() -> None:
    """Without force and friction the truncated equation keeps both invariants."""
    flow = KolmogorovFlow(
        reynolds=1e12, forcing_amplitude=0.0, drag=0.0, resolution=48, output_resolution=48, dt=0.01
    )
    start = flow.initial(2, generator=generator(), dtype=torch.float64)
    end = flow.advance(start, 1.0)
    assert (end - start).std() > 0.3 * start.std()
    torch.testing.assert_close(
        energy(end, flow.length), energy(start, flow.length), rtol=1e-6, atol=0.0
    )
    torch.testing.assert_close(
        end.square().mean((1, 2)), start.square().mean((1, 2)), rtol=1e-5, atol=0.0
    )


def test_time_stepping_is_of_fourth_order() -> None:
    """Halving the step divides the error by sixteen."""

    def end(dt: float) -> Tensor:
        flow = KolmogorovFlow(reynolds=100.0, resolution=32, output_resolution=32, dt=dt)
        return flow.advance(flow.initial(2, generator=generator(), dtype=torch.float64), 0.8)

    reference = end(0.005)
    coarse, fine = ((end(dt) - reference).norm() for dt in (0.04, 0.02))
    assert 3.7 < math.log2(float(coarse / fine)) < 4.6


@pytest.mark.parametrize("shift", [(0, 5), (8, 0), (16, 3)])
def test_translation_equivariance(shift: tuple[int, int]) -> None:
    """The flow commutes with any shift along x and with shifts of whole forcing waves along y."""
    flow = KolmogorovFlow(resolution=32, output_resolution=32, dt=0.02)
    start = flow.initial(1, generator=generator(), dtype=torch.float64)
    shifted = flow.advance(start.roll(shift, (-2, -1)), 0.4)
    torch.testing.assert_close(
        shifted, flow.advance(start, 0.4).roll(shift, (-2, -1)), rtol=1e-8, atol=1e-8
    )


def test_flow_in_a_shorter_domain_is_similar() -> None:
    """Similarity: length and time may be rescaled if viscosity, drag and force follow."""
    a = KolmogorovFlow(reynolds=100.0, resolution=32, output_resolution=32, dt=0.02)
    # x' = x / 2pi and t' = t: velocity and force / 2pi, viscosity / (2pi)^2.
    scale = 2.0 * math.pi
    b = KolmogorovFlow(
        reynolds=100.0 * scale**2,
        forcing_amplitude=1.0 / scale,
        length=1.0,
        resolution=32,
        output_resolution=32,
        dt=0.02,
    )
    start = a.initial(1, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(b.advance(start, 0.5), a.advance(start, 0.5), rtol=1e-8, atol=1e-8)


def test_single_and_double_precision_agree() -> None:
    """Round-off stays small over a time in which chaos has not yet amplified it."""
    flow = KolmogorovFlow(resolution=64, output_resolution=64, dt=0.0125)
    start = flow.initial(2, generator=generator(), dtype=torch.float64)
    double = flow.advance(start, 1.0)
    single = flow.advance(start.float(), 1.0)
    assert single.dtype == torch.float32
    assert (single - double).norm() < 1e-4 * double.norm()


SMALL = KolmogorovFlow(resolution=32, output_resolution=16, dt=0.02, spin_up=0.4)


def test_simulation_is_reproducible_and_independent_of_the_batch() -> None:
    """The same seed gives the same trajectories, alone or in company."""
    batches = list(SMALL.simulate(5, 3, generator=generator(3), dtype=torch.float64, batch=2))
    assert [tuple(b.shape) for b in batches] == [(2, 3, 16, 16), (2, 3, 16, 16), (1, 3, 16, 16)]
    (whole,) = SMALL.simulate(5, 3, generator=generator(3), dtype=torch.float64)
    torch.testing.assert_close(torch.cat(batches), whole, rtol=1e-9, atol=1e-9)
    (other,) = SMALL.simulate(5, 3, generator=generator(4), dtype=torch.float64)
    assert (whole - other).abs().mean() > 0.5


def test_frames_are_pooled_states_one_interval_apart() -> None:
    """A frame is the block mean of the state after the spin-up and whole intervals."""
    (frames,) = SMALL.simulate(1, 2, generator=generator(), dtype=torch.float64)
    state = SMALL.initial(1, generator=generator(), dtype=torch.float64)
    state = SMALL.advance(state, SMALL.spin_up + SMALL.interval)[0]
    expected = torch.nn.functional.avg_pool2d(state[None], 2)[0]
    torch.testing.assert_close(frames[0, 1], expected, rtol=1e-8, atol=1e-8)


def test_progress_counts_up_to_the_total() -> None:
    """Progress ends at its total, whatever the batches."""
    calls: list[tuple[int, int]] = []
    list(
        SMALL.simulate(
            3,
            2,
            generator=generator(),
            batch=2,
            progress=lambda done, total: calls.append((done, total)),
        )
    )
    assert calls[-1] == (9, 9)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_initial_state_has_no_mean_and_the_stated_speed() -> None:
    """The random start has zero mean and a root-mean-square velocity of 1.5."""
    flow = KolmogorovFlow(resolution=64, output_resolution=64)
    start = flow.initial(64, generator=generator(), dtype=torch.float64)
    assert start.mean((1, 2)).abs().max() < 1e-12
    speed = math.sqrt(2.0 * float(energy(start, flow.length).mean()))
    assert speed == pytest.approx(1.5, rel=0.05)


def test_unstable_step_is_an_error_that_names_a_stable_one() -> None:
    """A step beyond the stability limit is refused before it is taken."""
    flow = KolmogorovFlow(resolution=64, output_resolution=64, dt=0.2)
    with pytest.raises(InputError, match=r"time step 0\.2 is unstable.*use dt <= 0\.0"):
        list(flow.simulate(1, 2, generator=generator()))
    with pytest.raises(InputError, match="use a smaller dt"):
        flow.advance(torch.full((1, 64, 64), math.nan), 0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"reynolds": 0.0},
        {"drag": -0.1},
        {"dt": math.nan},
        {"resolution": 33},
        {"output_resolution": 48},
        {"forcing_wavenumber": 0},
        {"forcing_wavenumber": 43},
    ],
)
def test_parameters_out_of_range_are_named(wrong: dict[str, float]) -> None:
    """Every parameter is checked when the flow is made."""
    with pytest.raises(InputError, match=next(iter(wrong))):
        KolmogorovFlow(**wrong)  # type: ignore[arg-type]


def test_wrong_counts_shapes_and_types_are_errors_at_the_call() -> None:
    """Bad arguments raise at once, not at the first batch."""
    with pytest.raises(InputError, match="trajectories=0"):
        SMALL.simulate(0, 1, generator=generator())
    with pytest.raises(InputError, match="expected"):
        SMALL.advance(torch.zeros(1, 16, 16), 1.0)
    with pytest.raises(InputError, match="float16"):
        SMALL.advance(torch.zeros(1, 32, 32, dtype=torch.float16), 1.0)
    with pytest.raises(InputError, match="expected"):
        SMALL.to_dataset(torch.zeros(1, 1, 32, 32))


def test_dataset_labels() -> None:
    """Axes, coordinates and provenance of the labelled frames."""
    frames = torch.arange(2 * 3 * 16 * 16, dtype=torch.float32).reshape(2, 3, 16, 16)
    data = SMALL.to_dataset(frames, seed=7)
    assert data["vorticity"].dims == ("trajectory", "time", "lat", "lon")
    np.testing.assert_array_equal(data["vorticity"].values, frames.numpy())
    assert data["time"].dtype == np.dtype("datetime64[ns]")
    assert data["time"].values[2] == np.datetime64("2000-01-01T00:00:00.4", "ns")
    np.testing.assert_array_equal(data["lat"], np.arange(16) / 16)
    assert data["lat"].attrs == {"units": "1", "long_name": "y"}
    assert data.attrs["seed"] == 7
    assert data.attrs["reynolds"] == 1000.0
    assert data["vorticity"].attrs["cell_methods"] == "lat: lon: mean"  # pooled from 32
    points = replace(SMALL, output_resolution=SMALL.resolution)
    n = points.resolution
    assert "cell_methods" not in points.to_dataset(torch.zeros(1, 1, n, n))["vorticity"].attrs
