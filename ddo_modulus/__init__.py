# SPDX-License-Identifier: Apache-2.0
"""Denoising diffusion operators as priors for Bayesian data assimilation.

The public names are listed in ``__init__.pyi`` and load on first use, so that
``import ddo_modulus`` does not import torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
