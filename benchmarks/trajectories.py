# SPDX-License-Identifier: Apache-2.0
r"""Trajectories composed of windows: free, and given observations scattered over them.

Kolmogorov flow at Reynolds number 1000, 64 x 64 points. *Free*: trajectories of 64 frames from a
prior over windows of five, as in SDA (windows alone), as composed here (the linear part is the
whole trajectory's), with its variances balanced too, and the Gaussian process of the linear part by
itself; energy of time differences and seams against trajectories of the solver that no model was
trained on. *Given observations*: a share of all points of all frames, with noise of 10 % of the
standard deviation: the trajectory's posterior beside that of every frame by itself (a package of
single states), and that of the Gaussian process. The share of the balance is that whose spread is
nearest to its RMSE on other trajectories, if several are given. All are drawn with some frames more
at both ends, where windows reach to one side only, which are cut off. Packages differ in their
normalisation by less than sampling error.

    python benchmarks/trajectories.py --package kolmogorov_window --state kolmogorov64
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from kolmogorov import (
    TEST_SEED,
    Case,
    as_packaged,
    assimilate,
    at_all_levels,
    interpolate,
    observe,
    scores,
)
from report import command, machine, publish
from torch import Tensor

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.prior import Denoiser
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.diffusion.trajectory import TrajectoryPrior
from ddo_modulus.observations import LinearOperator, Observations
from ddo_modulus.simulators import KolmogorovFlow
from ddo_modulus.verification import (
    Scores,
    log_spectrum_distance,
    rank_histogram,
    seam_ratio,
    time_difference_energy,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def unseen(package: Package, count: int, frames: int, spin_up: float) -> Tensor:
    """Trajectories ``(M, L, H, W)`` of the solver, in the package's units."""
    interval = 0.2 if package.interval is None else package.interval
    size = package.grid.shape[0]
    flow = KolmogorovFlow(
        interval=interval, output_resolution=size, resolution=2 * size, spin_up=spin_up
    )
    generator = torch.Generator().manual_seed(TEST_SEED)
    runs = torch.cat(list(flow.simulate(count, frames, generator=generator, device=DEVICE)))
    x = package.normalization.normalize(runs.flatten(0, 1)[:, None].to(DEVICE))
    return x.view(count, frames, size, size)


def levels(
    package: Package, prior: TrajectoryPrior, sigma_max: float | None
) -> FieldNoiseScheduler:
    """Noise and its levels: the package's, but for the largest if that is given."""
    return PosteriorConfig(sigma_max=sigma_max).resolve(package).scheduler(prior.noise)


def draw(scheduler: FieldNoiseScheduler, denoiser: Denoiser, count: int, steps: int) -> Tensor:
    """Free trajectories ``(M, L, H, W)``."""
    generator = torch.Generator().manual_seed(4)
    parts = [
        sample(denoiser, scheduler, n, steps=steps, generator=generator, device=DEVICE)
        for n in _shares(count, 8)
    ]
    return torch.cat(parts)


def _shares(count: int, most: int) -> list[int]:
    return [min(most, count - first) for first in range(0, count, most)]


def free(package: Package, truth: Tensor, options: argparse.Namespace) -> list[str]:
    """Rows of the table of free trajectories."""
    count, steps = options.free, options.steps
    frames, margin = package.task.frames, package.task.frames - 1
    length = truth.shape[1] + 2 * margin
    joint = TrajectoryPrior(package.operator, frames, length)
    scheduler = levels(package, joint, options.sigma_max)
    cases: dict[str, Tensor] = {"truth, other half": truth[1::2]}
    seconds = {"truth, other half": 0.0}
    reference = truth[::2]
    windows = TrajectoryPrior(package.operator, frames, length, joint=False)
    gaussian = joint.linear.prior.sample(count, generator=torch.Generator().manual_seed(5))
    cases["Gaussian process of the linear part"] = inner(gaussian.to(DEVICE), margin)
    seconds["Gaussian process of the linear part"] = 0.0
    balanced = TrajectoryPrior(package.operator, frames, length, balance=1.0)
    for name, denoiser in (
        ("windows alone (SDA)", windows),
        ("composed", joint),
        ("**composed, balanced**", balanced),
    ):
        began = time.perf_counter()
        cases[name] = inner(draw(scheduler, denoiser, count, steps), margin)
        seconds[name] = time.perf_counter() - began
    energy = time_difference_energy(reference).mean()
    rows = []
    for name, x in cases.items():
        own = time_difference_energy(x)
        seams = (seam_ratio(own) - 1).abs().max()
        spectrum = log_spectrum_distance(x.double(), reference.double(), package.operator.basis)
        variance = x.square().mean() / reference.square().mean()
        rows.append(
            f"| {name} | {float(own.mean() / energy):.3f} | {float(seams):.3f} "
            f"| {float(variance):.3f} | {spectrum:.3f} | {seconds[name] / len(x):.2f} |"
        )
        print(rows[-1], flush=True)
    return rows


