# SPDX-License-Identifier: Apache-2.0
"""``ddo train``: from a store of fields to a package.

Axes: ``N`` samples, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from omegaconf import DictConfig, OmegaConf
from physicsnemo.distributed import DistributedManager
from torch import Tensor

from ddo_modulus.basis import CosineBasis
from ddo_modulus.covariance import HybridCovariance
from ddo_modulus.data.loader import Symmetry, TensorLoader
from ddo_modulus.data.source import check_values, open_dataset
from ddo_modulus.data.store import check_output
from ddo_modulus.denoiser import DiffusionOperator, GaussianDenoiser
from ddo_modulus.errors import InputError
from ddo_modulus.field import EOFField, GaussianField, MeasuredSpectrum
from ddo_modulus.grid import BoxGrid, Grid, LatLonGrid
from ddo_modulus.normalize import Normalization
from ddo_modulus.package import Package, Sampling, condition_at
from ddo_modulus.training import Fold, Trainer, TrainerConfig, initialize_distributed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Fields in physical units with their times.

    Attributes:
        fields: ``(N, C, H, W)`` float32.
        times: ``(N,)`` datetime64.
        trajectory: ``(N,)`` the independent run each belongs to; zeros for one record.
    """

    fields: Float[Tensor, "N C H W"]
    times: np.ndarray
    trajectory: np.ndarray

    def select(self, mask: np.ndarray) -> Samples:
        """Those where the mask is true."""
        chosen = torch.from_numpy(np.flatnonzero(mask))
        return Samples(self.fields[chosen], self.times[mask], self.trajectory[mask])

    @property
    def hours(self) -> Int[Tensor, " N"]:
        """Hour of the day, UTC."""
        return torch.from_numpy(self.times.astype("datetime64[h]").astype("int64") % 24)


def run(config: DictConfig) -> None:
    """Train the operator that the configuration describes and write its package.

    Raises:
        InputError: On data or options that do not fit, before training starts.
    """
    check_output(Path(config.out) / "package", overwrite=config.overwrite)
    dataset = open_dataset(config.data.path, config.data.variables)
    check_values(dataset, str(config.data.path))
    train(config, dataset)


def train(config: DictConfig, dataset: xr.Dataset) -> Package | None:
    """Train on a dataset in memory; the package is written, and returned on the first rank."""
    out = Path(config.out)
    initialize_distributed()
    manager = DistributedManager()
    torch.manual_seed(config.trainer.seed)
    samples, units = load_samples(dataset)
    training, validation = split(samples, config.data)
    grid = build_grid(dataset, config.domain)
    log.info("%d training and %d validation samples", len(training.times), len(validation.times))

    channels = [str(name) for name in dataset.data_vars]
    normalization = fit_normalization(channels, training, config.normalization)
    operator = DiffusionOperator(
        list(grid.shape),
        len(normalization.channels),
        config.domain,
        list(domain_lengths(grid)),
        _plain(config.operator.noise) if config.operator.noise else None,
        0 if config.condition == "none" else 2,
        prior_size(config, grid, len(normalization.channels)),
        _plain(config.operator.network),
        config.operator.network_sigma,
    )
    fitted = config.prior.fields or None
    operator.set_prior(fit_prior(operator, training, normalization, grid, config.prior, fitted))

    slope = roughness(operator)
    if slope > 0:
        log.warning(
            "the noise is smoother than the data (their ratio falls as wavenumber^%.1f at small "
            "scales): fine scales will not be learned; lower operator.noise.smoothness or "
            "length_scale",
            -2 * slope,
        )

    trainer = Trainer(
        operator,
        [
            _fold(part, linear, normalization, config, manager)
            for part, linear in cross_fit(operator, training, normalization, grid, config)
        ],
        _tensors(validation, normalization, config.condition, manager.device)
        if len(validation.times)
        else None,
        TrainerConfig(**_plain(config.trainer)),
        out,
        log=lambda row: log.info("%s", {k: round(v, 4) for k, v in row.items()}),
    )
    if config.resume and trainer.resume():
        log.info("resumed at step %d", trainer.step)
    trained = trainer.run()
    if manager.rank != 0:
        return None
    if config.prior.refit:  # the network has learned; the linear part may see all there is
        everything = samples.select(_within(samples, config.data))
        normalization = fit_normalization(channels, everything, config.normalization)
        trained.set_prior(fit_prior(trained, everything, normalization, grid, config.prior, fitted))
    package = Package(
        trained.cpu(),
        grid,
        normalization,
        units,
        Sampling(**_plain(config.sampling)),
        config.condition,
        provenance(config, dataset, trainer),
    )
    path = package.save(out / "package", overwrite=config.overwrite, half=config.half)
    log.info("wrote %s", path)
    return package


