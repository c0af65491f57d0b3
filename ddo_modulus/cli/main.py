# SPDX-License-Identifier: Apache-2.0
"""Command line: ``ddo COMMAND key=value ...``, ``ddo train -m key=value,value ...``.

Every command is a module of :mod:`ddo_modulus.cli` with a function ``run``, and a file of
``conf/`` with its keys, which Hydra composes with the groups that it names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ddo_modulus.cli.application import CONF, compose, execute, first_rank
from ddo_modulus.errors import InputError, Stopped

COMMANDS = {
    "simulate": "make training and test data with a simulator",
    "prepare": "turn GRIB, netCDF or zarr into a training store",
    "train": "train a diffusion operator; with -m, one for each of several values",
    "resume": "go on with a run of `train`",
    "generate": "draw fields from a prior: states, trajectories, or finer ones of coarse",
    "assimilate": "draw ensembles of states given observations",
    "export": "write a prior as ONNX graphs for inference engines",
    "verify": "score analyses or generated fields against the truth",
    "animate": "make a film of a data set or of samples",
    "benchmark": "time posterior ensembles on this machine, engine by engine",
}

# 75 is EX_TEMPFAIL of sysexits.h: try again.
_USAGE_ERROR, _STOPPED, _INTERRUPTED = 2, 75, 130

_SWEEP = {"-m", "--multirun"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit status: 0, 2 for a mistake in the input (one line on stderr tells which), 75 for a
        run that a signal stopped and that `ddo resume` continues, 130 when interrupted. Anything
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
        elif _SWEEP & set(arguments):
            from ddo_modulus.cli.sweep import sweep

            sweep(_command(arguments[0]), [a for a in arguments[1:] if a not in _SWEEP])
        else:
            execute(_command(arguments[0]), compose(arguments[0], arguments[1:]))
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
    if first_rank():
        print(f"ddo: {' '.join(str(what).split())}", file=sys.stderr)


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
