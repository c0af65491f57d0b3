# SPDX-License-Identifier: Apache-2.0
"""Posteriors: each takes a prior and data, and is a prior itself. One method per file."""

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
