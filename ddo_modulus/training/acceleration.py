# SPDX-License-Identifier: Apache-2.0
"""What makes steps fast or small: half precision, fused optimisers, compilation, recomputation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.errors import InputError
from ddo_modulus.nn.operator import Block
from ddo_modulus.training.config import TrainerConfig, apex_adam

_BETAS = (0.9, 0.99)


def autocast(config: TrainerConfig, device: torch.device) -> torch.autocast:
    """The precision of the network's products."""
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=config.precision != "fp32")


def build_optimizer(
    operator: DiffusionOperator, config: TrainerConfig, device: torch.device
) -> tuple[torch.optim.Optimizer, str]:
    """AdamW with decoupled weight decay, and which of ``"adamw"`` and ``"apex"`` it is.

    Raises:
        InputError: If Apex is asked for on a CPU.
    """
    if config.optimizer == "apex" and device.type != "cuda":
        raise InputError("trainer.optimizer=apex needs a GPU; choose adamw or auto")
    parameters = list(operator.parameters())
    options = {"lr": config.learning_rate, "betas": _BETAS, "weight_decay": config.weight_decay}
    fused_adam = apex_adam() if config.optimizer != "adamw" and device.type == "cuda" else None
    if fused_adam is not None:
        return fused_adam(parameters, adam_w_mode=True, **options), "apex"
    fused = device.type == "cuda"
    return torch.optim.AdamW(parameters, fused=fused, **options), "adamw"  # type: ignore[arg-type]


def share_gradients(loss: nn.Module) -> nn.parallel.DistributedDataParallel:
    """Have ranks average their gradients. Buffers are constant and need no exchange."""
    data_parallel = nn.parallel.DistributedDataParallel
    parameters = inspect.signature(data_parallel).parameters  # renamed in torch 2.14
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return data_parallel(loss, **options)


def compile_network(operator: DiffusionOperator, mode: bool | str) -> None:
    """Compile the operator's network in place; the names of its weights do not change.

    The rest of the operator is a handful of products, with a linear part that changes from fold to
    fold.
    """
    if mode:
        operator.network.compile(mode=None if mode is True else mode)


class _RecomputingBlock(Block):
    """A block that keeps only its input and recomputes its activations when backpropagating."""

    def forward(
        self, h: Float[Tensor, "B H W C"], embedding: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B H W C"]:
        return checkpoint(
            super().forward, h, embedding, use_reentrant=False, preserve_rng_state=False
        )


def recompute_activations(operator: DiffusionOperator) -> None:
    """Have the blocks of the operator's network keep no activations for the backward pass."""
    for block in operator.network.modules():
        # Their class is changed, since a compiler traces the code of a class once for all blocks;
        # a function bound to each block would be traced for each, or not at all.
        if type(block) is Block:
            block.__class__ = _RecomputingBlock
