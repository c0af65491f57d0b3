# SPDX-License-Identifier: Apache-2.0
from .assimilation import DDOAssimilation
from .host import MissingEarth2Studio
from .packaged import PackagedModel, fetch_package
from .perturbation import GaussianFieldPerturbation
from .super_resolution import DDOSuperResolution

__all__ = [
    "DDOAssimilation",
    "DDOSuperResolution",
    "GaussianFieldPerturbation",
    "MissingEarth2Studio",
    "PackagedModel",
    "fetch_package",
]
