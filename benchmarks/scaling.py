# SPDX-License-Identifier: Apache-2.0
r"""Training throughput on several GPUs over that on one, at an equal batch on each.

    python benchmarks/scaling.py --ranks 1 2 --out benchmarks/results/scaling.md

Each number of ranks is a run of its own under torchrun; the second half of a run is timed, when all
is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from report import machine, publish

from ddo_modulus.data.loader import BatchOptions, TensorLoader
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.training import Fold, Trainer, TrainerConfig, session

CUDA = torch.cuda.is_available()
SIZE, SHARE = (64, 128) if CUDA else (16, 8)
NETWORK = {"widths": [64, 96, 128], "depths": [2, 2, 2], "modes": [23, 23, 15]}


def work(steps: int, out: Path) -> None:
    """One rank: train on random fields, write the throughput of all ranks."""
    with session() as manager:
        torch.manual_seed(0)
        options = NETWORK if CUDA else {"widths": [8], "depths": [1], "modes": [5]}
        operator = DiffusionOperator([SIZE, SIZE], network=options)
        prior = GaussianField(operator.basis, Matern(0.1, 1.0))
        operator.set_prior(prior)
        config = TrainerConfig(
            steps=steps,
            batch=SHARE * manager.world_size,
            precision="bf16" if CUDA else "fp32",
            compile=CUDA,
            validate_every=steps // 2,
            figure=False,
            loggers=(),
        )
        loader = TensorLoader(
            prior.sample(2048, generator=torch.Generator().manual_seed(0)).to(manager.device),
            BatchOptions(config.batch, rank=manager.rank, ranks=manager.world_size),
        )
        trainer = Trainer(operator, [Fold(loader.batches)], None, config)
        trainer.run()
        if manager.rank == 0:
            out.write_text(json.dumps(trainer.history[-1]["samples_per_second"]))


def main() -> None:
    """Run with each number of ranks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        work(arguments.steps, arguments.out)
        return
    speed = {}
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "speed.json"
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            own = [__file__, "--steps", str(arguments.steps), "--out", str(out)]
            subprocess.run([sys.executable, *launch, *own], check=True)
            speed[ranks] = json.loads(out.read_text())
    first = arguments.ranks[0]
    rows = [f"| {n} | {s:.0f} | {s / speed[first]:.2f} |" for n, s in speed.items()]
    publish(
        [
            "# Training on several devices",
            "",
            f"{machine()}; {SIZE} x {SIZE}, {SHARE} samples on each rank, "
            f"{arguments.steps} steps. `python benchmarks/scaling.py`",
            "",
            f"| ranks | samples/s | over {first} |",
            "|---|---|---|",
            *rows,
        ],
        arguments.out,
    )


if __name__ == "__main__":
    main()
