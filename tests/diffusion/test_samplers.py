# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from priors import homogeneous
from tensors import generator, relative

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.samplers import SOLVERS, Churn, sample
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.spherical_basis import SphericalBasis

DETERMINISTIC = ["euler", "heun", "dpmpp_2m"]


def problem(basis, channels=1):
    denoiser = homogeneous(basis, channels)
    return denoiser, denoiser.prior, denoiser.noise


TORUS = problem(FourierBasis((6, 7), (1.0, 1.2)))


def exact_law(denoiser, dense, sigma_max=80.0):
    """Mean and covariance of the exact flow from pure noise at ``sigma_max``.

    A coordinate moves as ``sqrt(s / (s + sigma^2))``; started at ``sigma_max`` it forgets neither
    the missing mean nor the missing variance of the prior entirely.
    """
    s = denoiser.variance[0]
    shrink = (s / (s + sigma_max**2)).sqrt()
    mean = denoiser.fields(denoiser.modes(torch.zeros_like(denoiser.mean)[None]) * shrink)
    root = dense(lambda a: denoiser.fields(a, mean=False), (len(s),)) * (sigma_max * shrink)
    return mean.flatten(), root @ root.T


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize(
    "basis",
    [FourierBasis((6, 7), (1.0, 1.2)), CosineBasis((5, 6)), SphericalBasis((7, 12))],
    ids=repr,
)
def test_solvers_converge_to_the_prior(solver, basis, affine_law, dense):
    denoiser, prior, noise = problem(basis, 2)
    mean, cov = affine_law(denoiser, noise, steps=160, solver=solver)
    assert relative(mean, denoiser.mean.flatten()) < 0.02
    assert relative(cov, dense(prior.cov, (2, *basis.shape))) < (
        0.05 if solver == "euler" else 3e-3
    )
    exact = exact_law(denoiser, dense)
    assert relative(mean, exact[0]) < 2e-3


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(solver, order, affine_law, dense):
    """Doubling the steps divides the error by two to the order, once the steps are small."""
    denoiser, _, noise = TORUS
    levels = {"sigma_max": 30.0, "sigma_min": 1e-3}
    exact = exact_law(denoiser, dense, 30.0)[1]
    error = [
        relative(affine_law(denoiser, noise, steps=n, solver=solver, **levels)[1], exact)
        for n in (50, 100, 200)
    ]
    for coarse, fine in zip(error, error[1:], strict=False):
        assert 0.85 * 2**order < coarse / fine < 1.25 * 2**order


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_a_single_mode_follows_the_scalar_recursion(solver, affine_law):
    """The formulas of the papers, worked out for ``D(x) = w x``, ``w = s / (s + sigma^2)``."""
    _, _, noise = problem(FourierBasis((3, 3)))
    denoiser = GaussianDenoiser(0.0, noise, noise)  # s = 1 for every mode
    _, cov = affine_law(denoiser, noise, steps=5, solver=solver)
    sigmas = FieldNoiseScheduler(noise).timesteps(5, dtype=torch.float64).tolist()

    def w(sigma):
        return 1 / (1 + sigma**2)

    x, last = sigmas[0], None
    for s, t in zip(sigmas, sigmas[1:], strict=False):
        slope = (x - w(s) * x) / s
        euler = x + (t - s) * slope
        if t == 0 or solver == "euler":
            x = w(s) * x if t == 0 else euler
        elif solver == "heun":
            x = x + (t - s) / 2 * (slope + (euler - w(t) * euler) / t)
        else:
            clean, h = w(s) * x, torch.tensor(s / t).log().item()
            target = clean if last is None else clean + h / (2 * last[1]) * (clean - last[0])
            last = clean, h
            x = t / s * x + (1 - t / s) * target
    exact = x**2 * float(noise.variance.sum())
    torch.testing.assert_close(
        cov.trace() / 9, torch.tensor(exact, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_stochastic_solver_draws_the_prior(dense):
    denoiser, prior, noise = TORUS
    n = 6000
    x = sample(
        denoiser,
        FieldNoiseScheduler(noise),
        n,
        steps=80,
        solver="dpmpp_2m_sde",
        generator=generator(),
        dtype=torch.float64,
    )
    x = (x - denoiser.mean).flatten(1)
    expected = dense(prior.cov, (1, 6, 7))
    assert float(x.mean(0).abs().max()) < 5 / n**0.5
    deviation = ((expected**2 + expected.diagonal() * expected.diagonal()[:, None]) / n).sqrt()
    error = (x.T @ x / n - expected).abs()
    assert float(((error - 0.01).clamp_min(0) / deviation).max()) < 5.5


def test_stochastic_solver_renews_its_noise_with_the_field():
    """Fresh noise must be the field's: with draws of white noise the fine scales are wrong."""
    denoiser, prior, noise = TORUS

    class White(FieldNoiseScheduler):
        calls = 0

        def draw(self, like, generator=None):
            self.calls += 1
            if self.calls == 1:
                return super().draw(like, generator)
            return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    def fine(scheduler):
        x = sample(
            denoiser,
            scheduler,
            4000,
            steps=32,
            solver="dpmpp_2m_sde",
            generator=generator(),
            dtype=torch.float64,
        )
        spectrum = noise.basis.analyze(x - denoiser.mean).square().mean((0, 1))
        return float(spectrum[-1] / prior.variance[0, -1])

    assert fine(FieldNoiseScheduler(noise)) == pytest.approx(1, abs=0.15)
    assert abs(fine(White(noise)) - 1) > 0.3


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_is_one_denoising(solver):
    denoiser, _, noise = TORUS
    scheduler = FieldNoiseScheduler(noise, sigma_max=5.0)
    x = sample(denoiser, scheduler, 3, steps=1, solver=solver, generator=generator())
    start = 5.0 * scheduler.draw(torch.empty(3, 1, 6, 7), generator())
    torch.testing.assert_close(x, denoiser(start, torch.full((3,), 5.0)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_generators_determine_states(solver):
    denoiser, _, noise = TORUS
    scheduler = FieldNoiseScheduler(noise)
    one, two, three = (
        sample(denoiser, scheduler, 2, steps=4, solver=solver, generator=generator(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert one.dtype == torch.float32


@pytest.mark.parametrize(("solver", "calls"), [("euler", 6), ("dpmpp_2m", 6), ("heun", 11)])
def test_denoiser_calls(solver, calls):
    denoiser, _, noise = TORUS
    levels, conditions = [], []

    def counted(x, sigma, condition=None):
        levels.append(sigma)
        conditions.append(condition)
        return denoiser(x, sigma)

    condition = torch.ones(2, 3, 6, 7)
    sample(counted, FieldNoiseScheduler(noise), 2, steps=6, solver=solver, condition=condition)
    assert len(levels) == calls
    assert all(level.shape == (2,) and bool((level > 0).all()) for level in levels)
    assert all(seen is condition for seen in conditions)


def test_states_on_a_finer_grid_share_the_large_scales(affine_law, dense):
    denoiser, prior, noise = problem(FourierBasis((6, 6), modes=5))
    coarse = affine_law(denoiser, noise, steps=8)

    def fine_denoiser(x, sigma, condition=None):
        return denoiser.at(x.shape[-2:])(x, sigma)

    mean, cov = affine_law(fine_denoiser, noise, steps=8, shape=(12, 18))
    shared = torch.arange(12 * 18).reshape(12, 18)[::2, ::3].flatten()
    torch.testing.assert_close(mean[shared], coarse[0])
    torch.testing.assert_close(cov[shared][:, shared], coarse[1])


def test_mistakes_are_named():
    denoiser, _, noise = TORUS
    scheduler = FieldNoiseScheduler(noise)
    with pytest.raises(InputError, match="unknown solver 'rk4'; choose one of euler, heun"):
        sample(denoiser, scheduler, 1, steps=2, solver="rk4")
    with pytest.raises(InputError, match="steps and batch must be at least 1, got 0 and 2"):
        sample(denoiser, scheduler, 2, steps=0)
    with pytest.raises(InputError, match="got 3 and 0"):
        sample(denoiser, scheduler, 0, steps=3)


def test_progress_sees_every_step():
    denoiser, _, noise = TORUS
    seen = []

    def progress(steps):
        for i in steps:
            seen.append(i)
            yield i

    sample(denoiser, FieldNoiseScheduler(noise), 1, steps=5, progress=progress)
    assert seen == [0, 1, 2, 3, 4]


def test_churn_leaves_the_law_alone(dense):
    """However much noise is renewed on the way, samples have the prior's covariance."""
    denoiser, prior, noise = TORUS
    scheduler = FieldNoiseScheduler(noise, 0.01, 30.0)
    churn = Churn(30.0)
    x = sample(
        denoiser, scheduler, 4000, steps=100, solver="heun", churn=churn, generator=generator(1)
    )
    found = torch.cov((x.double() - denoiser.mean).flatten(1).T)
    assert relative(found, dense(prior.cov, (1, 6, 7))) < 0.12


def test_churn_renews_the_noise_in_its_range_only():
    denoiser, _, noise = TORUS
    scheduler = FieldNoiseScheduler(noise, 0.01, 30.0)

    def states(churn, seed):
        return sample(
            denoiser, scheduler, 2, steps=6, solver="heun", churn=churn, generator=generator(seed)
        )

    plain = states(None, 3)
    assert torch.equal(plain, states(Churn(0.0), 3))
    assert torch.equal(plain, states(Churn(5.0, 40.0, 50.0), 3))
    assert not torch.allclose(plain, states(Churn(5.0), 3))
    sigma = torch.tensor(2.0, dtype=torch.float64)
    assert float(Churn(1.0).raised(sigma, 10)) == pytest.approx(2.2)
    assert float(Churn(100.0).raised(sigma, 10)) == pytest.approx(2 * 2**0.5)
    with pytest.raises(InputError, match="churn is for solver=euler or heun"):
        sample(denoiser, scheduler, 1, steps=3, churn=Churn(1.0))
    with pytest.raises(InputError, match="numbers from 0 up"):
        Churn(-1.0)
