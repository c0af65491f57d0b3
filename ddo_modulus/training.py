# SPDX-License-Identifier: Apache-2.0
r"""Training of diffusion operators.

Axes: ``B`` batch, ``C`` channel, ``H W`` grid, ``N`` modes.

The loss is the squared error of the network's output in the coordinates of the linear part,

.. math:: \ell = \sum_k p_k \left(F_k - \frac{a^0_k - w_k a_k}{c_{out,k}}\right)^2, \qquad
    p_k \propto v_k^{1 - q}, \quad \sum_k p_k = 1,

with :math:`v` the posterior variance of the linear denoiser: 1 for the linear denoiser itself. With
``q = 1`` all modes count alike; with ``q = 0`` they count by their variance, as in the mean square
error of the state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from physicsnemo.distributed import DistributedManager
from physicsnemo.utils.checkpoint import load_checkpoint, save_checkpoint
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ddo_modulus.denoiser import DiffusionOperator, GaussianDenoiser
from ddo_modulus.errors import InputError

Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class TrainerConfig:
    """How to train.

    Attributes:
        steps: Optimiser steps.
        batch: Samples in a step, over all ranks.
        learning_rate: Peak; warmed up linearly, then decayed along a cosine to zero.
        warmup: Steps of warm-up.
        weight_decay: Of AdamW.
        clip: Largest norm of the gradient.
        ema: Averaging window of the weights, as a fraction of the steps so far (power-function
            EMA: Karras et al. 2024, arXiv 2312.02696); the average is what is validated and saved.
        precision: ``"bf16"`` (autocast in the network) or ``"fp32"``.
        compile: Whether to compile the loss.
        sigma_min: Least noise level trained on; levels are drawn log-uniformly, stratified.
        sigma_max: Largest noise level.
        whitening: The ``q`` of the loss.
        validate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        keep_best: Whether to end with the averaged weights that validated best, not the last.
        seed: Of weights, data order and noise.
    """

    steps: int = 10_000
    batch: int = 128
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.1
    precision: str = "bf16"
    compile: bool = False
    sigma_min: float = 0.02
    sigma_max: float = 80.0
    whitening: float = 0.5
    validate_every: int = 1000
    checkpoint_every: int = 1000
    keep_best: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise InputError(f"precision must be 'bf16' or 'fp32', got {self.precision!r}")
        for name in ("steps", "batch", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"trainer.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise InputError("trainer.sigma_min must be positive and below sigma_max")


class DenoisingLoss(nn.Module):
    """Denoising loss of an operator, relative to its linear part.

    Args:
        operator: The operator.
        whitening: The ``q`` of the module's equation.
    """

    def __init__(self, operator: DiffusionOperator, whitening: float) -> None:
        super().__init__()
        self.operator, self.whitening = operator, whitening

    def forward(
        self,
        x0: Float[Tensor, "B C H W"],
        sigma: Float[Tensor, " B"],
        z: Float[Tensor, "B N"],
        condition: Tensor | None = None,
        linear: GaussianDenoiser | None = None,
    ) -> Float[Tensor, " B"]:
        """Loss of each sample.

        Args:
            x0: Clean states.
            sigma: Noise levels.
            z: White noise; rotations leave its law alone, so it serves as coordinates directly.
            condition: As the operator takes it.
            linear: Linear part to use instead of the operator's own (cross-fitting).
        """
        linear = self.operator.linear if linear is None else linear
        a0 = linear.modes(x0)
        a = a0 + sigma[:, None] * z
        variance = linear.posterior_variance(sigma)
        target = (a0 - a * linear.gain(sigma)) / variance.sqrt()
        shape = (x0.shape[-2], x0.shape[-1])
        output = self.operator.residual(a, sigma, shape, condition, linear)
        weight = variance ** (1 - self.whitening)
        return (weight * (output - target).square()).sum(1) / weight.sum(1)


def noise_levels(
    count: int, config: TrainerConfig, generator: torch.Generator, device: torch.device
) -> Float[Tensor, " B"]:
    """Log-uniform noise levels, one in each of ``count`` equal strata."""
    share = torch.rand(count, generator=generator, device=generator.device)
    quantile = (torch.arange(count, device=share.device) + share) / count
    low, high = math.log(config.sigma_min), math.log(config.sigma_max)
    return (low + (high - low) * quantile).exp().to(device)


@dataclass
class Fold:
    """Training samples and the linear part that has not seen them (None: the operator's own)."""

    batches: Callable[[int], Iterator[tuple[Tensor, Tensor | None]]]
    linear: GaussianDenoiser | None = None


class Trainer:
    """Trains an operator on one or many ranks, with averaging, validation and checkpoints.

    Args:
        operator: What to train; its linear part is set already.
        folds: Training data. With several, steps take them in turn, each with its own linear
            part, so that the network learns the residual of a linear part *on new data*.
        validation: States and condition to validate on, or None.
        config: How to train.
        out: Folder for checkpoints; None keeps none.
        log: Receives a row of numbers at each validation.
    """

    def __init__(
        self,
        operator: DiffusionOperator,
        folds: Sequence[Fold],
        validation: tuple[Tensor, Tensor | None] | None,
        config: TrainerConfig,
        out: Path | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        initialize_distributed()
        self.manager = DistributedManager()
        self.device = self.manager.device
        self.operator = operator.to(self.device)
        self.folds, self.validation, self.config = folds, validation, config
        self.out, self.log = out, log
        self.loss: nn.Module = DenoisingLoss(self.operator, config.whitening)
        if config.compile:
            self.operator.linear.modes(next(folds[0].batches(0))[0])  # fill the caches first
            self.operator.network.compile()
        if self.manager.world_size > 1:
            self.loss = nn.parallel.DistributedDataParallel(self.loss)
        self.optimizer = torch.optim.AdamW(
            self.operator.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.operator, multi_avg_fn=self._averaging, use_buffers=False
        )
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"validation": math.inf}

    def run(self) -> DiffusionOperator:
        """Train to the end; returns the operator with averaged weights."""
        config, rank = self.config, self.manager.rank
        count = len(self.folds)
        streams = [  # fold i has served the steps i, i + count, ... so far
            fold.batches(-((i - self.step) // count)) for i, fold in enumerate(self.folds)
        ]
        began, first = time.perf_counter(), self.step
        with _bar(self.manager.rank == 0) as bar:
            task = bar.add_task("train", total=config.steps, completed=self.step)
            if self.step == 0:  # the linear part alone
                self._report({"step": 0} | self.validate())
            while self.step < config.steps:
                fold = self.step % count
                x0, condition = next(streams[fold])
                generator = torch.Generator(self.device)
                generator.manual_seed(hash((config.seed, self.step, rank)) % 2**63)
                sigma = noise_levels(len(x0), config, generator, self.device)
                size = self.operator.prior_variance.numel()
                z = torch.randn(len(x0), size, generator=generator, device=self.device)
                with self._autocast():
                    loss = self.loss(x0, sigma, z, condition, self.folds[fold].linear).mean()
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.operator.parameters(), config.clip)
                self.optimizer.step()
                self.scheduler.step()
                self.average.update_parameters(self.operator)
                self.step += 1
                bar.advance(task)
                last = self.step == config.steps
                if last or self.step % config.validate_every == 0:
                    rate = (self.step - first) * config.batch / (time.perf_counter() - began)
                    row = {"step": self.step, "train": loss.item(), "samples_per_second": rate}
                    bar.update(task, description=f"train {row['train']:.3f}")
                    self._report(row | self.validate())
                if last or self.step % config.checkpoint_every == 0:
                    self._save()
        operator = self.averaged()
        if "weights" in self.best:
            operator.load_state_dict(self.best["weights"])
        return operator

    def _report(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if self.log is not None and self.manager.rank == 0:
            self.log(row)
        if self.config.keep_best and row.get("validation", math.inf) < self.best["validation"]:
            weights = {k: v.clone() for k, v in self.averaged().state_dict().items()}
            self.best = row | {"weights": weights}

    def averaged(self) -> DiffusionOperator:
        """The operator with the averaged weights in place of the last ones."""
        operator = self.average.module
        assert isinstance(operator, DiffusionOperator)
        return operator.eval()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the averaged weights on the validation data, mean and by noise level."""
        if self.validation is None:
            return {}
        x0, condition = self.validation
        config = self.config
        loss = DenoisingLoss(self.averaged(), config.whitening)
        generator = torch.Generator(self.device).manual_seed(config.seed)
        order = torch.randperm(len(x0), generator=torch.Generator().manual_seed(config.seed))
        values, levels = [], []
        for chosen in order.split(config.batch):
            chosen = chosen.to(self.device)
            sigma = noise_levels(len(chosen), config, generator, self.device)
            size = (len(chosen), self.operator.prior_variance.numel())
            z = torch.randn(size, generator=generator, device=self.device)
            part = None if condition is None else condition[chosen]
            with self._autocast():
                values.append(loss(x0[chosen], sigma, z, part))
            levels.append(sigma)
        value, level = torch.cat(values), torch.cat(levels).log10()
        row = {"validation": float(value.mean())}
        for low in range(math.floor(math.log10(config.sigma_min)), 2):
            inside = (level >= low) & (level < low + 1)
            if inside.any():
                row[f"validation_1e{low}"] = float(value[inside].mean())
        return row

    def resume(self) -> bool:
        """Continue from the last checkpoint in ``out``; False if there is none."""
        if self.out is None or not (self.out / "checkpoints").is_dir():
            return False
        extra: dict[str, Any] = {}
        self.step = load_checkpoint(
            self.out / "checkpoints",
            models=[self.operator],
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            metadata_dict=extra,
            device=self.device,
        )
        if self.step:
            self.average.load_state_dict(extra["average"])
            self.history, self.best = extra["history"], extra["best"]
        return self.step > 0

    def _save(self) -> None:
        if self.out is None or self.manager.rank != 0:
            return
        save_checkpoint(
            self.out / "checkpoints",
            models=[self.operator],
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            epoch=self.step,
            metadata={
                "average": self.average.state_dict(),
                "history": self.history,
                "best": self.best,
            },
        )

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(self.config.warmup, 1))
        return warm * 0.5 * (1 + math.cos(math.pi * min(step / self.config.steps, 1.0)))

    @torch.no_grad()
    def _averaging(self, averages: Tensors, current: Tensors, count: Tensor | int) -> None:
        # Power-function weights t^gamma with gamma such that the window is ema * t wide.
        share = min(1.0, 1.0 / (self.config.ema * (float(count) + 1)))
        torch._foreach_lerp_(averages, current, share)


def initialize_distributed() -> None:
    """Start PhysicsNeMo's ``DistributedManager``, unless it runs already."""
    if not DistributedManager.is_initialized():
        DistributedManager.initialize()


def _bar(visible: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), disable=not visible)
