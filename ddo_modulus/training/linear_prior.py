# SPDX-License-Identifier: Apache-2.0
"""The linear part of an operator, fitted to training data.

Axes: ``N`` samples, ``B`` batch, ``C`` channel, ``D`` channels of the condition, ``H W`` grid,
``K`` spectral coefficients, ``P`` points of the grid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.data.normalization import Normalization
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.statistics import StoredStatistics
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis, CosineBasis
from ddo_modulus.fields.coupled import CoupledField
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser, PriorCovariance
from ddo_modulus.fields.gaussian_field import EOFField, GaussianField, MeasuredSpectrum
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.training.data import TrainingData
from ddo_modulus.training.recipe import PriorConfig

log = logging.getLogger(__name__)


def fit_linear(
    operator: DiffusionOperator, data: TrainingData, options: PriorConfig
) -> PriorCovariance:
    """Fit the linear part of an operator to all samples of some data.

    The operator's regression, if it has one, is set; its prior is returned.

    Args:
        operator: Gives basis and noise.
        data: What to fit to; cropped, if the operator is for crops.
        options: Kind of covariance, and its own options.

    Raises:
        InputError: If a hybrid covariance is asked for with several channels, without a region or
            with samples that are not in memory.
    """
    if options.kind == "hybrid":
        return _hybrid(operator, data.cropped(), options)
    if options.kind == "spectrum" and data.task.span == 1 and operator.regression is None:
        power = _stored_power(operator.basis, data.cropped())
        if power is not None:
            return _spectral(operator, power, options.floor)
    most = options.fields or None
    if operator.regression is not None:
        operator.set_regression(regression(operator.basis, data.pieces(operator.basis, most)))
    anomalies = (
        x - operator.conditional_mean(condition, x)
        for x, condition in data.pieces(operator.basis, most)
    )
    if options.kind == "coupled":
        coupled = CoupledField.fit(operator.noise, anomalies, floor=options.floor)
        # A regression leaves less of the variance of the middle frames than of the others.
        return coupled if operator.regression is not None else coupled.stationary(data.task.frames)
    return _spectral(operator, _mean_power(operator, anomalies), options.floor)


def cross_fit(
    operator: DiffusionOperator, data: TrainingData, options: PriorConfig
) -> Iterator[tuple[TrainingData, GaussianDenoiser | None]]:
    """Contiguous blocks of the samples, each with a linear part fitted to the others.

    A covariance explains the samples it was fitted to better than new ones, and a network trained
    on those would learn to trust it too much. Without folds: all samples, and None for the
    operator's own linear part.

    Args:
        operator: Gives basis and noise; without a regression if there are folds.
        data: The training samples.
        options: As for :func:`fit_linear`.
    """
    if options.folds < 2:
        yield data, None
        return
    for others, block in data.folds(options.folds):
        prior = fit_linear(operator, others, options)
        yield block, GaussianDenoiser(0.0, prior, operator.noise)


def regression(
    basis: Basis, parts: Iterable[tuple[Tensor, Tensor | None]], ridge: float = 1e-4
) -> Float[Tensor, "C D K"]:
    """Least-squares map from the coefficients of conditions to those of states, mode by mode.

    Basis functions that a symmetry of the domain maps to each other share one map.

    Args:
        basis: Basis of the states.
        parts: States ``(B, C, H, W)`` and conditions ``(B, D, H, W)``.
        ridge: Variance added to that of the conditions in each mode, as a fraction of it:
            neighbouring frames are nearly the same.

    Raises:
        InputError: If there are no samples, or the condition is no field.
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
    resolved = variance > 1e-9 * variance.max()  # a coarse condition has nothing of the others
    load = torch.where(resolved, ridge * variance, 1.0)[:, None, None]
    weights = torch.linalg.solve(own + load * torch.eye(own.shape[1]), across.mT).mT
    return torch.where(resolved[:, None, None], weights, 0.0)[label].permute(1, 2, 0)