def observed(
    package: Package,
    state: Package | None,
    truth: Tensor,
    tuning: Tensor,
    options: argparse.Namespace,
) -> tuple[list[str], list[str]]:
    """Rows of the table of posteriors, and of the one of what their balance is chosen by."""
    frames, margin = package.task.frames, package.task.frames - 1
    case = observe(truth, options.fraction)
    rows, tried = [], []

    def find(case: Case, balance: float, iterations: int) -> tuple[Tensor, float]:
        began, length = time.perf_counter(), case.truth.shape[1] + 2 * margin
        prior = TrajectoryPrior(package.operator, frames, length, balance=balance)
        members = assimilate(
            prior,
            levels(package, prior, options.sigma_max),
            widened(case, margin),
            options.members,
            at_all_levels(iterations),
            steps=options.steps,
            solver=options.solver,
            batch=options.batch // length,
        )
        return inner(members, margin), time.perf_counter() - began

    if state is not None:
        began = time.perf_counter()
        members = assimilate(
            state.operator,
            state.scheduler(),
            frame_by_frame(case),
            options.members,
            as_packaged(state),
            steps=options.steps,
            batch=options.batch,
        )
        each = members.reshape(options.members, *truth.shape)
        s = scores(each, case, "every frame by itself")
        rows.append(line(s, case, each, time.perf_counter() - began))
    began = time.perf_counter()
    process = TrajectoryPrior(package.operator, frames, truth.shape[1]).linear
    exact = interpolate(process, case, options.members)
    s = scores(exact, case, "Gaussian process, exact")
    rows.append(line(s, case, exact, time.perf_counter() - began))
    for iterations in options.iterations:
        kind = f"{iterations} iterations" if iterations else "linear covariance"
        chosen = options.balance[0]
        if len(options.balance) > 1:
            other, ratio = observe(tuning, options.fraction, seed=7), {}
            for balance in options.balance:
                members, seconds = find(other, balance, iterations)
                s = scores(members, other, f"{kind}, balance {balance:g}")
                tried.append(line(s, other, members, seconds))
                ratio[balance] = s.ratio
            chosen = min(ratio, key=lambda b: abs(ratio[b] - 1))
        for balance in sorted({options.balance[0], chosen}):
            members, seconds = find(case, balance, iterations)
            s = scores(members, case, f"**trajectory**, {kind}, balance {balance:g}")
            rows.append(line(s, case, members, seconds))
    return rows, tried


def line(s: Scores, case: Case, members: Tensor, seconds: float) -> str:
    """A row: scores away from the observations; ranks of one such point of each frame."""
    ranks = rank_histogram(
        members.cpu(),
        case.truth.cpu(),
        generator=torch.Generator().manual_seed(0),
        mask=case.unobserved.cpu(),
        points_per_field=1,
    )
    row = (
        f"| {s.label} | {s.rmse:.4f} | {s.crps:.4f} | {s.ratio:.3f} | {ranks.p_value:.3f} "
        f"| {seconds:.0f} |"
    )
    print(row, flush=True)
    return row


def inner(x: Tensor, margin: int) -> Tensor:
    """Trajectories without the frames at their ends, where windows reach to one side only."""
    return x[..., margin:-margin, :, :]


def widened(case: Case, margin: int) -> Case:
    """The same observations of trajectories with so many more frames at both ends."""
    operator = case.observations.operator
    assert isinstance(operator, LinearOperator)
    index = operator.index + margin * case.truth[0, 0].numel()
    wider = LinearOperator(index, operator.weight, operator.offset)
    return replace(case, observations=replace(case.observations, operator=wider))


