# SPDX-License-Identifier: Apache-2.0
"""What lies beyond a grid: spectra with a dissipation range, and means over cells."""

import io
import json
import math
import zipfile

import numpy as np
import pytest
import torch

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import CosineBasis, FourierBasis
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.gaussian_field import GaussianField, Matern, MeasuredSpectrum
from ddo_modulus.fields.grid import BoxGrid
from ddo_modulus.fields.refinement import Refinement, Tail
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.inference.generate import generate

BASES = {
    "torus-even": FourierBasis((6, 8), (1.0, 1.5)),
    "torus-odd": FourierBasis((7, 5)),
    "box": CosineBasis((6, 5), (1.0, 0.8)),
}
bases = pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())
NETWORK = {"widths": [4], "depths": [1], "modes": [3], "embedding": 8}


def tail(a=3.0, b=0.02, c=0.0):
    return Tail(*(torch.tensor([v], dtype=torch.float64) for v in (c, a, b)))


def averaged(basis, fine, factor=45):
    """Functions ``fine``, in means over the cells of the grid of ``basis``: by summation."""
    shape = [factor * n for n in basis.shape]
    x = fine.synthesize(torch.eye(fine.size, dtype=torch.float64), shape)
    if isinstance(basis, FourierBasis):  # points stand at the cells' borders there, not within
        x = x.roll((factor // 2, factor // 2), (-2, -1))
    return x.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).mean((-3, -1))


def cell_mean_variance(basis, law, reach=4):
    """Of means over cells of a homogeneous field on a torus: the sum over all aliases."""
    wave = ((basis.indices + 1) // 2).double()
    total = torch.zeros(basis.size, dtype=torch.float64)
    for m in range(-reach, reach + 1):
        for n in range(-reach, reach + 1):
            row, column = wave[:, 0] + m * basis.shape[0], wave[:, 1] + n * basis.shape[1]
            response = torch.sinc(row / basis.shape[0]) * torch.sinc(column / basis.shape[1])
            eigenvalue = (2 * math.pi) ** 2 * (row**2 + column**2).clamp_min(1.0)
            total += response**2 * law(eigenvalue)[0]
    return total


# ---- cells --------------------------------------------------------------------------------------


@bases
def test_the_response_is_the_mean_over_a_cell(basis):
    values = basis.synthesize(torch.eye(basis.size, dtype=torch.float64))
    response = basis.cell_mean_response()[:, None, None]
    torch.testing.assert_close(averaged(basis, basis), response * values, rtol=0, atol=3e-3)
    fine = tuple(3 * n for n in basis.shape)
    assert bool((basis.cell_mean_response(fine) >= response[:, 0, 0] - 1e-12).all())


@bases
def test_means_over_cells_show_what_looks_the_same_on_the_grid(basis):
    """Power of a field with twelve times the functions, in means over the coarse cells."""
    law = tail(5.0, 0.02)
    full = basis.at([4 * n for n in basis.shape])
    fine = full.truncate([3 * n - 1 + n % 2 for n in basis.shape])
    seen = basis.analyze(averaged(basis, fine))  # of each fine function
    assert float((seen.abs() > 0.05).sum(1).double().max()) == 1
    positive = fine.eigenvalues > 0
    expected = (seen[positive].square() * law(fine.eigenvalues[positive])[0, :, None]).sum(0)
    found = Refinement(True).response(basis, law)[0, 1:] * law(basis.eigenvalues[1:])[0]
    torch.testing.assert_close(found, expected[1:], rtol=2e-2, atol=0)


def test_on_the_sphere_means_over_cells_are_refused():
    with pytest.raises(InputError, match="SphericalBasis have no response mode by mode"):
        SphericalBasis((8, 16)).cell_mean_response()
    with pytest.raises(InputError, match="take values at points"):
        DiffusionOperator([8, 16], 1, "sphere", network=NETWORK, refinement={"cell_means": True})


# ---- spectra ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "basis", [FourierBasis((32, 32)), CosineBasis((24, 32)), SphericalBasis((24, 48))], ids=repr
)
@pytest.mark.parametrize("law", [tail(2.9, 0.01, 1.0), tail(3.4, 0.0)], ids=["ends", "power"])
def test_a_dissipation_range_is_found_and_continued(basis, law):
    least = float(basis.eigenvalues[basis.eigenvalues > 0].min())
    variance = law(basis.eigenvalues.clamp_min(least))
    spectrum = MeasuredSpectrum(basis, variance)
    fine = basis.at([4 * n for n in basis.shape])
    torch.testing.assert_close(
        spectrum(fine), law(fine.eigenvalues.clamp_min(least)), rtol=1e-6, atol=0
    )


def test_floors_do_not_enter():
    basis, law = FourierBasis((32, 32)), tail(2.0, 0.2)
    power = law(basis.eigenvalues.clamp_min(40.0))
    spectrum = MeasuredSpectrum.from_power(basis, power)
    assert float(spectrum.variance.min()) > 5 * float(power.min())  # much of the band is floored
    single = MeasuredSpectrum(basis, spectrum.variance.float())  # as a checkpoint keeps it
    for found in (spectrum.tail, single.tail):
        torch.testing.assert_close(found.decay, law.decay, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.exponent, law.exponent, rtol=1e-4, atol=0)


def test_a_spectrum_that_flattens_is_continued_by_a_power_with_a_limit():
    basis = FourierBasis((16, 16))
    wavenumber = basis.eigenvalues.clamp_min(40.0).sqrt()
    flattening = (-3.5 * wavenumber.log() + 0.02 * wavenumber).exp()[None]
    found = MeasuredSpectrum(basis, flattening).tail
    assert float(found.decay) == 0 and float(found.exponent) >= 3
    flat = MeasuredSpectrum(basis, torch.ones(1, basis.size)).tail
    assert float(flat.decay) == 0 and float(flat.exponent) == 3


def test_cell_means_on_finer_grids_have_their_own_spectrum():
    """A field stored in means over 32 x 32 cells, on twice and four times as many points."""
    law = tail(2.3, 0.011)
    basis = FourierBasis((32, 32))
    measured = cell_mean_variance(basis, law)[None]
    spectrum = MeasuredSpectrum(basis, measured, refinement=Refinement(True))
    torch.testing.assert_close(spectrum.tail.decay, law.decay, rtol=2e-2, atol=0)
    for n in (64, 128):
        fine = FourierBasis((n, n))
        found = spectrum(fine) * spectrum.response(fine).square()
        expected = cell_mean_variance(fine, law)[None]
        torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=5e-2, atol=0)
        plain = MeasuredSpectrum(basis, measured)(fine)  # what ignoring the cells comes to
        assert float((plain / expected).log().abs().max()) > 0.5
    torch.testing.assert_close(spectrum(basis), measured)
    assert torch.equal(spectrum.response(basis), torch.ones(1, basis.size).double())


