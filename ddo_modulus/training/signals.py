# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to save its state and exit."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Self

#: Pre-emption and time limits of batch systems, and Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

#: Seconds within which a second signal counts as the same one: launchers pass on what the batch
#: system or the terminal has already sent to the whole group.
_ECHO = 2.0


class StopSignals:
    """Records the first signal; a second one has the effect it had outside of this context.

    Outside of the main thread nothing is recorded, since Python sets handlers only there.

    Attributes:
        received: Number of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._when = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not set from Python, and cannot be set back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            self.received, self._when = number, time.monotonic()
        elif time.monotonic() - self._when > _ECHO:
            self.__exit__()
            signal.raise_signal(number)
