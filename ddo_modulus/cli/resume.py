# SPDX-License-Identifier: Apache-2.0
"""``ddo resume``: continue a run, by its own configuration."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig

from ddo_modulus.cli import train
from ddo_modulus.cli.experiment import CONFIG, differences, open_run
from ddo_modulus.cli.options import integer, plain
from ddo_modulus.errors import InputError
from ddo_modulus.training import TrainerConfig
from ddo_modulus.training.recipe import READING

#: Keys, or sections, that do not change what is trained.
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
        config: That of the run, with changes.

    Raises:
        InputError: If it would be another run, or was another version's.
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
    changed = differences(plain(saved), plain(config))
    # Keys that a newer version has added are no changes of the user's.
    before = {key: pair for key, pair in changed.items() if _has(saved, key)}
    fixed = [key for key in before if not any(_within(key, free) for free in _FREE)]
    if fixed:
        values = "; ".join(f"{key} is {before[key][0]} there" for key in sorted(fixed))
        raise InputError(
            f"{out} would become another run ({values}): leave these keys out, or train anew in "
            "another folder"
        )
    if integer(config, "trainer.steps") < integer(saved, "trainer.steps"):
        raise InputError(
            f"trainer.steps={config.trainer.steps} is below the {saved.trainer.steps} of "
            f"{out / CONFIG}; a run can be made longer only"
        )
    train.run(config)


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _has(config: DictConfig, key: str) -> bool:
    *path, last = key.split(".")
    section = config
    for name in path:
        section = section[name]
    return last in section
