# SPDX-License-Identifier: Apache-2.0
r"""A prior trained on one grid, drawn on finer ones: are spectra and features still the flow's?

The package `kolmogorov64` was trained on 64 x 64 points. Its draws on finer grids, as `ddo generate
resolution=N` makes them, are compared with states of the solver on those grids, all from the same
simulations: spectra over all shells of the grid, and the functional F2ID, which is the same
functional on every grid. Beside each distance is the truth's own, between resamplings of equal
size. Time is that of a draw with all others, over that on the training grid, and over the ratio of
points.

The truth is a solver of twice the finest size, whose dissipation range is resolved, in means over
the cells of each grid. The package was trained on means of a solver of 128 x 128 points, which cuts
waves off at 42: its training spectrum (that of the linear part, beside the truth in the second
table) is already too strong at the end of the band, and tells nothing of dissipation. The spectrum
beyond the band is known to the package from 16 states of a finer simulation (`provenance` in its
`package.json`).

`--truths-file` keeps the truth for later runs, or takes any tensor `(N, n, n)` that `torch.save`
wrote; `--skip` leaves out its first states, where they have served the package.

    python benchmarks/finer_grids.py --package kolmogorov64 --sizes 64 128 256
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from report import machine, publish
from torch import Tensor

from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.inference.generate import generate
from ddo_modulus.simulators import KolmogorovFlow
from ddo_modulus.verification import compare
from ddo_modulus.verification.structure import basis_of, rms_log_ratio, shell_power

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TEST_SEED = 12345


def simulated(size: int, count: int, spin_up: float) -> Tensor:
    """States ``(N, n, n)`` of independent simulations, by block means of a finer solver."""
    finest = 2 * size
    flow = KolmogorovFlow(
        resolution=finest, output_resolution=size, spin_up=spin_up, dt=0.005 * 128 / finest
    )
    generator = torch.Generator().manual_seed(TEST_SEED)
    runs = flow.simulate(count, 1, generator=generator, device=DEVICE, batch=count)
    return torch.cat(list(runs))[:, 0]


def truth_on(options: argparse.Namespace) -> dict[int, Tensor]:
    """States ``(N, n, n)`` of the same simulations, by block means, on each grid."""
    finest, path = max(options.sizes), options.truths_file
    if path is not None and path.is_file():
        runs = torch.load(path, weights_only=True).float()
    else:
        runs = simulated(finest, options.truths, options.spin_up).cpu()
        if path is not None:
            torch.save(runs, path)
    if runs.ndim != 3 or runs.shape[-1] % finest:
        raise SystemExit(f"{path} holds {tuple(runs.shape)}; expected (N, n, n), n >= {finest}")
    runs = runs[options.skip :]
    found = {}
    for n in options.sizes:
        block = runs.shape[-1] // n
        found[n] = runs.unflatten(-1, (n, block)).unflatten(-3, (n, block)).mean((-3, -1))
    return found


def draw(package: Package, size: int, count: int, batch: int) -> tuple[Tensor, float]:
    """States ``(N, n, n)`` in physical units, and seconds of each."""
    share = min(count, max(1, batch * 64**2 // size**2))
    time_of_all = np.array(["2000-01-01"], "datetime64[ns]")  # a label, for states

    def draws(members: int) -> Tensor:
        found = generate(
            package,
            time_of_all,
            ensemble=members,
            resolution=(size, size),
            seed=3,
            posterior=PosteriorConfig(batch=share),
        )
        return torch.from_numpy(found[package.channels[0]].values[:, 0])

    draws(share)  # compilation and tables
    began = time.perf_counter()
    x = draws(count)
    return x, (time.perf_counter() - began) / count


def training_spectrum(package: Package, truth: Tensor) -> list[str]:
    """Table of the power of the linear part over the truth's, on the training grid."""
    basis = basis_of(package.grid)
    wavenumber, power = shell_power(truth.double(), basis)
    wave = (wavenumber / wavenumber[0]).round().int().tolist()
    spectrum = package.operator.linear.prior.spectrum(package.operator.basis)[0]
    _, shell = package.operator.basis.shells()
    linear = torch.zeros(int(shell.max()) + 1).double().index_add(0, shell, spectrum)
    linear = linear[1 : len(wave) + 1] * float(package.normalization.std.flatten()[0]) ** 2
    ratio = linear / power.mean(0)
    rows = [f"| {k} | {float(ratio[i]):.2f} |" for i, k in enumerate(wave) if k % 4 == 0 or k == 31]
    distance = float(rms_log_ratio(linear, power.mean(0)))
    head = ["| wave | training spectrum over truth |", "|---|---|"]
    return [*head, *rows, f"| log-spectrum distance | {distance:.3g} |"]


def main() -> None:
    """Simulate, draw, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--package", default="kolmogorov64")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--truths", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256, help="states drawn together, at 64 x 64")
    parser.add_argument("--spin-up", type=float, default=25.0)
    parser.add_argument("--truths-file", type=Path, help="states to reuse, or where to keep them")
    parser.add_argument("--skip", type=int, default=0, help="states of the truth to leave out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    package = Package.load(options.package, DEVICE)
    truths = truth_on(options)
    own = truths.get(package.grid.shape[0])
    rows, first = [], None
    for size in options.sizes:
        x, seconds = draw(package, size, options.samples, options.batch)
        first = seconds if first is None else first
        result = compare(x, truths[size], package.grid.at((size, size)))
        ratio, points = seconds / first, (size / options.sizes[0]) ** 2
        cells = [
            f"{result[name].distance:.3g} | {result[name].own_median:.2g} "
            f"| {result[name].own_high:.2g}"
            for name in ("log-spectrum distance", "F2ID")
        ]
        rows.append(
            f"| {size}x{size} | {' | '.join(cells)} | {1e3 * seconds:.2f} | {ratio:.2f} "
            f"| {ratio / points:.2f} |"
        )
        print(rows[-1], flush=True)
    publish(
        [
            "# A prior on finer grids",
            "",
            f"{machine()}; `{options.package}`, {options.samples} draws of "
            f"{package.posterior.steps} steps against {len(truths[options.sizes[0]])} states of "
            "the solver. "
            "`python benchmarks/finer_grids.py`",
            "",
            "| grid | log-spectrum distance | truth's own | its 95 % | F2ID | truth's own "
            "| its 95 % | ms a sample | over the first | over points |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            *([] if own is None else ["", *training_spectrum(package, own)]),
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
