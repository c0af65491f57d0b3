# SPDX-License-Identifier: Apache-2.0
"""Against dense matrices where all is Gaussian, and the exact posterior of a mixture where not."""

import numpy as np
import pytest
import torch
from priors import with_eofs
from tensors import randn

from ddo_modulus.diffusion.prior import FunctionPrior
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.derivative import Differentiable
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, Matern, MeasuredSpectrum
from ddo_modulus.fields.grid import BoxGrid, LatLonGrid
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.observations import Observations, PointOperator
from ddo_modulus.posterior import AnalysisSystem, Background, Inflated, Innovations, MomentMatching
from ddo_modulus.posterior.background import shared_precision


def globe(shape):
    basis = SphericalBasis(shape)
    grid = LatLonGrid(basis.latitudes(shape[0]), np.arange(shape[1]) * 360 / shape[1])
    return basis, grid


def homogeneous(basis, channels=1):
    noise = GaussianField(basis, Matern(0.25, 1.0), channels)
    mean = 0.3 * basis.truncate(3).synthesize(randn(channels, basis.truncate(3).size, seed=7))
    return GaussianDenoiser(mean, GaussianField(basis, Matern(0.3, 2.0), channels), noise)


def coupled():
    basis = FourierBasis((5, 6), (1, 1.3))
    noise = GaussianField(basis, Matern(0.25, 1.0), 3)
    covariance = torch.tensor([[1.0, 0.7, 0.2], [0.7, 0.8, -0.1], [0.2, -0.1, 0.5]]).double()
    falloff = 1 / (1 + basis.eigenvalues / 50)
    return GaussianDenoiser(0.1, CoupledField(noise, falloff[:, None, None] * covariance), noise)


PRIORS = {
    "torus": lambda: (homogeneous(FourierBasis((6, 8), (1, 1.3)), 2), BoxGrid((6, 8), (1, 1.3))),
    "box": lambda: (homogeneous(CosineBasis((7, 6))), BoxGrid((7, 6), periodic=False)),
    "sphere": lambda: (homogeneous(globe((6, 10))[0]), globe((6, 10))[1]),
    "eofs": lambda: (with_eofs(CosineBasis((6, 7))), BoxGrid((6, 7), periodic=False)),
    "coupled": lambda: (coupled(), BoxGrid((5, 6), (1, 1.3))),
}
priors = pytest.mark.parametrize("name", PRIORS)


def proportional(noise, factor=0.3):
    """A background error of the noise's own shape: all of it can be exact."""
    return GaussianField(noise.basis, MeasuredSpectrum(noise.basis, factor * noise.variance))


def smooth(noise, factor=0.3):
    return GaussianField(noise.basis, Matern(0.35, 1.5), noise.channels, scale=factor)


ERRORS = {"proportional": proportional, "smooth": smooth}


class Dense:
    """Everything as matrices on the grid, in the space of the band."""

    def __init__(self, denoiser, dense):
        noise = denoiser.noise
        self.size = (noise.channels, *noise.shape)
        root = dense(lambda a: denoiser.fields(a, mean=False), (denoiser.variance.shape[-1],))
        self.prior = root @ torch.diag(denoiser.variance[0]) @ root.T
        self.noise = dense(noise.cov, self.size)
        self.mean = denoiser.mean.expand(self.size).flatten()
        self.matrix = dense

    def condition(self, mean, cov, operator, values, error):
        """The usual update, ``values = operator x + N(0, error)``."""
        total = torch.linalg.pinv(operator @ cov @ operator.T + error, rtol=1e-13, hermitian=True)
        gain = cov @ operator.T @ total
        return mean + (values - operator @ mean) @ gain.T, cov - gain @ operator @ cov

    def conditional(self, background, error, observations=None, noisy=None, sigma=None, factor=1.0):
        """Mean and covariance of the state given all that is given."""
        mean, cov = self.mean, factor * self.prior
        unit = torch.eye(len(mean), dtype=torch.float64)
        if background is not None:
            matrix = self.matrix(error.cov, self.size)
            mean, cov = self.condition(mean, cov, unit, background.flatten(), matrix)
        if observations is not None:
            h = self.matrix(observations.operator.increment, self.size)
            r = observations.error_covariance(h)[0]
            mean, cov = self.condition(mean, cov, h, observations.values.to(h), r)
        if noisy is not None:
            mean, cov = self.condition(mean, cov, unit, noisy.flatten(), sigma**2 * self.noise)
        return mean, cov


