# SPDX-License-Identifier: Apache-2.0
"""The linear part of an operator, estimated from samples.

Axes: ``N`` samples, ``C`` channel, ``P`` points of the grid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor

from ddo_modulus.basis import Basis, CosineBasis
from ddo_modulus.commands.common import plain
from ddo_modulus.commands.record import WHOLE, Samples, Window
from ddo_modulus.covariance import HybridCovariance
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.statistics import StoredStatistics
from ddo_modulus.denoiser import DiffusionOperator, GaussianDenoiser
from ddo_modulus.errors import InputError
from ddo_modulus.field import EOFField, GaussianField, MeasuredSpectrum
from ddo_modulus.grid import Grid, LatLonGrid
from ddo_modulus.normalize import Normalization

log = logging.getLogger(__name__)


def prior_size(config: DictConfig, grid: Grid, channels: int) -> int:
    """Coefficients that EOFs mix: all of them for a hybrid covariance, none for a spectrum."""
    return channels * grid.shape[0] * grid.shape[1] if config.prior.kind == "hybrid" else 0


def fit_prior(
    operator: DiffusionOperator,
    samples: Samples,
    normalization: Normalization,
    grid: Grid,
    config: DictConfig,
    fields: int | None = None,
) -> GaussianField | EOFField:
    """Gaussian prior of the linear part, from samples.

    Args:
        operator: Gives basis and noise.
        samples: What to estimate from.
        normalization: Of the samples.
        grid: Of the samples.
        config: ``kind: spectrum`` or ``kind: hybrid`` with the options of
            :class:`HybridCovariance`.
        fields: Largest number of samples used for a spectrum. For samples in a store it comes
            from the store's statistics where they tell it.

    Raises:
        InputError: On an unknown kind, or a hybrid covariance of several channels, no region or
            samples that are not in memory.
    """
    if config.kind == "spectrum":
        square = _power(operator.basis, samples, normalization, fields)
        return GaussianField(operator.basis, MeasuredSpectrum.from_power(operator.basis, square))
    if config.kind != "hybrid":
        raise InputError(f"unknown prior.kind {config.kind!r}; choose 'spectrum' or 'hybrid'")
    if operator.channels != 1 or not isinstance(grid, LatLonGrid):
        raise InputError("prior.kind=hybrid is for one variable on a latitude-longitude region")
    if not isinstance(operator.basis, CosineBasis):
        raise InputError("prior.kind=hybrid needs domain=box")
    if isinstance(samples.fields, StateReader):
        raise InputError(
            "prior.kind=hybrid needs all samples in memory: data.loader=memory, or "
            "prior.kind=spectrum"
        )
    anomalies = samples.fields - normalization.denormalize(
        torch.zeros_like(samples.fields), samples.hours
    )
    raw = Normalization.fit(
        normalization.channels, samples.fields, samples.hours, per_hour=True, per_point=True
    )
    amplitude = 2 / 24 * torch.fft.rfft(raw.mean[:, 0].double(), dim=0)[1].abs()
    options = HybridCovariance(**plain(config.hybrid))
    covariance = options.estimate(anomalies[:, 0].numpy(), amplitude.numpy(), grid)
    scale = float(normalization.std.flatten()[0])
    return whitened(operator.noise, torch.from_numpy(covariance) / scale**2)


def _power(
    basis: Basis, samples: Samples, normalization: Normalization, fields: int | None
) -> Float[Tensor, "C K"]:
    """Mean square of the coefficients of normalised samples."""
    if isinstance(samples.fields, StateReader):
        stored = StoredStatistics.of(samples.fields.path)
        if stored is not None and stored.are_of(samples.times):
            known = stored.power(basis, normalization)
            if known is not None:
                log.info("spectrum: the statistics of %s", samples.fields.path)
                return known
    some = samples.at_most(fields)
    log.info("spectrum: measured on %d samples", len(some.times))
    total = torch.zeros(len(normalization.channels), basis.size, dtype=torch.float64)
    for piece in some.pieces():
        x = normalization.normalize(*piece)
        total += basis.analyze(x.double()).square().sum(0)
    return total / len(some.times)


def whitened(noise: GaussianField, covariance: Float[Tensor, "P P"]) -> EOFField:
    """A covariance on the grid as an :class:`EOFField` relative to the noise."""
    identity = torch.eye(noise.basis.size, dtype=torch.float64)
    color = noise.color(identity[:, None]).flatten(1).mT  # L
    half = torch.linalg.solve(color, covariance)
    white = torch.linalg.solve(color, half.mT)
    index = torch.arange(noise.basis.size)
    remainder = torch.ones(noise.basis.size, dtype=torch.float64)
    return EOFField.from_covariance(noise, (white + white.mT) / 2, index, remainder)


def roughness(operator: DiffusionOperator) -> float:
    """Slope of log(data / noise variance) over log eigenvalue in the upper half of the band.

    Positive where the noise is smoother than the data; it must be no smoother, or the smallest
    scales drown before the largest are hidden (arXiv 2509.02971).
    """
    linear = operator.linear
    variance = linear.variance[0].double().clone()
    if linear.rotation is not None:
        index, vectors = linear.rotation
        variance[index] = vectors.double().square() @ variance[index]
    eigenvalues = operator.basis.eigenvalues
    upper = eigenvalues > eigenvalues.median()
    abscissa = eigenvalues[upper].log()
    ordinate = variance.unflatten(0, (operator.channels, -1)).log().mean(0)[upper]
    centred = abscissa - abscissa.mean()
    return float((centred * ordinate).sum() / centred.square().sum())


def cross_fit(
    operator: DiffusionOperator,
    samples: Samples,
    normalization: Normalization,
    grid: Grid,
    config: DictConfig,
    window: Window = WHOLE,
) -> Iterator[tuple[Samples, GaussianDenoiser | None]]:
    """Contiguous blocks of the samples, each with a linear part fitted to the others.

    A covariance explains the samples it was fitted to better than new ones, and a network trained
    on those would learn to trust it too much.

    Args:
        operator: Gives basis and noise.
        samples: What to share out, on the grid of the store.
        normalization: Of the samples, on the window.
        grid: Of the window.
        config: With the section ``prior``.
        window: Part of the grid that the operator is on.
    """
    folds = config.prior.folds
    if folds < 2:
        yield samples, None
        return
    block = np.arange(len(samples.times)) * folds // len(samples.times)
    for fold in range(folds):
        others = samples.select(block != fold)
        prior = fit_prior(operator, others.part(window), normalization, grid, config.prior)
        yield samples.select(block == fold), GaussianDenoiser(0.0, prior, operator.noise)