def test_a_tail_that_is_given_is_taken():
    basis = FourierBasis((8, 8))
    fixed = Refinement(tail=((0.0, 4.0, 0.01), (1.0, 3.0, 0.0)))
    fine = FourierBasis((16, 16))
    spectrum = MeasuredSpectrum(basis, torch.ones(4, basis.size), refinement=fixed)
    new = torch.ones(fine.size, dtype=torch.bool)
    new[basis.shared(fine)[1]] = False
    for channel, row in enumerate([tail(4.0, 0.01), tail(3.0, 0.0, 1.0)] * 2):  # in turn
        expected = row(fine.eigenvalues[new])[0]
        torch.testing.assert_close(spectrum(fine)[channel, new], expected)
    with pytest.raises(InputError, match="tail of 2 channels does not fit 3 channels"):
        _ = MeasuredSpectrum(basis, torch.ones(3, basis.size), refinement=fixed).tail
    for wrong, match in [
        (((0.0, 3.0),), "three numbers"),
        (((0.0, 3.0, math.nan),), "three numbers"),
        (((0.0, 3.0, -0.1),), "no limit"),
        (((0.0, 2.0, 0.0),), "no limit"),
    ]:
        with pytest.raises(InputError, match=match):
            Refinement(tail=wrong)


# ---- operators and packages ---------------------------------------------------------------------


def operator(channels=1, shape=(8, 8), **options):
    noise = {"length_scale": 0.02, "smoothness": 0.5}
    made = DiffusionOperator(
        list(shape), channels, "torus", noise=noise, network=NETWORK, **options
    )
    if made.coupling is None:
        made.set_prior(GaussianField(made.basis, Matern(0.3, 1.0), channels))
    return made.eval().requires_grad_(False)


def package(made, **options):
    variables = ("vorticity",)
    statistics = Normalization(variables, torch.ones(1, 1, 1, 1), 2 * torch.ones(1, 1, 1, 1))
    grid = BoxGrid(made.basis.shape, periodic=True)
    return Package(
        made, grid, statistics, ("1",), PosteriorConfig(steps=32, sigma_min=0.01), **options
    )


def test_on_the_training_grid_nothing_changes():
    torch.manual_seed(0)
    plain = operator(2)
    for parameter in plain.network.parameters():
        parameter.copy_(0.1 * torch.randn_like(parameter))
    means = plain.refined(Refinement(True))
    x, sigma = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    assert torch.equal(plain(x, sigma), means(x, sigma))
    assert means.cell_means(x) is x
    fine = torch.randn(3, 2, 16, 16)
    assert plain.cell_means(fine) is fine
    assert not torch.allclose(means.cell_means(fine), fine, atol=0.1)
    with pytest.raises(InputError, match="3 channels are no frame of an operator of 2"):
        means.cell_means(torch.randn(1, 3, 16, 16))


def test_frames_of_a_window_are_made_cell_means_one_by_one():
    made = operator(3, coupled=True, refinement={"cell_means": True})
    law = tail(3.0, 0.02)(made.basis.eigenvalues.clamp_min(39.0))[0] / made.noise.variance[0]
    lag = torch.tensor([[1.0, 0.8, 0.5], [0.8, 1.0, 0.8], [0.5, 0.8, 1.0]]).double()
    made.set_prior(CoupledField(made.noise, law[:, None, None] * lag))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = made.cell_means(x)
    torch.testing.assert_close(made.cell_means(x.flatten(0, 1)[:, None]).flatten(), whole.flatten())
    prior = made.linear.prior
    assert prior.stationary(3).refinement == prior.extended(3, 7).refinement == made.refinement


