# SPDX-License-Identifier: Apache-2.0
import math
from functools import partial

import pytest
import torch
from physicsnemo.diffusion import samplers
from physicsnemo.diffusion.metrics.losses import MSEDSMLoss
from physicsnemo.diffusion.noise_schedulers import EDMNoiseScheduler
from tensors import generator, relative

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.samplers import SOLVERS, sample
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import FourierBasis
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.fields.spherical_basis import SphericalBasis

BASIS = FourierBasis((6, 7), (1.0, 1.2))
NOISE = GaussianField(BASIS, Matern(0.25, 0.5), 2)
PRIOR = GaussianField(BASIS, Matern(0.4, 1.5), 2)
DENOISER = GaussianDenoiser(0.5, PRIOR, NOISE)


def like(batch, dtype=torch.float64, shape=(6, 7)):
    return torch.empty((batch, 2, *shape), dtype=dtype)


def assert_covariance(x, expected):
    x = x.flatten(1)
    deviation = ((expected**2 + expected.diagonal() * expected.diagonal()[:, None]) / len(x)).sqrt()
    assert float(((x.T @ x / len(x) - expected).abs() / deviation).max()) < 5.5


# ---- what is drawn ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 7), (5, 9)])
def test_noise_has_the_covariance_of_the_field(shape, dense):
    expected = dense(NOISE.at(shape).cov, (2, *shape))
    scheduler = FieldNoiseScheduler(NOISE)
    assert_covariance(scheduler.draw(like(20_000, shape=shape), generator()), expected)
    scheduler = FieldNoiseScheduler(NOISE, generator=generator(1))
    level = torch.full((20_000,), 3.0, dtype=torch.float64)
    latents = scheduler.init_latents((2, *shape), level)
    assert_covariance(latents / 3.0, expected)
    x0 = torch.ones_like(latents)
    assert_covariance((scheduler.add_noise(x0, level) - x0) / 3.0, expected)


def test_every_state_gets_its_own_level():
    scheduler = FieldNoiseScheduler(NOISE, generator=generator())
    time = torch.tensor([0.0, 0.5, 80.0], dtype=torch.float64)
    x0 = torch.zeros_like(like(3))
    noisy = scheduler.add_noise(x0, time)
    scheduler.generator.manual_seed(0)
    expected = time.view(-1, 1, 1, 1) * scheduler.draw(x0)
    assert torch.equal(noisy, expected)


def test_generators_make_draws_reproducible():
    scheduler = FieldNoiseScheduler(NOISE)
    one, two, three = (scheduler.draw(like(2), generator(seed)) for seed in (4, 4, 5))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    own = FieldNoiseScheduler(NOISE, generator=generator(4))
    assert torch.equal(own.draw(like(2)), one)
    assert torch.equal(own.draw(like(2), generator(5)), three)
    torch.manual_seed(7)
    implicit = scheduler.draw(like(2))
    torch.manual_seed(7)
    assert torch.equal(scheduler.draw(like(2)), implicit)
    assert scheduler.draw(like(2, torch.float32)).dtype == torch.float32


# ---- noise levels -------------------------------------------------------------------------------


def test_levels_are_those_of_physicsnemo():
    for rho in (7.0, 20.0):
        ours = FieldNoiseScheduler(NOISE, 0.01, 50.0, rho).timesteps(12, dtype=torch.float64)
        theirs = EDMNoiseScheduler(0.01, 50.0, rho).timesteps(12, dtype=torch.float64)
        assert torch.equal(ours, theirs)
    assert float(ours[0]) == pytest.approx(50.0)
    assert float(ours[-2]) == pytest.approx(0.01)
    assert float(ours[-1]) == 0.0


def test_default_levels_are_nearly_uniform_in_their_logarithm():
    steps = FieldNoiseScheduler(NOISE).timesteps(32, dtype=torch.float64)[:-1].log().diff().abs()
    usual = EDMNoiseScheduler().timesteps(32, dtype=torch.float64)[:-1].log().diff().abs()
    assert float(steps.max() / steps.min()) < 1.8
    assert float(usual.max() / usual.min()) > 3


