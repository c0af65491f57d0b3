# SPDX-License-Identifier: Apache-2.0
"""Output on the terminal: lines, tables and progress."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def log_to_stderr() -> None:
    """Print log messages to stderr: INFO and above of this package, warnings of others."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ddo_modulus").setLevel(logging.INFO)


def notify(line: str) -> None:
    """Print a line about work in progress to stderr, without buffering."""
    print(line, file=sys.stderr, flush=True)


def show(table: Table) -> None:
    """Print a table; 200 columns wide if the output is not a terminal, so that no cell wraps."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress on stderr: a bar on a terminal, otherwise a line for each tenth.

    The bar of ``rich`` prints nothing without a terminal, as in the log of a batch job.

    Yields:
        A function to call with the amount of work done and the total.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        tenths = 0

        def advance(done: int, total: int) -> None:
            nonlocal tenths
            if 10 * done // total > tenths:
                tenths = 10 * done // total
                notify(f"{label} {10 * tenths} %")

        yield advance
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