@pytest.mark.parametrize("size", [16, 32])
def test_draws_on_a_finer_grid_are_means_over_its_cells(size):
    """An untrained package whose prior is that of cell means, drawn as users draw."""
    law = tail(2.8, 0.02, 3.0)
    made = operator(refinement={"cell_means": True})
    measured = cell_mean_variance(made.basis, law)[None]
    made.set_prior(GaussianField(made.basis, MeasuredSpectrum(made.basis, measured)))
    found = generate(
        package(made),
        np.array(["2000-01-01"], "datetime64[ns]"),
        ensemble=600,
        resolution=(size, size),
        posterior={"batch": 600},
    )["vorticity"]
    assert found.attrs["cell_methods"] == "lat: lon: mean"
    x = (torch.from_numpy(found.values[:, 0]).double() - 1) / 2
    fine = FourierBasis((size, size))
    power = fine.power(x).mean(0)
    _, shell = fine.shells()
    expected = torch.zeros_like(power).index_add(0, shell, cell_mean_variance(fine, law))
    error = (power / expected).log()[1 : size // 2]
    assert float(error.abs().max()) < 0.12
    assert float(error.square().mean().sqrt()) < 0.05


def test_scales_that_the_last_level_covers_are_drawn_all_the_same():
    """The finest modes have a thousandth of the variance of the least noise."""
    law = tail(3.0, 0.06, 2.0)
    made = operator()
    made.set_prior(
        GaussianField(
            made.basis, MeasuredSpectrum(made.basis, law(made.basis.eigenvalues.clamp_min(39.0)))
        )
    )
    fine = FourierBasis((32, 32))
    covered = made.linear.at((32, 32)).wiener_weight(torch.tensor([0.01])).min()
    assert float(covered) < 1e-2
    found = generate(
        package(made),
        np.array(["2000-01-01"], "datetime64[ns]"),
        ensemble=400,
        resolution=(32, 32),
        posterior={"batch": 400},
    )["vorticity"]
    power = fine.power((torch.from_numpy(found.values[:, 0]).double() - 1) / 2).mean(0)
    _, shell = fine.shells()
    expected = torch.zeros_like(power).index_add(0, shell, law(fine.eigenvalues.clamp_min(39.0))[0])
    assert float((power / expected).log()[1:16].abs().max()) < 0.12


def test_checkpoints_of_before_are_of_values_at_points(tmp_path):
    made = operator(refinement={"cell_means": True, "tail": [[0.0, 3.0, 0.02]]})
    path = tmp_path / "operator.mdlus"
    made.save(str(path))
    assert DiffusionOperator.from_checkpoint(str(path)).refinement == made.refinement
    old = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(old, "w") as written:
        for name in archive.namelist():
            data = archive.read(name)
            if name == "args.json":
                stored = json.loads(data)
                del stored["__args__"]["refinement"]
                data = json.dumps(stored).encode()
            if name == "metadata.json":
                data = json.dumps(json.loads(data) | {"mdlus_file_version": "0.1.0"}).encode()
            written.writestr(name, data)
    path.write_bytes(old.getvalue())
    assert DiffusionOperator.from_checkpoint(str(path)).refinement == Refinement()


def test_a_package_learns_its_tail_from_finer_states(tmp_path):
    law = tail(2.5, 0.02, 3.0)
    fine = FourierBasis((32, 32))
    variance = cell_mean_variance(fine, law)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 1, fine.size, generator=generator, dtype=torch.float64)
    states = 1 + 2 * fine.synthesize(z * variance.sqrt())
    plain = package(operator(), provenance={"data": "none"})
    refined = plain.refined(cell_means=True, finer=states, source="a finer solver")
    refined.save(tmp_path / "package")
    read = Package.load(tmp_path / "package")
    found = read.operator.linear.prior.spectrum.tail
    for at in (16, 24):
        eigenvalue = torch.tensor([(2 * math.pi * at) ** 2]).double()
        torch.testing.assert_close(found(eigenvalue), law(eigenvalue), rtol=0.1, atol=0)
    assert read.provenance["data"] == "none"
    assert read.provenance["refinement"]["source"] == "a finer solver"
    own, other = plain.operator.state_dict(), read.operator.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)
    assert plain.operator.refinement == Refinement()
    for wrong in (states[..., ::8, ::8], states.repeat(1, 2, 1, 1)):
        with pytest.raises(InputError, match="finer states have shape"):
            plain.refined(cell_means=True, finer=wrong)


def test_shipped_packages_say_what_their_values_are():
    flow = Package.load("kolmogorov64").operator.refinement
    assert flow.cell_means and flow.tail is not None
    assert Package.load("uk_t2m").operator.refinement == Refinement()
