# SPDX-License-Identifier: Apache-2.0
"""How fast training data come from a store, and whether training waits for them.

Makes training stores of random fields, uncompressed and compressed, and one with zarr's default
compression, in a temporary folder. Then, for each loader with the same number of processes: batches
as fast as they come (they end on the training device, normalised by hour and point), and the share
of its time that a training loop waits for data: how much longer its steps take than those of the
same loop with one batch that is there already. The loop is that of :mod:`ddo_modulus.training`
with an operator of the configuration. The stores are read once before: what is timed is not the
disk. Prints Markdown::

    python benchmarks/loading.py [--samples 512] [--workers 8] [--out benchmarks/results/loading.md]
    python benchmarks/loading.py --shape 32 64 --samples 64 --batches 20 --workers 1 --steps 8
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
import zarr
from report import machine, publish

from ddo_modulus.cli.main import compose
from ddo_modulus.cli.options import pick_device, plain
from ddo_modulus.data.dali import DaliLoader
from ddo_modulus.data.formats import FIELDS
from ddo_modulus.data.loader import BatchOptions
from ddo_modulus.data.normalization import Normalization
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.statistics import moments
from ddo_modulus.data.stream import ReadingOptions, StoreLoader, StreamLoader
from ddo_modulus.data.training_store import write_training_store
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.fields.basis import CosineBasis
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.training import Fold, Trainer, TrainerConfig
from ddo_modulus.training.evaluation import Batch

LOADERS: dict[str, type[StoreLoader]] = {"DALI": DaliLoader, "PyTorch": StreamLoader}
WARM_UP = 10  # batches before the clock starts; of training it is half of the steps


def make_stores(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Stores of the same fields: smooth as temperatures are, about 280 with a deviation of 10."""
    height, width = options.shape
    field = GaussianField(CosineBasis((height, width), (0.5, 1.0)), Matern(0.1, 1.0))
    generator = torch.Generator().manual_seed(0)
    kinds = field.sample(16 * options.variables, generator=generator).unflatten(0, (16, -1))[
        :, :, 0
    ]
    fields = np.empty((options.samples, *kinds.shape[1:]), np.float32)
    for n in range(options.samples):  # sixteen draws, each time mirrored and scaled anew
        state = kinds[n % 16].numpy()[:, :: 1 - 2 * (n // 16 % 2)]
        fields[n] = 280 + (10 + n / options.samples) * state
    axes = {
        "time": pd.date_range("2020-01-01", periods=options.samples, freq="1h"),
        "lat": np.linspace(60, 30, height),
        "lon": np.linspace(0, 60, width),
    }
    dataset = xr.Dataset(
        {f"field{i}": (tuple(axes), fields[:, i], {"units": "K"}) for i in range(fields.shape[1])},
        coords=axes,
    )
    stores = {"none": folder / "plain.zarr", "LZ4, shuffled": folder / "lz4.zarr"}
    write_training_store(dataset, stores["none"], "benchmark", compress=False)
    write_training_store(dataset, stores["LZ4, shuffled"], "benchmark", compress=True)
    stores["zarr's default"] = folder / "default.zarr"
    group = zarr.open_group(stores["zarr's default"], mode="w")
    with zarr.config.set({"async.concurrency": 4}):
        for name, array in zarr.open_group(stores["none"], mode="r").arrays():
            chunks = (1, *array.shape[1:]) if name == FIELDS else array.shape
            copy = group.create_array(
                name,
                shape=array.shape,
                dtype=array.dtype,
                chunks=chunks,
                dimension_names=array.metadata.dimension_names,
                attributes=array.attrs.asdict(),
            )
            for n in range(array.shape[0]):
                copy[n] = array[n]
    group.attrs.update(zarr.open_group(stores["none"], mode="r").attrs.asdict())
    return stores


def throughput(loader: StoreLoader, batches: int, wait: Callable[[], None]) -> float:
    """Samples a second."""
    stream = loader.batches()
    for _ in range(WARM_UP):
        next(stream)
    wait()
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    wait()
    return batches * loader.order.share / (time.perf_counter() - began)


def step_time(
    batches: Callable[[int], Iterator[Batch]],
    options: argparse.Namespace,
    wait: Callable[[], None],
) -> float:
    """Seconds of a training step."""
    overrides = ["experiment=uk_t2m", "out=-", "data.path=-", "operator.network_sigma=null"]
    overrides += ["operator=unet", "trainer.precision=bf16", *options.config]
    config = compose("train", overrides)
    trainer_config = {
        **plain(config.trainer),
        "steps": options.steps,
        "batch": options.batch,
        "loggers": [],
        "figure": False,
        "log_every": options.steps,
        "validate_every": options.steps,
    }
    torch.manual_seed(0)
    operator = DiffusionOperator(
        list(options.shape),
        options.variables,
        "box",
        [0.5, 1.0],
        plain(config.operator.noise),
        network=plain(config.operator.network),
    )
    operator.set_prior(GaussianField(operator.basis, Matern(0.1, 1.0), options.variables))
    first, last = options.steps // 2, options.steps - 1  # compilation, and reading ahead
    clock = {}

    def timed(start: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(start)):
            if number in (first, last):  # before the end: closing a loader is no step
                wait()
                clock[number] = time.perf_counter()
            yield batch

    Trainer(operator, [Fold(timed)], None, TrainerConfig(**trainer_config)).run()
    return (clock[last] - clock[first]) / (last - first)


def main() -> None:
    """Make the stores, run all loaders on each, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[256, 512], help="rows and columns")
    parser.add_argument("--variables", type=int, default=8)
    parser.add_argument("--samples", type=int, default=512, help="in each store")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=8, help="processes of each loader")
    parser.add_argument("--prefetch", type=int, default=4, help="batches to read ahead")
    parser.add_argument("--batches", type=int, default=300, help="timed for the throughput")
    parser.add_argument("--steps", type=int, default=200, help="of training; 0 for none")
    parser.add_argument("--config", nargs="*", default=[], help="key=value, as of `ddo train`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stores", nargs="*", default=None, help="which; all if not given")
    parser.add_argument("--folder", type=Path, default=None, help="for the stores, e.g. /dev/shm")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file to write")
    options = parser.parse_args()
    device = pick_device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rows = []
    size = 4 * options.variables * options.shape[0] * options.shape[1]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for compression, path in make_stores(Path(folder), options).items():
            if options.stores is not None and compression not in options.stores:
                continue
            reader = StateReader(path)
            statistics = Normalization.from_moments(
                reader.channels, moments(reader), per_hour=True, per_point=True, harmonics=1
            )
            disk = sum(f.stat().st_size for f in (path / FIELDS).rglob("*") if f.is_file())
            speed = {}
            for name, kind in LOADERS.items():

                def build(kind: type[StoreLoader] = kind) -> StoreLoader:
                    return kind(
                        reader,  # noqa: B023 - called at once
                        statistics,  # noqa: B023
                        BatchOptions(options.batch),
                        reading=ReadingOptions(
                            options.workers, options.prefetch if kind is DaliLoader else 2
                        ),
                        device=device,
                    )

                loader = build()
                speed[name] = throughput(loader, options.batches, wait)
                loader.close()
                row = f"| {compression} | {disk / size / options.samples:.2f} | {name} "
                row += f"| {speed[name]:.0f} | {speed[name] * size / 1e9:.2f} "
                if options.steps:
                    loader = build()
                    batch = next(loader.batches())
                    loader.close()
                    loader = build()
                    idle = step_time(lambda start: repeat(batch), options, wait)  # noqa: B023
                    step = step_time(loader.batches, options, wait)
                    loader.close()
                    row += f"| {100 * (1 - idle / step):.1f} % | {1e3 * step:.1f} |"
                else:
                    row += "| | |"
                print(row, flush=True)
                rows.append(row)
            ratio = speed["DALI"] / speed["PyTorch"]
            rows.append(f"| {compression} | | **DALI / PyTorch** | **{ratio:.2f}** | | | |")
    publish(
        [
            "# Loading of training data",
            "",
            f"{date.today():%Y-%m-%d}; {machine('nvidia-dali-cuda130', 'zarr')}. Stores of "
            f"{options.samples} samples of {options.variables} variables on "
            f"{options.shape[0]} x {options.shape[1]} points "
            f"({size / 2**20:.1f} MiB each, one chunk), batches of {options.batch}, "
            f"{options.workers} processes. *Waiting*: share of a training step by which it is "
            "longer than with a batch that is there already. Ratios are of samples a second.",
            "",
            "| compression | size | loader | samples/s | GB/s | waiting | ms a step |",
            "|---|---:|---|---:|---:|---:|---:|",
            *rows,
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
