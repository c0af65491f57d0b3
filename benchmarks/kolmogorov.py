# SPDX-License-Identifier: Apache-2.0
"""Posterior skill on Kolmogorov flow: the shipped prior against exact optimal interpolation.

    python benchmarks/kolmogorov.py [--states 16] [--members 32] [--steps 16]

Unseen states of the solver (seed 12345, never used in training) are observed at a share of their
grid points with noise of 10 % of the standard deviation. Optimal interpolation has the exact
homogeneous spectral covariance of the training set: it is the operator's linear part, solved
densely, with members drawn exactly. Scores are at the unobserved points, in standard deviations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import command, machine, publish
from torch import Tensor

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.observations import LinearOperator, Observations
from ddo_modulus.posterior import AnalysisSystem, MomentMatching
from ddo_modulus.simulators import KolmogorovFlow
from ddo_modulus.verification import Scores, rank_histogram, score

TEST_SEED = 12345


@dataclass(frozen=True)
class Case:
    """States to be found and what is observed of them.

    Attributes:
        truth: ``(T, 1, H, W)`` in standard deviations.
        observations: ``M`` of each.
        unobserved: ``(T, 1, H, W)`` true where nothing was observed.
    """

    truth: Tensor
    observations: Observations
    unobserved: Tensor


def unseen_states(count: int, mean: float, std: float, device: str) -> Tensor:
    """Independent states, ``(count, 1, 64, 64)``: one from each trajectory, after spin-up."""
    flow = KolmogorovFlow()
    generator = torch.Generator().manual_seed(TEST_SEED)
    batches = flow.simulate(count, 1, generator=generator, device=device)
    return ((torch.cat(list(batches)) - mean) / std).to(device)


def observe(truth: Tensor, fraction: float, error: float = 0.1, seed: int = 7) -> Case:
    """Observe a random share of the grid points of each state with white noise."""
    count, points = len(truth), truth[0].numel()
    observed = round(fraction * points)
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(points, generator=generator)[:observed] for _ in truth])
    noise = error * torch.randn(count, observed, generator=generator)
    index = index.to(truth.device)
    values = truth.flatten(1).gather(1, index) + noise.to(truth)
    operator = LinearOperator(
        index[..., None], torch.ones_like(values)[..., None], torch.zeros_like(values)
    )
    free = torch.ones_like(truth, dtype=torch.bool).flatten(1).scatter(1, index, False)
    return Case(truth, Observations(operator, values, error**2), free.view(truth.shape))


def interpolate(linear: GaussianDenoiser, case: Case, members: int, seed: int = 3) -> Tensor:
    """Members of the exact Gaussian posterior ``(E, T, 1, H, W)``, by perturbed observations."""
    truth, observations = case.truth, case.observations
    generator = torch.Generator().manual_seed(seed)
    system = AnalysisSystem(observations, linear.noise).at(truth, linear)
    rows, error, variance = system.rows, system.error, linear.variance.to(truth)
    matrix = ((rows * variance) @ rows.mT + error).double()
    background = torch.randn(members, *rows.shape[::2], generator=generator).to(truth)
    background = background * variance.sqrt()
    noise = torch.randn(members, *rows.shape[:2], generator=generator).to(truth)
    perturbed = observations.values + noise * error.diagonal(dim1=1, dim2=2).sqrt()
    innovation = perturbed - torch.einsum("tmn,etn->etm", rows, background)
    weight = torch.linalg.solve(matrix, innovation.double().permute(1, 2, 0)).to(truth)
    a = background + torch.einsum("tmn,tme->etn", rows, weight) * variance
    return linear.fields(a.flatten(0, 1)).unflatten(0, (members, -1))


def assimilate(
    prior: Prior,
    scheduler: FieldNoiseScheduler,
    case: Case,
    members: int,
    options: Mapping[str, Any],
    *,
    steps: int,
    solver: str = "dpmpp_2m",
    seed: int = 5,
    batch: int = 512,
    condition: Tensor | None = None,
) -> Tensor:
    """Members of the diffusion posterior ``(E, T, 1, H, W)``; options of `MomentMatching`."""
    states = max(batch // members, 1)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for chosen in torch.arange(len(case.truth)).split(states):
        o = case.observations.operator
        assert isinstance(o, LinearOperator)
        chosen = chosen.to(case.truth.device)
        part = Observations(
            LinearOperator(o.index[chosen], o.weight[chosen], o.offset[chosen]),
            case.observations.values[chosen],
            case.observations.variance[chosen]
            if case.observations.variance.ndim == 2  # type: ignore[union-attr]
            else case.observations.variance,
        )
        posterior = MomentMatching(prior, part, **options)
        x = sample(
            posterior,
            scheduler,
            members * len(chosen),
            steps=steps,
            solver=solver,
            generator=generator,
            device=case.truth.device,
            condition=None
            if condition is None
            else condition[chosen].repeat_interleave(members, 0),
        )
        parts.append(x.unflatten(0, (len(chosen), members)).transpose(0, 1))
    return torch.cat(parts, 1)


def at_all_levels(iterations: int) -> dict[str, Any]:
    """Options of `MomentMatching`: so many iterations everywhere."""
    return {"iterations": iterations} if iterations else {"covariance": "linear"}


def as_packaged(package: Package) -> dict[str, Any]:
    """Options of `MomentMatching` that the maker of a package found to be enough."""
    own = package.posterior
    names = ("covariance", "iterations", "guidance_interval")
    return {name: getattr(own, name) for name in names}


def scores(ensemble: Tensor, case: Case, label: str) -> Scores:
    """Scores at the unobserved points."""
    return score(
        ensemble.cpu(), case.truth.cpu(), label=label, units="std", mask=case.unobserved.cpu()
    )


def main() -> None:
    """Run the comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--package", default="kolmogorov64", help="a shipped one, or a folder")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--iterations", type=int, nargs="*", default=[0, 1, 2, 4])
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.03, 0.10])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kolmogorov.md"))
    arguments = parser.parse_args()
    device = arguments.device
    package = Package.load(arguments.package, device)
    operator, normalization = package.operator, package.normalization
    truth = unseen_states(
        arguments.states, float(normalization.mean), float(normalization.std), device
    )
    lines = [
        "# Kolmogorov flow, unseen states",
        "",
        f"{machine()}. {command(__file__)}. As packaged: {as_packaged(package)}. The others at all "
        "levels; zero iterations: "
        "covariance of the linear part. Ratios are to exact optimal interpolation "
        "in the same run. Rank histograms: chi-square p over 8 points of a field.",
        "",
        "| observed | method | RMSE | spread/RMSE | CRPS | RMSE ratio | CRPS ratio | rank p | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for fraction in arguments.fractions:
        case = observe(truth, fraction)
        ensembles = {"exact OI": (interpolate(operator.linear, case, arguments.members), 0.0)}
        bar = scores(ensembles["exact OI"][0], case, "")
        methods = {"as packaged": as_packaged(package)}
        methods |= {f"{n} iterations": at_all_levels(n) for n in arguments.iterations}
        for name, options in methods.items():
            began = time.perf_counter()
            x = assimilate(
                operator,
                package.scheduler(),
                case,
                arguments.members,
                options,
                steps=arguments.steps,
            )
            ensembles[f"ours, {name}"] = (x, time.perf_counter() - began)
        for label, (x, seconds) in ensembles.items():
            s = scores(x, case, label)
            generator = torch.Generator().manual_seed(0)
            ranks = rank_histogram(
                x.cpu(),
                case.truth.cpu(),
                generator=generator,
                mask=case.unobserved.cpu(),
                points_per_field=8,
            )
            lines.append(
                f"| {fraction:.0%} | {label} | {s.rmse:.3f} | {s.ratio:.3f} | {s.crps:.3f} "
                f"| {s.rmse / bar.rmse:.3f} | {s.crps / bar.crps:.3f} | {ranks.p_value:.2f} "
                f"| {seconds:.1f} |"
            )
            print(lines[-1], flush=True)
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
