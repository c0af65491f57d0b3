# SPDX-License-Identifier: Apache-2.0
r"""Posterior ensembles: eager, compiled, in fused kernels; beside azula's MMPS driving a U-NO.

    python benchmarks/guided_sampling.py --out benchmarks/results/guided_sampling.md

Three operators: two shipped packages, and an untrained one on 256 x 512 points, whose channels grow
as its grids shrink, with small random weights where untrained ones are zero, sampled as
`kolmogorov64` is. Ours take the derivative as the package says; *at all levels*, with two
iterations; and *from .4 to 10*, at fewer levels than the package says. Truths are draws from the
prior, observed at random grid points with an error of .1 standard deviations; scores are at the
unobserved points. All rows of a case have the same observations, members and steps, and ours have
the same noise. azula has white noise, an untrained U-NO (nothing of it counts but its cost), its
own schedule, one GMRES iteration (its default); it runs in fp32, since the transforms of U-NO do
not take bf16.

Idle is the share of the time between the first and the last kernel in which the GPU does nothing,
from a trace of a shorter run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import command, machine, publish
from torch import Tensor, nn

from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import DEFAULTS, PosteriorConfig
from ddo_modulus.engines.compiled import CompiledEngine
from ddo_modulus.engines.options import Precision
from ddo_modulus.engines.speed import Twin, difference, evaluations, idle_share, measure
from ddo_modulus.fields.gaussian_field import GaussianField, Matern
from ddo_modulus.observations import LinearOperator
from ddo_modulus.verification import score

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        name: A shipped package, or ``"HxW"`` of an untrained operator on a torus.
        analyses: Number ``T`` of analyses batched together.
        observations: Of each.
        modes: Of the U-NO, along each axis.
        channels: Of the U-NO that has the channels of our finest level.
    """

    name: str
    analyses: int
    observations: int
    modes: int
    channels: int

    @property
    def trained(self) -> bool:
        """Whether scores mean something."""
        return not self.name[0].isdigit()

    @property
    def members(self) -> int:
        """Size of each ensemble; small without a GPU."""
        return 32 if DEVICE.type == "cuda" else 4

    @property
    def steps(self) -> int:
        """Noise levels; few without a GPU."""
        return 32 if DEVICE.type == "cuda" else 3


CASES = [
    Case("kolmogorov64", 16, 123, 24, 64),
    Case("kolmogorov64", 1, 123, 24, 64),
    Case("uk_t2m", 64, 100, 16, 16),
    Case("uk_t2m", 1, 100, 16, 16),
    Case("256x512", 1, 400, 32, 32),
]
DERIVATIVES: dict[str, dict[str, Any]] = {
    "2 iterations at all levels": {"iterations": 2, "guidance_interval": (0.0, math.inf)},
    "derivative from .4 to 10": {"guidance_interval": (0.4, 10.0)},
}
SMALL = [Case("uk_t2m", 2, 20, 8, 8), Case("8x12", 2, 10, 4, 8)]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        case: Operator and analyses.
        method: Sampler, precision and how it is run.
        parameters: Of the network.
        evaluations: NFE of a member.
        member: Milliseconds of a member.
        speedup: Times faster than ours, eager.
        first: Seconds of the first run.
        idle: Share of the time that the GPU does nothing.
        memory: Peak, GiB.
        rmse: Of the ensemble mean.
        spread: Over RMSE.
        crps: Of the ensemble.
        mean_change: Relative difference of the ensemble mean from ours, eager in fp32.
        spread_change: The same of the spread.
        note: Anything else.
    """

    case: str
    method: str
    parameters: int
    evaluations: int
    member: float = math.nan
    speedup: float = math.nan
    first: float = math.nan
    idle: float = math.nan
    memory: float = math.nan
    rmse: float = math.nan
    spread: float = math.nan
    crps: float = math.nan
    mean_change: float = math.nan
    spread_change: float = math.nan
    note: str = ""


def untrained(shape: tuple[int, int]) -> DiffusionOperator:
    """An operator on a torus with a Matérn prior, and a network that does something."""
    large = min(shape) >= 64
    network = {"widths": [32, 64, 128, 128], "depths": [1, 1, 2, 2], "modes": 4 * [33]}
    if not large:
        network = {"widths": [8], "depths": [1], "modes": [5]}
    operator = DiffusionOperator(
        list(shape),
        1,
        "torus",
        (1.0, shape[1] / shape[0]),
        noise={"length_scale": 0.02, "smoothness": 0.5},
        network=network,
    )
    operator.set_prior(GaussianField(operator.basis, Matern(0.2, 1.5)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in operator.network.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return operator.eval().requires_grad_(False)


def load(case: Case) -> tuple[DiffusionOperator, PosteriorConfig, Tensor | None]:
    """Operator, how it is sampled, and the condition of each analysis."""
    if not case.trained:
        height, width = (int(n) for n in case.name.split("x"))
        operator = untrained((height, width)).to(DEVICE)
        own = Package.load("kolmogorov64").posterior
        levels = {name: getattr(DEFAULTS, name) for name in ("sigma_min", "sigma_max", "rho")}
        return operator, replace(own, steps=case.steps, **levels), None
    package = Package.load(case.name, DEVICE)
    hours = np.datetime64("2019-03-27T00", "ns") + np.arange(case.analyses) * np.timedelta64(6, "h")
    condition = package.conditions(hours)
    condition = None if condition is None else condition.to(DEVICE)
    return package.operator, replace(package.posterior, steps=case.steps), condition


def derivative() -> str:
    """Where ours take it."""
    own = Package.load("kolmogorov64").posterior
    low, high = own.guidance_interval
    return (
        "Unless stated otherwise, `kolmogorov64`, and the untrained operator like it, take the "
        f"derivative in {own.iterations} iteration at noise levels from {low:g} to {high:g}; "
        "`uk_t2m` takes none."
    )


class UNO(nn.Module):
    """neuraloperator's U-NO as azula's backbone; it takes no noise level."""

    def __init__(self, channels: int, hidden: int, modes: int, *, compiled: bool = False) -> None:
        super().__init__()
        from neuralop.models import UNO

        with contextlib.redirect_stdout(io.StringIO()):  # it prints its options
            self.net = UNO(
                channels,
                channels,
                hidden,
                n_layers=5,
                uno_out_channels=[hidden] * 5,
                uno_n_modes=[[modes, modes]] * 5,
                uno_scalings=[[1, 1], [0.5, 0.5], [1, 1], [1, 1], [2, 2]],
                channel_mlp_skip="linear",  # its default fails where the width changes
            )
        if compiled:
            self.net.compile()

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """Fields of the same shape."""
        return self.net(x)


def numbers(network: nn.Module) -> int:
    """Real numbers in the weights."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in network.parameters())