def frame_by_frame(case: Case) -> Case:
    """The observations of trajectories as those of their frames, a state each.

    Frames have different numbers of observations: those that lack some observe a point of theirs
    again, with an error that makes it count for nothing.
    """
    count, length = case.truth.shape[:2]
    points = case.truth[0, 0].numel()
    operator, values = case.observations.operator, case.observations.values
    assert isinstance(operator, LinearOperator)
    index = operator.index[..., 0]
    frame = index // points + length * torch.arange(count, device=index.device)[:, None]
    frame, place, value = frame.flatten(), (index % points).flatten(), values.flatten()
    order = frame.argsort(stable=True)
    frame, place, value = frame[order], place[order], value[order]
    each = torch.bincount(frame, minlength=count * length)
    first = each.cumsum(0) - each
    slot = torch.arange(len(frame), device=frame.device) - first[frame]
    size = (count * length, int(each.max()))
    where = place.new_zeros(size).index_put((frame, slot), place)
    seen = value.new_zeros(size).index_put((frame, slot), value)
    real = torch.arange(size[1], device=frame.device) < each[:, None]
    error = float(case.observations.variance.flatten()[0])
    variance = torch.where(real, error, 1e6)
    weight = torch.ones_like(seen)
    linear = LinearOperator(where[..., None], weight[..., None], torch.zeros_like(seen))
    truth = case.truth.flatten(0, 1)[:, None]
    free = case.unobserved.flatten(0, 1)[:, None]
    return Case(truth, Observations(linear, seen, variance), free)


def main() -> None:
    """Run both parts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--package", default="kolmogorov_window")
    parser.add_argument("--state", default=None, help="package of single states")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--free", type=int, default=16, help="free trajectories, or 0")
    parser.add_argument("--truths", type=int, default=32, help="to compare them with")
    parser.add_argument("--trajectories", type=int, default=2, help="to be found")
    parser.add_argument("--tuning", type=int, default=2, help="others, to choose the balance by")
    parser.add_argument("--balance", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--fraction", type=float, default=0.03)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--iterations", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--solver", default="dpmpp_2m", help="of the trajectories' posteriors")
    parser.add_argument("--sigma-max", type=float, help="largest level; the package's if left out")
    parser.add_argument("--batch", type=int, default=1024, help="frames computed together")
    parser.add_argument("--spin-up", type=float, default=25.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if len(options.balance) > 1 and options.trajectories + options.tuning > options.truths:
        parser.error("the balance is chosen on other trajectories: more --truths are needed")
    torch.set_float32_matmul_precision("high")
    package = Package.load(options.package, DEVICE)
    state = None if options.state is None else Package.load(options.state, DEVICE)
    truth = unseen(package, options.truths, options.length, options.spin_up)
    drawn = free(package, truth, options) if options.free else []
    found, other = truth[: options.trajectories], truth[-options.tuning :]
    posterior, tried = observed(package, state, found, other, options)
    lines = [
        "# Trajectories from windows",
        "",
        f"{machine()}; windows of {package.task.frames}, trajectories of {options.length} "
        f"frames, {options.steps} steps. {command(__file__)}",
    ]
    if drawn:
        lines += [
            "",
            f"Free: {options.free} trajectories against half of {options.truths} true ones.",
            "",
            "| | energy of time differences, ratio | largest seam | variance, ratio "
            "| log-spectrum distance | s each |",
            "|---|---|---|---|---|---|",
            *drawn,
        ]
    header = ["| | RMSE | CRPS | spread/RMSE | rank p | s |", "|---|---|---|---|---|---|"]
    lines += [
        "",
        f"{options.fraction:.0%} of all points observed, {options.trajectories} trajectories, "
        f"{options.members} members; scores at the other points, in standard deviations; rank "
        "histograms of one point of each frame.",
        "",
        *header,
        *posterior,
    ]
    if tried:
        lines += ["", f"The choice of the balance, on {options.tuning} other trajectories:"]
        lines += ["", *header, *tried]
    publish(lines, options.out)


if __name__ == "__main__":
    main()
