# SPDX-License-Identifier: Apache-2.0
"""Observations and ERA5 as data sources of Earth2Studio.

The names are listed in ``__init__.pyi`` and load on first use; they need
``pip install ddo-modulus[earth2,observations]`` only where they are used.
"""

import lazy_loader

import ddo_modulus.data.grib_libraries  # noqa: F401 - before ecCodes

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
