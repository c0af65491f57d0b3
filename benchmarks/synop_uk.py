# SPDX-License-Identifier: Apache-2.0
"""Real station reports: the shipped prior of 2 m temperature at stations that it did not see.

    python benchmarks/synop_uk.py --synop pdbufr_perf_synop.bufr --era5 era5-2mt-2019-03-uk.grib

All SYNOP reports of one hour (2 November 2018, 12 UTC) are decoded from BUFR and checked. Over the
United Kingdom, a fifth of the stations is withheld, drawn at random; the others are assimilated,
and the analysis is compared with what the withheld ones reported. So it is for ensemble optimal
interpolation with the covariance of the same month of ERA5 (``era5_uk.py``), inflated by maximum
likelihood of the innovations, and for the climatology of that month.

The season differs: prior and covariance are of March 2019, the reports of November 2018.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import pandas as pd
from era5_uk import ERROR, EnsembleOI, probable_inflation
from report import machine, publish

from ddo_modulus.data.source import open_dataset
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.earth2.sources.bufr import decode_bufr
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.inference.assimilate import assimilate
from ddo_modulus.inference.quality import QualityControl, average_duplicates
from ddo_modulus.observations.table import read_table

TIME = np.datetime64("2018-11-02T12", "ns")
STATION_ERROR = 1.0  # K, what a cell of a quarter of a degree does not show included
WITHHELD = 0.2
LOW = 150.0  # m above the sea: where the model's surface and the station are about level
MEMBERS = 32
LENGTHS_KM = (300.0, 450.0, 600.0, 900.0)
OUT = Path(__file__).parent / "results" / "synop_uk.md"


def interpolation(grid: LatLonGrid, rows: pd.DataFrame) -> np.ndarray:
    """Bilinear weights ``(M, P)`` of all points of the grid at the stations."""
    index, weight = grid.bilinear(rows["lat"], rows["lon"])
    matrix = np.zeros((len(rows), grid.shape[0] * grid.shape[1]))
    np.add.at(matrix, (np.arange(len(rows))[:, None], index), weight)
    return matrix


def interpolated(
    oi: EnsembleOI, grid: LatLonGrid, kept: pd.DataFrame, withheld: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance at the withheld stations by optimal interpolation."""
    here, there = interpolation(grid, kept), interpolation(grid, withheld)
    mean, p = oi.mean[12], oi.covariance
    d, a = kept["observation"].to_numpy() - here @ mean, here @ p @ here.T
    unit = ERROR / STATION_ERROR  # the factor is sought in units of era5_uk's errors
    factor = probable_inflation(a * unit**2, d * unit, np.inf)
    inside = factor * a + STATION_ERROR**2 * np.eye(len(d))
    gain = np.linalg.solve(inside, factor * here @ p @ there.T).T
    variance = factor * np.einsum("mp,pq,mq->m", there, p, there)
    return there @ mean + gain @ d, variance - (gain * (factor * there @ p @ here.T)).sum(1)


