# SPDX-License-Identifier: Apache-2.0
"""The training procedure: from data and a recipe to a package.

From the store to the loss a sample takes these steps:

1. :meth:`.TrainingData.open` opens the store and selects the samples (:mod:`.data`).
2. A loader reads the samples of a training step, crops, normalises and transforms them
   (:mod:`ddo_modulus.data.loader`, :mod:`ddo_modulus.data.stream`).
3. :meth:`.Task.split` turns their frames into states and conditions (:func:`.batches_of_states`).
4. :class:`.Trainer` draws noise levels and noise for the states (:mod:`.trainer`).
5. :class:`.DenoisingLoss` compares the network's output with its target (:mod:`.loss`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from physicsnemo.distributed import DistributedManager

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.training.data import TrainingData, batches_of_states
from ddo_modulus.training.distributed import initialize_distributed
from ddo_modulus.training.domain import cell_means, domain_lengths
from ddo_modulus.training.evaluation import Batch
from ddo_modulus.training.linear_prior import cross_fit, fit_linear, warn_of_smooth_noise
from ddo_modulus.training.recipe import Recipe
from ddo_modulus.training.trainer import Fold, Trainer

log = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    data: TrainingData,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    starting: Callable[[], None] = lambda: None,
) -> Package | None:
    """Train an operator, on one rank or many.

    Args:
        recipe: What to train, and how.
        data: The samples (:meth:`.TrainingData.open`).
        out: Folder for checkpoints, curves and figures.
        resume: Whether to continue from the newest sound checkpoint in `out`, if there is one.
        overwrite: Whether checkpoints in `out` are discarded, if they are not continued from.
        provenance: What the package says of its origin; its training is added.
        starting: Called before the first step, when all has been checked.

    Returns:
        The package on the first rank, None on the others. It is not written.

    Raises:
        InputError: If recipe and data do not fit together, `out` has the checkpoints of another
            run, or training diverges.
        Stopped: After a signal; the state is saved.
    """
    initialize_distributed()
    manager = DistributedManager()
    torch.manual_seed(recipe.trainer.seed)  # of the weights
    training, validation = data.split()
    log.info(
        "%d training and %d validation samples", len(training.samples), len(validation.samples)
    )
    operator = build_operator(recipe, training)
    operator.set_prior(fit_linear(operator, training, recipe.prior))
    warn_of_smooth_noise(operator)
    held_back = _held_back(validation, operator, manager)
    with _folds(recipe, operator, training, manager) as folds:
        trainer = Trainer(operator, folds, held_back, recipe.trainer, out)
        _continue(trainer, resume=resume, overwrite=overwrite)
        starting()
        log.info("the run is in %s", out)
        trained = trainer.run()
    if manager.rank != 0:
        return None
    if recipe.prior.refit:  # the network has learned; the linear part may see all samples
        training = data.refitted()
        trained.set_prior(fit_linear(trained, training, recipe.prior))
    origin = (provenance or {}) | _origin(trainer)
    return _package(recipe, training, trained, origin, data.samples.time_step())


def build_operator(recipe: Recipe, data: TrainingData) -> DiffusionOperator:
    """The operator of a recipe for states of some data, before any training."""
    cropped, task, options = data.cropped(), data.task, recipe.operator
    variables, kind = len(data.channels), recipe.prior.kind
    height, width = cropped.grid.shape
    return DiffusionOperator(
        shape=[height, width],
        channels=task.frames * variables,
        domain=data.domain,
        lengths=list(domain_lengths(cropped.grid)),
        noise=options.noise or None,
        condition_channels=task.channels(variables),
        # A hybrid covariance mixes all coefficients.
        eof_modes=variables * height * width if kind == "hybrid" else 0,
        network=options.network,
        network_sigma=options.network_sigma,
        coupled=kind == "coupled",
        regression=options.regression,
        refinement={"cell_means": cell_means(data.dataset, data.domain)},
    )


@contextmanager
def _folds(
    recipe: Recipe, operator: DiffusionOperator, training: TrainingData, manager: DistributedManager
) -> Iterator[list[Fold]]:
    """Batches of each fold with its linear part; processes that read end with the block."""
    batches = recipe.batches(manager.rank, manager.world_size)
    with ExitStack() as loaders:
        folds = []
        for block, linear in cross_fit(operator, training, recipe.prior):
            loader = block.loader(batches, manager.device)
            loaders.callback(loader.close)
            states = partial(batches_of_states, loader, block.task, operator.basis)
            folds.append(Fold(states, linear))
        yield folds


def _held_back(
    validation: TrainingData, operator: DiffusionOperator, manager: DistributedManager
) -> Batch | None:
    """States and conditions to validate on, in memory; None if no samples are held back."""
    if not len(validation.samples):
        return None
    most = validation.options.validation.samples
    return validation.tensors(operator.basis, most, manager.device)


def _continue(trainer: Trainer, *, resume: bool, overwrite: bool) -> None:
    """Load the newest checkpoint if a run is resumed; else remove those that are overwritten."""
    if resume and trainer.resume():
        log.info("resumed at step %d", trainer.step)
    elif overwrite and trainer.checkpoints is not None and trainer.rank == 0:
        trainer.checkpoints.clear()


def _package(
    recipe: Recipe,
    data: TrainingData,
    trained: DiffusionOperator,
    provenance: dict[str, Any],
    step: np.timedelta64 | None,
) -> Package:
    """A package of a trained operator; its grid and statistics are those of the data."""
    cropped = data.cropped()
    return Package(
        trained.cpu(),
        cropped.grid,
        cropped.normalization,
        data.units,
        recipe.sampling,
        data.task,
        provenance,
        None if step is None else float(step / np.timedelta64(1, "s")),
    )


def _origin(trainer: Trainer) -> dict[str, Any]:
    """What a package says of its training."""
    device = trainer.device
    return {
        "training": trainer.history[-1] if trainer.history else {},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }
