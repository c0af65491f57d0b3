# SPDX-License-Identifier: Apache-2.0
r"""Where in the schedule the derivative pays: scores of posteriors over what they cost.

    python benchmarks/guidance_interval.py --package kolmogorov64

Truths are drawn from the package's prior and observed at random grid points with an error of .1
standard deviations; scores are at the other points. All rows have the same truths, observations,
members and noise. This is how `guidance_interval` and `iterations` of a package are chosen.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import command, machine, publish

from ddo_modulus.diffusion.package import Package
from ddo_modulus.engines.speed import Twin, evaluations
from ddo_modulus.verification import score

INTERVALS = [(0.1, 20.0), (0.2, 20.0), (0.4, 10.0)]


def methods(package: Package) -> dict[str, dict[str, Any]]:
    """What is compared, beside the package's own."""
    found: dict[str, dict[str, Any]] = {"as packaged": {}, "none": {"covariance": "linear"}}
    for n in (1, 2):
        own = {"covariance": "jacobian", "iterations": n}
        found[f"{n} at all levels"] = own | {"guidance_interval": (0.0, math.inf)}
        for low, high in INTERVALS:
            found[f"{n} from {low:g} to {high:g}"] = own | {"guidance_interval": (low, high)}
    same = [n for n, o in found.items() if o and o == _own(package, o)]
    return {name: options for name, options in found.items() if name not in same}


def _own(package: Package, options: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(package.posterior, name) for name in options}


def main() -> None:
    """Sample, score and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--package", default="kolmogorov64", help="a shipped one, or a folder")
    parser.add_argument("--analyses", type=int, default=8)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--observations", type=int, nargs="*", default=[123, 1000])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="Markdown")
    options = parser.parse_args()
    package = Package.load(options.package, options.device)
    scheduler, device = package.scheduler(), torch.device(options.device)
    lines = [
        "# Where the derivative pays",
        "",
        f"{machine()}; {options.analyses} truths drawn from `{Path(options.package).name}`, "
        f"{options.members} members, {package.posterior.steps} steps. {command(__file__)}.",
        "",
        "| observations | derivative | NFE | RMSE | spread/RMSE | CRPS |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for number in options.observations:
        twin = Twin.simulate(package.operator, scheduler, options.analyses, number, device=device)
        for name, other in methods(package).items():
            config = replace(package.posterior, **other)
            posterior = twin.posterior(package.operator, config)
            ensemble = twin.ensemble(posterior, config, posterior.noise, options.members)
            s = score(
                ensemble.transpose(0, 1).cpu(),
                twin.truth.cpu(),
                label=name,
                units="std",
                mask=twin.unobserved.cpu(),
            )
            lines.append(
                f"| {number} | {name} | {evaluations(config, scheduler)} | {s.rmse:.4f} "
                f"| {s.ratio:.3f} | {s.crps:.4f} |"
            )
            print(lines[-1], flush=True)
    publish(lines, options.out)


if __name__ == "__main__":
    main()
