# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: where it is, and the record of how the run came about.

``config.yaml``
    The complete configuration, from which ``ddo resume`` continues.
``overrides.yaml``
    The arguments that the run was first started with.
``environment.json``
    An entry for each start of the run: time, arguments, code, packages, machines and job.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from physicsnemo.distributed import DistributedManager

from ddo_modulus.cli.environment import describe_device, environment
from ddo_modulus.errors import InputError
from ddo_modulus.training.distributed import gather, together

CONFIG, OVERRIDES, ENVIRONMENT = "config.yaml", "overrides.yaml", "environment.json"

_SECTIONS = ("data", "trainer", "operator")


def job_id() -> str:
    """Slurm's number of this job, ``job_task`` in an array; outside of Slurm the time (UTC)."""
    variables = os.environ
    if "SLURM_ARRAY_JOB_ID" in variables and "SLURM_ARRAY_TASK_ID" in variables:
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    return variables.get("SLURM_JOB_ID") or datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")


def save_dir() -> Path:
    """Folder of all runs: ``$SAVE_DIR``, or ``runs`` in the working directory."""
    return Path(os.environ.get("SAVE_DIR") or "runs")


def run_folder(config: DictConfig) -> Path:
    """Folder of a run, the same on all ranks: ``out``, or one named by experiment and job.

    Raises:
        InputError: If the experiment has no name.
    """
    if config.out is not None:
        return Path(str(config.out))
    if not isinstance(config.name, str) or not config.name.strip():
        raise InputError(f"name={config.name} cannot name a folder; give another, or out=...")
    return Path(gather(str(save_dir() / config.name / job_id()))[0])


def requeued(out: Path) -> bool:
    """Whether Slurm has restarted this job and an earlier start of it wrote to this folder."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") in ("", "0"):
        return False
    job = os.environ.get("SLURM_JOB_ID")
    mine = any(start.get("slurm", {}).get("SLURM_JOB_ID") == job for start in starts(out))
    return gather(mine)[0]


def trained_steps(out: Path) -> int | None:
    """Steps that the package in a folder was trained for; None if there is no package yet.

    The first rank decides for all: a shared disk may show them different states for a while.
    """
    try:
        header = json.loads((out / "package" / "package.json").read_text())
        steps = int(header["provenance"]["training"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        steps = None
    return gather(steps)[0]


def open_run(out: Path) -> DictConfig:
    """The configuration that a run was last started with.

    Raises:
        InputError: If the folder does not hold a run.
    """
    try:
        config = OmegaConf.load(out / CONFIG)
    except FileNotFoundError as error:
        reason = f"has no {CONFIG}" if out.is_dir() else "does not exist"
        raise InputError(f"{out} is no run folder of `ddo train`: it {reason}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{out / CONFIG} cannot be read ({error})") from error
    if not isinstance(config, DictConfig) or any(
        not isinstance(config.get(section), DictConfig) for section in _SECTIONS
    ):
        raise InputError(
            f"{out} is no run folder of `ddo train`: {CONFIG} has no {', '.join(_SECTIONS)}"
        )
    return config


def starts(out: Path) -> list[dict[str, Any]]:
    """The entries of ``environment.json``; none if it cannot be read."""
    try:
        entries = json.loads((out / ENVIRONMENT).read_text())
    except (OSError, ValueError):
        return []
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def record_start(out: Path, config: DictConfig) -> None:
    """Write the record of a start on the first rank; a collective call of all ranks.

    Args:
        out: Folder of the run, created if it does not exist.
        config: Its configuration. Unless it says ``resume``, entries of earlier starts are dropped.

    Raises:
        InputError: If the folder cannot be written to.
    """
    manager = DistributedManager()
    devices = gather(describe_device(manager.device))
    with together():
        if manager.rank:
            return
        overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        earlier = starts(out) if config.resume else []
        entry = {"overrides": overrides, **environment(), "devices": devices}
        texts = {
            CONFIG: OmegaConf.to_yaml(config, resolve=True),
            ENVIRONMENT: json.dumps([*earlier, entry], indent=1) + "\n",
        }
        if not earlier:
            texts[OVERRIDES] = yaml.safe_dump(overrides)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                _write_atomically(out / name, text)
        except OSError as error:
            raise InputError(f"{out} cannot be written to ({error.strerror})") from error


def _write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all: a run killed while it writes must still be resumable."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
