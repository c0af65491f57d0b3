# SPDX-License-Identifier: Apache-2.0
"""Kill `ddo prepare`, `assimilate`, `generate` and `train` at any moment, and run them again.

Each command replaces an older result. Half of the kills come at a random time, the others directly
before or after one of the renames (or removals) with which a result takes its place. After each
kill, what lies under the result's name must be the older or the new result, whole, or nothing; then
the same command is run once more and must succeed with the result of an undisturbed run, and leave
no other file behind.

    python benchmarks/kills.py [--kills 100] [--seed 0] [--out benchmarks/results/kills.md]

Processes are forked from one that has imported everything, so that a kill costs seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

import numpy as np
import pandas as pd
import report
import torch
import xarray as xr
from rich.progress import track

import ddo_modulus.cli.main
from ddo_modulus.cli import assimilate, generate, prepare, train  # noqa: F401  imported to be forked
from ddo_modulus.diffusion.package import Package

#: Calls that move a result to its place, or an older one out of the way.
MOVES = ("rename", "replace")


@dataclass(frozen=True)
class Job:
    """A command whose result is killed and repeated.

    Attributes:
        arguments: Of ``ddo``, without ``out``.
        out: Name of the result.
        read: What two results are compared by; an error if the result is not whole.
    """

    arguments: tuple[str, ...]
    out: str
    read: Callable[[Path], dict[str, np.ndarray]]

    def command(self, folder: Path, seed: int | None = None) -> list[str]:
        """The whole command line; another seed, or source, makes an older result."""
        words = [word.format(folder=folder, seed=seed or 0) for word in self.arguments]
        return [*words, f"out={folder / self.out}"]


def read_store(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a zarr store, each chunk of which must be there."""
    with xr.open_zarr(path, consolidated=False) as store:
        values = {str(name): store[name].values for name in store.variables}
    for name, value in values.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(f"{name} is not whole")
    return values


def read_package(path: Path) -> dict[str, np.ndarray]:
    """The weights of a run's package."""
    state = Package.load(path / "package").operator.state_dict()
    return {name: value.numpy() for name, value in state.items() if isinstance(value, torch.Tensor)}


def jobs() -> dict[str, Job]:
    """The commands, small enough for a second each."""
    quick = ("seed={seed}", "ensemble=2", "posterior.steps=4", "overwrite=true")
    network = "operator.network"
    return {
        "prepare": Job(
            ("prepare", "source={folder}/t2m-{seed}.nc", "statistics.spectrum=0", "overwrite=true"),
            "prepared.zarr",
            read_store,
        ),
        "assimilate": Job(
            ("assimilate", "package=uk_t2m", "observations={folder}/table.csv", *quick),
            "analysis.zarr",
            read_store,
        ),
        "generate": Job(
            ("generate", "package=uk_t2m", "ensemble=4", "seed={seed}", "steps=4")
            + ("time=2019-03-27T12:00", "overwrite=true"),
            "samples.zarr",
            read_store,
        ),
        "train": Job(
            ("train", "experiment=uk_t2m", "data.path={folder}/t2m-0.nc", "resume=true")
            + ("data.end=2019-03-05T23", "data.validation.start=2019-03-06T00")
            + ("data.validation.end=2019-03-06T23", "prior.folds=2", "half=false")
            + (f"{network}.widths=[4]", f"{network}.depths=[1]", f"{network}.modes=[5]")
            + (f"{network}.embedding=8", f"{network}.coordinates=[1,1]", "trainer.seed={seed}")
            + ("trainer.steps=12", "trainer.batch=4", "trainer.precision=fp32")
            + ("trainer.compile=false", "trainer.checkpoint_every=1", "trainer.validate_every=6")
            + ("trainer.warmup=2", "trainer.figure=false", "trainer.loggers=[]"),
            "run",
            read_package,
        ),
    }


def write_inputs(folder: Path) -> None:
    """Two files of a week of temperature, and a table of stations."""
    times = pd.date_range("2019-03-01", periods=24 * 7, freq="1h")
    axes = {"time": times, "lat": np.arange(56.0, 50.0, -1), "lon": np.arange(-5.0, 3.0)}
    for seed in (0, 1):
        draw = np.random.default_rng(seed).standard_normal((len(times), 6, 8))
        cycle = 3 * np.sin(2 * np.pi * times.hour.to_numpy() / 24)[:, None, None]
        values = (280 + cycle + draw.cumsum(1).cumsum(2) / 5).astype("float32")
        data = xr.Dataset({"t2m": (tuple(axes), values, {"units": "K"})}, coords=axes)
        data.to_netcdf(folder / f"t2m-{seed}.nc")
    header = "time,lat,lon,observation,variable,observation_error"
    time = "2019-03-27T12:00"
    rows = (header, f"{time},51.48,-0.45,285.3,t2m,0.5", f"{time},53.36,-2.28,284.0,t2m,0.5", "")
    (folder / "table.csv").write_text("\n".join(rows))


@dataclass(frozen=True)
class Kill:
    """When a process kills itself: at a time (s), or beside its n-th move of a result.

    Attributes:
        seconds: Time after the start, if it is not a move.
        move: Number of the move, from 1.
        after: Whether it is killed after the move, not before.
    """

    seconds: float = 0.0
    move: int = 0
    after: bool = False


