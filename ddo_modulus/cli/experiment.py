# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: where it is, and what it says of how the run came about.

``config.yaml``
    The configuration, nothing left out. ``ddo resume`` goes by it.
``overrides.yaml``
    What was said on the command line when the run was begun.
``environment.json``
    For each time that the run was started: when, by which code and packages, on which machines,
    with which changes to the configuration.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from physicsnemo.distributed import DistributedManager

from ddo_modulus.errors import InputError
from ddo_modulus.training.distributed import gather, together

CONFIG, OVERRIDES, ENVIRONMENT = "config.yaml", "overrides.yaml", "environment.json"

#: Of Slurm's variables; others may hold secrets (SLURM_JWT).
_SLURM = (
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_QOS",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
)


def job_id() -> str:
    """Slurm's number of this job, ``job_task`` in an array; the time (UTC) outside of Slurm."""
    given = os.environ
    if "SLURM_ARRAY_JOB_ID" in given and "SLURM_ARRAY_TASK_ID" in given:
        return f"{given['SLURM_ARRAY_JOB_ID']}_{given['SLURM_ARRAY_TASK_ID']}"
    return given.get("SLURM_JOB_ID") or datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")


def save_dir() -> Path:
    """Where runs are kept: ``$SAVE_DIR``, or ``runs`` in the working directory."""
    return Path(os.environ.get("SAVE_DIR") or "runs")


def run_folder(config: DictConfig) -> Path:
    """Folder of a run, the same on all ranks: ``out``, or one named by experiment and job.

    Raises:
        InputError: If the experiment has no name to go by.
    """
    if config.out is not None:
        return Path(str(config.out))
    if not isinstance(config.name, str) or not config.name.strip():
        raise InputError(f"name={config.name} is no name for a folder; give one, or give out=...")
    return Path(gather(str(save_dir() / config.name / job_id()))[0])


def requeued(out: Path) -> bool:
    """Whether Slurm has started this job again and the folder is that of its earlier start."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") in ("", "0"):
        return False
    job = os.environ.get("SLURM_JOB_ID")
    mine = any(start.get("slurm", {}).get("SLURM_JOB_ID") == job for start in starts(out))
    return gather(mine)[0]


def trained_steps(out: Path) -> int | None:
    """Steps that the package of a run was trained for, or None if there is no package yet.

    All ranks get the answer of the first: a disk that they share may not look the same to all.
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
        InputError: If the folder is none of a run.
    """
    path = out / CONFIG
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        what = f"has no {CONFIG}" if out.is_dir() else "does not exist"
        raise InputError(f"{out} is no run folder of `ddo train`: it {what}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    sections = ("data", "trainer", "operator")
    if not isinstance(config, DictConfig) or any(
        not isinstance(config.get(section), DictConfig) for section in sections
    ):
        raise InputError(
            f"{out} is no run folder of `ddo train`: {CONFIG} has no {', '.join(sections)}"
        )
    return config


def starts(out: Path) -> list[dict[str, Any]]:
    """What `ENVIRONMENT` tells of each start of a run; nothing if it cannot be read."""
    try:
        entries = json.loads((out / ENVIRONMENT).read_text())
    except (OSError, ValueError):
        return []
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def record_start(out: Path, config: DictConfig) -> None:
    """Write down, on the first rank, what is run and with what; call it on all ranks.

    Args:
        out: Folder of the run; made if need be.
        config: Its configuration. The record of a run that is not resumed begins anew.

    Raises:
        InputError: If the folder cannot be written to.
    """
    manager = DistributedManager()
    devices = gather(_device(manager.device))
    with together():
        if manager.rank:
            return
        said = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        earlier = starts(out) if config.resume else []
        entry = {"overrides": said, **environment(), "devices": devices}
        texts = {
            CONFIG: OmegaConf.to_yaml(config, resolve=True),
            ENVIRONMENT: json.dumps([*earlier, entry], indent=1) + "\n",
        }
        if not earlier:
            texts[OVERRIDES] = yaml.safe_dump(said)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                _put(out / name, text)
        except OSError as error:
            raise InputError(f"{out} cannot be written to ({error.strerror})") from error


def environment() -> dict[str, Any]:
    """What may bear on a run's result: code, packages, machine, job."""
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "working_directory": os.getcwd(),
        "revision": {
            "ddo_modulus": _state(package_revision()),
            "working_directory": _state(revision(Path.cwd())),
        },
        "packages": packages(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "torch": {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": None if nccl is None else ".".join(map(str, nccl)),
            "threads": torch.get_num_threads(),
        },
        "ranks": DistributedManager().world_size if DistributedManager.is_initialized() else 1,
        "slurm": {name: os.environ[name] for name in _SLURM if name in os.environ},
    }


def _requirements() -> list[str]:
    """This package and what it asks for; itself alone if it runs without being installed."""
    try:
        return ["ddo-modulus", *(requires("ddo-modulus") or [])]
    except PackageNotFoundError:
        return ["ddo-modulus"]


def packages() -> dict[str, str]:
    """Versions of this package and of those that it needs or has options for."""
    found = {}
    for requirement in _requirements():
        if re.search(r"extra == .(dev|benchmarks)\b", requirement):
            continue
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return dict(sorted(found.items()))


def package_revision() -> str | None:
    """Revision of this package's code; None if it is installed, not in a repository of its own."""
    return revision(Path(__file__).parents[1], "__init__.py")


def revision(folder: Path, tracked: str | None = None) -> str | None:
    """Git's commit of a folder, with ``-dirty`` if files differ from it; None without Git.

    Args:
        folder: A folder in a repository.
        tracked: A file that must belong to it: an environment with installed packages may lie
            within somebody's repository.
    """
    if tracked is not None and _git(folder, "ls-files", "--error-unmatch", tracked) is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], within: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Keys, with dots, whose values differ, and both values; None stands for a missing one."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**one, **other}:
        a, b, path = one.get(key), other.get(key), f"{within}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{path}.")
        elif a != b:
            found[path] = a, b
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=folder
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _state(described: str | None) -> dict[str, Any] | None:
    if described is None:
        return None
    commit = described.removesuffix("-dirty")
    return {"commit": commit, "dirty": commit != described}


def _device(device: torch.device) -> str:
    host = socket.gethostname()
    if device.type != "cuda":
        return f"{host}: CPU"
    return f"{host}: {torch.cuda.get_device_name(device)}"


def _put(path: Path, text: str) -> None:
    """Write a file whole or not at all, over an older one, though the machine may stop."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
