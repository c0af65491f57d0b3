# SPDX-License-Identifier: Apache-2.0
"""Training of diffusion operators, on one process or many; interrupted runs resume bit for bit.

Start with :mod:`.procedure`. It takes a :class:`Recipe` (:mod:`.recipe`: what to train,
and how) and :class:`TrainingData` (:mod:`.data`: samples, normalization, task and grid), fits the
linear part (:mod:`.linear_prior`) and runs the :class:`Trainer` (:mod:`.trainer`).
"""

from ddo_modulus.training.checkpoint import Checkpoints
from ddo_modulus.training.config import TrainerConfig
from ddo_modulus.training.data import TrainingData
from ddo_modulus.training.distributed import initialize_distributed, session
from ddo_modulus.training.linear_prior import fit_linear
from ddo_modulus.training.loss import DenoisingLoss, noise_levels
from ddo_modulus.training.procedure import train
from ddo_modulus.training.recipe import Recipe
from ddo_modulus.training.trainer import Fold, Trainer

__all__ = [
    "Checkpoints",
    "DenoisingLoss",
    "Fold",
    "Recipe",
    "Trainer",
    "TrainerConfig",
    "TrainingData",
    "fit_linear",
    "initialize_distributed",
    "noise_levels",
    "session",
    "train",
]