def load_samples(dataset: xr.Dataset) -> tuple[Samples, tuple[str, ...]]:
    """All fields of a dataset as one tensor, and the unit of each variable."""
    stacked = dataset.to_array("channel")
    if "trajectory" not in stacked.dims:
        stacked = stacked.expand_dims("trajectory")
    stacked = stacked.transpose("trajectory", "time", "channel", "lat", "lon")
    runs, times = stacked.sizes["trajectory"], stacked.sizes["time"]
    fields = torch.from_numpy(np.ascontiguousarray(stacked.values, np.float32)).flatten(0, 1)
    units = tuple(str(dataset[name].attrs.get("units", "1")) for name in dataset.data_vars)
    time = np.tile(stacked["time"].values, runs)
    return Samples(fields, time, np.repeat(np.arange(runs), times)), units


def _within(samples: Samples, config: DictConfig) -> np.ndarray:
    """Samples between the start and the end of the record to use."""
    inside = np.ones(len(samples.times), bool)
    if config.start is not None:
        inside &= samples.times >= np.datetime64(config.start)
    if config.end is not None:
        inside &= samples.times <= np.datetime64(config.end)
    return inside


def split(samples: Samples, config: DictConfig) -> tuple[Samples, Samples]:
    """Training and validation samples: a span of time, or the last trajectories.

    Raises:
        InputError: If no sample is left to train on.
    """
    inside = _within(samples, config)
    held = np.zeros(len(inside), bool)
    if config.validation.start is not None:
        held = samples.times >= np.datetime64(config.validation.start)
        if config.validation.end is not None:
            held &= samples.times <= np.datetime64(config.validation.end)
    if config.validation.trajectories:
        held |= samples.trajectory > samples.trajectory.max() - config.validation.trajectories
    if not (inside & ~held).any():
        raise InputError(
            f"no samples to train on: the data run from {samples.times.min()} to "
            f"{samples.times.max()}; check data.start, data.end and data.validation"
        )
    return samples.select(inside & ~held), samples.select(inside & held)


def build_grid(dataset: xr.Dataset, domain: str) -> Grid:
    """Grid of a dataset: geographical, or the unit square."""
    lat, lon = dataset["lat"].values, dataset["lon"].values
    if domain == "torus" or dataset["lat"].attrs.get("units") == "1":
        return BoxGrid((len(lat), len(lon)), periodic=domain == "torus")
    return LatLonGrid(lat, lon)


def domain_lengths(grid: Grid) -> tuple[float, float]:
    """Extent of the domain: 1000 km for a region of the globe, its own units for a box."""
    if isinstance(grid, BoxGrid):
        return grid.lengths
    degree = 111.2e-3
    height = abs(grid.lat[1] - grid.lat[0]) * len(grid.lat)
    width = (grid.lon[1] - grid.lon[0]) * len(grid.lon) * np.cos(np.deg2rad(grid.lat.mean()))
    return float(height * degree), float(width * degree)