def equal_width(channels: int, modes: int, target: int) -> int:
    """Hidden channels of the U-NO that holds about as many numbers as ours."""
    sizes = {h: numbers(UNO(channels, h, modes)) for h in (4, 8, 12, 16, 20, 24, 28, 32)}
    return min(sizes, key=lambda h: abs(math.log(sizes[h] / target)))


def azula(
    backbone: nn.Module, twin: Twin, members: int, steps: int, iterations: int = 1
) -> Callable[[], Tensor]:
    """MMPS of azula with its default solver, ready to be run."""
    from azula.denoise import KarrasDenoiser
    from azula.guidance.mmps import MMPSDenoiser
    from azula.linalg.covariance import DiagonalCovariance
    from azula.noise import VPSchedule
    from azula.sample import DDIMSampler

    operator = twin.observations.operator
    assert isinstance(operator, LinearOperator)
    assert isinstance(twin.observations.variance, Tensor)
    index = operator.index[..., 0].repeat_interleave(members, 0)
    y = twin.observations.values.repeat_interleave(members, 0)
    denoiser = KarrasDenoiser(backbone, VPSchedule()).to(DEVICE).requires_grad_(False)
    posterior = MMPSDenoiser(
        denoiser,
        y,
        lambda x: x.flatten(1).gather(1, index),
        DiagonalCovariance(twin.observations.variance.expand_as(twin.observations.values)[0]),
        iterations=iterations,
    )
    sampler = DDIMSampler(posterior, steps=steps, silent=True)
    shape = (len(y), *twin.truth.shape[1:])
    # Compiled code would write over what it kept for a second way back.
    patch = torch._functorch.config.patch(donated_buffer=False)

    def run() -> Tensor:
        with patch:
            return sampler(sampler.init(shape, device=DEVICE))

    return run


