# SPDX-License-Identifier: Apache-2.0
"""``ddo verify samples=``: are generated fields of the truth's law?

Axes: ``E`` members, ``T`` times, ``H W`` grid.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from omegaconf import DictConfig
from torch import Tensor

from ddo_modulus.cli.options import flag, integer
from ddo_modulus.cli.verify.analyses import entry
from ddo_modulus.cli.verify.domain import grid_of, nearest, same_domain
from ddo_modulus.console import progress_bar, show
from ddo_modulus.data.source import check_values, open_dataset, slabs
from ddo_modulus.data.store import check_output, replacing
from ddo_modulus.errors import InputError
from ddo_modulus.fields.basis import Basis, SphericalBasis
from ddo_modulus.fields.grid import BoxGrid, Grid
from ddo_modulus.plots import CurvePanel, curves_figure, rank_histogram_figure
from ddo_modulus.verification import (
    Comparison,
    Curve,
    RankHistogram,
    Scores,
    basis_of,
    markdown_table,
    pool,
    rank_histogram,
    rich_table,
    score,
)
from ddo_modulus.verification.comparison import COLUMNS, Comparer
from ddo_modulus.verification.measures import Measured, Measures, temporal_lags
from ddo_modulus.verification.tables import markdown, rich

log = logging.getLogger(__name__)

_TRUTH, _LOWRES = "_truth", "_lowres"
_PIECE_BYTES = 2**26  # of fields that are measured together
_FEW = 10  # true fields, below which their own variability is a guess

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Inputs:
    """What is compared.

    Attributes:
        samples: Generated variables.
        truth: The same variables, true, on the same domain.
        targets: What each sample should have been, at the samples' times, if conditional.
        trajectories: Whether the samples' frames follow each other in time.
    """

    samples: xr.Dataset
    truth: xr.Dataset
    targets: xr.Dataset | None
    trajectories: bool


def run(config: DictConfig) -> None:
    """Compare samples with the truth and write tables and figures; keys in ``conf/verify.yaml``.

    Raises:
        InputError: If samples and truth do not fit together, or the folder exists.
    """
    overwrite = flag(config, "overwrite")
    out = check_output(config.out, overwrite=overwrite)
    seed, resamples = integer(config, "seed", 0), integer(config, "resamples", 2)
    if config.octaves is not None:
        integer(config, "octaves")
    inputs = open_inputs(config)
    grids = grid_of(inputs.samples), grid_of(inputs.truth)
    largest = _angular(config.largest_wavenumber, basis_of(grids[1]))
    measures_of = {
        str(name): _measures(inputs, str(name), grids, largest, config.octaves)
        for name in inputs.samples.data_vars
    }
    report: dict[str, object] = {}
    tables: list[str] = []
    shown = []
    with replacing(out, overwrite=overwrite) as folder, progress_bar("verify") as progress:
        folder.mkdir()
        total = 2 * sum(
            field.size for side in (inputs.samples, inputs.truth) for field in side.values()
        )
        done = 0

        def advance(values: int) -> None:
            nonlocal done
            done += values
            progress(done, total)

        for name, measures in measures_of.items():
            samples, truth = inputs.samples[name], inputs.truth[name]
            units = str(truth.attrs.get("units", samples.attrs.get("units", "1")))
            measures.mean = _mean(truth, grids[1], advance)
            sides = [
                Measured.of(_measure(field, measures, advance), size)
                for field, size in ((samples, _size(inputs, samples)), (truth, _runs(truth)))
            ]
            found = Comparer(measures, *sides, units=units, resamples=resamples, seed=seed).run()
            title = f"{name}, {_count(samples)} against {_count(truth)}"
            _draw(name, found, measures.grid, title, units, folder)
            cells = [quantity.cells() for quantity in found.quantities]
            tables.append(f"## {name}\n\n{_explained(inputs, name, sides, measures)}\n")
            tables.append(markdown(COLUMNS, cells) + "\n")
            shown.append(rich(COLUMNS, cells, title=title))
            report[name] = _entries(found, sides, measures)
            if inputs.targets is not None and samples.sizes.get("ensemble", 1) > 1:
                scores, ranks, thinned = ensemble_scores(
                    samples, inputs.targets[name], grids[0], units, seed
                )
                report[f"{name}, all points"] = entry(scores, ranks, thinned)
                tables.append(markdown_table([scores]) + "\n")
                shown.append(rich_table([scores]))
                rank_histogram_figure(
                    ranks.counts,
                    p_value=thinned.p_value,
                    title=f"{name}, {samples.sizes['time']} times, {scores.members} members",
                    path=folder / f"{name}_ranks.png",
                )
            advance(samples.size)
        progress(total, total)
        (folder / "scores.md").write_text("\n".join(tables))
        (folder / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    for table in shown:
        show(table)
    print(out)


# ---- what is compared -------------------------------------------------------------------------


def open_inputs(config: DictConfig) -> Inputs:
    """Open samples and truth and see that they fit together.

    Raises:
        InputError: If they do not, or if a value is missing.
    """
    path = str(config.samples)
    names, targeted = generated_variables(path)
    samples = open_dataset(path, names)
    names = [str(name) for name in samples.data_vars]
    if samples.sizes.get("trajectory", 1) > 1 and "ensemble" in samples.sizes:
        raise InputError(f"{path} has trajectories and members; select one trajectory")
    targets = None
    if targeted:
        targets = open_dataset(path, [name + _TRUTH for name in names])
        targets = targets.rename({name + _TRUTH: name for name in names})
    if config.truth is None and targets is None:
        raise InputError(
            f"{path} holds no <variable>{_TRUTH}; give truth=...: true fields to compare with"
        )
    truth = targets if config.truth is None else open_dataset(str(config.truth), names)
    assert truth is not None
    where = path if config.truth is None else str(config.truth)
    truth = same_domain(truth, samples, where)
    if targets is not None:
        targets = _at_samples(targets, samples, path)
    _check_units(samples, truth, where)
    check_values(samples, path)
    check_values(truth, where)
    if targets is not None and targets is not truth:
        check_values(targets, path)
    count = min(field.size // _points(field) for field in truth.values())
    if count < 2:
        raise InputError(f"{where} holds one true field; its law takes several, ten or more")
    if count < _FEW:
        log.warning("%s: %d true fields tell little of their own variability", where, count)
    chosen = config.trajectories
    if chosen is not None:
        chosen = flag(config, "trajectories")
    else:
        chosen = str(samples.attrs.get("trajectory", False)).lower() in ("true", "1")
    if chosen:
        _check_steps(samples, truth, path, where)
    return Inputs(samples, truth, targets, chosen)


def generated_variables(path: str) -> tuple[list[str] | None, bool]:
    """Generated variables of a store, and whether it holds the truth of each.

    A conditional store has ``<variable>_truth`` and ``<variable>_lowres`` beside a variable, on
    other dimensions. Of anything else than such a store the answer is None: all variables.
    """
    try:
        names = {str(name) for name in xr.open_zarr(path, chunks=None, consolidated=False)}
    except Exception:  # no zarr store; whoever opens it says what is wrong with it
        return None, False
    beside = {n + tail for n in names for tail in (_TRUTH, _LOWRES)} & names
    if not beside:
        return None, False
    variables = sorted(names - beside)
    return variables, all(name + _TRUTH in names for name in variables)


def _at_samples(targets: xr.Dataset, samples: xr.Dataset, path: str) -> xr.Dataset:
    """The targets, once it is clear that they are at the samples' times and points."""
    for axis in ("time", "lat", "lon"):
        if targets.sizes[axis] != samples.sizes[axis]:
            raise InputError(
                f"{path}: the samples have {samples.sizes[axis]} of {axis}, their truth "
                f"{targets.sizes[axis]}; scores need both on one grid"
            )
    for axis in ("lat", "lon"):
        nearest(targets[axis].values, samples[axis].values, None, f"{path}: {axis}")
    return targets


