# SPDX-License-Identifier: Apache-2.0
"""Super-resolution, as a diagnostic model of Earth2Studio.

Axes: ``B`` batch, ``S`` samples, ``T`` times, ``L`` lead times, ``C`` variables, ``h w`` coarse
grid, ``H W`` fine grid. See :mod:`ddo_modulus.inference.super_resolve` for the mathematics.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.earth2.host import needs_earth2studio
from ddo_modulus.earth2.packaged import PackagedModel
from ddo_modulus.errors import InputError
from ddo_modulus.inference.assimilate import member_generator
from ddo_modulus.inference.super_resolve import CoarseGrid, super_resolve

with needs_earth2studio():
    from earth2studio.models.batch import batch_coords, batch_func
    from earth2studio.utils import handshake_coords, handshake_dim

if TYPE_CHECKING:
    from earth2studio.utils.type import CoordSystem

#: Points of a prior's grid to a coarse cell along each axis, by default.
DEFAULT_FACTOR = 4.0

_AXES = ("time", "lead_time", "variable", "lat", "lon")


class DDOSuperResolution(PackagedModel):
    """Ensembles of fine fields given a coarse field.

    The package either was trained with a coarse condition (``ddo train
    experiment=kolmogorov_superres``), or is any prior of single states. A prior takes means over
    the cells of a coarse grid, weighted by area as in conservative regridding. By default the cells
    are four by four points and cover the package's domain; ``coarse_factor``, or ``coarse_lat`` and
    ``coarse_lon``, choose others. Values of the nearest point are not means; :meth:`coarsen`
    computes means of fine fields.

    Input is ``(batch, time, lead_time, variable, lat, lon)`` on the coarse grid; all dimensions
    before ``time`` are batch dimensions. Output has the same dimensions on the fine grid, and
    ``sample`` after ``batch`` if ``number_of_samples`` is more than one. For an ensemble without
    the dimension ``sample``, repeat the input along a leading dimension (``ensemble``): each entry
    of the batch gets its own noise.

    ``earth2studio.run.diagnostic`` selects the points of the prognostic model that are nearest to
    the centres of the cells, so choose centres among its latitudes and longitudes. It does not
    support the dimension ``sample``: draw one sample there, or write the loop::

        for x, coords in prognostic.create_iterator(x, coords):
            fine, fine_coords = model(*map_coords(x, coords, model.input_coords()))
            io.write(*split_coords(fine, fine_coords))

    A package whose coarse condition has ``reach`` frames before and after takes all of them along
    ``lead_time``, in order and at its interval, and returns the middle frame. ``run.diagnostic``
    passes one lead time at a time and cannot be used with it.

    Longitudes are from 0 to 360, so those of a region across Greenwich jump from 360 to 0 within
    it. For packages on a box or torus ``lat`` and ``lon`` are the coordinates of rows and columns,
    as in tables of observations.

    Args:
        package: A prior of single states, or a package with a coarse condition.
        coarse_factor: Points of the package's grid to a coarse cell along each axis; for a prior.
        coarse_lat: Latitudes of the centres of the coarse cells, evenly spaced; with `coarse_lon`,
            for a prior. The cells extend half a step around the centres and must lie in the
            package's domain.
        coarse_lon: Longitudes of the centres, from -180 to 180 or from 0 to 360 degrees.
        resolution: Rows and columns of the output on the package's domain; its own grid if None.
            A package whose statistics vary from point to point allows its own grid only.
        number_of_samples: Samples for each coarse field.
        seed: A sample depends on this, its valid time, its position in the batch and its number. If
            None, each call draws a seed from torch's global generator.
        coarse_error: Standard deviation of the error of coarse values, in standard deviations of
            their variable; for a prior.
        posterior: How to sample, as :class:`.PosteriorConfig` or a mapping of its options. Where
            it says nothing, the package's own options, and batches of 64 states.
        engine: What evaluates the prior, one of :data:`ddo_modulus.engines.ENGINES`, or a mapping
            with its ``name``, the ``precision`` of the network (``"fp32"``, ``"fp16"`` or
            ``"bf16"``) and the ``folder`` that ``ddo export`` wrote (the cache if None).

    Raises:
        InputError: If the package is of another kind, or an option is out of range or does not
            apply to it.
    """

    def __init__(
        self,
        package: Package,
        coarse_factor: float | None = None,
        coarse_lat: Sequence[float] | np.ndarray | None = None,
        coarse_lon: Sequence[float] | np.ndarray | None = None,
        resolution: Sequence[int] | None = None,
        number_of_samples: int = 1,
        seed: int | None = None,
        coarse_error: float = 0.01,
        posterior: PosteriorConfig | Mapping[str, Any] | None = None,
        engine: str | Mapping[str, Any] = "torch",
    ) -> None:
        self._posterior = PosteriorConfig.of(posterior).over(PosteriorConfig(batch=64))
        super().__init__(
            package,
            coarse_factor=coarse_factor,
            coarse_lat=None if coarse_lat is None else np.asarray(coarse_lat).tolist(),
            coarse_lon=None if coarse_lon is None else np.asarray(coarse_lon).tolist(),
            resolution=None if resolution is None else list(resolution),
            number_of_samples=number_of_samples,
            seed=seed,
            coarse_error=coarse_error,
            posterior=self._posterior.to_json(),
            engine=engine,
        )
        for name, low in {"number_of_samples": 1, "seed": 0}.items():
            value = self.options[name]
            if value is not None and (not isinstance(value, int) or value < low):
                raise InputError(f"{name}={value!r} must be a whole number from {low} up")
        self.number_of_samples, self.seed = number_of_samples, seed
        self._error = coarse_error
        task = package.task
        self._window = task.span if task.coarse is not None else 1
        if task.coarse is None and task.frames > 1:
            raise InputError(
                f"the package's states are windows of {task.frames} frames; take a package of "
                "single states, or one with a coarse condition"
            )
        if self._window > 1 and package.interval is None:
            raise InputError("the package does not say how far apart its frames are in time")
        axes = (coarse_lat, coarse_lon)
        self._cells = self._coarse_grid(coarse_factor, axes)
        self._fine = package.grid
        if resolution is not None and tuple(resolution) != package.grid.shape:
            if package.normalization.mean.shape[-1] > 1:
                raise InputError(
                    "the package's climatology is by point: it draws on its own grid only; leave "
                    "resolution out"
                )
            if len(resolution) != 2 or min(resolution) < 2:
                raise InputError(f"resolution={resolution} must be numbers of rows and columns")
            self._fine = package.grid.at(resolution)

    def _coarse_grid(
        self, factor: float | None, axes: tuple[Sequence[float] | np.ndarray | None, ...]
    ) -> CoarseGrid:
        grid, coarse = self.package.grid, self.package.task.coarse
        chosen = [axis is not None for axis in axes]
        if coarse is not None:
            if factor is not None or any(chosen):
                raise InputError(
                    "the package has its own coarse grid: leave coarse_factor, coarse_lat and "
                    "coarse_lon out"
                )
            return CoarseGrid.blocks(grid, coarse)
        if any(chosen) and (factor is not None or not all(chosen)):
            raise InputError("give either coarse_factor or both coarse_lat and coarse_lon")
        if axes[0] is None or axes[1] is None:
            return CoarseGrid.of(grid, DEFAULT_FACTOR if factor is None else factor)
        cells = CoarseGrid(np.asarray(axes[0]), np.asarray(axes[1]))
        cells.weights(grid)  # raises if cells are outside
        return cells

    def input_coords(self) -> CoordSystem:
        """Input coordinate system: variables and coarse grid; any times."""
        lead_time: np.ndarray = np.empty(0)
        if self._window > 1:
            step = np.timedelta64(round((self.package.interval or 0.0) * 1e9), "ns")
            lead_time = (np.arange(self._window) - self._window // 2) * step
        return OrderedDict(
            batch=np.empty(0),
            time=np.empty(0),
            lead_time=lead_time,
            variable=np.array(self.package.channels),
            lat=self._cells.lat.copy(),
            lon=self.longitudes(self._cells.lon),
        )

    @batch_coords()
    def output_coords(self, input_coords: CoordSystem) -> CoordSystem:
        """Output coordinate system for an input one.

        Raises:
            KeyError: If a dimension is missing.
            ValueError: If a dimension is in another position or has other coordinates.
        """
        target = self.input_coords()
        for index, name in enumerate(_AXES, 1):
            handshake_dim(input_coords, name, index)
        handshake_coords(input_coords, target, ["variable", "lat", "lon"])
        lead_time = input_coords["lead_time"]
        if self._window > 1:
            if (
                len(lead_time) != self._window
                or (lead_time - lead_time[self._window // 2] != target["lead_time"]).any()
            ):
                offsets = ", ".join(str(v.astype("timedelta64[s]")) for v in target["lead_time"])
                raise InputError(
                    f"the package takes {self._window} frames at once, lead_time of {offsets} "
                    "around that of the field"
                )
            lead_time = lead_time[self._window // 2 :][:1]
        output = OrderedDict(batch=input_coords["batch"])
        if self.number_of_samples > 1:
            output["sample"] = np.arange(self.number_of_samples)
        output["time"] = input_coords["time"]
        output["lead_time"] = lead_time
        output["variable"] = target["variable"]
        output["lat"] = self._fine.lat.copy()
        output["lon"] = self.longitudes(self._fine.lon)
        return output

    def coarsen(self, x: Float[Tensor, "*B H W"]) -> Float[Tensor, "*B h w"]:
        """Coarse fields, as this model takes them, of fields on the package's grid."""
        if self.package.task.coarse is not None:
            return self.package.task.coarse.view(x)
        return self._cells.means(x, self.package.grid)

    @batch_func()
    def __call__(self, x: Tensor, coords: CoordSystem) -> tuple[Tensor, CoordSystem]:
        """Draw fine fields.

        Args:
            x: ``(B, T, L, C, h, w)`` in physical units; leading dimensions as for
                :meth:`input_coords`.
            coords: Its coordinates.

        Returns:
            ``(B, T, L, C, H, W)``, or ``(B, S, T, L, C, H, W)``, float32 on the device of ``x``;
            and its coordinates.

        Raises:
            KeyError: As :meth:`output_coords`.
            ValueError: As :meth:`output_coords`; and an InputError, which is a ValueError, if a
                coarse value is missing or implausible in its units, or there is no time.
        """
        output = self.output_coords(coords)
        if tuple(x.shape) != tuple(len(axis) for axis in coords.values()) or not x.numel():
            raise InputError(
                f"the coarse fields have shape {tuple(x.shape)}, their coordinates "
                f"{tuple(len(axis) for axis in coords.values())}; the two must agree"
            )
        # The caller may be in inference mode, whose tensors have no derivatives.
        with torch.inference_mode(False):
            return self._draw(x.detach().clone(), coords, output).to(x.device), output

    def _draw(self, x: Tensor, coords: CoordSystem, output: CoordSystem) -> Tensor:
        valid = coords["time"][:, None] + output["lead_time"]
        lots = (len(x), *valid.shape)  # B T L
        times = np.broadcast_to(valid, lots).reshape(-1).astype("datetime64[ns]")
        # Lead times are the frames of one input to a package of several frames, else inputs.
        frames = x.flatten(0, 1) if self._window > 1 else x.flatten(0, 2)[:, None]
        seed = self.seed if self.seed is not None else int(torch.randint(2**62, ()))
        first = np.repeat(np.arange(len(x)), valid.size) * self.number_of_samples
        states = super_resolve(
            self.package,
            times,
            frames,
            [
                [member_generator(seed, time, start + s) for s in range(self.number_of_samples)]
                for time, start in zip(times, first.tolist(), strict=True)
            ],
            cells=None if self.package.task.coarse is not None else self._cells,
            shape=self._fine.shape,
            error=self._error,
            posterior=self._posterior,
            engine=self._engine(self._fine.shape),
        )
        states = states.unflatten(0, lots).movedim(3, 1)  # B S T L C H W
        return states if self.number_of_samples > 1 else states[:, 0]