@dataclass(frozen=True)
class Variant:
    """How our operator is run."""

    precision: Precision
    compiled: bool | str
    graphs: bool
    fused: bool = False
    derivative: str = ""  # as the package says, or otherwise
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For the table."""
        how = ["compiled" if self.compiled else "eager"]
        if self.fused:
            how = ["fused"]
        elif isinstance(self.compiled, str):
            how[0] += f" ({self.compiled})"
        how += ["CUDA graph"] if self.graphs else []
        derivative = [self.derivative] if self.derivative else []
        return ", ".join(["ours", *how, self.precision, *derivative])

    def of(self, config: PosteriorConfig) -> PosteriorConfig:
        """How the posterior is sampled."""
        return replace(config, **self.other)


def variants(config: PosteriorConfig, *, compiled: bool | str, thorough: bool) -> list[Variant]:
    """Those of a case, eager first; what takes long to compile only if asked for."""
    cuda = DEVICE.type == "cuda"
    found = [Variant("fp32", False, False)]
    if compiled and thorough:
        found.append(Variant("fp32", compiled, False))
    found.append(Variant("bf16", compiled, cuda))
    if cuda:
        found.append(Variant("bf16", compiled, True, fused=True))
    if config.covariance == "jacobian":
        for derivative, other in DERIVATIVES.items():
            found.append(replace(found[-1], derivative=derivative, other=other))
    return found


def ours(case: Case, repeats: int, *, compiled: bool | str, thorough: bool) -> Iterator[Row]:
    """Rows of one case: ours, eager first, and the peer's."""
    operator, config, condition = load(case)
    scheduler = config.scheduler(operator.noise)
    twin = Twin.simulate(
        operator, scheduler, case.analyses, case.observations, condition=condition, device=DEVICE
    )
    label = f"{case.name}, {case.analyses} x {case.members}"
    blank = Row(label, "", numbers(operator.network), evaluations(config, scheduler))
    reference: Tensor | None = None
    eager = math.nan
    for variant in variants(config, compiled=compiled, thorough=thorough):
        own = variant.of(config)
        row = replace(blank, method=variant.name, evaluations=evaluations(own, scheduler))
        try:
            row, ensemble, seconds = measured(
                row, variant, operator, own, twin, case.members, repeats
            )
        except Exception as error:  # noqa: BLE001 - the other rows are still worth having
            traceback.print_exc()
            yield replace(row, note=_first_line(error))
            _free()
            continue
        if reference is None:
            reference, eager = ensemble, seconds
        shift, spread = difference(ensemble, reference)
        row = replace(row, speedup=eager / seconds, mean_change=shift, spread_change=spread)
        if case.trained:
            s = score(
                ensemble.transpose(0, 1).cpu(),
                twin.truth.cpu(),
                label=variant.name,
                units="std",
                mask=twin.unobserved.cpu(),
            )
            row = replace(row, rmse=s.rmse, spread=s.ratio, crps=s.crps)
        yield row
        del ensemble
        _free()
    yield from peers(case, twin, label, blank.parameters, eager, repeats, thorough)


def measured(
    row: Row,
    variant: Variant,
    operator: DiffusionOperator,
    config: PosteriorConfig,
    twin: Twin,
    members: int,
    repeats: int,
) -> tuple[Row, Tensor, float]:
    """Cost of one variant: the row, the ensemble and the seconds of a run."""
    torch._dynamo.reset()
    engine = CompiledEngine(
        operator,
        precision=variant.precision,
        compile=variant.compiled,
        fused=variant.fused,
        graphs=variant.graphs,
    )

    def draw(steps: int) -> Callable[[], Tensor]:
        posterior = engine.captured(twin.posterior(engine, config))
        own = replace(config, steps=steps)
        return partial(twin.ensemble, posterior, own, operator.noise, members)

    whole = draw(config.steps)
    cost = measure(whole, DEVICE, repeats=repeats, warm_up=None if variant.graphs else draw(2))
    row = replace(
        row,
        member=1e3 * cost.seconds / (len(twin.truth) * members),
        first=cost.first,
        memory=math.nan if cost.memory is None else cost.memory,
        note=_failure(whole.args[0]),  # type: ignore[attr-defined]
    )
    del whole
    if DEVICE.type == "cuda":
        short = draw(6)
        short()
        row = replace(row, idle=idle_share(short))
    return row, cost.result, cost.seconds


def peers(
    case: Case,
    twin: Twin,
    label: str,
    size: int,
    eager: float,
    repeats: int,
    thorough: bool,
) -> Iterator[Row]:
    """MMPS of azula with a U-NO of as many parameters, and with one of as many channels."""
    channels = twin.truth.shape[1]
    missing = [name for name, module in _PEERS.items() if find_spec(module) is None]
    if missing:
        yield Row(label, "azula MMPS, U-NO", 0, 0, note=f"not installed: {', '.join(missing)}")
        return
    alone = case.analyses == 1 or DEVICE.type == "cpu"
    kinds = [("parameters", equal_width(channels, case.modes, size), False)]
    if thorough or alone:
        kinds.append(("channels", case.channels, False))
    if DEVICE.type == "cuda" and thorough:
        kinds.append((*kinds[0][:2], True))
    for equal, hidden, compiled in kinds:
        torch._dynamo.reset()
        backbone = UNO(channels, hidden, case.modes, compiled=compiled)
        how = "compiled" if compiled else "eager"
        row = Row(
            label,
            f"azula MMPS, U-NO of equal {equal}, {how}, fp32",
            numbers(backbone),
            5 * case.steps,
        )
        try:
            cost = measure(
                azula(backbone, twin, case.members, case.steps),
                DEVICE,
                repeats=repeats,
                warm_up=azula(backbone, twin, case.members, 1),
            )
            row = replace(
                row,
                member=1e3 * cost.seconds / (len(twin.truth) * case.members),
                speedup=eager / cost.seconds,
                first=cost.first,
                memory=math.nan if cost.memory is None else cost.memory,
            )
            if DEVICE.type == "cuda" and not compiled:
                short = azula(backbone, twin, case.members, 4)
                row = replace(row, idle=idle_share(short))
        except Exception as error:  # noqa: BLE001 - whatever a peer fails with belongs in the table
            row = replace(row, note=_first_line(error))
        yield row
        del backbone
        _free()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:80]


