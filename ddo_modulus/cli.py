# SPDX-License-Identifier: Apache-2.0
"""Command line: ``ddo COMMAND key=value ...``.

Every command is a module of :mod:`ddo_modulus.commands` with a function ``run``, and a file of
``conf/`` with its keys, which Hydra composes with the groups that it names.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ddo_modulus.errors import InputError, Stopped

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parent / "conf"

COMMANDS = {
    "simulate": "make training and test data with a simulator",
    "prepare": "turn GRIB, netCDF or zarr into a training store",
    "train": "train a diffusion operator",
    "assimilate": "draw ensembles of states given observations",
    "verify": "score analyses against the truth",
}

# Rank and number of ranks, as torchrun, srun and mpirun tell them.
_RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NPROCS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)

# 75 is EX_TEMPFAIL of sysexits.h: try again.
_USAGE_ERROR, _STOPPED, _INTERRUPTED = 2, 75, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit status: 0, 2 for a mistake in the input (one line on stderr tells which), 75 for a
        run that a signal stopped and that `resume=true` continues, 130 when interrupted. Anything
        unexpected keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview())
        elif arguments[0] == "--version":
            from ddo_modulus import __version__

            print(__version__)
        elif {"-h", "--help"} & set(arguments):
            _print_keys(_command(arguments[0]))
        else:
            config = compose(_command(arguments[0]), arguments[1:])
            logging.basicConfig(format="%(message)s")
            logging.getLogger("ddo_modulus").setLevel(logging.INFO)
            import_module(f"ddo_modulus.commands.{arguments[0]}").run(config)
    except InputError as error:
        _tell(error)
        return _USAGE_ERROR
    except Stopped as stopped:
        _tell(stopped)
        return _STOPPED
    except KeyboardInterrupt:
        _tell("interrupted")
        return _INTERRUPTED
    return 0


def _tell(what: object) -> None:
    """One line on stderr; from one rank if there are several, which all know the same."""
    for rank, count in _RANKS:
        if os.environ.get(count, "1") != "1" and os.environ.get(rank, "0") != "0":
            return
    print(f"ddo: {' '.join(str(what).split())}", file=sys.stderr)


def compose(command: str, overrides: Sequence[str]) -> DictConfig:
    """Configuration of a command.

    Args:
        command: One of :data:`COMMANDS`.
        overrides: ``key=value`` in Hydra's grammar; a value that does not parse is plain text.

    Raises:
        InputError: On an argument of another form, an unknown key or choice, or a missing key.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose(command, [_parsable(override) for override in overrides])
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        told = str(error).split("\nTo append")[0].split("\nConfig search path")[0]
        told = re.sub(r"\s*Available options.*:\s*", "; choose one of ", told)
        told = re.sub(r"Could not override '(.+)'\.?", r"unknown key '\1'", told)
        raise InputError(f"{told} (`ddo {command} --help` lists all keys)") from error
    if missing:
        needed = " ".join(f"{key}=..." for key in missing)
        raise InputError(f"{command} needs {needed} (`ddo {command} --help` tells the meaning)")
    return config


def _parsable(override: str) -> str:
    """Quote a value that is not of Hydra's grammar, such as a path with brackets."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not re.match(r"[\w+~@./-]*\w=", override) or override.startswith("-"):
        raise InputError(f"{override!r} is not of the form key=value")
    try:
        if not OverridesParser.create().parse_override(override).is_sweep_override():
            return override
    except HydraException:
        pass
    key, _, value = override.partition("=")
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def _command(name: str) -> str:
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
    return name


def _overview() -> str:
    lines = [f"  {name:<12}{meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ddo COMMAND key=value ...",
            "",
            *lines,
            "",
            "`ddo COMMAND --help` lists a command's keys, their defaults and their meaning.",
        ]
    )


def _print_keys(command: str) -> None:
    """Print the YAML of a command and of the groups that it includes, comments and all."""
    import yaml
    from rich.console import Console
    from rich.syntax import Syntax

    console = Console(soft_wrap=True, highlight=False)

    def show(path: Path) -> None:
        hidden = r"^# (SPDX|@package).*\n|^defaults:\n(  - .*\n)+"
        text = re.sub(hidden, "", path.read_text(), flags=re.M).strip()
        style = Syntax(text, "yaml", background_color="default", word_wrap=True)
        console.print(style if console.is_terminal else text, markup=False)

    console.print(f"usage: ddo {command} key=value ...\n", markup=False)
    path = CONF / f"{command}.yaml"
    show(path)
    for entry in yaml.safe_load(path.read_text()).get("defaults", []):
        for group, default in entry.items() if isinstance(entry, dict) else ():
            choices = sorted(p.stem for p in (CONF / group).glob("*.yaml"))
            for choice in choices if default == "???" else [default]:
                file = CONF / group / f"{choice}.yaml"
                prefix = "" if "@package _global_" in file.read_text() else f"{group}."
                heading = f"# {group}={choice}, one of {', '.join(choices)}; keys {prefix}KEY=..."
                console.print(f"\n{heading}", markup=False)
                show(file)


if __name__ == "__main__":
    sys.exit(main())
