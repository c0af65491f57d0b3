# SPDX-License-Identifier: Apache-2.0
"""Assimilation of point observations, as an assimilation model of Earth2Studio.

Axes: ``T`` request times, ``E`` samples, ``C`` variables, ``H W`` grid. The analyses themselves are
made by :mod:`ddo_modulus.inference.assimilate`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr

from ddo_modulus.diffusion.package import Package
from ddo_modulus.diffusion.posterior_config import PosteriorConfig
from ddo_modulus.earth2.packaged import PackagedModel
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import LatLonGrid
from ddo_modulus.inference.analyses import working_shape
from ddo_modulus.inference.assimilate import assimilate
from ddo_modulus.inference.backgrounds import BackgroundConfig
from ddo_modulus.inference.quality import QualityControl
from ddo_modulus.inference.reports import report_operators
from ddo_modulus.observations.table import (
    CORE_COLUMNS,
    LABELS,
    NUMBERS,
    ObservationTable,
    read_table,
)
from ddo_modulus.observations.table import ERROR_COLUMN as ERROR

if TYPE_CHECKING:
    from earth2studio.utils.type import CoordSystem, FrameSchema

Output = Literal["mean", "spread", "members"]
# Defaults that differ from those of :class:`.QualityControl`.
_QUALITY = {"tolerance": "10min", "duplicates": "average", "missing": "prior"}

Frame = Any  # a frame of pandas or cuDF

_TYPES = {"time": "datetime64[ns]", **dict.fromkeys(("lat", "lon", "observation"), "float32")}


class DDOAssimilation(PackagedModel):
    """Ensembles of states given observations, at each request time independently.

    The input is a frame of observations (pandas or cuDF) with the columns ``time, lat, lon,
    observation, variable``, as :func:`earth2studio.data.fetch_dataframe` returns it; the analysis
    times are in ``frame.attrs["request_time"]``. Optional columns that are used:
    ``observation_error`` (standard deviation, in the unit of the observation), ``elev``, ``pres``,
    ``sensor_index``, ``quality``. The frame is not modified.

    Reports are used if they observe the package's variables, or quantities that follow from these
    (see :mod:`ddo_modulus.observations.reports`). Reports with missing values, outside the domain
    or with gross errors are left out: :attr:`rejected` lists them, and the attribute ``dropped`` of
    the result counts them. At a time without reports the result is drawn from the prior (or from
    the background), as Earth2Studio's own models do.

    A call does not depend on earlier calls. In a cycle, each call gets a forecast as background.

    Args:
        package: A prior of single states on latitudes and longitudes.
        output: ``"mean"`` or ``"spread"`` (standard deviation) of the ensemble, on ``(time,
            variable, lat, lon)``; or ``"members"``, on ``(time, sample, variable, lat, lon)``.
        number_of_samples: Members of the ensemble, at least two for the spread.
        lat: Latitudes of the result, evenly spaced, inside the package's domain; the package's own
            if None. If they are closer than the package's, the prior is sampled at a resolution as
            fine.
        lon: Longitudes of the result, likewise; from -180 to 180 or from 0 to 360 degrees.
        variables: Variables whose reports are used. If None, all that the package can be compared
            with; :meth:`input_coords` then asks for the package's own.
        fields: Further columns that :meth:`input_coords` asks for, such as ``["elev"]``.
        seed: Seed of all noise. If None, each call draws one from torch's global generator.
        posterior: How to sample, as :class:`.PosteriorConfig` or a mapping of its options; the
            package's own where None.
        quality: Which reports are used, as :class:`.QualityControl` or a mapping of its options.
            In a mapping the defaults are ``tolerance="10min"`` (around the request time),
            ``duplicates="average"`` and ``missing="prior"``.
        background: Errors of the backgrounds that calls are given, as :class:`.BackgroundConfig`
            without a forecast, or a mapping of its options. None: calls take no background.
        engine: What evaluates the prior, one of :data:`ddo_modulus.engines.ENGINES`, or a mapping
            with its ``name``, the ``precision`` of the network (``"fp32"``, ``"fp16"`` or
            ``"bf16"``) and the ``folder`` that ``ddo export`` wrote (the cache if None).

    Raises:
        InputError: If the package is not a prior of single states on latitudes and longitudes, or
            an option is unknown or out of range.
    """

    def __init__(
        self,
        package: Package,
        output: Output = "mean",
        number_of_samples: int = 32,
        lat: Sequence[float] | np.ndarray | None = None,
        lon: Sequence[float] | np.ndarray | None = None,
        variables: Sequence[str] | None = None,
        fields: Sequence[str] = (),
        seed: int | None = None,
        posterior: PosteriorConfig | Mapping[str, Any] | None = None,
        quality: QualityControl | Mapping[str, Any] | None = None,
        background: BackgroundConfig | Mapping[str, Any] | None = None,
        engine: str | Mapping[str, Any] = "torch",
    ) -> None:
        if quality is None or isinstance(quality, Mapping):
            quality = {**_QUALITY, **(quality or {})}
        self._posterior = PosteriorConfig.of(posterior)
        self._control = QualityControl.of(quality)
        self._background = BackgroundConfig.of(background)
        super().__init__(
            package,
            output=output,
            number_of_samples=number_of_samples,
            lat=None if lat is None else np.asarray(lat, float).tolist(),
            lon=None if lon is None else np.asarray(lon, float).tolist(),
            variables=None if variables is None else list(map(str, variables)),
            fields=list(map(str, fields)),
            seed=seed,
            posterior=self._posterior.to_json(),
            quality=self._control.to_json(),
            background=None if self._background is None else self._background.to_json(),
            engine=engine,
        )
        self.output, self.number_of_samples, self.seed = output, number_of_samples, seed
        self._variables = None if variables is None else [str(v) for v in variables]
        self._fields = [str(name) for name in fields]
        self._check_package(package)
        if output not in ("mean", "spread", "members"):
            raise InputError(f"output={output!r} must be 'mean', 'spread' or 'members'")
        least = {"number_of_samples": 1 + (output == "spread"), "seed": 0}
        for name, low in least.items():
            value = self.options[name]
            if value is not None and (not isinstance(value, int) or value < low):
                raise InputError(f"{name}={value!r} must be a whole number from {low} up")
        if unknown := [f for f in fields if f not in (ERROR, *NUMBERS, *LABELS)]:
            raise InputError(
                f"no use is made of the columns {', '.join(unknown)}; choose from "
                f"{', '.join((ERROR, *NUMBERS, *LABELS))}"
            )
        if self._background is not None:
            if self._background.forecast is not None:
                raise InputError("a forecast belongs to a call: leave background.forecast out")
            self._background.field(package)  # raises if a channel has no error
        self._axes, self._grid = self._output_grid(lat, lon)
        self._rejected = pd.DataFrame()

    def _check_package(self, package: Package) -> None:
        task = package.task
        if task.frames > 1 or task.coarse is not None:
            raise InputError(
                "the package is not a prior of single states; choose one for `ddo assimilate`"
            )
        if not isinstance(package.grid, LatLonGrid):
            raise InputError(
                "the package lives on a box; Earth2Studio has latitudes and longitudes"
            )
        self._check_observable(self._variables or ())

    def _check_observable(self, variables: Sequence[str]) -> None:
        operators = report_operators(self.package)
        unrelated = [str(v) for v in variables if not operators.observable(str(v))]
        if unrelated:
            raise InputError(
                f"observations of {', '.join(unrelated)} say nothing about the package's "
                f"variables, {', '.join(self.package.channels)}"
            )

    def _output_grid(
        self, lat: Sequence[float] | np.ndarray | None, lon: Sequence[float] | np.ndarray | None
    ) -> tuple[tuple[np.ndarray, np.ndarray], LatLonGrid | None]:
        """Coordinates of the result; and its grid, if that is not the package's own."""
        own = self.package.grid
        if lat is None and lon is None:
            return (own.lat.copy(), self.longitudes(own.lon)), None
        rows = own.lat if lat is None else np.asarray(lat, float)
        columns = own.lon if lon is None else np.unwrap(np.asarray(lon, float), period=360.0)
        grid = LatLonGrid(rows, columns)
        working_shape(own, grid)  # raises if the grid is not inside the domain
        labels = self.longitudes(own.lon) if lon is None else np.asarray(lon, float)
        return (grid.lat.copy(), labels), grid

    @property
    def rejected(self) -> pd.DataFrame:
        """Reports that the last call left out: their columns, and the ``reason``."""
        return self._rejected.copy()

    # ---- coordinates -----------------------------------------------------------------------------

    def init_coords(self) -> None:
        """None: the model needs no initial state."""
        return None

    def input_coords(self) -> tuple[FrameSchema | CoordSystem, ...]:
        """Columns of the observations; and axes of the background, if the model takes one."""
        schema = OrderedDict((name, np.empty(0, kind)) for name, kind in _TYPES.items())
        schema["variable"] = np.array(self._variables or self.package.channels, str)
        for name in self._fields:
            schema[name] = np.empty(0, str if name in LABELS else np.float32)
        if self._background is None:
            return (schema,)
        return (schema, self._axes_of(np.empty(0, "datetime64[ns]"), members=False))

    def output_coords(
        self,
        input_coords: tuple[FrameSchema | CoordSystem, ...],
        request_time: np.ndarray | None = None,
        **kwargs: object,
    ) -> tuple[CoordSystem]:
        """Axes of the result.

        Args:
            input_coords: As :meth:`input_coords` returns them.
            request_time: Analysis times.
            **kwargs: Other attributes of a frame; ignored.

        Raises:
            InputError: If a column is missing, or a variable does not depend on the package's.
        """
        if not input_coords:
            raise InputError("give the input coordinates: those of input_coords()")
        schema = input_coords[0]
        if missing := [name for name in CORE_COLUMNS if name not in schema]:
            raise InputError(f"the input coordinates have no {', '.join(missing)}")
        self._check_observable(schema["variable"])
        times = np.empty(0, "datetime64[ns]") if request_time is None else _times(request_time)
        return (self._axes_of(times, members=self.output == "members"),)

    def _axes_of(self, times: np.ndarray, *, members: bool) -> CoordSystem:
        axes = OrderedDict(time=times)
        if members:
            axes["sample"] = np.arange(self.number_of_samples)
        axes["variable"] = np.array(self.package.channels)
        axes["lat"], axes["lon"] = (axis.copy() for axis in self._axes)
        return axes

    # ---- analyses --------------------------------------------------------------------------------

    def __call__(
        self,
        obs: Frame | None,
        background: xr.DataArray | None = None,
        *,
        seed: int | None = None,
    ) -> xr.DataArray:
        """Analyse the observations of each request time.

        Args:
            obs: Observations, with ``attrs["request_time"]``. It may be None if there is a
                background, whose times are then the analysis times.
            background: Forecast valid at the request times, in physical units, on ``(time,
                variable, lat, lon)`` of any grid that covers the package's. With an axis ``sample``
                (or ``ensemble``) member ``i`` of the result has member ``i`` of the forecast as its
                background, counted in a circle. Longitudes may be from -180 to 180 or from 0 to
                360; a single ``lead_time`` is added to the time.
            seed: Seed of this call, instead of the model's.

        Returns:
            The result on the axes of :meth:`output_coords`, float32 in physical units, on the
            device of the model (CuPy on a GPU, if it is installed). Attributes: the ``seed``; for
            each time the number of ``observations`` and the ``inflation``; and ``dropped``, the
            number of reports left out, by reason.

        Raises:
            InputError: If a column or the request times are missing, values are in wrong units, or
                the background does not fit.
        """
        times = self._request_times(obs, background)
        table = self._table(obs)
        (axes,) = self.output_coords(self.input_coords(), times)
        if seed is None:
            seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        # The caller may be in inference mode, whose tensors have no derivatives.
        with torch.inference_mode(False):
            result = assimilate(
                self.package,
                table,
                times,
                ensemble=self.number_of_samples,
                seed=seed,
                posterior=self._posterior,
                quality=self._control,
                background=None if background is None else self._with_forecast(background),
                grid=self._grid,
                engine=self._engine(working_shape(self.package.grid, self._grid)),
            )
        self._rejected, analysis = result.rejected, result.dataset
        place = np.searchsorted(analysis["time"].values, times)  # they are sorted there
        fields = torch.from_numpy(np.stack([analysis[c].values for c in self.package.channels], 2))[
            :, place
        ]  # E T C H W
        output = {
            "mean": lambda: fields.mean(0),
            "spread": lambda: fields.std(0),
            "members": lambda: fields.movedim(0, 1),
        }[self.output]()
        attributes = {
            "seed": seed,
            "observations": analysis["observations"].values[place].tolist(),
            "inflation": analysis["inflation"].values[place].tolist(),
            "dropped": dict(result.dropped),
        }
        return xr.DataArray(self._on_device(output), dict(axes), tuple(axes), attrs=attributes)

    def create_generator(
        self,
    ) -> Generator[xr.DataArray | None, pd.DataFrame | tuple | None, None]:
        """Generator of analyses, which are independent of each other.

        Yields:
            None at first, then the analysis of what was sent.

        Receives:
            A frame of observations; or a pair of a frame (or None) and a background.
        """
        sent = yield None
        try:
            while True:
                arguments = sent if isinstance(sent, tuple) else (sent,)
                sent = yield self(*arguments)
        except GeneratorExit:
            return

    def _request_times(self, obs: Frame | None, background: xr.DataArray | None) -> np.ndarray:
        times = None if obs is None else getattr(obs, "attrs", {}).get("request_time")
        if times is None and background is not None:
            return _dataset(background)["time"].values
        if times is None:
            raise InputError(
                "there is no analysis time: set obs.attrs['request_time'], as "
                "earth2studio.data.fetch_dataframe does, to an array of datetime64"
            )
        return _times(times)

    def _table(self, obs: Frame | None) -> ObservationTable:
        if obs is None:
            obs = pd.DataFrame({name: pd.Series(dtype=object) for name in CORE_COLUMNS})
            obs["time"] = pd.Series(dtype="datetime64[ns]")
        elif not isinstance(obs, pd.DataFrame):  # cuDF
            obs = obs.to_pandas()
        return read_table(obs, self._variables, required=False)

    def _with_forecast(self, background: xr.DataArray) -> BackgroundConfig:
        """A background and its errors."""
        if self._background is None:
            raise InputError(
                "a background needs the standard deviation of its errors: give the model "
                "background={'error': ...}"
            )
        return replace(self._background, forecast=_dataset(background))

    def _on_device(self, result: torch.Tensor) -> Any:  # noqa: ANN401 - of numpy or cupy
        if self.device.type != "cuda":
            return result.numpy()
        try:
            cupy = import_module("cupy")
        except ImportError:
            return result.numpy()
        with cupy.cuda.Device(self.device.index or 0):
            return cupy.asarray(result.to(self.device))