def analysed(
    package: Package, grid: LatLonGrid, kept: pd.DataFrame, withheld: pd.DataFrame, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance at the withheld stations by the prior's analysis."""
    # Gross errors are gone already.
    quality = QualityControl(gross_error=None, default_error=STATION_ERROR)
    result = assimilate(
        package, read_table(kept), [TIME], ensemble=MEMBERS, seed=seed, quality=quality
    )
    members = result.dataset["t2m"].values[:, 0].reshape(MEMBERS, -1).astype(float)
    members = members @ interpolation(grid, withheld).T
    return members.mean(0), members.var(0, ddof=1)


def main() -> None:
    """Decode, check, withhold, assimilate, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--synop", type=Path, required=True, help="BUFR file of SYNOP reports")
    parser.add_argument("--era5", required=True, help="era5-2mt-2019-03-uk.grib")
    parser.add_argument("--draws", type=int, default=10, help="of the withheld stations")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    reports = decode_bufr(arguments.synop, ["t2m", "ws10m"], lambda key, make: make())
    table = read_table(reports.drop(columns="observation_error"))
    wrong = table.rejected[table.rejected["reason"] == "implausible value"]
    package = Package.load("uk_t2m")
    grid = package.grid
    assert isinstance(grid, LatLonGrid)

    checked = assimilate(package, table, [TIME], ensemble=1, posterior=PosteriorConfig(steps=2))
    gross = checked.rejected[checked.rejected["reason"] == "gross error"]
    frame = table.frame[(table.frame["variable"] == "t2m") & (table.frame["time"] == TIME)]
    frame = frame[grid.contains(frame["lat"], frame["lon"])].assign(observation_error=STATION_ERROR)
    places = set(zip(gross["lat"], gross["lon"], strict=True))
    sound = [p not in places for p in zip(frame["lat"], frame["lon"], strict=True)]
    frame = average_duplicates(frame[sound]).reset_index(drop=True)

    dataset = open_dataset(arguments.era5, ["t2m"])
    fields = dataset["t2m"].values[:600]  # days 1 to 25, as of the prior
    methods = {f"ensemble OI ({km:.0f} km)": EnsembleOI(fields, grid, km) for km in LENGTHS_KM}
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    for draw in range(arguments.draws):
        chosen = np.random.default_rng(draw).permutation(len(frame))
        count = round(WITHHELD * len(frame))
        withheld, kept = frame.iloc[chosen[:count]], frame.iloc[chosen[count:]]
        truth = withheld["observation"].to_numpy()
        found = {name: interpolated(oi, grid, kept, withheld) for name, oi in methods.items()}
        found["ours, 32 members"] = analysed(package, grid, kept, withheld, draw)
        climate = interpolation(grid, withheld) @ methods["ensemble OI (300 km)"].mean[12]
        found["climatology"] = (climate, np.full(count, np.nan))
        for name, (mean, variance) in found.items():
            error = mean - truth
            expected = np.sqrt((variance + STATION_ERROR**2).mean())
            rmse = np.sqrt((error**2).mean())
            low = withheld["elev"].to_numpy() < LOW
            rows.setdefault(name, []).append(
                (rmse, error.mean(), expected, np.sqrt((error[low] ** 2).mean()))
            )
        print(draw, {name: round(r[-1][0], 3) for name, r in rows.items()}, flush=True)

    average = {name: np.mean(values, 0) for name, values in rows.items()}
    best = min(v[0] for name, v in average.items() if name.startswith("ensemble OI"))
    ours = [r[0] for r in rows["ours, 32 members"]]
    ratios = [a / b for a, b in zip(ours, best_of(rows), strict=True)]
    lines = [
        f"| method | RMSE [K] | ratio to the best OI | below {LOW:.0f} m [K] | mean error [K] "
        "| expected RMSE [K] |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (rmse, bias, expected, low) in sorted(average.items(), key=lambda item: -item[1][0]):
        deviation = "" if np.isnan(expected) else f"{expected:.2f}"
        lines.append(
            f"| {name} | {rmse:.3f} | {rmse / best:.3f} | {low:.3f} | {bias:+.2f} | {deviation} |"
        )
    listed = [
        f"| {r.variable} | {r.observation:.1f} | {r.lat:.2f} | {r.lon:.2f} | {r.station} |"
        for r in wrong.sort_values("variable").itertuples()
    ]
    local = [
        f"| {r.observation:.1f} | {r.lat:.2f} | {r.lon:.2f} | {r.elev:.0f} "
        f"| {r.normalized_innovation:+.1f} |"
        for r in gross.itertuples()
    ]
    publish(
        [
            "# Real SYNOP reports over the United Kingdom",
            "",
            f"`python benchmarks/synop_uk.py --draws {arguments.draws}`. {machine()}. Reports of "
            f"2 November 2018, 12 UTC; 2 m temperature at {len(frame)} places after the checks, of "
            f"which {WITHHELD:.0%} are withheld, in {arguments.draws} random draws. Scores at the "
            f"withheld stations; errors of {STATION_ERROR:g} K for all reports. *Expected* is the "
            "root of the mean analysis variance plus the report's. **The season differs**: the "
            "prior, OI's covariance and the climatology are of 1-25 March 2019. No correction for "
            "the height of stations: the shipped prior has no orography.",
            "",
            *lines,
            "",
            f"Ours over the best OI, draw by draw: {', '.join(f'{r:.3f}' for r in ratios)}.",
            "",
            f"Implausible values, of the {len(reports)} t2m and ws10m reports of the whole file:",
            "",
            "| variable | value | lat | lon | station |",
            "|---|---:|---:|---:|---|",
            *listed,
            "",
            "Gross errors against the prior (5 standard deviations, widened to the innovations of "
            "the day), over the United Kingdom:",
            "",
            "| t2m [K] | lat | lon | height [m] | innovation over its expected deviation |",
            "|---:|---:|---:|---:|---:|",
            *(local or ["| none | | | | |"]),
        ],
        arguments.out,
    )


def best_of(rows: dict[str, list[tuple[float, float, float, float]]]) -> list[float]:
    """RMSE by draw of the OI that is best over all of them."""
    names = [name for name in rows if name.startswith("ensemble OI")]
    best = min(names, key=lambda name: float(np.mean([r[0] for r in rows[name]])))
    return [r[0] for r in rows[best]]


if __name__ == "__main__":
    main()
