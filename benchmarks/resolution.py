# SPDX-License-Identifier: Apache-2.0
"""One operator on two grids: the shipped Kolmogorov prior at 64 x 64 and at 128 x 128.

Two claims. The operator, fed the same function on both grids, agrees with itself at the points they
share within 2 %. Samples of the prior drawn on the finer grid have the spectrum of those drawn on
the training grid within 10 %, below its Nyquist wavenumber. Prints Markdown and writes it to
``benchmarks/results/resolution.md``::

    python benchmarks/resolution.py [--samples 48] [--states 8]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.simulators import KolmogorovFlow

RESULTS = Path(__file__).parent / "results" / "resolution.md"
LEVELS = (0.02, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 40.0)
FINE = (128, 128)
TEST_SEED = 12345  # never used in training


@torch.no_grad()
def agreement(package: Package, count: int) -> list[tuple[float, float, float]]:
    """Noise level, ``|D_128 - D_64| / |D_64|`` at shared points, and the network's share of D_64.

    Unseen states with noise, without their waves at the Nyquist wavenumber of the training grid
    (which it cannot tell from its negative).
    """
    operator = package.operator
    generator = torch.Generator().manual_seed(TEST_SEED)
    flow = KolmogorovFlow()
    states = torch.cat(list(flow.simulate(count, 1, generator=generator)))
    clean = package.normalization.normalize(states, torch.zeros(count, dtype=torch.long))
    band = operator.basis.truncate([n - 1 for n in operator.basis.shape])
    rows = []
    for level in LEVELS:
        noisy = clean + level * operator.noise.sample(count, generator=generator)
        function = band.analyze(noisy)
        sigma = torch.full((count,), level)
        coarse, fine = band.synthesize(function), band.synthesize(function, FINE)
        one, other = operator(coarse, sigma), operator(fine, sigma)[..., ::2, ::2]
        network = one - operator.linear(coarse, sigma)
        rows.append(
            (level, float((other - one).norm() / one.norm()), float(network.norm() / one.norm()))
        )
    return rows


@torch.no_grad()
def spectra(package: Package, count: int, shape: tuple[int, int], seed: int) -> Tensor:
    """Variance of prior samples in each shell below Nyquist, ``(count, S)``."""
    operator, scheduler = package.operator, package.scheduler()
    parts = []
    generator = torch.Generator().manual_seed(seed)
    for batch in torch.arange(count).split(16):
        x = sample(
            operator,
            scheduler,
            len(batch),
            steps=package.posterior.steps,
            generator=generator,
            shape=shape,
        )
        parts.append(x)
    band = operator.basis.truncate([n - 1 for n in operator.basis.shape])
    return band.power(torch.cat(parts))[:, 0, : min(operator.basis.shape) // 2]


def shells(one: Tensor, other: Tensor) -> list[tuple[str, float, float]]:
    """Waves, ratio of mean variances, and the standard error of that ratio, by groups of shells."""
    edges = [1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32]
    rows = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        a, b = one[:, low:high].sum(1), other[:, low:high].sum(1)
        error = sum(float(v.var() / v.mean() ** 2 / len(v)) for v in (a, b)) ** 0.5
        name = str(low) if high == low + 1 else f"{low}-{high - 1}"
        rows.append((name, float(b.mean() / a.mean()), error))
    return rows


def report(package: Package, states: int, samples: int) -> str:
    """Both tables as Markdown."""
    began = time.perf_counter()
    agreeing = agreement(package, states)
    steps = package.posterior.steps
    # The coarse run is repeated with other noise: what differs then is sampling error alone.
    coarse, fine, again = (
        spectra(package, samples, shape, seed)
        for shape, seed in ((package.grid.shape, 0), (FINE, 0), (package.grid.shape, 1))
    )
    across, within = shells(coarse, fine), shells(coarse, again)
    seconds = time.perf_counter() - began
    worst = max(row[1] for row in agreeing)
    off = max(abs(row[1] - 1) for row in across)
    lines = [
        "# One operator, two grids",
        "",
        f"`python benchmarks/resolution.py --samples {samples} --states {states}`, {date.today()}, "
        f"{platform.machine()} with {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{seconds:.0f} s.",
        "",
        f"## The operator at 64 x 64 and 128 x 128: at most {100 * worst:.2f} % apart (bound 2 %)",
        "",
        f"{states} unseen states with noise; difference at shared points over the norm of the "
        "denoised state, and for comparison what the network adds to the linear part.",
        "",
        "| sigma | difference | network |",
        "|---:|---:|---:|",
        *(f"| {a:g} | {100 * b:.2f} % | {100 * c:.1f} % |" for a, b, c in agreeing),
        "",
        f"## Spectra of prior samples: at most {100 * off:.1f} % apart (bound 10 %)",
        "",
        f"{samples} samples on each grid, {steps} steps; ratio of variances below the Nyquist "
        "wavenumber of 64 points. Last columns: two runs at 64 x 64 with different noise, and "
        "the standard error of a ratio of independent runs. The draws of the two grids are "
        "independent too.",
        "",
        "| waves | 128 / 64 | 64 / 64, other noise | standard error |",
        "|---:|---:|---:|---:|",
        *(
            f"| {name} | {ratio:.3f} | {other[1]:.3f} | {error:.3f} |"
            for (name, ratio, error), other in zip(across, within, strict=True)
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--states", type=int, default=8)
    arguments = parser.parse_args()
    text = report(Package.load("kolmogorov64"), arguments.states, arguments.samples)
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
