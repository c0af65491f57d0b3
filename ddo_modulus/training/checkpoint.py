# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written completely or not at all, and never loaded if damaged.

A checkpoint is a folder ``step-00001234`` with the files of PhysicsNeMo's ``save_checkpoint``,
``run.json`` (what was trained, and how) and ``SHA256SUMS`` (as ``sha256sum -c`` reads it). It is
written under a hidden name, flushed to the disk and renamed, and older ones are removed only after
that: the process may be killed at any moment, and the machine may stop.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from physicsnemo.utils.checkpoint import load_checkpoint, save_checkpoint

from ddo_modulus.diffusion.fingerprint import file_sum
from ddo_modulus.diffusion.stored_prior import check_state
from ddo_modulus.errors import InputError

log = logging.getLogger(__name__)

_DIVERGED = "training diverged (a smaller trainer.learning_rate may help)"
_SUMS, _RUN = "SHA256SUMS", "run.json"


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: Where they are; made when first needed.
        keep: Newest ones to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps that there are checkpoints of, damaged ones included, in ascending order."""
        found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def refuse_leftovers(self) -> None:
        """Guard a new run against the checkpoints of another.

        Raises:
            InputError: If there are any.
        """
        if steps := self.steps():
            raise InputError(
                f"{self.folder} has a run that was at step {steps[-1]}: continue it with "
                "resume=true, discard it with overwrite=true, or choose another out=..."
            )

    def clear(self) -> None:
        """Remove all checkpoints, and what killed runs have left."""
        for step in self.steps():
            self._discard(self.path(step))
        self._sweep()

    def save(self, step: int, state: dict[str, Any], run: dict[str, Any]) -> None:
        """Write a checkpoint, then remove those that are no longer needed.

        Args:
            step: Steps done.
            state: Arguments of PhysicsNeMo's ``save_checkpoint``.
            run: What was trained, and how; JSON.

        Raises:
            OSError: If the disk is full or cannot be written to. Older checkpoints are all there.
            InputError: If a weight is NaN or infinite. Older checkpoints are all there.
        """
        models = state["models"]
        for model in models if isinstance(models, list) else [models]:
            check_state(model.state_dict(), f"no checkpoint of step {step} is written: {_DIVERGED}")
        final = self.path(step)
        new = self.folder / f".{final.name}.new"
        try:
            self._sweep()
            new.mkdir(parents=True)
            save_checkpoint(new, **state, epoch=step)
            (new / _RUN).write_text(json.dumps(run, indent=1) + "\n")
            files = sorted(new.iterdir())
            sums = [f"{file_sum(file)}  {file.name}\n" for file in files]
            (new / _SUMS).write_text("".join(sums))
            for path in (*files, new / _SUMS, new):
                _flush(path)
            if final.exists():  # a damaged one that this run was not continued from
                self._discard(final)
            new.rename(final)
            _flush(self.folder)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(new, ignore_errors=True)
            # torch's writer raises its own error over that of the disk.
            cause = next((e for e in _chain(error) if isinstance(e, OSError)), None)
            if cause is None:
                raise
            raise OSError(cause.errno, os.strerror(cause.errno or 0)) from error
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._prune(step)

    def newest(self) -> int | None:
        """Step of the newest sound checkpoint, or None if there are none.

        Damaged ones are skipped with a warning.

        Raises:
            InputError: If all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            if (flaw := self._flaw(self.path(step))) is None:
                return step
            log.warning("skipping the damaged checkpoint %s: %s", self.path(step), flaw)
        if steps:
            raise InputError(
                f"no checkpoint in {self.folder} is sound; start anew with overwrite=true"
            )
        return None

    def load(
        self, step: int, state: dict[str, Any], run: dict[str, Any], device: torch.device
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load a checkpoint.

        Args:
            step: Steps done.
            state: As for :meth:`save`; less the metadata.
            run: As for :meth:`save`. Its ``operator`` and ``optimizer`` must be what was saved.
            device: Where to.

        Returns:
            The metadata and the ``run`` that were saved.

        Raises:
            InputError: If it cannot be read, or is of another operator or optimiser.
        """
        path = self.path(step)
        try:
            saved = json.loads((path / _RUN).read_text())
            for key in ("operator", "optimizer"):
                _compare(path, key, saved[key], run[key])
            # PhysicsNeMo unpickles anything in the file of states, so check it first.
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(
                path / f"checkpoint.0.{step}.pt"
            )
            if unsafe:
                raise InputError(f"{path} holds more than tensors and numbers: {', '.join(unsafe)}")
            metadata: dict[str, Any] = {}
            load_checkpoint(path, **state, epoch=step, metadata_dict=metadata, device=device)
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError, TypeError, LookupError) as error:
            raise InputError(
                f"{path} cannot be continued from ({' '.join(str(error).split())[:200]}): is it "
                "another version's, or on a disk that not all ranks see? (overwrite=true starts "
                "anew)"
            ) from error
        return metadata, saved

    def _flaw(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, or None."""
        try:
            sums = dict(
                line.split("  ", 1)[::-1] for line in (path / _SUMS).read_text().splitlines()
            )
            if _RUN not in sums:
                return f"{_SUMS} is incomplete"
            for name, expected in sums.items():
                if file_sum(path / Path(name).name) != expected:
                    return f"{name} does not match its checksum"
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _prune(self, step: int) -> None:
        """Keep the newest; those beyond ``step`` are of a run that was not continued from."""
        steps = self.steps()
        past = [other for other in steps if other <= step]
        for other in steps:
            if other not in past[-self.keep :]:
                self._discard(self.path(other))

    def _discard(self, path: Path) -> None:
        """Remove a folder in such a way that no part of it can be taken for a checkpoint."""
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)

    def _sweep(self) -> None:
        """Remove what killed processes have left unfinished."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def _compare(path: Path, key: str, saved: object, present: object) -> None:
    if saved == present:
        return
    difference = f"{saved} there, {present} here"
    if isinstance(saved, dict) and isinstance(present, dict):
        names = [n for n in {**saved, **present} if saved.get(n) != present.get(n)]
        difference = "; ".join(f"{n} is {saved.get(n)} there, {present.get(n)} here" for n in names)
    raise InputError(
        f"{path} is of another {key} ({difference}): give the options of that run, discard it with "
        "overwrite=true, or choose another out=..."
    )


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems flush no folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
