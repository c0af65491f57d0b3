# SPDX-License-Identifier: Apache-2.0
"""Options of sampling as one object."""

import math

import pytest

from ddo_modulus.diffusion.posterior_config import DEFAULTS, PosteriorConfig
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import FourierBasis
from ddo_modulus.fields.gaussian_field import GaussianField, Matern

NOISE = GaussianField(FourierBasis((4, 4)), Matern(0.2, 0.5))


@pytest.mark.parametrize("discretization", ["edm", "ve"])
def test_the_schedule_has_the_levels_that_were_asked_for(discretization):
    options = {"sigma_min": 0.01, "sigma_max": 30.0, "rho": 3.0}
    config = PosteriorConfig(**options, discretization=discretization).over(DEFAULTS)
    levels = config.scheduler(NOISE).timesteps(5)
    assert float(levels[0]) == pytest.approx(30.0, rel=1e-5)
    assert float(levels[levels > 0].min()) == pytest.approx(0.01, rel=1e-5)
    if discretization == "edm":
        ends = 30.0 ** (1 / 3), 0.01 ** (1 / 3)
        assert float(levels[1]) == pytest.approx((ends[0] + (ends[1] - ends[0]) / 4) ** 3, rel=1e-5)


def test_options_go_through_json_and_back():
    config = PosteriorConfig.of(
        {"steps": 12, "guidance_interval": [0.1, None], "churn": {"amount": 20}, "inflation": 1.5}
    )
    assert config.guidance_interval == (0.1, math.inf)
    assert PosteriorConfig.of(config.to_json()) == config


def test_what_is_set_wins_over_the_package():
    config = PosteriorConfig(steps=7).over(DEFAULTS)
    assert config.steps == 7 and config.rho == DEFAULTS.rho


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"churn": {"high": 1.0}}, r"churn needs an amount, as in churn=\{'amount': 20\}"),
        (["steps"], r"posterior=\['steps'\] must be options by name: steps, sigma_min"),
        ({"stpes": 3}, "posterior has no option stpes; choose from steps, sigma_min"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        PosteriorConfig.of(options)
