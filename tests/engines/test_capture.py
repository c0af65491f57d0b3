# SPDX-License-Identifier: Apache-2.0
"""Guided sampling without waiting for the GPU, and as CUDA graphs."""

import copy
import warnings

import pytest
import torch
from tensors import generator
from torch.utils._python_dispatch import TorchDispatchMode

from ddo_modulus.cuda_graphs import Replay
from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.prior import FunctionPrior
from ddo_modulus.diffusion.samplers import SOLVERS, Churn, sample
from ddo_modulus.engines.capture import Captured
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, Matern
from ddo_modulus.fields.grid import BoxGrid
from ddo_modulus.fields.linalg import inverse_factor, one_level
from ddo_modulus.observations import Observations, PointOperator, wind_speed
from ddo_modulus.posterior import Inflated, MomentMatching

SHAPE = (8, 10)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def operator():
    """With weights that make the network count, and a linear part with EOFs."""
    basis = CosineBasis(SHAPE)
    noise = GaussianField(basis, Matern(0.1, 0.5))
    operator = DiffusionOperator(
        list(SHAPE),
        1,
        "box",
        noise={"length_scale": 0.1, "smoothness": 0.5},
        eof_modes=4,
        network={"widths": [8], "depths": [1], "modes": [5]},
    )
    variance = GaussianField(basis, Matern(0.4, 1.0)).relative_to(noise)[0]
    index = torch.arange(4)
    operator.set_prior(
        EOFField.from_covariance(operator.noise, torch.diag(variance[index]), index, variance)
    )
    with torch.no_grad():
        for parameter in operator.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(3)))
    return operator.eval().requires_grad_(False)


def observe(analyses=2, stations=6):
    parts = []
    for t in range(analyses):
        rows, columns = torch.rand(2, stations, generator=generator(t), dtype=torch.float64)
        grid = BoxGrid(SHAPE, periodic=False)
        values = torch.randn(stations, generator=generator(10 + t))
        parts.append(Observations(PointOperator(grid, rows, columns), values, 0.04))
    return Observations.batch(parts)


def draws(posterior, operator, device="cpu", solver="dpmpp_2m", **options):
    scheduler = FieldNoiseScheduler(operator.noise, sigma_min=0.02)
    options = {"steps": 5, "generator": generator(2), "device": device} | options
    return sample(posterior, scheduler, 6, solver=solver, **options)


class NoLook(TorchDispatchMode):
    """Fails on every operation whose result the CPU reads from the device."""

    FORBIDDEN = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten._linalg_check_errors.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten._linalg_solve_ex.default,
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.FORBIDDEN, f"the CPU waits for {function}"
        return function(*args, **(kwargs or {}))


class Watched:
    """A denoiser that must not look at values."""

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def __call__(self, x, sigma, condition=None):
        with NoLook():
            return self.denoiser(x, sigma, condition)

    def scheduled(self, levels, like):
        prepared = self.denoiser.scheduled(levels, like)
        return {level: Watched(denoiser) for level, denoiser in prepared.items()}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "options", [{}, {"covariance": "linear"}, {"guidance_interval": (0.1, 4)}], ids=str
)
def test_a_step_never_looks_at_a_value(operator, solver, options):
    prior = Inflated(operator, torch.tensor([0.7, 2.0]))
    posterior = MomentMatching(prior, observe(), **options)
    draws(Watched(posterior), operator, solver=solver)


def test_what_cannot_be_prepared_is_noticed(operator):
    """The watch itself: levels that may differ between members have to be compared."""
    posterior = MomentMatching(operator, observe())
    x, sigma = torch.zeros(6, 1, *SHAPE), torch.full((6,), 0.5)
    with pytest.raises(AssertionError, match="the CPU waits for"):
        Watched(posterior)(x, sigma)


