# SPDX-License-Identifier: Apache-2.0
"""Options of sampling: one object for packages, commands and Earth2Studio components."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ddo_modulus.checks import Choice, Real, Rule, Whole, check_options
from ddo_modulus.diffusion.noise import DISCRETIZATIONS, FieldNoiseScheduler, level_range
from ddo_modulus.diffusion.samplers import SOLVERS, Churn
from ddo_modulus.errors import InputError

if TYPE_CHECKING:
    from ddo_modulus.fields.gaussian_field import GaussianField

Inflation = Literal["none", "adaptive"] | float

#: What single options may be. The limits are far beyond any use: a value outside is a mistake.
RULES: dict[str, Rule] = {
    "steps": Whole(1, 100_000),
    "sigma_min": Real(above=0, most=1e6),
    "sigma_max": Real(above=0, most=1e6),
    "rho": Real(above=0, most=1e4),
    "discretization": Choice(tuple(DISCRETIZATIONS)),
    "solver": Choice(tuple(SOLVERS)),
    "covariance": Choice(("jacobian", "linear")),
    "iterations": Whole(1, 1000),
    "batch": Whole(1, 10_000_000),
}

#: Factors on a prior covariance beyond these are mistakes.
INFLATIONS = Real(0.01, 100.0)

# Default of an option: use the value of the package.
_PACKAGE: Any = None


class Configured(Protocol):
    """What has options of its own: a package."""

    posterior: PosteriorConfig


@dataclass(frozen=True)
class PosteriorConfig:
    """Options of sampling and guidance. None means the value of the package (:meth:`resolve`).

    Attributes:
        steps: Number of noise levels.
        sigma_min: Smallest noise level above zero.
        sigma_max: Largest noise level.
        rho: Exponent of the schedule.
        discretization: Spacing of the levels, one of
            :data:`~ddo_modulus.diffusion.noise.DISCRETIZATIONS`.
        solver: One of :data:`~ddo_modulus.diffusion.samplers.SOLVERS`.
        churn: Noise added before each step; only for single-step solvers.
        covariance: ``"jacobian"`` or ``"linear"``; see :class:`.MomentMatching`.
        iterations: GMRES iterations, one derivative each.
        guidance_interval: Smallest and largest noise level at which the derivative is taken;
            ``(0, inf)`` for all levels. JSON has no infinity; there the largest is None.
        inflation: Factor on the prior covariance: a number, ``"none"``, or ``"adaptive"`` for the
            most probable factor of each analysis, given its innovations.
        batch: Number of states computed together; it bounds the memory.

    Raises:
        InputError: If an option is out of range.
    """

    steps: int = _PACKAGE
    sigma_min: float = _PACKAGE
    sigma_max: float = _PACKAGE
    rho: float = _PACKAGE
    discretization: str = _PACKAGE
    solver: str = _PACKAGE
    churn: Churn | None = None
    covariance: Literal["jacobian", "linear"] = _PACKAGE
    iterations: int = _PACKAGE
    guidance_interval: tuple[float, float] = _PACKAGE
    inflation: Inflation = _PACKAGE
    batch: int = _PACKAGE

    def __post_init__(self) -> None:
        check_options(RULES, self)
        if None not in (self.sigma_min, self.sigma_max) and self.sigma_min >= self.sigma_max:
            raise InputError(
                f"sigma_min={self.sigma_min!r} must be below sigma_max={self.sigma_max!r}"
            )
        interval: Any = self.guidance_interval
        if isinstance(interval, list | tuple) and len(interval) == 2 and interval[1] is None:
            interval = (interval[0], math.inf)
        found = level_range(interval, "guidance_interval")
        object.__setattr__(self, "guidance_interval", found)
        check_inflation("inflation", self.inflation)

    @classmethod
    def of(cls, options: PosteriorConfig | Mapping[str, Any] | None) -> PosteriorConfig:
        """The options from such an object, a mapping (JSON, YAML), or None for no option set.

        Raises:
            InputError: If an option is unknown, or a value is out of range.
        """
        if isinstance(options, PosteriorConfig):
            return options
        chosen = checked_names(cls, options, "posterior")
        if isinstance(chosen.get("churn"), Mapping):
            churn = checked_names(Churn, chosen["churn"], "churn")
            if "amount" not in churn:
                raise InputError("churn needs an amount, as in churn={'amount': 20}")
            chosen["churn"] = Churn(**{k: v for k, v in churn.items() if v is not None})
        return cls(**chosen)

    def resolve(self, package: Configured) -> PosteriorConfig:
        """These options, with the package's values in place of None."""
        return self.over(package.posterior)

    def over(self, other: PosteriorConfig) -> PosteriorConfig:
        """These options, with another object's values in place of None."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(other, **{name: value for name, value in own.items() if value is not None})

    def scheduler(self, noise: GaussianField) -> FieldNoiseScheduler:
        """Noise schedule of resolved options.

        Args:
            noise: Noise field at level one.
        """
        return FieldNoiseScheduler(
            noise, self.sigma_min, self.sigma_max, self.rho, discretization=self.discretization
        )

    def to_json(self) -> dict[str, Any]:
        """The options that are set, for JSON, which has neither infinity nor tuples."""
        chosen = {name: value for name, value in asdict(self).items() if value is not None}
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            chosen["guidance_interval"] = [low, high if math.isfinite(high) else None]
        if self.churn is not None and math.isinf(self.churn.high):
            chosen["churn"]["high"] = None
        return chosen


def checked_names(kind: type, options: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """A mapping of options as keyword arguments of a dataclass.

    Raises:
        InputError: If it is not a mapping, or an option is unknown.
    """
    if options is None:
        return {}
    names = [f.name for f in fields(kind)]
    if not isinstance(options, Mapping):
        raise InputError(f"{what}={options!r} must be options by name: {', '.join(names)}")
    if unknown := [str(name) for name in options if name not in names]:
        raise InputError(
            f"{what} has no option {', '.join(unknown)}; choose from {', '.join(names)}"
        )
    return {str(name): value for name, value in options.items()}


def check_inflation(key: str, value: object) -> None:
    """Refuse what is neither None, "none", "adaptive" nor a factor within :data:`INFLATIONS`.

    Raises:
        InputError: If the value is not accepted.
    """
    if value is None or value in ("none", "adaptive"):
        return
    try:
        INFLATIONS.check(key, value)
    except InputError as error:
        raise InputError(f"{error}, 'none' or 'adaptive'") from None


#: Values of a package for options that were not set when it was made.
DEFAULTS = PosteriorConfig(
    steps=32,
    sigma_min=0.002,
    sigma_max=80.0,
    rho=20.0,
    discretization="edm",
    solver="dpmpp_2m",
    covariance="jacobian",
    iterations=2,
    guidance_interval=(0.0, math.inf),
    inflation="adaptive",
    batch=256,
)