def test_default_levels_halve_the_error_of_the_usual_ones(affine_law):
    """Why the exponent differs from EDM's: see the docstring of the scheduler."""
    basis = FourierBasis((16, 16))
    noise = GaussianField(basis, Matern(0.25, 1.0))
    denoiser = GaussianDenoiser(0.0, GaussianField(basis, Matern(0.25, 2.0)), noise)

    def bias(**levels):
        cov = affine_law(denoiser, noise, steps=32, **levels)[1]
        return abs(float(cov.diagonal().sqrt().mean()) - 1)  # unit prior variance

    default, usual = bias(), bias(rho=7.0)
    assert default < 0.012
    assert default < 0.7 * usual


def test_one_step_goes_straight_to_zero():
    scheduler = FieldNoiseScheduler(NOISE, sigma_max=12.0)
    levels = scheduler.timesteps(1, dtype=torch.float64)
    assert levels.tolist() == [12.0, 0.0]


# ---- inside PhysicsNeMo -------------------------------------------------------------------------


def drawn_by_physicsnemo(solver, steps=8):
    """States of its sampler; ``solver`` by its name there, or one of ours."""
    scheduler = FieldNoiseScheduler(NOISE, generator=generator(3))
    first = scheduler.timesteps(steps, dtype=torch.float64)[:1].expand(4)
    start = scheduler.init_latents((2, 6, 7), first, dtype=torch.float64)
    right_hand_side = scheduler.get_denoiser(x0_predictor=DENOISER)
    return samplers.sample(right_hand_side, start, scheduler, num_steps=steps, solver=solver)


