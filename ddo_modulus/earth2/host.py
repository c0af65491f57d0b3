# SPDX-License-Identifier: Apache-2.0
"""Imports of Earth2Studio, with an error that says how to install it."""

from collections.abc import Iterator
from contextlib import contextmanager

from ddo_modulus.errors import InputError


class MissingEarth2Studio(InputError, ImportError):  # noqa: N818 - says what is missing
    """A component was asked for in an environment that has no Earth2Studio."""


@contextmanager
def needs_earth2studio() -> Iterator[None]:
    """Wrap imports of Earth2Studio.

    Raises:
        MissingEarth2Studio: If Earth2Studio itself is what cannot be found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "earth2studio":
            raise
        raise MissingEarth2Studio(
            "this needs Earth2Studio, which is not installed: pip install ddo-modulus[earth2]"
        ) from error
