# SPDX-License-Identifier: Apache-2.0
"""What commands share: numbers and devices out of a configuration, progress on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ddo_modulus.errors import InputError


def integer(config: DictConfig, key: str, least: int = 1) -> int:
    """A whole number of a configuration.

    Raises:
        InputError: If it is something else, or below ``least``.
    """
    value = OmegaConf.select(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{key}={value} must be a whole number, at least {least}")
    return value


def number(config: DictConfig, key: str) -> float:
    """A number of a configuration.

    Raises:
        InputError: If it is something else.
    """
    value = OmegaConf.select(config, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key}={value} must be a number")
    return float(value)


def flag(config: DictConfig, key: str) -> bool:
    """True or false of a configuration.

    Raises:
        InputError: If it is neither.
    """
    value = OmegaConf.select(config, key)
    if not isinstance(value, bool):
        raise InputError(f"{key}={value} must be true or false")
    return value


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as a dictionary that JSON can hold."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def pick_device(name: str) -> torch.device:
    """A device by name; ``"auto"`` is a GPU if there is one.

    Raises:
        InputError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name} cannot be used here; choose auto, cpu or cuda") from error
    return device


def tell(line: str) -> None:
    """Say on stderr what is being done."""
    print(line, file=sys.stderr, flush=True)


def show(table: Table) -> None:
    """Print a table: as wide as it needs to be where the output is no terminal."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress on stderr: a bar, or a line for each tenth where that is no terminal.

    Yields:
        A function of the work done and its total.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        told = 0

        def tell(done: int, total: int) -> None:
            nonlocal told
            if 10 * done // total > told:
                told = 10 * done // total
                print(f"{label} {10 * told} %", file=sys.stderr, flush=True)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