def forecast(denoiser, error, count=None, seed=5):
    """Draws of prior plus error, in the band."""
    n = 1 if count is None else count
    white = randn(2, n, denoiser.variance.shape[-1], seed=seed)
    truth = denoiser.fields(white[0] * denoiser.variance.sqrt())
    made = truth + error.color(white[1].unflatten(1, (denoiser.noise.channels, -1)))
    return made[0] if count is None else made


def observe(denoiser, grid, count=9, seed=1):
    random = np.random.default_rng(seed)
    lat = random.uniform(grid.lat.min(), grid.lat.max(), count)
    lon = random.uniform(grid.lon.min(), grid.lon.max(), count)
    operator = PointOperator(grid, lat, lon, random.integers(0, denoiser.noise.channels, count))
    variance = torch.from_numpy(random.uniform(0.02, 0.1, count))
    truth = denoiser.fields(randn(1, denoiser.variance.shape[-1], seed=seed + 10))
    return Observations(operator, operator(truth)[0] + variance.sqrt() * randn(count), variance)


# ---- Gaussian: one call, and the whole chain ----------------------------------------------------


@priors
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("level", [0.05, 0.7, 30.0])
def test_a_call_is_the_exact_conditional_mean(name, kind, level, dense):
    denoiser, _ = PRIORS[name]()
    error = ERRORS[kind](denoiser.noise)
    background = forecast(denoiser, error)
    conditioned = Background(denoiser, background, error)
    x = denoiser.fields(3 * randn(3, denoiser.variance.shape[-1], seed=8))
    result = conditioned(x, torch.full((3,), level, dtype=torch.float64))
    exact = Dense(denoiser, dense)
    for i in range(3):
        mean, _ = exact.conditional(background, error, noisy=x[i], sigma=level)
        torch.testing.assert_close(result[i].flatten(), mean, rtol=1e-6, atol=1e-6)


@priors
@pytest.mark.parametrize("kind", ERRORS)
def test_its_linear_part_is_prior_and_background_together(name, kind, dense):
    denoiser, _ = PRIORS[name]()
    error = ERRORS[kind](denoiser.noise)
    background = forecast(denoiser, error)
    linear = Background(denoiser, background, error).linear
    mean, cov = Dense(denoiser, dense).conditional(background, error)
    torch.testing.assert_close(linear.mean.flatten(), mean, rtol=1e-6, atol=1e-7)
    root = dense(lambda a: linear.fields(a, mean=False), (linear.variance.shape[-1],))
    found = root @ torch.diag(linear.variance[0]) @ root.T
    torch.testing.assert_close(found, cov, rtol=1e-6, atol=1e-7)


@priors
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("covariance", ["linear", "jacobian"])
def test_sampling_given_background_and_observations(name, kind, covariance, dense, affine_law):
    denoiser, grid = PRIORS[name]()
    error = ERRORS[kind](denoiser.noise)
    background, observations = forecast(denoiser, error), observe(denoiser, grid)
    posterior = MomentMatching(
        Background(denoiser, background, error),
        observations,
        covariance=covariance,
        iterations=1,
    )
    mean, cov = affine_law(posterior, denoiser.noise, steps=24)
    m, p = Dense(denoiser, dense).conditional(background, error, observations)
    assert float((mean - m).square().mean().sqrt() / p.diagonal().mean().sqrt()) < 0.03
    assert 0.97 < float((cov.diagonal() / p.diagonal()).sqrt().mean()) < 1.03
    # Without the background it is another law altogether.
    alone, _ = Dense(denoiser, dense).conditional(None, None, observations)
    assert float((alone - m).square().mean().sqrt() / p.diagonal().mean().sqrt()) > 0.3


