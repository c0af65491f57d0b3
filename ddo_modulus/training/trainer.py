# SPDX-License-Identifier: Apache-2.0
"""The training loop.

Axes: ``B`` batch of this rank, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from physicsnemo.distributed import DistributedManager
from torch import Tensor, nn

from ddo_modulus.cuda_graphs import Replay
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.errors import InputError, Stopped
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.training.acceleration import (
    autocast,
    build_optimizer,
    compile_network,
    recompute_activations,
    share_gradients,
)
from ddo_modulus.training.averaging import PowerAverage
from ddo_modulus.training.checkpoint import Checkpoints
from ddo_modulus.training.config import TrainerConfig
from ddo_modulus.training.distributed import (
    agree,
    alike,
    gather,
    initialize_distributed,
    together,
    vote,
)
from ddo_modulus.training.evaluation import Batch, draw_samples, validation_loss
from ddo_modulus.training.gradients import FlatGradients
from ddo_modulus.training.loss import (
    LEVELS,
    NOISE,
    DenoisingLoss,
    noise_levels,
    source,
    white_noise,
)
from ddo_modulus.training.meter import Meter, mean
from ddo_modulus.training.reporting import Reporter
from ddo_modulus.training.signals import StopSignals

#: A vote: this rank cannot go on. Above all numbers of signals.
_FAILED = 1000


@dataclass
class Fold:
    """Training samples and the linear part that has not seen them (None: the operator's own).

    ``batches(start)`` gives this rank's share of each batch from the fold's step ``start`` on:
    the places ``rank, rank + ranks, ...`` of the global batch.
    """

    batches: Callable[[int], Iterator[Batch]]
    linear: GaussianDenoiser | None = None


class Trainer:
    """Trains an operator on one or many ranks, with averaging, validation and checkpoints.

    SIGTERM, SIGUSR1 and Ctrl-C on any rank end the run after the step in progress, on all ranks,
    once its state is saved; a second one ends it at once.

    Args:
        operator: What to train; its linear part is set already.
        folds: Training data. With several, steps take them in turn, each with its own linear
            part, so that the network learns the residual of a linear part *on new data*.
        validation: States and condition to validate on, the same on all ranks, or None.
        config: How to train.
        out: Folder for checkpoints, curves and figures; None keeps none.
        log: Receives a row of numbers at each validation.

    Attributes:
        step: Steps done.
        history: Rows of numbers of all validations.

    Raises:
        InputError: If the batch cannot be shared out to the ranks.
    """

    def __init__(
        self,
        operator: DiffusionOperator,
        folds: Sequence[Fold],
        validation: Batch | None,
        config: TrainerConfig,
        out: Path | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        initialize_distributed()
        self.manager = DistributedManager()
        self.device = self.manager.device
        self.rank, self.ranks = self.manager.rank, self.manager.world_size
        self.share = config.share(self.ranks)
        agree()  # whatever went wrong on one rank before is told here, not waited for in DDP
        self.operator = operator.to(self.device)
        self.folds, self.config, self.out = folds, config, out
        self.validation = None if validation is None else self._here(validation)
        self.checkpoints = (
            None if out is None else Checkpoints(out / "checkpoints", config.keep_checkpoints)
        )
        self.reporter = Reporter(config, out, self.manager, log)
        self.loss: nn.Module = DenoisingLoss(self.operator, config.whitening)
        captured = config.captures(self.device)
        if self.ranks > 1:
            alike(self.operator)
            if not captured:
                self.loss = share_gradients(self.loss)
        self.average = PowerAverage(self.operator, config.ema)  # before the network is changed
        if config.activation_checkpointing:
            recompute_activations(self.operator)
        compile_network(self.operator, config.compile)
        self.optimizer, self.optimizer_name = build_optimizer(self.operator, config, self.device)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.gradients = FlatGradients(self.operator.parameters()) if captured else None
        self._micro_batch = (
            Replay(self._learn, [self.gradients.values]) if self.gradients else self._learn
        )
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"validation": math.inf}
        self.meter = Meter(config.batch, self.ranks, may_skip=self.scaler.is_enabled())
        self._norm: Tensor | None = None
        self._saved = 0  # step of the newest checkpoint

    def run(self) -> DiffusionOperator:
        """Train to the end; returns the operator with averaged weights.

        Raises:
            InputError: If `out` has the checkpoints of another run, or training diverges.
            Stopped: After SIGTERM or SIGUSR1, with the state saved (Ctrl-C: KeyboardInterrupt).
        """
        config, reporter = self.config, self.reporter
        if self.step == 0 and self.checkpoints is not None:
            with together():
                if self.rank == 0:
                    self.checkpoints.refuse_leftovers()
        count = len(self.folds)
        streams = [  # fold i has served the steps i, i + count, ... so far
            fold.batches(-((i - self.step) // count)) for i, fold in enumerate(self.folds)
        ]
        with StopSignals() as signals, reporter:
            with together():
                reporter.start(self.step)
            reporter.logger.log(
                f"training on {self.ranks} x {self.device.type}, {config.precision}, "
                f"optimizer {self.optimizer_name}"
            )
            if self.step == 0:  # the linear part alone
                self._evaluate({})
            self.meter.restart()
            while self.step < config.steps:
                stop = self._advance(streams, signals)
                reporter.advance(self.step)
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    self._report()
                if last or self.step % config.validate_every == 0:
                    self._evaluate({"train": self.meter.mean()})
                if last or self.step % config.checkpoint_every == 0:
                    self._save()
                    self.meter.restart()
                if stop and not last:
                    self._leave(stop)
        operator = self.averaged()
        if "weights" in self.best:
            operator.load_state_dict(self.best["weights"])
        return operator

    def _advance(self, streams: Sequence[Iterator[Batch]], signals: StopSignals) -> int:
        """One step; returns the signal after which all ranks shall stop, or 0."""
        config, fold = self.config, self.step % len(self.folds)
        failure = None
        try:
            x0, condition = self._here(next(streams[fold]))
        except InputError as error:
            failure = error
        outcome = vote(_FAILED if failure else signals.received)
        levels = source(config.seed, LEVELS, self.step, device=self.device)
        sigma = noise_levels(config.batch, config, levels, self.device)[self.rank :: self.ranks]
        z = white_noise(
            *(config.seed, NOISE, self.step),
            batch=config.batch,
            size=self.operator.prior_variance.numel(),
            device=self.device,
            rank=self.rank,
            ranks=self.ranks,
        )
        stop = outcome()
        if stop == _FAILED:
            agree(failure)
        if len(x0) != self.share:
            raise ValueError(f"a batch has {len(x0)} samples on rank {self.rank}, not {self.share}")

        if self.gradients is None:
            self.operator.zero_grad(set_to_none=True)
        else:
            self.gradients.zero()
        losses = []
        size = self.share // config.accumulate
        for i in range(config.accumulate):
            part = slice(i * size, (i + 1) * size)
            given = None if condition is None else condition[part]
            with self._gradients_shared(i == config.accumulate - 1):
                losses.append(self._micro_batch(fold, x0[part], sigma[part], z[part], given))
        if self.gradients is not None:
            self.gradients.average(self.ranks)
        self._update()
        self.meter.add(torch.stack(losses).sum())
        self.step += 1
        return stop

    def _learn(
        self, fold: int, x0: Tensor, sigma: Tensor, z: Tensor, condition: Tensor | None
    ) -> Tensor:
        """Add the gradients of a micro-batch; returns its part of the loss."""
        with autocast(self.config, self.device):
            loss = self.loss(x0, sigma, z, condition, self.folds[fold].linear)
            loss = loss.mean() / self.config.accumulate
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _here(self, batch: Batch) -> Batch:
        """A batch on the device; nothing to do for loaders that put it there."""
        x0, condition = (None if v is None else v.to(self.device, non_blocking=True) for v in batch)
        assert x0 is not None
        return x0, condition

    def _update(self) -> None:
        """Move the weights, unless a gradient has overflowed half precision."""
        self.scaler.unscale_(self.optimizer)
        self._norm = nn.utils.clip_grad_norm_(self.operator.parameters(), self.config.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # The scale falls when a step is skipped. Reading it waits for the GPU, with fp16 alone.
        if self.scaler.get_scale() >= scale:
            self.scheduler.step()
            self.average.update_parameters(self.operator)

    def _gradients_shared(self, shared: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks add up their gradients once a step, in the last micro-batch."""
        if shared or not isinstance(self.loss, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.loss.no_sync()

    def _report(self) -> None:
        """A point of the training curves."""
        if not (losses := self.meter.collect()):
            return
        values = {
            "train": mean(losses),
            "samples_per_second": self.meter.rate(),
            "learning_rate": float(self.scheduler.get_last_lr()[0]),
        }
        if self._norm is not None:
            values["gradient_norm"] = float(self._norm)
        self.reporter.curves(self.step, values)

    def _evaluate(self, row: dict[str, float]) -> None:
        """Validate; add a row to the history and draw a figure."""
        if self.step:
            row["samples_per_second"] = self.meter.rate()
        row = {"step": self.step} | row | self.validate()
        self.history.append(row)
        if self.config.keep_best and row.get("validation", math.inf) < self.best["validation"]:
            weights = {k: v.clone() for k, v in self.averaged().state_dict().items()}
            self.best = row | {"weights": weights}
        self.reporter.validated(row, self.history)
        if self.rank == 0 and self.validation is not None and self.out is not None:
            self._draw(self.out / "samples" / f"step-{self.step:08d}.png", self.validation)
        self.meter.restart()

    def _draw(self, path: Path, validation: Batch) -> None:
        if not self.config.figure:
            return
        try:
            draw_samples(self.averaged(), validation, self.config, path, f"step {self.step}")
            self.reporter.figure(self.step, path)
        except Exception as error:  # a figure is no reason to lose a run
            self.reporter.logger.warning(f"no figure at step {self.step}: {error}")

    def averaged(self) -> DiffusionOperator:
        """The operator with the averaged weights in place of the last ones."""
        return self.average.module

    def validate(self) -> dict[str, float]:
        """Loss of the averaged weights on the validation data, mean and by noise level.

        Ranks share out the work; all get the same numbers, whatever their number.
        """
        if self.validation is None:
            return {}
        return validation_loss(
            self.averaged(), self.validation, self.config, rank=self.rank, ranks=self.ranks
        )

    def resume(self) -> bool:
        """Continue from the newest sound checkpoint in ``out``; False if there are none.

        Raises:
            InputError: If all are damaged, or of another operator.
        """
        if self.checkpoints is None:
            return False
        with together():
            newest = self.checkpoints.newest() if self.rank == 0 else None
        step = gather(newest)[0]  # the first rank looked
        if step is None:
            return False
        with together():
            state, run = self._state(), self._run()
            extra, saved = self.checkpoints.load(step, state, run, self.device)
            self.step = self._saved = step
            self.history, self.best = extra["history"], extra["best"]
            self.meter.losses, self.average.count = extra["losses"], extra["averaged"]
            changed = {
                key: value
                for key, value in run["trainer"].items()
                if key in saved["trainer"] and saved["trainer"][key] != value
            }
        if changed:
            told = ", ".join(f"{k} {saved['trainer'][k]} -> {v}" for k, v in changed.items())
            self.reporter.logger.log(f"resuming with other settings: {told}")
        # They are in the states of optimiser and scheduler; what is asked for now holds.
        self.scheduler.base_lrs = [self.config.learning_rate] * len(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = self.config.learning_rate
            group["lr"] = self.config.learning_rate * self._rate(self.scheduler.last_epoch)
            group["weight_decay"] = self.config.weight_decay
        return True

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds, in the words of PhysicsNeMo."""
        return {
            "models": [self.operator, self.average.module],
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler if self.scaler.is_enabled() else None,
        }

    def _run(self) -> dict[str, Any]:
        """What is trained, and how, as JSON gives it back."""
        run = {
            "operator": self.operator._args["__args__"],
            "optimizer": self.optimizer_name,
            "trainer": asdict(self.config),
            "ranks": self.ranks,
            "torch": torch.__version__,
        }
        return json.loads(json.dumps(run))

    def _save(self, *, needed: bool = False) -> None:
        """Write a checkpoint.

        One that cannot be written costs nothing but time if the run is interrupted later, so
        training goes on with a warning; only before the run is left it is needed.
        """
        if self.checkpoints is None or self._saved == self.step:
            return
        self.meter.collect()
        if self.rank == 0:
            metadata = {
                "averaged": self.average.count,
                "history": self.history,
                "best": self.best,
                "losses": self.meter.losses,
            }
            try:
                self.checkpoints.save(
                    self.step, self._state() | {"metadata": metadata}, self._run()
                )
            except OSError as error:
                steps = self.checkpoints.steps()
                kept = f"that of step {steps[-1]} is there" if steps else "there is none yet"
                told = (
                    f"no checkpoint at step {self.step}: {self.checkpoints.folder} cannot be "
                    f"written to ({error.strerror}); {kept}"
                )
                if needed:
                    raise InputError(
                        f"{told}; free some space and continue with resume=true"
                    ) from error
                self.reporter.logger.warning(told)
                return
        self._saved = self.step

    def _leave(self, number: int) -> None:
        """Save and stop, on all ranks."""
        name = signal.Signals(number).name
        self.reporter.say(f"{name} at step {self.step}: saving (a second one stops at once)")
        with together():
            self._save(needed=True)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        saved = "nothing is saved" if self.checkpoints is None else "continue with resume=true"
        raise Stopped(f"stopped by {name} at step {self.step} of {self.config.steps}; {saved}")

    def _rate(self, step: int) -> float:
        """Learning rate over its peak."""
        warm = min(1.0, (step + 1) / max(self.config.warmup, 1))
        return warm * 0.5 * (1 + math.cos(math.pi * min(step / self.config.steps, 1.0)))
