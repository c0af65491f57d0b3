# SPDX-License-Identifier: Apache-2.0
"""Posteriors: a denoiser and observations in, a denoiser out. One method a file."""

from ddo_modulus.posterior.background import Background
from ddo_modulus.posterior.inflation import Inflated, Innovations, innovation_inflation
from ddo_modulus.posterior.moment_matching import MomentMatching

__all__ = ["Background", "Inflated", "Innovations", "MomentMatching", "innovation_inflation"]