def whitened(noise: GaussianField, covariance: Float[Tensor, "P P"]) -> EOFField:
    """A covariance on the grid as an :class:`EOFField` relative to the noise."""
    identity = torch.eye(noise.basis.size, dtype=torch.float64)
    color = noise.color(identity[:, None]).flatten(1).mT  # L
    half = torch.linalg.solve(color, covariance)
    white = torch.linalg.solve(color, half.mT)
    index = torch.arange(noise.basis.size)
    remainder = torch.ones(noise.basis.size, dtype=torch.float64)
    return EOFField.from_covariance(noise, (white + white.mT) / 2, index, remainder)


def warn_of_smooth_noise(operator: DiffusionOperator) -> None:
    """Log a warning if the noise is smoother than the data.

    The smallest scales would then drown before the largest are hidden (arXiv 2509.02971).
    """
    slope = roughness(operator)
    if slope > 0:
        log.warning(
            "the noise is smoother than the data (their ratio falls as wavenumber^%.1f at small "
            "scales): fine scales will not be learned; lower operator.noise.smoothness or "
            "length_scale",
            -2 * slope,
        )


def roughness(operator: DiffusionOperator) -> float:
    """Slope of log(data / noise variance) over log eigenvalue in the upper half of the band.

    Positive where the noise is smoother than the data.
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


def _spectral(
    operator: DiffusionOperator, power: Float[Tensor, "C K"], floor: float
) -> GaussianField:
    spectrum = MeasuredSpectrum.from_power(operator.basis, power, floor=floor)
    return GaussianField(operator.basis, spectrum)


def _mean_power(
    operator: DiffusionOperator, anomalies: Iterable[Float[Tensor, "B C H W"]]
) -> Float[Tensor, "C K"]:
    """Mean squares of the coefficients of anomalies."""
    total, count = torch.zeros(operator.channels, operator.basis.size, dtype=torch.float64), 0
    for x in anomalies:
        total += operator.basis.analyze(x.double()).square().sum(0)
        count += len(x)
    log.info("spectrum: measured on %d samples", count)
    return total / count


def _stored_power(basis: Basis, data: TrainingData) -> Float[Tensor, "C K"] | None:
    """Mean squares of the coefficients from the statistics of the store, if these have them."""
    fields = data.samples.fields
    if not isinstance(fields, StateReader):
        return None
    stored = StoredStatistics.of(fields.path)
    if stored is None or not stored.are_of(data.samples.times):
        return None
    power = stored.power(basis, data.normalization)
    if power is not None:
        log.info("spectrum: the statistics of %s", fields.path)
    return power


def _hybrid(operator: DiffusionOperator, data: TrainingData, options: PriorConfig) -> EOFField:
    """Tapered sample covariance with a parametric model (:mod:`.covariance`)."""
    samples, normalization, grid = data.samples, data.normalization, data.grid
    if operator.channels != 1 or not isinstance(grid, LatLonGrid):
        raise InputError("prior.kind=hybrid is for one variable on a latitude-longitude region")
    if not isinstance(operator.basis, CosineBasis):
        raise InputError("prior.kind=hybrid needs domain=box")
    if operator.regression is not None or data.task.span > 1:
        raise InputError("prior.kind=hybrid takes no regression and no coarse.reach")
    if isinstance(samples.fields, StateReader):
        raise InputError(
            "prior.kind=hybrid needs all samples in memory: data.loader=memory, or "
            "prior.kind=spectrum"
        )
    climatology = normalization.denormalize(torch.zeros_like(samples.fields), samples.hours)
    anomalies = (samples.fields - climatology)[:, 0].numpy()
    cycle = Normalization.fit(
        normalization.channels, samples.fields, samples.hours, per_hour=True, per_point=True
    )
    amplitude = 2 / 24 * torch.fft.rfft(cycle.mean[:, 0].double(), dim=0)[1].abs()
    covariance = options.hybrid.estimate(anomalies, amplitude.numpy(), grid)
    scale = float(normalization.std.flatten()[0])
    return whitened(operator.noise, torch.from_numpy(covariance) / scale**2)
