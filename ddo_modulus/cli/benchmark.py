# SPDX-License-Identifier: Apache-2.0
"""``ddo benchmark``: time and memory of posterior ensembles on this machine, by engine."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import Tensor

from ddo_modulus import __version__
from ddo_modulus.cli.options import flag, integer, number, pick_device
from ddo_modulus.console import notify, show
from ddo_modulus.data.output import FILE, check_output, replacing
from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.prior import Prior, Recorder
from ddo_modulus.engines import ENGINES, EngineOptions, open_engine, pick_precision
from ddo_modulus.engines.options import Precision
from ddo_modulus.engines.speed import Cost, Twin, difference, evaluations, measure
from ddo_modulus.errors import InputError


@dataclass(frozen=True)
class Measurement:
    """A row of the table.

    Attributes:
        engine: Name of the engine.
        precision: Precision of its network.
        analyses: Number of analyses computed together.
        ensemble: Members of each analysis.
        steps: Noise levels.
        evaluations: Evaluations of the network for each member (NFE).
        seconds: Latency: median time of a run.
        members_per_second: Throughput.
        member_milliseconds: Inverse of the throughput.
        first_seconds: Time of the first run, which includes compilation and the like.
        memory_gib: Peak of the GPU's memory.
        mean_difference: Relative difference of the ensemble means from those of engine=torch.
        spread_difference: Relative difference of the spreads, likewise.
        failure: Why there is no measurement, or which feature could not be used.
    """

    engine: str
    precision: str
    analyses: int
    ensemble: int
    steps: int
    evaluations: int
    seconds: float | None = None
    members_per_second: float | None = None
    member_milliseconds: float | None = None
    first_seconds: float | None = None
    memory_gib: float | None = None
    mean_difference: float | None = None
    spread_difference: float | None = None
    failure: str | None = None


def run(config: DictConfig) -> None:
    """Measure the engines and show a table; the keys are those of ``conf/benchmark.yaml``.

    Raises:
        InputError: If an argument or the package cannot be used, or the table exists.
    """
    overwrite = flag(config, "overwrite")
    out = None if config.out is None else check_output(config.out, overwrite=overwrite, kind=FILE)
    if out is not None and out.suffix not in (".md", ".json"):
        raise InputError(f"out={out} must end in .md or .json")
    chosen = list(ENGINES) if config.engine is None else [str(e) for e in _several(config.engine)]
    for name in chosen:
        if name not in ENGINES:
            raise InputError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    precisions = [pick_precision(name) for name in _several(config.precision)]
    sizes = [_numbers(config, key) for key in ("analyses", "ensemble")]
    package = Package.load(config.package, pick_device(config.device))
    steps = [package.posterior.steps] if config.steps is None else _numbers(config, "steps")
    rows: list[Measurement] = []
    for analyses, ensemble, levels in itertools.product(*sizes, steps):
        twin = _twin(package, config, analyses)
        case = _Case(package, twin, replace(package.posterior, steps=levels), ensemble)
        rows += _compare(case, config, chosen, precisions)
    show(table(rows, str(config.package)))
    for row in rows:
        if row.failure is not None:
            print(f"{row.engine}, {row.precision}: {row.failure}")
    if out is not None:
        with replacing(out, overwrite=overwrite, kind=FILE) as temporary:
            temporary.write_text(_document(rows, str(config.package), out.suffix))
        print(out)


@dataclass(frozen=True)
class _Case:
    """What is measured: a twin experiment with a package, and how its posterior is sampled."""

    package: Package
    twin: Twin
    posterior: PosteriorConfig
    ensemble: int


def _compare(
    case: _Case,
    config: DictConfig,
    chosen: Sequence[str],
    precisions: Sequence[Precision],
) -> Iterator[Measurement]:
    """Rows of one case. Every engine is compared with engine=torch, which is always run."""
    device, noise = case.package.operator.device, case.package.operator.noise
    reference: Tensor | None = None
    for name, precision in [("torch", "fp32"), *itertools.product(chosen, precisions)]:
        if name == "torch" and reference is not None:
            continue  # it has one precision
        row = Measurement(
            name,
            precision,
            len(case.twin.truth),
            case.ensemble,
            case.posterior.steps,
            evaluations(case.posterior, case.posterior.scheduler(noise)),
        )
        notify(f"benchmark {name} {precision}, {row.analyses} x {row.ensemble}, {row.steps} steps")
        try:
            cost, note = _measure(case, config, name, pick_precision(precision))
        # An engine that is not installed or runs out of memory gets a row that says so.
        except (InputError, ImportError, RuntimeError, NotImplementedError) as error:
            if name == "torch":
                raise
            yield replace(row, failure=" ".join(str(error).split())[:300])
            continue
        if reference is None:
            reference = cost.result
        mean, spread = difference(cost.result, reference)
        members = row.analyses * row.ensemble
        if name == "torch" and "torch" not in chosen:
            continue
        yield replace(
            row,
            seconds=cost.seconds,
            members_per_second=members / cost.seconds,
            member_milliseconds=1e3 * cost.seconds / members,
            first_seconds=cost.first,
            memory_gib=cost.memory,
            mean_difference=mean,
            spread_difference=spread,
            failure=note,
        )
        del cost
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    case: _Case, config: DictConfig, name: str, precision: Precision
) -> tuple[Cost, str | None]:
    """Cost of one engine, and which feature it could not use."""
    folder = None if config.engines is None else Path(config.engines)
    members = len(case.twin.truth) * case.ensemble
    options = EngineOptions(folder, precision, batch=members, report=notify)
    engine = open_engine(name, case.package, options)
    posterior: Prior = case.twin.posterior(engine, case.posterior)
    if isinstance(engine, Recorder):
        posterior = engine.captured(posterior)
    operator, seed = case.package.operator, integer(config, "seed", 0)

    def draw() -> Tensor:
        return case.twin.ensemble(
            posterior, case.posterior, operator.noise, case.ensemble, seed + 1
        )

    cost = measure(draw, operator.device, repeats=integer(config, "repeats"))
    failure = getattr(posterior, "failure", None)
    return cost, None if failure is None else f"no CUDA graph: {failure}"


def _twin(package: Package, config: DictConfig, analyses: int) -> Twin:
    """A twin experiment whose truths are six hours apart."""
    device = package.operator.device
    times = np.datetime64("2000-01-01", "ns") + np.arange(analyses) * np.timedelta64(6, "h")
    condition = package.conditions(times)
    return Twin.simulate(
        package.operator,
        package.scheduler(),
        analyses,
        integer(config, "observations"),
        error=number(config, "error"),
        seed=integer(config, "seed", 0),
        condition=None if condition is None else condition.to(device),
        device=device,
    )


def table(rows: Sequence[Measurement], package: str) -> Table:
    """Measurements as a table for the terminal."""
    found = Table(title=f"posterior ensembles of {package}", caption=_machine())
    for i, name in enumerate(_COLUMNS):
        found.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        found.add_row(*_cells(row))
    return found


_COLUMNS = (
    "engine",
    "precision",
    "analyses x members",
    "steps",
    "NFE",
    "latency, s",
    "ms a member",
    "members/s",
    "first, s",
    "GiB",
    "mean",
    "spread",
)


def _cells(row: Measurement) -> list[str]:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        row.engine,
        row.precision,
        f"{row.analyses} x {row.ensemble}",
        str(row.steps),
        str(row.evaluations),
        cell(row.seconds, ".3f"),
        cell(row.member_milliseconds, ".3f"),
        cell(row.members_per_second, ".1f"),
        cell(row.first_seconds, ".1f"),
        cell(row.memory_gib, ".2f"),
        cell(row.mean_difference, ".2%"),
        cell(row.spread_difference, "+.2%"),
    ]


def _document(rows: Sequence[Measurement], package: str, suffix: str) -> str:
    """Measurements as Markdown or JSON, by the suffix."""
    if suffix == ".json":
        content = {"package": package, "machine": _machine(), "rows": [asdict(r) for r in rows]}
        return json.dumps(content, indent=2) + "\n"
    lines = [
        f"# Posterior ensembles of {package}",
        "",
        f"{_machine()}. NFE: evaluations of the network for a member, 1 a forward pass, 2 a "
        "vector-Jacobian product. *mean*, *spread*: relative differences of the ensemble from "
        "engine=torch in fp32.",
        "",
        "| " + " | ".join([*_COLUMNS, ""]) + " |",
        "|" + "---|" * (len(_COLUMNS) + 1),
        *("| " + " | ".join([*_cells(row), row.failure or ""]) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def _machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{gpu}, torch {torch.__version__}, ddo_modulus {__version__}"


def _several(value: object) -> list[object]:
    return list(value) if OmegaConf.is_list(value) else [value]  # type: ignore[call-overload]


def _numbers(config: DictConfig, key: str) -> list[int]:
    """One or several whole numbers of a configuration, each at least one.

    Raises:
        InputError: If there is none, or a value is not a whole number from one up.
    """
    found = _several(config[key])
    bad = [n for n in found if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if bad or not found:
        raise InputError(f"{key}={config[key]} must be a whole number, at least 1, or a list")
    return [int(n) for n in found]  # type: ignore[call-overload]
