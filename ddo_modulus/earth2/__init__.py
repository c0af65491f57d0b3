# SPDX-License-Identifier: Apache-2.0
"""Components for Earth2Studio (``pip install ddo-modulus[earth2]``).

The names load on first use, so that this module can be imported without Earth2Studio. A component
asked for without it raises :class:`MissingEarth2Studio`.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
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
    """Wrap imports of Earth2Studio: for an error that says what to install, and for speed.

    Each of its models asks :func:`inspect.stack` for the name of its own file, which reads the
    source of every importing frame as well: six sevenths of the time of ``import
    earth2studio.run``. In this block it gets the frames without their source.

    Raises:
        MissingEarth2Studio: If Earth2Studio itself is what cannot be found.
    """
    host, ours = None, False
    try:
        host = import_module("earth2studio.utils.imports")
        ours = getattr(host, "inspect", None) is inspect  # or a block around this one did it
        if ours:
            vars(host)["inspect"] = _Inspect()
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "earth2studio":
            raise
        raise MissingEarth2Studio(
            "this needs Earth2Studio, which is not installed: pip install ddo-modulus[earth2]"
        ) from error
    finally:
        if host is not None and ours:
            vars(host)["inspect"] = inspect


class _Inspect(ModuleType):
    """The module :mod:`inspect`, but for a stack of frames without lines of source."""

    def __init__(self) -> None:
        super().__init__(inspect.__name__)
        vars(self).update(vars(inspect), stack=self._stack)

    @staticmethod
    def _stack(context: int = 1) -> list[inspect.FrameInfo]:
        frame, frames = inspect.currentframe(), []
        while frame is not None and (frame := frame.f_back) is not None:
            place = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
            frames.append(inspect.FrameInfo(frame, *place, None, None))
        return frames


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
