# SPDX-License-Identifier: Apache-2.0
"""Runs to be killed, signalled and put side by side: each in a process of its own.

``python trainees.py serve`` imports everything once, then forks one process for each job that it
reads from its standard input. ``python trainees.py JOB JSON`` runs one job, for launchers.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch

torch.set_num_threads(1)  # before any thread is started: the processes are forks

import torch.utils.tensorboard  # noqa: E402, F401
from physicsnemo.distributed import DistributedManager  # noqa: E402

import ddo_modulus.cli.train  # noqa: E402, F401
from ddo_modulus.cli.main import main  # noqa: E402
from ddo_modulus.data.loader import BatchOptions, TensorLoader  # noqa: E402
from ddo_modulus.diffusion.operator import DiffusionOperator  # noqa: E402
from ddo_modulus.errors import InputError  # noqa: E402
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser  # noqa: E402
from ddo_modulus.fields.gaussian_field import GaussianField, Matern  # noqa: E402
from ddo_modulus.training import Fold, Trainer, TrainerConfig, session  # noqa: E402


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build_trainer(out=None, rank=0, ranks=1, fails_on=None, defect=False, width=8, **options):
    """A small trainer with two folds, the second with a linear part of its own."""
    defaults = {
        "steps": 8,
        "batch": 8,
        "warmup": 2,
        "learning_rate": 5e-3,
        "precision": "fp32",
        "sigma_min": 0.05,
        "sigma_max": 20.0,
        "log_every": 3,
        "validate_every": 4,
        "checkpoint_every": 5,
        "loggers": [],
        "figure": False,
    }
    torch.manual_seed(0)
    network = {"widths": [width], "depths": [1], "modes": [5], "embedding": 16}
    noise = {"length_scale": 0.2, "smoothness": 0.5}
    operator = DiffusionOperator([8, 8], 1, "box", [1.0, 1.0], noise, 0, 0, network)
    prior = GaussianField(operator.basis, Matern(0.4, 1.5))
    operator.set_prior(prior)
    x = prior.sample(40, generator=generator()).sinh()
    linear = GaussianDenoiser(0.0, GaussianField(operator.basis, Matern(0.3, 1.0)), operator.noise)
    config = TrainerConfig(**(defaults | options))

    def loader(fields):
        options = BatchOptions(config.batch, rank=rank, ranks=ranks)
        batches = TensorLoader(fields, options).batches

        def stream(start):
            for step, batch in enumerate(batches(start), start):
                if rank == fails_on and step == 3:
                    kind = ZeroDivisionError if defect else InputError
                    raise kind(f"sample 17 is damaged (rank {rank})")
                yield batch

        return stream

    folds = [Fold(loader(x)), Fold(loader(x[:9]), linear)]
    return Trainer(operator, folds, (x[:40], None), config, None if out is None else Path(out))


def train(runs=None, **options):
    """Train, or go on, with each of several sets of options, or with one."""
    with session() as manager:
        for run in [options] if runs is None else runs:
            train_one(manager, **run)
    return 0


def train_one(manager, result=None, started=None, **options):
    """The end state goes to ``result``."""
    torch.manual_seed(os.getpid())  # nothing may depend on it
    trainer = build_trainer(rank=manager.rank, ranks=manager.world_size, **options)
    trainer.resume()
    if started:
        Path(started).touch()
    trainer.run()
    if result and manager.rank == 0:
        new = Path(f"{result}.new")
        torch.save(end_state(trainer), new)
        new.rename(result)


def end_state(trainer):
    """All that a run has come to."""
    return {
        "weights": trainer.operator.state_dict(),
        "average": trainer.averaged().state_dict(),
        "averaged": trainer.average.count,
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "history": [
            {k: v for k, v in row.items() if k != "samples_per_second"} for row in trainer.history
        ],
        "best": {k: v for k, v in trainer.best.items() if k != "samples_per_second"},
    }


def meet(result):
    """What a rank finds out about the others."""
    with session() as manager:
        said = torch.tensor([float(manager.rank + 1)])
        torch.distributed.all_reduce(said)
        found = [manager.rank, manager.world_size, manager._initialization_method, float(said)]
        Path(f"{result}{manager.rank}").write_text(json.dumps(found))
    assert not torch.distributed.is_initialized() and not DistributedManager.is_initialized()
    return 0


JOBS = {job.__name__: job for job in (train, meet)}


def run(name, options):
    """Status of a job, ``ddo`` itself among them."""
    if name == "command":
        return main(options["arguments"])
    try:
        return JOBS[name](**options)
    except InputError as error:
        print(f"InputError: {error}", file=sys.stderr)
        return 2


def serve():
    """Fork a process for each line of standard input; answer with its number, later its status."""
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.environ.update(order["environment"])
                status = run(order["job"], order["options"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                sys.stdout.flush()
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        sys.exit(run(sys.argv[1], json.loads(sys.argv[2])))
