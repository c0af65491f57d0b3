# SPDX-License-Identifier: Apache-2.0
"""Cycle: forecast, analysis, forecast; over the United Kingdom, on a CPU, in a minute or two.

A week of temperatures at noon from a few stations, once with each analysis by itself and once in a
cycle: an Earth2Studio prognostic carries the members from one analysis to the next, where they are
the background, in addition to prior and observations. The prognostic is Earth2Studio's
``Persistence``, which needs no download; any other that covers the domain can replace it. The truth
is synthetic: an anomaly that changes slowly, drawn from the prior, added to the climate of the hour
(at different hours the daily cycle would spoil persistence). Analyses and their record, with
innovations and residuals of the observations, are written to ``outputs/cycle``; the same command
continues an interrupted run.

    pip install ddo-modulus[earth2]
    python examples/05_cycle.py [--members 8] [--stations 15] [--overwrite]

Axes: ``T`` times, ``E`` members, ``M`` stations, ``H W`` grid.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from earth2studio.io import ZarrBackend
from earth2studio.models.px import Persistence
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ddo_modulus import Package, PointOperator, sample
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.earth2 import DDOAssimilation
from ddo_modulus.earth2.run import RecordFolder, assimilation, cycle
from ddo_modulus.inference.backgrounds import BackgroundConfig

OUT = Path("outputs/cycle")
STEP = np.timedelta64(24, "h")
TIMES = np.datetime64("2019-03-25T12", "ns") + np.arange(7) * STEP
DAYS_TO_FORGET = 10.0  # until the anomaly is another one
ERROR = 0.5  # of the stations, K
BACKGROUND_ERROR = 1.0  # what a day of persistence adds to the members' own, K


class Stations:
    """Reports of the true state, as a data frame source of Earth2Studio's.

    Args:
        truth: ``(T, H, W)`` K at ``TIMES``.
        package: Whose domain they are in.
        count: Stations, at random places.
        seed: Of places and errors.
    """

    SCHEMA = pa.schema(
        {
            "time": pa.timestamp("ns"),
            "lat": pa.float32(),
            "lon": pa.float32(),
            "observation": pa.float32(),
            "variable": pa.string(),
            "observation_error": pa.float32(),
        }
    )

    def __init__(self, truth: Tensor, package: Package, count: int, seed: int) -> None:
        random, grid = np.random.default_rng(seed), package.grid
        self.lat = random.uniform(grid.lat.min(), grid.lat.max(), count)
        self.lon = random.uniform(grid.lon.min(), grid.lon.max(), count)
        values = PointOperator(grid, self.lat, self.lon)(truth[:, None].float()).numpy()
        self.values = values + ERROR * random.standard_normal(values.shape)

    def __call__(
        self, time: np.ndarray, variable: np.ndarray, fields: object = None
    ) -> pd.DataFrame:
        """The reports of some times."""
        frames = []
        for when in np.asarray(time, "datetime64[ns]"):
            (row,) = np.flatnonzero(when == TIMES)
            columns = {"time": when, "lat": self.lat, "lon": self.lon % 360}
            columns |= {"observation": self.values[row], "variable": "t2m"}
            frames.append(pd.DataFrame({**columns, "observation_error": ERROR}))
        return pd.concat(frames, ignore_index=True)


def true_states(package: Package, seed: int) -> Tensor:
    """Temperatures at ``TIMES``, ``(T, H, W)`` in K."""
    generator = torch.Generator().manual_seed(seed)
    # Two anomalies of the prior's, in standard deviations; from one to the other along a circle.
    condition = package.conditions(TIMES[:1].repeat(2))
    prior = sample(
        package.operator,
        package.scheduler(),
        2,
        steps=package.posterior.steps,
        generator=generator,
        condition=condition,
    )
    angle = torch.from_numpy((TIMES - TIMES[0]) / np.timedelta64(1, "D")) / DAYS_TO_FORGET
    angle = (angle * math.pi / 2).float()[:, None, None]
    anomaly = angle.cos() * prior[0] + angle.sin() * prior[1]
    return package.normalization.denormalize(anomaly[:, None], package.hours(TIMES))[:, 0]


def main() -> None:
    """Simulate a week, analyse it both ways, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--members", type=int, default=8, help="ensemble size, at least 2")
    parser.add_argument("--stations", type=int, default=15)
    parser.add_argument("--steps", type=int, default=12, help="noise levels")
    parser.add_argument("--seed", type=int, default=0, help="of stations and members")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    options = parser.parse_args()
    start, console = time.perf_counter(), Console()

    package = Package.load("uk_t2m")
    truth = true_states(package, seed=2024)
    stations = Stations(truth, package, options.stations, options.seed)
    model = DDOAssimilation(
        package,
        output="members",
        number_of_samples=options.members,
        seed=options.seed,
        posterior=PosteriorConfig(covariance="linear", steps=options.steps),
        background=BackgroundConfig(BACKGROUND_ERROR),
    )
    domain = OrderedDict(lat=package.grid.lat, lon=model.longitudes(package.grid.lon))
    prognostic = Persistence("t2m", domain, dt=STEP)

    def store(name: str) -> ZarrBackend:
        OUT.mkdir(parents=True, exist_ok=True)
        return ZarrBackend(
            str(OUT / f"{name}.zarr"), backend_kwargs={"overwrite": options.overwrite}
        )

    device, record = torch.device("cpu"), RecordFolder(overwrite=options.overwrite)
    alone = assimilation(TIMES, model, stations, store("alone"), record=record, device=device)
    cycled = cycle(
        TIMES,
        prognostic,
        model,
        stations,
        store("cycled"),
        keep_background=True,
        record=record,
        device=device,
    )

    def rmse(io: ZarrBackend, name: str) -> np.ndarray:
        mean = io[name][:].mean(1)  # over the members: T H W
        return np.sqrt(((mean - truth.numpy()) ** 2).mean((1, 2)))

    columns = {
        "by itself": rmse(alone, "t2m"),
        "forecast": rmse(cycled, "t2m_background"),
        "cycled": rmse(cycled, "t2m"),
    }
    columns["forecast"][0] = np.nan  # the first analysis has no background
    table = Table(title=f"RMSE in K, {options.stations} stations", box=box.SIMPLE)
    table.add_column("noon of")
    for name in columns:
        table.add_column(name, justify="right")
    for i, when in enumerate(TIMES):
        cells = ("" if np.isnan(v[i]) else f"{v[i]:.2f}" for v in columns.values())
        table.add_row(f"{pd.Timestamp(when):%d %B}", *cells)
    table.add_row("mean", *(f"{np.nanmean(v):.2f}" for v in columns.values()))
    console.print(table)
    statistics = pd.read_parquet(OUT / "cycled.record" / "statistics.parquet").iloc[-1]
    console.print(
        f"RMS of {statistics['count']} reports: O-B {statistics['omb_rms']:.2f} K, O-A "
        f"{statistics['oma_rms']:.2f} K. Desroziers' estimates: errors of the stations "
        f"{statistics['observation_error']:.2f} K (they have {ERROR}), of the forecasts "
        f"{statistics['background_error']:.2f} K."
    )
    console.print(f"{time.perf_counter() - start:.0f} s; see {OUT}.", soft_wrap=True)


if __name__ == "__main__":
    main()
