# SPDX-License-Identifier: Apache-2.0
"""What a schedule costs in spread, in closed form and as the sampler really does it."""

import math

import pytest
import torch
from priors import homogeneous, with_eofs

from ddo_modulus.diffusion.accuracy import sampled_variance, spread_note, spread_ratio
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import DEFAULTS, PosteriorConfig
from ddo_modulus.diffusion.samplers import Churn, sample
from ddo_modulus.fields.basis import CosineBasis, FourierBasis


def options(**chosen):
    return PosteriorConfig(sigma_min=0.02, sigma_max=50.0, **chosen).over(DEFAULTS)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 4, 16])
@pytest.mark.parametrize("build", [homogeneous, with_eofs])
def test_the_ratio_is_that_of_the_samplers_own_law(build, steps, solver, affine_law):
    prior, config = build(CosineBasis((5, 6))), options(steps=steps, solver=solver)
    _, drawn = affine_law(
        prior, prior.noise, steps=steps, solver=solver, sigma_min=0.02, sigma_max=50.0
    )
    unit = torch.eye(30, dtype=torch.float64).reshape(30, 1, 5, 6)
    everything = torch.full((30,), 1e6, dtype=torch.float64)  # noise that says nothing
    true = prior.posterior_covariance(unit, everything).reshape(30, 30)
    expected = float((drawn.trace() / true.trace()).sqrt())
    assert spread_ratio(prior, config) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    "chosen",
    [{"solver": "dpmpp_2m_sde"}, {"solver": "heun", "churn": Churn(3.0, noise=1.1)}],
    ids=["sde", "churn"],
)
def test_noise_that_is_added_counts(chosen):
    prior, config = homogeneous(FourierBasis((4, 4))), options(steps=6, **chosen)
    draws = sample(
        prior,
        config.scheduler(prior.noise),
        20_000,
        steps=6,
        solver=config.solver,
        churn=config.churn,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    drawn = prior.modes(draws).var(0)
    expected = sampled_variance(prior.variance[0], prior, config)
    torch.testing.assert_close(drawn, expected, rtol=5 / math.sqrt(20_000), atol=0)


def test_too_few_steps_are_named_with_enough_of_them():
    prior = homogeneous(FourierBasis((6, 6)))
    note = spread_note(prior, options(steps=4))
    ratio = spread_ratio(prior, options(steps=4))
    assert ratio < 0.95 and f"steps=4: the spread of draws is {ratio:.2f} of the prior's" in note
    enough = int(note.partition("take steps=")[2].split()[0])
    assert spread_note(prior, options(steps=enough)) is None


def test_a_range_of_levels_that_no_steps_mend_is_named():
    prior = homogeneous(FourierBasis((6, 6)))
    config = PosteriorConfig(steps=16, sigma_min=0.3, sigma_max=0.5).over(DEFAULTS)
    assert "widen sigma_min and sigma_max" in spread_note(prior, config)


@pytest.mark.parametrize("name", ["uk_t2m", "kolmogorov64"])
def test_shipped_schedules_need_no_note(name):
    package = Package.load(name)
    assert spread_note(package.operator.linear, package.posterior) is None