def _times(request: object) -> np.ndarray:
    """Request times as an array of ``datetime64[ns]``."""
    try:
        times = np.atleast_1d(np.asarray(request, "datetime64[ns]")).reshape(-1)
    except (ValueError, TypeError) as error:
        raise InputError(f"request_time={request!r} must be times: give datetime64") from error
    if not len(times) or np.isnat(times).any():
        raise InputError(f"request_time={request!r} holds no time, or NaT")
    return times


def _dataset(background: xr.DataArray) -> xr.Dataset:
    """A forecast on the CPU, with the entries of its axis ``variable`` as variables."""
    data = background.data
    if hasattr(data, "get"):  # cuPy
        background = background.copy(data=data.get())
    if "variable" not in background.dims or "time" not in background.coords:
        raise InputError(
            f"the background has the axes {', '.join(map(str, background.dims))}; it needs time, "
            "variable, lat and lon"
        )
    if "lead_time" in background.dims:
        if background.sizes["lead_time"] != 1:
            raise InputError(
                "the background has several lead times; choose the one that is valid at its time"
            )
        background = background.isel(lead_time=0)
    if "lead_time" in background.coords:
        lead = background["lead_time"].values
        background = background.drop_vars("lead_time")
        background = background.assign_coords(time=background["time"] + lead)
    if "sample" in background.dims:
        background = background.rename(sample="ensemble")
    if "time" not in background.dims:
        background = background.expand_dims("time")
    return background.to_dataset("variable")
