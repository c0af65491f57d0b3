# SPDX-License-Identifier: Apache-2.0
"""The linear part of an operator, estimated from samples.

Axes: ``N`` samples, ``C`` channel, ``P`` points of the grid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.statistics import StoredStatistics
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.task import Task
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis, CosineBasis
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.covariance import HybridCovariance
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser, PriorCovariance
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, MeasuredSpectrum
from ddo_modulus.fields.grid import Grid, LatLonGrid
from ddo_modulus.training.data import WHOLE, Samples, Window, pieces

log = logging.getLogger(__name__)


def prior_size(config: DictConfig, grid: Grid, channels: int) -> int:
    """Coefficients that EOFs mix: all of them for a hybrid covariance, none for a spectrum."""
    return channels * grid.shape[0] * grid.shape[1] if config.prior.kind == "hybrid" else 0


def fit_linear(
    operator: DiffusionOperator,
    samples: Samples,
    normalization: Normalization,
    task: Task,
    grid: Grid,
    config: DictConfig,
) -> PriorCovariance:
    """The linear part of an operator, from samples: its regression is set, its prior returned.

    Args:
        operator: Gives basis and noise.
        samples: What to estimate from.
        normalization: Of the samples.
        task: What is a state, and given what.
        grid: Of the samples.
        config: ``kind: spectrum``, ``kind: coupled`` or ``kind: hybrid`` with the options of
            :class:`HybridCovariance`; of the first two, ``fields``: the largest number of samples
            used, and ``floor``: the smallest variance of a mode, as a fraction of the mean.

    Raises:
        InputError: On an unknown kind, or a hybrid covariance of several channels, no region or
            samples that are not in memory.
    """
    if config.kind == "hybrid":
        return _hybrid(operator, samples, normalization, task, grid, config)
    if config.kind not in ("spectrum", "coupled"):
        raise InputError(
            f"unknown prior.kind {config.kind!r}; choose 'spectrum', 'coupled' or 'hybrid'"
        )
    if config.kind == "spectrum" and task.span == 1 and operator.regression is None:
        square = _stored_power(operator.basis, samples, normalization)
        if square is not None:
            return _spectral(operator, square, config.floor)

    def parts() -> Iterator[tuple[Tensor, Tensor | None]]:
        return pieces(samples, normalization, task, operator.basis, config.fields or None)

    if operator.regression is not None:
        operator.set_regression(regression(operator.basis, parts()))
    around = (x - operator.conditional_mean(condition, x) for x, condition in parts())
    if config.kind == "coupled":
        coupled = CoupledField.fit(operator.noise, around, floor=config.floor)
        # Around a regression the middle frames are better known than the others.
        return coupled if operator.regression is not None else coupled.stationary(task.frames)
    total, count = torch.zeros(operator.channels, operator.basis.size, dtype=torch.float64), 0
    for x in around:
        total += operator.basis.analyze(x.double()).square().sum(0)
        count += len(x)
    log.info("spectrum: measured on %d samples", count)
    return _spectral(operator, total / count, config.floor)


def regression(
    basis: Basis, parts: Iterable[tuple[Tensor, Tensor | None]], ridge: float = 1e-4
) -> Float[Tensor, "C D K"]:
    """Least-squares map from the coefficients of conditions to those of states, mode by mode.

    Functions that a symmetry of the domain turns into each other share their map.

    Args:
        basis: Basis of the states.
        parts: States ``(B, C, H, W)`` and conditions ``(B, D, H, W)``.
        ridge: Variance added to the conditions' own in each mode, as a share of it: frames next
            to each other are nearly the same.
    """
    label = basis.symmetry()
    across, own = None, None
    for x, condition in parts:
        if condition is None or condition.ndim != 4:
            raise InputError("operator.regression=true needs a condition that is a field")
        c, u = basis.analyze(x.double()), basis.analyze(condition.double())
        zero = torch.zeros(int(label.max()) + 1, dtype=torch.float64)
        if across is None or own is None:
            across = zero[:, None, None].repeat(1, c.shape[1], u.shape[1])
            own = zero[:, None, None].repeat(1, u.shape[1], u.shape[1])
        across = across.index_add(0, label, torch.einsum("bck,bdk->kcd", c, u))
        own = own.index_add(0, label, torch.einsum("bck,bdk->kcd", u, u))
    if across is None or own is None:
        raise InputError("there are no samples to fit a regression to")
    variance = own.diagonal(dim1=1, dim2=2).mean(1)
    seen = variance > 1e-9 * variance.max()  # modes that the condition does not show at all
    load = torch.where(seen, ridge * variance, 1.0)[:, None, None]
    weights = torch.linalg.solve(own + load * torch.eye(own.shape[1]), across.mT).mT
    return torch.where(seen[:, None, None], weights, 0.0)[label].permute(1, 2, 0)


def _spectral(
    operator: DiffusionOperator, square: Float[Tensor, "C K"], floor: float
) -> GaussianField:
    spectrum = MeasuredSpectrum.from_power(operator.basis, square, floor=floor)
    return GaussianField(operator.basis, spectrum)


def _stored_power(
    basis: Basis, samples: Samples, normalization: Normalization
) -> Float[Tensor, "C K"] | None:
    """Mean squares of the coefficients, if the statistics of the samples' store tell them."""
    if not isinstance(samples.fields, StateReader):
        return None
    stored = StoredStatistics.of(samples.fields.path)
    if stored is None or not stored.are_of(samples.times):
        return None
    known = stored.power(basis, normalization)
    if known is not None:
        log.info("spectrum: the statistics of %s", samples.fields.path)
    return known


def _hybrid(
    operator: DiffusionOperator,
    samples: Samples,
    normalization: Normalization,
    task: Task,
    grid: Grid,
    config: DictConfig,
) -> EOFField:
    if operator.channels != 1 or not isinstance(grid, LatLonGrid):
        raise InputError("prior.kind=hybrid is for one variable on a latitude-longitude region")
    if not isinstance(operator.basis, CosineBasis):
        raise InputError("prior.kind=hybrid needs domain=box")
    if operator.regression is not None or task.span > 1:
        raise InputError("prior.kind=hybrid knows no regression and no coarse.reach")
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
    options = HybridCovariance(**cast(dict[str, Any], OmegaConf.to_container(config.hybrid)))
    covariance = options.estimate(anomalies[:, 0].numpy(), amplitude.numpy(), grid)
    scale = float(normalization.std.flatten()[0])
    return whitened(operator.noise, torch.from_numpy(covariance) / scale**2)


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
    variance = linear.variance[0].double()
    if linear.rotation is not None:
        variance = linear.rotation.marginal(variance)
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
    task: Task,
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
        task: What is a state, and given what.
        grid: Of the window.
        config: With the section ``prior``.
        window: Part of the grid that the operator is on.

    Raises:
        InputError: If there are folds and a regression, which is one for all.
    """
    folds = config.prior.folds
    if folds < 2:
        yield samples, None
        return
    if operator.regression is not None:
        raise InputError("prior.folds needs operator.regression=false: the regression has no folds")
    block = np.arange(len(samples.times)) * folds // len(samples.times)
    for fold in range(folds):
        others = samples.select(block != fold)
        part = others.part(window)
        prior = fit_linear(operator, part, normalization, task, grid, config.prior)
        yield samples.select(block == fold), GaussianDenoiser(0.0, prior, operator.noise)
