# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tensors import generator

from ddo_modulus.data.loader import BatchOptions, TensorLoader
from ddo_modulus.fields.gaussian_field import GaussianField, MeasuredSpectrum
from ddo_modulus.training import Fold, Trainer, TrainerConfig


@pytest.fixture
def bimodal(trainees):
    """One pattern, up or down: E[x_0 | x] is a hyperbolic tangent, which no linear map is."""
    operator = trainees.build_trainer().operator

    def bimodal(count, seed):
        low = operator.basis.truncate(3)
        pattern = low.synthesize(torch.randn(low.size, generator=generator(5)))
        sign = torch.randint(2, (count, 1, 1, 1), generator=generator(seed)) * 2.0 - 1
        small = operator.noise.sample(count, generator=generator(seed + 1))
        return sign * pattern + 0.05 * small

    return bimodal


def test_training_learns_what_no_linear_denoiser_knows(trainees, bimodal):
    operator = trainees.build_trainer(width=16).operator
    x = bimodal(512, 0)
    operator.set_prior(GaussianField(operator.basis, MeasuredSpectrum.fit(operator.basis, x)))
    config = TrainerConfig(
        steps=150,
        batch=32,
        learning_rate=5e-3,
        warmup=10,
        precision="fp32",
        sigma_min=0.05,
        sigma_max=20.0,
        whitening=0.0,
        validate_every=150,
    )
    fold = Fold(TensorLoader(x, BatchOptions(32)).batches)
    trainer = Trainer(operator, [fold], (bimodal(256, 9), None), config)
    trained = trainer.run()
    first, last = trainer.history[0]["validation"], trainer.history[-1]["validation"]
    assert last < 0.9 * first
    clean = bimodal(64, 21)
    noisy, sigma = clean + operator.noise.sample(64, generator=generator(3)), torch.ones(64)
    error = (trained(noisy, sigma) - clean).square().mean()
    assert error < 0.9 * (trained.linear(noisy, sigma) - clean).square().mean()


@pytest.mark.parametrize("keep_best", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(
    trainees, same, tmp_path, keep_best, halt_when_saved
):
    options = {"keep_best": keep_best}
    whole = trainees.build_trainer(**options)
    whole.run()
    assert not trainees.build_trainer(out=tmp_path, **options).resume()
    halted = trainees.build_trainer(out=tmp_path, **options)
    halt_when_saved(halted)
    again = trainees.build_trainer(out=tmp_path, **options)
    assert again.resume() and again.step == 5
    again.run()
    same(trainees.end_state(whole), trainees.end_state(again))
    assert [row["step"] for row in again.history] == [0, 4, 8]


def test_the_best_average_may_be_kept(trainees):
    """A run that gets worse ends with what it was at its best: here, before the first step."""
    run = trainees.build_trainer(keep_best=True, learning_rate=10.0)
    before = {key: value.clone() for key, value in run.operator.state_dict().items()}
    trained = run.run()
    assert run.history[-1]["validation"] > run.history[0]["validation"]
    assert all(torch.equal(trained.state_dict()[key], value) for key, value in before.items())


def test_a_share_of_the_wrong_size_is_a_defect(trainees):
    run = trainees.build_trainer()
    run.folds[0].batches = TensorLoader(torch.zeros(9, 1, 8, 8), BatchOptions(4)).batches
    with pytest.raises(ValueError, match="a batch has 4 samples on rank 0, not 8"):
        run.run()
