# SPDX-License-Identifier: Apache-2.0
"""Checks of single options; a refusal names the key of the configuration and its value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ddo_modulus.errors import InputError


def whole_number(key: str, value: object, least: int = 0) -> None:
    """Refuse what is no whole number, or below ``least``.

    Raises:
        InputError: Then.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{key} must be a whole number, got {value!r}")
    if value < least:
        raise InputError(f"{key} must be at least {least}, got {value}")


def positive_number(key: str, value: object, *, zero: bool = False) -> None:
    """Refuse what is no finite number above zero (or zero, if that is allowed).

    Raises:
        InputError: Then.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key} must be a number, got {value!r}")
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        sign = "not be negative" if zero else "be positive"
        raise InputError(f"{key} must {sign}, got {value}")


def choice(key: str, value: object, choices: Sequence[bool | str]) -> None:
    """Refuse what is not one of the choices.

    Raises:
        InputError: Then.
    """
    # 1 == True, but it is no switch.
    if not any(value == one and type(value) is type(one) for one in choices):
        names = ", ".join(str(one).lower() for one in choices)
        raise InputError(f"{key} must be one of {names}, got {value!r}")


def date(key: str, value: object) -> None:
    """Refuse what is neither None nor a date or time in ISO 8601.

    Raises:
        InputError: Then.
    """
    try:
        if value is not None:
            np.datetime64(str(value))
    except ValueError as error:
        raise InputError(f"{key}={value} is no date; write it as 2019-03-27T06:00") from error
