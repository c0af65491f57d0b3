# SPDX-License-Identifier: Apache-2.0
import copy

import numpy as np
import pytest
import torch
from priors import with_eofs
from tensors import generator, randn

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.prior import FunctionPrior
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField, Matern, WhiteField
from ddo_modulus.fields.grid import BoxGrid, LatLonGrid
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.observations import (
    Observations,
    PointOperator,
    StackedOperator,
    wind_speed,
)
from ddo_modulus.posterior import MomentMatching


class Problem:
    """A Gaussian prior, point observations, and their exact posterior by dense matrices."""

    def __init__(self, basis, grid, dense, *, channels=1, stations=20, scale=1.0, white=False):
        prior = GaussianField(basis, Matern(0.25 * scale, 2.0), channels)
        noise = GaussianField(basis, Matern(0.25 * scale, 1.0), channels)
        noise = WhiteField(basis, channels) if white else noise
        smooth = basis.truncate(3)
        mean = 0.3 * smooth.synthesize(randn(channels, smooth.size, seed=7))
        self.build(GaussianDenoiser(mean, prior, noise), grid, stations, dense)

    def build(self, denoiser, grid, stations, dense):
        self.denoiser, self.noise, self.grid = denoiser, denoiser.noise, grid
        self.size = (self.noise.channels, *self.noise.shape)
        root = dense(lambda a: denoiser.fields(a, mean=False), (denoiser.variance.shape[-1],))
        self.covariance = root @ torch.diag(denoiser.variance[0]) @ root.T
        self.matrix = dense
        self.observations = self.observe(stations, seed=1)

    def observe(self, stations, seed):
        rng = np.random.default_rng(seed)
        lat = rng.uniform(self.grid.lat.min(), self.grid.lat.max(), stations)
        lon = rng.uniform(self.grid.lon.min(), self.grid.lon.max(), stations)
        channel = rng.integers(0, self.size[0], stations)
        operator = PointOperator(self.grid, lat, lon, channel)
        truth = self.denoiser.fields(
            randn(1, self.denoiser.variance.shape[-1], seed=seed + 10)
            * self.denoiser.variance.sqrt()
        )
        variance = torch.from_numpy(rng.uniform(0.01, 0.1, stations))
        noise = variance.sqrt() * randn(stations, seed=seed + 20)
        return Observations(operator, operator(truth)[0] + noise, variance)

    def posterior(self, observations=None):
        """Optimal interpolation: mean and covariance."""
        observations = self.observations if observations is None else observations
        h = self.matrix(observations.operator.increment, self.size)
        r = observations.error_covariance(h)[0]
        gain = torch.linalg.solve(h @ self.covariance @ h.T + r, h @ self.covariance).T
        mean = self.denoiser.mean[None]
        innovation = observations.values.to(h) - observations.operator(mean)[0]
        return mean.flatten() + gain @ innovation, self.covariance - gain @ h @ self.covariance

    def scores(self, law, exact=None):
        """Mean error in prior standard deviations, std ratio, extreme projected variances."""
        (mean, cov), (m, p) = law, self.posterior() if exact is None else exact
        scale = self.covariance.diagonal().mean().sqrt()
        error = float((mean - m).square().mean().sqrt() / scale)
        ratio = float((cov.diagonal() / p.diagonal()).sqrt().mean())
        v = randn(20, len(m), seed=3)
        projections = ((v @ cov) * v).sum(1) / ((v @ p) * v).sum(1)
        return error, ratio, float(projections.min()), float(projections.max())


def globe(shape):
    basis = SphericalBasis(shape)
    return basis, LatLonGrid(basis.latitudes(shape[0]), np.arange(shape[1]) * 360 / shape[1])


