# SPDX-License-Identifier: Apache-2.0
"""``ddo verify analysis=``: scores and figures of analyses against the truth.

Axes: ``E`` members, ``T`` times, ``H W`` grid, ``S`` shells of wavenumbers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from omegaconf import DictConfig
from torch import Tensor

from ddo_modulus.cli.options import flag, integer, unwrapped
from ddo_modulus.cli.verify.domain import grid_of, nearest
from ddo_modulus.console import progress_bar, show
from ddo_modulus.data.output import REPORT, check_output, replacing
from ddo_modulus.data.source import check_values, is_cartesian, open_dataset
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import Grid, LatLonGrid
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.inference.quality import QualityControl
from ddo_modulus.observations.table import ObservationTable, read_table
from ddo_modulus.plots import (
    PointValues,
    analysis_panel,
    rank_histogram_figure,
    spectra_figure,
)
from ddo_modulus.verification import (
    RankHistogram,
    Scores,
    basis_of,
    markdown_table,
    rank_histogram,
    rich_table,
    score,
)


@dataclass(frozen=True)
class Spectra:
    """Power spectra, mean over times (and members): ``(S,)`` each.

    Wavenumbers are waves over the domain (torus), waves per 1000 km (region), degree (globe).
    """

    wavenumber: Tensor
    truth: Tensor
    mean: Tensor
    members: Tensor


def run(config: DictConfig) -> None:
    """Score an analysis and write tables and figures; keys in ``conf/verify.yaml``.

    Raises:
        InputError: If analysis and truth do not fit together, or the folder exists.
    """
    if config.truth is None:
        raise InputError("analysis= needs truth=...: what the analyses are to be scored against")
    overwrite = flag(config, "overwrite")
    read = [config[key] for key in ("analysis", "truth", "observations")]
    out = check_output(config.out, overwrite=overwrite, kind=REPORT, inputs=read)
    seed = integer(config, "seed", 0)
    analysis = open_dataset(config.analysis)
    if analysis.sizes.get("ensemble", 1) < 2:
        raise InputError(
            f"{config.analysis} has one member, so it has no spread to verify; assimilate with "
            "ensemble=2 or more"
        )
    table = _used_observations(config)
    truth = matching_truth(config.truth, analysis, config.trajectory)
    check_values(truth, str(config.truth))
    check_values(analysis, str(config.analysis))
    grid = grid_of(analysis)
    stations = [pd.DataFrame()] * analysis.sizes["time"]
    if table is not None:
        tolerance = pd.Timedelta(float(analysis.attrs.get("tolerance_seconds", 0)), "s")
        stations = _in_grid(table, grid, analysis["time"].values, tolerance.to_timedelta64())
    rows: list[Scores] = []
    report: dict[str, object] = {}
    with (
        replacing(out, overwrite=overwrite, kind=REPORT) as folder,
        progress_bar("verify") as progress,
    ):
        folder.mkdir()
        for number, name in enumerate(map(str, truth.data_vars)):
            ensemble = torch.from_numpy(analysis[name].values)
            reference = torch.from_numpy(truth[name].values)
            units = str(analysis[name].attrs.get("units", "1"))
            weights = torch.from_numpy(grid.area())
            where = {f"{name}, all points": torch.ones(reference.shape, dtype=torch.bool)}
            if table is not None:
                where[f"{name}, away from stations"] = away(stations, grid)
            for label, mask in where.items():
                generator = torch.Generator().manual_seed(seed)
                scores = score(
                    ensemble, reference, label=label, units=units, weights=weights, mask=mask
                )
                ranks = rank_histogram(ensemble, reference, generator=generator, mask=mask)
                thinned = rank_histogram(
                    ensemble, reference, generator=generator, mask=mask, points_per_field=1
                )
                rows.append(scores)
                report[label] = entry(scores, ranks, thinned)
            spectra = spectra_of(ensemble, reference, grid)
            report[f"{name}, spectra"] = {k: v.tolist() for k, v in vars(spectra).items()}
            title = f"{name}, {ensemble.shape[1]} analyses of {ensemble.shape[0]} members"
            rank_histogram_figure(
                ranks.counts,
                p_value=thinned.p_value,
                title=title,
                path=folder / f"{name}_ranks.png",
            )
            _draw_spectra(spectra, grid, title, units, folder / f"{name}_spectra.png")
            _draw_panel(name, ensemble, reference, analysis, stations[0], folder)
            progress(number + 1, len(truth.data_vars))
        text = markdown_table(rows)
        (folder / "scores.md").write_text(text + "\n")
        (folder / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    show(rich_table(rows, title=str(config.analysis)))
    print(out)


def matching_truth(path: str, analysis: xr.Dataset, trajectory: int | None) -> xr.Dataset:
    """Truth of the analysis' variables, at its times and on its grid, ``(time, lat, lon)``.

    Args:
        path: File or store that holds it, on any larger period or region.
        analysis: Dataset in canonical form.
        trajectory: Which one to take, if there are several.

    Raises:
        InputError: If a variable, a time or a part of the grid is missing.
    """
    truth = open_dataset(path)
    names = [name for name in analysis.data_vars if name in truth.data_vars]
    if not names:
        raise InputError(
            f"{path} has none of the analysed variables ({', '.join(map(str, analysis.data_vars))})"
            f"; it has {', '.join(map(str, truth.data_vars))}"
        )
    truth = truth[names]
    for axis in ("trajectory", "ensemble"):
        count = truth.sizes.get(axis, 1)
        index = trajectory if axis == "trajectory" and trajectory is not None else 0
        if count > 1 and (axis == "ensemble" or trajectory is None):
            raise InputError(f"{path} has {count} of {axis}; the truth is one: select it")
        if axis in truth.dims:
            if not 0 <= index < count:
                raise InputError(f"trajectory={index} is not one of the {count} in {path}")
            truth = truth.isel({axis: index}, drop=True)
    times = analysis["time"].values
    missing = times[~np.isin(times, truth["time"].values)]
    if len(missing):
        shown = ", ".join(str(pd.Timestamp(t)) for t in missing[:5])
        first, last = (pd.Timestamp(truth["time"].values[i]) for i in (0, -1))
        raise InputError(
            f"{path} lacks {len(missing)} of {len(times)} analysis times: {shown}"
            f"{', ...' if len(missing) > 5 else ''}; it has {first} to {last}"
        )
    if is_cartesian(truth) != is_cartesian(analysis):
        raise InputError(f"{path} and the analysis are not both on the globe, or both in a box")
    turn = None if is_cartesian(truth) else 360.0
    chosen = {
        axis: nearest(truth[axis].values, analysis[axis].values, period, f"{path}: {axis}")
        for axis, period in (("lat", None), ("lon", turn))
    }
    return truth.sel(time=times).isel(chosen)


def spectra_of(ensemble: Tensor, truth: Tensor, grid: Grid) -> Spectra:
    """Spectra of deviations from the truth's mean over the domain, in shells of wavenumbers.

    Args:
        ensemble: ``(E, T, H, W)``.
        truth: ``(T, H, W)``.
        grid: Of the fields.
    """
    basis = basis_of(grid)
    weights = torch.from_numpy(grid.area())
    offset = (truth.double() * weights).mean()
    fields = (truth.double(), ensemble.double().mean(0), ensemble.double())
    powers = [basis.power(x - offset).flatten(0, -2).mean(0) for x in fields]
    unit = 1.0 if isinstance(basis, SphericalBasis) else 2 * np.pi
    return Spectra(basis.shells()[0] / unit, *powers)


def away(stations: list[pd.DataFrame], grid: Grid) -> Tensor:
    """Points ``(T, H, W)`` that no observation of their time is interpolated from."""
    masks = np.ones((len(stations), grid.shape[0] * grid.shape[1]), bool)
    for mask, rows in zip(masks, stations, strict=True):
        mask[grid.bilinear(rows["lat"], rows["lon"])[0]] = False
    return torch.from_numpy(masks.reshape(len(stations), *grid.shape))


def _used_observations(config: DictConfig) -> ObservationTable | None:
    """The table that was assimilated, without the reports whose quality marks were not accepted."""
    if config.observations is None:
        return None
    table = read_table(config.observations, columns=unwrapped(config.columns))
    quality = QualityControl(accept=unwrapped(config.quality.accept))
    return replace(table, frame=table.frame[~quality.unaccepted(table.frame)])


def _in_grid(
    table: ObservationTable, grid: Grid, times: np.ndarray, tolerance: np.timedelta64
) -> list[pd.DataFrame]:
    """Observations of each time that lie in the grid."""
    windows = table.at(times, tolerance)
    return [rows[grid.contains(rows["lat"], rows["lon"])] for rows in windows]


def entry(scores: Scores, ranks: RankHistogram, thinned: RankHistogram) -> dict[str, object]:
    """Scores and rank histograms as JSON holds them."""
    return {
        **{k: v for k, v in asdict(scores).items() if k != "label"},
        "rank_histogram": {
            "counts": ranks.counts.tolist(),
            "thinned_points": int(thinned.counts.sum()),
            "chi_square": thinned.chi_square,
            "p_value": thinned.p_value,
        },
    }


def _draw_spectra(spectra: Spectra, grid: Grid, title: str, units: str, path: Path) -> None:
    regional = isinstance(grid, LatLonGrid) and not grid.is_global
    spectra_figure(
        spectra.wavenumber,
        {"truth": spectra.truth, "analysis mean": spectra.mean, "members": spectra.members},
        title=title,
        path=path,
        units=units,
        xlabel="waves per 1000 km" if regional else "wavenumber (waves over the domain)",
    )


def _draw_panel(
    name: str,
    ensemble: Tensor,
    truth: Tensor,
    analysis: xr.Dataset,
    stations: pd.DataFrame,
    folder: Path,
) -> None:
    """Draw the first analysis next to the truth, with its observations of the variable."""
    lon = analysis["lon"].values
    points = PointValues([], [], [])
    if len(stations):
        rows = stations[stations["variable"] == name]
        columns = rows["lon"] if is_cartesian(analysis) else lon[0] + (rows["lon"] - lon[0]) % 360
        points = PointValues(rows["lat"], columns, rows["observation"])
    analysis_panel(
        truth[0],
        points,
        ensemble[:, 0],
        analysis["lat"].values,
        lon,
        units=str(analysis[name].attrs.get("units", "1")),
        title=f"{name}, {pd.Timestamp(analysis['time'].values[0])}",
        path=folder / f"{name}_analysis.png",
        labels=("x", "y") if is_cartesian(analysis) else ("longitude", "latitude"),
    )
