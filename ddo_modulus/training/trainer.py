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
from ddo_modulus.random import Purpose, generator
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
    broadcast,
    gather,
    initialize_distributed,
    together,
    vote,
)
from ddo_modulus.training.evaluation import Batch, draw_samples, validation_loss
from ddo_modulus.training.gradients import FlatGradients
from ddo_modulus.training.loss import DenoisingLoss, noise_levels, white_noise
from ddo_modulus.training.meter import Meter, mean
from ddo_modulus.training.reporting import Reporter
from ddo_modulus.training.signals import StopSignals

#: What a rank that cannot continue votes; larger than the number of any signal.
_FAILED = 1000


@dataclass
class Fold:
    """Training samples and a linear part that was fitted to others.

    Attributes:
        batches: Yields this rank's share of each batch from a step of the fold on: the places
            ``rank, rank + ranks, ...`` of the global batch.
        linear: The linear part; None for the operator's own.
    """

    batches: Callable[[int], Iterator[Batch]]
    linear: GaussianDenoiser | None = None


class Trainer:
    """Trains an operator on one or many ranks, with averaging, validation and checkpoints.

    After SIGTERM, SIGUSR1 or Ctrl-C on any rank all ranks finish the step, save the state and end
    the run. A second signal ends it at once.

    Args:
        operator: What to train; its linear part is set already.
        folds: Training data. Steps take several folds in turn, each with its own linear part, so
            that the network learns the residual of a linear part *on new data*.
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
        agree()  # an earlier error on one rank ends all of them here, rather than hangs DDP
        self.operator = operator.to(self.device)
        self.folds, self.config, self.out = folds, config, out
        self.validation = None if validation is None else self._to_device(validation)
        self.checkpoints = (
            None if out is None else Checkpoints(out / "checkpoints", config.keep_checkpoints)
        )
        self.reporter = Reporter(config, out, self.manager, log)
        self.loss: nn.Module = DenoisingLoss(self.operator, config.whitening)
        captured = config.captures(self.device)
        if self.ranks > 1:
            broadcast(self.operator)
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
        if self.step == 0 and self.checkpoints is not None:
            with together():
                if self.rank == 0:
                    self.checkpoints.refuse_leftovers()
        count = len(self.folds)
        streams = [  # the steps so far of fold i are i, i + count, ...
            fold.batches(-((i - self.step) // count)) for i, fold in enumerate(self.folds)
        ]
        with StopSignals() as signals, self.reporter:
            self._begin()
            while self.step < self.config.steps:
                stop = self._advance(streams[self.step % count], signals)
                self._after_step()
                if stop and self.step < self.config.steps:
                    self._leave(stop)
        operator = self.averaged()
        if "weights" in self.best:
            operator.load_state_dict(self.best["weights"])
        return operator

    def _begin(self) -> None:
        """Open the loggers and validate the linear part alone, unless a run is continued."""
        with together():
            self.reporter.start(self.step)
        self.reporter.logger.log(
            f"training on {self.ranks} x {self.device.type}, {self.config.precision}, "
            f"optimizer {self.optimizer_name}"
        )
        if self.step == 0:
            self._evaluate({})
        self.meter.restart()

    def _after_step(self) -> None:
        """Report, validate and save, when it is time to."""
        config = self.config
        self.reporter.advance(self.step)
        last = self.step == config.steps
        if last or self.step % config.log_every == 0:
            self._report()
        if last or self.step % config.validate_every == 0:
            self._evaluate({"train": self.meter.mean()})
        if last or self.step % config.checkpoint_every == 0:
            self._save()
            self.meter.restart()

    def _advance(self, stream: Iterator[Batch], signals: StopSignals) -> int:
        """One step; returns the signal after which all ranks shall stop, or 0."""
        failure, batch = None, None
        try:
            batch = self._to_device(next(stream))
        except InputError as error:
            failure = error
        outcome = vote(_FAILED if failure else signals.received)
        sigma, z = self._draw_noise()
        stop = outcome()
        if stop == _FAILED or batch is None:
            agree(failure)
        assert batch is not None
        if len(batch[0]) != self.share:
            raise ValueError(
                f"a batch has {len(batch[0])} samples on rank {self.rank}, not {self.share}"
            )
        loss = self._backward(*batch, sigma, z)
        self._update()
        self.meter.add(loss)
        self.step += 1
        return stop

    def _draw_noise(self) -> tuple[Tensor, Tensor]:
        """Noise levels ``(B,)`` and white noise ``(B, N)`` of this rank's share of the step."""
        config = self.config
        source = generator(config.seed, Purpose.NOISE_LEVELS, self.step, device=self.device)
        sigma = noise_levels(config.batch, config, source, self.device)
        z = white_noise(
            *(config.seed, Purpose.NOISE, self.step),
            batch=config.batch,
            size=self.operator.prior_variance.numel(),
            device=self.device,
            rank=self.rank,
            ranks=self.ranks,
        )
        return sigma[self.rank :: self.ranks], z

    def _backward(self, x0: Tensor, condition: Tensor | None, sigma: Tensor, z: Tensor) -> Tensor:
        """Gradients of a step, averaged over the ranks; returns the loss of this rank."""
        if self.gradients is None:
            self.operator.zero_grad(set_to_none=True)
        else:
            self.gradients.zero()
        fold, count = self.step % len(self.folds), self.config.accumulate
        size = self.share // count
        losses = []
        for i in range(count):
            part = slice(i * size, (i + 1) * size)
            c = None if condition is None else condition[part]
            with self._gradients_shared(i == count - 1):
                losses.append(self._micro_batch(fold, x0[part], sigma[part], z[part], c))
        if self.gradients is not None:
            self.gradients.average(self.ranks)
        return torch.stack(losses).sum()

    def _learn(
        self, fold: int, x0: Tensor, sigma: Tensor, z: Tensor, condition: Tensor | None
    ) -> Tensor:
        """Add the gradients of a micro-batch; returns its part of the loss."""
        with autocast(self.config, self.device):
            loss = self.loss(x0, sigma, z, condition, self.folds[fold].linear)
            loss = loss.mean() / self.config.accumulate
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _to_device(self, batch: Batch) -> Batch:
        """A batch on the device, where most loaders put it already."""
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
        # The scale falls when a step is skipped. Reading it waits for the GPU (only with fp16).
        if self.scaler.get_scale() >= scale:
            self.scheduler.step()
            self.average.update_parameters(self.operator)

    def _gradients_shared(self, shared: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks exchange gradients once a step, in the last micro-batch."""
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
            run = self._run()
            extra, saved = self.checkpoints.load(step, self._state(), run, self.device)
            self.step = self._saved = step
            self.history, self.best = extra["history"], extra["best"]
            self.meter.losses, self.average.count = extra["losses"], extra["averaged"]
            self._log_changes(saved["trainer"], run["trainer"])
        self._restore_settings()
        return True

    def _log_changes(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Log the settings that differ from those of the checkpoint."""
        changes = [
            f"{key} {before[key]} -> {value}"
            for key, value in now.items()
            if key in before and before[key] != value
        ]
        if changes:
            self.reporter.logger.log(f"resuming with other settings: {', '.join(changes)}")

    def _restore_settings(self) -> None:
        """Put the present settings in place of those in the states of optimiser and scheduler."""
        self.scheduler.base_lrs = [self.config.learning_rate] * len(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = self.config.learning_rate
            group["lr"] = self.config.learning_rate * self._rate(self.scheduler.last_epoch)
            group["weight_decay"] = self.config.weight_decay

    def _state(self) -> dict[str, Any]:
        """Arguments of PhysicsNeMo's ``save_checkpoint``."""
        return {
            "models": [self.operator, self.average.module],
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler if self.scaler.is_enabled() else None,
        }

    def _run(self) -> dict[str, Any]:
        """What is trained, and how, as it is after a round trip through JSON."""
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

        If it cannot be written, training continues with a warning: the run only loses time if it
        is interrupted. Before it is left a checkpoint is needed.

        Raises:
            InputError: If it is needed and cannot be written.
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
            state = self._state() | {"metadata": metadata}
            try:
                self.checkpoints.save(self.step, state, self._run())
            except OSError as error:
                message = self._not_saved(self.checkpoints, error)
                if needed:
                    raise InputError(
                        f"{message}; free some space and continue with resume=true"
                    ) from error
                self.reporter.logger.warning(message)
                return
        self._saved = self.step

    def _not_saved(self, checkpoints: Checkpoints, error: OSError) -> str:
        """What is wrong, and which checkpoint there is instead."""
        steps = checkpoints.steps()
        kept = f"that of step {steps[-1]} is there" if steps else "there is none yet"
        return (
            f"no checkpoint at step {self.step}: {checkpoints.folder} cannot be written to "
            f"({error.strerror}); {kept}"
        )

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
