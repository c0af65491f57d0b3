# SPDX-License-Identifier: Apache-2.0
"""Temperatures over the United Kingdom from a table of station reports, on a CPU, in half a minute.

Without a table, stations report from a draw of the prior, with errors of their own; one of them is
wrong by 25 K, two stand at the same place. Reports are checked, thinned and assimilated; those left
out are listed. Withheld stations tell how good the analysis is where nobody looked. A figure of
mean and spread goes to ``outputs/assimilate``.

    python examples/04_assimilate.py [--table stations.csv] [--members 32] [--thinning-km 20]

A table has the columns ``time, lat, lon, observation, variable`` and, if known,
``observation_error``; the hour with most reports is analysed.

Axes: ``E`` members, ``M`` reports, ``H W`` grid.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ddo_modulus import Package, PointOperator
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.inference.assimilate import assimilate
from ddo_modulus.inference.generate import generate
from ddo_modulus.inference.quality import QualityControl
from ddo_modulus.inference.reports import usable
from ddo_modulus.observations.table import read_table
from ddo_modulus.plots.figures import PointValues, estimate_panel

OUT = Path("outputs/assimilate")
NOON = np.datetime64("2019-03-27T12", "ns")
STATIONS, ERROR, WITHHELD = 60, 0.5, 0.2


def invented(package: Package, seed: int) -> pd.DataFrame:
    """Reports of stations at random places from a state drawn from the prior."""
    random, grid = np.random.default_rng(seed), package.grid
    state = torch.from_numpy(generate(package, [NOON], ensemble=1, seed=2024)["t2m"].values)[0]
    lat = random.uniform(grid.lat.min(), grid.lat.max(), STATIONS)
    lon = random.uniform(grid.lon.min(), grid.lon.max(), STATIONS)
    lat[1], lon[1] = lat[0], lon[0]  # two instruments in one place
    value = PointOperator(grid, lat, lon)(state[None])[0].numpy()
    value = value + ERROR * random.standard_normal(STATIONS)
    value[5] += 25.0  # a broken one
    places = {"time": NOON, "lat": lat, "lon": lon}
    return pd.DataFrame(
        {**places, "observation": value, "variable": "t2m", "observation_error": ERROR}
    )


def main() -> None:
    """Read or invent, check, assimilate, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--table", type=Path, help="reports of t2m, .csv or .parquet")
    parser.add_argument("--members", type=int, default=32, help="ensemble size, at least 2")
    parser.add_argument("--steps", type=int, default=None, help="noise levels")
    parser.add_argument("--thinning-km", type=float, default=20.0, help="one report in each cell")
    parser.add_argument("--seed", type=int, default=0, help="of stations and members")
    options = parser.parse_args()
    start, console = time.perf_counter(), Console()

    package = Package.load("uk_t2m")
    source = invented(package, options.seed) if options.table is None else options.table
    table = usable(package, read_table(source))
    when = table.frame["time"].mode()[0]
    rows = table.frame[table.frame["time"] == when]
    away = np.random.default_rng(options.seed).permutation(len(rows)) < WITHHELD * len(rows)
    if len(rows) < 10:
        away[:] = False  # too few to spare any

    result = assimilate(
        package,
        read_table(rows[~away]),
        [when.to_datetime64()],
        ensemble=options.members,
        seed=options.seed,
        posterior=PosteriorConfig(steps=options.steps),
        quality=QualityControl(duplicates="average", thinning_km=options.thinning_km),
    )
    analysis, left_out = result.dataset, result.rejected

    listed = Table(title="Left out", box=box.SIMPLE)
    for name in ("reason", "lat", "lon", "t2m [K]"):
        listed.add_column(name, justify="left" if name == "reason" else "right")
    for report in left_out.itertuples():
        numbers = (f"{v:.2f}" for v in (report.lat, report.lon, report.observation))
        listed.add_row(str(report.reason), *numbers)
    if len(left_out):
        console.print(listed)
    for name in ("inflation", "chi2", "t2m_omb", "t2m_oma"):
        diagnostic = analysis[name]
        console.print(f"{name} {float(diagnostic[0]):.2f}: {diagnostic.attrs['long_name']}")

    members = torch.from_numpy(analysis["t2m"].values)[:, 0]  # E H W
    if away.any():
        at = PointOperator(package.grid, rows["lat"][away], rows["lon"][away])(members[:, None])
        misfit = at.mean(0) - torch.from_numpy(rows["observation"][away].to_numpy(copy=True))
        # Some of the withheld reports may be wrong, and nobody checked them: their median.
        console.print(
            f"At {int(away.sum())} withheld stations the mean is off by "
            f"{float(misfit.abs().median()):.2f} K (median), the spread is "
            f"{float(at.std(0).median()):.2f} K."
        )
    used = rows[~away]
    if len(left_out):
        place = ["lat", "lon", "observation"]
        used = used.merge(left_out[place].assign(bad=True), "left", on=place)
        used = used[used["bad"].isna()]
    figure = estimate_panel(
        PointValues(used["lat"], (used["lon"] + 180) % 360 - 180, used["observation"]),
        members,
        analysis["lat"],
        analysis["lon"],
        units="K",
        title=f"2 m temperature, {when:%d %B %Y, %H} UTC, {options.members} members",
        path=OUT / "analysis.png",
    )
    console.print(f"{time.perf_counter() - start:.0f} s; see {figure}.", soft_wrap=True)


if __name__ == "__main__":
    main()
