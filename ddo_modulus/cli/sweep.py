# SPDX-License-Identifier: Apache-2.0
"""Several runs from one command line: ``ddo train -m key=value,value ...``.

Hydra's own sweepers and launchers do the work, whichever is installed and chosen: one run after the
other in this process by default, ``hydra/launcher=submitit_local`` for processes of this machine,
``hydra/launcher=submitit_slurm`` for jobs of Slurm.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddo_modulus.cli.application import (
    CONF,
    complete,
    execute,
    explained,
    first_rank,
    load,
    parsable,
    quoted,
    ranks,
)
from ddo_modulus.errors import InputError, Stopped

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

#: Keys that name an experiment.
_NAMES = ("experiment", "name")

#: What a run came to.
_FINISHED, _REFUSED, _STOPPED = "finished", "refused", "stopped"


class _Halt(BaseException):  # no `Exception`: Hydra would go on to the next run
    """A signal that has stopped a run stops the sweep."""


def sweep(command: str, arguments: Sequence[str]) -> None:
    """Train once for each combination of values, in ``SAVE_DIR/<experiment>/<sweep>/<number>``.

    Args:
        command: ``train``.
        arguments: Hydra's overrides; several values are separated by commas.

    Raises:
        InputError: On a mistake in the arguments, before anything is run, or if runs were refused.
        Stopped: After a signal; the state of the run in progress is saved.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if command != "train":
        raise InputError(f"-m is for `ddo train`; `ddo {command}` runs once")
    if ranks() > 1:
        raise InputError(
            "a sweep is started by one process; give each of its runs several with "
            "hydra/launcher=submitit_slurm (or submitit_local) hydra.launcher.tasks_per_node=..."
        )
    overrides = [parsable(argument, sweeps=True) for argument in arguments]
    if any(override.startswith("out=") for override in overrides):
        raise InputError(
            "each run of a sweep has a folder of its own: leave out=... away; SAVE_DIR says where"
        )
    parsed = [
        override
        for override in OverridesParser.create().parse_overrides(overrides)
        if not override.is_hydra_override()
    ]
    swept = {o.get_key_element() for o in parsed if o.is_sweep_override()}
    fixed = {o.get_key_element() for o in parsed} - swept
    options = [
        f"hydra.sweep.dir={quoted(str(_folder(command, parsed)))}",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(quoted, sorted(fixed)))}]",
        "hydra.job.config.override_dirname.item_sep=' '",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    _show(_launch(command, [*options, *overrides]))


def _launch(command: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Run the sweep; what became of each run."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # The trainer saves its state after this signal and not after submitit's default.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    try:
        with hydra.initialize_config_dir(str(CONF), job_name="ddo", version_base="1.3"):
            application = GlobalHydra.instance().hydra
            assert application is not None
            batches = application.multirun(command, run_one, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise explained(command, error) from error
    except _Halt as halt:
        raise Stopped(str(halt)) from halt
    return [job.return_value for batch in batches for job in batch]


def run_one(config: DictConfig) -> dict[str, Any]:
    """A run of a sweep, in whatever process its launcher has started.

    Args:
        config: As Hydra gives it.

    Returns:
        ``number``, ``overrides`` (those that differ between runs), ``folder``, ``outcome`` and
            ``told``, a line on what went wrong.
    """
    from hydra.core.hydra_config import HydraConfig

    job = HydraConfig.get()
    place, here = Path(job.runtime.output_dir), Path.cwd()
    out = str(place.relative_to(here) if place.is_relative_to(here) else place)
    values = job.job.override_dirname
    result = {"number": job.job.num, "overrides": values, "folder": out}
    submitted = "SUBMITIT_EXECUTOR" in os.environ
    if submitted:
        _meet()
    try:
        config = complete("train", config)
        config.out = out
        config.resume = _begun(Path(out), config)
        if first_rank():
            print(f"run {job.job.num}: {values}", file=sys.stderr, flush=True)
        execute("train", config)
    except InputError as error:
        return result | {"outcome": _REFUSED, "told": str(error)}
    except Stopped as stopped:
        if not submitted:
            raise _Halt(
                f"run {job.job.num} of the sweep: {stopped} (ddo resume out={out})"
            ) from stopped
        if signal.SIGUSR1.name in str(stopped):
            signal.raise_signal(signal.SIGUSR1)  # submitit asks for the job to be run again
        return result | {"outcome": _STOPPED, "told": str(stopped)}
    return result | {"outcome": _FINISHED, "told": ""}


def _folder(command: str, overrides: Sequence[Override]) -> Path:
    """A new folder for a sweep; its runs can be composed as far as one can tell beforehand."""
    from ddo_modulus.cli.experiment import job_id, save_dir

    choices: list[Iterable[str]] = []
    for override in overrides:
        line = [override.input_line or ""]
        if override.is_discrete_sweep():
            key = override.get_key_element()
            line = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if key not in _NAMES:
                line = line[:1]
        elif override.is_sweep_override():  # an interval, for other sweepers than Hydra's own
            continue
        choices.append(line)
    names = dict.fromkeys(
        complete(command, load(CONF, command, combination)).name
        for combination in product(*choices)
    )
    return save_dir() / "+".join(map(str, names)) / job_id()


def _begun(out: Path, config: DictConfig) -> bool:
    """Whether the folder is that of an earlier start of this very run."""
    from ddo_modulus.cli.experiment import CONFIG, differences, open_run
    from ddo_modulus.cli.options import plain

    if not (out / CONFIG).exists():
        return False
    changed = differences(plain(open_run(out)), plain(config))
    return not set(changed) - {"resume", "overwrite"}


def _meet() -> None:
    """Tell the ranks of a submitted job of each other, as torchrun would.

    srun tells them all but a port of their own: jobs that share a node need different ones.
    """
    import submitit

    job = submitit.JobEnvironment()
    meeting = submitit.helpers.TorchDistributedEnvironment()
    if job.cluster == "slurm":
        os.environ.setdefault("MASTER_PORT", str(meeting.master_port))
    elif job.num_tasks > 1:
        meeting.export(set_cuda_visible_devices=False, overwrite=True)


def _show(results: Sequence[dict[str, Any]]) -> None:
    """A table of the runs.

    Raises:
        InputError: If runs were refused.
        Stopped: If runs were stopped.
    """
    from rich.table import Table

    from ddo_modulus.console import show

    table = Table("run", "overrides", "outcome", "validation", "folder")
    for result in results:
        loss = _validation(Path(result["folder"]))
        told = "" if loss is None else f"{loss:.4f}"
        row = (str(result["number"]), result["overrides"], result["outcome"], told)
        table.add_row(*row, result["folder"])
    show(table)
    for outcome, error in ((_REFUSED, InputError), (_STOPPED, Stopped)):
        failed = [result for result in results if result["outcome"] == outcome]
        if failed:
            told = "; ".join(f"run {result['number']}: {result['told']}" for result in failed)
            raise error(f"{len(failed)} of {len(results)} runs were {outcome}: {told}")


def _validation(out: Path) -> float | None:
    """Last validation loss of a run, if it has one."""
    try:
        rows = (out / "history.jsonl").read_text().splitlines()
        return float(json.loads(rows[-1])["validation"])
    except (OSError, ValueError, LookupError):
        return None
