# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. It looks when it is first imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.diffusion.task import Task
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.posterior import MomentMatching
from ddo_modulus.simulators import KolmogorovFlow

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores already


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real ERA5 files: $DDO_SHARED_DATA, or shared/data beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DDO_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set DDO_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def torus(tmp_path_factory) -> Path:
    """File of four short trajectories of Kolmogorov flow on 8 x 8 points."""
    flow = KolmogorovFlow(
        reynolds=50.0,
        forcing_wavenumber=2,
        resolution=16,
        output_resolution=8,
        spin_up=0.4,
        dt=0.02,
    )
    frames = torch.cat(list(flow.simulate(4, 5, generator=torch.Generator().manual_seed(0))))
    path = tmp_path_factory.mktemp("torus") / "flow.nc"
    flow.to_dataset(frames, seed=0).to_netcdf(path)
    return path


class _UnitCoefficients(FieldNoiseScheduler):
    """Draws no noise and then every unit coefficient instead of random ones."""

    def draw(self, like, generator=None):
        field = self.field.at(like.shape[-2:])
        size = field.channels * field.basis.size
        z = torch.cat([torch.zeros(1, size), torch.eye(size)]).to(like)
        z = z.repeat(len(like) // len(z), 1).unflatten(1, (field.channels, -1))
        return field.color(z)


@pytest.fixture(scope="session")
def unit_coefficients():
    """A scheduler whose draws, for one more state than coefficients, are a zero and a basis."""
    return _UnitCoefficients


@pytest.fixture
def conditionings(monkeypatch):
    """Options of every :class:`MomentMatching` that is made from then on."""

    def watch():
        seen, original = [], MomentMatching.__init__

        def spy(self, *args, **options):
            seen.append(options)
            original(self, *args, **options)

        monkeypatch.setattr(MomentMatching, "__init__", spy)
        return seen

    return watch


@pytest.fixture(scope="session")
def affine_law():
    """Mean and covariance of a sampler without Monte-Carlo error.

    A deterministic solver with an affine denoiser maps its initial coefficients affinely to
    states, so the image of zero is the mean and the images of the unit coefficients are a root of
    the covariance.
    """

    def law(denoiser, field, *, steps, solver="dpmpp_2m", analyses=1, shape=None, **levels):
        scheduler = _UnitCoefficients(field, **levels)
        on = field if shape is None else field.at(shape)
        batch = analyses * (on.channels * on.basis.size + 1)
        x = sample(
            denoiser,
            scheduler,
            batch,
            steps=steps,
            solver=solver,
            shape=shape,
            dtype=torch.float64,
        )
        x = x.reshape(analyses, -1, on.channels * on.shape[0] * on.shape[1])
        mean, root = x[:, 0], x[:, 1:] - x[:, :1]
        cov = root.mT @ root
        return (mean[0], cov[0]) if analyses == 1 else (mean, cov)

    return law


@pytest.fixture(scope="session")
def dense():
    """The matrix of a linear map of fields, column by column."""

    def matrix(apply, shape, dtype=torch.float64):
        size = math.prod(shape)
        unit = torch.eye(size, dtype=dtype).reshape(size, *shape)
        return apply(unit).reshape(size, -1).T

    return matrix


@pytest.fixture(scope="session")
def prior():
    """Gaussian prior of the untrained packages, in their normalised units, for a noise field."""
    return lambda noise: GaussianField(noise.basis, Matern(0.4, 1.0), noise.channels)


@pytest.fixture(scope="session")
def untrained(prior):
    """An untrained package: its network is zero, so all that it does is optimal interpolation."""

    def build(channels=("t2m",), units=("K",), grid=None, seed=0):
        grid = LatLonGrid(np.arange(58.0, 52.0, -1), np.arange(-6.0, 2.0)) if grid is None else grid
        domain = "box" if isinstance(grid, LatLonGrid) else "torus"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of weights
            operator = DiffusionOperator(
                list(grid.shape),
                len(channels),
                domain,
                [0.7, 0.6] if domain == "box" else list(grid.lengths),
                {"length_scale": 0.05, "smoothness": 0.5},
                condition_channels=2,
                network={"widths": [8], "depths": [1], "modes": [4]},
            )
        operator.set_prior(prior(operator.noise))
        generator = torch.Generator().manual_seed(seed)
        size = (24, len(channels), *grid.shape)
        mean = 3 * torch.randn(size, generator=generator)
        mean += torch.tensor([280.0 if unit == "K" else 0.0 for unit in units])[:, None, None]
        std = 1 + torch.rand(size, generator=generator)
        return Package(
            operator.eval().requires_grad_(False),
            grid,
            Normalization(channels, mean, std),
            units,
            PosteriorConfig(steps=16, sigma_min=0.01),
            Task(condition="hour_of_day"),
            {"data": "none"},
        )

    return build


@pytest.fixture(scope="session")
def tiny(torus):
    """Keys of ``ddo train`` for a run of three steps, in well under a second."""
    return {
        "experiment": "kolmogorov64",
        "data__path": torus,
        "data__validation__trajectories": 1,
        "symmetry__roll": "[4,1]",
        "symmetry__glide": 2,
        "operator__network__widths": "[4]",
        "operator__network__depths": "[1]",
        "operator__network__modes": "[5]",
        "operator__network__embedding": 8,
        "operator__network__coordinates": "[2,0]",
        "trainer__steps": 3,
        "trainer__batch": 4,
        "trainer__precision": "fp32",
        "trainer__compile": "false",
        "trainer__validate_every": 2,
        "trainer__checkpoint_every": 2,
        "trainer__loggers": "[]",
        "trainer__figure": "false",
    }


@pytest.fixture(scope="session")
def arguments():
    """Keys, with ``__`` for a dot, as they are written on the command line."""
    return lambda **keys: [f"{key.replace('__', '.')}={value}" for key, value in keys.items()]
