# SPDX-License-Identifier: Apache-2.0
"""Small packages of every kind, and their engines, each exported once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import SHIPPED, Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.task import CoarseWindow, Task
from ddo_modulus.engines.folder import export
from ddo_modulus.engines.ort import ONNXRuntimeEngine
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, Matern
from ddo_modulus.fields.grid import BoxGrid, LatLonGrid
from ddo_modulus.fields.spherical_basis import SphericalBasis

NETWORK = {"widths": [8], "depths": [1], "modes": [3], "embedding": 8}
NOISE = {"length_scale": 0.1, "smoothness": 0.5}


def wrap(operator, grid, task, channels=("a",)):
    size = (1, len(channels), *grid.shape)
    return Package(
        operator.eval().requires_grad_(False),
        grid,
        Normalization(channels, torch.zeros(size), torch.ones(size)),
        ("1",) * len(channels),
        PosteriorConfig(steps=8, sigma_min=0.02, sigma_max=50.0),
        task,
        {},
        1.0 if task.frames > 1 else None,
    )


def box():
    """A box with EOFs, a network that fades out, and the hour as condition."""
    operator = DiffusionOperator(
        [6, 8], 2, "box", [1.0, 1.3], NOISE, 2, 10, NETWORK, network_sigma=0.5
    )
    root = torch.randn(10, 10).double()
    index = torch.arange(0, 60, 6)
    remainder = 0.1 + torch.rand(96).double()
    operator.set_prior(
        EOFField.from_covariance(operator.noise, root @ root.T / 10, index, remainder)
    )
    grid = BoxGrid((6, 8), (1.0, 1.3), periodic=False)
    return wrap(operator, grid, Task(condition="hour_of_day"), ("a", "b"))


def window():
    """Windows of three frames on a torus, with a coupled prior; no condition."""
    network = {**NETWORK, "static_channels": 2, "coordinates": [2, 2]}
    operator = DiffusionOperator([6, 8], 3, "torus", noise=NOISE, coupled=True, network=network)
    root = torch.randn(48, 3, 3).double()
    operator.set_prior(CoupledField(operator.noise, root @ root.mT / 3 + 0.1 * torch.eye(3)))
    return wrap(operator, BoxGrid((6, 8)), Task(frames=3))


def coarse():
    """States given coarse fields, with a regression on them."""
    task = Task(condition="coarse", coarse=CoarseWindow(2.0, 1))
    operator = DiffusionOperator(
        [6, 8], 1, "torus", noise=NOISE, condition_channels=3, regression=True, network=NETWORK
    )
    operator.set_regression(0.3 * torch.randn(1, 3, 48))
    return wrap(operator, BoxGrid((6, 8)), task)


def sphere():
    """A globe with rows at the poles."""
    basis = SphericalBasis([7, 12])
    grid = LatLonGrid(basis.latitudes(7), np.arange(12) * 30.0)
    noise = {"length_scale": 0.4, "smoothness": 0.5}
    return wrap(DiffusionOperator([7, 12], 1, "sphere", noise=noise, network=NETWORK), grid, Task())


def linear():
    """An operator whose network is zero: all that it does is optimal interpolation."""
    operator = DiffusionOperator([5, 6], 1, "torus", noise=NOISE, network=NETWORK)
    operator.set_prior(GaussianField(operator.basis, Matern(0.4, 1.5)))
    return wrap(operator, BoxGrid((5, 6)), Task())


SMALL = {f.__name__: f for f in (box, window, coarse, sphere, linear)}
SHIPPED_NAMES = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())


def build(name):
    if name in SHIPPED_NAMES:
        return Package.load(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        package = SMALL[name]()
        if name != "linear":
            for parameter in package.operator.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
    return package


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """``exported(name)``: a package, its folder of graphs, their contract and an engine."""
    made = {}

    def get(name):
        if name not in made:
            package, folder = build(name), tmp_path_factory.mktemp("engines") / name
            contract = export(package, folder)
            engine = ONNXRuntimeEngine(package, folder, contract, 256)
            made[name] = SimpleNamespace(
                package=package, folder=folder, contract=contract, engine=engine
            )
        return made[name]

    return get


@pytest.fixture(scope="session")
def vjp():
    """``vjp(prior, x, sigma, v, condition)``: clean states and ``J^T v``, as graphs return them."""

    def product(prior, x, sigma, v, condition=None):
        clean, pullback = prior.value_and_pullback(x, sigma, condition)
        return clean, pullback(v)

    return product


@pytest.fixture(scope="session")
def built():
    """``built(name)``: a package, not exported."""
    return build
