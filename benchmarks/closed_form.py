# SPDX-License-Identifier: Apache-2.0
"""Posterior sampling against a posterior that is known exactly, beside azula and PhysicsNeMo.

The prior is Gaussian, the denoiser is exact and the observations are linear, so optimal
interpolation gives the posterior in closed form and every deviation is the sampler's. Prints
Markdown and writes it to ``benchmarks/results/closed_form.md``::

    python benchmarks/closed_form.py [--quick]
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.samplers import sample
from ddo_modulus.fields.basis import Basis, CosineBasis, FourierBasis
from ddo_modulus.fields.derivative import Differentiable
from ddo_modulus.fields.gaussian_denoiser import GaussianDenoiser
from ddo_modulus.fields.gaussian_field import GaussianField, Matern, WhiteField
from ddo_modulus.fields.grid import BoxGrid, Grid, LatLonGrid
from ddo_modulus.fields.spherical_basis import SphericalBasis
from ddo_modulus.observations import Observations, PointOperator
from ddo_modulus.posterior import MomentMatching

RESULTS = Path(__file__).parent / "results" / "closed_form.md"


class Counted(Differentiable):
    """A Gaussian prior that counts its cost: 1 a forward pass, 2 a vector-Jacobian product."""

    def __init__(self, denoiser: GaussianDenoiser) -> None:
        self.linear, self.noise, self.cost = denoiser, denoiser.noise, 0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """The denoiser itself."""
        self.cost += 1
        clean = self.linear(x, sigma)
        if clean.requires_grad:
            clean.register_hook(self._backward)
        return clean

    def _backward(self, gradient: Tensor) -> None:
        self.cost += 2


class Problem:
    """A prior, observations, and their exact posterior."""

    def __init__(
        self, basis: Basis, grid: Grid, stations: int, *, scale: float = 1.0, seed: int = 1
    ) -> None:
        self.prior = GaussianField(basis, Matern(0.25 * scale, 2.0))
        self.noise = GaussianField(basis, Matern(0.25 * scale, 1.0))
        self.white = WhiteField(basis)
        rng = np.random.default_rng(seed)
        lat = rng.uniform(grid.lat.min(), grid.lat.max(), stations)
        lon = rng.uniform(grid.lon.min(), grid.lon.max(), stations)
        self.operator = PointOperator(grid, lat, lon)
        variance = torch.from_numpy(rng.uniform(0.01, 0.1, stations))
        generator = torch.Generator().manual_seed(seed)
        # Values of a coarse-grained truth, so that all grids of a sweep observe the same.
        coarse = self.prior.basis.truncate(min(*basis.shape, 32) // 2 - 1)
        truth = GaussianField(coarse, Matern(0.25 * scale, 2.0)).sample(
            1, generator=generator, dtype=torch.float64
        )
        values = self.operator(truth)[0]
        values = values + variance.sqrt() * torch.randn(
            stations, generator=generator, dtype=torch.float64
        )
        self.observations = Observations(self.operator, values, variance)
        self._solve()

    def _solve(self) -> None:
        """Optimal interpolation with all matrices in the space of the observations."""
        stations = self.operator.size
        unit = torch.eye(stations, dtype=torch.float64)
        shape = (1, *self.prior.shape)
        self.cross = self.prior.cov(self.operator.adjoint(unit, shape)).flatten(1)  # M N
        error = self.observations.error_covariance(unit)[0]
        hph = self.operator.increment(self.cross.unflatten(1, shape)) + error
        self.factor = torch.linalg.cholesky((hph + hph.T) / 2)
        whitened = torch.linalg.solve_triangular(self.factor, self.cross, upper=False)
        innovation = torch.cholesky_solve(self.observations.values[:, None], self.factor)
        self.mean = (innovation * self.cross).sum(0)
        prior_variance = (
            self.prior.color(torch.eye(self.prior.basis.size, dtype=torch.float64)[:, None])
            .square()
            .sum(0)
            .flatten()
            if self.prior.basis.size <= 4096
            else torch.ones_like(self.mean)  # homogeneous: unit variance at every point
        )
        self.variance = prior_variance - whitened.square().sum(0)
        self.scale = prior_variance.mean().sqrt()
        self.whitened = whitened

    def projected_variance(self, v: Tensor) -> Tensor:
        """Exact posterior variance of ``v . x`` for directions ``(V, N)``."""
        prior = self.prior.color_adjoint(v.unflatten(1, (1, *self.prior.shape)))
        return prior.flatten(1).square().sum(1) - (v @ self.whitened.T).square().sum(1)

    def denoiser(self, *, white: bool = False) -> Counted:
        """The exact denoiser of the prior under field noise or white noise."""
        return Counted(GaussianDenoiser(0.0, self.prior, self.white if white else self.noise))

    def mean_error(self, mean: Tensor) -> float:
        """RMS over points, in standard deviations of the prior."""
        return float((mean.double().flatten() - self.mean).square().mean().sqrt() / self.scale)

    def score(self, x: Tensor) -> Score:
        """Moments of samples against the exact ones."""
        x = x.double().flatten(1)
        if not bool(x.isfinite().all()):
            return Score(math.inf, math.nan, math.nan, math.nan)
        mean = x.mean(0)
        return self._score(mean, (x - mean) / math.sqrt(len(x) - 1))

    def affine_score(self, covariance: str, steps: int = 32) -> Score:
        """The same without Monte-Carlo error.

        The sampler is affine in its noise: the image of zero is the mean, and the images of the
        unit coefficients are a root of the covariance.
        """
        posterior = MomentMatching(
            self.denoiser(),
            self.observations,
            covariance=covariance,  # type: ignore[arg-type]
        )
        size = self.noise.basis.size
        x = sample(posterior, _Units(self.noise), size + 1, steps=steps, dtype=torch.float64)
        x = x.flatten(1)
        return self._score(x[0], x[1:] - x[0])

    def _score(self, mean: Tensor, root: Tensor) -> Score:
        """Of a mean and rows whose outer products sum to a covariance."""
        ratio = float((root.square().sum(0) / self.variance).sqrt().mean())
        v = torch.randn(
            20, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        projected = (root @ v.T).square().sum(0) / self.projected_variance(v)
        return Score(self.mean_error(mean), ratio, float(projected.min()), float(projected.max()))

    def exact_samples(self, batch: int, generator: torch.Generator) -> Tensor:
        """Independent draws from the exact posterior (Matheron's rule): the Monte-Carlo floor."""
        x = self.prior.sample(batch, generator=generator, dtype=torch.float64)
        noise = (
            torch.randn(batch, self.operator.size, generator=generator, dtype=torch.float64)
            @ self.observations.error_covariance(x)[0].sqrt()
        )
        innovation = self.observations.values - self.operator(x) - noise
        return x.flatten(1) + torch.cholesky_solve(innovation.T, self.factor).T @ self.cross


@dataclass
class Score:
    """How far samples are from the exact posterior."""

    mean: float
    std: float
    low: float
    high: float

    @property
    def passes(self) -> bool:
        """Within the bounds this project sets itself."""
        return (
            self.mean <= 0.03
            and 0.98 <= self.std <= 1.02
            and self.low >= 0.9
            and (self.high <= 1.1)
        )

    @property
    def badness(self) -> float:
        """One number to choose the best setting of a method by."""
        if not math.isfinite(self.mean + self.std):
            return math.inf
        return self.mean + abs(math.log(max(self.std, 1e-9)))

    @property
    def verdict(self) -> str:
        """Of :attr:`passes`, for a table."""
        return "pass" if self.passes else "**fail**"

    def cells(self, digits: int = 3) -> list[str]:
        """Columns of a table."""
        if not math.isfinite(self.mean) or self.mean > 100:
            return ["diverged", "", ""]
        return [f"{self.mean:.{digits}f}", f"{self.std:.3f}", f"{self.low:.2f}–{self.high:.2f}"]


@dataclass
class Row:
    """One method at one number of steps."""

    method: str
    noise: str
    steps: int
    score: Score
    cost: float
    seconds: float
    setting: str = field(default="")


def ours(
    problem: Problem,
    steps: int,
    batch: int,
    *,
    white: bool = False,
    sigma_max: float = 80.0,
    **options: Any,  # noqa: ANN401 - those of MomentMatching
) -> tuple[Tensor, Counted]:
    """Samples of the moment matching posterior."""
    denoiser = problem.denoiser(white=white)
    noise = problem.white if white else problem.noise
    scheduler = FieldNoiseScheduler(noise, sigma_max=sigma_max)
    posterior = MomentMatching(denoiser, problem.observations, **options)
    generator = torch.Generator().manual_seed(0)
    return sample(posterior, scheduler, batch, steps=steps, generator=generator), denoiser


# ---- the peers ----------------------------------------------------------------------------------


def azula_samples(
    problem: Problem,
    steps: int,
    batch: int,
    method: str,
    sampler: str = "DDIMSampler",
    schedule: str = "VPSchedule",
    **options: float,
) -> tuple[Tensor, Counted]:
    """Samples of azula's guidance with its own schedule and samplers, in white noise."""
    from azula import denoise, noise, sample
    from azula.guidance.dps import DPSSampler
    from azula.guidance.mmps import MMPSDenoiser
    from azula.guidance.pgdm import PGDMSampler
    from azula.linalg.covariance import DiagonalCovariance

    counted = problem.denoiser(white=True)
    shape = problem.prior.shape

    class Exact(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = getattr(noise, schedule)()

        def forward(self, x_t: Tensor, t: Tensor, **_: object) -> denoise.DiracPosterior:
            alpha, sigma = self.schedule(t)
            x = (x_t / alpha).unflatten(1, (1, *shape))
            clean = counted(x, (sigma / alpha).expand(len(x)))
            return denoise.DiracPosterior(mean=clean.flatten(1))

    h = problem.operator.increment(
        torch.eye(math.prod(shape), dtype=torch.float64).unflatten(1, (1, *shape))
    ).T.float()
    inverse = torch.linalg.pinv(h)
    y = problem.observations.values.float()
    variance = problem.observations.error_covariance(y)[0].diagonal()
    prior = Exact()

    def observe(x: Tensor) -> Tensor:
        return x @ h.T

    common = {"steps": steps, "silent": True}
    if method == "mmps":
        posterior = MMPSDenoiser(
            prior,
            y,
            observe,
            DiagonalCovariance(variance),
            **options,
        )
        solver = getattr(sample, sampler)(posterior, **common)
    elif method == "pgdm":
        solver = PGDMSampler(prior, y, observe, lambda v: v @ inverse.T, **options, **common)
    else:
        # Its norm runs over the whole batch; the factor restores the strength of one state.
        zeta = options["zeta"] * math.sqrt(batch)
        solver = DPSSampler(prior, y, observe, zeta=zeta, **common)
    torch.manual_seed(0)
    start = solver.init((batch, math.prod(shape)))
    return solver(start), counted


def physicsnemo_samples(
    problem: Problem, steps: int, batch: int, solver: str, gamma: float
) -> tuple[Tensor, Counted]:
    """Samples of PhysicsNeMo's DPS (gamma 0) or SDA (gamma > 0) guidance, in white noise."""
    from physicsnemo.diffusion.guidance import DPSScorePredictor, ModelConsistencyDPSGuidance
    from physicsnemo.diffusion.noise_schedulers import EDMNoiseScheduler
    from physicsnemo.diffusion.samplers import sample

    counted = problem.denoiser(white=True)
    scheduler = EDMNoiseScheduler()
    y = problem.observations.values.float().expand(batch, -1)
    variance = problem.observations.error_covariance(y)[0].diagonal()
    guidance = ModelConsistencyDPSGuidance(
        observation_operator=problem.operator,
        y=y,
        std_y=variance.sqrt()[None],
        gamma=gamma,
        sigma_fn=scheduler.sigma,
        alpha_fn=scheduler.alpha,
    )
    score = DPSScorePredictor(
        x0_predictor=counted, x0_to_score_fn=scheduler.x0_to_score, guidances=guidance
    )
    torch.manual_seed(0)
    first = scheduler.timesteps(steps)[:1].expand(batch)
    start = scheduler.init_latents((1, *problem.prior.shape), first)
    with torch.no_grad():
        x = sample(
            scheduler.get_denoiser(score_predictor=score), start, scheduler, steps, solver=solver
        )
    return x, counted


# ---- the tables ---------------------------------------------------------------------------------


def timed(
    run: Callable[[], tuple[Tensor, Counted]], problem: Problem
) -> tuple[Score, float, float]:
    """Score, forward-equivalents of a state, seconds of processor time (of all threads)."""
    start = time.process_time()
    x, counted = run()
    seconds = time.process_time() - start
    return problem.score(x), counted.cost, seconds


def globe(shape: tuple[int, int]) -> tuple[Basis, Grid]:
    """Spherical basis and its grid."""
    basis = SphericalBasis(shape)
    return basis, LatLonGrid(basis.latitudes(shape[0]), np.arange(shape[1]) * 360.0 / shape[1])


def bases_table(batch: int, quick: bool) -> list[str]:
    """Every basis on even, odd and non-square grids."""
    sizes = [(12, 12), (9, 14), (11, 11)] if quick else [(24, 24), (20, 33), (25, 25)]
    cases: list[tuple[str, Basis, Grid, int, float]] = []
    stations = iter((20, 40, 60) * 3)
    for h, w in sizes:
        lengths = (1.0, w / h)
        basis: Basis = FourierBasis((h, w), lengths)
        cases.append((f"torus {h}×{w}", basis, BoxGrid((h, w), lengths), next(stations), 1.0))
    for h, w in sizes:
        lengths = (1.0, w / h)
        grid: Grid = BoxGrid((h, w), lengths, periodic=False)
        cases.append((f"box {h}×{w}", CosineBasis((h, w), lengths), grid, next(stations), 1.0))
    for h, w in [(10, 20), (11, 16)] if quick else [(24, 48), (25, 48), (20, 33)]:
        cases.append((f"sphere {h}×{w}", *globe((h, w)), next(stations), 2.0))
    lines = [
        "| grid | stations | covariance | mean error | std ratio | projections | CPU s | |"
        " exactly: mean error | std ratio | projections | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, basis, grid, count, scale in cases:
        problem = Problem(basis, grid, count, scale=scale)
        for covariance in ("jacobian", "linear"):
            run = partial(ours, problem, 32, batch, covariance=covariance)
            score, _, seconds = timed(run, problem)
            exact = problem.affine_score(covariance)
            cells = [name, str(count), covariance, *score.cells(4), f"{seconds:.1f}"]
            cells += [score.verdict if batch >= 2048 else "", *exact.cells(4), exact.verdict]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def sweep_table(quick: bool) -> list[str]:
    """The same problem on ever finer grids of the torus, at 32 steps."""
    lines = [
        "| grid | mean error | std ratio, 28 points | projections, 20 | CPU s |",
        "|---|---|---|---|---|",
    ]
    for n in (16, 32) if quick else (32, 64, 128, 256):
        start = time.process_time()
        problem = Problem(FourierBasis((n, n)), BoxGrid((n, n)), 60, seed=2)
        posterior = MomentMatching(problem.denoiser(), problem.observations, covariance="linear")
        generator = torch.Generator().manual_seed(3)
        points = torch.randint(n * n, (28,), generator=generator)
        directions = torch.cat(
            [
                torch.nn.functional.one_hot(points, n * n).double(),
                torch.randn(20, n * n, dtype=torch.float64, generator=generator),
            ]
        )
        variances = []
        for part in directions.split(8):  # what the backward pass keeps is large
            mean, variance = _affine_moments(posterior, problem.noise, part)
            variances.append(variance / problem.projected_variance(part))
        ratio = torch.cat(variances)
        seconds = time.process_time() - start
        std, projections = ratio[:28].sqrt().mean(), ratio[28:]
        cells = [f"{n}²", f"{problem.mean_error(mean):.4f}", f"{float(std):.4f}"]
        cells += [f"{float(projections.min()):.3f}–{float(projections.max()):.3f}"]
        lines.append("| " + " | ".join([*cells, f"{seconds:.0f}"]) + " |")
    return lines


def _affine_moments(
    posterior: MomentMatching, noise: GaussianField, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean of an affine sampler ``x = m + A z``, and the variances ``|A^T v|^2`` of ``v . x``.

    One backward pass through all steps gives ``A^T v``; there is no Monte-Carlo error.
    """
    z = torch.zeros(len(directions), 1, noise.basis.size, dtype=torch.float64, requires_grad=True)

    class Given(FieldNoiseScheduler):
        def draw(self, like: Tensor, generator: object = None) -> Tensor:
            return self.field.color(z)

    differentiable = inspect.unwrap(sample)  # without its no_grad
    x = differentiable(posterior, Given(noise), len(z), steps=32, dtype=torch.float64)
    [root] = torch.autograd.grad((x.flatten(1) * directions).sum(), z)
    return x[0].detach(), root.square().sum((1, 2))


class _Units(FieldNoiseScheduler):
    """A scheduler that draws no noise, and then every unit coefficient."""

    def draw(self, like: Tensor, generator: object = None) -> Tensor:
        """Colored zero and unit coefficients."""
        size = self.field.basis.size
        z = torch.cat([torch.zeros(1, size), torch.eye(size)]).to(like)
        return self.field.color(z[:, None])


def peers_table(batch: int, quick: bool) -> list[str]:
    """Ours beside the peers on one problem."""
    n = 12 if quick else 24
    problem = Problem(FourierBasis((n, n)), BoxGrid((n, n)), 20 if quick else 40)
    table: list[Row] = []
    _methods(problem, 2, 4)  # imports and first calls, outside the clock
    for steps in (16,) if quick else (16, 32, 64):
        table += _methods(problem, steps, batch)
    reference = {row.steps: row.seconds for row in table if row.method.startswith("ours (default)")}
    floor = problem.score(problem.exact_samples(batch, torch.Generator().manual_seed(5)))
    lines = [
        "| method | noise | steps | mean error | std ratio | projections | NFE | CPU time / ours |",
        "|---|---|---|---|---|---|---|---|",
        "| exact draws (Monte-Carlo floor) | – | – | " + " | ".join(floor.cells()) + " | | |",
    ]
    for row in table:
        cells = [row.method + (f", {row.setting}" if row.setting else ""), row.noise]
        cells += [str(row.steps), *row.score.cells(), f"{row.cost:.0f}"]
        cells.append(f"{row.seconds / reference[row.steps]:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _methods(problem: Problem, steps: int, batch: int) -> list[Row]:
    """All methods at one number of steps."""

    def row(
        name: str,
        noise: str,
        run: Callable[..., tuple[Tensor, Counted]],
        setting: str = "",
        /,
        **options: Any,  # noqa: ANN401
    ) -> Row:
        score, cost, seconds = timed(lambda: run(problem, steps, batch, **options), problem)
        return Row(name, noise, steps, score, cost, seconds, setting)

    rows = [
        row("ours (default)", "field", ours),
        row("ours, 1 iteration", "field", ours, iterations=1),
        row("ours, linear covariance", "field", ours, covariance="linear"),
        row("ours (white)", "white", ours, white=True),
        row("ours (white), azula's levels", "white", ours, white=True, sigma_max=1e3),
    ]

    def best(
        name: str, run: Callable[..., tuple[Tensor, Counted]], settings: dict[str, dict[str, Any]]
    ) -> Row:
        """The setting whose moments come nearest, chosen on fewer samples, run on all."""

        def badness(options: dict[str, Any]) -> float:
            return problem.score(run(problem, steps, min(batch, 256), **options)[0]).badness

        chosen = min(settings, key=lambda setting: badness(settings[setting]))
        name = f"{name}, best of {len(settings)}"
        return row(name, "white", run, chosen, **settings[chosen])

    def mmps(*samplers: str, iterations: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        return {
            f"{sampler} {schedule} {n} it.": {
                "method": "mmps",
                "sampler": f"{sampler}Sampler",
                "schedule": f"{schedule}Schedule",
                "iterations": n,
            }
            for sampler in samplers
            for schedule in ("VP", "VE")
            for n in iterations
        }

    rows += [
        row("azula MMPS (default)", "white", azula_samples, method="mmps"),
        best("azula MMPS, default cost", azula_samples, mmps("DDIM", "xEAB", iterations=(1,))),
        best(
            "azula MMPS",
            azula_samples,
            mmps("DDIM", "Heun", iterations=(1, 4)) | mmps("xEAB", iterations=(1, 4, 16)),
        ),
        row("azula ΠGDM (default)", "white", azula_samples, method="pgdm"),
        row("azula ΠGDM", "white", azula_samples, "eta=1", method="pgdm", eta=1.0),
        row("azula DPS (default)", "white", azula_samples, "zeta=1", method="dps", zeta=1.0),
        best(
            "azula DPS",
            azula_samples,
            {f"zeta={z}": {"method": "dps", "zeta": z} for z in (0.1, 0.3, 1.0, 3.0, 10.0)},
        ),
    ]
    for solver in ("euler", "heun"):
        name = f"PhysicsNeMo DPS, {solver}"
        settings = {
            f"gamma={g}": {"solver": solver, "gamma": g} for g in (1e-3, 1e-2, 0.03, 0.1, 1.0)
        }
        default = {"solver": solver, "gamma": 0.0}
        rows.append(row(f"{name} (default)", "white", physicsnemo_samples, **default))
        rows.append(best(name, physicsnemo_samples, settings))
    return rows


def machine() -> str:
    """Processor, cores and versions."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in information.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small grids and few samples")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to write")
    options = parser.parse_args(arguments)
    batch = 256 if options.quick else 2048
    torch.set_flush_denormal(True)  # some guided states decay into them, which costs up to tenfold
    began = time.perf_counter()
    parts = [
        "# Guided sampling against a posterior known in closed form",
        "Gaussian prior (Matérn, smoothness 2, length scale .25 of the domain; .5 radians on the "
        "sphere), exact denoiser, point observations at random places with error variances "
        "between .01 and .1. The exact posterior is optimal interpolation. *Mean error*: RMS over "
        "points of the sample mean against the exact one, in standard deviations of the prior. "
        "*Std ratio*: sample over exact standard deviation, averaged over points. "
        "*Projections*: smallest and largest ratio of variances along 20 random directions.",
        f"## Every basis, 32 steps of `dpmpp_2m`, {batch} samples",
        "Field noise (Matérn, smoothness 1), levels and iterations by default. Bounds: mean error "
        "≤ .03, std ratio .98–1.02, projections .90–1.10. *Exactly*: the same without Monte-Carlo "
        "error, from the images of zero and unit noise (the sampler is affine in its noise).",
        "\n".join(bases_table(batch, options.quick)),
        "## Resolution, torus, 32 steps",
        'The same 60 observed places and values on every grid; `covariance="linear"`, which is '
        "the exact covariance here. The mean is the image of zero noise, and the variance along a "
        "direction is the squared norm of its image under the adjoint of the sampler (one "
        "backward pass through all steps): no Monte-Carlo error on any grid.",
        "\n".join(sweep_table(options.quick)),
        f"## Beside the peers, torus, {batch} samples",
        "One problem. Methods for white noise get the exact denoiser of the same prior for white "
        "noise and their own schedules and samplers; *best of n* is chosen in hindsight against "
        "the exact posterior (on 256 samples), at each number of steps, which favours the peers. "
        "NFE counts 1 a forward pass of the denoiser and 2 a vector-Jacobian product. CPU time is "
        "relative to ours by default at equal steps; a Gaussian denoiser is cheap, so with a "
        "network the ratio of NFE tells more. azula's DPS takes one norm over the whole batch; "
        "its strength is given per state here (multiplied by the root of the batch). ΠGDM ignores "
        "observation errors. Ours in white noise needs a larger first level than in field noise: "
        "the largest scales of the prior hold many times the variance of a white coefficient.",
        "\n".join(peers_table(batch, options.quick)),
    ]
    command = "python benchmarks/closed_form.py" + (" --quick" if options.quick else "")
    parts.append(
        f"`{command}`, {date.today():%Y-%m-%d}, {time.perf_counter() - began:.0f} s; {machine()}."
    )
    text = "\n\n".join(parts) + "\n"
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
