# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from tensors import generator

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, Matern
from ddo_modulus.fields.grid import BoxGrid, LatLonGrid
from ddo_modulus.observations import Observations, PointOperator
from ddo_modulus.posterior import MomentMatching

NETWORK = {"widths": [6, 8], "depths": [1, 1], "modes": [5, 5], "embedding": 8}
NOISE = {"length_scale": 0.3, "smoothness": 0.5}
CASES = {
    "torus-even": ("torus", [8, 8], 1, 0),
    "torus-mixed": ("torus", [7, 10], 2, 0),
    "torus-eofs": ("torus", [8, 9], 1, 20),
    "box-odd": ("box", [9, 7], 1, 0),
    "box-eofs": ("box", [7, 6], 2, 84),
    "sphere-centres": ("sphere", [8, 16], 1, 0),
    "sphere-poles": ("sphere", [9, 16], 2, 0),
    "sphere-eofs": ("sphere", [9, 16], 1, 30),
}
cases = pytest.mark.parametrize("name", CASES)


def build(name, *, scale=0.0, condition=0, seed=0):
    """An operator and the Gaussian denoiser that it is without its network."""
    domain, shape, channels, eofs = CASES[name]
    torch.manual_seed(seed)
    operator = DiffusionOperator(
        shape, channels, domain, [1.0, 1.3], NOISE, condition, eofs, NETWORK
    )
    noise = operator.noise
    prior = GaussianField(noise.basis, Matern(0.5, 1.5), channels)
    if eofs:
        size = noise.channels * noise.basis.size
        index = torch.randperm(size, generator=generator(3))[:eofs]
        root = torch.randn(eofs, eofs, generator=generator(4), dtype=torch.float64)
        block = root @ root.T / eofs + 0.1 * torch.eye(eofs)
        remainder = (prior.variance / noise.variance).reshape(-1)
        prior = EOFField.from_covariance(noise, block, index, remainder)
    operator.set_prior(prior)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator(seed)))
    return operator.eval().requires_grad_(False), GaussianDenoiser(0.0, prior, noise)


def states(operator, batch=2, level=1.0, seed=0):
    x = operator.noise.sample(batch, generator=generator(seed))
    return level * x + operator.noise.sample(batch, generator=generator(seed + 1))


@cases
@pytest.mark.parametrize("level", [0.05, 1.0, 30.0])
def test_without_its_network_it_is_the_gaussian_denoiser(name, level):
    operator, exact = build(name)
    x, sigma = states(operator, level=level), torch.tensor([level, 1.1 * level])
    torch.testing.assert_close(operator(x, sigma), exact(x, sigma), rtol=1e-4, atol=1e-4)


@cases
def test_the_network_adds_its_output_in_posterior_deviations(name):
    operator, exact = build(name, scale=0.1)
    x, sigma = states(operator), torch.tensor([0.2, 2.0])
    a = operator.linear.modes(x)
    f = operator.residual(a, sigma, operator.basis.shape)
    added = operator.linear.posterior_variance(sigma).sqrt() * f
    expected = exact(x, sigma) + operator.linear.fields(added, mean=False)
    torch.testing.assert_close(operator(x, sigma), expected, rtol=1e-4, atol=1e-4)
    assert f.abs().mean() > 1e-3


@pytest.mark.parametrize(
    ("name", "covariance"),
    [
        ("torus-even", "jacobian"),
        ("torus-eofs", "linear"),
        ("box-odd", "jacobian"),
        ("box-eofs", "linear"),
        ("box-eofs", "jacobian"),
        ("sphere-centres", "jacobian"),
        ("sphere-eofs", "linear"),
    ],
)
def test_without_its_network_a_posterior_is_optimal_interpolation(
    name, covariance, affine_law, dense
):
    """Mean and spread of the sampled posterior against dense matrices."""
    operator, exact = build(name)
    operator.double()
    noise, (height, width) = operator.noise, operator.basis.shape
    if CASES[name][0] == "sphere":
        lat = noise.basis.latitudes(height)
        grid = LatLonGrid(lat, np.arange(width) * 360 / width)
    else:
        grid = BoxGrid((height, width), (1.0, 1.3), periodic=CASES[name][0] == "torus")
    random = np.random.default_rng(0)
    size = (noise.channels, height, width)
    points = PointOperator(
        grid,
        random.uniform(grid.lat.min(), grid.lat.max(), 12),
        random.uniform(grid.lon.min(), grid.lon.max(), 12),
        random.integers(0, noise.channels, 12),
    )
    values = torch.from_numpy(random.standard_normal(12))
    observations = Observations(points, values, 0.05)

    root = dense(lambda a: exact.fields(a, mean=False), (exact.variance.shape[-1],))
    prior = root @ torch.diag(exact.variance[0]) @ root.T
    h = dense(points.increment, size)
    gain = prior @ h.T @ torch.linalg.inv(h @ prior @ h.T + 0.05 * torch.eye(12))
    mean, spread = gain @ values, (prior - gain @ h @ prior).diagonal().sqrt()

    posterior = MomentMatching(operator, observations, covariance=covariance, iterations=1)
    found, covariance = affine_law(posterior, noise, steps=32, sigma_min=0.002)
    scale = prior.diagonal().mean().sqrt()
    assert (found - mean).square().mean().sqrt() < 0.01 * scale
    ratio = covariance.diagonal().sqrt() / spread
    assert 0.98 < ratio.mean() < 1.02 and 0.9 < ratio.min() and ratio.max() < 1.1


