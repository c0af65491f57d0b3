# SPDX-License-Identifier: Apache-2.0
"""Options of engines, the same for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from ddo_modulus.errors import InputError

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is made.

    Attributes:
        folder: Folder of exported graphs (``ddo export``). None: one in the user's cache; graphs
            that are missing there are exported first.
        precision: Precision of the network, where it is compiled or still to be exported.
        shape: Grid ``(H, W)`` of the states; the package's if None.
        batch: Largest number of states computed at once.
        report: Called with a line about a step that takes long, or about what was chosen.
    """

    folder: Path | None = None
    precision: Precision = "fp32"
    shape: tuple[int, int] | None = None
    batch: int = 256
    report: Callable[[str], None] = print


def pick_precision(name: object) -> Precision:
    """Precision of a network by name.

    Raises:
        InputError: If there is no such precision.
    """
    if name not in get_args(Precision):
        raise InputError(f"precision={name} must be one of {', '.join(get_args(Precision))}")
    return cast(Precision, name)