def _check_units(samples: xr.Dataset, truth: xr.Dataset, path: str) -> None:
    for name in samples.data_vars:
        units = [side[name].attrs.get("units") for side in (samples, truth)]
        if None not in units and units[0] != units[1]:
            raise InputError(f"{name}: the samples are in {units[0]}, {path} in {units[1]}")


def _check_steps(samples: xr.Dataset, truth: xr.Dataset, path: str, where: str) -> None:
    """Refuse trajectories whose frames do not follow each other at the same even interval."""
    steps = []
    for dataset, label in ((samples, path), (truth, where)):
        if dataset.sizes["time"] < 2:
            raise InputError(f"{label} has one time, which is no trajectory; trajectories=false")
        seconds = np.diff(dataset["time"].values) / np.timedelta64(1, "ns") * 1e-9
        if np.ptp(seconds) > 1e-3 * seconds.mean():
            raise InputError(
                f"{label}: its times are not evenly spaced, {seconds.min():g} to "
                f"{seconds.max():g} s; select an even stretch, or trajectories=false"
            )
        steps.append(float(seconds.mean()))
    if abs(steps[0] - steps[1]) > 1e-3 * steps[1]:
        raise InputError(
            f"frames of the samples are {steps[0]:g} s apart, those of {where} {steps[1]:g} s; "
            "thin the finer ones, or compare without time: trajectories=false"
        )