def test_background_after_observations_where_it_is_exact(dense):
    denoiser, grid = PRIORS["torus"]()
    error = proportional(denoiser.noise)
    background, observations = forecast(denoiser, error), observe(denoiser, grid)
    observed = MomentMatching(denoiser, observations, covariance="linear")
    x, sigma = denoiser.fields(randn(2, 96)), torch.full((2,), 0.6, dtype=torch.float64)
    result = Background(observed, background, error)(x, sigma)
    for i in range(2):
        mean, _ = Dense(denoiser, dense).conditional(background, error, observations, x[i], 0.6)
        torch.testing.assert_close(result[i].flatten(), mean, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="condition on the background first"):
        Background(observed, background, smooth(denoiser.noise))


# ---- several analyses, members, inflation -------------------------------------------------------


@pytest.mark.parametrize("name", ["torus", "eofs", "coupled"])
@pytest.mark.parametrize("covariance", ["linear", "jacobian"])
@pytest.mark.parametrize("of_members", [False, True])
def test_analyses_and_members_have_their_own_backgrounds(name, covariance, of_members):
    """Inflated, conditioned, observed: at once as one after the other."""
    denoiser, grid = PRIORS[name]()
    noise, error = denoiser.noise, smooth(denoiser.noise)
    factors = torch.tensor([0.5, 1.0, 2.0])
    backgrounds = forecast(denoiser, error, 6 if of_members else 3)
    parts = [observe(denoiser, grid, count, seed=count) for count in (4, 7, 2)]
    x, sigma = denoiser.fields(randn(6, noise.channels * noise.basis.size)), torch.full((6,), 0.5)
    sigma = sigma.double()

    def posterior(factor, background, observations):
        prior = Background(Inflated(denoiser, factor), background, error)
        return MomentMatching(prior, observations, covariance=covariance)

    together = posterior(factors, backgrounds, Observations.batch(parts))(x, sigma)
    # One set of places for all analyses is another path.
    same = posterior(factors, backgrounds, parts[0])(x, sigma)
    for i in range(6):
        own = backgrounds[i] if of_members else backgrounds[i // 2]
        pick = slice(i, i + 1)
        alone = posterior(float(factors[i // 2]), own, parts[i // 2])(x[pick], sigma[pick])
        torch.testing.assert_close(together[pick], alone)
        alone = posterior(float(factors[i // 2]), own, parts[0])(x[pick], sigma[pick])
        torch.testing.assert_close(same[pick], alone)


@pytest.mark.parametrize("name", ["eofs", "coupled"])
def test_inflation_before_and_after(name, dense):
    """Before, it is of the prior alone; after, of what prior and background leave."""
    denoiser, _ = PRIORS[name]()
    error = smooth(denoiser.noise)
    background, exact = forecast(denoiser, error), Dense(denoiser, dense)
    x, sigma = denoiser.fields(randn(1, denoiser.variance.shape[-1])), torch.tensor([0.5]).double()
    before = Background(Inflated(denoiser, 2.0), background, error)
    mean, _ = exact.conditional(background, error, noisy=x[0], sigma=0.5, factor=2.0)
    torch.testing.assert_close(before(x, sigma)[0].flatten(), mean, rtol=1e-6, atol=1e-6)
    after = Inflated(Background(denoiser, background, error), 2.0)
    mean, cov = exact.conditional(background, error)
    unit = torch.eye(len(mean), dtype=torch.float64)
    mean, _ = exact.condition(mean, 2 * cov, unit, x.flatten(), 0.25 * exact.noise)
    torch.testing.assert_close(after(x, sigma)[0].flatten(), mean, rtol=1e-6, atol=1e-6)


def test_two_forecasts_are_one_with_their_precisions_added(dense):
    denoiser, _ = PRIORS["eofs"]()
    noise, error = denoiser.noise, smooth(denoiser.noise)
    one, two = forecast(denoiser, error, 2)
    twice = Background(Background(denoiser, one, error), two, error)
    half = GaussianField(noise.basis, Matern(0.35, 1.5), scale=0.15)
    once = Background(denoiser, (one + two) / 2, half)
    x, sigma = denoiser.fields(randn(2, 42)), torch.full((2,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(twice(x, sigma), once(x, sigma), rtol=1e-6, atol=1e-6)


def test_innovations_are_against_the_background(dense):
    denoiser, grid = PRIORS["eofs"]()
    error, observations = smooth(denoiser.noise), observe(denoiser, grid)
    members = forecast(denoiser, error, 4)
    prior = Background(denoiser, members, error)
    system = AnalysisSystem(observations, denoiser.noise)
    chi2 = Innovations.of(system.at_mean(prior.linear)).chi_square(torch.ones(1))
    mean, cov = Dense(denoiser, dense).conditional(members.mean(0), error)
    h = dense(observations.operator.increment, (1, 6, 7))
    d = observations.values - h @ mean
    total = h @ cov @ h.T + torch.diag(observations.variance)
    torch.testing.assert_close(chi2[0], d @ torch.linalg.solve(total, d), rtol=1e-5, atol=1e-5)


# ---- a prior that is not Gaussian ---------------------------------------------------------------


class Mixture:
    """Two weather regimes: a mixture of Gaussians with its exact denoiser and posteriors."""

    def __init__(self, dense):
        self.part = homogeneous(CosineBasis((6, 6)))
        self.noise = self.part.noise
        pattern = 2.5 * self.noise.basis.truncate(2).synthesize(torch.tensor([[0.3, 1, -0.5, 0.2]]))
        shift = pattern.double().flatten()
        self.means = [self.part.mean.flatten() + sign * shift for sign in (1, -1)]
        self.dense = Dense(self.part, dense)
        # What a trained model knows of it as linear part: first and second moments.
        whiten = dense(lambda x: self.noise.whiten(x).flatten(1), (1, 6, 6))
        total = whiten @ (self.dense.prior + torch.outer(shift, shift)) @ whiten.T
        index = torch.arange(36)
        prior = EOFField.from_covariance(self.noise, total, index, torch.ones(36).double())
        self.linear = GaussianDenoiser(self.part.mean, prior, self.noise)

    def conditional(self, knowledge):
        """Mean of the state given pairs (value, error covariance)."""
        unit = torch.eye(36, dtype=torch.float64)
        means, logs = [], []
        for mean in self.means:
            cov, log = self.dense.prior, torch.zeros((), dtype=torch.float64)
            for value, error in knowledge:
                law = torch.distributions.MultivariateNormal(mean, cov + error)
                log = log + law.log_prob(value)
                mean, cov = self.dense.condition(mean, cov, unit, value, error)
                cov = (cov + cov.T) / 2
            means.append(mean)
            logs.append(log)
        weight = torch.softmax(torch.stack(logs), 0)
        return (weight[:, None] * torch.stack(means)).sum(0)

    def __call__(self, x, sigma, condition=None):
        rows = [
            self.conditional([(x[i].flatten(), float(sigma[i]) ** 2 * self.dense.noise)])
            for i in range(len(x))
        ]
        return torch.stack(rows).unflatten(1, (1, 6, 6))


@pytest.fixture(scope="module")
def mixture(dense):
    return Mixture(dense)


def truths(mixture, count, seed):
    white = randn(count, 36, seed=seed)
    sign = torch.tensor([1.0, -1.0]).repeat(count)[:count]
    mean = torch.stack([mixture.means[0 if s > 0 else 1] for s in sign])
    field = mixture.part.fields(white * mixture.part.variance.sqrt(), mean=False)
    return field + mean.unflatten(1, (1, 6, 6))


@pytest.mark.parametrize("level", [0.3, 1.5, 8.0])
def test_it_is_exact_for_any_prior_where_errors_are_like_the_noise(mixture, level):
    error = proportional(mixture.noise, 1.5)
    truth = truths(mixture, 4, 3)
    background = truth + error.color(randn(4, 1, 36, seed=4))
    x = truth + level * mixture.noise.color(randn(4, 1, 36, seed=5))
    sigma = torch.full((4,), level, dtype=torch.float64)
    result = Background(mixture, background, error)(x, sigma)
    for i in range(4):
        exact = mixture.conditional(
            [
                (x[i].flatten(), level**2 * mixture.dense.noise),
                (background[i].flatten(), 1.5 * mixture.dense.noise),
            ]
        )
        torch.testing.assert_close(result[i].flatten(), exact, rtol=1e-6, atol=1e-6)


def test_the_exact_share_makes_other_errors_more_exact(mixture, monkeypatch):
    """Against taking all of the background by the linear part."""
    error = GaussianField(mixture.noise.basis, Matern(0.3, 1.2), scale=1.5)
    truth = truths(mixture, 6, 3)
    background = truth + error.color(randn(6, 1, 36, seed=4))
    x = truth + 1.5 * mixture.noise.color(randn(6, 1, 36, seed=5))
    sigma = torch.full((6,), 1.5, dtype=torch.float64)
    matrix = mixture.dense.matrix(error.cov, (1, 6, 6))
    exact = torch.stack(
        [
            mixture.conditional(
                [
                    (x[i].flatten(), 1.5**2 * mixture.dense.noise),
                    (background[i].flatten(), matrix),
                ]
            )
            for i in range(6)
        ]
    )

    def distance():
        result = Background(mixture, background, error)(x, sigma)
        return float((result.flatten(1) - exact).square().mean().sqrt())

    split = distance()
    monkeypatch.setattr("ddo_modulus.posterior.background.shared_precision", lambda q, linear: 0.0)
    assert split < 0.35 * distance()


# ---- other grids, types, mistakes ---------------------------------------------------------------


class OnAnyGrid(Differentiable):
    """A Gaussian prior as a denoiser that takes states on any grid, as an operator does."""

    def __init__(self, linear):
        self.linear, self.noise = linear, linear.noise

    def __call__(self, x, sigma, condition=None):
        return self.linear.at(x.shape[-2:])(x, sigma)


@pytest.mark.parametrize("kind", ERRORS)
def test_on_another_grid_shared_modes_are_conditioned_alike(kind):
    denoiser = homogeneous(FourierBasis((8, 9), modes=7))
    error = ERRORS[kind](denoiser.noise)
    background = forecast(denoiser, error, 2)
    conditioned = Background(OnAnyGrid(denoiser), background, error)
    a, sigma = randn(2, 49), torch.full((2,), 0.5, dtype=torch.float64)
    x, y = denoiser.fields(a), denoiser.at((16, 27)).fields(a)
    torch.testing.assert_close(y[..., ::2, ::3], x)
    torch.testing.assert_close(conditioned(y, sigma)[..., ::2, ::3], conditioned(x, sigma))


@priors
def test_on_another_grid_its_linear_part_is_all_of_it(name):
    """Of a Gaussian prior, the scales that are new included."""
    denoiser, _ = PRIORS[name]()
    error = smooth(denoiser.noise)
    conditioned = Background(OnAnyGrid(denoiser), forecast(denoiser, error), error)
    linear = conditioned.linear.at([2 * n for n in denoiser.noise.shape])
    assert linear.variance.shape[-1] > denoiser.variance.shape[-1]
    x = linear.fields(randn(3, linear.variance.shape[-1]))
    sigma = torch.full((3,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(conditioned(x, sigma), linear(x, sigma), rtol=1e-6, atol=1e-6)


def test_single_precision():
    denoiser, _ = PRIORS["eofs"]()
    error = smooth(denoiser.noise)
    conditioned = Background(denoiser, forecast(denoiser, error), error)
    x, sigma = denoiser.fields(randn(2, 42)), torch.tensor([0.05, 80.0], dtype=torch.float64)
    single = conditioned(x.float(), sigma.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), conditioned(x, sigma), rtol=1e-3, atol=1e-3)


def test_mistakes_are_named():
    denoiser, _ = PRIORS["box"]()
    error = smooth(denoiser.noise)
    good = torch.zeros(1, 7, 6)
    with pytest.raises(InputError, match=r"\(2, 7, 6\) does not fit states \(1, 7, 6\)"):
        Background(denoiser, torch.zeros(2, 7, 6), error)
    with pytest.raises(InputError, match="NaN or infinite"):
        Background(denoiser, good * torch.nan, error)
    other = GaussianField(FourierBasis((7, 6)), Matern(0.3, 1.0))
    with pytest.raises(InputError, match="do not share a basis"):
        Background(denoiser, good, other)
    with pytest.raises(InputError, match="3 states cannot be shared out to 2 analyses"):
        two = Background(denoiser, torch.zeros(2, 1, 7, 6), error)
        two(torch.zeros(3, 1, 7, 6), torch.ones(3))


@pytest.mark.parametrize("kind", ERRORS)
def test_its_derivative_is_that_of_automatic_differentiation(kind):
    denoiser, _ = PRIORS["eofs"]()
    error = ERRORS[kind](denoiser.noise)
    conditioned = Background(denoiser, forecast(denoiser, error, 2), error)
    x, sigma = denoiser.fields(randn(2, 42)), torch.tensor([0.3, 2.0], dtype=torch.float64)
    v = randn(2, 1, 6, 7, seed=4)
    clean, pullback = conditioned.value_and_pullback(x, sigma)
    expected, automatic = torch.func.vjp(lambda x: conditioned(x, sigma), x)
    torch.testing.assert_close(clean, expected)
    torch.testing.assert_close(pullback(v), automatic(v)[0])


def test_one_background_for_analyses_of_different_inflation():
    """A prior with a factor of its own for each analysis, about one mean and one forecast."""
    denoiser, _ = PRIORS["coupled"]()
    error, factors = smooth(denoiser.noise), torch.tensor([0.5, 2.0])
    background = forecast(denoiser, error)
    together = Background(Inflated(denoiser, factors), background, error).linear
    for i, factor in enumerate(factors):
        alone = Background(Inflated(denoiser, float(factor)), background, error).linear
        torch.testing.assert_close(together.mean[i], alone.mean)
        torch.testing.assert_close(together.variance[i], alone.variance[0])


def test_a_condition_reaches_the_prior_below():
    denoiser, _ = PRIORS["box"]()
    seen = []

    def conditional(x, sigma, condition):
        seen.append(condition)
        return denoiser(x, sigma)

    prior = Background(
        FunctionPrior(conditional, denoiser.noise, denoiser),
        forecast(denoiser, proportional(denoiser.noise)),
        proportional(denoiser.noise),
    )
    x, sigma = denoiser.fields(randn(1, denoiser.variance.shape[-1])), torch.tensor([0.5]).double()
    condition = torch.ones(1)
    prior(x, sigma, condition)
    prior.value_and_pullback(x, sigma, condition)
    assert len(seen) == 2 and all(one is condition for one in seen)


@pytest.mark.parametrize("name", ["torus", "coupled"])
def test_the_exact_share_has_the_information_allowed(name):
    """No more than allowed, by variances of the coefficients themselves, and nearly all of it."""
    denoiser, _ = PRIORS[name]()
    precision = 1 / smooth(denoiser.noise).relative_to(denoiser.noise)[0]
    share = shared_precision(precision, denoiser)
    variance = denoiser.variance[0]
    if denoiser.rotation is not None:
        variance = denoiser.rotation.marginal(variance)
    excess = 0.5 * torch.log1p(variance * (share - precision).clamp_min(0)).sum()
    assert 0.0099 < float(excess) <= 0.01


def test_the_exact_share_of_several_analyses_suits_each():
    denoiser, _ = PRIORS["coupled"]()
    error = smooth(denoiser.noise)
    given = [
        Background(Inflated(denoiser, f), forecast(denoiser, error), error).linear
        for f in (0.5, 2.0)
    ]
    both = Background(
        Inflated(denoiser, torch.tensor([0.5, 2.0])), forecast(denoiser, error), error
    ).linear
    precision = 1 / error.relative_to(denoiser.noise)[0]
    share = shared_precision(precision, both)
    assert float(precision.min()) <= share
    assert share <= min(shared_precision(precision, one) for one in given)
