# SPDX-License-Identifier: Apache-2.0
"""Real reanalysis: the shipped prior of 2 m temperature against localised ensemble OI.

    python benchmarks/era5_uk.py --data era5-2mt-2019-03-uk.grib [--seeds 5]

Hourly ERA5 over the United Kingdom, March 2019. Everything is learned or tuned on days 1-25; the 20
analyses are hours 624, 630, ..., 738. At each, ``M`` grid points drawn at random are observed with
errors of 0.5 K. Scores are at the other points.

The bar is ensemble optimal interpolation: anomalies from the hour-of-day climatology of days 1-25,
their sample covariance tapered by Gaspari & Cohn (1999), the length tuned on days 22-25 with
statistics of days 1-21, inflated at each analysis by maximum likelihood of the innovations. It is
scored twice: with its exact mean and Gaussian spread, and as 32 members drawn from it, which is
what a diffusion ensemble is to be compared with. So is the linear part of our prior.
"""

from __future__ import annotations

import argparse
import platform
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ddo_modulus.data.source import open_dataset
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.fields.covariance import distances_km
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.inference.assimilate import assimilate
from ddo_modulus.observations.table import read_table
from ddo_modulus.verification import gaussian_crps, score

STATIONS = (20, 60, 160)
ERROR = 0.5  # K
MEMBERS = 32
TEST = np.arange(624, 744, 6)
LENGTHS_KM = (300.0, 450.0, 600.0, 900.0, 1200.0)