def test_mistakes_in_the_prior():
    operator, _ = build("torus-even")
    with pytest.raises(InputError, match="do not share a basis"):
        operator.set_prior(build("torus-mixed")[1].prior)
    with_eofs, exact = build("torus-eofs")
    with pytest.raises(InputError, match="mixes 0 coefficients, eof_modes=20"):
        with_eofs.set_prior(GaussianField(with_eofs.basis, Matern(0.4, 1.0)))
    other = GaussianField(with_eofs.basis, Matern(0.9, 2.0))
    elsewhere = EOFField(other, exact.prior.variance, exact.prior.index, exact.prior.vectors)
    with pytest.raises(InputError, match="its own reference"):
        with_eofs.set_prior(elsewhere)
    with pytest.raises(InputError, match="unknown domain"):
        DiffusionOperator([8, 8], domain="plane")


def test_a_prior_replaces_the_one_before():
    operator, _ = build("torus-even")
    x, sigma = states(operator), torch.ones(2)
    before = operator(x, sigma)
    operator.linear.at((16, 16))
    prior = GaussianField(operator.basis, Matern(0.1, 0.5))
    operator.set_prior(prior)
    exact = GaussianDenoiser(0.0, prior, operator.noise)(x, sigma)
    torch.testing.assert_close(operator(x, sigma), exact, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, exact, atol=1e-2)


def test_conditions():
    operator, _ = build("torus-even", scale=0.2, condition=2)
    x, sigma = states(operator), torch.ones(2)
    with pytest.raises(InputError, match="a condition of 2 channels, got 0"):
        operator(x, sigma)
    with pytest.raises(InputError, match="a condition of 2 channels, got 3"):
        operator(x, sigma, torch.zeros(2, 3))
    with pytest.raises(InputError, match="a condition of 0 channels, got 2"):
        build("torus-even")[0](x, sigma, torch.zeros(2, 2))
    condition = torch.tensor([[0.5, -1.0]])
    as_numbers = operator(x, sigma, condition)
    as_fields = operator(x, sigma, condition[:, :, None, None].expand(2, 2, 8, 8))
    torch.testing.assert_close(as_numbers, as_fields)
    assert not torch.allclose(operator(x, sigma, -condition), as_numbers, atol=1e-3)
    fine = operator.basis.truncate(7).synthesize(operator.basis.truncate(7).analyze(x), (16, 16))
    fields = condition[:, :, None, None].expand(2, 2, 16, 16)
    torch.testing.assert_close(operator(fine, sigma, condition), operator(fine, sigma, fields))


@pytest.mark.parametrize("name", ["torus-mixed", "box-eofs", "sphere-eofs"])
def test_checkpoints(name, tmp_path):
    operator, _ = build(name, scale=0.1)
    operator.save(str(tmp_path / "x.mdlus"))
    again = DiffusionOperator.from_checkpoint(str(tmp_path / "x.mdlus")).eval()
    x, sigma = states(operator), torch.tensor([0.2, 2.0])
    torch.testing.assert_close(again(x, sigma), operator(x, sigma))


