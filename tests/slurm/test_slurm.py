# SPDX-License-Identifier: Apache-2.0
"""The scripts of ``examples/slurm`` on a real Slurm: two ranks on CPUs, stopped and put back."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from ddo_modulus.diffusion.package import Package

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"
STEPS = 400
TWO_RANKS = ("--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")


@pytest.fixture(scope="module")
def keys(tiny, arguments):
    more = {"steps": STEPS, "validate_every": 100, "checkpoint_every": 10}
    changed = {f"trainer__{key}": value for key, value in more.items()}
    return arguments(**tiny | changed | {"half": "false"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def submit(cluster, job_environment, folder):
    """Submit a script; the job's number and the folder of its run."""

    def submit(script, *keys, options=TWO_RANKS):
        variables = {"SAVE_DIR": folder, "SCRIPTS": SCRIPTS} | job_environment
        job = cluster.submit(SCRIPTS / script, *keys, options=options, cwd=folder, **variables)
        return job, folder / "kolmogorov64" / job

    return submit


@pytest.fixture(scope="module")
def whole(cluster, submit, keys):
    """An uninterrupted run."""
    job, run = submit("train_one_node.sbatch", *keys)
    assert cluster.await_end(job)["JobState"] == "COMPLETED", log(run)
    return run


def log(run):
    path = run.parents[1] / f"ddo-{run.name}.log"
    return path.read_text() if path.exists() else ""


def await_checkpoint(run, seconds=120):
    end = time.monotonic() + seconds
    while not list(run.glob("checkpoints/step-*")):
        assert time.monotonic() < end, log(run)
        time.sleep(0.002)


def result(run):
    """Averaged weights, bit for bit, and losses."""
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("samples_per_second", None)
    return Package.load(run / "package").operator.state_dict(), rows


def assert_same(one, other):
    (weights, rows), (expected, expected_rows) = result(one), result(other)
    assert rows == expected_rows and rows[-1]["step"] == STEPS
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def starts(run):
    return json.loads((run / "environment.json").read_text())


def test_the_signal_before_the_time_limit(cluster, submit, keys, whole):
    """As Slurm sends it two minutes before the end of the job's time."""
    job, run = submit("train_one_node.sbatch", *keys)
    await_checkpoint(run)
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.await_state(job, "PENDING")
    assert "stopped by SIGUSR1" in log(run) and not (run / "package").exists()
    cluster.start_now(job)
    end = cluster.await_end(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), log(run)
    assert "requeued: continuing" in log(run) and "resumed at step" in log(run)
    assert_same(run, whole)
    first, second = starts(run)
    assert first["slurm"]["SLURM_JOB_ID"] == second["slurm"]["SLURM_JOB_ID"] == job
    assert second["slurm"]["SLURM_RESTART_COUNT"] == "1" and second["ranks"] == 2


def test_a_signal_before_training_has_begun(cluster, submit, keys):
    job, run = submit("train_one_node.sbatch", *keys)
    end = time.monotonic() + 30
    while f"{job}.0" not in cluster.ask("squeue", "--steps", "--noheader", "--format=%i"):
        assert time.monotonic() < end, log(run)
        time.sleep(0.1)
    time.sleep(1)  # Python is importing
    cluster.ask("scancel", "--signal=USR1", job)
    assert cluster.await_state(job, "PENDING", "COMPLETED", "FAILED")["Restarts"] == "1", log(run)
    assert not run.exists()
    cluster.ask("scancel", job)


def test_two_nodes_preempted_by_an_urgent_job(cluster, submit, keys, whole):
    job, run = submit("train_many_nodes.sbatch", *keys, options=TWO_NODES)
    await_checkpoint(run)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"]
    pushing = cluster.ask(*urgent, "--output=/dev/null", "--wrap=sleep 1")
    cluster.await_state(job, "PENDING")
    assert cluster.await_end(pushing)["JobState"] == "COMPLETED"
    cluster.start_now(job)
    end = cluster.await_end(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), log(run)
    assert "resumed at step" in log(run)
    assert_same(run, whole)


def test_a_mistake_is_not_tried_again(cluster, submit, keys):
    job, run = submit("train_one_node.sbatch", *keys, "trainer.batch=3")
    end = cluster.await_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert "ddo: trainer.batch=3 cannot be shared out to 2 ranks" in log(run)
    assert log(run).count("ddo: ") == 1
    assert not run.exists()


def test_a_sweep_of_jobs_one_of_them_stopped(cluster, job_environment, folder, keys, whole):
    variables = {"SAVE_DIR": folder / "sweep", "TASKS": 2, "CPUS": 1, "GPUS": 0, "AT_ONCE": 1}
    environment = cluster.environment | job_environment
    environment |= {name: str(value) for name, value in variables.items()}
    environment["PATH"] = f"{job_environment['VENV']}/bin:{environment['PATH']}"
    command = ["bash", SCRIPTS / "sweep.sh", *keys, "trainer.seed=0,1"]
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        while not (runs := sorted(folder.glob("sweep/kolmogorov64/*/0"))):
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.05)
        run = runs[0]
        await_checkpoint(run)
        job = starts(run)[0]["slurm"]["SLURM_JOB_ID"]
        cluster.ask("scancel", "--signal=USR1", job)
        cluster.await_state(job, "PENDING")
        assert not (run / "package").exists()
        cluster.start_now(job)
        output = launcher.communicate(timeout=240)[0]
    finally:
        launcher.kill()
    assert launcher.returncode == 0, output
    assert output.count("finished") == 2
    assert len(starts(run)) == 2 and starts(run)[1]["slurm"]["SLURM_RESTART_COUNT"] == "1"
    assert_same(run, whole)
    other = run.with_name("1")
    assert "trainer.seed=1" in (other / "overrides.yaml").read_text()
    assert result(other)[1] != result(run)[1]
