# SPDX-License-Identifier: Apache-2.0
"""The commands of ``ddo``, and the exit status and the line on stderr that their errors become.

A command is a module of :mod:`ddo_modulus.cli` with a function ``run``, and a file of ``conf/``
with its keys.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ddo_modulus import __version__, cli
from ddo_modulus.cli.configuration import compose
from ddo_modulus.cli.ranks import first_rank
from ddo_modulus.errors import InputError, Stopped

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: In the order of their use. A command's module is imported when it runs, so that help needs no
#: torch.
COMMANDS: dict[str, Callable[[DictConfig], None]] = {
    "simulate": lambda config: cli.simulate.run(config),
    "prepare": lambda config: cli.prepare.run(config),
    "train": lambda config: cli.train.run(config),
    "resume": lambda config: cli.resume.run(config),
    "generate": lambda config: cli.generate.run(config),
    "assimilate": lambda config: cli.assimilate.run(config),
    "export": lambda config: cli.export.run(config),
    "verify": lambda config: cli.verify.run(config),
    "animate": lambda config: cli.animate.run(config),
    "benchmark": lambda config: cli.benchmark.run(config),
}

_USAGE_ERROR, _STOPPED, _INTERRUPTED = 2, os.EX_TEMPFAIL, 130

_HELP, _SWEEP = {"-h", "--help"}, {"-m", "--multirun"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    An expected error is one line on stderr, without a traceback; a defect keeps its traceback.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit status: 0; 2 for a mistake in the input; 75 for a run that a signal stopped and that
            `ddo resume` continues; 130 after Ctrl-C.

    Raises:
        SystemExit: After SIGTERM, with status 143.
    """
    try:
        with _ended_by_sigterm():
            _dispatch(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        return _fail(error, _USAGE_ERROR)
    except Stopped as stopped:
        return _fail(stopped, _STOPPED)
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED)
    return 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that half-written results are removed.

    Training has a handler of its own, which saves the state.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set handlers
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(arguments: list[str]) -> None:
    command, *rest = arguments or ["--help"]
    if command == "--version":
        print(__version__)
    elif command in _HELP:
        from ddo_modulus.cli.help import print_overview

        print_overview(COMMANDS)
    elif command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        choices = ", ".join(COMMANDS)
        raise InputError(f"unknown command {command!r}{meant}; choose one of {choices}")
    elif _HELP & set(rest):
        from ddo_modulus.cli.help import print_keys

        print_keys(command)
    elif _SWEEP & set(rest):
        from ddo_modulus.cli.sweep import sweep

        sweep(command, [argument for argument in rest if argument not in _SWEEP])
    else:
        from ddo_modulus.console import log_to_stderr

        config = compose(command, rest)
        log_to_stderr()
        COMMANDS[command](config)


def _fail(reason: object, status: int) -> int:
    """Print a reason on one line of stderr; ranks fail together, so only the first prints it."""
    if first_rank():
        print(f"ddo: {' '.join(str(reason).split())}", file=sys.stderr)
    return status
