# SPDX-License-Identifier: Apache-2.0
"""What is trained, on what data and how: the configuration of ``ddo train``, checked.

Each class is a section of the configuration, with the same keys. Values are checked when an object
is made, before any data are opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from ddo_modulus.checks import (
    FLAG,
    NOT_NEGATIVE,
    POSITIVE,
    Choice,
    Date,
    Rule,
    Whole,
    check_options,
)
from ddo_modulus.data.loader import BatchOptions, Symmetry
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.diffusion.task import CoarseWindow, Task
from ddo_modulus.errors import InputError
from ddo_modulus.fields.covariance import HybridCovariance
from ddo_modulus.training.config import TrainerConfig

LOADERS = ("auto", "memory", "dali", "torch")
PRIORS = ("spectrum", "coupled", "hybrid")

#: Keys of the section ``data`` that say how the data are read, not what they are.
READING = ("path", "loader", "memory", "workers", "prefetch")

T = TypeVar("T")


@dataclass(frozen=True)
class ValidationConfig:
    """Samples that are held back from training.

    Attributes:
        start: Time of the first one; None holds back no span of time.
        end: Time of the last one; None for all from ``start`` on.
        trajectories: Number of trajectories, the last ones of the data.
        samples: Largest number of them to validate on; None for all.

    Raises:
        InputError: On a value that is none of these.
    """

    start: str | None = None
    end: str | None = None
    trajectories: int = 0
    samples: int | None = 1024

    def __post_init__(self) -> None:
        rules: dict[str, Rule] = {
            "start": Date(),
            "end": Date(),
            "trajectories": Whole(),
            "samples": Whole(1),
        }
        check_options(rules, self, "data.validation.")


@dataclass(frozen=True)
class DataConfig:
    """Which samples to train on, and how they are read.

    Attributes:
        path: GRIB or netCDF file, or zarr store.
        variables: Ids of the channels, in order; None for all.
        frames: States next to each other in time that are drawn together.
        start: Time of the first sample; None for the first of the data.
        end: Time of the last sample; None for the last of the data.
        region: ``[south, north, west, east]`` to keep of the grid, in degrees (in a box, in its
            own units); None for all.
        crop: Rows and columns of a part that is cut out of each sample at a random place.
        validation: Samples held back from training.
        loader: One of :data:`LOADERS`.
        memory: GiB that samples may take for ``loader="auto"`` to hold them in memory.
        workers: Processes that read, on each rank.
        prefetch: Batches to read ahead.

    Raises:
        InputError: On a value that is none of these, or a loader that is not installed.
    """

    path: str | Path
    variables: Sequence[str] | None = None
    frames: int = 1
    start: str | None = None
    end: str | None = None
    region: Sequence[float] | None = None
    crop: Sequence[int] | None = None
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    loader: str = "auto"
    memory: float = 4.0
    workers: int = 4
    prefetch: int = 2

    def __post_init__(self) -> None:
        rules: dict[str, Rule] = {
            "frames": Whole(1),
            "start": Date(),
            "end": Date(),
            "memory": NOT_NEGATIVE,
            "workers": Whole(),
            "prefetch": Whole(1),
            "loader": Choice(LOADERS),
        }
        check_options(rules, self, "data.")
        if self.loader == "dali" and not _has_dali():
            raise InputError(
                "data.loader=dali needs NVIDIA DALI: pip install ddo-modulus[dali], or choose torch"
            )
        if self.region is not None and not _numbers(self.region, 4):
            raise InputError(f"data.region={self.region}: expected [south, north, west, east]")
        if self.crop is not None and not _numbers(self.crop, 2):
            raise InputError(f"data.crop={self.crop}: expected [rows, columns]")

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> DataConfig:
        """From the section ``data`` of a configuration."""
        validation = _build(ValidationConfig, "data.validation", section.get("validation") or {})
        return _build(cls, "data", {**section, "validation": validation})

    def loader_for(self, size: int) -> str:
        """``"memory"``, ``"dali"`` or ``"torch"``: the choice made, or by the size in bytes."""
        if self.loader != "auto":
            return self.loader
        if size <= self.memory * 2**30:
            return "memory"
        return "dali" if _has_dali() else "torch"


@dataclass(frozen=True)
class NormalizationConfig:
    """How climatology and scale of the states are fitted (:class:`.Normalization`).

    Attributes:
        per_hour: Resolve the hour of the day.
        per_point: Resolve the grid point.
        harmonics: Harmonics of the daily cycle to keep; None keeps each hour's own mean.
        common_scale: Whether all points and hours of a channel share one standard deviation, so
            that the covariance shows where the variance is.

    Raises:
        InputError: On a value that is none of these.
    """

    per_hour: bool = False
    per_point: bool = False
    harmonics: int | None = None
    common_scale: bool = True

    def __post_init__(self) -> None:
        flags: dict[str, Rule] = dict.fromkeys(("per_hour", "per_point", "common_scale"), FLAG)
        check_options({**flags, "harmonics": Whole(0, 11)}, self, "normalization.")


@dataclass(frozen=True)
class PriorConfig:
    """How the linear part of an operator is fitted (:mod:`.linear_prior`).

    Attributes:
        kind: One of :data:`PRIORS`.
        floor: Smallest variance of a mode, as a fraction of the mean.
        folds: Parts of the samples for cross-fitting; 1 for none.
        refit: Whether the linear part of the package is fitted again, to all samples.
        fields: Largest number of samples used; None (or 0) for all.
        hybrid: How a ``"hybrid"`` covariance is estimated.

    Raises:
        InputError: On an unknown kind, or a number out of range.
    """

    kind: str = "spectrum"
    floor: float = 1e-6
    folds: int = 1
    refit: bool = False
    fields: int | None = None
    hybrid: HybridCovariance = field(default_factory=HybridCovariance)

    def __post_init__(self) -> None:
        rules: dict[str, Rule] = {
            "kind": Choice(PRIORS),
            "floor": NOT_NEGATIVE,
            "folds": Whole(),
            "refit": FLAG,
            "fields": Whole(),
        }
        check_options(rules, self, "prior.")

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> PriorConfig:
        """From the section ``prior`` of a configuration."""
        hybrid = _build(HybridCovariance, "prior.hybrid", section.get("hybrid") or {})
        return _build(cls, "prior", {**section, "hybrid": hybrid})


@dataclass(frozen=True)
class OperatorConfig:
    """What is trained: options of :class:`.DiffusionOperator`.

    Attributes:
        noise: Length scale and smoothness of the Matérn noise; None for white noise.
        network_sigma: Noise level above which the network's output fades out; None for never.
        regression: Whether the mean is a linear map of the condition.
        network: Options of :class:`.NeuralOperator`.

    Raises:
        InputError: On a value out of range.
    """

    noise: Mapping[str, float] | None = None
    network_sigma: float | None = None
    regression: bool = False
    network: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rules: dict[str, Rule] = {"network_sigma": POSITIVE, "regression": FLAG}
        check_options(rules, self, "operator.")
        for name, value in (self.noise or {}).items():
            POSITIVE.check(f"operator.noise.{name}", value)


@dataclass(frozen=True)
class Recipe:
    """All that determines a trained package.

    Attributes:
        domain: ``"torus"``, ``"box"`` or ``"sphere"``.
        data: Samples.
        task: Frames of a state, and its condition.
        symmetry: Random transformations of the states, or None.
        normalization: Of the states.
        prior: Linear part of the operator.
        operator: Noise and network.
        trainer: Optimisation.
        sampling: Defaults for sampling from the package.

    Raises:
        InputError: If sections do not fit together.
    """

    domain: str
    data: DataConfig
    task: Task
    symmetry: Symmetry | None
    normalization: NormalizationConfig
    prior: PriorConfig
    operator: OperatorConfig
    trainer: TrainerConfig
    sampling: PosteriorConfig

    def __post_init__(self) -> None:
        if self.data.crop is not None and self.domain != "box":
            raise InputError(
                f"data.crop={list(self.data.crop)} needs domain=box: a crop is not periodic"
            )
        if self.prior.folds > 1 and self.operator.regression:
            raise InputError(
                "prior.folds needs operator.regression=false: the regression has no folds"
            )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Recipe:
        """From the configuration of ``ddo train``, as plain dictionaries and lists.

        Raises:
            InputError: If a value is out of range, or sections do not fit together.
        """
        symmetry, coarse = config.get("symmetry"), config.get("coarse")
        data = DataConfig.of(config["data"])
        view = _build(CoarseWindow, "coarse", coarse) if coarse is not None else None
        return cls(
            domain=config["domain"],
            data=data,
            task=Task(data.frames, config["condition"], view),
            symmetry=_build(Symmetry, "symmetry", symmetry) if symmetry else None,
            normalization=_build(NormalizationConfig, "normalization", config["normalization"]),
            prior=PriorConfig.of(config["prior"]),
            operator=_build(OperatorConfig, "operator", config["operator"]),
            trainer=_build(TrainerConfig, "trainer", config["trainer"]),
            sampling=PosteriorConfig.of(config["sampling"]),
        )

    def batches(self, rank: int = 0, ranks: int = 1) -> BatchOptions:
        """How batches are put together on a rank."""
        trainer = self.trainer
        return BatchOptions(trainer.batch, trainer.seed, self.symmetry, self.data.crop, rank, ranks)


def _build(kind: type[T], name: str, values: Mapping[str, Any]) -> T:
    """An object from a section of the configuration."""
    try:
        return kind(**values)
    except TypeError as error:  # a key that is missing or unknown
        raise InputError(f"the section {name} does not fit ({error})") from error


def _has_dali() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def _numbers(values: object, count: int) -> bool:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        return False
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