def run(arguments: list[str], folder: Path, kill: Kill | None = None) -> tuple[int, int, str]:
    """Run ``ddo`` in a forked process.

    Returns:
        Its status (minus the signal that killed it), the number of moves, and what it printed.
    """
    log, moved = folder / "log.txt", folder / "moved.txt"
    moved.write_text("")
    child = os.fork()
    if child == 0:
        _child(arguments, folder, log, moved, kill or Kill())
    if kill is not None and not kill.move:
        time.sleep(kill.seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), len(moved.read_text()), log.read_text()


def _child(arguments: list[str], folder: Path, log: Path, moved: Path, kill: Kill) -> None:
    """Never returns. Each move of a result is one letter in ``moved``."""
    place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(place, 1)
    os.dup2(place, 2)
    for name in MOVES:
        setattr(os, name, _counted(getattr(os, name), folder, moved, kill))
    try:
        status = ddo_modulus.cli.main.main(arguments)
    except BaseException as error:
        print(f"traceback: {error!r}", flush=True)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _counted(
    move: Callable[..., None], folder: Path, moved: Path, kill: Kill
) -> Callable[..., None]:
    """A rename that counts those of results, and may be the last thing that the process does."""

    def counting(source: str, target: str, **options: object) -> None:
        # Chunks are renamed inside a hidden folder; only what takes or leaves a place counts.
        where = Path(target)
        parts = where.relative_to(folder).parts if where.is_relative_to(folder) else (".", "")
        if any(part.startswith(".") for part in parts[:-1]):
            return move(source, target, **options)
        number = len(moved.read_text()) + 1
        if number == kill.move and not kill.after:
            os.kill(os.getpid(), signal.SIGKILL)
        move(source, target, **options)
        with moved.open("a") as file:
            file.write("m")
        if number == kill.move:
            os.kill(os.getpid(), signal.SIGKILL)

    return counting


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two results hold the same numbers, bit for bit."""
    return one.keys() == other.keys() and all(
        np.array_equal(value, other[name], equal_nan=value.dtype.kind == "f")
        for name, value in one.items()
    )


def trial(job: Job, folder: Path, older: Path, results: tuple[dict, ...], kill: Kill) -> str:
    """Kill a command, look at what it left, run it again; what was found."""
    out = folder / job.out
    before = {path.name for path in folder.iterdir()} | {out.name}
    if older.exists():
        shutil.copytree(older, out)
    status, _, _ = run(job.command(folder), folder, kill)
    killed = status == -signal.SIGKILL
    found = "whole" if not killed else "absent"
    if out.exists() and (job.out != "run" or (out / "package").exists()):
        held = job.read(out)
        found = next(
            (n for n, r in zip(("new", "older"), results, strict=True) if same(held, r)), "WRONG"
        )
    again, _, said = run(job.command(folder), folder)
    assert again == 0, f"after {kill}: {said}"
    assert same(job.read(out), results[0]), f"after {kill}: another result"
    litter = {path.name for path in folder.iterdir()} - before
    assert not litter, f"after {kill}: {litter} left"
    shutil.rmtree(out)
    return found if killed else "not killed: it had ended"


def main() -> None:
    """Kill, repeat, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    share = -(-options.kills // (2 * len(jobs())))
    lines = [
        "# Kills",
        "",
        f"{report.command(__file__)} on {report.machine()}.",
        "",
        "Killed commands and what lay under the result's name: nothing, the older result, or the",
        "new one, each whole. Run again, every command succeeded with the result of an",
        "undisturbed run, bit for bit, and left no other file. A training has no older",
        "result: it continues from its checkpoints.",
        "",
        "| command | kills | absent | older | new | had ended before |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as place:
        for name, job in jobs().items():
            folder = Path(place) / name
            folder.mkdir()
            write_inputs(folder)
            for when in ("at random times", "in the renames"):
                found = _kills(
                    job, folder, share, when == "in the renames", chance, f"{name} {when}"
                )
                kills = sum(found.values()) - found["not killed: it had ended"]
                cells = [found[kind] for kind in ("absent", "older", "new")]
                ended = found["not killed: it had ended"]
                assert sum(cells) == kills, found
                lines.append(
                    f"| {name}, {when} | {kills} | {' | '.join(map(str, cells))} | {ended} |"
                )
    report.publish(lines, options.out)


def _kills(
    job: Job, folder: Path, count: int, renames: bool, chance: random.Random, label: str
) -> Counter[str]:
    """As many kills as asked for: a process that ended by itself before is not one."""
    older = folder.parent / f"{folder.name}-older"
    trains = job.out == "run"
    if not trains and not older.exists():
        assert run(job.command(folder, seed=1), folder)[0] == 0, (folder / "log.txt").read_text()
        (folder / job.out).rename(older)
    start = time.perf_counter()
    status, moves, said = run(job.command(folder), folder)
    assert status == 0, said
    seconds = time.perf_counter() - start
    results = (job.read(folder / job.out), {} if trains else job.read(older))
    assert trains or not same(*results), "the older result is no other one"
    shutil.rmtree(folder / job.out)
    moves += not trains  # the older result is moved aside first
    found: Counter[str] = Counter()
    for _ in track(range(count), description=label):
        while True:
            kill = (
                Kill(move=chance.randint(1, moves), after=chance.random() < 0.5)
                if renames
                else Kill(seconds=chance.uniform(0, seconds))
            )
            what = trial(job, folder, older, results, kill)
            found[what] += 1
            if what != "not killed: it had ended":
                break
    return found


if __name__ == "__main__":
    main()