PROBLEMS = {
    "torus-even": lambda dense: Problem(FourierBasis((12, 12)), BoxGrid((12, 12)), dense),
    "torus-mixed": lambda dense: Problem(
        FourierBasis((9, 14), (1, 1.6)), BoxGrid((9, 14), (1, 1.6)), dense, channels=2
    ),
    "box": lambda dense: Problem(
        CosineBasis((11, 14), (1, 1.4)), BoxGrid((11, 14), (1, 1.4), periodic=False), dense
    ),
    "sphere-centres": lambda dense: Problem(*globe((10, 20)), dense, scale=2),
    "sphere-poles": lambda dense: Problem(*globe((11, 16)), dense, scale=2),
    "white": lambda dense: Problem(FourierBasis((12, 12)), BoxGrid((12, 12)), dense, white=True),
}
problems = pytest.mark.parametrize("name", PROBLEMS)


@pytest.fixture(scope="module")
def torus(dense):
    return PROBLEMS["torus-mixed"](dense)


@pytest.fixture(scope="module")
def eofs(dense):
    """A prior that is not homogeneous."""
    problem = Problem.__new__(Problem)
    problem.build(with_eofs(CosineBasis((8, 9))), BoxGrid((8, 9), periodic=False), 20, dense)
    return problem


# ---- the whole chain ----------------------------------------------------------------------------


@problems
@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
def test_guided_sampling_is_optimal_interpolation(name, covariance, dense, affine_law):
    problem = PROBLEMS[name](dense)
    posterior = MomentMatching(problem.denoiser, problem.observations, covariance=covariance)
    # White noise has to be louder than the largest scale, which holds most of the variance.
    levels = {"sigma_max": 800.0} if name == "white" else {}
    error, ratio, low, high = problem.scores(
        affine_law(posterior, problem.noise, steps=32, **levels)
    )
    assert error < 0.03
    assert 0.98 < ratio < 1.02
    assert 0.9 < low < high < 1.1


def test_guided_sampling_of_a_prior_with_eofs(eofs, affine_law):
    posterior = MomentMatching(eofs.denoiser, eofs.observations)
    error, ratio, low, high = eofs.scores(affine_law(posterior, eofs.noise, steps=32))
    assert error < 0.03
    assert 0.98 < ratio < 1.02
    assert 0.9 < low < high < 1.1


def test_random_samples_have_the_posterior_moments(torus):
    posterior = MomentMatching(torus.denoiser, torus.observations, covariance="linear")
    n = 4000
    x = sample(posterior, FieldNoiseScheduler(torus.noise), n, steps=32, generator=generator())
    x = x.double().flatten(1)
    mean, cov = torus.posterior()
    assert float((x.mean(0) - mean).square().mean().sqrt()) < 0.02
    assert float((x.var(0) / cov.diagonal()).sqrt().mean()) == pytest.approx(1, abs=0.02)


def test_without_the_noise_covariance_the_posterior_is_wrong(torus, affine_law, monkeypatch):
    """``sigma^2 J`` in place of ``sigma^2 J C``, which is what white-noise methods compute."""
    right = MomentMatching(torus.denoiser, torus.observations)
    error, *_ = torus.scores(affine_law(right, torus.noise, steps=32))
    monkeypatch.setattr(torus.noise, "cov", lambda v: v)
    wrong = MomentMatching(torus.denoiser, torus.observations, iterations=20)
    wrong_error, ratio, low, high = torus.scores(affine_law(wrong, torus.noise, steps=32))
    assert error < 0.03
    assert wrong_error > 0.1
    assert not (0.9 < low and high < 1.1)


# ---- one call -----------------------------------------------------------------------------------


def exact_call(problem, x, level, observations=None):
    """Conditional mean of the clean state given the noisy one and the observations, densely."""
    observations = problem.observations if observations is None else observations
    noise = problem.matrix(problem.noise.cov, problem.size)
    total = torch.linalg.pinv(problem.covariance + level**2 * noise, rtol=1e-13, hermitian=True)
    gain = problem.covariance @ total
    clean = problem.denoiser.mean.flatten() + (x - problem.denoiser.mean).flatten(1) @ gain.T
    v = problem.covariance - gain @ problem.covariance
    h = problem.matrix(observations.operator.increment, problem.size)
    r = observations.error_covariance(h)[0]
    increment = torch.linalg.solve(h @ v @ h.T + r, h @ v).T
    offset = observations.operator(torch.zeros(1, *problem.size, dtype=torch.float64))
    innovation = observations.values.to(h) - clean @ h.T - offset
    return (clean + innovation @ increment.T).unflatten(1, problem.size)


