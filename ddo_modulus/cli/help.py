# SPDX-License-Identifier: Apache-2.0
"""Help: the files of ``conf/``, whose comments explain the commands and their keys.

Hydra's own ``--help`` prints the composed values without these comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from rich.console import Console
from rich.syntax import Syntax

from ddo_modulus.cli.configuration import CONF

#: Lines that are not for users: license, Hydra's directive, list of defaults.
_HIDDEN = re.compile(r"^# (SPDX|@package).*\n|^defaults:\n(  - .*\n)+", re.M)


def print_overview(commands: Iterable[str]) -> None:
    """Print the commands, each with the first sentence of its configuration file."""
    print("usage: ddo COMMAND key=value ...\n")
    for command in commands:
        print(f"  {command:<12}{_text(CONF / f'{command}.yaml').split('.')[0].removeprefix('# ')}")
    print("\n`ddo COMMAND --help` lists a command's keys, their defaults and their meaning.")
    print("`ddo train -m key=value,value ...` trains once with each value.")


def print_keys(command: str) -> None:
    """Print the configuration file of a command and those of the groups that it includes."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"usage: ddo {command} key=value ...\n", markup=False)
    _print_file(console, CONF / f"{command}.yaml")
    for group, choice, choices in _groups(CONF / f"{command}.yaml"):
        path = CONF / group / f"{choice}.yaml"
        prefix = "" if "@package _global_" in path.read_text() else f"{group}."
        heading = f"# {group}={choice}, one of {', '.join(choices)}; keys {prefix}KEY=..."
        console.print(f"\n{heading}", markup=False)
        _print_file(console, path)


def _print_file(console: Console, path: Path) -> None:
    text = _text(path)
    style = Syntax(text, "yaml", background_color="default", word_wrap=True)
    console.print(style if console.is_terminal else text, markup=False)


def _text(path: Path) -> str:
    return _HIDDEN.sub("", path.read_text()).strip()


def _groups(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Each included group, its default (every choice if it has none), and all its choices."""
    for entry in yaml.safe_load(path.read_text()).get("defaults", []):
        for group, default in entry.items() if isinstance(entry, dict) else ():
            choices = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
            for choice in choices if default == "???" else [default]:
                yield group, choice, choices
