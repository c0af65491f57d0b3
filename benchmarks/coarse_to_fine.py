# SPDX-License-Identifier: Apache-2.0
r"""Super-resolution by eight: the conditional operator beside what else there is.

Kolmogorov flow at Reynolds number 40, 64 x 64 points, seen as means over blocks of 8 x 8 points in
a window of seven frames; states of trajectories that no model was trained on (seed 12345). Beside
the package: bicubic interpolation of the block means; neuraloperator's U-NO of about as many
weights as the package's network, trained in this run to predict the state (mean absolute error)
from the same coarse window for as long as the package was; and, if one is given, a prior of
single states that is conditioned on the block means of the one time (no retraining).

CRPS of a deterministic estimate is its mean absolute error. Scores in standard deviations of the
flow; spectra against those of the true states.

    python benchmarks/coarse_to_fine.py --package kolmogorov_superres --prior runs/re40/package
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from report import command, machine, publish
from torch import Tensor, nn

from ddo_modulus.data.loader import Symmetry, TensorLoader
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.diffusion.task import CoarseWindow
from ddo_modulus.inference.super_resolve import CoarseGrid, super_resolve
from ddo_modulus.simulators import KolmogorovFlow
from ddo_modulus.verification import log_spectrum_distance, rank_histogram, score

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TEST_SEED = 12345
FLOW = {"reynolds": 40.0, "drag": 0.0, "resolution": 64, "interval": 1.0, "dt": 0.01}


class UNO(nn.Module):
    """neuraloperator's U-NO, from the coarse window to the state."""

    def __init__(self, channels: int, width: int, modes: int) -> None:
        super().__init__()
        from neuralop.models import UNO

        self.net = UNO(
            channels,
            1,
            width,
            n_layers=5,
            uno_out_channels=[width] * 5,
            uno_n_modes=[[modes] * 2] * 5,
            uno_scalings=[[1, 1], [0.5, 0.5], [1, 1], [1, 1], [2, 2]],
            channel_mlp_skip="linear",  # its default fails where the width changes
        )

    def forward(self, x: Tensor) -> Tensor:
        """Expected state."""
        return self.net(x)


def simulate(trajectories: int, frames: int, seed: int, spin_up: float, size: int) -> Tensor:
    """Vorticity ``(M, T, H, W)``."""
    flow = KolmogorovFlow(**{**FLOW, "resolution": size}, output_resolution=size, spin_up=spin_up)
    generator = torch.Generator().manual_seed(seed)
    runs = flow.simulate(trajectories, frames, generator=generator, device=DEVICE, batch=1024)
    return torch.cat(list(runs))


def train_uno(
    states: Tensor, package: Package, weights: int, seconds: float, symmetry: Symmetry | None
) -> tuple[nn.Module, int]:
    """A U-NO of about that many weights, trained for a time; and its steps."""
    task, basis = package.task, package.operator.basis
    span, (count, length) = task.span, states.shape[:2]
    start = torch.arange(count * length).view(count, length)[:, : length - span + 1].flatten()
    loader = TensorLoader(
        package.normalization.normalize(states.flatten(0, 1)[:, None].to(DEVICE)),
        frames=start[:, None] + torch.arange(span),
        batch=128 if CUDA else 8,
        symmetry=symmetry,
    )
    modes = min(24, basis.shape[0] // 2)
    sizes = range(4, 65, 2)
    width = min(sizes, key=lambda w: abs(count_weights(UNO(span, w, modes)) - weights))
    torch.manual_seed(0)
    network = UNO(span, width, modes).to(DEVICE)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-4)
    began, steps = time.perf_counter(), 0
    for x, _ in loader.batches():
        passed = (time.perf_counter() - began) / seconds
        if passed >= 1:
            break
        for group in optimizer.param_groups:  # warm-up, then down to zero
            group["lr"] = 1e-3 * min(1.0, (steps + 1) / 100) * (1 - passed) ** 0.5
        state, condition = task.split(x, None, basis)
        loss = (network(condition) - state).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        if CUDA:
            torch.cuda.synchronize()
    return network.eval(), steps


