# SPDX-License-Identifier: Apache-2.0
r"""Cycled assimilation of Kolmogorov flow: the learned prior with a forecast, against an LETKF.

    python benchmarks/cycling.py [--interval 0.8] [--seeds 10] [--cycles 100] [--members 32]

On a CPU, in less than a minute and of no significance: ``--seeds 1 --cycles 3 --members 4
--spin-up 5 --share 0 --bridge 0 --steps 6 --iterations 0 --out cycling.md``.

**The experiment.** The truth is solved on 128 x 128 points at Reynolds number 1000 and seen as
block means on 64 x 64, in units of the climatological standard deviation. Every interval a random
3 % of these points are observed, with errors of .1. The forecast model is the same solver on
96 x 96, which keeps just those waves that a 64 x 64 grid resolves: an analysis is a state of the
model, without gain or loss (but for the Nyquist wave, which the model drops), and the model is not
the truth's. All methods use the same model, observations and start: states of the free model, not
correlated with the truth. Scores are those of analyses over all points, after a fifth of the
cycles. A seed has diverged if its error exceeds climatology's over the last fifth.

**The bar** is the LETKF of ``letkf.py`` (equal to DAPPER's) with as many members; localisation
radius and inflation are tuned on a trajectory of their own (the second half of its cycles).

**Ours.** Forecast members say of the state that it is :math:`N(\bar x, P)`, and that already holds
what is known of the climate, as far as a Gaussian can. So that nothing is counted twice, the
learned prior :math:`p` (with Gaussian part :math:`N(0, S)`) is conditioned on the estimate that
turns the one into the other,

.. math:: b = B P^{-1} \bar x, \qquad B^{-1} = P^{-1} - S^{-1},

by :class:`~ddo_modulus.posterior.Background`, and on the observations. :math:`P` is homogeneous:
in every wavenumber shell the climate's spectrum times the ensemble's share of its variance (pooled
over the seeds of a cycle), after each ensemble has been inflated to its innovations, smoothed in
time. Two things keep the flow's own structure:

* *latents*: the reverse ODE starts from the forecast's perturbations in units of their spectrum,
  not from white noise; with a Gaussian prior each member's perturbation is then transformed, mode
  by mode, as in a square-root filter. ``share`` is the part of their variance that is the
  forecast's, the rest is new noise. With the network it has to be small: more structure than
  noise has is taken for signal, and the members spread too far. Without, it is one;
* *bridging* (Frei and Kuensch 2013, Biometrika 100, 781): as the likelihood is a product of
  powers, the learned prior takes a part of it, with errors inflated to match, and an LETKF of the
  members that come out takes the rest, ``bridge``. In this order the LETKF works on members near
  the truth, where its linear, noisy gain does little harm; the other order was tried and diverged
  from a climatological start.

Both, and nothing else, are tuned on the same trajectory as the LETKF, whose radius is used.

Axes: ``T`` trajectories (seeds, or settings that are tried together), ``E`` members, ``H W`` grid,
``G = H W``, ``K`` coefficients, ``M`` observations.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from letkf import gaspari_cohn, inflate, letkf, torus_distance
from report import machine, publish
from torch import Tensor

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.prior import FunctionPrior, Prior
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_field import GaussianField, MeasuredSpectrum
from ddo_modulus.observations import LinearOperator, Observations
from ddo_modulus.posterior import Background, MomentMatching
from ddo_modulus.simulators import KolmogorovFlow
from ddo_modulus.verification import fair_crps

SHAPE = (64, 64)
ERROR = 0.1  # of the observations, in standard deviations of the climate
OBSERVED = 0.03
SEED = 12345  # never used in training
MODEL = 96  # the forecast model's points a side
SIGMA_MAX = 40.0  # level where the samples start; their law there is known in closed form
RADII = (2.0, 3.0, 4.0, 6.0, 9.0)
INFLATIONS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4)
SHARES, BRIDGES = (0.0, 0.25), (0.0, 0.4, 0.8)


class Forecast:
    """The solver on a grid of its own, for states that are block means on ``SHAPE``.

    Args:
        interval: Model time of a forecast.
        std: Climatological standard deviation, the unit of the states.
        device: Where to compute.
    """

    def __init__(self, interval: float, std: float, device: str) -> None:
        self.interval, self.std = interval, std
        n, m = SHAPE[0], MODEL
        k = torch.fft.fftfreq(n, 1.0 / n, dtype=torch.float64)
        # Points are centres of cells: a wave's phase at the first depends on the grid. Block means
        # over two points of the truth's grid of 2 n damp it.
        turn = (m / n) * torch.exp(1j * math.pi * k * (1.0 / m - 1.0 / n))
        turn = turn / torch.cos(math.pi * k / (2 * n))
        up, down = turn.clone(), 1.0 / turn
        up[n // 2] = down[n // 2] = 0.0
        self.up, self.down = (
            (t[:, None] * t).to(device=device, dtype=torch.complex64) for t in (up, down)
        )
        index = k.long() % m
        self.rows, self.columns = index[:, None].to(device), index.to(device)

    def lift(self, states: Tensor) -> Tensor:
        """States ``(..., H, W)`` to vorticity at the model's points."""
        waves = torch.fft.fft2(states * self.std) * self.up
        fine = waves.new_zeros(*waves.shape[:-2], MODEL, MODEL)
        fine[..., self.rows, self.columns] = waves
        return torch.fft.ifft2(fine).real

    def lower(self, vorticity: Tensor) -> Tensor:
        """The reverse."""
        waves = torch.fft.fft2(vorticity)[..., self.rows, self.columns]
        return torch.fft.ifft2(waves * self.down).real / self.std

    def __call__(self, states: Tensor) -> Tensor:
        """States ``(..., 1, H, W)`` one interval later.

        The step is halved as long as the states' wind asks for it.
        """
        fields = self.lift(states.reshape(-1, *SHAPE))
        for halvings in range(5):
            flow = KolmogorovFlow(
                resolution=MODEL, output_resolution=MODEL // 2, dt=0.008 / 2**halvings
            )
            try:
                return self.lower(flow.advance(fields, self.interval)).view(states.shape)
            except InputError as error:
                reason = error
        raise reason