def drawn(solver, steps=8):
    return sample(
        DENOISER,
        FieldNoiseScheduler(NOISE),
        4,
        steps=steps,
        solver=solver,
        generator=generator(3),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_samplers_of_physicsnemo_draw_the_same_states(solver):
    theirs = drawn_by_physicsnemo(solver)
    torch.testing.assert_close(drawn(solver), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_step_in_the_samplers_of_physicsnemo(solver):
    source = generator(3)
    scheduler = FieldNoiseScheduler(NOISE)
    scheduler.draw(like(4), source)  # the start, which its sampler is handed
    ours = SOLVERS[solver](DENOISER, lambda: scheduler.draw(like(4), source))
    assert isinstance(ours, samplers.Solver)
    torch.testing.assert_close(drawn_by_physicsnemo(ours), drawn(solver), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "solver"), [("euler", samplers.EulerSolver), ("heun", samplers.HeunSolver)]
)
def test_solvers_of_physicsnemo_step_in_ours(name, solver):
    torch.testing.assert_close(drawn(solver), drawn(name), rtol=1e-9, atol=1e-9)


def test_solvers_of_physicsnemo_may_have_options():
    """The midpoint rule, which converges to the same states."""
    midpoint = partial(samplers.HeunSolver, alpha=0.5)
    apart = [relative(drawn(midpoint, n), drawn("heun", n)) for n in (8, 32, 128)]
    assert apart[0] > 0.01 and apart[1] < apart[0] / 4 and apart[2] < apart[1] / 4


def test_the_loss_of_physicsnemo_sees_the_field_noise():
    """The denoising loss of the exact denoiser is the exact posterior variance."""
    scheduler = FieldNoiseScheduler(NOISE, generator=generator(1))

    class Network(torch.nn.Module):
        def forward(self, x, t, condition=None):
            return DENOISER(x, t)

    batch = 20_000
    x0 = 0.5 + PRIOR.sample(batch, generator=generator(2), dtype=torch.float64)
    level = 0.6
    loss = MSEDSMLoss(Network(), scheduler)(x0, t=torch.full((batch,), level).double())
    weight = float(scheduler.loss_weight(torch.tensor(level)))
    variance = DENOISER.posterior_variance(torch.tensor([level]).double())[0]
    unit = DENOISER.fields(torch.diag(variance.sqrt()), mean=False)
    expected = weight * float(unit.square().sum(0).mean())
    assert float(loss) == pytest.approx(expected, rel=1e-2)
    white = MSEDSMLoss(Network(), EDMNoiseScheduler(sigma_data=1.0))
    torch.manual_seed(0)
    assert abs(float(white(x0, t=torch.full((batch,), level).double())) / expected - 1) > 0.1


def test_training_levels_and_weights_are_those_of_physicsnemo():
    scheduler = FieldNoiseScheduler(NOISE, P_mean=-0.5, P_std=1.5)
    torch.manual_seed(0)
    levels = scheduler.sample_time(50_000, dtype=torch.float64).log()
    assert float(levels.mean()) == pytest.approx(-0.5, abs=0.05)
    assert float(levels.std()) == pytest.approx(1.5, abs=0.05)
    weight = float(scheduler.loss_weight(torch.tensor(0.3)))
    assert weight == pytest.approx((0.09 + 1) / 0.09, rel=1e-5)
    assert math.isfinite(weight)


def test_the_sphere_has_noise_of_unit_variance_everywhere():
    scheduler = FieldNoiseScheduler(GaussianField(SphericalBasis((8, 16)), Matern(0.5, 1.0)))
    x = scheduler.draw(torch.empty(20_000, 1, 8, 16), generator())
    torch.testing.assert_close(x.var(0).mean(-1), torch.ones(1, 8), rtol=0.05, atol=0)


def spaced(discretization, steps=20, **levels):
    field = GaussianField(FourierBasis((4, 4)), Matern(0.2, 0.5))
    return FieldNoiseScheduler(field, **levels, discretization=discretization).timesteps(
        steps, dtype=torch.float64
    )


@pytest.mark.parametrize("discretization", ["edm", "vp", "ve", "iddpm"])
def test_every_discretization_covers_the_range(discretization):
    levels = spaced(discretization, sigma_min=0.02, sigma_max=80.0)
    assert len(levels) == 21 and levels[-1] == 0
    assert bool((levels.diff() < 0).all())
    slack = 0.3 if discretization == "iddpm" else 1e-9  # which takes the nearest of its own
    assert abs(float(levels[0]) / 80 - 1) < slack and abs(float(levels[-2]) / 0.02 - 1) < slack


def test_discretizations_are_those_of_the_table():
    """Karras et al. 2022, table 1, with the ranges that the original samplers had."""
    even = spaced("ve", sigma_min=0.02, sigma_max=100.0)[:-1].log().diff()
    torch.testing.assert_close(even, even[:1].expand(19), rtol=1e-10, atol=0)
    # beta_d = 19.9, beta_min = 0.1 belong to this range at times 1 and 1e-3.
    low, high = (math.sqrt(math.expm1(9.95 * t**2 + 0.1 * t)) for t in (1e-3, 1.0))
    levels = spaced("vp", sigma_min=low, sigma_max=high)[:-1]
    t = torch.linspace(1, 1e-3, 20, dtype=torch.float64)
    expected = (9.95 * t**2 + 0.1 * t).expm1().sqrt()
    torch.testing.assert_close(levels, expected, rtol=1e-10, atol=0)
    # All of iDDPM's own levels in a range: sigma^2 + 1 is in proportion to 1 / alpha_j.
    with pytest.raises(InputError, match="has") as refusal:
        spaced("iddpm", 1001, sigma_min=0.1, sigma_max=20.0)
    count = int(str(refusal.value).split("has ")[1].split()[0])
    levels = spaced("iddpm", count, sigma_min=0.1, sigma_max=20.0)[:-1]
    scale = None
    for first in range(1, 1001 - count):
        j = torch.arange(first, first + count, dtype=torch.float64)
        product = (levels**2 + 1) * (math.pi / 2 * j / 1008).sin() ** 2
        if float(product.std() / product.mean()) < 1e-9:
            scale = float(product.mean())
    assert scale is not None and 0.5 < scale < 2


def test_levels_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="unknown discretization 'ddim'"):
        spaced("ddim")
    with pytest.raises(InputError, match="must be positive and ascend"):
        spaced("edm", sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(InputError, match="too few for 900 steps"):
        spaced("iddpm", 900, sigma_min=1.0, sigma_max=2.0)