def count_weights(network: nn.Module) -> int:
    """Real numbers in the parameters of a network."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in network.parameters())


def ensemble_of(
    package: Package, condition: Tensor, members: int, steps: int, batch: int
) -> Tensor:
    """Members ``(E, N, H, W)`` of a conditional package."""
    parts, generator = [], torch.Generator().manual_seed(1)
    together = max(1, batch // members)
    for chosen in condition.split(together):
        x = sample(
            package.operator,
            package.scheduler(),
            members * len(chosen),
            steps=steps,
            generator=generator,
            condition=chosen.repeat_interleave(members, 0),
            device=DEVICE,
        )
        parts.append(x[:, 0].unflatten(0, (len(chosen), members)).transpose(0, 1))
    return torch.cat(parts, 1)


def zero_shot(prior: Package, truth: Tensor, package: Package, members: int, batch: int) -> Tensor:
    """Members ``(E, N, H, W)`` of a prior of single states, given the block means of one time."""
    window, statistics = package.task.coarse, package.normalization.to("cpu")
    assert isinstance(window, CoarseWindow)
    means = statistics.denormalize(window.view(truth[:, None].cpu()))
    noise = torch.Generator().manual_seed(2)
    states = super_resolve(
        prior,
        np.full(len(truth), np.datetime64("2000-01-01")),  # the flow knows no time
        means[:, None],
        [[noise] * members] * len(truth),
        cells=CoarseGrid.blocks(prior.grid, window),
        posterior=PosteriorConfig(inflation="none", covariance="jacobian", batch=batch),
    )
    drawn = statistics.normalize(states.flatten(0, 1))[:, 0].unflatten(0, (-1, members))
    return drawn.transpose(0, 1).to(truth)


def main() -> None:
    """Draw, train, score and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--package", default="kolmogorov_superres")
    parser.add_argument("--prior", default=None, help="package of single states of the same flow")
    parser.add_argument("--states", type=int, default=64, help="one of each test trajectory")
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--steps", type=int, default=None, help="the package's if left out")
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="for the U-NO to train; 0 for none"
    )
    parser.add_argument("--trajectories", type=int, default=256, help="for the U-NO to train on")
    parser.add_argument("--frames", type=int, default=40, help="of each")
    parser.add_argument("--spin-up", type=float, default=100.0)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # In full single precision: the flow's smallest waves are below the round-off of TF32.
    package = Package.load(options.package, DEVICE)
    task, basis, size = package.task, package.operator.basis, package.grid.shape[0]
    coarse = task.coarse
    assert coarse is not None
    span = task.span
    tests = simulate(options.states, span, TEST_SEED, options.spin_up, size).to(DEVICE)
    x = package.normalization.normalize(tests.flatten(0, 1)[:, None])
    state, condition = task.split(x.view(options.states, span, size, size), None, basis)
    assert condition is not None
    truth, rows = state[:, 0], []

    def add(name: str, members: Tensor, seconds: float, note: str) -> None:
        error = (members.mean(0) - truth).abs().mean()
        drawn = members.flatten(0, 1).double()
        distance = log_spectrum_distance(drawn, truth.double(), basis)
        if len(members) > 1:
            s = score(members.cpu(), truth.cpu(), label=name, units="std")
            ranks = rank_histogram(
                members.cpu(),
                truth.cpu(),
                generator=torch.Generator().manual_seed(0),
                points_per_field=8,
            )
            scores = f"{s.rmse:.4f} | {s.crps:.4f} | {s.ratio:.3f} | {ranks.p_value:.2f}"
        else:
            rmse = (members[0] - truth).square().mean().sqrt()
            scores = f"{float(rmse):.4f} | {float(error):.4f} | | "
        rows.append(f"| {name} | {note} | {scores} | {distance:.3f} | {seconds:.2f} |")
        print(rows[-1], flush=True)

    began = time.perf_counter()
    means = coarse.view(truth[:, None])
    bicubic = nn.functional.interpolate(means, (size, size), mode="bicubic")[:, 0]
    add("bicubic interpolation", bicubic[None], time.perf_counter() - began, "")
    began = time.perf_counter()
    linear = package.operator.conditional_mean(condition, state)
    assert isinstance(linear, Tensor)
    add("linear regression", linear[:, 0][None], time.perf_counter() - began, "")

    weights = count_weights(package.operator.network)
    began = time.perf_counter()
    levels = package.posterior.steps if options.steps is None else options.steps
    members = ensemble_of(package, condition, options.members, levels, options.batch)
    note = f"{weights / 1e6:.2f} M weights, {options.members} members"
    add("**conditional operator**", members, time.perf_counter() - began, note)
    s = score(members.cpu(), truth.cpu(), label="", units="std")
    if options.prior is not None:
        prior = Package.load(options.prior, DEVICE)
        began = time.perf_counter()
        drawn = zero_shot(prior, truth, package, options.members, options.batch)
        add("prior, block means observed", drawn, time.perf_counter() - began, "zero-shot")
    verdict = ""
    if options.seconds:
        torch.set_float32_matmul_precision("high")  # its speed; it has nothing to lose by TF32
        training = simulate(options.trajectories, options.frames, 1, options.spin_up, size)
        symmetry = Symmetry((size // 4, 1), True, size // 8)
        network, steps = train_uno(training, package, weights, options.seconds, symmetry)
        began = time.perf_counter()
        with torch.no_grad():
            estimate = torch.cat([network(part)[:, 0] for part in condition.split(64)])
        millions = count_weights(network) / 1e6
        note = f"{millions:.2f} M weights, {steps} steps, {options.seconds:.0f} s"
        add("U-NO, deterministic", estimate[None], time.perf_counter() - began, note)
        ratio = s.crps / float((estimate - truth).abs().mean())
        verdict = (
            f"CRPS of the conditional operator over the U-NO's mean absolute error: {ratio:.3f}."
        )
    publish(
        [
            "# Super-resolution of coarse fields",
            "",
            f"{machine()}; {options.states} unseen states of {size} x {size} points, factor "
            f"{coarse.factor:g}, {span} frames, {levels} steps. {command(__file__)}",
            "",
            "| method | | RMSE | CRPS (or MAE) | spread/RMSE | rank p | log-spectrum | s |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            verdict,
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
