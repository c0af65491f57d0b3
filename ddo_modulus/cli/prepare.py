# SPDX-License-Identifier: Apache-2.0
"""``ddo prepare``: fields of any format to a training store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from omegaconf import DictConfig

from ddo_modulus.cli.options import flag, integer
from ddo_modulus.console import progress_bar
from ddo_modulus.data.output import STORE, check_output
from ddo_modulus.data.reader import StateReader
from ddo_modulus.data.source import is_cartesian, open_dataset, reading_notes
from ddo_modulus.data.statistics import write_statistics
from ddo_modulus.data.training_store import write_training_store
from ddo_modulus.errors import InputError
from ddo_modulus.fields.domains import DOMAINS
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.training.domain import build_grid, domain_lengths

# Setting up the transform of a sphere of 361 rows takes a minute and .8 GB; both grow as the cube.
_MOST_ROWS = 361


def run(config: DictConfig) -> None:
    """Check fields and write them as a training store; keys in ``conf/prepare.yaml``.

    Raises:
        InputError: If the source cannot be used, or the store exists.
    """
    overwrite, compress = flag(config, "overwrite"), flag(config, "compress")
    fields = integer(config, "statistics.spectrum", 0)
    out = check_output(config.out, overwrite=overwrite, kind=STORE, inputs=[config.source])
    names = config.variables
    variables = [names] if isinstance(names, str) else names
    where = str(config.source)
    units = None if config.level_units is None else str(config.level_units)
    dataset = open_dataset(where, None if variables is None else list(variables), units)
    notes = reading_notes(dataset)
    dataset = select_period(dataset, config.start, config.end, where)
    period = config.statistics
    counted = select_period(dataset, period.start, period.end, f"{where}: statistics")["time"]
    domain = spectral_domain(dataset, config.domain) if fields else None
    spectrum = None
    if domain is not None:
        spectrum = domain, domain_lengths(build_grid(dataset, domain))

    def add_statistics(store: Path) -> None:
        reader = StateReader(store)
        first, last = counted.values[[0, -1]]
        inside = (reader.times >= first) & (reader.times <= last)
        with progress_bar("statistics") as progress:
            write_statistics(
                store,
                reader[np.flatnonzero(inside)],
                spectrum=spectrum,
                fields=fields,
                progress=progress,
            )

    with progress_bar("write") as progress:
        write_training_store(
            dataset,
            out,
            where,
            overwrite=overwrite,
            compress=compress,
            finish=add_statistics,
            progress=progress,
        )
    print("".join(f"{note}\n" for note in notes), end="")
    sizes = ", ".join(f"{n} {name}" for name, n in dataset.sizes.items())
    print(f"{out}: {', '.join(map(str, dataset.data_vars))}; {sizes}")
    first, last = (np.datetime_as_string(t, unit="m") for t in counted.values[[0, -1]])
    measured = "no spectrum" if domain is None else f"spectrum on the {domain}"
    print(f"{out}: statistics of {first} to {last}, {measured}")


def spectral_domain(dataset: xr.Dataset, domain: str | None) -> str | None:
    """Domain of the spectrum: the one asked for, or the one that fits the grid.

    None for a global grid too fine for a spectrum that nobody asked for.

    Raises:
        InputError: On an unknown domain, or a sphere that the grid does not go round.
    """
    if domain is not None and domain not in DOMAINS:
        raise InputError(f"domain={domain}: choose one of {', '.join(DOMAINS)}")
    grid = None if is_cartesian(dataset) else LatLonGrid(dataset["lat"], dataset["lon"])
    is_global = grid is not None and grid.is_global
    if domain == "sphere" and not is_global:
        raise InputError("domain=sphere: the grid does not go round the globe; choose box")
    if domain is not None:
        return domain
    if grid is None:
        return "torus"
    if not is_global:
        return "box"
    return "sphere" if len(grid.lat) <= _MOST_ROWS else None


def select_period(
    dataset: xr.Dataset, start: str | None, end: str | None, where: str
) -> xr.Dataset:
    """Times from ``start`` to ``end``, both included; a date alone means the whole day.

    Raises:
        InputError: If a bound is no date, or no time is left.
    """
    try:
        chosen = dataset.sel(time=slice(*(None if b is None else str(b) for b in (start, end))))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"start={start}, end={end}: not understood ({error}); write dates, as 2019-03-27T06:00"
        ) from error
    if chosen.sizes["time"] == 0:
        first, last = (pd.Timestamp(dataset["time"].values[i]) for i in (0, -1))
        raise InputError(f"{where}: no times in start={start}, end={end}; has {first} to {last}")
    return chosen
