# SPDX-License-Identifier: Apache-2.0
"""Temperatures at a quarter of a degree from means over whole degrees, on a CPU, in half a minute.

The prior of single states was not trained for it: the means over the cells of the coarse grid are
observations like any other. The component is a diagnostic model of Earth2Studio's, which
``earth2studio.run.diagnostic`` drives like its own; here it is called as it is. The truth is a draw
from the prior, or, with ``--era5``, a field of the file that
``xarray.tutorial.open_dataset("era5-2mt-2019-03-uk.grib")`` brings. Interpolation between the
centres of the cells is what there is to beat. A figure goes to ``outputs/super_resolve``.

    pip install ddo-modulus[earth2]
    python examples/06_super_resolve.py [--era5 FILE] [--time 2019-03-27T12] [--members 12]

Axes: ``E`` members, ``H W`` grid, ``h w`` coarse grid.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ddo_modulus import LatLonGrid, Package, PointOperator
from ddo_modulus.data.source import open_dataset
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.earth2 import DDOSuperResolution
from ddo_modulus.inference.generate import generate
from ddo_modulus.plots.figures import PointValues, analysis_panel
from ddo_modulus.verification import score

OUT = Path("outputs/super_resolve")

# Whole degrees, inside the prior's domain of 50-58 N, 10 W - 2 E.
LAT, LON = np.arange(57.5, 50, -1), np.arange(-9.5, 2)


def true_field(package: Package, valid: np.datetime64, era5: Path | None) -> Tensor:
    """What is to be found, ``(H, W)`` in K."""
    if era5 is None:
        field = generate(package, [valid], ensemble=1, seed=2024)["t2m"][0, 0]
    else:
        field = open_dataset(era5, ("t2m",))["t2m"].sel(time=valid)
    return torch.from_numpy(field.values.astype(np.float32))


def main() -> None:
    """Coarsen, super-resolve, verify."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--era5", type=Path, help="file of hourly 2 m temperatures, March 2019")
    parser.add_argument("--time", default="2019-03-27T12", help="UTC; the prior knows days 1-25")
    parser.add_argument("--members", type=int, default=12, help="ensemble size, at least 2")
    parser.add_argument("--steps", type=int, default=None, help="noise levels")
    parser.add_argument("--seed", type=int, default=0, help="of the members")
    options = parser.parse_args()
    start, console = time.perf_counter(), Console()

    model = DDOSuperResolution.from_pretrained(
        "uk_t2m",
        coarse_lat=LAT,
        coarse_lon=LON,
        number_of_samples=options.members,
        seed=options.seed,
        posterior=PosteriorConfig(steps=options.steps),
    )
    grid, valid = model.package.grid, np.datetime64(options.time, "ns")
    truth = true_field(model.package, valid, options.era5)
    coarse = model.coarsen(truth)

    coords = model.input_coords()
    coords |= OrderedDict(
        batch=np.arange(1),
        time=np.array([valid]),
        lead_time=np.array([0], "timedelta64[h]"),
    )
    fine, _ = model(coarse[None, None, None, None], coords)  # batch, time, lead_time, variable
    ensemble = fine[0, :, 0, 0, 0]  # E H W

    # Interpolation, where points have centres of cells on all sides.
    centres = LatLonGrid(LAT, LON)
    lat, lon = np.meshgrid(grid.lat, grid.lon, indexing="ij")
    inside = centres.contains(lat, lon)
    between = PointOperator(centres, lat[inside], lon[inside])(coarse[None, None])[0]
    mask = torch.from_numpy(inside)
    scores = score(ensemble, truth, label="super-resolution", units="K", mask=mask)
    error = between - truth[mask]

    table = Table("K", "RMSE", "CRPS", "spread", box=box.SIMPLE)
    table.add_row(
        "interpolation",
        f"{float(error.square().mean().sqrt()):.3f}",
        f"{float(error.abs().mean()):.3f}",  # of a single estimate, its mean absolute error
        "",
    )
    table.add_row(scores.label, f"{scores.rmse:.3f}", f"{scores.crps:.3f}", f"{scores.spread:.3f}")
    console.print(table)
    kept = (model.coarsen(ensemble) - coarse).square().mean().sqrt()
    console.print(f"The members' means over the cells differ from the input by {kept:.3f} K.")

    rows, columns = np.meshgrid(LAT, LON, indexing="ij")
    figure = analysis_panel(
        truth,
        PointValues(rows.ravel(), columns.ravel(), coarse.flatten()),
        ensemble,
        grid.lat,
        grid.lon,
        units="K",
        title=f"2 m temperature from means over degrees, {options.members} members",
        path=OUT / "super_resolution.png",
    )
    console.print(f"{time.perf_counter() - start:.0f} s; see {figure}.", soft_wrap=True)


if __name__ == "__main__":
    main()
