# SPDX-License-Identifier: Apache-2.0
"""Components for Earth2Studio (``pip install ddo-modulus[earth2]``).

The names load on first use, so that this module can be imported without Earth2Studio. A component
asked for without it raises :class:`MissingEarth2Studio`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    from ddo_modulus.earth2.assimilation import DDOAssimilation as DDOAssimilation
    from ddo_modulus.earth2.packaged import PackagedModel as PackagedModel
    from ddo_modulus.earth2.packaged import fetch_package as fetch_package
    from ddo_modulus.earth2.perturbation import (
        GaussianFieldPerturbation as GaussianFieldPerturbation,
    )
    from ddo_modulus.earth2.super_resolution import DDOSuperResolution as DDOSuperResolution

_MODULE_OF = {
    "DDOAssimilation": "assimilation",
    "DDOSuperResolution": "super_resolution",
    "GaussianFieldPerturbation": "perturbation",
    "PackagedModel": "packaged",
    "fetch_package": "packaged",
}


class MissingEarth2Studio(InputError, ImportError):  # noqa: N818 - says what is missing
    """A component was asked for in an environment that has no Earth2Studio."""


@contextmanager
def needs_earth2studio() -> Iterator[None]:
    """Wrap the imports of Earth2Studio in a module of this package.

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


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