@dataclass(frozen=True)
class World:
    """What is to be found and what is seen of it.

    Attributes:
        truth: ``(cycles, T, 1, H, W)``.
        index: ``(cycles, T, M)`` points observed.
        values: ``(cycles, T, M)``.
        start: ``(T, E, 1, H, W)`` members of the first forecast.
    """

    truth: Tensor
    index: Tensor
    values: Tensor
    start: Tensor

    def only(self, trajectories: slice) -> World:
        """Some of the trajectories."""
        s = trajectories
        return World(self.truth[:, s], self.index[:, s], self.values[:, s], self.start[s])

    def repeated(self, times: int, cycles: int) -> World:
        """One trajectory several times, its first cycles only."""
        many = [t[:cycles].repeat_interleave(times, 1) for t in (self.truth, self.index)]
        values = self.values[:cycles].repeat_interleave(times, 1)
        return World(*many, values, self.start.repeat_interleave(times, 0))


def build(options: argparse.Namespace, std: float) -> World:
    """Simulate, observe, draw the start; the first trajectory is for tuning."""
    device, count = options.device, options.seeds + 1
    flow = KolmogorovFlow(interval=options.interval, spin_up=options.spin_up)
    generator = torch.Generator().manual_seed(SEED)
    batches = flow.simulate(count, options.cycles, generator=generator, device=device)
    truth = (torch.cat(list(batches)) / std).transpose(0, 1)[:, :, None].to(device)

    free = KolmogorovFlow(
        interval=options.interval,
        spin_up=options.spin_up,
        resolution=MODEL,
        output_resolution=MODEL // 2,
        dt=0.008,
    )
    fields = free.initial(options.members, generator=generator, device=device)
    states = Forecast(options.interval, std, device).lower(free.advance(fields, options.spin_up))
    points = SHAPE[0] * SHAPE[1]
    observed = round(OBSERVED * points)
    index = torch.empty(options.cycles, count, observed, dtype=torch.long)
    noise = torch.empty(options.cycles, count, observed)
    start = []
    for seed in range(count):
        own = torch.Generator().manual_seed(SEED + 1 + seed)
        # The same free states for all, moved by symmetries of the flow: whole waves of the force
        # along y, anything along x.
        rows = SHAPE[0] // flow.forcing_wavenumber * int(torch.randint(4, (1,), generator=own))
        columns = int(torch.randint(SHAPE[1], (1,), generator=own))
        start.append(states.roll((rows, columns), (-2, -1)))
        for cycle in range(options.cycles):
            index[cycle, seed] = torch.randperm(points, generator=own)[:observed]
            noise[cycle, seed] = torch.randn(observed, generator=own)
    index = index.to(device)
    values = truth.flatten(2).gather(2, index) + ERROR * noise.to(device)
    return World(truth, index, values, torch.stack(start)[:, :, None])


