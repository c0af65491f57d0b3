# SPDX-License-Identifier: Apache-2.0
r"""A prior trained on one grid, drawn on finer ones: are spectra and features still the flow's?

The package `kolmogorov64` was trained on 64 x 64 points. Its draws on finer grids are compared with
states of the solver on those grids, all from the same simulations: spectra over all shells of the
grid, and the functional F2ID, which is the same functional on every grid. Beside each distance is
the truth's own, between resamplings of equal size. Time is that of a draw with all others, over
that on the training grid, and over the ratio of points.

    python benchmarks/finer_grids.py --package kolmogorov64 --sizes 64 128 256
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from report import machine, publish
from torch import Tensor

from ddo_modulus.data.simulators import KolmogorovFlow
from ddo_modulus.package import Package
from ddo_modulus.sampling import sample
from ddo_modulus.verification import compare

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TEST_SEED = 12345


def truth_on(sizes: list[int], count: int, spin_up: float) -> dict[int, Tensor]:
    """States ``(N, n, n)`` of the same simulations, by block means, on each grid."""
    finest = 2 * max(sizes)
    flow = KolmogorovFlow(
        resolution=finest, output_resolution=max(sizes), spin_up=spin_up, dt=0.005 * 128 / finest
    )
    generator = torch.Generator().manual_seed(TEST_SEED)
    runs = torch.cat(
        list(flow.simulate(count, 1, generator=generator, device=DEVICE, batch=count))
    )[:, 0]
    found = {}
    for n in sizes:
        block = max(sizes) // n
        found[n] = runs.unflatten(-1, (n, block)).unflatten(-3, (n, block)).mean((-3, -1))
    return found


def draw(package: Package, size: int, count: int, batch: int) -> tuple[Tensor, float]:
    """States ``(N, n, n)`` in physical units, and seconds of each."""
    parts, generator = [], torch.Generator().manual_seed(3)
    options = {"steps": package.sampling.steps, "shape": (size, size), "device": DEVICE}
    share = max(1, batch * 64**2 // size**2)
    sample(package.operator, package.scheduler(), share, generator=generator, **options)
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for first in range(0, count, share):
        some = min(share, count - first)
        x = sample(package.operator, package.scheduler(), some, generator=generator, **options)
        parts.append(package.normalization.denormalize(x)[:, 0])
    if CUDA:
        torch.cuda.synchronize()
    return torch.cat(parts), (time.perf_counter() - began) / count


def main() -> None:
    """Simulate, draw, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--package", default="kolmogorov64")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--truths", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256, help="states drawn together, at 64 x 64")
    parser.add_argument("--spin-up", type=float, default=25.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    package = Package.load(options.package, DEVICE)
    truths = truth_on(options.sizes, options.truths, options.spin_up)
    rows, first = [], None
    for size in options.sizes:
        x, seconds = draw(package, size, options.samples, options.batch)
        first = seconds if first is None else first
        result = compare(x.cpu(), truths[size].cpu(), package.grid.at((size, size)))
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
            f"{package.sampling.steps} steps against {options.truths} states of the solver. "
            "`python benchmarks/finer_grids.py`",
            "",
            "| grid | log-spectrum distance | truth's own | its 95 % | F2ID | truth's own "
            "| its 95 % | ms a sample | over the first | over points |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
