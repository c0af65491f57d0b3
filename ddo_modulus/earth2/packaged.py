# SPDX-License-Identifier: Apache-2.0
"""What all components for Earth2Studio have in common: loading, saving, engine and device.

A component consists of one of our packages (:class:`.Package`) and its own options. Earth2Studio
names packages by a root (a folder, ``hf://``, ``s3://``, ``ngc://``, any URL of fsspec's) and
fetches their files one by one into its cache; see :func:`fetch_package`. The options with which a
component was saved are in ``config.json`` beside the package's files::

    {
      "format": 2,
      "components": {
        "DDOAssimilation": {"number_of_samples": 16, "posterior": {"steps": 24}}
      }
    }

One package may serve several components, each with its own options. A component that the file does
not name has its default options, and so have all components of a folder without the file, as
``ddo train`` writes it.
"""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import numpy as np
import torch

from ddo_modulus.data.output import PACKAGE, replacing
from ddo_modulus.diffusion.package import SHIPPED, Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig, checked_names
from ddo_modulus.diffusion.prior import Prior
from ddo_modulus.earth2.host import needs_earth2studio
from ddo_modulus.engines import ENGINES, EngineOptions, Precision, open_engine, pick_precision
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid

with needs_earth2studio():
    # Neither imports a model; earth2studio.models.px, dx and da import them all (half a minute).
    from earth2studio.models.auto import AutoModelMixin
    from earth2studio.models.auto import Package as RemotePackage

logger = logging.getLogger(__name__)

# Where the options of format 1 are now, for a message.
_NESTED = (
    "posterior has steps, solver, covariance, iterations, guidance_interval (jacobian_range), "
    "inflation, batch; quality has tolerance (time_tolerance), accept (quality), default_error, "
    "gross_error, duplicates, thinning_km, superob_km; background has error, length; engine has "
    "name, precision, folder (engines). Save the component again, or rewrite the file"
)

CONFIG = "config.json"
CONFIG_FORMAT = 2

#: Files that every package has.
FILES = ("package.json", "operator.mdlus", "normalization.npz")

#: Files that a package may have.
OPTIONAL_FILES = ("orography.npy",)


@dataclass(frozen=True)
class EngineChoice:
    """What evaluates a component's prior.

    Attributes:
        name: One of :data:`ddo_modulus.engines.ENGINES`.
        precision: Of the network: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        folder: Folder that ``ddo export`` wrote; the cache if None.

    Raises:
        InputError: If there is no such engine or precision.
    """

    name: str = "torch"
    precision: Precision = "fp32"
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise InputError(f"unknown engine {self.name!r}; choose one of {', '.join(ENGINES)}")
        pick_precision(self.precision)

    @classmethod
    def of(cls, engine: object) -> EngineChoice:
        """From itself, a name, or a mapping of the attributes.

        Raises:
            InputError: If there is no such option, engine or precision.
        """
        if isinstance(engine, EngineChoice):
            return engine
        if not isinstance(engine, Mapping):
            return cls(str(engine))
        return cls(**checked_names(cls, engine, "engine"))

    def to_json(self) -> str | dict[str, str | None]:
        """The options for JSON: the name alone if the others are the defaults."""
        if self == EngineChoice(self.name):
            return self.name
        folder = None if self.folder is None else str(self.folder)
        return {"name": self.name, "precision": self.precision, "folder": folder}


