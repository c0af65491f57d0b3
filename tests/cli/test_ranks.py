# SPDX-License-Identifier: Apache-2.0
"""Ranks as their launchers announce them."""

import pytest

from ddo_modulus.cli.ranks import first_rank, ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NPROCS": "8"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NPROCS": "8", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "first", "number"),
    [
        ({}, True, 1),
        (TORCHRUN, False, 4),
        (SRUN, False, 8),
        (MPIRUN, True, 2),
        (BATCH_SCRIPT, True, 1),
        (BATCH_SCRIPT | MPIRUN | {"OMPI_COMM_WORLD_RANK": "1"}, False, 2),
        (SRUN | TORCHRUN | {"SLURM_PROCID": "0"}, False, 4),
        ({"RANK": "3", "WORLD_SIZE": ""}, True, 1),
    ],
)
def test_rank_and_number(environment, first, number, monkeypatch):
    for name in TORCHRUN | SRUN | MPIRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (first_rank(), ranks()) == (first, number)
