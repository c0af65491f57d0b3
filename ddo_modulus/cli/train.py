# SPDX-License-Identifier: Apache-2.0
"""``ddo train``: from a store of fields to a package.

Axes: ``N`` samples, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from omegaconf import DictConfig
from physicsnemo.distributed import DistributedManager
from torch import Tensor

from ddo_modulus import __version__
from ddo_modulus.cli.environment import package_revision
from ddo_modulus.cli.options import plain
from ddo_modulus.cli.run_folder import record_start, requeued, run_folder, trained_steps
from ddo_modulus.data.loader import Loader
from ddo_modulus.data.store import check_output
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.task import Task
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis
from ddo_modulus.training import (
    Checkpoints,
    Fold,
    Trainer,
    TrainerConfig,
    initialize_distributed,
    session,
)
from ddo_modulus.training.data import (
    Record,
    build_grid,
    build_loader,
    build_task,
    cell_means,
    central_window,
    domain_lengths,
    fit_normalization,
    open_record,
    split,
    tensors,
    time_step,
    within,
)
from ddo_modulus.training.linear_prior import cross_fit, fit_linear, prior_size, roughness

log = logging.getLogger(__name__)

#: Keys of the section `data` that tell how the record is read, not what it is.
HOW_READ = ("path", "loader", "memory", "workers", "prefetch")


def run(config: DictConfig) -> None:
    """Train the operator that the configuration describes and write its package.

    A job that Slurm has put back into its queue goes on with the run that it began.

    Raises:
        InputError: On data or options that do not fit, before training starts.
        Stopped: After a signal; the state is saved.
    """
    with session() as manager:
        out = run_folder(config)
        config.out = str(out)
        if not config.resume and requeued(out):
            log.info("requeued: going on with the run in %s", out)
            config.resume = True
        trainer = TrainerConfig(**plain(config.trainer))
        trainer.share(manager.world_size)
        trainer.captures(manager.device)
        if config.resume and not config.overwrite and trained_steps(out) == trainer.steps:
            log.info("%s is finished: %d steps, the package is there", out, trainer.steps)
            return
        check_output(out / "package", overwrite=config.overwrite)
        if not (config.resume or config.overwrite):
            Checkpoints(out / "checkpoints").refuse_leftovers()
        train(config, open_record(config.data))


def train(config: DictConfig, record: Record) -> Package | None:
    """Train on a record; the package is written, and returned on the first rank."""
    out = Path(config.out)
    initialize_distributed()
    manager = DistributedManager()
    torch.manual_seed(config.trainer.seed)
    task, samples, channels = build_task(config), record.samples, record.channels
    training, validation = split(samples, config.data)
    window = central_window(record.dataset, config)
    grid = build_grid(record.dataset.isel(lat=window[0], lon=window[1]), config.domain)
    log.info("%d training and %d validation samples", len(training.times), len(validation.times))

    whole = fit_normalization(channels, training, config.normalization)
    normalization = whole.window(*window)
    operator = DiffusionOperator(
        list(grid.shape),
        task.frames * len(normalization.channels),
        config.domain,
        list(domain_lengths(grid)),
        plain(config.operator.noise) if config.operator.noise else None,
        task.channels(len(normalization.channels)),
        prior_size(config, grid, len(normalization.channels)),
        plain(config.operator.network),
        config.operator.network_sigma,
        config.prior.kind == "coupled",
        config.operator.regression,
        {"cell_means": cell_means(record.dataset, config.domain)},
    )
    basis = operator.basis
    inner = training.part(window)
    operator.set_prior(fit_linear(operator, inner, normalization, task, grid, config.prior))

    slope = roughness(operator)
    if slope > 0:
        log.warning(
            "the noise is smoother than the data (their ratio falls as wavenumber^%.1f at small "
            "scales): fine scales will not be learned; lower operator.noise.smoothness or "
            "length_scale",
            -2 * slope,
        )

    held = None
    if len(validation.times):
        most = config.data.validation.samples
        inner = validation.part(window)
        held = tensors(inner, normalization, task, basis, most, manager.device)
    with ExitStack() as loaders:
        folds = []
        for part, linear in cross_fit(
            operator, training, normalization, task, grid, config, window
        ):
            loader = build_loader(part, whole, task, config, record.loader, manager)
            loaders.callback(loader.close)
            folds.append(Fold(partial(_batches, loader, task, basis), linear))
        trainer = Trainer(
            operator,
            folds,
            held,
            TrainerConfig(**plain(config.trainer)),
            out,
        )
        if config.resume and trainer.resume():
            log.info("resumed at step %d", trainer.step)
        elif config.overwrite and trainer.checkpoints is not None and manager.rank == 0:
            trainer.checkpoints.clear()
        record_start(out, config)
        log.info("the run is in %s", out)
        trained = trainer.run()
    if manager.rank != 0:
        return None
    if config.prior.refit:  # the network has learned; the linear part may see all there is
        everything = samples.select(within(samples, config.data))
        normalization = fit_normalization(channels, everything, config.normalization).window(
            *window
        )
        inner = everything.part(window)
        trained.set_prior(fit_linear(trained, inner, normalization, task, grid, config.prior))
    step = time_step(samples)
    package = Package(
        trained.cpu(),
        grid,
        normalization,
        record.units,
        PosteriorConfig.of(plain(config.sampling)),
        task,
        provenance(config, record.dataset, trainer),
        None if step is None else float(step / np.timedelta64(1, "s")),
    )
    try:
        path = package.save(out / "package", overwrite=config.overwrite, half=config.half)
    except OSError as error:
        raise InputError(
            f"{out}/package cannot be written ({error.strerror}); free some space and finish with "
            "resume=true"
        ) from error
    log.info("wrote %s", path)
    return package


def _batches(
    loader: Loader, task: Task, basis: Basis, start: int = 0
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """States and conditions from the frames that a loader gives."""
    for x, condition in loader.batches(start):
        yield task.split(x, condition, basis)


def provenance(config: DictConfig, dataset: xr.Dataset, trainer: Trainer) -> dict[str, Any]:
    """What a reader of the package should know of its making."""
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
            for key, value in plain(config).items()
            if key not in ("out", "overwrite", "resume", "data")
        },
        "record": {k: v for k, v in plain(config.data).items() if k not in HOW_READ},
        "training": trainer.history[-1] if trainer.history else {},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "software": {"ddo_modulus": __version__, "torch": torch.__version__},
        "revision": package_revision(),
    }
