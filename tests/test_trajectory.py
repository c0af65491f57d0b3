# SPDX-License-Identifier: Apache-2.0
"""Windows composed into trajectories, against the closed form of a Gaussian process in time."""

import pytest
import torch

from ddo_modulus.coupled import CoupledField
from ddo_modulus.denoiser import DiffusionOperator, GaussianDenoiser, value_and_pullback
from ddo_modulus.errors import InputError
from ddo_modulus.field import GaussianField, Matern
from ddo_modulus.grid import BoxGrid
from ddo_modulus.observations import Observations, PointOperator
from ddo_modulus.posterior import MomentMatching
from ddo_modulus.trajectory import TrajectoryDenoiser

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
    composed = TrajectoryDenoiser(window.double(), FRAMES, LENGTH)
    torch.testing.assert_close(composed(x, sigma), exact(window)(x, sigma), atol=1e-5, rtol=1e-5)
    apart = TrajectoryDenoiser(window, FRAMES, LENGTH, joint=False)
    error = (apart(x, sigma) - exact(window)(x, sigma)).abs().amax((1, 2, 3))
    assert float(error[1]) > 0.01  # the composition of windows alone is not


@pytest.mark.parametrize("joint", [True, False])
def test_every_frame_comes_from_the_window_around_it(trained, joint):
    trained = trained.double()
    x, sigma = states(2)
    composed = TrajectoryDenoiser(trained, FRAMES, LENGTH, joint=joint)(x, sigma)
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
    composed = TrajectoryDenoiser(trained.double(), FRAMES, FRAMES)
    torch.testing.assert_close(
        composed(x[:, :FRAMES], sigma), trained(x[:, :FRAMES], sigma), atol=1e-6, rtol=1e-6
    )


def test_the_pullback_is_the_transposed_jacobian_and_may_be_called_again(trained):
    x, sigma = states(3)
    composed = TrajectoryDenoiser(trained.double(), FRAMES, LENGTH)
    _, pullback = value_and_pullback(composed, x, sigma)
    generator = torch.Generator().manual_seed(4)
    for _ in range(2):
        u, v = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
        step = 1e-5
        forward = (composed(x + step * u, sigma) - composed(x - step * u, sigma)) / (2 * step)
        torch.testing.assert_close((forward * v).sum(), (u * pullback(v)).sum(), rtol=1e-5, atol=0)


def test_observations_scattered_over_the_trajectory_condition_all_of_it(window):
    """The posterior mean at any noise level against dense matrices."""
    composed = TrajectoryDenoiser(window.double(), FRAMES, LENGTH)
    grid = BoxGrid(SHAPE, (1.0, 1.0), periodic=True)
    place = torch.tensor([0.0, 0.25, 0.5, 0.75]), torch.tensor([0.2, 0.6, 0.0, 0.4])
    operator = PointOperator(grid, place[0], place[1], [0, 2, 2, 6])
    values = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    observations = Observations(operator, values, 0.05)
    posterior = MomentMatching(composed, composed.noise, observations, iterations=4)
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
    composed = TrajectoryDenoiser(window.double(), FRAMES, LENGTH)
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
    composed = TrajectoryDenoiser(operator, FRAMES, LENGTH, joint=False)
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
        TrajectoryDenoiser(window, FRAMES, 2)
    single = DiffusionOperator(list(SHAPE), network={"widths": [8], "depths": [1], "modes": [3]})
    with pytest.raises(InputError, match="knows no windows"):
        TrajectoryDenoiser(single, 5, 10)
