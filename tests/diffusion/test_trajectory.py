# SPDX-License-Identifier: Apache-2.0
"""Windows composed into trajectories, against the closed form of a Gaussian process in time."""

import math

import pytest
import torch

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.diffusion.trajectory import TrajectoryPrior
from ddo_modulus.errors import InputError
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.fields.grid import BoxGrid
from ddo_modulus.observations import Observations, PointOperator
from ddo_modulus.posterior import MomentMatching

FRAMES, LENGTH, SHAPE = 3, 7, (4, 5)


def correlation(frames: int, modes: int) -> torch.Tensor:
    """First-order autoregression, of another decay for each mode."""
    decay = torch.linspace(0.3, 0.95, modes, dtype=torch.float64)
    lag = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    variance = torch.linspace(3, 0.2, modes, dtype=torch.float64)
    return variance[:, None, None] * decay[:, None, None] ** lag


@pytest.fixture(scope="module")
def window() -> DiffusionOperator:
    torch.manual_seed(0)
    operator = DiffusionOperator(
        list(SHAPE),
        FRAMES,
        noise={"length_scale": 0.1, "smoothness": 0.5},
        network={"widths": [8], "depths": [1], "modes": [3]},
        coupled=True,
    )
    label = operator.basis.symmetry()
    groups = int(label.max()) + 1
    operator.set_prior(CoupledField(operator.noise, correlation(FRAMES, groups)[label]))
    return operator.eval().requires_grad_(False)


@pytest.fixture
def trained(window):
    """The same with a network that does something."""
    import copy

    operator = copy.deepcopy(window)
    generator = torch.Generator().manual_seed(1)
    for parameter in operator.network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return operator


def exact(window: DiffusionOperator) -> GaussianDenoiser:
    label = window.basis.symmetry()
    noise = GaussianField(window.basis, Matern(0.1, 0.5), LENGTH)
    law = CoupledField(noise, correlation(LENGTH, int(label.max()) + 1)[label])
    return GaussianDenoiser(0.0, law, noise)


def states(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, LENGTH, *SHAPE, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0.2, 5.0], dtype=torch.float64)


def test_of_a_gaussian_process_it_is_the_exact_denoiser_at_any_length(window):
    x, sigma = states()
    composed = TrajectoryPrior(window.double(), FRAMES, LENGTH)
    torch.testing.assert_close(composed(x, sigma), exact(window)(x, sigma), atol=1e-5, rtol=1e-5)
    apart = TrajectoryPrior(window, FRAMES, LENGTH, joint=False)
    error = (apart(x, sigma) - exact(window)(x, sigma)).abs().amax((1, 2, 3))
    assert float(error[1]) > 0.01  # the composition of windows alone is not


@pytest.mark.parametrize("joint", [True, False])
def test_every_frame_comes_from_the_window_around_it(trained, joint):
    trained = trained.double()
    x, sigma = states(2)
    composed = TrajectoryPrior(trained, FRAMES, LENGTH, joint=joint)(x, sigma)
    whole = exact(trained)(x, sigma)
    for frame in range(LENGTH):
        start = min(max(frame - 1, 0), LENGTH - FRAMES)
        part = x[:, start : start + FRAMES]
        expected = trained(part, sigma)[:, frame - start]
        if joint:
            linear = trained.linear(part, sigma)[:, frame - start]
            expected = expected - linear + whole[:, frame]
        torch.testing.assert_close(composed[:, frame], expected, atol=1e-5, rtol=1e-5)


def test_a_trajectory_of_one_window_is_the_window(trained):
    x, sigma = states()
    composed = TrajectoryPrior(trained.double(), FRAMES, FRAMES)
    torch.testing.assert_close(
        composed(x[:, :FRAMES], sigma), trained(x[:, :FRAMES], sigma), atol=1e-6, rtol=1e-6
    )


def test_the_pullback_is_the_transposed_jacobian_and_may_be_called_again(trained):
    x, sigma = states(3)
    composed = TrajectoryPrior(trained.double(), FRAMES, LENGTH)
    _, pullback = composed.value_and_pullback(x, sigma)
    generator = torch.Generator().manual_seed(4)
    for _ in range(2):
        u, v = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
        step = 1e-5
        forward = (composed(x + step * u, sigma) - composed(x - step * u, sigma)) / (2 * step)
        torch.testing.assert_close((forward * v).sum(), (u * pullback(v)).sum(), rtol=1e-5, atol=0)


