# SPDX-License-Identifier: Apache-2.0
"""Observations and ERA5 as data sources of Earth2Studio.

Names load on first use; importing them needs `pip install ddo-modulus[earth2,observations]` only
where they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import ddo_modulus.data.grib_libraries  # noqa: F401 - before ecCodes

if TYPE_CHECKING:
    from ddo_modulus.earth2.sources.bufr import BufrSource as BufrSource
    from ddo_modulus.earth2.sources.cds import CdsSource as CdsSource
    from ddo_modulus.earth2.sources.era5 import Era5Source as Era5Source
    from ddo_modulus.earth2.sources.era5 import FieldSource as FieldSource
    from ddo_modulus.earth2.sources.mars import MarsSource as MarsSource
    from ddo_modulus.earth2.sources.nnja import NnjaSource as NnjaSource
    from ddo_modulus.earth2.sources.odb import OdbSource as OdbSource

_MODULE_OF = {
    "BufrSource": "bufr",
    "CdsSource": "cds",
    "Era5Source": "era5",
    "FieldSource": "era5",
    "MarsSource": "mars",
    "NnjaSource": "nnja",
    "OdbSource": "odb",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
