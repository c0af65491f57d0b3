# SPDX-License-Identifier: Apache-2.0
"""What the keys of each command may be, checked as soon as the configuration is composed.

Sections that become an object of options are checked by that object: ``trainer``, ``prior``,
``operator``, ``churn``, ``simulator`` and so on. So are times, durations and grids, which take more
than a range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import DictConfig, ListConfig, OmegaConf

from ddo_modulus.checks import FLAG, POSITIVE, Choice, Real, Rule, Whole
from ddo_modulus.diffusion.posterior_config import RULES, check_inflation
from ddo_modulus.errors import InputError


@dataclass(frozen=True)
class Text:
    """Text that is not empty: a path, or a name. A number stands for its digits."""

    def check(self, key: str, value: object) -> None:
        """See :class:`.Rule`."""
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InputError(f"{key}={value!r} must be a path or a name; put it in quotes")
        if not str(value).strip() or "\0" in str(value):
            raise InputError(f"{key}={value!r} is empty: give a path or a name")


@dataclass(frozen=True)
class Nullable:
    """None, or what another rule accepts."""

    rule: Rule

    def check(self, key: str, value: object) -> None:
        """See :class:`.Rule`."""
        if value is not None:
            self.rule.check(key, value)


@dataclass(frozen=True)
class Several:
    """A value that another rule accepts, or a list of them."""

    rule: Rule

    def check(self, key: str, value: object) -> None:
        """See :class:`.Rule`."""
        if isinstance(value, ListConfig) and not len(value):
            raise InputError(f"{key}=[] is empty: give at least one value")
        for one in value if isinstance(value, ListConfig) else [value]:
            self.rule.check(key, one)


@dataclass(frozen=True)
class ByVariable:
    """A positive number for all variables, or one for each by name."""

    def check(self, key: str, value: object) -> None:
        """See :class:`.Rule`."""
        if not isinstance(value, DictConfig):
            POSITIVE.check(key, value)
            return
        for name, one in value.items():
            POSITIVE.check(f"{key}.{name!s}", one)


@dataclass(frozen=True)
class InflationRule:
    """A factor on a covariance, ``none`` or ``adaptive``."""

    def check(self, key: str, value: object) -> None:
        """See :class:`.Rule`."""
        if value is None:
            raise InputError(f"{key}=null must be a number, 'none' or 'adaptive'")
        check_inflation(key, value)


_TEXT, _PATH, _COUNT = Text(), Nullable(Text()), Whole(1, 10_000_000)
_SEED, _MEMBERS = Whole(0, 2**63 - 1), Whole(1, 100_000)
_PRECISION = Choice(("fp32", "bf16", "fp16"))
_WRITER: dict[str, Rule] = {"out": _TEXT, "overwrite": FLAG}
_SAMPLER: dict[str, Rule] = {"package": _TEXT, "batch": _COUNT, "seed": _SEED, "device": _TEXT}

#: Rules of each command by key.
SCHEMA: Mapping[str, Mapping[str, Rule]] = {
    "simulate": {
        **_WRITER,
        "trajectories": _COUNT,
        "frames": _COUNT,
        "seed": _SEED,
        "batch": _COUNT,
        "device": _TEXT,
    },
    "prepare": {
        **_WRITER,
        "source": _TEXT,
        "compress": FLAG,
        "statistics.spectrum": Whole(),
    },
    "train": {"out": _PATH, "name": _TEXT, "overwrite": FLAG, "resume": FLAG, "half": FLAG},
    "resume": {"out": _TEXT, "overwrite": FLAG, "half": FLAG},
    "generate": {
        **_WRITER,
        **_SAMPLER,
        **{
            name: Nullable(RULES[name])
            for name in ("steps", "solver", "sigma_min", "sigma_max", "rho")
        },
        "discretization": RULES["discretization"],
        "ensemble": _MEMBERS,
        "frames": Nullable(_COUNT),
        "frozen": FLAG,
        "data.path": _PATH,
        "data.trajectory": Nullable(Whole()),
    },
    "assimilate": {
        **_WRITER,
        **_SAMPLER,
        **{
            f"posterior.{name}": Nullable(RULES[name])
            for name in ("steps", "solver", "covariance", "iterations")
        },
        "observations": _TEXT,
        "ensemble": _MEMBERS,
        "inflation": InflationRule(),
        "default_error": Nullable(ByVariable()),
        "orography": _PATH,
        "lapse_rate": Real(-0.05, 0.05),
        "gross_error": Nullable(POSITIVE),
        "duplicates": Choice(("keep", "average")),
        "thinning.km": Nullable(POSITIVE),
        "superob.km": Nullable(POSITIVE),
        "rejected": _PATH,
        "background": _PATH,
        "background_error": Nullable(ByVariable()),
        "background_length": Real(above=0, most=100_000),
        "missing": Choice(("error", "prior")),
        "precision": _PRECISION,
        "engines": _PATH,
    },
    "export": {**_WRITER, "package": _TEXT, "precision": _PRECISION, "external": FLAG},
    "verify": {
        **_WRITER,
        **dict.fromkeys(("analysis", "samples", "truth", "observations"), _PATH),
        "trajectory": Nullable(Whole()),
        "trajectories": Nullable(FLAG),
        "largest_wavenumber": Nullable(POSITIVE),
        "octaves": Nullable(Whole(1, 64)),
        "resamples": Whole(2, 1_000_000),
        "seed": _SEED,
    },
    "animate": {
        **_WRITER,
        **dict.fromkeys(("dataset", "samples", "truth", "variable"), _PATH),
        "trajectory": Whole(),
        "lowres_scale_factor": Nullable(Real()),
        "members": _COUNT,
        "spread": FLAG,
        "every": _COUNT,
        "frames": Nullable(_COUNT),
        "fps": Real(above=0, most=1000),
    },
    "benchmark": {
        "package": _TEXT,
        "precision": Several(_PRECISION),
        "ensemble": Several(_MEMBERS),
        "analyses": Several(_MEMBERS),
        "steps": Nullable(Several(RULES["steps"])),
        "observations": _COUNT,
        "error": Real(above=0, most=1e6),
        "repeats": _COUNT,
        "engines": _PATH,
        "seed": _SEED,
        "out": _PATH,
        "device": _TEXT,
        "overwrite": FLAG,
    },
}


def check_keys(command: str, config: DictConfig) -> None:
    """Check the keys of a command; paths that look like numbers become text.

    Raises:
        InputError: If a value is not accepted.
    """
    for key, rule in SCHEMA[command].items():
        value = OmegaConf.select(config, key)
        rule.check(key, value)
        if rule in (_TEXT, _PATH) and isinstance(value, int):
            OmegaConf.update(config, key, str(value))
