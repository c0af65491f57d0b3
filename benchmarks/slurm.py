# SPDX-License-Identifier: Apache-2.0
"""A run on a real Slurm that runs into its time limit, again and again, and one that does not.

Starts a Slurm of its own (``apt install slurm-wlm munge``; see ``tests/slurm/cluster.py``) and
submits ``examples/slurm/train_one_node.sbatch`` twice, with two ranks on CPUs: with a limit of
three minutes, at which Slurm and the script put the job back into the queue until training is done,
and without. Tells what Slurm said and did, and whether both came to the same end. Prints Markdown::

    python benchmarks/slurm.py [--steps 5000] [--out benchmarks/results/slurm.md]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from report import machine, publish

from ddo_modulus.diffusion.package import Package
from ddo_modulus.simulators import KolmogorovFlow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "slurm" / "train_one_node.sbatch"
LIMIT = ("--time=00:03:00", "--signal=USR1@50")
RANKS = ("--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0")

sys.path.insert(0, str(ROOT / "tests" / "slurm"))
from cluster import Cluster, missing  # noqa: E402


def arguments(data: Path, steps: int) -> list[str]:
    """A small operator on an 8 x 8 torus."""
    options = {
        "experiment": "kolmogorov64",
        "data.path": data,
        "data.validation.trajectories": 1,
        "symmetry.roll": "[4,1]",
        "symmetry.glide": 2,
        "operator.network.widths": "[4]",
        "operator.network.depths": "[1]",
        "operator.network.modes": "[5]",
        "operator.network.embedding": 8,
        "operator.network.coordinates": "[2,0]",
        "trainer.steps": steps,
        "trainer.batch": 4,
        "trainer.precision": "fp32",
        "trainer.compile": "false",
        "trainer.validate_every": steps // 6,
        "trainer.loggers": "[]",
        "trainer.figure": "false",
        "half": "false",
    }
    return [f"{key}={value}" for key, value in options.items()]


def follow(cluster: Cluster, job: str) -> list[str]:
    """States of a job and when they began, until it ends."""
    began, seen = time.monotonic(), []
    while True:
        shown = cluster.show(job)
        state = f"{shown['JobState']}, {shown['Restarts']} restarts"
        if not seen or seen[-1].split(": ")[1] != state:
            seen.append(f"{time.monotonic() - began:4.0f} s: {state}")
            print(seen[-1], file=sys.stderr, flush=True)
        if shown["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            return seen
        time.sleep(0.5)


def largest_difference(one: Path, other: Path) -> float:
    """Of the averaged weights of two runs."""
    a, b = (Package.load(run / "package").operator.state_dict() for run in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in b if b[name].numel())


def main() -> None:
    """Submit, follow, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if absent := missing():
        sys.exit(f"Slurm is not installed (no {', '.join(absent)})")
    flow = KolmogorovFlow(
        reynolds=50.0,
        forcing_wavenumber=2,
        resolution=16,
        output_resolution=8,
        spin_up=0.4,
        dt=0.02,
    )
    frames = torch.cat(list(flow.simulate(4, 5, generator=torch.Generator().manual_seed(0))))
    with tempfile.TemporaryDirectory() as name, Cluster() as cluster:
        folder = Path(name)
        flow.to_dataset(frames, seed=0).to_netcdf(folder / "flow.nc")
        keys = arguments(folder / "flow.nc", options.steps)
        variables = {
            "SAVE_DIR": folder / "runs",
            "VENV": sys.prefix,
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
        }
        runs, logs = [], []
        for limit in (LIMIT, ()):
            job = cluster.submit(SCRIPT, *keys, options=[*RANKS, *limit], cwd=folder, **variables)
            logs.append("\n".join(follow(cluster, job)))
            runs.append(folder / "runs" / "kolmogorov64" / job)
            if "COMPLETED" not in logs[-1]:
                sys.exit((folder / f"ddo-{job}.log").read_text())
        log = (folder / f"ddo-{runs[0].name}.log").read_text().replace(str(folder), "FOLDER")
        difference = largest_difference(*runs)
        starts = json.loads((runs[0] / "environment.json").read_text())
        slurm = cluster.ask("sinfo", "--version")
    job = starts[0]["slurm"]["SLURM_JOB_ID"]
    lines = [
        "# A run that meets its time limit on Slurm",
        "",
        "`train_one_node.sbatch` with two ranks on CPUs (gloo), the plain environment, on a real",
        f"{slurm} with two nodes on one machine: `sbatch {' '.join([*RANKS, *LIMIT])}`,",
        f"{options.steps} steps of a small operator. {machine('nvidia-physicsnemo')}.",
        f"{date.today()}, `python benchmarks/slurm.py`.",
        "",
        f"The run was started {len(starts)} times as job {job}. Largest difference of its averaged",
        f"weights from those of a run without interruption: **{difference:g}**.",
        "",
    ]
    for title, text in (
        ("What Slurm did:", logs[0]),
        ("The job's log:", log.strip()),
        ("The run without interruption:", logs[1]),
    ):
        lines += [title, "", "```", text, "```", ""]
    publish(lines[:-1], options.out)


if __name__ == "__main__":
    main()
