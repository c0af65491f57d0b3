# SPDX-License-Identifier: Apache-2.0
"""Configurations composed with Hydra, and the commands that are run on them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parents[1] / "conf"

# Rank and number of ranks, as torchrun, srun and mpirun tell them.
_RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NPROCS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)

#: Sections of a run's configuration that are the same for every experiment but for their values.
_COMMON = ("trainer", "data")


def first_rank() -> bool:
    """Whether this process speaks for all that its launcher has started."""
    return ranks() == 1 or all(os.environ.get(rank, "0") == "0" for rank, _ in _RANKS)


def ranks() -> int:
    """Processes that its launcher has started."""
    # A batch script of Slurm has a number of tasks too; srun alone says where they meet.
    alone = "SLURM_LAUNCH_NODE_IPADDR" not in os.environ
    counts = (count for _, count in _RANKS if not (alone and count.startswith("SLURM")))
    return max(int(os.environ.get(count) or 1) for count in counts)


def execute(command: str, config: DictConfig) -> None:
    """Run a command of :mod:`ddo_modulus.cli`; what it reports goes to stderr."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ddo_modulus").setLevel(logging.INFO)
    import_module(f"ddo_modulus.cli.{command}").run(config)


def compose(command: str, overrides: Sequence[str]) -> DictConfig:
    """Configuration of a command.

    That of ``resume`` is the run's own, whatever has become of ``conf/`` since.

    Args:
        command: Name of a file in ``conf/``.
        overrides: ``key=value`` in Hydra's grammar; a value that does not parse is plain text.

    Raises:
        InputError: On an argument of another form, an unknown key or choice, or a missing key.
    """
    for override in overrides:
        if re.match(r"[+~]*hydra[./]", override):
            raise InputError(f"{override} is an option of sweeps: `ddo train -m ...`")
    given = [parsable(override) for override in overrides]
    if command == "resume":
        return _compose_run(given)
    return complete(command, load(CONF, command, given))


def load(folder: Path, name: str, overrides: Sequence[str], command: str = "") -> DictConfig:
    """A file of configuration with all that it includes; keys may be missing.

    Hydra is left knowing the choices made, which ``${hydra:runtime.choices...}`` stands for.

    Args:
        folder: Of the configuration.
        name: Of the file, less its ending.
        overrides: In Hydra's grammar.
        command: To name in errors, if it is not that of the file.

    Raises:
        InputError: On an unknown key or choice.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    try:
        with hydra.initialize_config_dir(str(folder.absolute()), version_base="1.3"):
            config = hydra.compose(name, list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explained(command or name, error) from error
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def complete(command: str, config: DictConfig) -> DictConfig:
    """A configuration without interpolations, in which nothing is missing.

    Raises:
        InputError: If there is.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if missing := sorted(str(key) for key in OmegaConf.missing_keys(config)):
        needed = " ".join(f"{key}=..." for key in missing)
        raise InputError(f"{command} needs {needed} (`ddo {command} --help` tells the meaning)")
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise explained(command, error) from error
    return config


def explained(command: str, error: Exception) -> InputError:
    """What Hydra complains of, in one line."""
    told = str(error).split("\nTo append")[0].split("\nConfig search path")[0]
    told = re.sub(r"\s*Available options.*:\s*", "; choose one of ", told)
    told = re.sub(r"Could not override '(.+)'\.?", r"unknown key '\1'", told)
    if "hydra/launcher/submitit" in told and find_spec("submitit") is None:
        told = "hydra/launcher=submitit_... needs a package: pip install 'ddo-modulus[sweep]'"
    return InputError(f"{told} (`ddo {command} --help` lists all keys)")


def parsable(override: str, *, sweeps: bool = False) -> str:
    """Quote a value that is not of Hydra's grammar, such as a path with brackets.

    Args:
        override: ``key=value``.
        sweeps: Whether several values may be given; else they are plain text too.

    Raises:
        InputError: If it has another form.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not re.match(r"[\w+~@./-]*\w=", override) or override.startswith("-"):
        raise InputError(f"{override!r} is not of the form key=value")
    try:
        if sweeps or not OverridesParser.create().parse_override(override).is_sweep_override():
            OverridesParser.create().parse_override(override)
            return override
    except HydraException:
        pass
    key, _, value = override.partition("=")
    return f"{key}={quoted(value)}"


def quoted(value: str) -> str:
    """Plain text in Hydra's grammar."""
    escaped = value.replace("'", "\\'")
    return f"'{escaped}'"


def _compose_run(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a run, with what may be missing there taken from today's ``conf/``."""
    from omegaconf import OmegaConf, open_dict

    from ddo_modulus.cli.experiment import CONFIG, open_run

    at = [override for override in overrides if override.startswith("out=")]
    out = Path(complete("resume", load(CONF, "resume", at)).out)
    open_run(out)
    more = [override for override in overrides if override not in at]
    today = load(CONF, "train", ["~experiment", "~operator"])
    # What was said when the run was started is not said again.
    flow = [f"out={quoted(str(out))}", "resume=true", "overwrite=false"]
    config = load(out, Path(CONFIG).stem, [*flow, *more], "resume")
    with open_dict(config):
        OmegaConf.set_struct(today, False)  # what only another version knows is told later
        for section in _COMMON:
            config[section] = OmegaConf.merge(today[section], config[section])
    return complete("resume", config)
