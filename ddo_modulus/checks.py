# SPDX-License-Identifier: Apache-2.0
"""What an option may be; a refusal is one line with the key, the value and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ddo_modulus.errors import InputError


class Rule(Protocol):
    """What values of an option are accepted."""

    def check(self, key: str, value: object) -> None:
        """Refuse any other value.

        Raises:
            InputError: If the value is not accepted.
        """
        ...


@dataclass(frozen=True)
class Whole:
    """Whole numbers of a range.

    Attributes:
        least: Smallest number.
        most: Largest number; None for no limit.
    """

    least: int = 0
    most: int | None = None

    def check(self, key: str, value: object) -> None:
        """See :class:`Rule`."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and _within(float(value), self.least, self.most)):  # type: ignore[arg-type]
            raise InputError(f"{key}={_shown(value)} must be a whole number{_range(self)}")


@dataclass(frozen=True)
class Real:
    """Finite numbers of a range.

    Attributes:
        least: Smallest number; None for no limit.
        most: Largest number; None for no limit.
        above: Number that values must exceed; None for no such limit.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def check(self, key: str, value: object) -> None:
        """See :class:`Rule`."""
        real = isinstance(value, int | float) and not isinstance(value, bool)
        number = float(value) if real else math.nan  # type: ignore[arg-type]
        inside = math.isfinite(number) and _within(number, self.least, self.most)
        if not inside or (self.above is not None and number <= self.above):
            kind = "finite number" if real else "number"
            raise InputError(f"{key}={_shown(value)} must be a {kind}{_range(self)}")


#: Finite numbers above zero.
POSITIVE = Real(above=0)

#: Finite numbers from zero up.
NOT_NEGATIVE = Real(least=0)


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Attributes:
        choices: The values.
    """

    choices: Sequence[bool | str]

    def check(self, key: str, value: object) -> None:
        """See :class:`Rule`."""
        # 1 == True, but it is no switch.
        if not any(value == one and type(value) is type(one) for one in self.choices):
            names = ", ".join(str(one).lower() for one in self.choices)
            raise InputError(f"{key}={_shown(value)} must be one of {names}")


#: A truth value.
FLAG = Choice((False, True))


@dataclass(frozen=True)
class Date:
    """A date or a time in ISO 8601, or None."""

    def check(self, key: str, value: object) -> None:
        """See :class:`Rule`."""
        try:
            if value is not None:
                np.datetime64(str(value))
        except ValueError as error:
            raise InputError(f"{key}={value} is no date; write it as 2019-03-27T06:00") from error


def check_options(rules: Mapping[str, Rule], options: object, section: str = "") -> None:
    """Check attributes of an object of options; those that are None are not set.

    Args:
        rules: Rules by the name of the attribute.
        options: The object.
        section: What messages put before the names, such as ``"trainer."``.

    Raises:
        InputError: If a value is not accepted.
    """
    for name, rule in rules.items():
        value: Any = getattr(options, name)
        if value is not None:
            rule.check(f"{section}{name}", value)


def _within(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _shown(value: object) -> str:
    """A value as a user would type it."""
    text = str(value)
    return repr(value) if isinstance(value, str) and text.strip() != text or not text else text


def _range(rule: Whole | Real) -> str:
    """A range in words, as the end of a sentence."""
    above = rule.above if isinstance(rule, Real) else None
    least, most = rule.least, rule.most
    if least is not None:
        return f", at least {least:g}" if most is None else f" from {least:g} to {most:g}"
    limits = [] if above is None else [f"above {above:g}"]
    limits += [] if most is None else [f"up to {most:g}"]
    return f", {' and '.join(limits)}" if limits else ""
