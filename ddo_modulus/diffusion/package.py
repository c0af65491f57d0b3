# SPDX-License-Identifier: Apache-2.0
"""Packages: a trained operator with everything that is needed to use it.

A package is a folder with ``operator.mdlus`` (weights), ``package.json`` (grid, channels, schedule,
provenance), ``normalization.npz`` (statistics) and optionally ``orography.npy`` (height of the
model's surface).

``package.json`` also holds a :mod:`.fingerprint` of all parts: a part that belongs to another
package is refused.

Loading a package never runs code from it. The statistics are plain arrays (``allow_pickle=False``).
The checkpoint may name no class but :class:`DiffusionOperator`. Its weights, which torch stores in
pickle format, are read by ``torch.load`` with ``weights_only=True`` (its default), which builds
tensors and refuses everything else.

Axes: ``B`` batch, ``T`` times, ``C`` channel, ``H W`` grid.
"""

from __future__ import annotations

import json
import os
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddo_modulus.checks import FLAG, POSITIVE, Real, Whole
from ddo_modulus.constants import GRAVITY
from ddo_modulus.data.normalization import Normalization, hours_of
from ddo_modulus.data.output import PACKAGE, replacing
from ddo_modulus.diffusion.fingerprint import HEADER, check_fingerprint, fingerprint
from ddo_modulus.diffusion.noise import FieldNoiseScheduler
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.diffusion.posterior_config import DEFAULTS, PosteriorConfig
from ddo_modulus.diffusion.stored_prior import check_state
from ddo_modulus.diffusion.task import CoarseWindow, Task
from ddo_modulus.errors import InputError
from ddo_modulus.fields.gaussian_field import MeasuredSpectrum
from ddo_modulus.fields.grid import BoxGrid, Grid, LatLonGrid, check_orography, resampled
from ddo_modulus.fields.refinement import Refinement

#: Packages that ship with the distribution.
SHIPPED = Path(__file__).parents[1] / "packages"

FORMAT = 1

_UNREADABLE = (
    OSError,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,  # raised by torch for anything but tensors
)


