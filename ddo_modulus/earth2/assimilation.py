# SPDX-License-Identifier: Apache-2.0
"""Assimilation of point observations as an assimilation model of Earth2Studio's.

Axes: ``T`` request times, ``E`` samples, ``C`` variables, ``H W`` grid. See
:mod:`ddo_modulus.inference.assimilate` for what is done.
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
# Defaults of quality control that differ from those of :class:`.QualityControl`.
_QUALITY = {"tolerance": "10min", "duplicates": "average", "missing": "prior"}

Frame = Any  # a frame of pandas or cuDF

_TYPES = {"time": "datetime64[ns]", **dict.fromkeys(("lat", "lon", "observation"), "float32")}


class DDOAssimilation(PackagedModel):
    """Ensembles of states given observations: a prior, conditioned anew at each request time.

    Takes a frame of observations (pandas or cuDF) with the columns ``time, lat, lon, observation,
    variable`` as :func:`earth2studio.data.fetch_dataframe` gives it: the times wanted are in
    ``frame.attrs["request_time"]``. Columns that are used if they are there: ``observation_error``
    (standard deviation, same unit), ``elev``, ``pres``, ``sensor_index``, ``quality``. The frame
    is not written to.

    Reports of the package's variables count, and of what follows from them (see
    :mod:`ddo_modulus.observations.reports`). Those that are flawed, in another place or gross
    errors are left out: :attr:`rejected` lists them, the attribute ``dropped`` of the result counts
    them. At a time without any, the result is a draw of what is known without them, as of
    Earth2Studio's own models.

    Nothing is carried from one call to the next. For a cycle, hand over a forecast.

    Args:
        package: A prior of single states on latitudes and longitudes.
        output: ``"mean"`` or ``"spread"`` (standard deviation) of the ensemble, on ``(time,
            variable, lat, lon)``; or ``"members"``, on ``(time, sample, variable, lat, lon)``.
        number_of_samples: Members of the ensemble.
        lat: Latitudes of the result inside the package's domain, evenly spaced; the package's own
            if None. On a finer grid the prior is drawn at a finer resolution.
        lon: Longitudes, of any branch, also across its seam.
        variables: Variables of the reports that are used; None for all that say something about the
            package's (and :meth:`input_coords` asks for the package's own).
        fields: Further columns that :meth:`input_coords` asks for, such as ``["elev"]``.
        seed: Of all noise. If None, each call draws one from torch's global generator.
        posterior: How to sample, as :class:`.PosteriorConfig` or a mapping of its options; the
            package's own where None.
        quality: Which reports are used, as :class:`.QualityControl` or a mapping of its options.
            By default those within 10 minutes of the request time, one for each place and time;
            a time without any is a draw from what is known without them.
        background: Errors of the forecasts that are handed over as backgrounds, as
            :class:`.BackgroundConfig` or a mapping of its options; needed to take a background.
        engine: What evaluates the prior, one of :data:`ddo_modulus.engines.ENGINES`, or a mapping
            with ``name``, ``precision`` of the network (``"fp32"``, ``"fp16"`` or ``"bf16"``) and
            ``folder`` that ``ddo export`` wrote (the cache if None).

    Raises:
        InputError: If the package is of another kind, or an option is out of range.
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
        self._posterior = PosteriorConfig.of(posterior)
        self._control = QualityControl.of(
            quality if isinstance(quality, QualityControl) else {**_QUALITY, **(quality or {})}
        )
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
            self._background.field(package)  # says now if an error is missing
        self._axes, self._grid = self._output_grid(lat, lon)
        self._rejected = pd.DataFrame()

    def _check_package(self, package: Package) -> None:
        task = package.task
        if task.frames > 1 or task.coarse is not None:
            raise InputError(
                "the package is no prior of single states; take one that `ddo assimilate` takes"
            )
        if not isinstance(package.grid, LatLonGrid):
            raise InputError(
                "the package lives on a box; Earth2Studio has latitudes and longitudes"
            )
        operators = report_operators(package)
        for variable in self._variables or ():
            if not operators.observable(variable):
                raise InputError(
                    f"observations of {variable} say nothing of the package's variables, "
                    f"{', '.join(package.channels)}"
                )

    def _output_grid(
        self, lat: Sequence[float] | np.ndarray | None, lon: Sequence[float] | np.ndarray | None
    ) -> tuple[tuple[np.ndarray, np.ndarray], LatLonGrid | None]:
        """Axes of the result as they are labelled, and the grid that they make, if not our own."""
        own = self.package.grid
        if lat is None and lon is None:
            return (own.lat.copy(), self.longitudes(own.lon)), None
        rows = own.lat if lat is None else np.asarray(lat, float)
        columns = own.lon if lon is None else np.unwrap(np.asarray(lon, float), period=360.0)
        grid = LatLonGrid(rows, columns)
        working_shape(own, grid)  # says if it is not inside
        labels = self.longitudes(own.lon) if lon is None else np.asarray(lon, float)
        return (grid.lat.copy(), labels), grid

    @property
    def rejected(self) -> pd.DataFrame:
        """Reports that the last call left out: their columns and the ``reason``."""
        return self._rejected.copy()

    # ---- coordinates -----------------------------------------------------------------------------

    def init_coords(self) -> None:
        """Nothing is needed to begin with."""
        return None

    def input_coords(self) -> tuple[FrameSchema | CoordSystem, ...]:
        """Columns of a frame of observations; and a forecast's axes, if errors of it are known."""
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
            input_coords: As :meth:`input_coords` gives them.
            request_time: Times wanted.
            **kwargs: Other attributes of a frame; of no influence.

        Raises:
            InputError: If a column is missing, or a variable says nothing of the package's.
        """
        if not input_coords:
            raise InputError("give the input coordinates: those of input_coords()")
        schema = input_coords[0]
        if missing := [name for name in CORE_COLUMNS if name not in schema]:
            raise InputError(f"the input coordinates have no {', '.join(missing)}")
        operators = report_operators(self.package)
        unknown = [str(v) for v in schema["variable"] if not operators.observable(str(v))]
        if unknown:
            raise InputError(
                f"observations of {', '.join(unknown)} say nothing of the package's variables, "
                f"{', '.join(self.package.channels)}"
            )
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
            obs: Observations, with ``attrs["request_time"]``. None, with a background, for none.
            background: Forecast valid at the request times, in physical units, on ``(time,
                variable, lat, lon)`` of any grid that covers the package's; with ``sample`` (or
                ``ensemble``) each member of the result has a member of its own, in turn. Its
                longitudes may be of any branch, a ``lead_time`` of one value adds to its time.
            seed: Of this call, instead of the model's.

        Returns:
            The result on the axes of :meth:`output_coords`, float32 in physical units, on the
            device of the model (cuPy on a GPU where it is installed). Attributes: the ``seed``; for
            each time the number of ``observations`` and the ``inflation``; ``dropped``, the number
            of reports left out by reason.

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
        """Generator of analyses, each by itself.

        Yields:
            None at first, then the analysis of what was sent.

        Receives:
            A frame of observations, or a pair of one (or None) and a background.
        """
        given = yield None
        try:
            while True:
                pair = given if isinstance(given, tuple) else (given,)
                given = yield self(*pair)
        except GeneratorExit:
            return

    def _request_times(self, obs: Frame | None, background: xr.DataArray | None) -> np.ndarray:
        given = None if obs is None else getattr(obs, "attrs", {}).get("request_time")
        if given is None and background is not None:
            return _dataset(background)["time"].values
        if given is None:
            raise InputError(
                "the time of the analysis is unknown: set obs.attrs['request_time'], as "
                "earth2studio.data.fetch_dataframe does, to an array of datetime64"
            )
        return _times(given)

    def _table(self, obs: Frame | None) -> ObservationTable:
        if obs is None:
            obs = pd.DataFrame({name: pd.Series(dtype=object) for name in CORE_COLUMNS})
            obs["time"] = pd.Series(dtype="datetime64[ns]")
        elif not isinstance(obs, pd.DataFrame):  # cuDF
            obs = obs.to_pandas()
        return read_table(obs, self._variables, required=False)

    def _with_forecast(self, background: xr.DataArray) -> BackgroundConfig:
        """The background with its errors."""
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


def _times(given: object) -> np.ndarray:
    """Request times as an array of ``datetime64[ns]``."""
    try:
        times = np.atleast_1d(np.asarray(given, "datetime64[ns]")).reshape(-1)
    except (ValueError, TypeError) as error:
        raise InputError(f"request_time={given!r} are no times: give datetime64") from error
    if not len(times) or np.isnat(times).any():
        raise InputError(f"request_time={given!r} holds no time")
    return times


def _dataset(background: xr.DataArray) -> xr.Dataset:
    """A forecast with a variable for each of its values along ``variable``, on the CPU."""
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
            raise InputError("the background has several lead times; choose the one that is valid")
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
