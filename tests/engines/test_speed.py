# SPDX-License-Identifier: Apache-2.0
import time
from dataclasses import replace

import pytest
import torch

from ddo_modulus.diffusion.posterior_config import DEFAULTS
from ddo_modulus.diffusion.prior import FunctionPrior
from ddo_modulus.engines.speed import Twin, _gaps, difference, evaluations, measure
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import FourierBasis
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.verification import score

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prior():
    basis = FourierBasis((8, 10))
    noise = GaussianField(basis, Matern(0.1, 0.5))
    return GaussianDenoiser(0.0, GaussianField(basis, Matern(0.3, 1.0)), noise)


@pytest.fixture(scope="module")
def scheduler(prior):
    return DEFAULTS.scheduler(prior.noise)


@pytest.fixture(scope="module")
def twin(prior, scheduler):
    return Twin.simulate(prior, scheduler, 40, 12, error=0.2)


def test_truths_are_of_the_prior_and_observed_with_the_error_said(prior, twin):
    assert float(twin.truth.std()) == pytest.approx(1, abs=0.15)
    assert (twin.unobserved.sum((1, 2, 3)) == 80 - 12).all()
    errors = twin.observations.values - twin.observations.operator(twin.truth)
    assert float(errors.std()) == pytest.approx(0.2, rel=0.1)
    assert twin.unobserved.any(0).all()  # other places in each


def test_twin_posteriors_are_calibrated(prior, twin):
    """With the exact denoiser the truth is one more member."""
    config = replace(DEFAULTS, steps=24)
    ensemble = twin.ensemble(twin.posterior(prior, config), config, prior.noise, 16)
    assert ensemble.shape == (40, 16, 1, 8, 10)
    found = score(ensemble.transpose(0, 1), twin.truth, label="", units="", mask=twin.unobserved)
    assert found.ratio == pytest.approx(1, abs=0.08)
    assert found.rmse < 0.8 * float(twin.truth.std())


def test_evaluations(prior, scheduler, twin):
    """What is said is what is called: forward passes, and twice the ways back."""
    calls = {"forward": 0, "back": 0}

    def back(gradient):
        calls["back"] += 1

    def denoise(x, sigma, condition=None):
        calls["forward"] += 1
        clean = prior(x, sigma)
        if clean.requires_grad:
            clean.register_hook(back)
        return clean

    counted = FunctionPrior(denoise, prior.noise, prior.linear)
    for options in (
        {"steps": 3},
        {"steps": 3, "iterations": 4},
        {"steps": 3, "covariance": "linear"},
        {"steps": 3, "solver": "heun"},
        {"steps": 4, "guidance_interval": (0.01, 10.0)},
        {"steps": 4, "solver": "heun", "guidance_interval": (0.01, 10.0)},
    ):
        config = replace(DEFAULTS, **options)
        calls.update(forward=0, back=0)
        twin.ensemble(twin.posterior(counted, config), config, prior.noise, members=1)
        assert calls["forward"] + 2 * calls["back"] == evaluations(config, scheduler)


def test_more_observations_than_points(prior, scheduler):
    with pytest.raises(InputError, match="observations=81 of 80 grid values"):
        Twin.simulate(prior, scheduler, 1, 81)


def test_times_are_of_the_runs_after_the_first():
    pauses = iter([0.05, 0.002, 0.002, 0.002, 0.2])

    def run():
        time.sleep(next(pauses))
        return torch.zeros(1)

    cost = measure(run, CPU, repeats=3)
    assert cost.first >= 0.05 and 0.002 <= cost.seconds < 0.03 and cost.memory is None
    assert next(pauses) == 0.2


def test_a_slow_run_is_not_repeated():
    count = []
    measure(lambda: count.append(time.sleep(0.02)), CPU, patience=0.01, warm_up=lambda: None)
    assert len(count) == 1


def test_gaps_of_overlapping_spans():
    assert _gaps([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (8.0, 10.0)]) == pytest.approx(0.3)
    assert _gaps([(2.0, 3.0)]) == 0


def test_differences_of_ensembles():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(2, 8, 1, 5, 5, generator=generator)
    mean = reference.mean(1, keepdim=True)
    shift, spread = difference(mean + 1.1 * (reference - mean), reference)
    assert shift == pytest.approx(0, abs=1e-6) and spread == pytest.approx(0.1, abs=1e-5)
    assert difference(reference + 0.1 * mean, reference)[0] == pytest.approx(0.1, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_idle_shares():
    from ddo_modulus.engines.speed import idle_share

    x = torch.randn(4096, 4096, device="cuda")

    def busy():
        for _ in range(20):
            x @ x

    def lazy():
        for _ in range(5):
            x @ x
            torch.cuda.synchronize()
            time.sleep(0.01)

    busy()
    assert idle_share(busy) < 0.1 < 0.5 < idle_share(lazy)
