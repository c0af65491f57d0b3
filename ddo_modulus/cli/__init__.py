# SPDX-License-Identifier: Apache-2.0
"""Commands of ``ddo``: a module each, with one function ``run(config)``, loaded on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
