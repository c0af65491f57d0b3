# SPDX-License-Identifier: Apache-2.0
"""Processes that train, and how to compare what they come to."""

import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("trainees.py")
#: Bit for bit holds on one thread of a CPU.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


class Trainee:
    """A running job."""

    def __init__(self, server, pid, log):
        self._server, self.pid, self.log = server, pid, log
        self._status = None

    def status(self):
        """Exit status, or None while it runs; minus the signal that killed it."""
        if self._status is None:
            self._status = self._server.ask({"wait": self.pid})
        return self._status

    def wait(self, timeout=60.0):
        until = time.monotonic() + timeout
        while self.status() is None:
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                raise TimeoutError(self.said())
            time.sleep(0.005)
        return self._status

    def send(self, number):
        if self.status() is None:
            os.kill(self.pid, number)

    def said(self):
        return self.log.read_text() if self.log.exists() else ""


class Server:
    """Forks processes that have imported everything already."""

    def __init__(self, environment):
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, order):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, log, job, environment=None, **options):
        order = {"job": job, "options": options, "environment": environment or {}}
        return Trainee(self, self.ask(order | {"log": str(log)}), log)

    def close(self):
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="session")
def environment():
    """Of the processes that train."""
    return os.environ | ENVIRONMENT


@pytest.fixture(scope="session")
def server(environment):
    server = Server(environment)
    yield server
    server.close()


@pytest.fixture
def start(server, tmp_path):
    """Start a job in a process; it does not outlive the test."""
    started = []

    def start(job, environment=None, **options):
        log = tmp_path / f"log{len(started)}"
        started.append(server.start(log, job, environment, **options))
        return started[-1]

    yield start
    for trainee in started:
        trainee.send(signal.SIGKILL)


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def start_ranks(start, free_port):
    """Start a job on two ranks, the way that a launcher would."""

    def environment(launcher, rank):
        variables = {
            "torchrun": {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank},
            "srun": {
                "SLURM_PROCID": rank,
                "SLURM_NPROCS": 2,
                "SLURM_LOCALID": rank,
                "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
            },
            "mpirun": {
                "OMPI_COMM_WORLD_RANK": rank,
                "OMPI_COMM_WORLD_SIZE": 2,
                "OMPI_COMM_WORLD_LOCAL_RANK": rank,
            },
        }
        return {key: str(value) for key, value in variables[launcher].items()}

    def start_ranks(job, launcher="torchrun", **options):
        meeting = {"MASTER_PORT": free_port, "MASTER_ADDR": "127.0.0.1"}
        return [start(job, environment(launcher, rank) | meeting, **options) for rank in range(2)]

    return start_ranks


@pytest.fixture(scope="session")
def trainees():
    """The module of jobs, for use in this process."""
    spec = importlib.util.spec_from_file_location("trainees", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    torch.set_num_threads(threads)
    return module


@pytest.fixture(scope="session")
def same():
    """Whether two states are equal, bit for bit; ``close`` allows for the order of sums."""

    def same(one, other, close=False, path=""):
        if isinstance(one, dict):
            assert one.keys() == other.keys(), path
            for key in one:
                same(one[key], other[key], close, f"{path}/{key}")
        elif isinstance(one, list | tuple):
            assert len(one) == len(other), path
            for i, pair in enumerate(zip(one, other, strict=True)):
                same(*pair, close, f"{path}/{i}")
        elif close and isinstance(one, float | torch.Tensor):
            torch.testing.assert_close(
                other, one, rtol=2e-4, atol=1e-5, msg=lambda text: f"{path}: {text}"
            )
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one, other), path
        else:
            assert one == other, path

    return same


@pytest.fixture(scope="session")
def state_of():
    """What a checkpoint holds, read without PhysicsNeMo; rates are left out."""

    def state_of(folder):
        state = {}
        for path in sorted(Path(folder).iterdir()):
            if path.suffix == ".mdlus":
                with zipfile.ZipFile(path) as archive:
                    state[path.name] = torch.load(io.BytesIO(archive.read("model.pt")))
            elif path.suffix == ".pt":
                state[path.name] = torch.load(path)
                for row in state[path.name]["metadata"]["history"]:
                    row.pop("samples_per_second", None)
        return state

    return state_of


@pytest.fixture
def halt_when_saved():
    """Runs a trainer until its first checkpoint is written."""

    def halt_when_saved(trainer):
        save = trainer._save

        def halt():
            save()
            raise KeyboardInterrupt

        trainer._save = halt
        with pytest.raises(KeyboardInterrupt):
            trainer.run()

    return halt_when_saved
