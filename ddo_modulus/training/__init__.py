# SPDX-License-Identifier: Apache-2.0
"""Training of diffusion operators: on one process or many, through interruptions, bit for bit."""

from ddo_modulus.training.checkpoint import Checkpoints
from ddo_modulus.training.config import TrainerConfig
from ddo_modulus.training.distributed import initialize_distributed, session
from ddo_modulus.training.loss import DenoisingLoss, noise_levels
from ddo_modulus.training.trainer import Fold, Trainer

__all__ = [
    "Checkpoints",
    "DenoisingLoss",
    "Fold",
    "Trainer",
    "TrainerConfig",
    "initialize_distributed",
    "noise_levels",
    "session",
]