class PackagedModel(torch.nn.Module, AutoModelMixin):
    """A component made of a package and options.

    The constructor of a subclass takes the package as its first argument, and options with
    defaults. It passes the package and the options as JSON on to this constructor. Moving the
    module (``to(device)``) moves the package's operator and statistics.

    Args:
        package: The trained prior. It is not copied.
        options: Options of the component as :meth:`save` writes them: JSON.

    Attributes:
        package: See above.
        options: See above.

    Raises:
        InputError: If the package is none of ours, or ``engine`` among the options is unknown.
    """

    #: How the component samples, if it does.
    _posterior: PosteriorConfig = PosteriorConfig()

    #: Name of the shipped package that :meth:`load_default_package` returns.
    default_package: ClassVar[str] = "uk_t2m"

    def __init__(self, package: Package, **options: object) -> None:
        super().__init__()
        if not isinstance(package, Package):
            raise InputError(
                f"{type(self).__name__} takes a ddo_modulus Package, not a "
                f"{type(package).__name__}: Package.load(...), or {type(self).__name__}."
                "from_pretrained(...)"
            )
        self.package = package
        self.operator = package.operator  # a submodule, so that it moves along
        self.options = options
        self._opened: tuple[torch.device, Prior] | None = None
        self._engine_choice = EngineChoice.of(options.get("engine", "torch"))
        if "engine" in options:
            options["engine"] = self._engine_choice.to_json()

    @property
    def device(self) -> torch.device:
        """Device of the operator."""
        return self.operator.device

    def _engine(self, shape: tuple[int, int]) -> Prior | None:
        """What evaluates the prior, as the option ``engine`` says; None for the operator itself.

        An engine is kept until the component moves to another device.

        Args:
            shape: Grid of the states.
        """
        choice = self._engine_choice
        if choice.name == "torch":
            return None
        if self._opened is None or self._opened[0] != self.device:
            folder = None if choice.folder is None else Path(choice.folder)
            batch = self._posterior.resolve(self.package).batch
            options = EngineOptions(folder, choice.precision, shape, batch, logger.info)
            self._opened = self.device, open_engine(choice.name, self.package, options)
        return self._opened[1]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # .to(), .cuda() and .cpu() all call this.
        super()._apply(fn, recurse)
        self.package.normalization = self.package.normalization.to(self.device)
        return self

    def longitudes(self, lon: np.ndarray) -> np.ndarray:
        """Coordinates of columns as in Earth2Studio: longitudes from 0 to 360 degrees."""
        return np.mod(lon, 360.0) if isinstance(self.package.grid, LatLonGrid) else lon.copy()

    @classmethod
    def load_default_package(cls) -> RemotePackage:
        """The package that ships for this component."""
        return RemotePackage(str(SHIPPED / cls.default_package))

    @classmethod
    def load_model(cls, package: RemotePackage, **options: object) -> Self:
        """Build the component from a package of Earth2Studio's.

        Args:
            package: One of our packages, as Earth2Studio finds it.
            **options: Options of the component. They take precedence over those of
                ``config.json``; of nested options, each by itself.

        Raises:
            InputError: If a file is missing, cannot be fetched or is damaged, or ``config.json``
                has an option that the component does not have.
        """
        loaded, config = fetch_package(package)
        saved = config.get(cls.__name__, {})
        names = list(inspect.signature(cls).parameters)[1:]
        for name in saved:
            if name not in names:
                raise InputError(
                    f"{package.root}/{CONFIG}: {cls.__name__} has no option {name!r}; it has "
                    f"{', '.join(names)}"
                )
        return cls(loaded, **saved | {k: _over(v, saved.get(k)) for k, v in options.items()})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None = None, **options: object
    ) -> Self:
        """Build the component from a package by its name or address.

        Args:
            pretrained_model_name_or_path: Name of a shipped package, a folder, or a root of
                Earth2Studio's (``hf://``, ``s3://``, ``ngc://``, ...); the component's default
                package if None.
            **options: As for :meth:`load_model`.

        Raises:
            InputError: As :meth:`load_model`.
        """
        if pretrained_model_name_or_path is None:
            return cls.load_model(cls.load_default_package(), **options)
        root = str(pretrained_model_name_or_path)
        if not Path(root, FILES[0]).is_file() and (SHIPPED / root).is_dir():
            root = str(SHIPPED / root)
        try:
            package = RemotePackage(root)
        except (ImportError, ValueError) as error:  # a protocol that fsspec does not have
            raise InputError(f"{root} is no place for a package: {error}") from error
        return cls.load_model(package, **options)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write package and options, for :meth:`from_pretrained`; completely or not at all.

        Raises:
            InputError: If the folder exists and ``overwrite`` is False.
        """
        config = {"format": CONFIG_FORMAT, "components": {type(self).__name__: self.options}}
        text = json.dumps(config, indent=2) + "\n"
        with replacing(folder, overwrite=overwrite, kind=PACKAGE) as temporary:
            self.package.save(temporary)
            (temporary / CONFIG).write_text(text)
        return Path(folder)


def fetch_package(package: RemotePackage) -> tuple[Package, dict[str, dict[str, object]]]:
    """Load one of our packages through Earth2Studio's, which fetches and caches the files.

    Args:
        package: Where the files are.

    Returns:
        The package, on the CPU, and the options of ``config.json`` by component.

    Raises:
        InputError: If a file is missing, cannot be fetched or is damaged.
    """
    if not isinstance(package, RemotePackage):
        raise InputError(
            f"load_model takes a package of Earth2Studio's, not a {type(package).__name__}; "
            "from_pretrained takes names and places"
        )
    # A cache may rename files; Package.load needs their own names.
    with TemporaryDirectory(prefix="ddo-package-") as temporary:
        folder = Path(temporary, Path(package.root).name or "package")
        folder.mkdir()
        for name in FILES:
            _copy(package, name, folder)
        for name in OPTIONAL_FILES:
            _copy_if_there(package, name, folder)
        try:
            loaded = Package.load(folder)
        except InputError as error:
            raise InputError(str(error).replace(str(folder), str(package.root))) from error
        return loaded, _config(package, folder)


def _over(option: object, saved: object) -> object:
    """An option in place of a saved one; of options by name, those that were saved remain."""
    both = isinstance(option, Mapping) and isinstance(saved, Mapping)
    return {**saved, **option} if both else option  # type: ignore[dict-item]


def _copy(package: RemotePackage, name: str, folder: Path) -> None:
    """Put a file of a package into a folder, under its name."""
    try:
        shutil.copyfile(package.resolve(name), folder / name)
    except FileNotFoundError as error:
        raise InputError(
            f"no {name} in {package.root}: a package has the files {', '.join(FILES)}, as "
            "`ddo train` writes them"
        ) from error
    except Exception as error:  # noqa: BLE001 - every file system raises its own errors
        raise InputError(
            f"{package.root}/{name} cannot be fetched ({type(error).__name__}: {error}); check the "
            "address, the network and, for a private package, your credentials"
        ) from error


def _copy_if_there(package: RemotePackage, name: str, folder: Path) -> bool:
    """Put a file of a package into a folder, if the package has it; whether it has."""
    try:
        _copy(package, name, folder)
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False
        raise
    return True


def _config(package: RemotePackage, folder: Path) -> dict[str, dict[str, object]]:
    """Options by component."""
    if not _copy_if_there(package, CONFIG, folder):
        return {}
    try:
        config = json.loads((folder / CONFIG).read_text())
        version, components = config["format"], config["components"]
        sound = all(isinstance(options, dict) for options in components.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        sound, version = False, None
    if version == 1:
        raise InputError(
            f"{package.root}/{CONFIG} has format 1; format {CONFIG_FORMAT} nests options: {_NESTED}"
        )
    if not sound or version != CONFIG_FORMAT:
        raise InputError(
            f"{package.root}/{CONFIG} is not what save() of a component writes (format "
            f"{CONFIG_FORMAT}); delete it to use the defaults"
        )
    return components
