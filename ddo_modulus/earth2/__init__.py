# SPDX-License-Identifier: Apache-2.0
"""Components for Earth2Studio (``pip install ddo-modulus[earth2]``).

The names are listed in ``__init__.pyi`` and load on first use, so that this module can be imported
without Earth2Studio. A component asked for without it raises
:class:`~ddo_modulus.earth2.host.MissingEarth2Studio`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
