# SPDX-License-Identifier: Apache-2.0
"""``ddo assimilate``: ensembles of states given observations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from ddo_modulus.cli.options import (
    flag,
    integer,
    number,
    optional_number,
    pick_device,
    plain,
    unwrapped,
)
from ddo_modulus.console import notify, progress_bar, show
from ddo_modulus.data.orography import read_orography
from ddo_modulus.data.output import FILE, STORE, check_output, replacing
from ddo_modulus.data.source import is_cartesian, open_dataset
from ddo_modulus.data.store import write_store
from ddo_modulus.diffusion.noise import level_range
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.engines import EngineOptions, open_engine, pick_precision
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.inference.assimilate import assimilate
from ddo_modulus.inference.backgrounds import BackgroundConfig
from ddo_modulus.inference.quality import QualityControl
from ddo_modulus.inference.reports import report_operators, usable
from ddo_modulus.observations.table import NO_TOLERANCE, read_table

_ROWS_SHOWN = 24


def run(config: DictConfig) -> None:
    """Assimilate a table of observations; the keys are those of ``conf/assimilate.yaml``.

    Raises:
        InputError: If an argument, the package or the table cannot be used, or the store exists.
    """
    overwrite = flag(config, "overwrite")
    inputs = [config[key] for key in ("package", "observations", "background", "orography")]
    out = check_output(config.out, overwrite=overwrite, kind=STORE, inputs=inputs)
    rejects = None
    if config.rejected is not None:
        rejects = _table_output(config.rejected, overwrite, inputs)
        if rejects.absolute() == out.absolute():
            raise InputError(f"out and rejected are both {out}; give the table a name of its own")
    tolerance = _duration(config.tolerance, "tolerance")
    table = read_table(config.observations, columns=unwrapped(config.columns))
    package = Package.load(config.package, pick_device(config.device))
    if config.orography is not None:
        package.orography = read_orography(config.orography, package.grid)
    operators = replace(report_operators(package), lapse_rate=number(config, "lapse_rate"))
    reports = usable(package, table, operators, required=config.missing != "prior")
    times = analysis_times(config, reports.frame["time"].to_numpy())
    quality = QualityControl(
        gross_error=optional_number(config, "gross_error"),
        duplicates=config.duplicates,
        thinning_km=optional_number(config, "thinning.km"),
        superob_km=optional_number(config, "superob.km"),
        tolerance=tolerance,
        default_error=unwrapped(config.default_error),
        accept=unwrapped(config.quality.accept),
        missing=config.missing,
        operators=operators,
    )
    options: dict[str, Any] = {
        "ensemble": integer(config, "ensemble"),
        "seed": integer(config, "seed", 0),
        "posterior": _posterior(config),
        "quality": quality,
        "background": _background(config, package),
        "grid": _grid(config, package),
    }
    engine = None
    if config.engine != "torch":  # last, since to make one may be long work
        folder = None if config.engines is None else Path(config.engines)
        precision = pick_precision(config.precision)
        engine_options = EngineOptions(folder, precision, batch=config.batch, report=notify)
        engine = open_engine(config.engine, package, engine_options)
    with progress_bar("assimilate") as progress:
        result = assimilate(package, table, times, **options, engine=engine, progress=progress)
    analysis = result.dataset.assign_attrs(package=str(config.package), engine=config.engine)
    write_store(analysis, out, overwrite=overwrite)
    if rejects is not None:
        _write_table(result.rejected, rejects, overwrite)
    show(summary(analysis))
    for reason, count in result.dropped.items():
        print(f"left out, {reason}: {count} rows")
    for note, count in result.notes.items():
        print(f"{note}: {count} rows")
    if rejects is not None:
        print(rejects)
    print(out)


def analysis_times(config: DictConfig, available: np.ndarray) -> np.ndarray:
    """Times that a configuration asks for, ``datetime64[ns]``.

    Args:
        config: Keys ``time``, ``start``, ``end`` and ``step``.
        available: Times of the observations.

    Raises:
        InputError: If a time cannot be understood, the keys contradict each other, or none is left.
    """
    start, end = (parse_time(config[key], key) for key in ("start", "end"))
    if config.time is not None:
        if not all(config[key] is None for key in ("start", "end", "step")):
            raise InputError("give either time, or start, end and step")
        listed = config.time if OmegaConf.is_list(config.time) else [config.time]
        return np.array([parse_time(value, "time") for value in listed], "datetime64[ns]")
    if config.step is not None:
        step = _duration(config.step, "step")
        if start is None or end is None or step == NO_TOLERANCE:
            raise InputError("a step needs start and end, and must be positive")
        return np.arange(start, end + np.timedelta64(1, "ns"), step)
    times = np.unique(available)
    if not len(times):
        raise InputError("there are no usable observations: give the time, or start, end and step")
    inside = np.ones(len(times), bool)
    if start is not None:
        inside &= times >= start
    if end is not None:
        inside &= times <= end
    if not inside.any():
        raise InputError(
            f"no observations from start={config.start} to end={config.end}; the table runs from "
            f"{pd.Timestamp(times[0])} to {pd.Timestamp(times[-1])} UTC"
        )
    return times[inside]


def summary(analysis: xr.Dataset) -> Table:
    """Table for the terminal: diagnostics and RMS spread for each of the first times."""
    times, members = analysis["time"].values, analysis.sizes["ensemble"]
    table = Table(title="analyses")
    table.add_column("time", no_wrap=True)
    if len(times) > _ROWS_SHOWN:
        table.caption = f"and {len(times) - _ROWS_SHOWN} more"
    counts, numbers = ["observations", "dropped"], ["inflation", "chi2"]
    for name in ("used", "dropped", *numbers):
        table.add_column(name, justify="right")
    for name, label in (("omb", "O-B"), ("oma", "O-A")):
        for column in (str(n) for n in analysis.data_vars if str(n).endswith(f"_{name}")):
            numbers.append(column)
            units = analysis[column].attrs["units"]
            table.add_column(f"{column[:-4]}\n{label} ({units})", justify="right")
    fields = [str(name) for name, field in analysis.data_vars.items() if "lat" in field.dims]
    for name in fields:
        table.add_column(f"{name}\nspread ({analysis[name].attrs['units']})", justify="right")
    degrees = 0.0 if is_cartesian(analysis) else analysis["lat"].values
    weight = xr.zeros_like(analysis["lat"]) + np.cos(np.deg2rad(degrees))
    for i, time in enumerate(times[:_ROWS_SHOWN]):
        row = analysis.isel(time=i)
        cells = [str(int(row[name])) for name in counts]
        cells += [f"{float(row[name]):.3g}" for name in numbers]
        for name in fields if members > 1 else ():
            variance = row[name].var("ensemble", ddof=1).weighted(weight).mean()
            cells.append(f"{float(variance) ** 0.5:.3g}")
        table.add_row(f"{pd.Timestamp(time):%Y-%m-%d %H:%M:%S}", *cells)
    return table


def parse_time(value: object, key: str) -> np.datetime64 | None:
    """Time of a configuration, UTC; None if there is none.

    Raises:
        InputError: If it cannot be understood.
    """
    if value is None:
        return None
    try:
        time = np.datetime64(pd.to_datetime(str(value), utc=True).tz_convert(None), "ns")
    except (ValueError, TypeError) as error:
        raise InputError(f"{key}={value} is no time; write it as 2019-03-27T06:00") from error
    return time


def _duration(value: object, key: str) -> np.timedelta64:
    try:
        duration = np.timedelta64(pd.Timedelta(str(value)), "ns")
    except ValueError as error:
        raise InputError(f"{key}={value} is no duration; write it as 30min or 6h") from error
    if np.isnat(duration) or duration < NO_TOLERANCE:
        raise InputError(f"{key}={value} must not be negative; write it as 30min or 6h")
    return duration


def _posterior(config: DictConfig) -> PosteriorConfig:
    """How to sample; what is null is left to the package."""
    options = plain(config.posterior)
    level_range(options["guidance_interval"], "posterior.guidance_interval")
    batch = integer(config, "batch")
    return PosteriorConfig.of({**options, "inflation": config.inflation, "batch": batch})


def _background(config: DictConfig, package: Package) -> BackgroundConfig | None:
    """The forecast that a configuration names, with its errors."""
    error = unwrapped(config.background_error)
    length = number(config, "background_length")
    if config.background is None:
        if error is not None:
            raise InputError("background_error is that of a background: give background as well")
        return None
    if error is None:
        raise InputError("a background needs background_error, its standard deviation by channel")
    return BackgroundConfig(error, length, open_dataset(config.background, package.channels))


def _grid(config: DictConfig, package: Package) -> LatLonGrid | None:
    """Grid of ``grid.region`` and ``grid.spacing``; what is null is the package's own."""
    region, spacing = config.grid.region, config.grid.spacing
    if region is None and spacing is None:
        return None
    own = package.grid
    if not isinstance(own, LatLonGrid):
        raise InputError("grid.region and grid.spacing are in degrees; this package lives on a box")
    try:
        south, north, west, east = (
            (own.lat.min(), own.lat.max(), own.lon.min(), own.lon.max())
            if region is None
            else (float(v) for v in region)
        )
        dlat, dlon = (
            (abs(own.lat[1] - own.lat[0]), own.lon[1] - own.lon[0])
            if spacing is None
            else (float(v) for v in spacing)
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"grid.region={region} and grid.spacing={spacing} must be [south,north,west,east] and "
            "[dlat,dlon]"
        ) from error
    if not (north > south and east > west and dlat > 0 and dlon > 0):
        raise InputError(f"grid.region={region} with grid.spacing={spacing} is no region")
    rows, columns = (int(n + 1e-6) + 1 for n in ((north - south) / dlat, (east - west) / dlon))
    return LatLonGrid(north - dlat * np.arange(rows), west + dlon * np.arange(columns))


def _table_output(path: str, overwrite: bool, others: list[object]) -> Path:
    if Path(path).suffix not in (".parquet", ".csv"):
        raise InputError(f"rejected={path}: name a .parquet or .csv file")
    return check_output(path, overwrite=overwrite, kind=FILE, inputs=others)


def _write_table(table: pd.DataFrame, path: Path, overwrite: bool) -> None:
    with replacing(path, overwrite=overwrite, kind=FILE) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
