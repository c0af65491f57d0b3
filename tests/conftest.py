# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests."""

import math
import os
from pathlib import Path

import pytest
import torch

from ddo_modulus.noise import FieldNoiseScheduler
from ddo_modulus.sampling import sample

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


class _UnitCoefficients(FieldNoiseScheduler):
    """Draws no noise and then every unit coefficient instead of random ones."""

    def draw(self, like, generator=None):
        field = self.field.at(like.shape[-2:])
        size = field.channels * field.basis.size
        z = torch.cat([torch.zeros(1, size), torch.eye(size)]).to(like)
        z = z.repeat(len(like) // len(z), 1).unflatten(1, (field.channels, -1))
        return field.color(z)


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
