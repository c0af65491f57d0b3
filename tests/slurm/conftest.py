# SPDX-License-Identifier: Apache-2.0
"""A real Slurm on this machine, where its programs are installed."""

import importlib.util
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "slurm_cluster", Path(__file__).parent / "cluster.py"
)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)


@pytest.fixture(scope="session")
def cluster():
    if absent := _module.missing():
        pytest.skip(f"Slurm is not installed (no {', '.join(absent)}): apt install slurm-wlm munge")
    with _module.Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def job_environment():
    """Of jobs: this Python, messages within the machine, one thread."""
    return {
        "VENV": sys.prefix,
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