#: Forecast members ``(T, E, 1, H, W)``, points ``(T, M)`` and values to analysis members.
Analysis = Callable[[Tensor, Tensor, Tensor], Tensor]


class TransformFilter:
    """The LETKF with a radius and an inflation for each trajectory.

    Args:
        radius: ``(T,)`` of the localisation, in grid intervals.
        inflation: ``(T,)`` factors on the anomalies of the analysis.
        error: Standard deviation of the observations.
    """

    def __init__(
        self, radius: Sequence[float], inflation: Sequence[float], error: float = ERROR
    ) -> None:
        self.radius, self.inflation = torch.tensor(radius), torch.tensor(inflation)
        self.error = error

    def __call__(self, forecast: Tensor, index: Tensor, values: Tensor) -> Tensor:
        """Analysis members."""
        members = forecast.flatten(2)
        observed = members.gather(2, index[:, None].expand(-1, members.shape[1], -1))
        distance = torus_distance(index, SHAPE)
        taper = gaspari_cohn(distance, self.radius.to(distance).view(-1, 1, 1)).to(members)
        variance = torch.full_like(values, self.error**2)
        analysis = letkf(members, observed, values, variance, taper)
        return inflate(analysis, self.inflation).view(forecast.shape)


class _Start(FieldNoiseScheduler):
    """A schedule whose samples start from given states."""

    def __init__(self, field: GaussianField, sigma_min: float, states: Tensor) -> None:
        super().__init__(field, sigma_min, SIGMA_MAX)
        self.states = states

    def draw(self, like: Tensor, generator: object = None) -> Tensor:
        return self.states / SIGMA_MAX


