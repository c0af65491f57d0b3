# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from itertools import islice

import pytest
import torch

from ddo_modulus.data.loader import Symmetry, TensorLoader
from ddo_modulus.data.simulators import KolmogorovFlow
from ddo_modulus.denoiser import DiffusionOperator, GaussianDenoiser
from ddo_modulus.errors import InputError
from ddo_modulus.field import EOFField, GaussianField, Matern, MeasuredSpectrum
from ddo_modulus.training import DenoisingLoss, Fold, Trainer, TrainerConfig, noise_levels

CONFIG = TrainerConfig(
    steps=8,
    batch=8,
    warmup=2,
    precision="fp32",
    sigma_min=0.05,
    sigma_max=20.0,
    validate_every=4,
    checkpoint_every=5,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(eofs=0, width=8):
    torch.manual_seed(0)
    network = {"widths": [width], "depths": [1], "modes": [5], "embedding": 16}
    noise = {"length_scale": 0.2, "smoothness": 0.5}
    operator = DiffusionOperator([8, 8], 1, "box", [1.0, 1.0], noise, 0, eofs, network)
    prior = GaussianField(operator.basis, Matern(0.4, 1.5))
    if eofs:
        root = torch.randn(eofs, eofs, generator=generator(), dtype=torch.float64)
        variance = (prior.variance / operator.noise.variance).reshape(-1)
        block = root @ root.T / eofs
        prior = EOFField.from_covariance(operator.noise, block, torch.arange(eofs), variance)
    operator.set_prior(prior)
    return operator, prior


@pytest.mark.parametrize("eofs", [0, 20])
@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_the_loss_of_the_linear_denoiser_is_one(eofs, whitening):
    operator, prior = build(eofs)
    x = prior.sample(2000, generator=generator())
    z = torch.randn(2000, 64, generator=generator(1))
    sigma = noise_levels(2000, CONFIG, generator(2), torch.device("cpu"))
    with torch.no_grad():
        value = DenoisingLoss(operator, whitening)(x, sigma, z)
    error = float(value.std() / 2000**0.5)
    assert abs(float(value.mean()) - 1) < max(5 * error, 1e-3) and error < 0.05


def test_the_loss_asks_for_the_residual_of_the_clean_state():
    """A network that knows the clean state has no loss."""
    operator, prior = build()
    x = prior.sample(4, generator=generator())
    z = torch.randn(4, 64, generator=generator(1))
    sigma = torch.tensor([0.1, 0.5, 2.0, 10.0])
    linear = operator.linear
    noisy = linear.fields(linear.modes(x) + sigma[:, None] * z)

    def oracle(a, level, shape, condition, part):
        deviation = linear.posterior_variance(level).sqrt()
        return linear.modes(x - linear(noisy, level)) / deviation

    operator.residual = oracle
    assert DenoisingLoss(operator, 0.5)(x, sigma, z).max() < 1e-4


def test_noise_levels_are_stratified():
    sigma = noise_levels(1000, CONFIG, generator(), torch.device("cpu")).double()
    share = (sigma / CONFIG.sigma_min).log() / torch.tensor(400.0).double().log()
    stratum = (share * 1000).floor()
    assert (stratum - torch.arange(1000)).abs().max() <= 1  # single precision at the edges
    assert sigma.min() >= 0.0499 and sigma.max() <= 20.01


def bimodal(count, seed):
    """One pattern, up or down: E[x_0 | x] is a hyperbolic tangent, which no linear map is."""
    operator, _ = build()
    low = operator.basis.truncate(3)
    pattern = low.synthesize(torch.randn(low.size, generator=generator(5)))
    sign = torch.randint(2, (count, 1, 1, 1), generator=generator(seed)) * 2.0 - 1
    small = operator.noise.sample(count, generator=generator(seed + 1))
    return sign * pattern + 0.05 * small


def test_training_learns_what_no_linear_denoiser_knows():
    operator, _ = build(width=16)
    x = bimodal(512, 0)
    operator.set_prior(GaussianField(operator.basis, MeasuredSpectrum.fit(operator.basis, x)))
    config = replace(CONFIG, steps=150, batch=32, learning_rate=5e-3, warmup=10, whitening=0.0)
    fold = Fold(TensorLoader(x, batch=32).batches)
    trainer = Trainer(
        operator, [fold], (bimodal(256, 9), None), replace(config, validate_every=150)
    )
    trained = trainer.run()
    first, last = trainer.history[0]["validation"], trainer.history[-1]["validation"]
    assert last < 0.9 * first
    clean = bimodal(64, 21)
    noisy, sigma = clean + operator.noise.sample(64, generator=generator(3)), torch.ones(64)
    error = (trained(noisy, sigma) - clean).square().mean()
    assert error < 0.9 * (trained.linear(noisy, sigma) - clean).square().mean()


def test_averages_have_power_function_weights():
    trainer = Trainer(build()[0], [], None, replace(CONFIG, ema=0.1))
    parameter = next(trainer.operator.parameters())
    expected = None
    for step in range(40):
        with torch.no_grad():
            parameter.fill_(float(step))
        trainer.average.update_parameters(trainer.operator)
        share = 1.0 if step == 0 else min(1.0, 1 / (0.1 * (step + 1)))
        expected = step if step == 0 else expected + share * (step - expected)
        found = next(trainer.averaged().parameters())
        torch.testing.assert_close(found, torch.full_like(found, expected))


@pytest.mark.parametrize("folds", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(folds, tmp_path):
    def trainer(out):
        operator, prior = build()
        x = prior.sample(21, generator=generator())
        linear = GaussianDenoiser(
            0.0, GaussianField(operator.basis, Matern(0.3, 1.0)), operator.noise
        )
        parts = [
            Fold(TensorLoader(x, batch=8).batches),
            Fold(TensorLoader(x[:9], batch=8).batches, linear),
        ]
        config = replace(CONFIG, keep_best=True)
        return Trainer(operator, parts[:folds], (x[:8], None), config, out)

    whole = trainer(None)
    whole.run()
    assert not trainer(tmp_path).resume()
    halted = trainer(tmp_path)
    save = halted._save

    def halt():
        save()
        raise KeyboardInterrupt

    halted._save = halt
    with pytest.raises(KeyboardInterrupt):
        halted.run()
    again = trainer(tmp_path)
    assert again.resume() and again.step == 5
    again.run()
    for key, value in whole.operator.state_dict().items():
        assert torch.equal(again.operator.state_dict()[key], value), key
    for key, value in whole.averaged().state_dict().items():
        assert torch.equal(again.averaged().state_dict()[key], value), key
    rows = [{k: v for k, v in r.items() if k != "samples_per_second"} for r in whole.history]
    assert [
        {k: v for k, v in r.items() if k != "samples_per_second"} for r in again.history
    ] == rows
    assert [row["step"] for row in rows] == [0, 4, 8]


def test_mistakes_in_the_configuration():
    for options, match in [
        ({"precision": "fp16"}, "precision must be 'bf16' or 'fp32', got 'fp16'"),
        ({"steps": 0}, "trainer.steps must be at least 1, got 0"),
        ({"batch": 0}, "trainer.batch must be at least 1"),
        ({"validate_every": 0}, "trainer.validate_every"),
        ({"sigma_min": 90.0}, "sigma_min must be positive and below sigma_max"),
        ({"sigma_min": 0.0}, "sigma_min must be positive and below sigma_max"),
    ]:
        with pytest.raises(InputError, match=match):
            TrainerConfig(**options)


def numbered(count):
    return torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_every_sample_comes_once_in_an_epoch():
    loader = TensorLoader(numbered(10), numbered(10)[:, 0, 0, :1], batch=4, seed=1)
    batches = list(islice(loader.batches(), 10))
    drawn = torch.cat([x[:, 0, 0, 0] for x, _ in batches])
    for epoch in drawn.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(drawn[:10], drawn[10:20])
    assert all(torch.equal(x[:, 0, 0, 0], condition[:, 0]) for x, condition in batches)


def test_ranks_share_the_batch():
    def rank(rank, ranks):
        loader = TensorLoader(numbered(10), batch=6, rank=rank, ranks=ranks)
        return [x for x, _ in islice(loader.batches(), 5)]

    for whole, *parts in zip(rank(0, 1), rank(0, 3), rank(1, 3), rank(2, 3), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_a_later_start_skips_batches():
    x = torch.randn(9, 1, 8, 8, generator=generator())
    loader = TensorLoader(x, batch=4, symmetry=Symmetry((1, 1), True, 2))
    whole = [x for x, _ in islice(loader.batches(), 8)]
    for start in (1, 3, 7):
        later = next(TensorLoader(x, batch=4, symmetry=Symmetry((1, 1), True, 2)).batches(start))[0]
        assert torch.equal(later, whole[start])


def test_batches_larger_than_the_data():
    x, _ = next(TensorLoader(numbered(3), batch=7).batches())
    assert sorted(x[:, 0, 0, 0].tolist())[::2] == [0.0, 0.0, 1.0, 2.0] or len(x) == 7


def test_mistakes_in_the_loader():
    with pytest.raises(InputError, match="a batch of 5 cannot be shared out to 2 ranks"):
        TensorLoader(numbered(10), batch=5, ranks=2)
    with pytest.raises(InputError, match="no samples"):
        TensorLoader(numbered(0), batch=5)


@pytest.mark.parametrize(
    "symmetry",
    [
        Symmetry(roll=(8, 1)),
        Symmetry(rotate=True),
        Symmetry(glide=4),
        Symmetry(roll=(8, 1), rotate=True, glide=4),
    ],
    ids=["roll", "rotate", "glide", "all"],
)
def test_kolmogorov_flow_commutes_with_its_symmetries(symmetry):
    """16 rows and two waves of the force: a period is 8 rows."""
    flow = KolmogorovFlow(
        reynolds=50.0, forcing_wavenumber=2, resolution=16, output_resolution=16, dt=0.02
    )
    w = flow.initial(6, generator=generator(), dtype=torch.float64)
    later = flow.advance(w, 0.4)
    moved = symmetry(w[:, None], generator(3))[:, 0]
    assert not torch.allclose(moved, w)
    expected = symmetry(later[:, None], generator(3))[:, 0]
    torch.testing.assert_close(flow.advance(moved, 0.4), expected, rtol=1e-9, atol=1e-9)


def test_the_force_breaks_other_shifts():
    flow = KolmogorovFlow(
        reynolds=50.0, forcing_wavenumber=2, resolution=16, output_resolution=16, dt=0.02
    )
    w = flow.initial(2, generator=generator(), dtype=torch.float64)
    shifted = flow.advance(torch.roll(w, 3, 1), 0.4)
    assert not torch.allclose(shifted, torch.roll(flow.advance(w, 0.4), 3, 1), atol=1e-2)
