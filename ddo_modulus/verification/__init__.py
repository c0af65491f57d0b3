# SPDX-License-Identifier: Apache-2.0
"""Verification: ensembles against the truth, distributions of fields against each other.

`scores` compares an ensemble with the true state, `innovations` an analysis with the observations.
The other modules compare distributions: those of generated and of true fields, which are not the
same states. `comparison` puts them together. The public names are listed in ``__init__.pyi``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