def half_precision(operator: DiffusionOperator) -> Prior:
    """The operator with its network in bfloat16, as it was trained."""

    def denoise(x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return operator(x, sigma, condition)

    return FunctionPrior(denoise, operator.noise, operator.linear)


class LearnedPrior:
    """Ours: see the module's text.

    Args:
        package: The prior.
        options: Of the command line.
        share: Part of the latents' variance that is the forecast's.
        bridge: Part of the likelihood that an LETKF takes, below one.
        radius: Its localisation.
        network: Whether the network counts; without it the prior is Gaussian.
        background: Whether the forecast counts; without it each analysis stands alone.
    """

    def __init__(
        self,
        package: Package,
        options: argparse.Namespace,
        *,
        share: float = 0.0,
        bridge: float = 0.0,
        radius: float = 4.0,
        network: bool = True,
        background: bool = True,
    ) -> None:
        operator = package.operator
        self.linear, self.noise = operator.linear, operator.noise
        self.prior: Prior = self.linear
        if network:
            self.prior = half_precision(operator) if options.device == "cuda" else operator
        self.package, self.options = package, options
        self.share, self.bridge, self.radius = share, bridge, radius
        self.background = background
        self.covariance = "jacobian" if network and options.iterations else "linear"
        self.climate = self.linear.variance[0].double().to(options.device)  # in units of the noise
        self.scale = self.noise.variance[0].double().to(options.device)
        self.shell = self.noise.basis.shells()[1].to(options.device)
        self.generator = torch.Generator(options.device).manual_seed(SEED)
        self.inflation: Tensor | None = None  # (T,) of variances, from the cycles so far

    def __call__(self, forecast: Tensor, index: Tensor, values: Tensor) -> Tensor:
        """Analysis members."""
        if not self.background:
            # So far up the prior is as good as Gaussian.
            variance = self.climate.expand(len(forecast), -1)
            return self._draw(self.prior, variance, self._white(forecast), index, values)
        forecast = self._inflated(forecast, index, values)
        members = forecast.shape[1]
        mean = forecast.mean(1)
        anomalies = self.noise.whiten((forecast - mean[:, None]).flatten(0, 1))
        anomalies = anomalies.view(len(forecast), members, -1)
        share = self._share(anomalies)
        # The mean of the members misses a state that is like them by 1 / E more.
        variance = (share * (1 + 1 / members)).clamp_max(0.95) * self.climate
        error = 1 / (1 / variance - 1 / self.climate)
        centre = self.noise.whiten(mean).double() * (error / variance)
        spectrum = MeasuredSpectrum(self.noise.basis, (error * self.scale)[None])
        background = Background(
            self.prior,
            self.noise.color(centre.float()),
            GaussianField(self.noise.basis, spectrum),
        )
        own = anomalies / (share * self.climate).sqrt().to(anomalies)
        white = self._white(forecast)
        latents = math.sqrt(self.share) * own + math.sqrt(1 - self.share) * white
        analysis = self._draw(background, variance.expand(len(mean), -1), latents, index, values)
        if self.bridge > 0:
            count, error = len(forecast), ERROR / math.sqrt(self.bridge)
            rest = TransformFilter([self.radius] * count, [1.0] * count, error)
            analysis = rest(analysis, index, values)
        return analysis

    def _inflated(self, forecast: Tensor, index: Tensor, values: Tensor) -> Tensor:
        """Members whose variance is what their innovations have been asking for."""
        members = forecast.flatten(2)
        observed = members.gather(2, index[:, None].expand(-1, members.shape[1], -1))
        innovation = (values - observed.mean(1)).square().mean(1) - ERROR**2
        variance = observed.var(1).mean(1) * (1 + 1 / members.shape[1])
        asked = (innovation / variance).clamp(0.3, 3.0)
        old = torch.ones_like(asked) if self.inflation is None else self.inflation
        self.inflation = (old * (asked / old) ** 0.15).clamp(0.7, 3.0)
        return inflate(members, self.inflation.sqrt()).view(forecast.shape)

    def _share(self, anomalies: Tensor) -> Tensor:
        """The ensembles' variance over the climate's in the shell of each coefficient, ``(K,)``."""
        variance = anomalies.double().square().sum(1).mean(0) / (anomalies.shape[1] - 1)
        shells = int(self.shell.max()) + 1
        ours, climate = (
            torch.zeros(shells, dtype=v.dtype, device=v.device).index_add(0, self.shell, v)
            for v in (variance * self.scale, self.climate * self.scale)
        )
        # No shell is better known than a thousandth of the climate's deviation.
        return (ours / climate).clamp_min(1e-6)[self.shell]

    def _white(self, forecast: Tensor) -> Tensor:
        """White latents ``(T, E, K)`` whose mean over the members is zero, of unit variance."""
        size = (*forecast.shape[:2], self.noise.basis.size)
        white = torch.randn(size, generator=self.generator, device=forecast.device)
        members = size[1]
        return (white - white.mean(1, keepdim=True)) * math.sqrt(members / (members - 1))

    def _draw(
        self,
        prior: Prior,
        variance: Tensor,
        latents: Tensor,
        index: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Members of the posterior, their start from the Gaussian law of the noisy states."""
        count, members = latents.shape[:2]
        operator = LinearOperator(
            index[..., None], torch.ones_like(values)[..., None], torch.zeros_like(values)
        )
        observations = Observations(operator, values, ERROR**2 / (1 - self.bridge))
        # Where all is noise, a posterior is the mean; the linear part's needs no sampling.
        linear = MomentMatching(prior.linear, observations, covariance="linear")
        blank = torch.zeros_like(values[:, :1, None, None]).expand(-1, 1, *SHAPE)
        mean = linear(blank, torch.full_like(values[:, 0], 1e5))
        deviation = (variance + SIGMA_MAX**2).sqrt().to(latents)[:, None]
        states = mean[:, None] + self.noise.color(latents * deviation)[:, :, None]
        posterior = MomentMatching(
            prior,
            observations,
            covariance=self.covariance,  # type: ignore[arg-type]
            iterations=max(self.options.iterations, 1),
        )
        start = _Start(self.noise, self.package.posterior.sigma_min, states.flatten(0, 1))
        x = sample(posterior, start, count * members, steps=self.options.steps, device=mean.device)
        return x.view(count, members, 1, *SHAPE)


@dataclass(frozen=True)
class Record:
    """Scores of analyses, ``(cycles, T)`` each.

    Attributes:
        error: Mean squared error of the ensemble mean.
        variance: Mean unbiased variance of the members.
        crps: Mean fair CRPS.
        forecast: Mean squared error of the forecast's mean.
        seconds: Of the whole run.
    """

    error: Tensor
    variance: Tensor
    crps: Tensor
    forecast: Tensor
    seconds: float

    def kept(self, name: str, part: int = 5) -> Tensor:
        """Means of a score over the cycles after the first one in so many, ``(T,)``."""
        scores = getattr(self, name)
        return scores[len(scores) // part :].nanmean(0)

    def last(self) -> Tensor:
        """RMSE over the last fifth (five cycles at least), ``(T,)``."""
        return self.error[-max(len(self.error) // 5, 5) :].nanmean(0).sqrt()


def run(
    world: World,
    forecast: Forecast | None,
    analysis: Analysis | None,
    label: str = "",
    every: int = 1,
) -> Record:
    """Cycle through a world.

    Args:
        world: Truth and observations.
        forecast: The model; None if members do not move between the cycles.
        analysis: The method; None to leave the members as they are.
        label: For the log.
        every: Analyses that are made of those possible, where no forecast needs them.
    """
    members, rows = world.start, []
    began = time.perf_counter()
    for cycle, truth in enumerate(world.truth):
        if cycle % every:
            rows.append(torch.full((4, len(members)), math.nan, device=truth.device))
            continue
        if cycle and forecast is not None:
            members = forecast(members)
        before = (members.mean(1) - truth).square().mean((1, 2, 3))
        if analysis is not None:
            members = analysis(members, world.index[cycle], world.values[cycle])
        error = (members.mean(1) - truth).square().mean((1, 2, 3))
        crps = fair_crps(members.transpose(0, 1), truth).mean((1, 2, 3))
        rows.append(torch.stack([error, members.var(1).mean((1, 2, 3)), crps, before]))
        if label and (cycle < 3 or cycle % 10 == 9):
            print(
                f"{label}, cycle {cycle + 1}: RMSE {float(error.mean().sqrt()):.3f}, forecast "
                f"{float(before.mean().sqrt()):.3f}, {time.perf_counter() - began:.1f} s",
                flush=True,
            )
    scores = torch.stack(rows, 1).double().cpu()
    return Record(*scores, time.perf_counter() - began)


def tune_filter(world: World, forecast: Forecast, cycles: int) -> tuple[float, float, list[str]]:
    """Radius and inflation of the least error on one trajectory, and a table of all."""
    grid = [(r, i) for r in RADII for i in INFLATIONS]
    method = TransformFilter([r for r, _ in grid], [i for _, i in grid])
    record = run(world.repeated(len(grid), cycles), forecast, method, "LETKF, tuning")
    rmse = record.kept("error", 2).sqrt()
    best = grid[int(rmse.nan_to_num(math.inf).argmin())]
    table = rmse.view(len(RADII), -1)
    lines = ["| radius | " + " | ".join(f"{i:g}" for i in INFLATIONS) + " |"]
    lines.append("|---:" * (len(INFLATIONS) + 1) + "|")
    for radius, row in zip(RADII, table, strict=True):
        lines.append(f"| {radius:g} | " + " | ".join(f"{float(v):.3f}" for v in row) + " |")
    return *best, lines


def tune_prior(
    package: Package,
    options: argparse.Namespace,
    world: World,
    forecast: Forecast,
    cycles: int,
    radius: float,
    *,
    network: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Share and bridge of the least error on one trajectory, and lines of a table of all."""
    shares = options.share if network else [1.0]
    settings = [
        {"share": s, "bridge": b, "radius": radius, "network": network}
        for s in shares
        for b in options.bridge
    ]
    if len(settings) == 1:
        return settings[0], []
    errors, lines = [], []
    for setting in settings:
        method = LearnedPrior(package, options, **setting)
        record = run(world.repeated(1, cycles), forecast, method)
        errors.append(float(record.kept("error", 2).sqrt().nan_to_num(math.inf)))
        name = "ours" if network else "without the network"
        lines.append(
            f"| {name} | {setting['share']:g} | {setting['bridge']:g} | {errors[-1]:.3f} |"
        )
        print(f"{lines[-1]} {record.seconds:.1f} s", flush=True)
    return settings[errors.index(min(errors))], lines


def row(label: str, record: Record, bar: Record, climate: Tensor, members: int) -> str:
    """A line of the table: means over the seeds, and the seeds' standard error for the RMSE."""
    rmse, crps = record.kept("error").sqrt(), record.kept("crps")
    spread = record.kept("variance").sqrt()
    ratio = math.sqrt((members + 1) / members) * spread / rmse
    error = float(rmse.std() / math.sqrt(len(rmse))) if len(rmse) > 1 else math.nan
    before = record.kept("forecast").sqrt()
    against = rmse / bar.kept("error").sqrt(), crps / bar.kept("crps")
    diverged = int((~(record.last() <= climate)).sum())
    return (
        f"| {label} | {float(rmse.mean()):.3f} ± {error:.3f} | {float(spread.mean()):.3f} "
        f"| {float(ratio.mean()):.2f} | {float(crps.mean()):.3f} | {float(before.mean()):.3f} "
        f"| {float(against[0].mean()):.3f} | {float(against[1].mean()):.3f} "
        f"| {diverged} of {len(rmse)} | {record.seconds:.0f} |"
    )


def main() -> None:
    """Run all methods and publish the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--members", type=int, default=32, help="at least 2")
    parser.add_argument("--interval", type=float, default=0.8, help="model time between analyses")
    parser.add_argument("--tuning", type=int, default=40, help="cycles that settings are tried on")
    parser.add_argument("--spin-up", type=float, default=25.0, help="model time before the first")
    parser.add_argument("--steps", type=int, default=12, help="noise levels")
    parser.add_argument("--iterations", type=int, default=1, help="0: covariance of linear part")
    parser.add_argument("--share", type=float, nargs="*", default=SHARES, help="to try")
    parser.add_argument("--bridge", type=float, nargs="*", default=BRIDGES, help="to try")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="benchmarks/results/cycling_<interval>.md if none")
    options = parser.parse_args()
    began = time.perf_counter()
    package = Package.load("kolmogorov64", options.device)
    std = float(package.normalization.std)
    forecast = Forecast(options.interval, std, options.device)
    whole = build(options, std)
    print(f"truth and start: {time.perf_counter() - began:.1f} s", flush=True)
    tuning, world = whole.only(slice(0, 1)), whole.only(slice(1, None))
    cycles = min(options.tuning, options.cycles)

    radius, inflation, table = tune_filter(tuning, forecast, cycles)
    print("\n".join(table), flush=True)
    own, tried = tune_prior(package, options, tuning, forecast, cycles, radius, network=True)
    plain, without = tune_prior(package, options, tuning, forecast, cycles, radius, network=False)

    count = options.seeds
    methods: dict[str, tuple[Analysis | None, Forecast | None, int]] = {
        "ours: forecast, learned prior": (LearnedPrior(package, options, **own), forecast, 1),
        "the same without the network": (LearnedPrior(package, options, **plain), forecast, 1),
        "ours without a forecast": (LearnedPrior(package, options, background=False), None, 5),
        "LETKF": (TransformFilter([radius] * count, [inflation] * count), forecast, 1),
        "climatology (free states)": (None, None, 1),
    }
    records = {
        label: run(world, model, method, label, every)
        for label, (method, model, every) in methods.items()
    }
    climate = records["climatology (free states)"].last()
    command = f"--interval {options.interval:g} --seeds {count} --cycles {options.cycles}"
    command += f" --members {options.members} --steps {options.steps}"
    command += f" --iterations {options.iterations} --share " + " ".join(map(str, options.share))
    command += " --bridge " + " ".join(map(str, options.bridge))
    lines = [
        f"# Cycled assimilation of Kolmogorov flow, every {options.interval:g} units of time",
        "",
        f"`python benchmarks/cycling.py {command}`, {date.today()}, {machine()}, "
        f"{time.perf_counter() - began:.0f} s in all.",
        "",
        f"Vorticity on 64 x 64, {OBSERVED:.0%} of the points observed with errors of {ERROR:g}; in "
        "standard deviations of the climate. Ratios to the LETKF are means over the seeds; ± is "
        "the standard error over them. *Forecast*: RMSE before the analysis. *Diverged*: RMSE over "
        "the last fifth above climatology's.",
        "",
        "| method | RMSE | spread | spread/RMSE | CRPS | forecast | RMSE to LETKF | CRPS to LETKF "
        "| diverged | s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(row(name, r, records["LETKF"], climate, options.members) for name, r in records.items()),
        "",
        f"Tuned on the second half of {cycles} cycles of another trajectory: LETKF radius "
        f"{radius:g} grid intervals, inflation {inflation:g}; ours share {own['share']:g}, bridge "
        f"{own['bridge']:g}; without the network {plain['share']:g} and {plain['bridge']:g}.",
        "",
        "RMSE of the LETKF there, by radius and inflation:",
        "",
        *table,
    ]
    if tried or without:
        lines += ["", "RMSE of ours there:", "", "| method | share | bridge | RMSE |"]
        lines += ["|---|---:|---:|---:|", *tried, *without]
    out = Path(__file__).parent / "results" / f"cycling_{options.interval:g}.md"
    publish(lines, options.out or out)


if __name__ == "__main__":
    main()