@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
@pytest.mark.parametrize(
    ("solver", "churn"),
    [*((solver, None) for solver in SOLVERS), ("euler", Churn(1.0)), ("heun", Churn(1.0))],
)
def test_prepared_levels_change_nothing(operator, covariance, solver, churn):
    posterior = MomentMatching(operator, observe(), covariance=covariance)

    def unprepared(x, sigma, condition=None):
        return posterior(x, sigma.clone(), condition)

    expected = draws(unprepared, operator, solver=solver, churn=churn)
    found = draws(posterior, operator, solver=solver, churn=churn)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_level_that_was_not_prepared_is_not_answered(operator):
    posterior = MomentMatching(operator, observe())
    x = torch.zeros(6, 1, *SHAPE)
    (prepared,) = set(
        posterior.scheduled(torch.tensor([0.1, 1.0], dtype=torch.float64), x).values()
    )
    assert prepared(x, torch.tensor([0.1]).expand(6)).isfinite().all()
    assert prepared(x, torch.tensor([0.11]).expand(6)).isnan().all()
    assert prepared(x, torch.tensor([3.0]).expand(6)).isnan().all()


def test_levels_are_prepared_once(operator):
    posterior = MomentMatching(operator, observe())
    like = torch.empty(6, 1, *SHAPE)
    levels = torch.tensor([2.0, 0.1, 1.0], dtype=torch.float64)
    first = posterior.scheduled(levels, like)
    assert posterior.scheduled(levels.flip(0), like) is first
    assert posterior.scheduled(levels[:2], like) is not first


def test_many_factors_are_found_in_pieces_or_not_kept(operator, monkeypatch):
    posterior = MomentMatching(operator, observe())
    expected = draws(posterior, operator)
    other = MomentMatching(operator, observe())
    module = "ddo_modulus.posterior.system"
    monkeypatch.setattr(f"{module}._MOST_AT_ONCE", 2 * 6**2)
    torch.testing.assert_close(draws(other, operator), expected)
    monkeypatch.setattr(f"{module}._MOST_FACTORS", 5 * 2 * 6**2 - 1)
    (prepared,) = set(other.scheduled(torch.arange(1.0, 6.0), torch.empty(6, 1, *SHAPE)).values())
    assert prepared._factors is None  # it computes them level by level


def test_tangents_of_states_to_come_are_not_prepared():
    grid = BoxGrid(SHAPE, periodic=False)
    noise = GaussianField(CosineBasis(SHAPE), Matern(0.2, 0.5), 2)
    prior = GaussianDenoiser(0.0, GaussianField(noise.basis, Matern(0.4, 1.0), 2), noise)
    u, v = (PointOperator(grid, [0.3], [0.4], channel) for channel in (0, 1))
    posterior = MomentMatching(prior, Observations(wind_speed(u, v), torch.ones(1), 0.1))
    like = torch.zeros(2, 2, *SHAPE)
    prepared = posterior.scheduled(torch.tensor([1.0]), like)
    assert prepared[1.0]._factors is None
    assert Captured(posterior).scheduled(torch.tensor([1.0]), like)[1.0].prior is prepared[1.0]


@pytest.mark.parametrize(
    "options", [{"covariance": "linear"}, {"guidance_interval": (0.1, 4.0)}], ids=str
)
def test_without_factors_beforehand_levels_are_told_apart_all_the_same(options, monkeypatch):
    """Of an operator that is not linear; what is asked for at a level is what is meant there."""
    grid = BoxGrid(SHAPE, periodic=False)
    noise = GaussianField(CosineBasis(SHAPE), Matern(0.2, 0.5), 2)
    prior = GaussianDenoiser(0.0, GaussianField(noise.basis, Matern(0.4, 1.0), 2), noise)
    u, v = (PointOperator(grid, [0.3], [0.4], channel) for channel in (0, 1))
    observations = Observations(wind_speed(u, v), torch.ones(1), 0.1)
    posterior = MomentMatching(prior, observations, **options)
    taken, original = [], prior.value_and_pullback
    monkeypatch.setattr(
        prior, "value_and_pullback", lambda *a: taken.append(float(a[1][0])) or original(*a)
    )
    scheduler = FieldNoiseScheduler(noise)
    sample(posterior, scheduler, 2, steps=8, generator=generator())
    levels = scheduler.timesteps(8, dtype=torch.float64)[:-1].tolist()
    inside = (
        [level for level in levels if 0.1 <= level <= 4] if "guidance_interval" in options else []
    )
    assert taken == pytest.approx(inside)
    assert ("guidance_interval" in options) == bool(inside)