def noisy(problem, batch, seed=0):
    return problem.denoiser.fields(randn(batch, problem.denoiser.variance.shape[-1], seed=seed))


@problems
@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
@pytest.mark.parametrize("level", [0.02, 0.5, 30.0])
def test_a_call_is_the_exact_conditional_mean(name, covariance, level, dense):
    problem = PROBLEMS[name](dense)
    x = noisy(problem, 3)
    posterior = MomentMatching(
        problem.denoiser, problem.observations, covariance=covariance, iterations=1
    )
    result = posterior(x, torch.full((3,), level, dtype=torch.float64))
    torch.testing.assert_close(result, exact_call(problem, x, level), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
def test_states_of_a_batch_have_their_own_noise_levels(torus, covariance):
    x = noisy(torus, 4)
    sigma = torch.tensor([0.02, 0.5, 0.5, 30.0], dtype=torch.float64)
    posterior = MomentMatching(torus.denoiser, torus.observations, covariance=covariance)
    together = posterior(x, sigma)
    for i in range(4):
        exact = exact_call(torus, x[i : i + 1], float(sigma[i]))
        torch.testing.assert_close(together[i : i + 1], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
@pytest.mark.parametrize("level", [0.5, None])
def test_analyses_of_a_batch_equal_single_ones(torus, covariance, level):
    """Different stations and numbers of them; two members each; equal or own noise levels."""
    parts = [torus.observe(n, seed) for n, seed in ((20, 1), (7, 2), (13, 3))]
    x = noisy(torus, 6)
    sigma = torch.full((6,), 0.5) if level else torch.linspace(0.1, 2.0, 6)
    posterior = MomentMatching(torus.denoiser, Observations.batch(parts), covariance=covariance)
    together = posterior(x, sigma.double())
    for analysis, part in enumerate(parts):
        alone = MomentMatching(torus.denoiser, part, covariance=covariance)
        for member in (2 * analysis, 2 * analysis + 1):
            only = slice(member, member + 1)
            torch.testing.assert_close(together[only], alone(x[only], sigma[only].double()))
            exact = exact_call(torus, x[only], float(sigma[member]), part)
            torch.testing.assert_close(together[only], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
def test_analyses_may_share_stations_but_not_errors(torus, covariance):
    operator = torus.observations.operator
    values = torch.stack([torus.observations.values, randn(operator.size)])
    variance = torch.stack([torus.observations.variance, torch.full((20,), 0.5).double()])
    x, sigma = noisy(torus, 4), torch.full((4,), 0.5, dtype=torch.float64)
    posterior = MomentMatching(
        torus.denoiser, Observations(operator, values, variance), covariance=covariance
    )
    together = posterior(x, sigma)
    for member in range(4):
        part = Observations(operator, values[member // 2], variance[member // 2])
        exact = exact_call(torus, x[member : member + 1], 0.5, part)
        torch.testing.assert_close(together[member : member + 1], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
def test_errors_may_be_correlated(torus, covariance, affine_law):
    size = torus.observations.operator.size
    root = 0.3 * randn(size, size, seed=5) / size**0.5
    full = root @ root.T + 0.02 * torch.eye(size, dtype=torch.float64)
    observations = Observations(
        torus.observations.operator, torus.observations.values, covariance=full
    )
    x, sigma = noisy(torus, 2), torch.full((2,), 0.3, dtype=torch.float64)
    posterior = MomentMatching(torus.denoiser, observations, covariance=covariance)
    exact = exact_call(torus, x, 0.3, observations)
    torch.testing.assert_close(posterior(x, sigma), exact, rtol=1e-5, atol=1e-5)
    diagonal = Observations(observations.operator, observations.values, full.diagonal())
    plain = MomentMatching(torus.denoiser, diagonal)(x, sigma)
    assert float((plain - exact).abs().max()) > 1e-2
    law = affine_law(posterior, torus.noise, steps=32)
    error, ratio, low, high = torus.scores(law, torus.posterior(observations))
    assert error < 0.03 and 0.98 < ratio < 1.02 and 0.9 < low < high < 1.1


@pytest.mark.parametrize("covariance", ["jacobian", "linear"])
def test_nonlinear_operators_take_one_gauss_newton_step(torus, covariance):
    """Against a dense Jacobian of the operator, state by state."""
    rng = np.random.default_rng(4)
    lat, lon = rng.uniform(0, 0.9, 9), rng.uniform(0, 1.4, 9)
    u, v = (PointOperator(torus.grid, lat, lon, channel) for channel in (0, 1))
    operator = StackedOperator(wind_speed(u, v), PointOperator(torus.grid, lat[:4], lon[:4], 0))
    observations = Observations(operator, randn(13, seed=6).abs(), 0.05)
    x, level = noisy(torus, 3), 0.4
    sigma = torch.full((3,), level, dtype=torch.float64)
    posterior = MomentMatching(torus.denoiser, observations, covariance=covariance, iterations=1)
    result = posterior(x, sigma)
    noise = torus.matrix(torus.noise.cov, torus.size)
    gain = torus.covariance @ torch.linalg.inv(torus.covariance + level**2 * noise)
    posterior_covariance = torus.covariance - gain @ torus.covariance
    for i in range(3):
        clean = torus.denoiser(x[i : i + 1], sigma[:1])
        h = torch.func.jacrev(lambda s: operator(s)[0])(clean).reshape(13, -1)
        s = h @ posterior_covariance @ h.T + 0.05 * torch.eye(13, dtype=torch.float64)
        innovation = observations.values - operator(clean)[0]
        step = posterior_covariance @ h.T @ torch.linalg.solve(s, innovation)
        expected = clean + step.reshape(clean.shape)
        torch.testing.assert_close(result[i : i + 1], expected, rtol=1e-5, atol=1e-5)


def test_iterations_solve_for_a_denoiser_whose_linear_part_is_wrong(torus):
    """The Jacobian decides; what preconditions only sets the pace."""

    learned = FunctionPrior(torus.denoiser, torus.noise)  # its linear part is a stand-in
    x, sigma = noisy(torus, 2), torch.full((2,), 0.5, dtype=torch.float64)
    exact = exact_call(torus, x, 0.5)

    def error(**options):
        posterior = MomentMatching(learned, torus.observations, **options)
        return float((posterior(x, sigma) - exact).norm() / exact.norm())

    errors = [error(iterations=n) for n in (1, 2, 4, 20)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-6
    assert error(covariance="linear") > 0.005


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_error_of_k_iterations_is_of_order_k_plus_one(torus, iterations):
    """In the difference between the covariance and that of the linear part."""
    x, sigma = noisy(torus, 2), torch.full((2,), 0.5, dtype=torch.float64)
    exact = exact_call(torus, x, 0.5)
    generator = torch.Generator().manual_seed(0)
    other = torch.rand(torus.denoiser.variance.shape, generator=generator, dtype=torch.float64)

    def error(share):
        linear = copy.copy(torus.denoiser)
        linear.variance = torus.denoiser.variance * (1 + share * other)
        linear._constants = {}

        learned = FunctionPrior(torus.denoiser, torus.noise, linear)
        posterior = MomentMatching(learned, torus.observations, iterations=iterations)
        return float((posterior(x, sigma) - exact).norm())

    ratio = error(0.02) / error(0.01)
    assert ratio == pytest.approx(2 ** (iterations + 1), rel=0.1)


def test_the_derivative_is_taken_in_its_range_only(torus):
    """As at all levels inside, the linear part's covariance outside; the ends belong to it."""

    learned = FunctionPrior(torus.denoiser, torus.noise)  # its linear part is a stand-in

    def posterior(**options):
        return MomentMatching(learned, torus.observations, **options)

    ranged = posterior(guidance_interval=[0.25, 4])
    always, never = posterior(), posterior(covariance="linear")
    x = noisy(torus, 2)
    for level, expected in ((0.1, never), (0.25, always), (1.0, always), (4.0, always), (8, never)):
        sigma = torch.full((2,), level, dtype=torch.float64)
        prepared = ranged.scheduled(sigma[:1], x)[level]
        assert torch.equal(ranged(x, sigma), expected(x, sigma))
        torch.testing.assert_close(prepared(x, sigma[:1].expand(2)), expected(x, sigma))
    assert not torch.allclose(always(x, sigma), never(x, sigma), rtol=1e-3)
    levels = FieldNoiseScheduler(torus.noise, 0.02, 80.0).timesteps(5, dtype=torch.float64)[:-1]
    whole = posterior(guidance_interval=[0.02, 80.0])  # whose ends the schedule misses by round-off
    for level, prepared in whole.scheduled(levels, x).items():
        sigma = torch.full((2,), level, dtype=torch.float64)
        torch.testing.assert_close(prepared(x, sigma[:1].expand(2)), always(x, sigma))
        assert torch.equal(whole(x.float(), sigma.float()), always(x.float(), sigma.float()))
    mixed = torch.tensor([0.1, 1.0], dtype=torch.float64)  # some of them inside
    assert torch.equal(ranged(x, mixed), always(x, mixed))


def test_inflated_priors_differ_between_analyses(torus):
    inflated = torus.denoiser.inflated(torch.tensor([0.5, 2.0]))
    x, sigma = noisy(torus, 4), torch.full((4,), 0.5, dtype=torch.float64)
    for covariance in ("jacobian", "linear"):
        posterior = MomentMatching(inflated, torus.observations, covariance=covariance)
        together = posterior(x, sigma)
        for i, factor in enumerate((0.5, 2.0)):
            alone = MomentMatching(torus.denoiser.inflated(factor), torus.observations)(
                x[2 * i : 2 * i + 2], sigma[:2]
            )
            torch.testing.assert_close(together[2 * i : 2 * i + 2], alone)


def test_a_posterior_is_a_denoiser_and_may_be_conditioned_again(torus):
    """Observing in two parts equals observing at once."""
    first, second = torus.observe(8, 1), torus.observe(9, 2)
    operator = StackedOperator(first.operator, second.operator)
    at_once = Observations(
        operator,
        torch.cat([first.values, second.values]),
        torch.cat([first.variance, second.variance]),
    )
    x, sigma = noisy(torus, 2), torch.full((2,), 0.5, dtype=torch.float64)
    posterior = MomentMatching(torus.denoiser, at_once)
    together = posterior(x, sigma)
    in_turn = MomentMatching(
        MomentMatching(torus.denoiser, first, covariance="linear"),
        second,
        iterations=9,
    )
    torch.testing.assert_close(in_turn(x, sigma), together, rtol=1e-5, atol=1e-5)


def test_a_posterior_keeps_no_graph(torus):
    x, sigma = noisy(torus, 1), torch.full((1,), 0.5, dtype=torch.float64)
    posterior = MomentMatching(torus.denoiser, torus.observations)
    with torch.no_grad():
        assert not posterior(x, sigma).requires_grad


def test_single_precision_agrees(torus):
    x, sigma = noisy(torus, 2), torch.full((2,), 0.02, dtype=torch.float64)
    posterior = MomentMatching(torus.denoiser, torus.observations)
    single = posterior(x.float(), sigma.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), posterior(x, sigma), rtol=1e-3, atol=1e-3)


def test_mistakes_are_named(torus):
    with pytest.raises(InputError, match="covariance must be 'jacobian' or 'linear', got 'full'"):
        MomentMatching(torus.denoiser, torus.observations, covariance="full")
    with pytest.raises(InputError, match="iterations must be at least 1, got 0"):
        MomentMatching(torus.denoiser, torus.observations, iterations=0)
    for wrong in ([4, 0.25], [1.0], [-1, 2], ["a", 2], 3.0, [float("nan"), 1], "12", [True, 2]):
        with pytest.raises(InputError, match="guidance_interval=.*two noise levels"):
            MomentMatching(torus.denoiser, torus.observations, guidance_interval=wrong)
    batch = Observations.batch([torus.observe(3, 1), torus.observe(2, 2)])
    posterior = MomentMatching(torus.denoiser, batch)
    with pytest.raises(InputError, match="3 states cannot be shared out to 2 analyses"):
        posterior(noisy(torus, 3), torch.ones(3, dtype=torch.float64))
