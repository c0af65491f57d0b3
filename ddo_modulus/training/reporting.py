# SPDX-License-Identifier: Apache-2.0
"""Reports of a run: progress on the terminal, curves for the loggers, a history on disk."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from physicsnemo.distributed import DistributedManager
from physicsnemo.utils.logging import LaunchLogger, PythonLogger, RankZeroLoggingWrapper
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddo_modulus.errors import InputError
from ddo_modulus.training.config import TrainerConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, float]


class Reporter:
    """Reports the progress of a run on the first rank, and nothing on the others.

    Use it as a context manager around the run.

    Args:
        config: Which loggers; the number of steps.
        out: Folder of the run, for ``history.jsonl`` and the loggers' files; None writes none.
        manager: Who is the first rank.
        log: Receives the row of each validation.
    """

    def __init__(
        self,
        config: TrainerConfig,
        out: Path | None,
        manager: DistributedManager,
        log: Callable[[Row], None] | None = None,
    ) -> None:
        self.config, self.log = config, log
        self.active = manager.rank == 0
        self.out = out if self.active else None
        self.logger = RankZeroLoggingWrapper(PythonLogger("ddo_modulus.training"), manager)
        self._board: SummaryWriter | None = None
        self._launch = False
        console = Console(stderr=True)
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns, console=console, disable=not (self.active and sys.stderr.isatty())
        )
        self._task = self._bar.add_task("train", total=config.steps, rates="")

    def start(self, step: int) -> None:
        """Open the loggers and show the bar; what was logged of later steps is discarded.

        Raises:
            InputError: If a logger cannot be started.
        """
        self._bar.update(self._task, completed=step)
        self._bar.start()
        if self.out is None:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if "tensorboard" in self.config.loggers:
                from torch.utils.tensorboard import SummaryWriter

                # Events of a step that is trained again after an interruption count once.
                self._board = SummaryWriter(
                    str(self.out / "tensorboard"), purge_step=step + 1 if step else None
                )
            self._start_launch_logger(self.out)
        except Exception as error:  # loggers and their servers raise anything
            raise InputError(
                f"trainer.loggers={list(self.config.loggers)} cannot be started ({error}): fix "
                "it, or leave some out"
            ) from error

    def _start_launch_logger(self, out: Path) -> None:
        """Start MLflow and Weights & Biases as PhysicsNeMo's examples do.

        Both keep their files in ``out`` unless their own environment variables name a server.
        """
        name = out.resolve().name
        if "mlflow" in self.config.loggers:
            from physicsnemo.utils.logging.mlflow import initialize_mlflow

            # A file of SQLite, passed as the address of a server: MLflow 3 refuses plain folders.
            local = f"sqlite:///{(out / 'mlflow.db').resolve()}"
            initialize_mlflow(
                experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", "ddo_modulus"),
                experiment_desc="diffusion operators",
                run_name=name,
                run_desc="ddo train",
                user_name=os.environ.get("USER", "unknown"),
                mode="online",
                tracking_location=os.environ.get("MLFLOW_TRACKING_URI", local),
            )
        if "wandb" in self.config.loggers:
            from physicsnemo.utils.logging.wandb import initialize_wandb

            initialize_wandb(
                project=os.environ.get("WANDB_PROJECT", "ddo_modulus"),
                entity=os.environ.get("WANDB_ENTITY"),
                name=name,
                group=name,  # without one, PhysicsNeMo asks all ranks for it
                mode=os.environ.get("WANDB_MODE", "offline"),
                results_dir=str(out.resolve()),
            )
        self._launch = bool({"mlflow", "wandb"} & set(self.config.loggers))
        if self._launch:
            LaunchLogger.initialize(
                use_wandb="wandb" in self.config.loggers,
                use_mlflow="mlflow" in self.config.loggers,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()
        if "wandb" in self.config.loggers and self._launch:
            import wandb

            wandb.finish()

    def advance(self, step: int) -> None:
        """Show that steps are done."""
        self._bar.update(self._task, completed=step)

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the training curves."""
        loss, rate = values["train"], values["samples_per_second"]
        self._bar.update(self._task, rates=f"loss {loss:.4f}  {rate:,.0f} samples/s")
        self._scalars("train", step, values)

    def validated(self, row: Row, history: list[Row]) -> None:
        """Report a validation.

        Args:
            row: Its numbers.
            history: All rows so far, this one included.
        """
        if not self.active:
            return
        if self.log is not None:
            self.log(row)
        self.say(line(row))
        step = int(row["step"])
        self._scalars("validation", step, {k: v for k, v in row.items() if k != "step"})
        if self.out is not None:
            text = "".join(json.dumps(entry) + "\n" for entry in history)
            with self._spared("history.jsonl"):
                (self.out / "history.jsonl").write_text(text)

    def say(self, text: str) -> None:
        """Print a line on the terminal, above the bar if there is one."""
        if self._bar.live.is_started and not self._bar.disable:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            self.logger.log(text)

    def figure(self, step: int, path: Path) -> None:
        """Add a figure (PNG)."""
        if self._board is not None:
            from matplotlib.image import imread

            self._board.add_image("samples", imread(path)[..., :3], step, dataformats="HWC")

    def _scalars(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        if self._board is not None:
            with self._spared("tensorboard"):
                for name, value in values.items():
                    self._board.add_scalar(f"{group}/{name}", value, step)
                self._board.flush()
        if self._launch:
            with self._spared("mlflow or wandb"), LaunchLogger(group, epoch=step) as logger:
                logger.log_epoch(dict(values))

    @contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        """Turn errors into warnings: a full disk must not end the run for a point of a curve."""
        try:
            yield
        except Exception as error:
            self.logger.warning(f"{what}: nothing written ({type(error).__name__}: {error})")


def line(row: Row) -> str:
    """A row of numbers as text."""
    parts = [f"step {int(row['step'])}"]
    if "train" in row:
        parts.append(f"train {row['train']:.4f}")
    parts += [f"{k} {v:.4f}" for k, v in row.items() if k.startswith("validation")]
    if "samples_per_second" in row:
        parts.append(f"{row['samples_per_second']:,.0f} samples/s")
    return "  ".join(parts)
