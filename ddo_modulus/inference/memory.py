# SPDX-License-Identifier: Apache-2.0
"""Whether the system of an analysis fits into the memory, before anything is computed.

The innovation covariance of ``M`` observations is an ``M x M`` matrix in double precision.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ddo_modulus.errors import InputError

# Matrices in double precision that are alive together: the observation errors, the covariance, its
# factor, the inverse of the factor and a work space; and copies of the square root.
_MATRICES, _ROOTS = 5, 3
_DOUBLE = 8  # bytes
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def check_memory(
    observations: int, modes: int, device: torch.device | str, time: np.datetime64
) -> None:
    """Refuse an analysis whose system cannot be solved in the memory that is free.

    Args:
        observations: Number of observations.
        modes: Number of coordinates of the prior.
        device: Where the system is solved; quality control runs on the CPU.
        time: Analysis time, for the message.

    Raises:
        InputError: If the system is too large.
    """
    needed = _DOUBLE * observations * (_MATRICES * observations + _ROOTS * modes)
    if needed < 2**30:
        return
    free = free_memory(device)
    if needed > free:
        fit = int((free / (_DOUBLE * _MATRICES)) ** 0.5)
        raise InputError(
            f"{observations} observations at {pd.Timestamp(time)} need {needed / 2**30:.0f} GiB of "
            f"memory for their system, of which {free / 2**30:.1f} GiB are free (enough for some "
            f"{fit // 100 * 100}); average them with superob.km=..., or thin them with "
            "thinning.km=..."
        )


def free_memory(device: torch.device | str) -> float:
    """Bytes that this process can still allocate, on the CPU and on a device of its own."""
    limits = [_of_the_machine(), _of_the_group(), _of_the_process()]
    if torch.device(device).type == "cuda":
        limits.append(torch.cuda.mem_get_info(device)[0])
    return max(0.0, min(limits))


def _of_the_machine() -> float:
    with suppress(OSError, ValueError, IndexError):
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return np.inf


def _of_the_group() -> float:
    """What the limit of a container leaves; infinite without one."""
    with suppress(OSError, ValueError):
        limit = (_CGROUP / "memory.max").read_text()
        return float(limit) - float((_CGROUP / "memory.current").read_text())
    return np.inf


def _of_the_process() -> float:
    """What `ulimit -v` leaves; infinite without it."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return np.inf
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return float(limit - pages * resource.getpagesize())
    return float(limit)