def fit_normalization(channels: list[str], samples: Samples, config: DictConfig) -> Normalization:
    """Climatology and scale of the training samples (:meth:`Normalization.fit`)."""
    fitted = Normalization.fit(
        channels,
        samples.fields,
        samples.hours,
        per_hour=config.per_hour,
        per_point=config.per_point,
        harmonics=config.harmonics if config.per_hour else None,
    )
    if config.common_scale:  # one number for a channel: the covariance knows where it varies
        scale = fitted.std.square().mean((0, 2, 3), keepdim=True).sqrt()
        fitted = Normalization(fitted.channels, fitted.mean, scale.expand_as(fitted.std).clone())
    return fitted


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
        fields: Largest number of samples used for a spectrum.

    Raises:
        InputError: On an unknown kind, or a hybrid covariance of several channels or no region.
    """
    if config.kind == "spectrum":
        step = 1 if fields is None else max(len(samples.times) // fields, 1)
        some = samples.select(np.arange(len(samples.times)) % step == 0)
        x = normalization.normalize(some.fields, some.hours)
        return GaussianField(operator.basis, MeasuredSpectrum.fit(operator.basis, x))
    if config.kind != "hybrid":
        raise InputError(f"unknown prior.kind {config.kind!r}; choose 'spectrum' or 'hybrid'")
    if operator.channels != 1 or not isinstance(grid, LatLonGrid):
        raise InputError("prior.kind=hybrid is for one variable on a latitude-longitude region")
    if not isinstance(operator.basis, CosineBasis):
        raise InputError("prior.kind=hybrid needs domain=box")
    anomalies = samples.fields - normalization.denormalize(
        torch.zeros_like(samples.fields), samples.hours
    )
    raw = Normalization.fit(
        normalization.channels, samples.fields, samples.hours, per_hour=True, per_point=True
    )
    amplitude = 2 / 24 * torch.fft.rfft(raw.mean[:, 0].double(), dim=0)[1].abs()
    options = HybridCovariance(**_plain(config.hybrid))
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
) -> Iterator[tuple[Samples, GaussianDenoiser | None]]:
    """Contiguous blocks of the samples, each with a linear part fitted to the others.

    A covariance explains the samples it was fitted to better than new ones, and a network trained
    on those would learn to trust it too much.
    """
    folds = config.prior.folds
    if folds < 2:
        yield samples, None
        return
    block = np.arange(len(samples.times)) * folds // len(samples.times)
    for fold in range(folds):
        others = samples.select(block != fold)
        prior = fit_prior(operator, others, normalization, grid, config.prior)
        yield samples.select(block == fold), GaussianDenoiser(0.0, prior, operator.noise)


def _tensors(
    samples: Samples, normalization: Normalization, condition: str, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    x = normalization.normalize(samples.fields, samples.hours).to(device)
    given = condition_at(condition, samples.times)
    return x, None if given is None else given.to(device)


def _fold(
    samples: Samples,
    linear: GaussianDenoiser | None,
    normalization: Normalization,
    config: DictConfig,
    manager: DistributedManager,
) -> Fold:
    x, condition = _tensors(samples, normalization, config.condition, manager.device)
    symmetry = Symmetry(**_plain(config.symmetry)) if config.symmetry else None
    loader = TensorLoader(
        x,
        condition,
        batch=config.trainer.batch,
        seed=config.trainer.seed,
        symmetry=symmetry,
        rank=manager.rank,
        ranks=manager.world_size,
    )
    return Fold(loader.batches, linear)


def _plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as a dictionary that JSON can hold."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def provenance(config: DictConfig, dataset: xr.Dataset, trainer: Trainer) -> dict[str, Any]:
    """What a reader of the package should know of its making."""
    git = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    device = trainer.device
    attributes = {
        key: value if isinstance(value, str | int | float) else str(value)
        for key, value in dataset.attrs.items()
        if key != "history"
    }
    return {
        "data": attributes,
        "attribution": config.attribution,
        "configuration": {
            key: value
            for key, value in _plain(config).items()
            if key not in ("out", "overwrite", "resume", "data")
        },
        "record": {k: v for k, v in _plain(config.data).items() if k != "path"},
        "training": trainer.history[-1] if trainer.history else {},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "software": {"ddo_modulus": version("ddo-modulus"), "torch": torch.__version__},
        "revision": git.stdout.strip() if git.returncode == 0 else None,
    }