def _failure(posterior: object) -> str:
    """Why a posterior could not be recorded, if so."""
    failure = getattr(posterior, "failure", None)
    return f"no graph: {failure}" if failure else ""


def _free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


_PEERS = {"azula": "azula", "neuraloperator": "neuralop"}

HEADER = [
    "| operator, analyses x members | sampler | parameters, M | NFE | ms a member "
    "| times faster than ours eager | first run, s | GPU idle | GiB | RMSE | spread/RMSE | CRPS "
    "| mean | spread | |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def summary(rows: list[Row]) -> list[str]:
    """What the targets are about: our quickest row of a case over the others."""
    lines = [
        "| operator | our quickest, ms a member | NFE | over | times slower |",
        "|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row.case for row in rows):
        timed = [r for r in rows if r.case == case and not math.isnan(r.member)]
        mine = [r for r in timed if r.method.startswith("ours")]
        if not mine:
            continue
        best = min(mine, key=lambda r: r.member)
        lines += [
            f"| {case} | {best.member:.3f} | {best.evaluations} | {r.method} "
            f"| {r.member / best.member:.1f} |"
            for r in timed
            if r is not best
        ]
    return lines


def line(row: Row) -> str:
    """Markdown of a row."""

    def cell(value: float, form: str) -> str:
        return "" if math.isnan(value) else format(value, form)

    cells = [
        row.case,
        row.method,
        f"{row.parameters / 1e6:.3f}",
        str(row.evaluations),
        cell(row.member, ".3f"),
        cell(row.speedup, ".2f"),
        cell(row.first, ".1f"),
        cell(row.idle, ".1%"),
        cell(row.memory, ".1f"),
        cell(row.rmse, ".4f"),
        cell(row.spread, ".3f"),
        cell(row.crps, ".4f"),
        cell(row.mean_change, ".2%"),
        cell(row.spread_change, "+.2%"),
        row.note,
    ]
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Measure and print, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", help="operators to measure; all if left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--thorough", action="store_true", help="more compiled variants; minutes")
    parser.add_argument("--mode", help="of torch.compile, for ours; max-autotune takes minutes")
    parser.add_argument("--no-compile", action="store_true", help="graphs of uncompiled networks")
    parser.add_argument("--out", type=Path, help="Markdown; the numbers go beside it as JSON")
    parser.add_argument("--join", type=Path, nargs="+", help="tables (JSON) to put together only")
    options = parser.parse_args(arguments)
    if options.join:
        parts = [json.loads(path.read_text()) for path in options.join]
    else:
        compiled: bool | str = DEVICE.type == "cuda" and not options.no_compile
        if compiled and options.mode:
            compiled = options.mode
        rows = []
        print("\n".join(HEADER))
        for case in CASES if DEVICE.type == "cuda" else SMALL:
            if options.only and case.name not in options.only:
                continue
            for row in ours(case, options.repeats, compiled=compiled, thorough=options.thorough):
                rows.append(row)
                print(line(row), flush=True)
        present = [name for name, module in _PEERS.items() if find_spec(module)]
        steps = "32 steps" if DEVICE.type == "cuda" else "3 steps, small"
        how = f"{machine(*present)}. {command(__file__, arguments)}, {steps}."
        plain = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(r).items()}
            for r in rows
        ]
        parts = [{"how": how, "rows": plain}]
    rows = [
        Row(**{k: math.nan if v is None else v for k, v in row.items()})
        for part in parts
        for row in part["rows"]
    ]
    publish(
        [
            "# Guided sampling: seconds of a posterior member",
            "",
            *(text for part in parts for text in (part["how"], "")),
            "Truths are drawn from the prior. NFE: 1 a forward pass, 2 a vector-Jacobian product. "
            f"{derivative()} *mean*, *spread*: relative difference of the ensemble's from ours, "
            "eager in fp32.",
            "",
            *HEADER,
            *(line(row) for row in rows),
            "",
            *summary(rows),
        ],
        options.out,
    )
    if options.out is not None and not options.join:
        options.out.with_suffix(".json").write_text(json.dumps(parts[0], indent=1) + "\n")


if __name__ == "__main__":
    main()
