# SPDX-License-Identifier: Apache-2.0
"""Options of the optimisation, checked before anything long begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from physicsnemo.core.version_check import check_version_spec

from ddo_modulus.checks import FLAG, NOT_NEGATIVE, POSITIVE, Choice, Rule, Whole
from ddo_modulus.errors import InputError

PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("auto", "adamw", "apex")
COMPILE = (False, True, "max-autotune-no-cudagraphs")
CUDA_GRAPH = ("auto", False, True)
#: Names of loggers, and the oldest version of each that PhysicsNeMo, or torch, works with.
LOGGERS = {"tensorboard": "2.15", "mlflow": "2.5.0", "wandb": "0.15"}

_RULES: dict[str, Rule] = {
    **dict.fromkeys(("steps", "batch", "accumulate", "log_every", "validate_every"), Whole(1)),
    **dict.fromkeys(("checkpoint_every", "keep_checkpoints"), Whole(1)),
    "warmup": Whole(),
    "seed": Whole(0, 2**63 - 1),
    **dict.fromkeys(("learning_rate", "clip", "ema", "sigma_max"), POSITIVE),
    **dict.fromkeys(("weight_decay", "whitening", "sigma_min"), NOT_NEGATIVE),
    **dict.fromkeys(("activation_checkpointing", "keep_best", "figure"), FLAG),
    "precision": Choice(PRECISIONS),
    "optimizer": Choice(OPTIMIZERS),
    "compile": Choice(COMPILE),
    "cuda_graph": Choice(CUDA_GRAPH),
}


@dataclass(frozen=True)
class TrainerConfig:
    """How to train.

    Attributes:
        steps: Optimiser steps.
        batch: Samples in a step, over all ranks and micro-batches.
        accumulate: Micro-batches that a rank's share of the batch is processed in, one after the
            other, for batches larger than the memory; no result depends on it beyond rounding.
        learning_rate: Peak; warmed up linearly, then decayed along a cosine to zero.
        warmup: Steps of warm-up.
        weight_decay: Of AdamW.
        clip: Largest norm of the gradient.
        ema: Width of the average of the weights, as a fraction of the steps so far (power-function
            EMA: Karras et al. 2024, arXiv 2312.02696). The average is what is validated and saved.
        optimizer: ``"adamw"`` (torch; one fused kernel on a GPU), ``"apex"`` (NVIDIA Apex's
            FusedAdam), or ``"auto"``: Apex on a GPU where it is installed, else torch's.
        precision: ``"bf16"`` or ``"fp16"`` (autocast in the network; fp16 with a scaled loss), or
            ``"fp32"``.
        compile: Whether to compile the network, or the mode of ``torch.compile``:
            ``"max-autotune-no-cudagraphs"`` times many kernels first.
        cuda_graph: Whether to replay loss and backward pass as one CUDA graph; ``"auto"``: on a
            GPU. (The graphs of ``torch.compile`` would be one for each part of the network.)
        activation_checkpointing: Whether blocks compute their activations again in the backward
            pass instead of keeping them: about a third slower, for a fraction of the memory.
        sigma_min: Least noise level trained on; levels are drawn log-uniformly, stratified.
        sigma_max: Largest noise level.
        whitening: The ``q`` of the loss.
        log_every: Steps between points of the training curves.
        validate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: Newest checkpoints to keep.
        keep_best: Whether to end with the averaged weights that validated best, not the last.
        loggers: Any of ``"tensorboard"``, ``"mlflow"`` and ``"wandb"``.
        figure: Whether to draw samples beside true states at each validation.
        seed: Of weights, data order and noise.

    Raises:
        InputError: On a value out of range, or a choice whose package is not installed.
    """

    steps: int = 10_000
    batch: int = 128
    accumulate: int = 1
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.1
    optimizer: str = "auto"
    precision: str = "bf16"
    compile: bool | str = False
    cuda_graph: bool | str = "auto"
    activation_checkpointing: bool = False
    sigma_min: float = 0.02
    sigma_max: float = 80.0
    whitening: float = 0.5
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_best: bool = False
    loggers: Sequence[str] = ("tensorboard",)
    figure: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            rule.check(f"trainer.{name}", getattr(self, name))
        if not 0 < self.sigma_min < self.sigma_max:
            raise InputError("trainer.sigma_min must be positive and below sigma_max")
        if self.optimizer == "apex" and apex_adam() is None:
            raise InputError(
                "trainer.optimizer=apex needs NVIDIA Apex built with its optimisers "
                "(github.com/NVIDIA/apex; the `apex` of PyPI is another package); choose adamw"
            )
        self._check_loggers()

    def captures(self, device: torch.device) -> bool:
        """Whether steps become CUDA graphs on a device.

        Raises:
            InputError: If they are asked for on a device that has none.
        """
        if self.cuda_graph is True and device.type != "cuda":
            raise InputError("trainer.cuda_graph=true needs a GPU; choose auto or false")
        return self.cuda_graph is not False and device.type == "cuda"

    def share(self, ranks: int) -> int:
        """Samples of one rank in a step.

        Raises:
            InputError: If the batch cannot be divided evenly.
        """
        parts = ranks * self.accumulate
        if self.batch % parts:
            raise InputError(
                f"trainer.batch={self.batch} cannot be shared out to {ranks} ranks with "
                f"trainer.accumulate={self.accumulate}; choose a multiple of {parts}"
            )
        return self.batch // ranks

    def _check_loggers(self) -> None:
        if isinstance(self.loggers, str) or not isinstance(self.loggers, Sequence):
            raise InputError(f"trainer.loggers must be a list, got {self.loggers!r}")
        for name in self.loggers:
            if name not in LOGGERS:
                raise InputError(
                    f"unknown logger {name!r} in trainer.loggers; choose of {', '.join(LOGGERS)}"
                )
            if not check_version_spec(name, LOGGERS[name], hard_fail=False):
                raise InputError(
                    f"trainer.loggers={name} needs a package: pip install '{name}>={LOGGERS[name]}'"
                )


def apex_adam() -> type | None:
    """Apex's FusedAdam, or None where Apex is not installed or another package has its name."""
    try:
        from apex.optimizers import FusedAdam
    except (ImportError, OSError):  # OSError: built for another CUDA
        return None
    return FusedAdam
