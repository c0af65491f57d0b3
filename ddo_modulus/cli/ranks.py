# SPDX-License-Identifier: Apache-2.0
"""Which rank this process is, read from the launcher's environment.

PhysicsNeMo's ``DistributedManager`` says the same, but it imports torch and ends with the training:
too slow for a mistake in the arguments, and too early for the last message of a run.
"""

from __future__ import annotations

import os

#: Rank and number of ranks under torchrun, srun and mpirun, in the manager's order.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NPROCS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)


def first_rank() -> bool:
    """Whether this process prints for all ranks."""
    return _rank_and_count()[0] == 0


def ranks() -> int:
    """Number of processes that the launcher has started."""
    return _rank_and_count()[1]


def _rank_and_count() -> tuple[int, int]:
    for names in _LAUNCHERS:
        # Slurm sets its variables in a batch script too; only srun adds where the tasks meet.
        if names[0].startswith("SLURM") and "SLURM_LAUNCH_NODE_IPADDR" not in os.environ:
            continue
        rank, count = (os.environ.get(name) for name in names)
        if rank and count:
            return int(rank), int(count)
    return 0, 1
