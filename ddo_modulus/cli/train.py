# SPDX-License-Identifier: Apache-2.0
"""``ddo train``: from a store of fields to a package."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ddo_modulus import __version__
from ddo_modulus.cli.environment import package_revision
from ddo_modulus.cli.options import plain
from ddo_modulus.cli.run_folder import record_start, requeued, run_folder, trained_steps
from ddo_modulus.data.output import PACKAGE, check_output
from ddo_modulus.diffusion.package import Package
from ddo_modulus.errors import InputError
from ddo_modulus.training import Checkpoints, Recipe, TrainingData, session, train
from ddo_modulus.training.recipe import READING

log = logging.getLogger(__name__)


def run(config: DictConfig) -> None:
    """Train the operator that the configuration describes and write its package.

    A job that Slurm has put back into its queue continues the run that it began.

    Raises:
        InputError: On data or options that do not fit, before training starts.
        Stopped: After a signal; the state is saved.
    """
    with session() as manager:
        out = run_folder(config)
        config.out = str(out)
        if not config.resume and requeued(out):
            log.info("requeued: continuing the run in %s", out)
            config.resume = True
        recipe = Recipe.of(plain(config))
        recipe.trainer.share(manager.world_size)
        recipe.trainer.captures(manager.device)
        if config.resume and not config.overwrite and trained_steps(out) == recipe.trainer.steps:
            log.info("%s is finished: %d steps, the package is there", out, recipe.trainer.steps)
            return
        check_output(out / "package", overwrite=config.overwrite, kind=PACKAGE)
        if not (config.resume or config.overwrite):
            Checkpoints(out / "checkpoints").refuse_leftovers()
        data = TrainingData.open(
            recipe.data,
            domain=recipe.domain,
            task=recipe.task,
            normalization=recipe.normalization,
        )
        package = train(
            recipe,
            data,
            out,
            resume=config.resume,
            overwrite=config.overwrite,
            provenance=provenance(config, data),
            starting=lambda: record_start(out, config),
        )
        if package is not None:
            write(package, out, config)


def write(package: Package, out: Path, config: DictConfig) -> None:
    """Write the package of a run.

    Raises:
        InputError: If it cannot be written; the run can be resumed.
    """
    try:
        path = package.save(out / "package", overwrite=config.overwrite, half=config.half)
    except OSError as error:
        raise InputError(
            f"{out}/package cannot be written ({error.strerror}); free some space and finish with "
            "resume=true"
        ) from error
    log.info("wrote %s", path)


def provenance(config: DictConfig, data: TrainingData) -> dict[str, Any]:
    """What a package says of its origin, apart from the training itself."""
    left_out = ("out", "overwrite", "resume", "data")
    return {
        "data": data.attributes,
        "attribution": config.attribution,
        "configuration": {k: v for k, v in plain(config).items() if k not in left_out},
        "record": {k: v for k, v in plain(config.data).items() if k not in READING},
        "software": {"ddo_modulus": __version__, "torch": torch.__version__},
        "revision": package_revision(),
    }
