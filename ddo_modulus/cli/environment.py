# SPDX-License-Identifier: Apache-2.0
"""What a run's result may depend on besides its configuration: code, packages, machine, job."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from physicsnemo.distributed import DistributedManager

#: Slurm's variables to record, by name: others may hold secrets (SLURM_JWT).
_SLURM = (
    *("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
    *("SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_QOS", "SLURM_JOB_NODELIST"),
    *("SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_RESTART_COUNT"),
)


def environment() -> dict[str, Any]:
    """Time, code, packages, machine, torch, number of ranks and Slurm's job, as JSON can hold."""
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "working_directory": os.getcwd(),
        "revision": {
            "ddo_modulus": _commit(package_revision()),
            "working_directory": _commit(revision(Path.cwd())),
        },
        "packages": packages(),
        "python": platform.python_version(),
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


def describe_device(device: torch.device) -> str:
    """Host and device of this rank."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{socket.gethostname()}: {name}"


def packages() -> dict[str, str]:
    """Versions of this package and of its installed dependencies, but for those of developers."""
    requirements = ["ddo-modulus"]
    with suppress(PackageNotFoundError):  # not installed: run from a checkout
        requirements += requires("ddo-modulus") or []
    found = {}
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if not re.search(r"extra == .(dev|benchmarks)\b", requirement):
            with suppress(PackageNotFoundError):
                found[name] = version(name)
    return dict(sorted(found.items()))


def package_revision() -> str | None:
    """Revision of this package's code; None if it is installed rather than in its repository."""
    return revision(Path(__file__).parents[1], "__init__.py")


def revision(folder: Path, tracked: str | None = None) -> str | None:
    """Git's commit of a folder, with ``-dirty`` if files differ from it; None without Git.

    Args:
        folder: A folder in a repository.
        tracked: A file of the folder that the repository must track: installed packages may lie
            in an environment within somebody else's repository.
    """
    if tracked is not None and _git(folder, "ls-files", "--error-unmatch", tracked) is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a Git command; GitPython would call the same program, and fail to import without.

    Returns:
        None if Git is not installed or the command fails.
    """
    command = ["git", *arguments]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(
            command, cwd=folder, text=True, stderr=subprocess.DEVNULL
        ).strip()
    return None


def _commit(described: str | None) -> dict[str, Any] | None:
    if described is None:
        return None
    commit = described.removesuffix("-dirty")
    return {"commit": commit, "dirty": commit != described}
