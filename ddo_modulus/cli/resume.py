# SPDX-License-Identifier: Apache-2.0
"""``ddo resume``: continue a run from its own configuration."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ddo_modulus.cli import train
from ddo_modulus.cli.configuration import differences
from ddo_modulus.cli.options import integer, plain
from ddo_modulus.cli.run_folder import CONFIG, open_run
from ddo_modulus.errors import InputError
from ddo_modulus.training import TrainerConfig
from ddo_modulus.training.recipe import READING

#: Keys, or sections of keys, that may change: they leave alone what is trained.
_FREE = (
    *("out", "overwrite", "resume"),
    *(f"data.{key}" for key in READING),
    *("trainer.steps", "trainer.learning_rate", "trainer.weight_decay", "trainer.clip"),
    *("trainer.accumulate", "trainer.compile", "trainer.cuda_graph"),
    *("trainer.activation_checkpointing", "trainer.log_every", "trainer.validate_every"),
    *("trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.loggers", "trainer.figure"),
    *("sampling", "half", "attribution"),
)


def run(config: DictConfig) -> None:
    """Continue a run.

    Args:
        config: The run's own configuration with changes, of :func:`.compose`.

    Raises:
        InputError: If the changes would make it another run, or another version began it.
        Stopped: After a signal; the state is saved.
    """
    out = Path(config.out)
    saved = open_run(out)
    unknown = set(plain(config.trainer)) - {field.name for field in fields(TrainerConfig)}
    if unknown:
        raise InputError(
            f"{out} was begun with another version of ddo_modulus (see environment.json there): "
            f"this one does not know trainer.{', trainer.'.join(sorted(unknown))}"
        )
    fixed = {
        key: before
        for key, (before, _) in differences(plain(saved), plain(config)).items()
        if _has(saved, key) and not any(f"{key}.".startswith(f"{free}.") for free in _FREE)
    }
    if fixed:
        values = "; ".join(f"{key} is {before} there" for key, before in sorted(fixed.items()))
        raise InputError(
            f"{out} would become another run ({values}): leave these keys out, or train anew in "
            "another folder"
        )
    if integer(config, "trainer.steps") < integer(saved, "trainer.steps"):
        raise InputError(
            f"trainer.steps={config.trainer.steps} is below the {saved.trainer.steps} of "
            f"{out / CONFIG}; a run can only be made longer"
        )
    train.run(config)


def _has(config: DictConfig, key: str) -> bool:
    absent = object()
    return OmegaConf.select(config, key, default=absent) is not absent
