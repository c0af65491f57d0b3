# SPDX-License-Identifier: Apache-2.0
"""Figures, films and coastlines; the public names are listed in ``__init__.pyi``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