def test_a_part_that_fails_is_told(operator):
    captured = Captured(MomentMatching(operator, observe(), guidance_interval=(0.1, 4)))
    levels = torch.tensor([0.01, 0.02, 1.0], dtype=torch.float64)
    parts = captured.scheduled(levels, torch.empty(6, 1, *SHAPE))
    assert parts[0.01] is parts[0.02] is not parts[1.0]
    assert captured.scheduled(levels, torch.empty(6, 1, *SHAPE)) is parts
    assert captured.failure is None
    parts[1.0]._failure = "why"
    assert captured.failure == "why"


def test_inverse_factors():
    root = torch.randn(3, 7, 7, generator=generator(), dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(7)
    inverse = inverse_factor(matrix)
    torch.testing.assert_close(inverse @ matrix @ inverse.mT, torch.eye(7).double().expand(3, 7, 7))
    assert torch.equal(inverse, inverse.tril())
    with pytest.raises(InputError, match="not positive definite"):
        inverse_factor(-matrix)


def test_levels_are_one_by_layout_or_by_value():
    assert one_level(torch.tensor([2.0]).expand(3)) and one_level(torch.full((3,), 2.0))
    assert not one_level(torch.tensor([2.0, 2.0, 1.0]))
    with NoLook():
        assert one_level(torch.tensor([2.0]).expand(3))


def test_without_a_gpu_a_captured_denoiser_is_the_denoiser(operator):
    posterior = MomentMatching(operator, observe())
    expected = draws(posterior, operator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = Captured(posterior)
        assert torch.equal(draws(captured, operator), expected)
    assert captured.failure is None
    prior = Captured(operator)
    assert prior.linear is operator.linear
    assert torch.equal(draws(prior, operator), draws(operator, operator))


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_gpu(operator):
    return copy.deepcopy(operator).to("cuda")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
def test_a_graph_draws_what_eager_code_draws(on_gpu, solver, covariance):
    prior = Inflated(on_gpu, torch.tensor([0.7, 2.0]))
    posterior = MomentMatching(prior, observe(), covariance=covariance)
    captured = Captured(posterior)
    for seed in (2, 3):  # the second time from the graph that was recorded the first
        options = {"solver": solver, "generator": generator(seed)}
        expected = draws(posterior, on_gpu, "cuda", **options)
        options["generator"] = generator(seed)
        found = draws(captured, on_gpu, "cuda", **options)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    (recorded,) = set(captured._scheduled[1].values())
    assert captured.failure is None and len(recorded._replay._recorded) == 1


@pytest.mark.gpu
@GPU
def test_levels_with_and_without_the_derivative_are_two_graphs(on_gpu):
    posterior = MomentMatching(on_gpu, observe(), guidance_interval=(0.1, 4))
    captured = Captured(posterior)
    for _ in range(2):
        expected = draws(posterior, on_gpu, "cuda", generator=generator(2))
        found = draws(captured, on_gpu, "cuda", generator=generator(2))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    parts = set(captured._scheduled[1].values())
    assert captured.failure is None
    assert [len(part._replay._recorded) for part in parts] == [1, 1]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
def test_the_host_never_waits_in_the_loop(on_gpu, covariance):
    prior = Inflated(on_gpu, torch.tensor([0.7, 2.0]))
    posterior = MomentMatching(prior, observe(), covariance=covariance)
    draws(posterior, on_gpu, "cuda")  # constants go to the GPU

    class Strict:
        def scheduled(self, levels, like):
            prepared = posterior.scheduled(levels, like)
            return {level: Strict.around(denoiser) for level, denoiser in prepared.items()}

        def __call__(self, x, sigma, condition=None):
            raise AssertionError("levels were not prepared")

        @staticmethod
        def around(denoiser):
            def call(x, sigma, condition=None):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    return denoiser(x, sigma, condition)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            return call

    assert draws(Strict(), on_gpu, "cuda").isfinite().all()


@pytest.mark.gpu
@GPU
def test_a_denoiser_that_looks_at_values_runs_without_a_graph(on_gpu):
    def looking(x, sigma, condition=None):
        return on_gpu(x, sigma) * (1.0 if float(x.sum()) > 0 else 1.0)

    captured = Captured(FunctionPrior(looking, on_gpu.noise, on_gpu.linear))
    x, sigma = torch.randn(4, 1, *SHAPE, device="cuda"), torch.full((1,), 0.5, device="cuda")
    expected = on_gpu(x, sigma.expand(4))
    with pytest.warns(RuntimeWarning, match="no CUDA graph of FunctionPrior, which runs without"):
        found = captured(x, sigma.expand(4))
    torch.testing.assert_close(found, expected)
    assert captured.failure
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns only once
        torch.testing.assert_close(captured(x, sigma.expand(4)), expected)
    assert torch.randn(2, device="cuda").isfinite().all()  # torch's generator is as it was
    graph = Captured(on_gpu)  # and the next capture is not spoilt
    torch.testing.assert_close(graph(x, sigma.expand(4)), expected)
    assert graph.failure is None


@pytest.mark.gpu
@GPU
def test_a_recording_that_fails_half_way_leaves_nothing_behind():
    def looking(key, x):
        return x * float(x.sum())

    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        Replay(looking)("a", x)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(2, device="cuda").isfinite().all()
    assert torch.equal(Replay(lambda key, x: 2 * x)("a", x), 2 * x)


@pytest.mark.gpu
@GPU
def test_operators_that_are_not_linear_are_right_with_or_without_a_graph():
    grid = BoxGrid(SHAPE, periodic=False)
    noise = GaussianField(CosineBasis(SHAPE), Matern(0.2, 0.5), 2)
    prior = GaussianDenoiser(0.5, GaussianField(noise.basis, Matern(0.4, 1.0), 2), noise)
    places = torch.rand(2, 5, generator=generator(), dtype=torch.float64)
    u, v = (PointOperator(grid, *places, [channel] * 5) for channel in (0, 1))
    posterior = MomentMatching(prior, Observations(wind_speed(u, v), torch.ones(5), 0.1))
    expected = sample(
        posterior, FieldNoiseScheduler(noise), 4, steps=6, generator=generator(), device="cuda"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = sample(
            Captured(posterior),
            FieldNoiseScheduler(noise),
            4,
            steps=6,
            generator=generator(),
            device="cuda",
        )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@GPU
def test_several_shapes_share_memory_and_stay_apart(on_gpu):
    captured = Captured(on_gpu)
    sigma = torch.full((1,), 0.5, device="cuda")
    batches = [torch.randn(b, 1, *SHAPE, device="cuda") for b in (2, 5, 2, 5)]
    found = [captured(x, sigma.expand(len(x))) for x in batches]
    for x, y in zip(batches, found, strict=True):
        torch.testing.assert_close(y, on_gpu(x, sigma.expand(len(x))), rtol=1e-4, atol=1e-5)
    mixed = torch.tensor([0.1, 2.0], device="cuda")
    torch.testing.assert_close(
        captured(batches[0], mixed), on_gpu(batches[0], mixed), rtol=1e-4, atol=1e-5
    )


@pytest.mark.gpu
@GPU
def test_a_warm_up_leaves_no_trace():
    total = torch.zeros(3, device="cuda")

    def add(key, x):
        total.add_(x)
        return total * 2

    replay = Replay(add, [total])
    one = torch.ones(3, device="cuda")
    assert torch.equal(replay("a", one), 2 * one)
    assert torch.equal(replay("a", 2 * one), 6 * one)
    assert torch.equal(total, 3 * one)


@pytest.mark.gpu
@GPU
def test_another_grid_is_recorded_too():
    operator = DiffusionOperator(
        [8, 8],
        1,
        "torus",
        noise={"length_scale": 0.1, "smoothness": 0.5},
        network={"widths": [8], "depths": [1], "modes": [5]},
    )
    operator.set_prior(GaussianField(operator.basis, Matern(0.3, 1.0)))
    operator = operator.eval().requires_grad_(False).to("cuda")
    fine = FourierBasis((16, 16))
    points = torch.rand(2, 6, generator=generator(), dtype=torch.float64)
    observations = Observations(
        PointOperator(BoxGrid(fine.shape), *points), torch.randn(6, generator=generator(1)), 0.04
    )
    posterior = MomentMatching(operator, observations)
    captured = Captured(posterior)
    expected, found = (
        draws(p, operator, "cuda", shape=(16, 16), generator=generator())
        for p in (posterior, captured)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert captured.failure is None