class EnsembleOI:
    """Ensemble optimal interpolation with a tapered sample covariance.

    Args:
        fields: ``(N, H, W)`` training fields, hourly from hour zero.
        grid: Where they stand.
        length_km: Half the support of the taper.
    """

    def __init__(self, fields: np.ndarray, grid: LatLonGrid, length_km: float) -> None:
        hours = np.arange(len(fields)) % 24
        flat = fields.reshape(len(fields), -1).astype(float)
        self.mean = np.stack([flat[hours == h].mean(0) for h in range(24)])
        anomalies = flat - self.mean[hours]
        sample = anomalies.T @ anomalies / (len(flat) - 1)
        self.covariance = sample * gaspari_cohn(distances_km(grid) / length_km)

        self.width = np.inf

    def analyse(
        self, hour: int, index: np.ndarray, y: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
        """Mean and variance of the analysis, inflation factor and gain."""
        mean, p = self.mean[hour % 24], self.covariance
        d, a = y - mean[index], p[np.ix_(index, index)]
        factor = probable_inflation(a, d, self.width)
        inside = factor * a + ERROR**2 * np.eye(len(index))
        gain = np.linalg.solve(inside, factor * p[index]).T
        variance = factor * p.diagonal() - (gain * factor * p[:, index]).sum(1)
        return mean + gain @ d, variance, factor, gain

    @cached_property
    def root(self) -> np.ndarray:
        """A square root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return vectors * np.sqrt(np.maximum(values, 0))

    def members(
        self, hour: int, index: np.ndarray, y: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        """Draws ``(E, P)`` from the analysis, by perturbed observations."""
        _, _, factor, gain = self.analyse(hour, index, y)
        background = random.standard_normal((MEMBERS, len(self.root))) @ self.root.T
        background = self.mean[hour % 24] + np.sqrt(factor) * background
        noise = ERROR * random.standard_normal((MEMBERS, len(index)))
        return background + (y + noise - background[:, index]) @ gain.T


class LinearPart(EnsembleOI):
    """The linear part of a package, solved exactly: what it is with the network's output zero."""

    def __init__(self, package: Package) -> None:
        linear, scale = package.operator.linear, package.normalization.std.double()
        directions = torch.eye(linear.variance.shape[-1], dtype=torch.float64)
        root = linear.fields(directions * linear.variance.sqrt().double(), mean=False).flatten(1)
        self.covariance = (root.mT @ root * scale.flatten()[0] ** 2).numpy()
        self.mean = package.normalization.mean.double().flatten(1).numpy()
        self.width = 1.0


def probable_inflation(a: np.ndarray, d: np.ndarray, width: float) -> float:
    """Factor that makes the innovations likeliest, ``d ~ N(0, factor A + R)``.

    Its logarithm has a prior of standard deviation ``width``; infinity is maximum likelihood.
    """
    w, vectors = np.linalg.eigh(a)
    q = (vectors.T @ d) ** 2
    logarithm = np.linspace(np.log(0.2), np.log(15), 433)
    total = np.exp(logarithm)[:, None] * np.maximum(w, 0) + ERROR**2
    cost = (np.log(total) + q / total).sum(1) + (logarithm / width) ** 2
    return float(np.exp(logarithm[np.argmin(cost)]))


def gaspari_cohn(r: np.ndarray) -> np.ndarray:
    """Compactly supported correlation of Gaspari & Cohn (1999), eq. 4.10; zero from ``r = 2``."""
    inner = ((-0.25 * r + 0.5) * r + 0.625) * r**3 - 5 / 3 * r**2 + 1
    safe = np.maximum(r, 1e-9)
    outer = ((((r / 12 - 0.5) * r + 0.625) * r + 5 / 3) * r - 5) * r + 4 - 2 / (3 * safe)
    return np.where(r <= 1, inner, np.where(r < 2, outer, 0.0))


def stations(hour: int, count: int, points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Observed points and the errors made there."""
    random = np.random.default_rng((seed, hour, count))
    return random.permutation(points)[:count], ERROR * random.standard_normal(count)


def tuned_length(fields: np.ndarray, grid: LatLonGrid, count: int) -> float:
    """Length of least error on days 22-25, with statistics of days 1-21."""
    points = grid.shape[0] * grid.shape[1]
    errors = {}
    for length in LENGTHS_KM:
        oi, squares = EnsembleOI(fields[:504], grid, length), []
        for hour in range(504, 600, 6):
            for seed in (100, 101):
                index, error = stations(hour, count, points, seed)
                truth = fields[hour].reshape(-1).astype(float)
                mean = oi.analyse(hour, index, truth[index] + error)[0]
                free = np.ones(points, bool)
                free[index] = False
                squares.append(((mean - truth)[free] ** 2).mean())
        errors[length] = np.mean(squares)
    return min(errors, key=lambda length: errors[length])


def diffusion(
    package: Package, fields: np.ndarray, times: np.ndarray, count: int, seed: int
) -> Tensor:
    """Members ``(E, T, 1, H, W)`` of the package's analyses, through the public function."""
    grid, rows = package.grid, []
    lat, lon = np.meshgrid(grid.lat, grid.lon, indexing="ij")
    for hour in TEST:
        index, error = stations(int(hour), count, lat.size, seed)
        rows.append(
            pd.DataFrame(
                {
                    "time": times[hour],
                    "lat": lat.reshape(-1)[index],
                    "lon": lon.reshape(-1)[index],
                    "observation": fields[hour].reshape(-1)[index] + error,
                    "variable": "t2m",
                    "observation_error": ERROR,
                }
            )
        )
    table = read_table(pd.concat(rows))
    config = PosteriorConfig(inflation="adaptive")
    result = assimilate(package, table, times[TEST], ensemble=MEMBERS, seed=seed, posterior=config)
    values = result.dataset["t2m"].transpose("ensemble", "time", "lat", "lon").values
    return torch.from_numpy(np.ascontiguousarray(values))[:, :, None]


def interpolated(
    method: EnsembleOI, fields: np.ndarray, truth: Tensor, mask: Tensor, count: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """RMSE, spread and CRPS of an exact Gaussian analysis, and of members drawn from it."""
    means, variances, ensembles = [], [], []
    for hour in TEST:
        index, error = stations(int(hour), count, fields[0].size, seed)
        y = fields[hour].reshape(-1)[index] + error
        mean, variance, _, _ = method.analyse(int(hour), index, y)
        means.append(mean)
        variances.append(np.maximum(variance, 0))
        random = np.random.default_rng((seed, int(hour)))
        ensembles.append(method.members(int(hour), index, y, random))
    mean, variance = (torch.from_numpy(np.stack(v)).view(truth.shape) for v in (means, variances))
    members = torch.from_numpy(np.stack(ensembles, 1)).view(MEMBERS, *truth.shape)
    rmse = float((mean - truth)[mask].square().mean().sqrt())
    crps = float(gaussian_crps(mean, variance.sqrt(), truth)[mask].mean())
    s = score(members, truth, label="", units="K", mask=mask)
    return {
        "exact": (rmse, float(variance[mask].mean().sqrt()), crps),
        "32 members": (s.rmse, s.spread, s.crps),
    }


def main() -> None:
    """Run the comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="era5-2mt-2019-03-uk.grib")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--package", default="uk_t2m", help="name of a shipped one, or a folder")
    parser.add_argument("--out", default="benchmarks/results/era5_uk.md")
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.data, ["t2m"])
    fields, times = dataset["t2m"].values, dataset["time"].values
    package = Package.load(arguments.package)
    grid = package.grid
    assert isinstance(grid, LatLonGrid)
    points = fields[0].size
    truth = torch.from_numpy(fields[TEST])[:, None].double()
    lines = [
        "| stations | method | RMSE [K] | spread [K] | spread/RMSE | CRPS [K] | RMSE ratio "
        "| CRPS ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    linear, seconds, worst = LinearPart(package), [], 0.0
    for count in STATIONS:
        length = tuned_length(fields, grid, count)
        oi = EnsembleOI(fields[:600], grid, length)
        table: dict[str, list[tuple[float, float, float]]] = {}
        for seed in range(arguments.seeds):
            mask = torch.ones(len(TEST), points, dtype=torch.bool)
            for t, hour in enumerate(TEST):
                mask[t, torch.from_numpy(stations(int(hour), count, points, seed)[0])] = False
            mask = mask.view(truth.shape)
            for name, exact in (
                (f"ensemble OI ({length:.0f} km)", oi),
                ("our linear part", linear),
            ):
                for row, values in interpolated(exact, fields, truth, mask, count, seed).items():
                    table.setdefault(f"{name}, {row}", []).append(values)
            began = time.perf_counter()
            x = diffusion(package, fields, times, count, seed).double()
            seconds.append((time.perf_counter() - began) / len(TEST))
            worst = max(worst, float((x - truth).abs().max()))
            s = score(x, truth, label="ours", units="K", mask=mask)
            table.setdefault("ours, 32 members", []).append((s.rmse, s.spread, s.crps))
            print(
                count, seed, {k: np.round(v[-1], 3).tolist() for k, v in table.items()}, flush=True
            )
        average = {name: np.mean(rows, 0) for name, rows in table.items()}
        bar = next(v for name, v in average.items() if name.endswith("km), 32 members"))
        for name, (rmse, spread, crps) in average.items():
            lines.append(
                f"| {count} | {name} | {rmse:.3f} | {spread:.3f} | {spread / rmse:.2f} "
                f"| {crps:.3f} | {rmse / bar[0]:.3f} | {crps / bar[2]:.3f} |"
            )
    text = "\n".join(
        [
            "# ERA5 2 m temperature over the United Kingdom",
            "",
            f"`python benchmarks/era5_uk.py --seeds {arguments.seeds}` on "
            f"{platform.machine()}, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}. 20 analyses of days 27-31, stations drawn at random "
            f"({arguments.seeds} seeds), errors {ERROR} K, {MEMBERS} members, scores at unobserved "
            "points. Ratios are to the 32-member ensemble OI of the same run.",
            "",
            *lines,
            "",
            f"Largest departure of any member from the truth at any point: {worst:.1f} K. One "
            f"{MEMBERS}-member analysis took {np.median(seconds):.1f} s (median, 20 in a batch).",
            "",
        ]
    )
    Path(arguments.out).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
