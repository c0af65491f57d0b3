# SPDX-License-Identifier: Apache-2.0
"""Posteriors: a prior and observations in, a prior out. One method a file."""

from ddo_modulus.posterior.background import Background
from ddo_modulus.posterior.inflation import Inflated, Innovations, innovation_inflation
from ddo_modulus.posterior.moment_matching import MomentMatching
from ddo_modulus.posterior.system import AnalysisSystem

__all__ = [
    "AnalysisSystem",
    "Background",
    "Inflated",
    "Innovations",
    "MomentMatching",
    "innovation_inflation",
]
