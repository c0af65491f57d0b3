# SPDX-License-Identifier: Apache-2.0
"""Several runs from one command line: ``ddo train -m key=value,value ...``.

Hydra's sweepers and launchers do the work: by default one run after the other in this process,
with ``hydra/launcher=submitit_local`` in processes of this machine, with
``hydra/launcher=submitit_slurm`` as jobs of Slurm. Here are the folder of the sweep, the outcome of
each run, and one line for what went wrong.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from ddo_modulus.cli import train
from ddo_modulus.cli.configuration import (
    CONF,
    complete,
    differences,
    load,
    one_line,
    parsable,
    quoted,
)
from ddo_modulus.cli.options import plain
from ddo_modulus.cli.ranks import first_rank, ranks
from ddo_modulus.cli.run_folder import CONFIG, job_id, open_run, save_dir
from ddo_modulus.cli.schema import SCHEMA, check_keys
from ddo_modulus.console import log_to_stderr, notify, show
from ddo_modulus.errors import InputError, Stopped


class Outcome(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    REFUSED = "refused"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Result:
    """A run of a sweep.

    Attributes:
        number: Position in the sweep, from 0.
        overrides: The arguments that differ between runs.
        folder: Folder of the run.
        outcome: How it ended.
        reason: Why, if it has not finished.
    """

    number: int
    overrides: str
    folder: str
    outcome: Outcome = Outcome.FINISHED
    reason: str = ""


class _StopSweep(BaseException):  # after an `Exception` Hydra would start the next run
    """A signal has stopped a run in this process, and with it the sweep."""


def sweep(command: str, arguments: Sequence[str]) -> None:
    """Train once for each combination of values, in ``SAVE_DIR/<experiment>/<sweep>/<number>``.

    Args:
        command: ``train``.
        arguments: Hydra's overrides; several values are separated by commas.

    Raises:
        InputError: If the arguments are wrong, before any run starts, or if runs were refused.
        Stopped: After a signal; the state of the run in progress is saved.
    """
    if command != "train":
        raise InputError(f"-m is for `ddo train`; `ddo {command}` runs once")
    if ranks() > 1:
        raise InputError(
            "a sweep is started by one process; for several processes in each of its runs use "
            "hydra/launcher=submitit_slurm (or submitit_local) hydra.launcher.tasks_per_node=..."
        )
    overrides = [parsable(argument, sweeps=True) for argument in arguments]
    if any(override.startswith("out=") for override in overrides):
        raise InputError(
            "each run of a sweep has a folder of its own: leave out=... away and set SAVE_DIR"
        )
    parsed = OverridesParser.create().parse_overrides(overrides)
    parsed = [override for override in parsed if not override.is_hydra_override()]
    swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    fixed = {override.get_key_element() for override in parsed} - swept
    options = [
        f"hydra.sweep.dir={quoted(str(_sweep_folder(parsed)))}",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(quoted, sorted(fixed)))}]",
        "hydra.job.config.override_dirname.item_sep=' '",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    results = _launch([*options, *overrides])
    _show(results)
    _raise_failures(results)


def _sweep_folder(overrides: Sequence[Override]) -> Path:
    """A new folder, named by the sweep's experiments; mistakes are found before it exists.

    Only the keys that decide on names, and those with a rule of the schema, are combined, since
    composing takes .15 s: Hydra composes all combinations before the first run anyway.
    """
    choices, checked = [], {"experiment", *SCHEMA["train"]}
    for override in overrides:
        if override.is_discrete_sweep():
            key = override.get_key_element()
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
            choices.append(values if key in checked else values[:1])
        elif not override.is_sweep_override():  # an interval is for other sweepers than Hydra's own
            choices.append([override.input_line or ""])
    configs = [complete("train", load("train", combination)) for combination in product(*choices)]
    for config in configs:
        check_keys("train", config)
    return save_dir() / "+".join(dict.fromkeys(str(config.name) for config in configs)) / job_id()


def _launch(overrides: list[str]) -> list[Result]:
    """Run the sweep, without ``hydra.main``: it would print Hydra's own messages for a mistake."""
    # The trainer saves its state after this signal, not after submitit's default.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    try:
        with hydra.initialize_config_dir(str(CONF), job_name="ddo", version_base="1.3"):
            application = GlobalHydra.instance().hydra
            assert application is not None
            batches = application.multirun("train", run_one, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise one_line("train", error) from error
    except _StopSweep as stop:
        raise Stopped(str(stop)) from stop
    return [run.return_value for batch in batches for run in batch]


def run_one(config: DictConfig) -> Result:
    """A run of a sweep, in the process that its launcher has started.

    Args:
        config: Hydra's configuration of the run; interpolations are still in it.
    """
    job = HydraConfig.get()
    folder, here = Path(job.runtime.output_dir), Path.cwd()
    out = folder.relative_to(here) if folder.is_relative_to(here) else folder
    result = Result(job.job.num, job.job.override_dirname, str(out))
    submitted = "SUBMITIT_EXECUTOR" in os.environ
    if submitted:
        _export_ranks()
    try:
        config = complete("train", config)
        check_keys("train", config)
        config.out = result.folder
        config.resume = _begun(out, config)
        if first_rank():
            notify(f"run {result.number}: {result.overrides}")
        log_to_stderr()
        train.run(config)
    except InputError as error:
        return replace(result, outcome=Outcome.REFUSED, reason=str(error))
    except Stopped as stopped:
        if not submitted:
            raise _StopSweep(
                f"run {result.number} of the sweep: {stopped} (ddo resume out={out})"
            ) from stopped
        if signal.SIGUSR1.name in str(stopped):
            signal.raise_signal(signal.SIGUSR1)  # submitit's handler requeues the job
        return replace(result, outcome=Outcome.STOPPED, reason=str(stopped))
    return result


def _export_ranks() -> None:
    """Set the variables by which the ranks of a submitted job find each other.

    srun has set all but a port, which must differ between jobs that share a node.
    """
    import submitit

    job = submitit.JobEnvironment()
    peers = submitit.helpers.TorchDistributedEnvironment()
    if job.cluster == "slurm":
        os.environ.setdefault("MASTER_PORT", str(peers.master_port))
    elif job.num_tasks > 1:
        peers.export(set_cuda_visible_devices=False, overwrite=True)


def _begun(out: Path, config: DictConfig) -> bool:
    """Whether an earlier start of this very run, requeued or swept again, wrote to the folder."""
    if not (out / CONFIG).exists():
        return False
    changed = differences(plain(open_run(out)), plain(config))
    return set(changed) <= {"resume", "overwrite"}


def _show(results: Sequence[Result]) -> None:
    table = Table("run", "overrides", "outcome", "validation", "folder")
    for result in results:
        loss = _validation(Path(result.folder))
        table.add_row(str(result.number), result.overrides, result.outcome, loss, result.folder)
    show(table)


def _raise_failures(results: Sequence[Result]) -> None:
    for outcome, error in ((Outcome.REFUSED, InputError), (Outcome.STOPPED, Stopped)):
        failed = [result for result in results if result.outcome == outcome]
        if failed:
            reasons = "; ".join(f"run {result.number}: {result.reason}" for result in failed)
            raise error(f"{len(failed)} of {len(results)} runs were {outcome}: {reasons}")


def _validation(out: Path) -> str:
    """Last validation loss of a run, or nothing."""
    try:
        rows = (out / "history.jsonl").read_text().splitlines()
        return f"{float(json.loads(rows[-1])['validation']):.4f}"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