def test_half_precision_keeps_the_linear_part(tmp_path):
    """A prior of a wide spectrum, all of it in the EOF block."""
    torch.manual_seed(0)
    shape = [9, 12]
    operator = DiffusionOperator(shape, 1, "box", [0.9, 1.2], NOISE, 0, 108, NETWORK)
    noise = operator.noise
    color = noise.color(torch.eye(108, dtype=torch.float64)[:, None]).flatten(1).mT
    place = torch.cartesian_prod(0.1 * torch.arange(9), 0.1 * torch.arange(12)).double()
    smooth = torch.exp(-(torch.cdist(place, place) / 0.5))
    white = torch.linalg.solve(color, torch.linalg.solve(color, smooth).mT)
    index, ones = torch.arange(108), torch.ones(108).double()
    operator.set_prior(EOFField.from_covariance(noise, (white + white.mT) / 2, index, ones))
    grid = LatLonGrid(np.arange(58.0, 49.0, -1), np.arange(-6.0, 6.0))
    normalization = Normalization(("t2m",), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    Package(operator.eval(), grid, normalization, ("K",)).save(tmp_path / "p", half=True)
    again = Package.load(tmp_path / "p").operator
    assert again.eof_covariance.dtype == torch.float32
    for level in (0.02, 0.3, 5.0, 50.0):
        x, sigma = states(operator, level=level), torch.full((2,), level)
        exact = operator.linear(x, sigma)
        assert (again.linear(x, sigma) - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize(
    "name", ["torus-even", "torus-mixed", "box-odd", "sphere-poles", "box-eofs"]
)
@pytest.mark.parametrize("factor", [2, 3])
def test_on_a_finer_grid_it_is_the_same_function_of_the_band(name, factor):
    operator, _ = build(name, scale=0.1)
    shape = [factor * n for n in operator.basis.shape]
    if name == "sphere-poles":
        shape[0] -= factor - 1
    band = operator.basis
    if name.startswith("torus"):  # but for waves at Nyquist, whose sines the grid cannot show
        band = band.truncate([n - 1 + n % 2 for n in band.shape])
    c = torch.randn(2, operator.channels, band.size, generator=generator())
    sigma = torch.tensor([0.2, 2.0])
    coarse = operator(band.synthesize(c), sigma)
    fine = operator(band.synthesize(c, shape), sigma)
    expected = band.analyze(coarse)
    network = expected - band.analyze(operator.linear(band.synthesize(c), sigma))
    assert network.norm() > 0.02 * expected.norm()
    assert (band.analyze(fine) - expected).norm() < 0.02 * expected.norm()
    if name == "torus-even":
        stride = fine[..., ::factor, ::factor]
        assert (stride - coarse).norm() < 0.02 * coarse.norm()
    else:
        tolerance = {"rtol": 1e-3, "atol": 1e-3 * float(expected.abs().max())}
        torch.testing.assert_close(band.analyze(fine), expected, **tolerance)


def test_coarser_grids():
    operator, exact = build("torus-even")
    x = operator.noise.at((6, 6)).sample(2, generator=generator())
    sigma = torch.ones(2)
    coarse = exact.at((6, 6))(x, sigma)
    torch.testing.assert_close(operator(x, sigma), coarse, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="do not live on the coarser grid 6x6"):
        build("torus-eofs")[0](x, sigma)


def test_network_fades_out_above_a_noise_level_state_by_state():
    torch.manual_seed(0)
    options = dict(
        shape=[9, 8],
        condition_channels=1,
        network=dict(widths=[8], depths=[1], modes=[5], embedding=8),
    )
    full = DiffusionOperator(**options).eval()
    for parameter in full.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    faded = DiffusionOperator(**options, network_sigma=0.1).eval()
    faded.load_state_dict(full.state_dict())
    x, condition = torch.randn(3, 1, 9, 8), torch.zeros(3, 1)
    sigma = torch.tensor([0.01, 0.1, 2.0])
    with torch.no_grad():
        linear = full.linear(x, sigma)
        whole = full(x, sigma, condition) - linear
        rest = faded(x, sigma, condition) - linear
        alone = faded(x[2:], sigma[2:], condition[2:])
    share = rest.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
    torch.testing.assert_close(share, torch.tensor([1 / 1.0001, 0.5, 0.0]), atol=1e-3, rtol=0)
    # Whoever shares the batch, and whether the network is spared, must not matter.
    torch.testing.assert_close(alone, linear[2:])
    with pytest.raises(InputError, match="condition"):
        faded(x, torch.full((3,), 50.0))  # spared, but a missing condition is still a mistake