def _runs(field: xr.DataArray) -> tuple[int, int]:
    """Number of trajectories or members, and times."""
    frames = field.sizes["time"]
    return field.size // _points(field) // frames, frames


def _size(inputs: Inputs, field: xr.DataArray) -> tuple[int, int]:
    """Independent runs of the samples and frames in each.

    Members that share a condition are not independent: each time then counts once.
    """
    runs, frames = _runs(field)
    if inputs.trajectories:
        return runs, frames
    return (frames if inputs.targets is not None else runs * frames), 1


def _points(field: xr.DataArray) -> int:
    return field.sizes["lat"] * field.sizes["lon"]


def _count(field: xr.DataArray) -> str:
    sizes = [f"{n} {d}" for d, n in field.sizes.items() if d not in ("lat", "lon")]
    return f"{' x '.join(sizes)} at {field.sizes['lat']}x{field.sizes['lon']}"


# ---- measuring, part by part ------------------------------------------------------------------


def _measures(
    inputs: Inputs,
    name: str,
    grids: tuple[Grid, Grid],
    largest: float | None,
    octaves: int | None,
) -> Measures:
    """What to measure of a variable, whose mean is yet to be found."""
    samples, truth = inputs.samples[name], inputs.truth[name]
    fields = max(field.size // _points(field) for field in (samples, truth))
    lags = 0
    if inputs.trajectories:
        lags = temporal_lags(samples.sizes["time"], truth.sizes["time"])
    return Measures(*grids, fields=fields, lags=lags, largest=largest, octaves=octaves)


def _mean(field: xr.DataArray, grid: Grid, advance: Progress) -> float:
    """Area-weighted mean over all fields."""
    area = grid.area() / grid.area().mean()
    total = 0.0
    for slab in slabs(field, str(field.name)):
        total += float((slab.values.astype(np.float64) * area).sum())
        advance(slab.size)
    return total / field.size


def _measure(
    field: xr.DataArray, measures: Measures, advance: Progress
) -> Iterator[dict[str, Tensor]]:
    """Measures of all fields, trajectory by trajectory, some of them in memory at a time."""
    lead = [str(d) for d in field.dims if d in ("trajectory", "ensemble")]
    length = max(1, _PIECE_BYTES // (8 * _points(field)))
    for index in itertools.product(*(range(field.sizes[d]) for d in lead)):
        one = field.isel(dict(zip(lead, index, strict=True)))
        for start in range(0, one.sizes["time"], length):
            count = min(length, one.sizes["time"] - start)
            part = one.isel(time=slice(start, start + count + measures.lags)).values
            yield measures(torch.from_numpy(np.ascontiguousarray(part, np.float32)), count)
            advance(count * _points(field))


def ensemble_scores(
    samples: xr.DataArray, targets: xr.DataArray, grid: Grid, units: str, seed: int
) -> tuple[Scores, RankHistogram, RankHistogram]:
    """Scores of the ensemble at each time against its own truth; ranks of all and thinned points.

    Args:
        samples: On ``(ensemble, time, lat, lon)``.
        targets: On ``(time, lat, lon)``.
        grid: Of both.
        units: Of both.
        seed: Of ties and thinning.
    """
    weights = torch.from_numpy(grid.area())
    generator = torch.Generator().manual_seed(seed)
    rows: list[Scores] = []
    counts: list[tuple[Tensor, Tensor]] = []
    for part in slabs(xr.Dataset({"samples": samples, "truth": targets}), str(samples.name)):
        ensemble, truth = (torch.from_numpy(part[key].values) for key in ("samples", "truth"))
        label = f"{samples.name}, all points"
        rows.append(score(ensemble, truth, label=label, units=units, weights=weights))
        ranks = rank_histogram(ensemble, truth, generator=generator)
        thinned = rank_histogram(ensemble, truth, generator=generator, points_per_field=1)
        counts.append((ranks.counts, thinned.counts))
    every, few = (RankHistogram.of(torch.stack(list(c)).sum(0)) for c in zip(*counts, strict=True))
    return pool(rows), every, few


# ---- report -----------------------------------------------------------------------------------


def _unit_wavenumber(basis: Basis) -> float:
    """Angular wavenumber of what a reader counts in: waves, or degrees on the globe."""
    return 1.0 if isinstance(basis, SphericalBasis) else 2 * np.pi


def _angular(largest: object, basis: Basis) -> float | None:
    if largest is None:
        return None
    if isinstance(largest, bool) or not isinstance(largest, int | float) or not largest > 0:
        raise InputError(f"largest_wavenumber={largest} must be a positive number")
    if isinstance(basis, SphericalBasis):  # the wavenumber of a degree
        return float(np.sqrt(largest * (largest + 1)))
    return 2 * np.pi * float(largest)


def _explained(inputs: Inputs, name: str, sides: list[Measured], measures: Measures) -> str:
    """What the table's numbers mean, for this comparison."""
    samples, truth = inputs.samples[name], inputs.truth[name]
    runs, frames = sides[1].size
    drawn = "whole trajectories" if runs > 1 and frames > 1 else "single fields"
    if runs == 1:
        drawn = "blocks of consecutive times"
    like = "single frames"
    if inputs.trajectories:
        like = f"stretches of {min(frames, sides[0].size[1])} frames"
    independent = sides[0].size[0] * sides[0].size[1]
    text = (
        f"Samples: {_count(samples)}. Truth: {_count(truth)}. *Truth's own*: the distance between "
        f"two resamplings of the truth, one of {drawn} and as large as the truth, one of {like} "
        f"and as large as the samples ({independent} fields"
    )
    if inputs.targets is not None and not inputs.trajectories:
        text += ", members of one time counted once"
    text += "). A ratio of about one: as near as samples of the truth's law come."
    if samples.shape[-2:] != truth.shape[-2:]:
        height, width = measures.grid.shape
        text += (
            " Spectra are compared over the shells that both grids fill, F2ID by features that "
            f"know no grid, all else on {height}x{width} points, the finer fields truncated."
        )
    return text


def _entries(found: Comparison, sides: list[Measured], measures: Measures) -> dict[str, object]:
    quantities = {
        q.name: {**{k: v for k, v in asdict(q).items() if k != "name"}, "ratio": _finite(q.ratio)}
        for q in found.quantities
    }
    return {
        "sizes": {"samples": sides[0].size, "truth": sides[1].size},
        "grid": measures.grid.shape,
        "octaves": measures.octaves,
        "quantities": {
            name: {k: _finite(v) if isinstance(v, float) else v for k, v in row.items()}
            for name, row in quantities.items()
        },
        "curves": {
            name: {k: v.tolist() for k, v in vars(curve).items()}
            for name, curve in found.curves.items()
        },
    }


def _finite(value: float) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if np.isfinite(value) else None


def _draw(name: str, found: Comparison, grid: Grid, title: str, units: str, folder: Path) -> None:
    basis = basis_of(grid)
    unit = _unit_wavenumber(basis)
    if isinstance(grid, BoxGrid):
        wave, distance = "wavenumber (waves over a unit length)", "distance"
        rows, columns = "along y", "along x"
    else:
        wave, distance = "waves per 1000 km", "distance (km)"
        rows, columns = "along meridians", "along parallels"
        if isinstance(basis, SphericalBasis):
            wave = "degree"
    suffix = "" if units in ("", "1") else f" ({units})"

    def panel(
        key: str, title: str, xlabel: str, *, scale: float = 1.0, x: bool = False, y: bool = False
    ) -> CurvePanel:
        curve: Curve = found.curves[key]
        values = (curve.samples, curve.truth, curve.low, curve.high)
        return CurvePanel(title, xlabel, curve.x / scale, *values, log_x=x, log_y=y)

    sheets = {
        "distribution": [
            panel("spectrum", "power spectrum", wave, scale=unit, x=True, y=True),
            panel("histogram", "probability density", f"{name}{suffix}", y=True),
        ],
        "structure": [
            panel(f"S{p} along {axis}", f"S{p} {label}", distance, x=True, y=True)
            for axis, label in (("rows", rows), ("columns", columns))
            for p in (2, 3, 4)
        ],
        "autocovariance": [
            panel(f"autocovariance along {axis}", f"autocovariance / variance {label}", distance)
            for axis, label in (("rows", rows), ("columns", columns))
        ],
    }
    if "seam" in found.curves:
        lag, spectrum = "temporal autocovariance", "time-difference spectrum"
        sheets["time"] = [
            panel(lag, "autocovariance / variance in time", "lag (frames)"),
            panel("seam", "time-difference energy over its mean", "frame"),
            panel(spectrum, "spectrum of time differences", wave, scale=unit, x=True, y=True),
        ]
    for sheet, panels in sheets.items():
        curves_figure(panels, title=title, path=folder / f"{name}_{sheet}.png")