def test_observations_scattered_over_the_trajectory_condition_all_of_it(window):
    """The posterior mean at any noise level against dense matrices."""
    composed = TrajectoryPrior(window.double(), FRAMES, LENGTH)
    grid = BoxGrid(SHAPE, (1.0, 1.0), periodic=True)
    place = torch.tensor([0.0, 0.25, 0.5, 0.75]), torch.tensor([0.2, 0.6, 0.0, 0.4])
    operator = PointOperator(grid, place[0], place[1], [0, 2, 2, 6])
    values = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    observations = Observations(operator, values, 0.05)
    posterior = MomentMatching(composed, observations, iterations=4)
    x, sigma = states(5)
    found = posterior(x, sigma).flatten(1)

    law, size = exact(window), x[0].numel()
    rows = operator(torch.eye(size, dtype=torch.float64).unflatten(1, x.shape[1:])).mT
    for one, state, level in zip(found, x, sigma, strict=True):
        clean = law(state[None], level[None]).flatten()
        modes = torch.eye(size, dtype=torch.float64) * law.posterior_variance(level[None]).sqrt()
        root = law.fields(modes).flatten(1)
        covariance = root.mT @ root  # of the clean trajectory given the noisy one
        system = rows @ covariance @ rows.mT + 0.05 * torch.eye(4)
        gain = covariance @ rows.mT @ torch.linalg.inv(system)
        torch.testing.assert_close(one, clean + gain @ (values - rows @ clean), atol=1e-4, rtol=0)


def test_on_another_grid_it_is_the_same_process(window):
    composed = TrajectoryPrior(window.double(), FRAMES, LENGTH)
    x = torch.randn(2, LENGTH, 8, 10, dtype=torch.float64)
    sigma = torch.tensor([0.3, 4.0], dtype=torch.float64)
    expected = exact(window).at((8, 10))(x, sigma)
    # Shared scales have one law; new ones follow the tails of two estimates of it.
    basis = window.basis
    found, wanted = (basis.analyze(v) for v in (composed(x, sigma), expected))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_every_window_has_a_condition_of_its_own():
    torch.manual_seed(0)
    operator = DiffusionOperator(
        list(SHAPE),
        FRAMES,
        condition_channels=2,
        network={"widths": [8], "depths": [1], "modes": [3]},
        coupled=True,
    )
    for parameter in operator.network.parameters():
        parameter.requires_grad_(False).add_(0.1 * torch.randn(parameter.shape))
    operator.eval()
    composed = TrajectoryPrior(operator, FRAMES, LENGTH, joint=False)
    windows = LENGTH - FRAMES + 1
    condition = torch.randn(2, windows, 2)
    x, sigma = torch.randn(2, LENGTH, *SHAPE), torch.tensor([0.2, 5.0])
    found = composed(x, sigma, condition)
    for frame in range(LENGTH):
        start = min(max(frame - 1, 0), windows - 1)
        alone = operator(x[:, start : start + FRAMES], sigma, condition[:, start])
        torch.testing.assert_close(found[:, frame], alone[:, frame - start])


def test_what_it_cannot_compose_is_refused(window):
    with pytest.raises(InputError, match="shorter than a window"):
        TrajectoryPrior(window, FRAMES, 2)
    single = DiffusionOperator(list(SHAPE), network={"widths": [8], "depths": [1], "modes": [3]})
    with pytest.raises(InputError, match="has no windows of"):
        TrajectoryPrior(single, 5, 10)
    with pytest.raises(InputError, match="needs joint=True"):
        TrajectoryPrior(window, FRAMES, LENGTH, joint=False, balance=0.5)
    with pytest.raises(InputError, match="must be a share"):
        TrajectoryPrior(window, FRAMES, LENGTH, balance=1.5)


class Fading(torch.nn.Module):
    """A window denoiser with an error that pulls states to zero: ``F = -epsilon c_in a``."""

    def __init__(self, window: DiffusionOperator, epsilon: float) -> None:
        super().__init__()
        self.window, self.epsilon = window, epsilon
        self.linear, self.channels, self.basis = window.linear, window.channels, window.basis

    def forward(self, x, sigma, condition=None):
        a = self.linear.modes(x)
        w = self.linear.wiener_weight(sigma)
        return self.linear.fields(a * (w - self.epsilon * (w * (1 - w)).sqrt()))


