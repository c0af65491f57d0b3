# SPDX-License-Identifier: Apache-2.0
"""Observations and ERA5 as data sources of Earth2Studio.

The public names are listed in ``__init__.pyi`` and are imported on first use. Only a call of a
source needs ``pip install ddo-modulus[earth2,observations]``; importing it does not.
"""

import lazy_loader

import ddo_modulus.data.grib_libraries  # noqa: F401 - lets ecCodes and pygrib share a process

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
