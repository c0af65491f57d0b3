# SPDX-License-Identifier: Apache-2.0
"""``ddo verify samples=``: are generated fields of the truth's law?

Axes: ``E`` members, ``T`` times, ``H W`` grid.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator

import numpy as np
import torch
import xarray as xr
from omegaconf import DictConfig
from torch import Tensor

from ddo_modulus.cli.options import flag, integer
from ddo_modulus.cli.verify.analyses import entry
from ddo_modulus.cli.verify.domain import grid_of
from ddo_modulus.cli.verify.inputs import (
    Inputs,
    describe,
    independent_size,
    open_inputs,
    points,
    runs,
)
from ddo_modulus.cli.verify.report import angular_wavenumber, draw, entries, explain
from ddo_modulus.console import progress_bar, show
from ddo_modulus.data.output import REPORT, check_output, replacing
from ddo_modulus.data.source import slabs
from ddo_modulus.fields.grid import Grid
from ddo_modulus.plots import rank_histogram_figure
from ddo_modulus.verification import (
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

_PIECE_BYTES = 2**26  # of fields that are measured together

Progress = Callable[[int], None]


def run(config: DictConfig) -> None:
    """Compare samples with the truth and write tables and figures; keys in ``conf/verify.yaml``.

    Raises:
        InputError: If samples and truth do not fit together, or the folder exists.
    """
    overwrite = flag(config, "overwrite")
    read = [config[key] for key in ("samples", "truth")]
    out = check_output(config.out, overwrite=overwrite, kind=REPORT, inputs=read)
    seed, resamples = integer(config, "seed", 0), integer(config, "resamples", 2)
    if config.octaves is not None:
        integer(config, "octaves")
    inputs = open_inputs(config)
    grids = grid_of(inputs.samples), grid_of(inputs.truth)
    largest = angular_wavenumber(config.largest_wavenumber, basis_of(grids[1]))
    measures_of = {
        str(name): _measures(inputs, str(name), grids, largest, config.octaves)
        for name in inputs.samples.data_vars
    }
    report: dict[str, object] = {}
    tables: list[str] = []
    shown = []
    with (
        replacing(out, overwrite=overwrite, kind=REPORT) as folder,
        progress_bar("verify") as progress,
    ):
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
                for field, size in (
                    (samples, independent_size(inputs, samples)),
                    (truth, runs(truth)),
                )
            ]
            found = Comparer(measures, *sides, units=units, resamples=resamples, seed=seed).run()
            title = f"{name}, {describe(samples)} against {describe(truth)}"
            draw(name, found, measures.grid, title, units, folder)
            cells = [quantity.cells() for quantity in found.quantities]
            tables.append(f"## {name}\n\n{explain(inputs, name, sides, measures)}\n")
            tables.append(markdown(COLUMNS, cells) + "\n")
            shown.append(rich(COLUMNS, cells, title=title))
            report[name] = entries(found, sides, measures)
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
    fields = max(field.size // points(field) for field in (samples, truth))
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
    length = max(1, _PIECE_BYTES // (8 * points(field)))
    for index in itertools.product(*(range(field.sizes[d]) for d in lead)):
        one = field.isel(dict(zip(lead, index, strict=True)))
        for start in range(0, one.sizes["time"], length):
            count = min(length, one.sizes["time"] - start)
            part = one.isel(time=slice(start, start + count + measures.lags)).values
            yield measures(torch.from_numpy(np.ascontiguousarray(part, np.float32)), count)
            advance(count * points(field))


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