def spread_of_draws(denoiser, length: int) -> torch.Tensor:
    """Variance of each coordinate of free trajectories over the exact one."""
    scheduler = FieldNoiseScheduler(denoiser.noise, 1e-3, 1e3)
    generator = torch.Generator().manual_seed(length)
    draws = sample(denoiser, scheduler, 64, steps=96, generator=generator, dtype=torch.float64)
    exact = denoiser.linear
    return exact.modes(draws).square().mean(0) / exact.variance[0]


def test_errors_of_a_window_cost_the_variance_that_theory_says_unless_balanced(window):
    r"""The ODE multiplies variances by ``exp(-2 eps int sqrt(s) / (s + sigma^2) d sigma)``."""
    epsilon = 0.15
    fading = Fading(window.double(), epsilon)
    for length in (FRAMES, LENGTH):
        free = TrajectoryPrior(fading, FRAMES, length)
        exact = spread_of_draws(free.linear, length)
        lost = (spread_of_draws(free, length) / exact).mean()
        if length == FRAMES:
            assert float(lost) == pytest.approx(math.exp(-math.pi * epsilon), abs=0.02)
        assert float(lost) < 0.75
        balanced = TrajectoryPrior(fading, FRAMES, length, balance=1.0)
        kept = (spread_of_draws(balanced, length) / exact).mean()
        assert float(kept) == pytest.approx(1.0, abs=0.03)
        halfway = TrajectoryPrior(fading, FRAMES, length, balance=0.5)
        part = (spread_of_draws(halfway, length) / exact).mean()
        assert float(part) == pytest.approx(math.sqrt(float(lost)), abs=0.03)


def test_balance_takes_what_lies_along_the_state_and_nothing_else(trained):
    x, sigma = states(6)
    trained = trained.double()
    free = TrajectoryPrior(trained, FRAMES, LENGTH)
    balanced = TrajectoryPrior(trained, FRAMES, LENGTH, balance=1.0)
    linear = free.linear
    a, w = linear.modes(x), linear.wiener_weight(sigma)
    size = (2, LENGTH, -1)  # on a grid of twenty points all functions are of one shell
    h = (a * (w * (1 - w)).sqrt()).view(size)
    before, after = ((linear.modes(d(x, sigma)) - a * w).view(size) for d in (free, balanced))
    assert float((before * h).sum(-1).abs().max()) > 1e-3
    torch.testing.assert_close(
        (after * h).sum(-1), torch.zeros(2, LENGTH).double(), atol=1e-6, rtol=0
    )
    taken = before - after
    share = (taken * h).sum(-1, keepdim=True) / h.square().sum(-1, keepdim=True)
    torch.testing.assert_close(taken, share * h, atol=1e-6, rtol=1e-4)


def test_balance_is_not_lost_to_round_off_where_noise_is_small(trained):
    """At ``s / sigma^2`` of 3e8, where one minus the Wiener weight is zero in single precision."""
    x, sigma = states(6)
    sigma = torch.full_like(sigma, 1e-4)
    found = []
    for dtype in (torch.float64, torch.float32):
        window = trained.to(dtype)
        free, balanced = (TrajectoryPrior(window, FRAMES, LENGTH, balance=b) for b in (0.0, 1.0))
        taken = (d(x.to(dtype), sigma.to(dtype)).double() for d in (free, balanced))
        found.append(next(taken) - next(taken))
    exact, single = found
    assert float(exact.abs().max()) > 1e-6
    assert float((single - exact).norm() / exact.norm()) < 0.1


def test_balance_leaves_scales_beyond_the_network_to_the_linear_part(trained):
    x = torch.randn(1, LENGTH, 8, 10, generator=torch.Generator().manual_seed(7)).double()
    sigma = torch.tensor([0.5], dtype=torch.float64)
    balanced = TrajectoryPrior(trained.double(), FRAMES, LENGTH, balance=1.0)
    linear = balanced.linear.at((8, 10))
    basis = linear.noise.basis
    beyond = torch.ones(basis.size, dtype=torch.bool)
    beyond[trained.basis.shared(basis)[1]] = False
    found, wanted = (basis.analyze(d(x, sigma)) for d in (balanced, linear))
    torch.testing.assert_close(found[..., beyond], wanted[..., beyond], atol=1e-6, rtol=1e-5)
    assert float((found - wanted)[..., ~beyond].abs().max()) > 1e-3
