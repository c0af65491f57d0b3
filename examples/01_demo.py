# SPDX-License-Identifier: Apache-2.0
"""Find a turbulent field from 3 % of its points, on a CPU, in two minutes.

The truth is a state of Kolmogorov flow that the prior has not seen. Three analyses of the same
noisy observations are compared at the points that were not observed: climatology, which ignores
them; optimal interpolation with the prior's covariance; and the diffusion posterior, which is
optimal interpolation plus what the network learned of the flow. Figures go to ``outputs/demo``.

    python examples/01_demo.py [--members 12] [--steps 16] [--seed 0]

Axes: ``E`` members, ``H W`` grid.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ddo_modulus import MomentMatching, Observations, Package, PointOperator, sample
from ddo_modulus.plots.figures import (
    PointValues,
    analysis_panel,
    rank_histogram_figure,
    spectra_figure,
)
from ddo_modulus.simulators import KolmogorovFlow
from ddo_modulus.verification import rank_histogram, rich_table, score

OUT = Path("outputs/demo")
TRUTH_SEED = 2024  # the prior was trained on trajectories of another seed
OBSERVED = 0.03  # share of the points
ERROR = 0.1  # of the observations, in standard deviations of the field

# Something to try next: temperatures invented for the purpose, in the columns of any table.
STATIONS = """\
time,lat,lon,observation,variable,observation_error
2019-03-27T12:00,51.48,-0.45,285.3,t2m,0.5
2019-03-27T12:00,52.42,-1.83,284.4,t2m,0.5
2019-03-27T12:00,53.36,-2.28,284.0,t2m,0.5
2019-03-27T12:00,50.74,-3.41,284.9,t2m,0.5
2019-03-27T12:00,55.95,-3.35,283.2,t2m,0.5
2019-03-27T12:00,57.20,-2.20,282.7,t2m,0.5
2019-03-27T12:00,54.66,-6.22,283.6,t2m,0.5
2019-03-27T12:00,53.43,-6.25,284.1,t2m,0.5
"""


def unseen_state(units: int, progress: Progress) -> Tensor:
    """Vorticity of the stationary flow, ``(1, 1, H, W)``.

    From random eddies, most of the time passes on a grid half as fine, at a tenth of the cost; the
    last two units are solved as the training data were, which is long enough for the smallest
    scales to fill in. The flow forgets its start within ten units (see ``KolmogorovFlow.spin_up``).
    """
    generator = torch.Generator().manual_seed(TRUTH_SEED)
    coarse, fine = KolmogorovFlow(resolution=64, dt=0.01), KolmogorovFlow()
    state = coarse.initial(1, generator=generator)
    for unit in progress.track(range(units), description="simulate the truth"):
        if unit == max(units - 2, 0):
            state = state.repeat_interleave(2, -1).repeat_interleave(2, -2)
        state = (fine if unit >= units - 2 else coarse).advance(state, 1.0)
    return fine.pool(state)[:, None]


def main() -> None:
    """Simulate, observe, assimilate, verify."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--members", type=int, default=12, help="ensemble size, at least 2")
    parser.add_argument("--steps", type=int, default=16, help="noise levels")
    parser.add_argument("--spin-up", type=int, default=14, help="model time before the truth")
    parser.add_argument("--seed", type=int, default=0, help="of stations, errors and members")
    options = parser.parse_args()
    start, console = time.perf_counter(), Console()
    members, generator = options.members, torch.Generator().manual_seed(options.seed)

    package = Package.load("kolmogorov64")
    prior, noise, grid = package.operator, package.operator.noise, package.grid
    with Progress(console=console) as progress:
        truth = package.normalization.normalize(unseen_state(options.spin_up, progress))[0, 0]

        # Points of the grid, chosen at random, and their values with white noise.
        points = torch.randperm(truth.numel(), generator=generator)
        points = points[: round(OBSERVED * truth.numel())]
        rows, columns = points // grid.shape[1], points % grid.shape[1]
        lat, lon = grid.lat[rows], grid.lon[columns]
        values = truth[rows, columns] + ERROR * torch.randn(len(points), generator=generator)
        observations = Observations(PointOperator(grid, lat, lon), values, ERROR**2)

        # The prior's linear part alone makes optimal interpolation; with the network, the
        # posterior of the diffusion model. Either is a prior again, and any sampler takes it.
        def draw(posterior: MomentMatching, label: str) -> Tensor:
            return sample(
                posterior,
                package.scheduler(),
                members,
                steps=options.steps,
                generator=generator,
                progress=lambda steps: progress.track(list(steps), description=label),
            )[:, 0]

        linear = prior.linear
        white = torch.randn(members, linear.variance.shape[-1], generator=generator)
        ensembles = {
            "climatology": linear.fields(white * linear.variance.sqrt().float())[:, 0],
            "optimal interpolation": draw(
                MomentMatching(linear, observations, covariance="linear"),
                "optimal interpolation",
            ),
            "diffusion posterior": draw(
                MomentMatching(prior, observations, iterations=1), "diffusion posterior"
            ),
        }

    unobserved = torch.ones_like(truth, dtype=torch.bool)
    unobserved[rows, columns] = False
    scores = [
        score(ensemble, truth, label=label, units="std", mask=unobserved)
        for label, ensemble in ensembles.items()
    ]
    unseen = f"{scores[0].points:,} unobserved points"
    table = rich_table(scores, title=f"At the {unseen}, in standard deviations")
    # The title tells units and points; without their columns it fits a terminal of 80 characters.
    table.columns = [c for c in table.columns if c.header not in ("units", "points")]
    table.box = box.SIMPLE
    console.print(table)

    posterior = ensembles["diffusion posterior"]
    ranks = rank_histogram(posterior, truth, generator=generator, mask=unobserved)
    basis = noise.basis
    power = {"truth": basis.power(truth)}
    for label, ensemble in list(ensembles.items())[1:]:
        power[f"{label}, members"] = basis.power(ensemble).mean(0)
        power[f"{label}, mean"] = basis.power(ensemble.mean(0))
    files = [
        analysis_panel(
            truth,
            PointValues(lat, lon, values),
            posterior,
            grid.lat,
            grid.lon,
            units="standard deviations",
            title=f"Vorticity from {OBSERVED:.0%} of its points, {members} members",
            path=OUT / "analysis.png",
            labels=("x", "y"),
        ),
        rank_histogram_figure(
            ranks.counts, title="Rank of the truth among the members", path=OUT / "ranks.png"
        ),
        spectra_figure(
            basis.shells()[0] / (2 * torch.pi),
            power,
            title="Scales of truth and analyses",
            path=OUT / "spectra.png",
        ),
    ]
    stations = OUT / "stations.csv"
    stations.write_text(STATIONS)
    console.print(
        f"{time.perf_counter() - start:.0f} s; see {', '.join(map(str, files))}.", soft_wrap=True
    )
    console.print(
        "Next, temperatures over the United Kingdom from eight stations:\n"
        f"  ddo assimilate package=uk_t2m observations={stations} out=outputs/uk_t2m.zarr",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