@dataclass
class Package:
    """A trained prior, ready for use.

    Attributes:
        operator: The denoiser, in normalised units.
        grid: Grid of its states.
        normalization: Statistics that convert between physical and normalised units, with the
            names of the channels.
        units: Physical unit of each channel.
        posterior: Default options of sampling; None is replaced from :data:`.DEFAULTS`.
        task: Frames of a state, and the condition.
        provenance: How the operator was trained, and on which data; free-form JSON.
        interval: Seconds between frames; None for a task of single states.
        orography: ``(H, W)`` height of the model's surface above sea level, m. If None, it is
            computed from a channel ``z`` (geopotential of the surface) if there is one, and
            unknown otherwise.
    """

    operator: DiffusionOperator
    grid: Grid
    normalization: Normalization
    units: tuple[str, ...]
    posterior: PosteriorConfig = DEFAULTS
    task: Task = field(default_factory=Task)
    provenance: dict[str, Any] = field(default_factory=dict)
    interval: float | None = None
    orography: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit together.

        Raises:
            InputError: If they do not.
        """
        self.posterior = PosteriorConfig.of(self.posterior).over(DEFAULTS)
        basis, statistics = self.operator.basis, self.normalization.mean.shape
        if self.interval is not None:
            POSITIVE.check("interval", self.interval)
        if basis.shape != self.grid.shape:
            raise InputError(f"an operator on {basis.shape} does not fit a grid {self.grid.shape}")
        variables, frames = len(self.channels), self.task.frames
        if variables != len(self.units) or variables * frames != self.operator.channels:
            raise InputError(
                f"{frames} frame(s) of {', '.join(self.channels)} with units "
                f"{', '.join(self.units)} do not fit an operator of {self.operator.channels} "
                "channels"
            )
        if self.task.channels(variables) != self.operator.condition_channels:
            raise InputError(
                f"condition {self.task.condition!r} does not fit an operator with a condition of "
                f"{self.operator.condition_channels} channels"
            )
        if self.orography is None and "z" in self.channels:
            surface = self.normalization.mean[:, self.channels.index("z")].mean(0)
            self.orography = (surface.double().cpu() / GRAVITY).expand(self.grid.shape).numpy()
        if self.orography is not None:
            self.orography = check_orography(self.orography, self.grid, "the orography")
        if any(n not in (1, m) for n, m in zip(statistics[2:], self.grid.shape, strict=True)):
            raise InputError(
                f"statistics on {tuple(statistics[2:])} do not fit a grid {self.grid.shape}"
            )

    @property
    def channels(self) -> tuple[str, ...]:
        """Variable ids of the Earth2Studio lexicon."""
        return self.normalization.channels

    def scheduler(self) -> FieldNoiseScheduler:
        """Noise schedule of the package, with the operator's noise field."""
        return self.posterior.scheduler(self.operator.noise)

    def statistics_at(self, grid: Grid) -> Normalization:
        """Statistics on another grid of the domain; interpolated if they vary by point."""
        own, here = self.normalization, self.grid
        if own.mean.shape[-1] == own.mean.shape[-2] == 1 or grid.shape == here.shape:
            return own
        whole = (t.expand(*t.shape[:2], *here.shape) for t in (own.mean, own.std))
        return Normalization(own.channels, *(resampled(t, here, grid) for t in whole))

    def hours(self, times: np.ndarray) -> Int[Tensor, " T"]:
        """Hour of the day (UTC) nearest to ``datetime64`` times."""
        return torch.from_numpy(hours_of(np.asarray(times, "datetime64[ns]")))

    def conditions(self, times: np.ndarray) -> Float[Tensor, "T D"] | None:
        """Condition of the operator at some times; None if it takes none.

        Raises:
            InputError: If the condition is a coarse view, which times do not determine.
        """
        if self.task.coarse is not None:
            raise InputError(
                "the package needs a coarse view of the states, with `ddo generate`; take a "
                "package without this condition here"
            )
        return self.task.at(times)

    def refined(
        self,
        *,
        cell_means: bool,
        finer: Float[Tensor, "N C H W"] | None = None,
        source: str | None = None,
    ) -> Package:
        """The same weights with other assumptions about scales beyond the training grid.

        Args:
            cell_means: Whether the training states, and those in ``finer``, are means over the
                cells of their grids.
            finer: States of the process on a finer grid, in physical units. Their spectrum is used
                for draws beyond the package's band. A few states are enough, since three numbers
                are fitted to it. If None, the spectrum of the training data is extrapolated; a
                solver that is too coarse for its flow distorts that spectrum near the end of the
                band.
            source: Origin of ``finer``, for the provenance.

        Raises:
            InputError: If the states do not fit, or the domain does not support means over cells.
        """
        refinement = Refinement(cell_means)
        if finer is not None:
            refinement = Refinement(cell_means, self._tail(finer, refinement))
        count = 0 if finer is None else len(finer)
        note = {**asdict(refinement), "source": source, "finer_states": count}
        return replace(
            self,
            operator=self.operator.refined(refinement),
            provenance={**self.provenance, "refinement": note},
        )

    def _tail(
        self, finer: Float[Tensor, "N C H W"], refinement: Refinement
    ) -> tuple[tuple[float, float, float], ...]:
        shape, own = finer.shape[-2:], self.grid.shape
        if finer.shape[1] != len(self.channels) or any(
            n < m for n, m in zip(shape, own, strict=True)
        ):
            raise InputError(
                f"finer states have shape {tuple(finer.shape)}; expected (N, {len(self.channels)}, "
                f"H, W) on a grid at least as fine as {own[0]}x{own[1]}"
            )
        statistics = self.normalization.to(finer.device)
        if statistics.mean.shape[-1] > 1 or statistics.per_hour:
            raise InputError(
                "finer states need statistics that are the same at all points and hours"
            )
        x = statistics.normalize(finer.double())
        basis = self.operator.basis.at(shape)
        return MeasuredSpectrum.fit(basis, x, refinement=refinement).tail.rows

    def save(self, folder: str | Path, *, overwrite: bool = False, half: bool = False) -> Path:
        """Write the package to a folder; a failed write leaves no partial package.

        Args:
            folder: Folder to write.
            overwrite: Whether an existing folder may be replaced.
            half: Whether network weights are stored in half precision.

        Raises:
            InputError: If the folder exists and ``overwrite`` is False, or if a weight is not
                finite, or is not as it would be stored.
        """
        grid: dict[str, Any]
        if isinstance(self.grid, LatLonGrid):
            grid = {"lat": self.grid.lat.tolist(), "lon": self.grid.lon.tolist()}
        else:
            assert isinstance(self.grid, BoxGrid)
            grid = {
                "shape": list(self.grid.shape),
                "lengths": list(self.grid.lengths),
                "periodic": self.grid.periodic,
            }
        header = {
            "format": FORMAT,
            "channels": list(self.channels),
            "units": list(self.units),
            "grid": grid,
            "condition": self.task.condition,
            "coarse": None if self.task.coarse is None else asdict(self.task.coarse),
            "frames": self.task.frames,
            "interval": self.interval,
            "sampling": self.posterior.to_json(),
            "provenance": self.provenance,
        }
        state = self.operator.state_dict()
        if half:
            state = {
                key: value.half() if key.startswith(("network.", "eof_covariance")) else value
                for key, value in state.items()
            }
        check_state(state, f"{folder} is not written: its operator")
        with replacing(folder, overwrite=overwrite, kind=PACKAGE) as temporary:
            temporary.mkdir()
            self.operator.save(str(temporary / "operator.mdlus"), _state_dict=state)
            self.normalization.save(temporary / "normalization.npz")
            if self.orography is not None:
                np.save(temporary / "orography.npy", np.asarray(self.orography, np.float32))
            header["fingerprint"] = fingerprint(temporary, header)
            (temporary / HEADER).write_text(json.dumps(header, indent=2) + "\n")
        return Path(folder)

    @classmethod
    def load(cls, name: str | Path, device: torch.device | str = "cpu") -> Package:
        """Load a shipped package by its name, or any package by its folder.

        Raises:
            InputError: If there is no such package, it is damaged or of another format, its parts
                belong to different packages, or a number in it cannot be used.
        """
        folder = Path(name)
        # Unlike the methods of Path, these are no error for a name that is too long.
        if not os.path.isfile(folder / HEADER) and os.path.isdir(SHIPPED / str(name)):
            folder = SHIPPED / str(name)  # even if a folder of that name holds no package
        shipped = ", ".join(sorted(p.name for p in SHIPPED.glob("*") if p.is_dir()))
        if not os.path.isfile(folder / HEADER):
            raise InputError(f"no package {str(name)!r}: give a folder, or one of {shipped}")
        try:
            header = json.loads((folder / HEADER).read_text())
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                header = header if isinstance(header, dict) else {}
                raise InputError(
                    f"{folder} is a package of format {header.get('format')!r}; this version "
                    f"reads format {FORMAT}"
                )
            check_fingerprint(folder, header)
            with _naming(folder / "operator.mdlus"):
                operator = _load_operator(folder / "operator.mdlus")
            with _naming(folder / "normalization.npz"):
                normalization = Normalization.load(folder / "normalization.npz")
            orography = folder / "orography.npy"
            with _naming(folder / HEADER):
                return cls(
                    operator.to(device).eval().requires_grad_(False),
                    _grid(header["grid"]),
                    normalization.to(device),
                    tuple(map(str, header["units"])),
                    _posterior(header["sampling"]),
                    _task(header),
                    header["provenance"],
                    header.get("interval"),
                    np.load(orography, allow_pickle=False) if orography.is_file() else None,
                )
        except InputError:
            raise
        except _UNREADABLE as error:
            raise InputError(
                f"the package in {folder} cannot be read ({_reason(error)}); "
                "it is damaged or not a package: copy or train it again"
            ) from error


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the name of a file before a refusal of its content."""
    try:
        yield
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error


def _reason(error: BaseException) -> str:
    """An error of a library in a few words, of the first line of its message."""
    line = str(error).strip().partition("\n")[0]
    missing = isinstance(error, KeyError)
    return f"no entry {line}" if missing else f"{type(error).__name__}: {line[:200]}"


def _grid(grid: dict[str, Any]) -> Grid:
    """The grid of a header.

    Raises:
        InputError: If a coordinate or a length cannot be used.
    """
    if "lat" in grid:
        for name in ("lat", "lon"):
            for value in grid[name]:
                Real().check(f"grid.{name}", value)
        return LatLonGrid(grid["lat"], grid["lon"])
    for value in grid["lengths"]:
        POSITIVE.check("grid.lengths", value)
    for value in grid["shape"]:
        Whole(2).check("grid.shape", value)
    FLAG.check("grid.periodic", grid["periodic"])
    return BoxGrid(grid["shape"], grid["lengths"], periodic=grid["periodic"])


def _posterior(header: dict[str, Any]) -> PosteriorConfig:
    """Sampling options of a header, with older names converted."""
    options = dict(header)
    if "jacobian_range" in options:
        options["guidance_interval"] = options.pop("jacobian_range")
    return PosteriorConfig.of(options)


def _task(header: dict[str, Any]) -> Task:
    coarse = header.get("coarse")
    window = None if coarse is None else CoarseWindow(**coarse)
    return Task(header.get("frames", 1), header["condition"], window)


def _load_operator(path: Path) -> DiffusionOperator:
    """Load a checkpoint after checking that it holds a diffusion operator and nothing else.

    PhysicsNeMo imports and calls any class that a checkpoint names, so the name is checked first.
    """
    with zipfile.ZipFile(path) as archive:
        args = json.loads(archive.read("args.json"))
    if args["__name__"] != DiffusionOperator.__name__:
        raise InputError(
            f"{path} holds a {args['__name__']}, not a DiffusionOperator; give a folder that "
            "`ddo train` wrote"
        )
    if args.keys() != {"__name__", "__module__", "__args__"} or tarfile.is_tarfile(path):
        raise InputError(f"{path} is not laid out as `ddo train` writes it; copy or train it again")
    with warnings.catch_warnings():  # older checkpoints are converted: no need to warn
        warnings.filterwarnings("ignore", r"DiffusionOperator: arguments of checkpoint version")
        return DiffusionOperator.from_checkpoint(str(path))
